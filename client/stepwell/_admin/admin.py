"""Flows that list, close, export and import many sessions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from google.protobuf import duration_pb2

from stepwell._admin.session_list import Page
from stepwell._base.flow import Flow
from stepwell._core.tracker import new_request_id
from stepwell._state import arguments
from stepwell._state.infos import SessionInfo
from stepwell._transport.retry import Deadline
from stepwell._transport.status import from_message
from stepwell.errors import InvalidInputError, StepwellError
from stepwell.v1 import sessions_pb2

if TYPE_CHECKING:
    from stepwell._core.core import Core

ExistingSession: TypeAlias = Literal["refuse", "skip", "replace"]
"""What to do with a live session of the same id as an imported one."""

_EXISTING: Mapping[str, sessions_pb2.ExistingSession.ValueType] = {
    "refuse": sessions_pb2.EXISTING_SESSION_REFUSE,
    "skip": sessions_pb2.EXISTING_SESSION_SKIP,
    "replace": sessions_pb2.EXISTING_SESSION_REPLACE,
}
_FIRST_PAGE, _LATER_PAGE = 1000, 5000
_CLOSE_BATCH = 2000
_ID_BATCH = 1000
#: Bytes of sessions in one message, and sessions in it.
_IMPORT_BYTES, _IMPORT_BATCH = 1 << 20, 1000


@dataclasses.dataclass(frozen=True, slots=True)
class SessionFilter:
    """A filter of sessions; a session must match all of it."""

    model: str | None = None
    prefix: str | None = None
    idle_longer_s: float | None = None

    def put(
        self,
        request: sessions_pb2.ListSessionsRequest
        | sessions_pb2.CloseMatchingSessionsRequest
        | sessions_pb2.ExportSessionsRequest,
    ) -> bool:
        """Writes the filter to a request. Returns whether there was anything to write.

        Raises:
            InvalidInputError: An argument breaks a rule.
        """
        if self.model is not None:
            request.model = arguments.check_model(self.model)
        if self.prefix:
            request.session_id_prefix = arguments.check_session_id("prefix", self.prefix)
        if self.idle_longer_s is not None:
            request.idle_longer.CopyFrom(duration("idle_longer_s", self.idle_longer_s))
        return self.model is not None or bool(self.prefix) or self.idle_longer_s is not None


@dataclasses.dataclass(frozen=True, slots=True)
class ExportReport:
    """The result of an export.

    Example:
        >>> report = client.export_sessions("some.sessions", [session.id, "nobody"])
        >>> report.exported, [type(error).__name__ for error in report.failures.values()]
        (1, ['SessionNotFoundError'])
    """

    exported: int
    """Number of sessions in the file."""
    failures: dict[str, StepwellError]
    """Errors of sessions that could not be read, by id, or by `TENANT/ID` if the client acts for all tenants."""


@dataclasses.dataclass(frozen=True, slots=True)
class ImportReport:
    """The result of an import.

    Example:
        >>> exported = client.export_sessions("some.sessions", [session.id])
        >>> client.import_sessions("some.sessions")
        ImportReport(imported=1, replaced=0, skipped=0, failures={})
    """

    imported: int = 0
    """Number of sessions that were created, or already existed exactly as in the file."""
    replaced: int = 0
    """Number of sessions that replaced another one."""
    skipped: int = 0
    """Number of sessions that existed and were kept."""
    failures: dict[str, StepwellError] = dataclasses.field(default_factory=dict)
    """Errors of sessions that were not imported, by id, or by `TENANT/ID` if the client acts for all tenants."""

    def __add__(self, other: ImportReport) -> ImportReport:
        return ImportReport(
            self.imported + other.imported,
            self.replaced + other.replaced,
            self.skipped + other.skipped,
            self.failures | other.failures,
        )


def duration(name: str, seconds: float) -> duration_pb2.Duration:
    """Converts a number of seconds to the type that messages use.

    Raises:
        InvalidInputError: It is not a number, or is out of range.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise InvalidInputError(f"{name} must be a number of seconds; got {seconds!r}")
    if not 0 <= seconds < 1e11:
        raise InvalidInputError(f"{name} must be from 0 to 1e11; got {seconds}")
    whole = math.floor(seconds)
    return duration_pb2.Duration(seconds=whole, nanos=min(999_999_999, round((seconds - whole) * 1e9)))


class Admin:
    """The flows; `Client` documents what they do."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._retrier = core.retrier

    def list_request(self, wanted: SessionFilter, limit: int | None) -> sessions_pb2.ListSessionsRequest:
        """Builds the request of a list, whose pages `page` reads.

        Raises:
            InvalidInputError: An argument breaks a rule.
        """
        size = _FIRST_PAGE if limit is None else min(_FIRST_PAGE, arguments.check_count("limit", limit))
        request = sessions_pb2.ListSessionsRequest(page_size=size, skip_total=True)
        wanted.put(request)
        return request

    def page(self, request: sessions_pb2.ListSessionsRequest, token: str, deadline: Deadline) -> Flow[Page]:
        """Reads a page; an empty token means the first one."""
        asked = sessions_pb2.ListSessionsRequest()
        asked.CopyFrom(request)
        asked.page_token = token
        if token and request.page_size == _FIRST_PAGE:
            asked.page_size = _LATER_PAGE
        reply: sessions_pb2.ListSessionsResponse = yield from self._retrier.call(
            "ListSessions", asked, deadline
        )
        return Page([SessionInfo._from_message(session) for session in reply.sessions], reply.next_page_token)

    def count(self, wanted: SessionFilter, deadline: Deadline) -> Flow[int]:
        """Counts the matching sessions."""
        request = sessions_pb2.ListSessionsRequest(page_size=1)
        wanted.put(request)
        reply: sessions_pb2.ListSessionsResponse = yield from self._retrier.call(
            "ListSessions", request, deadline
        )
        return reply.total

    def close_parts(self, ids: Iterable[str]) -> Iterator[list[str]]:
        """Yields the ids of sessions to close with one call."""
        checked = arguments.check_some_ids(ids)
        for start in range(0, len(checked), _CLOSE_BATCH):
            yield checked[start : start + _CLOSE_BATCH]

    def close_request(
        self, wanted: SessionFilter, *, everything: bool
    ) -> sessions_pb2.CloseMatchingSessionsRequest:
        """Builds the request that closes matching sessions.

        Raises:
            InvalidInputError: An argument breaks a rule.
        """
        request = sessions_pb2.CloseMatchingSessionsRequest(page_size=_CLOSE_BATCH, all=everything)
        if wanted.put(request) is everything:
            raise InvalidInputError(
                "close_sessions must have exactly one of session_ids, a filter (model, prefix, idle_longer_s) and everything=True;"
                f" and only one of them; got {wanted} and everything={everything}"
            )
        return request

    def close_page(
        self, request: sessions_pb2.CloseMatchingSessionsRequest, deadline: Deadline
    ) -> Flow[tuple[int, str]]:
        """Closes some of the matching sessions. Returns their number and the token of the next page."""
        request.request_id = new_request_id()
        reply: sessions_pb2.CloseMatchingSessionsResponse = yield from self._retrier.call(
            "CloseMatchingSessions", request, deadline, changes=True
        )
        return reply.closed, reply.next_page_token

    def export_requests(
        self, ids: Iterable[str] | None, wanted: SessionFilter
    ) -> list[sessions_pb2.ExportSessionsRequest]:
        """Builds the requests that export sessions, each page by page.

        Raises:
            InvalidInputError: An argument breaks a rule.
        """
        request = sessions_pb2.ExportSessionsRequest()
        is_filtered = wanted.put(request)
        if ids is None:
            return [request]
        if is_filtered:
            raise InvalidInputError("export_sessions must have session_ids or filters; got both")
        checked = list(dict.fromkeys(arguments.check_some_ids(ids)))
        return [
            sessions_pb2.ExportSessionsRequest(session_ids=checked[start : start + _ID_BATCH])
            for start in range(0, len(checked), _ID_BATCH)
        ]

    def export_page(
        self, request: sessions_pb2.ExportSessionsRequest, deadline: Deadline
    ) -> Flow[sessions_pb2.ExportSessionsResponse]:
        """Reads a page of an export, and writes the token of the next page to the request."""
        reply: sessions_pb2.ExportSessionsResponse = yield from self._retrier.call(
            "ExportSessions", request, deadline
        )
        request.page_token = reply.next_page_token
        return reply

    def import_requests(
        self, sessions: Iterable[sessions_pb2.ExportedSession], existing: str
    ) -> Iterator[sessions_pb2.ImportSessionsRequest]:
        """Yields the requests that import sessions.

        Raises:
            InvalidInputError: An argument breaks a rule.
        """
        if existing not in _EXISTING:
            raise InvalidInputError(f"existing must be one of {list(_EXISTING)}; got {existing!r}")
        return self._batches(sessions, _EXISTING[existing])

    @staticmethod
    def _batches(
        sessions: Iterable[sessions_pb2.ExportedSession], existing: sessions_pb2.ExistingSession.ValueType
    ) -> Iterator[sessions_pb2.ImportSessionsRequest]:
        request = sessions_pb2.ImportSessionsRequest(existing=existing)
        size, ids = 0, set[tuple[str, str]]()
        for session in sessions:
            own = len(session.record) + len(session.session_id)
            is_full = size + own > _IMPORT_BYTES or len(ids) == _IMPORT_BATCH
            is_there = (session.tenant, session.session_id) in ids
            if ids and (is_full or is_there):
                yield request
                request = sessions_pb2.ImportSessionsRequest(existing=existing)
                size, ids = 0, set()
            request.sessions.append(session)
            size += own
            ids.add((session.tenant, session.session_id))
        if ids:
            yield request

    def import_some(
        self, request: sessions_pb2.ImportSessionsRequest, deadline: Deadline
    ) -> Flow[ImportReport]:
        """Imports some sessions."""
        reply: sessions_pb2.ImportSessionsResponse = yield from self._retrier.call(
            "ImportSessions", request, deadline, changes=True
        )
        outcomes = [each.outcome for each in reply.sessions]
        return ImportReport(
            imported=outcomes.count(sessions_pb2.IMPORT_OUTCOME_IMPORTED),
            replaced=outcomes.count(sessions_pb2.IMPORT_OUTCOME_REPLACED),
            skipped=outcomes.count(sessions_pb2.IMPORT_OUTCOME_SKIPPED),
            failures=failures(each for each in reply.sessions if each.HasField("error")),
        )


def failures(
    failed: Iterable[sessions_pb2.SessionError | sessions_pb2.ImportedSession],
) -> dict[str, StepwellError]:
    """Errors of sessions, by id."""
    return {
        f"{each.tenant}/{each.session_id}" if each.tenant else each.session_id: from_message(each.error)
        for each in failed
    }
