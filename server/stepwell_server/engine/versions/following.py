"""Versions as other servers on the same store change them: a change of one is a change of all, each a moment later.

A server serves sessions on the version that it knows until it has heard of a change. What it keeps then is of the
earlier epoch, and whoever reads it brings it forward. A record of a later epoch than it knows is never used: the
document of the change was kept before the record, so it is read first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from stepwell_server.core.history import History
from stepwell_server.engine.models import Models, Versions
from stepwell_server.engine.versions import document
from stepwell_server.engine.versions.documents import Documents
from stepwell_server.engine.versions.switching import Switching
from stepwell_server.errors import ServerError, Unavailable
from stepwell_server.logs import Log
from stepwell_server.store.record import Header

_log = Log("engine.versions")
#: How often the store is asked what others have changed, in seconds; one that tells by itself is asked then, too.
LOOK_S = 2.0
#: So long do sessions wait for a change that must be known first; then they are refused, to be asked for again.
_PATIENCE_S = 5.0


class Following:
    """Reads what other servers made of versions. Lives on the event loop; `run` runs beside it."""

    def __init__(self, models: Models, documents: Documents, switching: Switching) -> None:
        self._models = models
        self._documents = documents
        self._switching = switching
        self._locks: dict[str, asyncio.Lock] = {}
        self._reading = asyncio.Lock()
        self._coming: asyncio.Task[None] | None = None
        """A look that has not begun to read."""
        self._looks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._trouble = ""
        """Why the last look failed."""
        self.followed: Callable[[Versions], None] = lambda _own: None
        """Called when another server's change has become true here."""

    def lock(self, name: str) -> asyncio.Lock:
        """Held while the versions of a name change: one change at a time."""
        return self._locks.setdefault(name, asyncio.Lock())

    def close(self) -> None:
        """Look no more."""
        self._is_closed = True
        for task in self._looks:
            task.cancel()

    async def run(self) -> None:
        """Look from time to time and when the store tells, until cancelled; where nobody else uses it there is nothing to do."""
        self._documents.listen(self.look_soon)
        while self._documents.is_shared:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
                self._trouble = ""
            except ServerError as error:
                if self._trouble != error.message:
                    self._trouble = error.message
                    _log.warning("the store could not be asked for changes of versions", reason=error.message)
            except Exception as error:
                _log.defect("versions could not be followed; the timer goes on", error)

    def look_soon(self) -> None:
        """Look now, beside what goes on: another server may have changed something."""
        if not self._is_closed:
            _ = self._look()

    async def look(self) -> None:
        """Know what the store says of versions at a moment after this was called.

        Raises:
            Unavailable: the store cannot be asked.
        """
        await asyncio.shield(self._look())

    def _look(self) -> asyncio.Task[None]:
        if self._coming is None:
            self._coming = asyncio.get_running_loop().create_task(self._read())
            self._looks.add(self._coming)
            self._coming.add_done_callback(self._looked)
        return self._coming

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._looks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.debug("versions could not be read", reason=str(error))

    async def _read(self) -> None:
        async with self._reading:
            self._coming = None  # who asks from now on wants what is there later
            found = await self._documents.read_all()
            names = found.keys() | {own.name for own in self._models.all()}
            for name in sorted(names):
                if not self._documents.is_seen(name, found.get(name)):
                    async with self.lock(name):
                        await self.learn(self._models.versions(name))

    async def learn(self, own: Versions) -> None:
        """Read what others made of a model, whose lock is held, and let it be so.

        Raises:
            Unavailable: the store cannot be asked, or a later server wrote what this one cannot read.
        """
        content = await self._documents.read(own.name)
        if self._documents.is_seen(own.name, content):
            return
        try:
            told = Versions(own.name) if content is None else document.decode(own.name, content)
        except document.DocumentError as error:
            _log.error("versions of a model cannot be followed", model=own.name, reason=str(error))
            raise Unavailable(str(error)) from error
        if told.change < own.change:
            await self._give_back(own, content)
            return
        await self._switching.all_left()  # what is late for the last change must not be early for this one
        self._documents.saw(own.name, content)
        before = own.wanted or own.default
        self._switching.take_over(own, told)
        if before != (own.wanted or own.default):
            _log.info(
                "another server made another version the default of a model",
                model=own.name,
                version=own.wanted or own.default,
                previous=before,
                is_loaded=not own.wanted,
            )
        self.followed(own)

    async def _give_back(self, own: Versions, content: bytes | None) -> None:
        """The store has lost its last writes, and this server knows of one that is missing: it is written again."""
        _log.warning("the store has lost a change of a model's versions; it is written again", model=own.name)
        self._documents.saw(own.name, content)
        await self._documents.write(own.name, document.encode(own), lambda: None)

    async def catch_up(self, headers: Iterable[Header]) -> None:
        """Know the versions and the moves that records tell of, if anybody does.

        Raises:
            Unavailable: the store cannot be asked.
        """
        behind = [header for header in headers if self._models.is_behind(header)]
        if not behind:
            return
        try:
            await asyncio.wait_for(self.look(), _PATIENCE_S)
        except TimeoutError:
            raise self._models.later(behind[0].model) from None
        latest: dict[str, int] = {}
        for header in behind:
            if (epoch := self._models.later_epoch(header)) > latest.get(header.model, 0):
                latest[header.model] = epoch
        for name, epoch in latest.items():
            await self._go_on_at(self._models.versions(name), epoch)

    async def _go_on_at(self, own: Versions, epoch: int) -> None:
        """Records tell of an epoch of which the store has lost the document: later moves are later than that.

        The sessions of that epoch stay on the versions that their records say, and follow from there.
        """
        async with self.lock(own.name):
            if own.history.epoch >= epoch:
                return
            _log.warning(
                "the store has lost a move of a model's sessions; those that made it stay where they are",
                model=own.name,
                epoch=epoch,
            )
            await self._switching.all_left()
            history = History(epoch, own.history.moves)
            after = own.changed(history=history)

            def raise_epoch() -> None:
                own.history, own.change = history, after.change
                self._switching.mark(own, own.loaded.values())

            if not await self._documents.write(own.name, document.encode(after), raise_epoch):
                await self.learn(own)
