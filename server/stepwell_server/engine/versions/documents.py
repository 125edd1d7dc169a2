"""The documents of models' versions in the store, which other servers may change too.

Where they may, a change is kept only if the document is what this server last read or wrote: a compare-and-set.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.models import Versions
from stepwell_server.engine.versions import document
from stepwell_server.errors import ServerError
from stepwell_server.store.base import Batch, Committed, Store


class Documents:
    """Reads and writes them by the names of the models. Lives on the event loop; one write of a name at a time."""

    def __init__(self, store: Store, commits: GroupCommit) -> None:
        self._store = store
        self._commits = commits
        self.is_shared = store.local is None
        """Other servers change them too."""
        self._seen: dict[str, bytes] = {}
        """What was last read or written."""

    def listen(self, changed: Callable[[], None]) -> None:
        """Have `changed` called when others may have changed one: see `Store.tell_of_documents`."""
        self._store.tell_of_documents(changed)

    async def read_all(self) -> dict[str, bytes]:
        """What the store has, by model.

        Raises:
            Unavailable: the store cannot be asked.
        """
        found = await self._store.documents(document.PREFIX)
        return {name.removeprefix(document.PREFIX): content for name, content in found.items()}

    async def read(self, model: str) -> bytes | None:
        """What the store has of one model. Errors as of `read_all`."""
        name = document.name_of(model)
        return (await self._store.documents(name)).get(name)

    def is_seen(self, model: str, content: bytes | None) -> bool:
        """Whether this is what was last read or written; None: there was none."""
        return self._seen.get(model) == content

    def told(self, model: str) -> Versions | None:
        """What was last read or written says this, or there was none."""
        content = self._seen.get(model)
        return None if content is None else document.decode(model, content)

    def saw(self, model: str, content: bytes | None) -> None:
        """This was read, and is what the next write follows."""
        if content is None:
            self._seen.pop(model, None)
        else:
            self._seen[model] = content

    async def write(self, model: str, content: bytes, then: Callable[[], None]) -> bool:
        """Have the store keep a document; `then` is called when it does, also if the caller is cancelled meanwhile.

        Returns:
            False if another server has changed it, and it is as that one made it.

        Raises:
            Unavailable: the store did not say that it keeps it. Where others use the store it may come to be there all the
                same, and is read like a change of another server.
        """
        name = document.name_of(model)
        kept: asyncio.Future[bool | ServerError] = asyncio.get_running_loop().create_future()
        batch = Batch(
            documents=[(name, content)],
            documents_follow={name: self._seen.get(model)} if self.is_shared else {},
        )

        def done(committed: Committed | ServerError) -> None:
            if isinstance(committed, ServerError):
                kept.set_result(committed)
            elif name in committed.stale:
                kept.set_result(False)
            else:
                self._seen[model] = content
                then()
                kept.set_result(True)

        self._commits.submit(lambda: batch, 1, done)
        result = await asyncio.shield(kept)
        if not isinstance(result, ServerError):
            return result
        if not (self.is_shared and await self._is_there(model, content)):
            raise result
        self._seen[model] = content
        then()
        return True

    async def _is_there(self, model: str, content: bytes) -> bool:
        """Whether the store keeps this, after its answer was lost."""
        try:
            return await self.read(model) == content
        except ServerError:
            return False
