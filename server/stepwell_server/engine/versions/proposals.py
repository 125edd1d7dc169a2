"""A change of a model's versions is kept by the store, then made so in memory: again, if another server was faster."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from stepwell_server.engine.models import Versions
from stepwell_server.engine.versions import document
from stepwell_server.engine.versions.documents import Documents
from stepwell_server.engine.versions.following import Following
from stepwell_server.errors import Unavailable

#: So often is a change judged again because another server was faster.
MOST_TRIES = 16

Made = tuple[Versions, Callable[[], None]] | None
"""What is to be, and what makes it so in memory; None: it is so."""


class Proposals:
    """Has changes kept. Lives on the event loop; one change of a name at a time, under its lock."""

    def __init__(self, documents: Documents, following: Following) -> None:
        self._documents = documents
        self._following = following

    def lock(self, name: str) -> asyncio.Lock:
        """See `Following.lock`."""
        return self._following.lock(name)

    async def have_kept(
        self, own: Versions, attempt: Callable[[], Awaitable[Made]], *, anyway: bool = False
    ) -> None:
        """Have the store keep what `attempt` makes of what is known now, and make it so: also if the caller is cancelled.

        It is called again with what others have made, as long as they were faster; None: there is nothing to do. With
        `anyway` the store is told although what is known here is the same.

        Raises:
            Unavailable: the store does not keep it, or others change it all the time; nothing changed here.
        """
        if self._documents.is_shared:
            await self._following.learn(own)
        for _ in range(MOST_TRIES):
            made = await attempt()
            if made is None:
                return
            after, then = made
            if document.encode(after) == document.encode(own.changed()) and not anyway:
                then()
                return

            def true(change: int = after.change, then: Callable[[], None] = then) -> None:
                own.change = change
                then()

            if await self._documents.write(own.name, document.encode(after), true):
                return
            await self._following.learn(own)
        raise Unavailable(
            f"versions of model {own.name!r} are being changed by other servers again and again; nothing changed: send it"
            " again"
        )
