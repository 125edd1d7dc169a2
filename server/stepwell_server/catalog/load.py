"""A running load: its stage, and whether it has been stopped."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path

from stepwell_server.catalog.control import SWITCH, WAITING, LoadRequest, Progress
from stepwell_server.errors import ModelLoadFailed
from stepwell_server.logs import Log

_log = Log("models")


class Load:
    """A running load."""

    def __init__(self, request: LoadRequest, version: int, path: Path, progress: Progress) -> None:
        self.request = request
        self.version = version
        self.stage = WAITING
        self.abandoned = threading.Event()
        """Set when it is stopped."""
        self.why = "it was stopped by its caller"
        self.path = path
        self._progress = progress
        self._stopped = asyncio.Event()

    def report(self, stage: str) -> None:
        """Begin a stage."""
        self.stage = stage
        _log.info("loading model", model=self.request.name, version=self.version, stage=stage)
        self._progress(stage)

    def stop(self, why: str = "") -> None:
        """Stop it, unless the switch has begun."""
        if self.stage != SWITCH:
            self.why = why or self.why
            self.abandoned.set()
            self._stopped.set()

    def require_wanted(self) -> None:
        """Raise `ModelLoadFailed` if it was stopped."""
        if self.abandoned.is_set():
            raise ModelLoadFailed(
                f"version {self.version} of model {self.request.name!r} was not loaded: {self.why}"
            )

    def begin(self) -> None:
        """Begin the switch, after which it can no longer be stopped.

        Raises:
            ModelLoadFailed: it was stopped before.
        """
        self.require_wanted()
        self.report(SWITCH)

    async def turn(self, lock: asyncio.Lock) -> None:
        """Acquire the lock, or give up when the load is stopped.

        Raises:
            ModelLoadFailed: it was stopped; the lock is not held.
        """
        taking, stopped = asyncio.create_task(lock.acquire()), asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait((taking, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            if not taking.done():
                taking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await taking
        if self.abandoned.is_set():
            if taking.done() and not taking.cancelled():
                lock.release()
            self.require_wanted()
