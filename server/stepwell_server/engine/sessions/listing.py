"""Sessions by page: of the table, or of a store that has more of them than the table."""

from __future__ import annotations

import asyncio
import heapq

from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.api import SessionInfo
from stepwell_server.engine.sessions.directory import Directory, stored_info
from stepwell_server.engine.sessions.ending import Expiry
from stepwell_server.errors import SessionGone
from stepwell_server.store.base import Store
from stepwell_server.store.record import Header

#: Records looked at before others get a turn.
_AT_ONCE = 500
#: The same where ids are enough.
_IDS_AT_ONCE = 5_000


class Listing:
    """Lists sessions in the order of their ids. Lives on the event loop."""

    def __init__(
        self, table: SessionTable, directory: Directory, expiry: Expiry, others: Store | None
    ) -> None:
        self._table = table
        self._directory = directory
        self._expiry = expiry
        self._others = others

    async def page(self, *, model: str, prefix: str, after: str, limit: int) -> tuple[list[SessionInfo], int]:
        """See `Engine.list_sessions`."""
        if model:
            self._directory.models.by_name(model)  # raises
        if self._others is None:
            return await self._page_of_table(model, prefix, after, limit)
        page = await self._page_of_store(self._others, model, prefix, after, limit)
        return page, await self._total(self._others, model, prefix)

    async def _page_of_table(
        self, model: str, prefix: str, after: str, limit: int
    ) -> tuple[list[SessionInfo], int]:
        wanted = self._directory.models.by_name(model).index if model else None
        ids = self._table.ids()
        page: list[str] = []
        total = 0
        for start in range(0, len(ids), _IDS_AT_ONCE):
            if start:
                await asyncio.sleep(0)
            fitting = [
                session_id
                for session_id in ids[start : start + _IDS_AT_ONCE]
                if session_id.startswith(prefix) and (wanted is None or self._is_of(session_id, wanted))
            ]
            total += len(fitting)
            page = heapq.nsmallest(limit, page + [session_id for session_id in fitting if session_id > after])
        found = [self._info(session_id, None) for session_id in page if session_id in self._table]
        return [info for info in found if info is not None], total

    def _is_of(self, session_id: str, model: int) -> bool:
        handle = self._table.find(session_id)  # None: it is gone since
        return handle is not None and bool(self._table.model[handle] == model)

    async def _page_of_store(
        self, store: Store, model: str, prefix: str, after: str, limit: int
    ) -> list[SessionInfo]:
        found: list[SessionInfo] = []
        while len(found) < limit:
            at_once = _AT_ONCE if model else min(_AT_ONCE, limit - len(found))
            some = await store.scan(after=after, prefix=prefix, limit=at_once)
            if not some:
                break
            for session_id, header in some:
                info = self._info(session_id, header)
                if info is not None and model in {"", info.model}:
                    found.append(info)
            after = some[-1][0]
            await asyncio.sleep(0)
        return found[:limit]

    @staticmethod
    async def _total(store: Store, model: str, prefix: str) -> int:
        if not prefix:
            return await (store.count_of(model) if model else store.count())
        total, after = 0, ""
        while not model:
            count, after = await store.count_some(after=after, prefix=prefix, limit=_IDS_AT_ONCE)
            if not count:
                return total
            total += count
            await asyncio.sleep(0)
        while some := await store.scan(after=after, prefix=prefix, limit=_AT_ONCE):
            total += sum(model in {"", header.model if header else ""} for _, header in some)
            after = some[-1][0]
            await asyncio.sleep(0)
        return total

    def _info(self, session_id: str, header: Header | None) -> SessionInfo | None:
        """What the table says, else what the record says; a damaged record says nothing but its id."""
        if session_id in self._table:
            try:
                return self._directory.info(self._directory.find(session_id, self._directory.here))
            except SessionGone:
                return None
        if session_id in self._expiry.burying:
            return None
        if header is None:
            return SessionInfo(session_id, "", "", 0, 0, 0, 0.0, 0.0, resident=False)
        return stored_info(session_id, header)
