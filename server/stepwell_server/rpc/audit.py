"""Writes the audit log: for each audited call the caller, the action, the sessions and the outcome.

It contains no states, inputs, outputs or tokens. Every method of every service is in one of the two tables below; a method
that is in neither cannot be served.
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

#: Methods whose calls have a line each, with the action in the line.
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
    "WatchSessions": "watch",
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
#: Methods whose calls have a line only if they are refused, with the reason why.
UNAUDITED = {
    "Step": "the hot path; those that reset or read states have lines",
    "StepStream": "the hot path; its frames that reset or read states have lines",
    "Predict": "the hot path; it touches no session",
    "ModelInfer": "the hot path; sequences that begin and end have lines as sessions",
    "ModelStreamInfer": "the hot path; as ModelInfer",
    "GetSession": "returns no state, and monitoring calls it often",
    "ListSlowSessions": "returns no state, and `stepwell top` calls it every second",
    **dict.fromkeys(("ListModels", "GetModel", "ModelReady"), "is only about models"),
    **dict.fromkeys(("ModelMetadata", "ModelConfig", "ModelStatistics"), "is only about models"),
    **dict.fromkeys(("ServerLive", "ServerReady", "ServerMetadata"), "is only about the server"),
    **dict.fromkeys(("Check", "List", "Watch"), "is only about the server's health"),
    "ServerReflectionInfo": "is only about the protocol",
    "WatchServer": "is only about the server",
    "RepositoryIndex": "is only about models",
    **dict.fromkeys(("SystemSharedMemoryStatus", "SystemSharedMemoryRegister"), "never served"),
    **dict.fromkeys(("SystemSharedMemoryUnregister", "CudaSharedMemoryStatus"), "never served"),
    **dict.fromkeys(("CudaSharedMemoryRegister", "CudaSharedMemoryUnregister"), "never served"),
    **dict.fromkeys(("TraceSetting", "LogSettings"), "never served"),
}
#: Reasons of refusals that have a line for every method.
_REFUSALS = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", "QUOTA_EXCEEDED"})
#: Methods that also open and close sessions.
_SEQUENCES = frozenset({"ModelInfer", "ModelStreamInfer"})
#: Events of sessions that the server itself ends.
_BY_SERVER = frozenset({"expired"})
#: Fields of requests about versions that a line contains.
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
"""Maximum number of session ids in a line. If there are more, the line has their count."""
MAX_NAME_CHARACTERS = 256
"""Maximum length of a text in a line. A longer text is cut, and its length added."""
#: Methods whose calls have their line when they begin.
_ENDLESS = frozenset({"WatchSessions"})
_RETRY_AFTER_S = 1.0
#: Lines per second, and in a burst, for refused calls without effect: per caller, and for all unknown callers together.
#: Otherwise anybody who reaches the server could fill its disk and displace the lines of others.
_REFUSED_RATE = 10.0, 1000
_MAX_CALLERS = 10_000
"""Number of callers whose refused calls are counted. The one with the oldest refusal is forgotten first."""
#: Errors of calls that changed nothing.
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
        """By tenant and name; both are empty for unknown callers."""

    def started(self, method: str, call: Call) -> None:
        """A call starts, in its task.

        Raises:
            Overloaded: the log is full, and calls without a line are refused.
        """
        if method in _SEQUENCES:
            _sequences.set(call)
        if method in AUDITED:
            self.require_room()

    def require_room(self) -> None:
        """Check that the log has room for a line.

        Raises:
            Overloaded: the log is full, and calls without a line are refused.
        """
        if self._refuses and self._log.is_full:
            raise Overloaded("the audit log must have room for this call; its queue is full", _RETRY_AFTER_S)

    def done(self, method: str, call: Call, request: Message, reply: Message) -> None:
        """A call succeeded."""
        for action in _actions(method, request):
            self._write(action, method, call, "OK", _facts_of(request, reply))

    def failed(self, method: str, call: Call, request: Message, error: ServerError) -> None:
        """The behaviour of a call raised an error."""
        actions = () if _is_refusal(error) else _actions(method, request)
        skipped = self._skipped(call, error) if actions else 0
        if skipped < 0:
            return
        for action in actions:
            facts = _facts_of(request, None)
            if skipped:
                facts["skipped"], skipped = skipped, 0
            self._write(action, method, call, error.reason, facts)

    def refused(self, method: str, call: Call, error: ServerError) -> None:
        """A call ended with an error. It has a line if the caller was refused, whatever the method."""
        if _is_refusal(error):
            facts: dict[str, object] = {"quota": error.metadata["quota"]} if "quota" in error.metadata else {}
            skipped = self._skipped(call, error)
            if skipped < 0:
                return
            if skipped:
                facts["skipped"] = skipped
            self._write("refused", method, call, error.reason, facts)

    def _skipped(self, call: Call, error: ServerError) -> int:
        """Return the number of the caller's refused calls without a line since the last one; -1: this one has none either."""
        if not isinstance(error, _UNCHANGED):
            return 0
        key = ("", "") if call.who is ANYBODY else (call.who.tenant, call.who.name)
        budget = self._budgets.get(key) or _Budget(TokenBucket(*_REFUSED_RATE, self._now()))
        self._budgets.put(key, budget)
        if budget.bucket.take(1, self._now()):
            budget.skipped += 1
            return -1
        skipped, budget.skipped = budget.skipped, 0
        return skipped

    def parsed(self, method: str, request: Message) -> None:
        """A request was parsed. A step that resets or reads states needs a line too.

        Raises:
            Overloaded: the log is full, and calls without a line are refused.
        """
        if method not in AUDITED and _actions(method, request):
            self.require_room()

    def frame_ended(
        self, call: Call, action: str, session_ids: Sequence[str], failed: int, reason: str
    ) -> None:
        """A frame that resets or reads states has ended.

        ``failed`` of its sessions failed, the last one with this reason.
        """
        names = [namespaces.own(session_id) for session_id in session_ids[:MAX_NAMED]]
        facts: dict[str, object] = {"count": len(session_ids), "sessions": names}
        if failed:
            facts["failed"] = failed
        self._write(action, "StepStream", call, reason or "OK", facts)

    def began(self, method: str, call: Call, request: Message) -> None:
        """A call of a method in `_ENDLESS` succeeds, and continues until its client leaves."""
        self.done(method, call, request, request)

    def cancelled(self, method: str, call: Call, code: str) -> None:
        """A call ended without a reply, because its client left or its deadline passed."""
        if method in AUDITED and method not in _ENDLESS:
            self._write(AUDITED[method], method, call, code, {})

    def session_event(self, event: str, model: str, session_ids: Sequence[str], count: int) -> None:
        """The engine reports sessions. Those that the server ends itself, and those of sequences, have a line."""
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
    """The limit of a caller's lines for refused calls."""

    bucket: TokenBucket
    skipped: int = 0
    """Calls without a line, whose number the caller's next line contains."""


def _actions(method: str, request: Any) -> Sequence[str]:
    """Return the actions of a call, one per line; empty: it has no line."""
    if method == "Step":
        return step_actions(reset=bool(np.array(request.reset_mask, np.bool_).any()), states=request.states)
    return (AUDITED[method],) if method in AUDITED else ()


def step_actions(*, reset: bool, states: int) -> Sequence[str]:
    """Return the audited actions of a step. `states` is a `StateSelection`."""
    reads = states not in (sessions_pb2.STATE_SELECTION_UNSPECIFIED, sessions_pb2.STATE_SELECTION_NONE)
    return ("reset",) * reset + ("read_state",) * reads


def _cut(value: object) -> object:
    """Return a value for a line. A long text is cut, and its length added."""
    if isinstance(value, str):
        return shorten(value, MAX_NAME_CHARACTERS)
    return [_cut(each) for each in value[:MAX_NAMED]] if isinstance(value, list) else value


def _is_refusal(error: ServerError) -> bool:
    return error.reason in _REFUSALS


def _facts_of(request: Message, reply: Message | None) -> dict[str, object]:
    """Return the facts of a request and its reply for a line: names and numbers, never states."""
    facts: dict[str, object] = {}
    for field in ("model", "session_id_prefix", "new_session_id", "request_id"):
        if value := getattr(request, field, None):
            facts[field] = value
    if value := getattr(request, "model_name", ""):
        facts["model"] = value
    if request.DESCRIPTOR in _ABOUT_MODELS:
        return facts | _model_facts(request, reply)
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


def _model_facts(request: Any, reply: Any) -> dict[str, object]:
    """Return the facts of a request about a version for a line, without the bytes of files."""
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
    """Yield the session ids in a message."""
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
