"""One thing at a time, in the order in which it was asked for."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator

_WAIT_S = 0.05


class Turns:
    """Whose turn it is: one caller's at a time, in the order in which they came. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: collections.deque[object] = collections.deque()

    @contextlib.contextmanager
    def next(
        self, waits: Callable[[], None] | None = None, look: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Wait for the turn, and have it for the block.

        Args:
            waits: called if it is not at once.
            look: called again and again while it waits; what it raises ends that.
        """
        ticket = object()
        with self._changed:
            self._line.append(ticket)
            is_first = self._line[0] is ticket
        try:
            if not is_first and waits is not None:
                waits()
            while not is_first:
                with self._changed:
                    self._changed.wait_for(lambda: self._line[0] is ticket, _WAIT_S if look else None)
                    is_first = self._line[0] is ticket
                if look is not None:
                    look()
            yield
        finally:
            with self._changed:
                self._line.remove(ticket)
                self._changed.notify_all()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[bool]:
        """Have the turn for the block if nobody has it; whether it is so."""
        with self._changed:
            is_free = not self._line
            ticket = object()
            if is_free:
                self._line.append(ticket)
        try:
            yield is_free
        finally:
            if is_free:
                with self._changed:
                    self._line.remove(ticket)
                    self._changed.notify_all()
