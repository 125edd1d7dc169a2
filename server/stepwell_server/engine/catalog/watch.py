"""Versions as other servers on the same store change them: a change of one is a change of all, each a moment later.

A server serves sessions on the version that it knows until it has heard of a change. What it keeps then is of the
earlier epoch, and whoever reads it brings it forward. A record of a later epoch than it knows is never used: the
document of the change was kept before the record, so it is read first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from stepwell_server.engine.catalog.documents import Documents
from stepwell_server.engine.catalog.session_moves import SessionMoves
from stepwell_server.engine.eager import Rest, finish, start
from stepwell_server.engine.versions.history import History
from stepwell_server.engine.versions.registry import Models, Versions
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log
from stepwell_server.store.base import Store
from stepwell_server.store.record import Header

_log = Log("engine.versions")
_MAX_WAIT_S = 5.0
"""For this many seconds sessions wait for a change that must be known first; then they are refused, to be sent again."""


class Watch:
    """Follows what other servers made of versions. Lives on the event loop; `run` runs in a task of its own."""

    def __init__(self, store: Store, models: Models, documents: Documents, switching: SessionMoves) -> None:
        self._store = store
        self._models = models
        self._documents = documents
        self._switching = switching
        self._reading = asyncio.Lock()
        self._next: asyncio.Task[None] | None = None
        """A look that has not begun to read."""
        self._looks: set[asyncio.Task[None]] = set()
        self._trouble = ""
        """Why the last look failed."""

    def close(self) -> None:
        """Look no more."""
        for task in self._looks:
            task.cancel()

    async def run(self) -> None:
        """Look whenever the store says that another server may have changed something, until cancelled."""
        while True:
            await self._store.documents_changed()
            try:
                await self.poll()
                self._trouble = ""
            except ServerError as error:
                if self._trouble != error.message:
                    self._trouble = error.message
                    _log.warning("the store could not be asked for changes of versions", reason=error.message)
            except Exception as error:
                _log.defect("versions could not be followed; the timer continues", error)

    async def poll(self) -> None:
        """Know what the store says of versions at a moment after this was called.

        Raises:
            Unavailable: the store cannot be asked.
        """
        if (poll := self._poll()) is not None:
            await asyncio.shield(poll)

    def _poll(self) -> asyncio.Task[None] | None:
        """A look that begins to read now or later; None: it is over already."""
        if self._next is not None:
            return self._next
        if self._reading.locked():
            poll = self._next = asyncio.create_task(self._read())
        else:
            read = start(self._read())
            if not isinstance(read, Rest):
                return None
            poll = asyncio.create_task(finish(read))
        self._looks.add(poll)
        poll.add_done_callback(self._on_polled)
        return poll

    def _on_polled(self, poll: asyncio.Task[None]) -> None:
        self._looks.discard(poll)
        if not poll.cancelled() and (error := poll.exception()) is not None:
            _log.debug("versions could not be read", reason=str(error))

    async def _read(self) -> None:
        async with self._reading:
            self._next = None  # later callers need a later read
            for name in await self._documents.changed():
                async with self._documents.lock(name):
                    await self._documents.learn(self._models.versions(name))

    async def catch_up(self, headers: Iterable[Header]) -> None:
        """Know the versions and the moves that records name, if the store knows them.

        Raises:
            Unavailable: the store cannot be asked.
        """
        behind = [header for header in headers if self._models.is_behind(header)]
        if not behind:
            return
        if (poll := self._poll()) is not None:
            await asyncio.wait((poll,), timeout=_MAX_WAIT_S)
            if not poll.done():
                raise self._models.later(behind[0].model)
            poll.result()
        latest: dict[str, int] = {}
        for header in behind:
            if (epoch := self._models.later_epoch(header)) > latest.get(header.model, 0):
                latest[header.model] = epoch
        for name, epoch in latest.items():
            await self._continue_at(self._models.versions(name), epoch)

    async def _continue_at(self, own: Versions, epoch: int) -> None:
        """Records name an epoch of which the store has lost the document: later moves get later epochs.

        The sessions of that epoch stay on the versions that their records name, and follow from there.
        """
        async with self._documents.lock(own.name):
            if own.history.epoch >= epoch:
                return
            _log.warning(
                "the store has lost a move of a model's sessions; those that made it stay where they are",
                model=own.name,
                epoch=epoch,
            )
            await self._switching.wait_until_moved()
            history = History(epoch, own.history.moves)

            def raise_epoch() -> None:
                own.history = history
                self._switching.mark(own, own.loaded.values())

            if not await self._documents.write(own, own.changed(history=history), raise_epoch):
                await self._documents.learn(own)
