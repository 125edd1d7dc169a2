"""A call that is due in the next turn of the event loop, however often it is asked for before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Alarm:
    """Rung by whoever has work for the listener. Lives on the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener: Callable[[], None] | None = None
        self.is_due = False
        """The listener is called as soon as the event loop is at it."""

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each ring."""
        self._listener = listener

    def ring(self) -> None:
        """Have the listener called once."""
        if not self.is_due and self._listener is not None:
            self.is_due = True
            self._loop.call_soon(self._call)

    def _call(self) -> None:
        self.is_due = False
        assert self._listener is not None, "only rung with a listener"
        self._listener()
