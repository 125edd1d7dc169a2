"""Which calls the audit log tells of, and what it says of each: who, what, which sessions, how it ended.

No states, no inputs, no outputs, no tokens. Every method of every service is in one of the two tables; one that is in
neither cannot be served.
"""

from __future__ import annotations

import contextvars
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from google.protobuf.message import Message

from stepwell.v1 import models_pb2, sessions_pb2
from stepwell_server.core import namespaces
from stepwell_server.core.callers import ANYBODY
from stepwell_server.core.quotas import TokenBucket
from stepwell_server.core.recent_values import RecentValues
from stepwell_server.errors import (
    InvalidInput,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    RevisionConflict,
    ServerError,
    SessionExists,
    SessionGone,
    Unauthenticated,
    shorten,
)

if TYPE_CHECKING:
    from stepwell_server.files.audit_log import AuditLog
    from stepwell_server.rpc.fronts.base import Call

#: Methods each of whose calls has a line, and what the line calls it.
AUDITED = {
    "OpenSession": "open",
    "OpenSessions": "open",
    "CloseSession": "close",
    "CloseSessions": "close",
    "CloseMatchingSessions": "close",
    "ResetStates": "reset",
    "GetState": "read_state",
    "GetStates": "read_state",
    "ForkSession": "fork",
    "ForkSessions": "fork",
    "ListSessions": "list",
    "ExportSessions": "export",
    "ImportSessions": "import",
    "LoadModel": "load_model",
    "UploadModel": "upload_model",
    "UnloadModel": "unload_model",
    "SetDefault": "set_default",
    "SetLabel": "set_label",
    "RepositoryModelLoad": "load_model",
    "RepositoryModelUnload": "unload_model",
}
#: Those that have a line only when they are refused, each with its reason.
UNAUDITED = {
    "Step": "the hot path; those that reset or read states have lines",
    "StepStream": "the hot path; its frames that reset or read states have lines",
    "Predict": "the hot path; it touches no session",
    "ModelInfer": "the hot path; sequences that begin and end have lines as sessions",
    "ModelStreamInfer": "the hot path; as ModelInfer",
    "GetSession": "tells no state, and is asked often by whoever watches",
    "ListSlowSessions": "tells no state, and `stepwell top` asks for it every second",
    **dict.fromkeys(("ListModels", "GetModel", "ModelReady"), "tells of models alone"),
    **dict.fromkeys(("ModelMetadata", "ModelConfig", "ModelStatistics"), "tells of models alone"),
    **dict.fromkeys(("ServerLive", "ServerReady", "ServerMetadata"), "tells of the server alone"),
    **dict.fromkeys(("Check", "List", "Watch"), "tells of the server's health alone"),
    "ServerReflectionInfo": "tells of the protocol alone",
    "RepositoryIndex": "tells of models alone",
    **dict.fromkeys(("SystemSharedMemoryStatus", "SystemSharedMemoryRegister"), "never served"),
    **dict.fromkeys(("SystemSharedMemoryUnregister", "CudaSharedMemoryStatus"), "never served"),
    **dict.fromkeys(("CudaSharedMemoryRegister", "CudaSharedMemoryUnregister"), "never served"),
    **dict.fromkeys(("TraceSetting", "LogSettings"), "never served"),
}
#: Whoever is refused for these has a line, whatever was called.
_REFUSALS = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", "QUOTA_EXCEEDED"})
#: Calls in which sessions begin and end beside steps.
_SEQUENCES = frozenset({"ModelInfer", "ModelStreamInfer"})
#: What the engine tells of sessions that the server ends by itself.
_BY_SERVER = frozenset({"expired"})
#: Fields of requests about versions that have a place in a line.
_OF_MODELS = (
    "version",
    "path",
    "filename",
    "label",
    "labels",
    "migration",
    "keep_default",
    "unload_previous",
    "force",
)
_ABOUT_MODELS = tuple(
    method.input_type for method in models_pb2.DESCRIPTOR.services_by_name["ModelAdminService"].methods
)
MAX_NAMED = 100
"""Session ids of a line; of more only the count is said."""
MAX_NAME_CHARACTERS = 256
"""Characters of a text in a line; of a longer one the length is said."""
_RETRY_AFTER_S = 1.0
#: Lines a second, and at once, of one caller for calls that were refused and changed nothing, and of all strangers
#: together: else whoever reaches the server fills its disk, and leaves no room for the lines of others.
_REFUSED_RATE = 10.0, 1000
_MAX_CALLERS = 10_000
"""Callers whose refused calls are counted; the one that was refused least lately is forgotten first."""
#: What changes nothing, by what the errors' classes promise.
_UNCHANGED = (
    *(InvalidInput, SessionGone, SessionExists, RevisionConflict, ModelNotFound),
    *(Unauthenticated, PermissionDenied, QuotaExceeded),
)
_sequences: contextvars.ContextVar[Call | None] = contextvars.ContextVar("stepwell_sequences", default=None)


class Auditor:
    """Writes a line for each call that has one. Lives on the event loop."""

    def __init__(
        self, log: AuditLog, when_full: Literal["drop", "refuse"], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._refuses = when_full == "refuse"
        self._now = now
        self._budgets: RecentValues[tuple[str, str], _Budget] = RecentValues(_MAX_CALLERS)
        """By tenant and name; of strangers by neither."""

    def begins(self, method: str, call: Call) -> None:
        """A call begins, in its task.

        Raises:
            Overloaded: it would have no line, and must have one.
        """
        if method in _SEQUENCES:
            _sequences.set(call)
        if method in AUDITED:
            self.require_room()

    def require_room(self) -> None:
        """What is about to be done has a line.

        Raises:
            Overloaded: it would have none, and must have one.
        """
        if self._refuses and self._log.is_full:
            raise Overloaded(
                "the audit log must have room for what is called; its queue is full", _RETRY_AFTER_S
            )

    def done(self, method: str, call: Call, request: Message, reply: Message) -> None:
        """It was served."""
        for action in _actions(method, request):
            self._write(action, method, call, "OK", _said(request, reply))

    def failed(self, method: str, call: Call, request: Message, error: ServerError) -> None:
        """Its behaviour refused it."""
        actions = () if _is_refusal(error) else _actions(method, request)
        skipped = self._skipped(call, error) if actions else 0
        if skipped < 0:
            return
        for action in actions:
            facts = _said(request, None)
            if skipped:
                facts["skipped"], skipped = skipped, 0
            self._write(action, method, call, error.reason, facts)

    def refused(self, method: str, call: Call, error: ServerError) -> None:
        """It ended with an error. Those that say no to a caller have a line, whatever was called."""
        if _is_refusal(error):
            facts: dict[str, object] = {"quota": error.metadata["quota"]} if "quota" in error.metadata else {}
            skipped = self._skipped(call, error)
            if skipped < 0:
                return
            if skipped:
                facts["skipped"] = skipped
            self._write("refused", method, call, error.reason, facts)

    def _skipped(self, call: Call, error: ServerError) -> int:
        """How many refused calls of a caller had no line since its last one; -1: this one has none either."""
        if not isinstance(error, _UNCHANGED):
            return 0
        whose = ("", "") if call.who is ANYBODY else (call.who.tenant, call.who.name)
        budget = self._budgets.get(whose) or _Budget(TokenBucket(*_REFUSED_RATE, self._now()))
        self._budgets.put(whose, budget)
        if budget.bucket.take(1, self._now()):
            budget.skipped += 1
            return -1
        skipped, budget.skipped = budget.skipped, 0
        return skipped

    def parsed(self, method: str, request: Message) -> None:
        """A request is about to be served: a step that resets or reads states has a line, too.

        Raises:
            Overloaded: it would have none, and must have one.
        """
        if method not in AUDITED and _actions(method, request):
            self.require_room()

    def frame_ended(
        self, call: Call, action: str, session_ids: Sequence[str], failed: int, reason: str
    ) -> None:
        """A frame of a stream that resets or reads states has ended.

        For ``failed`` of its sessions it ended with an error, of the last for this reason.
        """
        names = [namespaces.own(session_id) for session_id in session_ids[:MAX_NAMED]]
        facts: dict[str, object] = {"count": len(session_ids), "sessions": names}
        if failed:
            facts["failed"] = failed
        self._write(action, "StepStream", call, reason or "OK", facts)

    def cancelled(self, method: str, call: Call, code: str) -> None:
        """Its client went away, or its time was over: what became of it nobody was told."""
        if method in AUDITED:
            self._write(AUDITED[method], method, call, code, {})

    def session_event(self, event: str, model: str, session_ids: Sequence[str], count: int) -> None:
        """The engine tells of sessions: those that the server itself ends have a line, and those of sequences."""
        call = _sequences.get()
        facts: dict[str, object] = {"model": model, "count": count}
        if session_ids:
            facts["sessions"] = [namespaces.own(session_id) for session_id in session_ids]
        if event in _BY_SERVER:
            tenant = namespaces.tenant_of(session_ids[0]) if session_ids else ""
            self._log.write({"action": event, "who": "server", "tenant": tenant, "outcome": "OK", **facts})
        elif call is not None and event in {"opened", "closed"}:
            self._write("open" if event == "opened" else "close", "ModelInfer", call, "OK", facts)

    def _write(self, action: str, method: str, call: Call, outcome: str, facts: dict[str, object]) -> None:
        who: dict[str, object] = {
            "who": call.who.name,
            "tenant": call.who.tenant,
            "role": call.who.role.value,
        }
        if call.who is ANYBODY:
            who = {"who": "", "tenant": "", "role": ""}
        if call.who.own_tenant is not None:
            who["own_tenant"] = call.who.own_tenant
        line: dict[str, object] = {"action": action, **who, "peer": call.caller}
        if call.certificate_names:
            line["certificate"] = list(call.certificate_names)
        line |= {"method": method, "outcome": outcome, **facts}
        trace = str(call.metadata.get("traceparent", "")).split("-")
        if len(trace) == 4 and len(trace[1]) == 32:
            line["trace_id"] = trace[1]
        self._log.write({key: _cut(value) for key, value in line.items()})


@dataclasses.dataclass(slots=True)
class _Budget:
    """How many lines a caller may have for refused calls."""

    bucket: TokenBucket
    skipped: int = 0
    """Calls without a line, which the next of the caller's lines tells of."""


def _actions(method: str, request: Any) -> Sequence[str]:
    """What the lines of a call say it does; empty: it has none."""
    if method == "Step":
        return step_actions(reset=bool(np.array(request.reset_mask, np.bool_).any()), states=request.states)
    return (AUDITED[method],) if method in AUDITED else ()


def step_actions(*, reset: bool, states: int) -> Sequence[str]:
    """What a step does beside advancing its sessions. `states` is a `StateSelection`."""
    reads = states not in (sessions_pb2.STATE_SELECTION_UNSPECIFIED, sessions_pb2.STATE_SELECTION_NONE)
    return ("reset",) * reset + ("read_state",) * reads


def _cut(value: object) -> object:
    """A value as it may stand in a line: of a long text its beginning and its length."""
    if isinstance(value, str):
        return shorten(value, MAX_NAME_CHARACTERS)
    return [_cut(each) for each in value[:MAX_NAMED]] if isinstance(value, list) else value


def _is_refusal(error: ServerError) -> bool:
    return error.reason in _REFUSALS


def _said(request: Message, reply: Message | None) -> dict[str, object]:
    """What of a request and its reply has a place in a line: names and numbers, never states."""
    facts: dict[str, object] = {}
    for field in ("model", "session_id_prefix", "new_session_id", "request_id"):
        if value := getattr(request, field, None):
            facts[field] = value
    if value := getattr(request, "model_name", ""):
        facts["model"] = value
    if request.DESCRIPTOR in _ABOUT_MODELS:
        return facts | _said_of_model(request, reply)
    ids = dict.fromkeys(_ids(request))
    if reply is not None:
        ids |= dict.fromkeys(_ids(reply))
    if ids:
        facts["count"] = len(ids)
        facts["sessions"] = list(itertools.islice(ids, MAX_NAMED))
    closed = getattr(reply, "closed", None)
    if closed is not None:
        facts["count"] = closed
    return facts


def _said_of_model(request: Any, reply: Any) -> dict[str, object]:
    """What of a request about a version has a place in a line: never the bytes of a file."""
    facts: dict[str, object] = {}
    for field, name in (("name", "model"), *((name, name) for name in _OF_MODELS)):
        if value := getattr(request, field, None):
            facts[name] = list(value) if field == "labels" else value
    if "sessions" in request.DESCRIPTOR.fields_by_name and not getattr(request, "keep_default", False):
        policy = models_pb2.SessionPolicy.Name(request.sessions or models_pb2.SESSION_POLICY_KEEP)
        facts["policy"] = policy.removeprefix("SESSION_POLICY_").lower()
    for field, name in (("version", "version"), ("moved_sessions", "count"), ("sha256", "sha256")):
        if value := getattr(reply, field, None):
            facts[name] = value
    return facts


def _ids(message: Any) -> Iterator[str]:
    """The session ids that a message names."""
    if session_id := getattr(message, "session_id", ""):
        yield session_id
    yield from getattr(message, "session_ids", ())
    yield from getattr(message, "new_session_ids", ())
    fields = message.DESCRIPTOR.fields_by_name
    if "session" in fields:
        yield message.session.session_id
    if "sessions" in fields:
        for each in message.sessions:
            yield each.session_id
