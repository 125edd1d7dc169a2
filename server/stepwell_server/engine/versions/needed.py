"""Which moves and versions of a model stored sessions still need."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from stepwell_server.core.history import Mark
from stepwell_server.engine.models import Versions
from stepwell_server.engine.state.fields import mark_of
from stepwell_server.store.base import Store

#: Records looked at before others get a turn.
_AT_ONCE = 250


async def stored(store: Store, own: Versions) -> AsyncIterator[tuple[str, int, Mark | None]]:
    """The sessions of a model that a store has: ids, the versions that their records are of, and what they say of it.

    Raises:
        Unavailable: the store cannot be read.
    """
    after = ""
    while some := await store.scan(after=after, limit=_AT_ONCE):
        after = some[-1][0]
        for session_id, header in some:
            if header is None or header.model != own.name:
                continue
            mark = mark_of(header.fields)
            version = own.version_of(mark, header.fingerprint)
            if version is not None:
                yield session_id, version, mark
        await asyncio.sleep(0)


@dataclasses.dataclass(slots=True)
class Seen:
    """Versions and epochs that records say."""

    moving: set[tuple[int, int]]
    """Of sessions that follow the default."""
    pinned: set[int] = dataclasses.field(default_factory=set)
    """Versions of the others."""

    def add(self, version: int, epoch: int, *, is_pinned: bool) -> None:
        """A record says these."""
        if is_pinned:
            self.pinned.add(version)
        else:
            self.moving.add((version, epoch))

    def needed(self, own: Versions, epoch: int) -> dict[str, Any]:
        """`history` and `known` of a model without what nobody needs; moves since `epoch` were not looked at and stay."""
        history = own.history
        kept = {*history.needed_for(self.moving).moves, *(m for m in history.moves if m.until > epoch)}
        history = dataclasses.replace(history, moves=tuple(m for m in history.moves if m in kept))
        used = history.versions() | set(own.loaded) | set(own.labels.values()) | {own.default, own.wanted}
        used |= {version for version, _ in self.moving} | self.pinned
        known = {version: each for version, each in own.known.items() if version in used or each.is_wanted}
        return {"history": history, "known": known}
