"""Old moves and versions are forgotten when no session needs them any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.models import Models, Versions
from stepwell_server.engine.versions.needed import Seen, stored
from stepwell_server.engine.versions.proposals import Made, Proposals
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log
from stepwell_server.store.base import Store

_log = Log("engine.versions")
#: With more moves or versions than this, those are looked for that no session makes or is on any more.
MANY_MOVES = 64


class Pruning:
    """Looks for what nobody needs. Lives on the event loop."""

    def __init__(
        self, table: SessionTable, models: Models, proposals: Proposals, others: Store | None
    ) -> None:
        """`others` is the store if it may have sessions that are not in the table."""
        self._table = table
        self._models = models
        self._proposals = proposals
        self._others = others
        self._tasks: set[asyncio.Task[None]] = set()
        self._needed: dict[str, int] = {}
        """Moves or versions, whichever were more, that were still needed when that was last looked at."""

    async def close(self) -> None:
        """Stop looking."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def begin_if_due(self, own: Versions) -> None:
        """Look beside what goes on, if a model has many moves or versions."""
        many = max(MANY_MOVES, 2 * self._needed.get(own.name, 0))
        if max(len(own.history.moves), len(own.known)) > many and not self._tasks:
            task = asyncio.create_task(self.prune(own.name))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def prune(self, name: str) -> None:
        """Forget the moves that no session makes any more, and the versions that only they tell of."""
        own = self._models.versions(name)
        try:
            await (self._compact(own) if self._models.is_shared else self._forget(own))
        except ServerError as error:
            _log.warning("old moves of a model's sessions could not be looked for", model=name, error=error)

    async def _compact(self, own: Versions) -> None:
        """Where others use the store a server that was stopped may still write a record of any epoch that there was.

        So none of them may come to mean nothing: of moves that do the same one is kept, and versions are forgotten that
        nobody wants, whose sessions have all left.
        """
        on_them: set[int] = set()
        async for version, epoch, is_pinned in self.stored(own, all_of_them=True):
            on_them.add(version if is_pinned else own.history.way(version, epoch)[0])

        async def attempt() -> Made:
            used = on_them | set(own.loaded) | set(own.labels.values()) | {own.default, own.wanted}
            free = {
                version for version, each in own.known.items() if version not in used and not each.is_wanted
            }

            def alike(one: int, other: int) -> bool:
                return own.known[one].layout == own.known[other].layout

            history = own.history.compacted(free, alike)
            gone = free - history.versions()
            after = own.changed(
                history=history,
                known={version: each for version, each in own.known.items() if version not in gone},
                forgotten=max(own.forgotten, *gone, 0),
            )
            self._needed[own.name] = max(len(after.history.moves), len(after.known))

            def forget() -> None:
                own.history, own.known, own.forgotten = after.history, after.known, after.forgotten

            return after, forget

        async with self._proposals.lock(own.name):
            await self._proposals.have_kept(own, attempt)

    async def _forget(self, own: Versions) -> None:
        epoch = own.history.epoch
        seen = Seen({(version, at) for version in own.loaded for at in (0, epoch - 1, epoch)})
        async for version, of_epoch, is_pinned in self.stored(own, all_of_them=True):
            seen.add(version, of_epoch, is_pinned=is_pinned)

        async def attempt() -> Made:
            # what was under way while the records were read may say any of these
            seen.moving |= {(version, at) for version in own.loaded for at in (0, epoch - 1, epoch)}
            after = own.changed(**seen.needed(own, epoch))
            self._needed[own.name] = max(len(after.history.moves), len(after.known))

            def forget() -> None:
                own.history, own.known = after.history, after.known

            return after, forget

        async with self._proposals.lock(own.name):
            await self._proposals.have_kept(own, attempt)

    async def stored(
        self, own: Versions, *, all_of_them: bool = False
    ) -> AsyncIterator[tuple[int, int, bool]]:
        """Versions, epochs and whether they are pinned, of records whose sessions are not in the table; or of all."""
        if self._others is None:
            return
        async for session_id, version, mark in stored(self._others, own):
            if all_of_them or session_id not in self._table:
                yield version, 0 if mark is None else mark.epoch, mark is not None and mark.is_pinned
