"""A callback in the next iteration of the event loop, however often it is requested."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Alarm:
    """Calls a listener once in the next iteration of the event loop. Used on the event loop."""

    def __init__(self, listener: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._is_due = False

    def ring(self) -> None:
        """Schedule the call, unless it is scheduled already."""
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._call)

    def _call(self) -> None:
        self._is_due = False
        self._listener()
