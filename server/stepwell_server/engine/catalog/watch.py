"""Follows changes of versions that other servers on the same store make.

A server uses the versions it knows until it learns of a change. Records it writes until then belong to the earlier
epoch, and their readers upgrade them. A record of a later epoch than the server knows is never used: the document
of the change was committed before the record, so the server reads the document first.
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
"""Seconds that sessions wait for a change that must be known first; then the request is refused."""


class Watch:
    """Follows other servers' changes of versions. Lives on the event loop; `run` runs in a task of its own."""

    def __init__(self, store: Store, models: Models, documents: Documents, switching: SessionMoves) -> None:
        self._store = store
        self._models = models
        self._documents = documents
        self._switching = switching
        self._reading = asyncio.Lock()
        self._next: asyncio.Task[None] | None = None
        """A poll that has not begun to read."""
        self._looks: set[asyncio.Task[None]] = set()
        self._trouble = ""
        """Why the last poll failed."""

    def close(self) -> None:
        """Stop polling."""
        for task in self._looks:
            task.cancel()

    async def run(self) -> None:
        """Poll whenever the store reports a possible change, until cancelled."""
        while True:
            await self._store.documents_changed()
            try:
                await self.poll()
                self._trouble = ""
            except ServerError as error:
                if self._trouble != error.message:
                    self._trouble = error.message
                    _log.warning("could not read changes of versions from the store", reason=error.message)
            except Exception as error:
                _log.defect("polling for changes of versions failed; the timer continues", error)

    async def poll(self) -> None:
        """Learn what the store says of versions, at a moment after this call began.

        Raises:
            Unavailable: the store cannot be asked.
        """
        if (poll := self._poll()) is not None:
            await asyncio.shield(poll)

    def _poll(self) -> asyncio.Task[None] | None:
        """A poll that begins to read now or later; None: it is already done."""
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
        """Learn the versions and moves that records mention, if the store knows them.

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
        """Continue with a lost epoch: records mention an epoch whose document the store has lost.

        Later moves get later epochs. The sessions of that epoch stay on the versions that their records name.
        """
        async with self._documents.lock(own.name):
            if own.history.epoch >= epoch:
                return
            _log.warning(
                "the store lost a move of a model's sessions; sessions that moved stay on their version",
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
