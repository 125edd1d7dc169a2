"""The calls of SessionService for administrators: lists, closing by filters, export and import."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.core.callers import Caller
from stepwell_server.core.idle import MAX_IDLE_MS, MIN_IDLE_S
from stepwell_server.engine.api import SessionFilter as Filter
from stepwell_server.engine.api import SessionInfo
from stepwell_server.engine.sessions.close import Place
from stepwell_server.engine.sessions.transfer import (
    MAX_IMPORTED,
    ExistingPolicy,
    ExportResult,
    ImportOutcome,
    SessionRecord,
)
from stepwell_server.errors import InvalidInput, MessageTooLarge, ServerError
from stepwell_server.rpc import convert, tenancy
from stepwell_server.rpc.page_tokens import from_token, to_token
from stepwell_server.rpc.status import to_proto

if TYPE_CHECKING:
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.fronts.base import Call

_DEFAULT_PAGE = 1000
_LARGEST_PAGE = 10_000
#: Number of sessions to convert before yielding to the event loop.
_BATCH_SIZE = 64
#: Default size of a page of exported sessions.
_EXPORTED_BYTES = 1 << 20
_EXISTING: dict[int, ExistingPolicy] = {
    pb.EXISTING_SESSION_UNSPECIFIED: ExistingPolicy.REFUSE,
    pb.EXISTING_SESSION_REFUSE: ExistingPolicy.REFUSE,
    pb.EXISTING_SESSION_SKIP: ExistingPolicy.SKIP,
    pb.EXISTING_SESSION_REPLACE: ExistingPolicy.REPLACE,
}
_OUTCOMES = {
    ImportOutcome.IMPORTED: pb.IMPORT_OUTCOME_IMPORTED,
    ImportOutcome.REPLACED: pb.IMPORT_OUTCOME_REPLACED,
    ImportOutcome.SKIPPED: pb.IMPORT_OUTCOME_SKIPPED,
}


_Opening: TypeAlias = (
    pb.OpenSessionRequest | pb.OpenSessionsRequest | pb.ForkSessionRequest | pb.ForkSessionsRequest
)
_Filtered: TypeAlias = pb.ListSessionsRequest | pb.CloseMatchingSessionsRequest | pb.ExportSessionsRequest


class Administration:
    """Lists, closing by filters, export and import. A base class of the servicer; lives on the event loop."""

    def __init__(self, engine: Engine, max_reply_bytes: int) -> None:
        self._engine = engine
        self._max_reply_bytes = max_reply_bytes
        self._listing = asyncio.Lock()

    async def list_sessions(self, request: pb.ListSessionsRequest, call: Call) -> pb.ListSessionsResponse:
        """List sessions, page by page."""
        after, _ = from_token(request.page_token)
        wanted = _filter_of(request, call.who)
        page, total = await self._engine.list_sessions(
            model=wanted.model,
            tenant=wanted.tenant,
            prefix=wanted.prefix,
            idle_longer_s=wanted.idle_longer_s,
            after=tenancy.internal_page_end(call.who, after) if after else "",
            limit=_page_size(request.page_size),
            count=not request.skip_total,
        )
        response = pb.ListSessionsResponse(total=total)
        for start in range(0, len(page), _BATCH_SIZE):
            # each iteration of the event loop converts one piece, of one call
            async with self._listing:
                response.sessions.extend(
                    [_listed(info, call.who) for info in page[start : start + _BATCH_SIZE]]
                )
                if len(page) > _BATCH_SIZE:
                    await asyncio.sleep(0)
        response.next_page_token = (
            "" if page.next is None else to_token(tenancy.external_page_end(call.who, page.next))
        )
        return response

    async def close_matching_sessions(
        self, request: pb.CloseMatchingSessionsRequest, call: Call
    ) -> pb.CloseMatchingSessionsResponse:
        """Close sessions that match a filter, one page per call."""
        wanted = _filter_of(request, call.who)
        is_filtered = bool(wanted.model or wanted.prefix or wanted.idle_longer_s is not None)
        if is_filtered is request.all:
            raise InvalidInput(
                "all must be true without model, session_id_prefix and idle_longer, and false with any of them;"
                f" got {str(request.all).lower()}"
            )
        after, as_of = from_token(request.page_token)
        closed, place = await self._engine.close_matching(
            wanted,
            limit=_page_size(request.page_size),
            place=Place(as_of, tenancy.internal_page_end(call.who, after)) if request.page_token else None,
            request_id=request.request_id,
        )
        token = (
            "" if place is None else to_token(tenancy.external_page_end(call.who, place.after), place.as_of)
        )
        return pb.CloseMatchingSessionsResponse(closed=closed, next_page_token=token)

    async def export_sessions(
        self, request: pb.ExportSessionsRequest, call: Call
    ) -> pb.ExportSessionsResponse:
        """Read complete sessions."""
        who = call.who
        wanted = _filter_of(request, who)
        max_bytes = self._max_reply_bytes * 3 // 4
        page_bytes = min(request.page_bytes or _EXPORTED_BYTES, max_bytes)
        place, _ = from_token(request.page_token)
        response = pb.ExportSessionsResponse()
        if not request.session_ids:
            found, end = await self._engine.export_page(
                wanted,
                after=tenancy.internal_page_end(who, place) if place else "",
                page_bytes=page_bytes,
                max_bytes=max_bytes,
                deadline=call.deadline,
            )
            _add_exported(response, found, who)
            response.next_page_token = "" if end is None else to_token(tenancy.external_page_end(who, end))
            return response
        if wanted != Filter(tenant=wanted.tenant):
            raise InvalidInput(
                "session_ids must be empty with model, session_id_prefix or idle_longer; got both"
            )
        ids = list(request.session_ids)
        if len(ids) > MAX_IMPORTED:
            raise InvalidInput(f"session_ids must be at most {MAX_IMPORTED}; got {len(ids)}")
        if place and place not in ids:
            raise InvalidInput("page_token must belong to a page of the same session_ids; got another one")
        size = 0
        inner = tenancy.internal_ids(who, ids)
        for at in range(ids.index(place) + 1 if place else 0, len(ids)):
            (each,) = await self._engine.export_sessions([inner[at]], deadline=call.deadline)
            if not isinstance(each, ServerError):
                size += len(each)
                if len(response.sessions) and size > page_bytes:
                    response.next_page_token = to_token(ids[at - 1])
                    break
                if len(each) > max_bytes:
                    each = MessageTooLarge(
                        f"session {ids[at]!r} must have at most {max_bytes} bytes to be exported; it has {len(each)}"
                    )
            _add_exported(response, [(inner[at], each)], who)
        return response

    async def import_sessions(
        self, request: pb.ImportSessionsRequest, call: Call
    ) -> pb.ImportSessionsResponse:
        """Create sessions from exported ones."""
        existing = _EXISTING.get(request.existing)
        if existing is None:
            raise InvalidInput(f"existing must be one of stepwell.v1.ExistingSession; got {request.existing}")
        sessions = [
            SessionRecord(
                tenancy.imported_id(call.who, each.tenant, each.session_id),
                tenancy.recorded_id(each.tenant, each.session_id),
                each.record,
            )
            for each in request.sessions
        ]
        response = pb.ImportSessionsResponse()
        results = await self._engine.import_sessions(sessions, existing, call.who)
        for each, result in zip(request.sessions, results, strict=True):
            tenant = tenancy.shown_tenant(call.who, tenancy.recorded_id(each.tenant, each.session_id))
            imported = response.sessions.add(session_id=each.session_id, tenant=tenant)
            if isinstance(result, ServerError):
                imported.outcome = pb.IMPORT_OUTCOME_FAILED
                imported.error.CopyFrom(to_proto(result))
            else:
                imported.outcome = _OUTCOMES[result]
        return response


def _listed(info: SessionInfo, who: Caller) -> pb.Session:
    return convert.from_session(info, tenancy.shown_tenant(who, info.session_id))


def _add_exported(
    response: pb.ExportSessionsResponse, found: Sequence[tuple[str, ExportResult]], who: Caller
) -> None:
    for session_id, each in found:
        own = tenancy.external_id(session_id)
        if isinstance(each, ServerError):
            tenant = tenancy.shown_tenant(who, session_id)
            response.errors.add(session_id=own, tenant=tenant, error=to_proto(each))
        else:
            response.sessions.add(session_id=own, tenant=tenancy.tenant_of(session_id), record=bytes(each))


def max_idle_of(request: _Opening) -> int | None:
    """Return the idle limit in a request, in milliseconds; 0: no limit; None: not set.

    Raises:
        InvalidInput: it is out of range.
    """
    if not request.HasField("max_idle"):
        return None
    seconds = convert.to_seconds(request.max_idle, "max_idle")
    if seconds and not MIN_IDLE_S <= seconds <= MAX_IDLE_MS / 1000:
        raise InvalidInput(
            f"max_idle must be 0 for no limit, or from {MIN_IDLE_S:.0f} s to {MAX_IDLE_MS // 1000} s;"
            f" got {convert.seconds_text(request.max_idle)} s"
        )
    return round(seconds * 1000)


def _filter_of(request: _Filtered, who: Caller) -> Filter:
    idle = None
    if request.HasField("idle_longer"):
        idle = convert.to_seconds(request.idle_longer, "idle_longer")
    prefix = request.session_id_prefix
    return Filter(
        model=request.model, tenant=tenancy.tenant_filter(who, prefix), prefix=prefix, idle_longer_s=idle
    )


def _page_size(asked: int) -> int:
    if asked > _LARGEST_PAGE:
        raise InvalidInput(f"page_size must be at most {_LARGEST_PAGE}; got {asked}")
    return asked or _DEFAULT_PAGE
