"""The documents of models' versions in the store: reads them, follows other servers' changes, and changes them.

A change is a proposal, committed with compare-and-set: the store keeps it only if the document is what this server
last read or wrote. After a conflict the document is read, and the change is judged again. A store of one server
never conflicts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from stepwell_server.engine.catalog.session_moves import SessionMoves
from stepwell_server.engine.commit.group_commit import GroupCommit
from stepwell_server.engine.versions import document
from stepwell_server.engine.versions.registry import Models, Versions
from stepwell_server.errors import ServerError, Unavailable
from stepwell_server.logs import Log
from stepwell_server.store.base import Answer, Batch, DocumentsCorrupt, Store

_log = Log("engine.versions")
MAX_TRIES = 16
"""How often a change is judged if other servers are faster each time."""

Proposal = tuple[Versions, Callable[[], None]] | None
"""The new document, and a function that applies it in memory; None: nothing changes."""


class Documents:
    """Reads and writes documents by model name. Lives on the event loop; one change of a name at a time."""

    def __init__(self, store: Store, commits: GroupCommit, models: Models, switching: SessionMoves) -> None:
        self._store = store
        self._commits = commits
        self._models = models
        self._switching = switching
        self._locks: dict[str, asyncio.Lock] = {}
        self._seen: dict[str, bytes] = {}
        """The content last read or written, by model."""

    def lock(self, name: str) -> asyncio.Lock:
        """Hold it while a name's versions change."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def read(self) -> dict[str, Versions]:
        """Read all documents, by model, before anything is served.

        Raises:
            DocumentError, DocumentsDamaged: one of them cannot be read.
            Unavailable: the store cannot be asked.
        """
        found = _by_model(await self._store.documents(document.PREFIX))
        self._seen.update(found)
        return {name: document.decode(name, content) for name, content in found.items()}

    def last_read(self, name: str) -> Versions | None:
        """A model's document as last read or written; None: there was none."""
        content = self._seen.get(name)
        return None if content is None else document.decode(name, content)

    async def changed(self) -> list[str]:
        """Models whose documents differ from what was last read or written, sorted.

        Raises:
            Unavailable: the store cannot be asked.
        """
        found = _by_model(await self._documents(document.PREFIX))
        names = found.keys() | {own.name for own in self._models.all()}
        return sorted(name for name in names if found.get(name) != self._seen.get(name))

    async def learn(self, own: Versions) -> None:
        """Read a model's document and apply it. The caller holds the model's lock.

        Raises:
            Unavailable: the store cannot be asked, or a newer server wrote a document that this one cannot read.
        """
        content = await self._read(own.name)
        if content == self._seen.get(own.name):
            return
        try:
            stored = Versions(own.name) if content is None else document.decode(own.name, content)
        except document.DocumentError as error:
            _log.error(
                "could not read the versions of a model from the store", model=own.name, reason=str(error)
            )
            raise Unavailable(str(error)) from error
        if stored.change < own.change:
            _log.warning(
                "the store has lost a change of a model's versions; it is written again", model=own.name
            )
            self._remember(own.name, content)
            await self.write(own, own, lambda: None)
            return
        await (
            self._switching.wait_until_moved()
        )  # sessions still moving for the last change must not act as early for this one
        self._remember(own.name, content)
        before = own.chosen
        self._switching.take_over(own, stored)
        if before != own.chosen:
            _log.info(
                "another server made another version the default of a model",
                model=own.name,
                version=own.chosen,
                previous=before,
                is_loaded=not own.wanted,
            )

    async def propose(
        self, own: Versions, attempt: Callable[[], Awaitable[Proposal]], *, even_if_unchanged: bool = False
    ) -> None:
        """Commit what `attempt` makes of the current state, and apply it, even if the caller is cancelled.

        The caller holds the model's lock. `attempt` is called again after each conflict. With `even_if_unchanged`,
        the document is written although it says nothing new.

        Raises:
            Unavailable: the store does not keep it, or other servers keep changing it; nothing changed here.
        """
        await self.learn(own)
        for _ in range(MAX_TRIES):
            made = await attempt()
            if made is None:
                return
            after, then = made
            if document.encode(after) == document.encode(own.changed()) and not even_if_unchanged:
                then()
                return
            if await self.write(own, after, then):
                return
            await self.learn(own)
        raise Unavailable(
            f"versions of model {own.name!r} are being changed by other servers again and again; nothing changed: send it"
            " again"
        )

    async def write(self, own: Versions, after: Versions, then: Callable[[], None]) -> bool:
        """Commit a document; `then` is called once the store keeps it, even if the caller is cancelled meanwhile.

        Returns:
            False if another server changed the document; its change stands.

        Raises:
            Unavailable: the store did not confirm that it keeps the document. If it does, the document is read
                later like a change of another server.
        """
        name, content = document.name_of(own.name), document.encode(after)
        batch = Batch(documents=[(name, content)], documents_follow={name: self._seen.get(own.name)})

        def make_true() -> None:
            self._seen[own.name] = content
            own.change = after.change
            then()

        def done(answer: Answer) -> None:
            if not isinstance(answer, ServerError) and name not in answer.stale:
                make_true()

        answer = await self._commits.keep(batch, 1, done)
        if not isinstance(answer, ServerError):
            return name not in answer.stale
        if not await self._is_there(own.name, content):
            raise answer
        make_true()
        return True

    async def _is_there(self, model: str, content: bytes) -> bool:
        """Whether the store keeps this content, after its answer was lost."""
        try:
            return await self._read(model) == content
        except ServerError:
            return False

    async def _read(self, model: str) -> bytes | None:
        name = document.name_of(model)
        return (await self._documents(name)).get(name)

    async def _documents(self, prefix: str) -> dict[str, bytes]:
        try:
            return await self._store.documents(prefix)
        except DocumentsCorrupt as error:
            raise Unavailable(str(error)) from error

    def _remember(self, model: str, content: bytes | None) -> None:
        if content is None:
            self._seen.pop(model, None)
        else:
            self._seen[model] = content


def _by_model(found: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name.removeprefix(document.PREFIX): content for name, content in found.items()}
