"""One request of a sequence after the other, in the order in which they came."""

from __future__ import annotations

import asyncio
from collections import deque

from stepwell_server.errors import Overloaded

MAX_WAITING = 1024
"""Requests of one sequence that may wait."""


class Turns:
    """Lines of waiting requests, one for each sequence that has a request at work. On one event loop."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}

    async def take(self, key: str) -> None:
        """Return when everybody who came before has given the turn on. Without others, at once.

        Raises:
            Overloaded: too many wait.
        """
        line = self._lines.get(key)
        if line is None:
            self._lines[key] = deque()
            return
        if len(line) >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} requests of the sequence wait already", 0.1)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given just now, and will not be used
                self.give(key)
            raise

    def give(self, key: str) -> None:
        """Let the next one take its turn."""
        line = self._lines[key]
        while line:
            turn = line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        del self._lines[key]
