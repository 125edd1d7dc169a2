"""A call in the next turn of the event loop, however often it was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Alarm:
    """A call that is due in the next turn of the event loop, however often it is asked for before. Lives there."""

    def __init__(self, listener: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._is_due = False

    def ring(self) -> None:
        """Have the listener called once."""
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._call)

    def _call(self) -> None:
        self._is_due = False
        self._listener()
