"""Sessions by page: from the store as they lie there, or as the catalogue chooses them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.api import Order, Position, SessionFilter, SessionInfo, SessionPage
from stepwell_server.engine.sessions.catalogue import Candidate, Catalogue, Query
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.end import Expiry
from stepwell_server.engine.shares import TURN
from stepwell_server.errors import SessionGone
from stepwell_server.store import counts
from stepwell_server.store.base import Fetched, Store
from stepwell_server.store.record import Header, header_or_none

#: Records that a store which others use is asked for together; of others there are `TURN`.
_AT_ONCE = 250
#: Records that one page looks at, at most, to find those of a model.
_MOST_LOOKED_AT = 20_000
#: A model that has less than this share of the sessions is looked for in the catalogue.
_RARE = 1 / 16


class Listing:
    """Lists sessions. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        directory: Directory,
        expiry: Expiry,
        others: Store | None,
        catalogue: Catalogue,
        clock: Clock,
    ) -> None:
        self._table = table
        self._directory = directory
        self._expiry = expiry
        self._others = others
        """The store, if it may have sessions that are not in the table."""
        self._is_shared = others is not None and others.local is None
        self._catalogue = catalogue
        self._clock = clock

    @property
    def _piece(self) -> int:
        """Sessions looked at before others get a turn."""
        return _AT_ONCE if self._is_shared else min(_AT_ONCE, TURN)

    async def ask(
        self,
        *,
        order: Order = Order.ID,
        descending: bool = False,
        after: Position | None = None,
        limit: int = 1000,
        count: bool = True,
        **wanted: Any,
    ) -> tuple[SessionPage, int]:
        """Up to `limit` sessions, and how many fit in all (0 without `count`); `wanted` is as of `SessionFilter`.

        Raises:
            ModelNotFound: there is no model of that name.
        """
        return await self.page(
            Query(
                filter=SessionFilter(**wanted),
                order=order,
                descending=descending,
                after=after,
                limit=limit,
                count=count,
            )
        )

    async def page(self, query: Query) -> tuple[SessionPage, int]:
        """As `ask`."""
        if query.filter.model:
            self._directory.models.named(query.filter.model)  # raises
        if self._others is None or not await self._is_as_stored(self._others, query):
            return await self._page_of_catalogue(query)
        page, model = await self._page_of_store(self._others, query), query.filter.model
        if not query.count:
            return page, 0
        return page, await counts.count(self._others, query.filter.tenant, model)

    @staticmethod
    async def _is_as_stored(store: Store, query: Query) -> bool:
        """Whether the store has the sessions in the order that is asked for, not far from each other, and counted.

        Those of a tenant lie together; those of none are among all others.
        """
        if query.order is not Order.ID or query.descending or query.filter.idle_longer_s is not None:
            return False
        wanted = query.filter
        if wanted.prefix and query.count:
            return False
        if not wanted.model and wanted.tenant != "":
            return True
        among = await counts.count(store, wanted.tenant or None, "")
        return await counts.count(store, wanted.tenant, wanted.model) >= among * _RARE

    async def _page_of_catalogue(self, query: Query) -> tuple[SessionPage, int]:
        # one more than is wanted: whether there is one
        candidates, total = await self._catalogue.choose(dataclasses.replace(query, limit=query.limit + 1))
        page = SessionPage()
        if len(candidates) > query.limit:
            del candidates[query.limit :]
            key, name = candidates[-1]
            page.next = key, str(name, "utf-8", "replace")
        count = self._piece
        for start in range(0, len(candidates), count):
            if len(candidates) > count:
                await self._directory.pieces.turn(query.filter.tenant or "")
            some = candidates[start : start + count]
            page += [info for info in await self._described(some) if self._fits(info, query.filter)]
        return page, total

    async def _described(self, candidates: Sequence[Candidate]) -> list[SessionInfo]:
        """What is known of sessions now, of those that are still there."""
        ids = [str(name, "utf-8", "replace") for _, name in candidates]
        away = ids if self._is_shared else [i for i in ids if i not in self._table]
        headers: dict[str, Header | None] = {}
        if away and self._others is not None:
            fetched = await self._others.fetch(away)
            headers = {
                i: self._dated(header_or_none(i, each.record), each)
                for i, each in zip(away, fetched, strict=True)
                if each.record is not None
            }
        is_here = self._table.__contains__
        found = [
            self._info(i, headers.get(i)) for i in ids if i in headers or (is_here(i) and not self._is_shared)
        ]
        return [info for info in found if info is not None]

    def _dated(self, header: Header | None, found: Fetched) -> Header | None:
        """A header that says when the session was last used, as the store knows it."""
        if header is None or not self._is_shared:
            return header
        return dataclasses.replace(header, last_used=self._clock.now() - found.idle_s)

    def _fits(self, info: SessionInfo, wanted: SessionFilter) -> bool:
        if wanted.model not in {"", info.model}:
            return False
        idle = wanted.idle_longer_s
        return idle is None or self._clock.now() - info.last_used >= idle

    async def _page_of_store(self, store: Store, query: Query) -> SessionPage:
        page, looked_at = SessionPage(), 0
        after = "" if query.after is None else query.after[1]
        wanted, model, prefix = query.filter, query.filter.model, query.filter.ids_begin_with
        while True:
            if looked_at or query.limit > self._piece:
                await self._directory.pieces.turn(wanted.tenant or "")
            at_once = self._piece if model else min(self._piece, query.limit + 1 - len(page))
            some = await store.scan(after=after, prefix=prefix, limit=at_once)
            if not some:
                return page
            looked_at += len(some)
            for session_id, header in some:
                info = self._info(session_id, header) if wanted.is_meant(session_id) else None
                if info is not None and model in {"", info.model}:
                    if len(page) == query.limit:
                        page.next = 0.0, after
                        return page
                    page.append(info)
                after = session_id
            if looked_at >= _MOST_LOOKED_AT:
                page.next = 0.0, after
                return page

    def _info(self, session_id: str, header: Header | None) -> SessionInfo | None:
        """What the table says, else what the record says; a damaged record says nothing but its id.

        Where others use the store, what the record says: the table may be behind.
        """
        if self._expiry.is_ending(session_id):
            return None
        if self._is_shared and header is not None:
            if self._clock.now() - header.last_used > self._expiry.limits.seconds(header.max_idle_ms):
                return None  # it has ended, though nobody has told the store yet
            info = self._directory.stored_info(session_id, header)
            handle = self._table.find(session_id)
            if handle is None:
                return info
            here = self._directory.info(handle)
            used = max(info.last_used, here.last_used)  # of reads the store is told now and then
            return dataclasses.replace(info, last_used=used, resident=here.resident)
        if session_id in self._table:
            try:
                return self._directory.info(self._directory.find(session_id, self._directory.here))
            except SessionGone:
                return None
        if header is None:
            return SessionInfo(session_id, "", "", 0, 0, 0, 0.0, 0.0, resident=False)
        return self._directory.stored_info(session_id, header)
