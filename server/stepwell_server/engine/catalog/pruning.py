"""Old moves and versions are forgotten when no session needs them any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from stepwell_server.engine.catalog.documents import Documents, Proposal
from stepwell_server.engine.state.fields import mark_of
from stepwell_server.engine.versions.registry import Versions
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log
from stepwell_server.store.base import Store
from stepwell_server.store.record import header_or_none

_log = Log("engine.versions")
MANY_MOVES = 64
"""With more moves or versions than this, those are looked for that no session makes or is on any more."""
_BATCH_SIZE = 250
"""Records looked at before other work gets its turn."""


async def stored(store: Store, own: Versions) -> AsyncIterator[tuple[str, int, int]]:
    """The sessions of a model that a store has: ids, the versions of their records, and those that they are on now.

    Raises:
        Unavailable: the store cannot be read.
    """
    after = ""
    while len(heads := await store.heads(after=after, limit=_BATCH_SIZE)):
        ids = [str(key, "utf-8", "replace") for key in heads.keys]
        after = ids[-1]
        models = [heads.models[model] for model in heads.model.tolist()]
        ids = [session_id for session_id, model in zip(ids, models, strict=True) if model == own.name]
        for session_id, each in zip(ids, await store.fetch(ids), strict=True):
            header = None if each.record is None else header_or_none(session_id, each.record)
            if header is None or header.model != own.name:
                continue
            mark = mark_of(header.fields)
            version = own.version_of(mark, header.fingerprint)
            if version is None or (mark is not None and mark.is_pinned):
                now = version
            else:
                now, _ = own.history.way(version, 0 if mark is None else mark.epoch)
            if version is not None and now is not None:
                yield session_id, version, now
        await asyncio.sleep(0)


class Pruning:
    """Looks for what nobody needs. Lives on the event loop."""

    def __init__(self, store: Store, documents: Documents) -> None:
        self._store = store
        self._documents = documents
        self._tasks: set[asyncio.Task[None]] = set()
        self._needed: dict[str, int] = {}
        """Moves or versions, whichever were more, that were still needed when that was last looked at."""

    async def close(self) -> None:
        """Stop looking."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def begin_if_due(self, own: Versions) -> None:
        """Look in a task, if a model has many moves or versions."""
        many = max(MANY_MOVES, 2 * self._needed.get(own.name, 0))
        if max(len(own.history.moves), len(own.known)) > many and not self._tasks:
            task = asyncio.create_task(self.prune(own))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def prune(self, own: Versions) -> None:
        """Of moves that do the same keep one, and forget versions that nobody wants and whose sessions have all left.

        A record of any epoch that there was may still be written, by a server that was stopped: none of them may come to
        mean nothing.
        """
        try:
            await self._prune(own)
        except ServerError as error:
            _log.warning(
                "old moves of a model's sessions could not be looked for", model=own.name, error=error
            )

    async def _prune(self, own: Versions) -> None:
        on_them: set[int] = set()
        async for _, version, now in stored(self._store, own):
            on_them |= {version, now} if version < 0 else {now}  # only its moves know the number below 0

        async def attempt() -> Proposal:
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

        async with self._documents.lock(own.name):
            await self._documents.propose(own, attempt)
