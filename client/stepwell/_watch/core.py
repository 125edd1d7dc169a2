"""Watches without I/O: their requests, what their replies mean, and how they continue after a lost connection."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar, cast

from google.protobuf import duration_pb2
from google.protobuf.message import Message

from stepwell._base.flow import Flow
from stepwell._core.core import Core
from stepwell._routing.ranking import key_of
from stepwell._state import arguments
from stepwell._watch.events import ServerActivity, SessionEvent
from stepwell.config import check_switch
from stepwell.errors import InvalidInputError, SessionNotFoundError, StepwellError
from stepwell.v1 import watch_pb2

T = TypeVar("T")
MAX_SESSIONS = 1024
"""Sessions of one stream."""
MAX_INTERVAL_S = 3600
"""Longest interval."""


class WatchCore(abc.ABC, Generic[T]):
    """A watch: the streams that it needs, and the values that its replies mean. For one thread at a time."""

    def __init__(self, core: Core, rpc: str) -> None:
        self._core = core
        self._rpc = rpc

    @abc.abstractmethod
    def streams(self) -> Sequence[Sequence[str]]:
        """The sessions of each stream that the watch needs now."""

    @abc.abstractmethod
    def request(self, ids: Sequence[str]) -> Message:
        """The request of a stream."""

    @abc.abstractmethod
    def values(self, reply: Any) -> Sequence[T]:
        """What a reply means."""

    @abc.abstractmethod
    def split(self, ids: Sequence[str]) -> Sequence[Sequence[str]]:
        """Those of some sessions that are still watched, by the stream that they need now."""

    def follow(
        self,
        ids: Sequence[str],
        on_reply: Callable[[Any], object],
        on_open: Callable[[Callable[[], object]], object],
        begin: Callable[[Sequence[str]], None],
    ) -> Flow[None]:
        """Follows a stream to its end, and resumes it after a lost connection.

        Args:
            ids: Its sessions.
            on_reply: Called with each reply.
            on_open: Called at each attempt with a function that cancels it.
            begin: Begins another stream, if the sessions need several now.

        Raises:
            StepwellError: The server refuses the watch, or cannot be reached.
        """
        mine = [ids]

        def request() -> Message | None:
            first, *others = self.split(mine[0]) or [()]
            mine[0] = first
            for other in others:
                begin(other)
            return self.request(first) if first or not ids else None

        retrier = self._core.retrier
        key = key_of(ids[0]) if ids else None
        yield from retrier.followed(self._rpc, request, self._core.deadline, on_reply, on_open, key=key)


class SessionWatch(WatchCore[SessionEvent]):
    """A watch of sessions."""

    def __init__(
        self,
        core: Core,
        session_ids: Iterable[str],
        *,
        inputs: bool,
        outputs: bool,
        states: bool,
        state_names: Iterable[str] | None,
        every: int,
        interval_s: float | None,
    ) -> None:
        super().__init__(core, "WatchSessions")
        if isinstance(session_ids, str):
            raise InvalidInputError(
                f"session_ids must be a collection of ids; got the string {session_ids!r:.100}"
            )
        ids = list(session_ids)
        arguments.check_session_ids(ids, len(ids), "ids that are not repeated")
        if not ids:
            raise InvalidInputError("session_ids must have at least one id; got none")
        for name, value in (("inputs", inputs), ("outputs", outputs), ("states", states)):
            check_switch(name, value)
        self._fields: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "states": states}
        self._fields["state_names"] = arguments.check_state_names(state_names, is_used=states)
        count = arguments.check_count("every", every)
        if interval_s is None:
            self._fields["revisions"] = count
        elif every != 1:
            raise InvalidInputError(f"every must be 1 with interval_s; got {every}")
        else:
            self._fields["interval"] = check_interval(interval_s)
        self._left: dict[str, tuple[int, int, int] | None] = dict.fromkeys(ids)
        """Sessions that have not ended: the uid, the last revision and its model version; None: nothing was reported yet."""

    def streams(self) -> Sequence[Sequence[str]]:
        return self.split(list(self._left))

    def split(self, ids: Sequence[str]) -> Sequence[Sequence[str]]:
        left = [each for each in ids if each in self._left]
        parts = [[left[i] for i in own.tolist()] for own in self._core.by_replica(left)] if left else []
        return [part[at : at + MAX_SESSIONS] for part in parts for at in range(0, len(part), MAX_SESSIONS)]

    def request(self, ids: Sequence[str]) -> Message:
        return watch_pb2.WatchSessionsRequest(session_ids=ids, **self._fields)

    def values(self, reply: watch_pb2.WatchSessionsResponse) -> Sequence[SessionEvent]:
        return [event for each in reply.events for event in self._events(each)]

    def _events(self, message: watch_pb2.SessionEvent) -> Sequence[SessionEvent]:
        """An event, or none: after a lost connection a session that has not changed needs none."""
        session_id = message.session_id
        if session_id not in self._left:
            return []
        known = self._left[session_id]
        if message.kind == watch_pb2.SESSION_EVENT_KIND_ENDED:
            del self._left[session_id]
        elif message.kind == watch_pb2.SESSION_EVENT_KIND_PRESENT and known is not None:
            uid, revision, version = known
            if message.uid != uid:
                del self._left[session_id]
                return [_replaced(message, revision)]
            is_moved = message.revision == revision and message.model_version != version
            if message.revision <= revision and not message.dropped_revisions and not is_moved:
                return []
            unseen = message.revision - revision - message.dropped_revisions
            message.skipped_revisions = max(message.skipped_revisions, unseen)
        if session_id in self._left:
            uid = message.uid if known is None else known[0]
            self._left[session_id] = (uid, message.revision, message.model_version)
        return [SessionEvent._from_message(message)]


class _OfServer(WatchCore[T]):
    """A watch of a server."""

    def __init__(self, core: Core, interval_s: float) -> None:
        super().__init__(core, "WatchServer")
        self._interval = check_interval(interval_s)

    def streams(self) -> Sequence[Sequence[str]]:
        return [()]

    def split(self, ids: Sequence[str]) -> Sequence[Sequence[str]]:
        return [ids]

    def request(self, _ids: Sequence[str]) -> Message:
        return watch_pb2.WatchServerRequest(interval=self._interval)


class ServerReports(_OfServer[watch_pb2.WatchServerResponse]):
    """A watch of a server, with the messages as they are."""

    def values(self, reply: watch_pb2.WatchServerResponse) -> Sequence[watch_pb2.WatchServerResponse]:
        return [reply]


class ServerWatch(_OfServer[ServerActivity]):
    """A watch of a server, for programs."""

    def values(self, reply: watch_pb2.WatchServerResponse) -> Sequence[ServerActivity]:
        return [ServerActivity._from_message(reply)]


def check_interval(interval_s: object) -> duration_pb2.Duration:
    """An interval as a message; the server checks its range."""
    is_number = isinstance(interval_s, int | float) and not isinstance(interval_s, bool)
    seconds = float(cast(float, interval_s)) if is_number else 0.0
    if not 0 < seconds <= MAX_INTERVAL_S:
        raise InvalidInputError(
            f"interval_s must be a number above 0 and at most {MAX_INTERVAL_S}; got {interval_s!r:.100}"
        )
    interval = duration_pb2.Duration()
    interval.FromNanoseconds(round(seconds * 1e9))
    return interval


def _replaced(message: watch_pb2.SessionEvent, revision: int) -> SessionEvent:
    """The end of a session whose id another one has now."""
    ended = watch_pb2.SessionEvent(session_id=message.session_id, revision=revision, time=message.time)
    ended.kind = watch_pb2.SESSION_EVENT_KIND_ENDED
    event = SessionEvent._from_message(ended)
    error: StepwellError = SessionNotFoundError(
        f"session {message.session_id!r} was closed, and another one has its id now"
    )
    object.__setattr__(event, "error", error)
    return event
