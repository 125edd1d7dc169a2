"""A server of one toy model whose faults are scripted, for tests of the client.

It keeps sessions by the rules of the protocol (revisions, request ids, remembered replies), adds its input to
its state, and on demand fails, does the work but drops the answer, splits a frame's reply, or holds an answer.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2

from stepwell._state.tensors import unpack
from stepwell._transport.status import DETAILS_KEY
from stepwell.v1 import (
    errors_pb2,
    models_pb2,
    models_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
)
from support import secured
from support.sdk.scripted_model import (
    FEATURES,
    Session,
    in_full,
    reset,
    shorten,
    spec,
    states_of,
    step,
    tensor,
)

MODEL = "sum"
FINGERPRINT = "f00d"


@dataclasses.dataclass(frozen=True)
class Fault:
    """What shall go wrong with one attempt."""

    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    message: str = "scripted"
    reason: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    retry_after_s: float = 0.0
    after_work: bool = False
    """Do the work, then drop the answer."""
    member: int | None = None
    """Of a frame: only this member fails."""


class Refusal(Exception):
    """An error on its way to the client."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.fault = Fault(code, message, reason, tuple(metadata.items()))


def answered(work: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """A method of the protocol: `work` makes the reply, or raises a `Refusal`, unless the script has it otherwise."""

    @functools.wraps(work)
    def method(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        self.metadata[work.__name__] = dict(context.invocation_metadata())
        fault = self.enter(work.__name__, request)
        if fault is not None and not fault.after_work:
            abort(context, fault)
        try:
            reply = self.do(functools.partial(work, self, request))
        except Refusal as refusal:
            abort(context, refusal.fault)
        if fault is not None:
            abort(context, fault)
        return reply

    return method


class ScriptedServer(sessions_pb2_grpc.SessionServiceServicer, models_pb2_grpc.ModelServiceServicer):
    """Context manager; `address` is where it listens."""

    def __init__(self, shares: ScriptedServer | None = None, port: int = 0) -> None:
        """A server; it `shares` the sessions of another one, as replicas do that have one store."""
        self.calls: list[tuple[str, Any]] = []
        self.metadata: dict[str, dict[str, str | bytes]] = {}
        """What came with the last call of each method."""
        self.sessions: dict[str, Session] = shares.sessions if shares else {}
        self.is_serving = True
        """The answer to its health check."""
        self.parts = 1
        self.most_states = 1_000_000
        self.busy: set[str] = set()
        """Sessions that cannot be read the next time, as too much waits for them."""
        self.applied = 0
        self.widths = {1: FEATURES}
        """Versions of the model, and how many numbers a row of their outputs has."""
        self.default = 1
        self.reason = ""
        """Of the versions that are there."""
        self.labels: dict[str, int] = {}
        self.fingerprint = FINGERPRINT
        self._faults: dict[str, collections.deque[Fault]] = collections.defaultdict(collections.deque)
        self._gates: dict[str, tuple[threading.Event, threading.Semaphore]] = {}
        self._lock: Any = shares._lock if shares else threading.RLock()
        self._answered = threading.Condition(self._lock)
        self._made: dict[int, list[Session]] = shares._made if shares else {}
        self._ids: Iterator[str] = shares._ids if shares else (f"made-{i}" for i in itertools.count())
        self._server = grpc.server(futures.ThreadPoolExecutor(16))
        sessions_pb2_grpc.add_SessionServiceServicer_to_server(self, self._server)
        models_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        check: Any = grpc.unary_unary_rpc_method_handler(self._check)
        health = grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})
        self._server.add_generic_rpc_handlers((health,))
        self.address = secured.add_port(self._server, port)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for gate, _ in self._gates.values():
            gate.set()
        self._server.stop(None).wait(200)

    # The script.

    def fail(self, method: str, fault: Fault, times: int = 1) -> None:
        """The next attempts of a method go wrong so."""
        self._faults[method].extend([fault] * times)

    def fail_no_more(self) -> None:
        self._faults.clear()

    def hold(self, method: str) -> tuple[threading.Event, threading.Semaphore]:
        """Answers of this method wait for the event; each one that has come releases the semaphore."""
        self._gates[method] = (threading.Event(), threading.Semaphore(0))
        return self._gates[method]

    def requests(self, method: str) -> list[Any]:
        return [request for name, request in self.calls if name == method]

    def wait_until(self, is_so: Callable[[], bool], timeout_s: float = 100.0) -> bool:
        """Waits for what the answer to some call makes so; says whether it is."""
        with self._answered:
            return self._answered.wait_for(is_so, timeout_s)

    def enter(self, method: str, request: Any) -> Fault | None:
        """A call has come; what shall go wrong with it."""
        with self._lock:
            self.calls.append((method, request))
            fault = self._faults[method].popleft() if self._faults[method] else None
        if method in self._gates:
            gate, arrived = self._gates[method]
            arrived.release()
            gate.wait(200)
        return fault

    def do(self, work: Callable[[], Any]) -> Any:
        """Work while no other call does, and let those know who wait for what it makes so."""
        with self._answered:
            reply = work()
            self._answered.notify_all()
        return reply

    def _check(self, _request: bytes, _context: grpc.ServicerContext) -> bytes:
        """grpc.health.v1.Health/Check: SERVING or NOT_SERVING."""
        self.calls.append(("Check", None))
        return b"\x08\x01" if self.is_serving else b"\x08\x02"

    # Models.

    def _model(self, name: str) -> models_pb2.Model:
        version = self._version(name)
        outputs = [spec("y", temporal=True)]
        outputs[0].shape[:] = [self.widths[version]]
        return models_pb2.Model(
            name=MODEL,
            fingerprint=self._fingerprint(version),
            inputs=[spec("x", temporal=True)],
            outputs=outputs,
            state=[spec("sum"), spec("count")],
            executor="none",
            version=version,
            versions=[
                models_pb2.ModelVersion(
                    version=number,
                    state=models_pb2.MODEL_STATE_READY,
                    reason=self.reason,
                    fingerprint=self._fingerprint(number),
                    is_default=number == self.default,
                    labels=sorted(label for label, of in self.labels.items() if of == number),
                )
                for number in sorted(self.widths)
            ],
        )

    def _version(self, reference: str) -> int:
        """The version that somebody means."""
        name, at, number = reference.partition("@")
        name, colon, label = name.partition(":")
        if name != MODEL:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", f"no model {name!r}")
        version = int(number) if at else self.labels.get(label, 0) if colon else self.default
        if version not in self.widths:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "MODEL_VERSION_NOT_FOUND", f"no {reference!r}")
        return version

    def _fingerprint(self, version: int) -> str:
        return self.fingerprint if version == 1 else f"{self.fingerprint}-{version}"

    def move(self, version: int) -> None:
        """Make another version the default, and carry the sessions that follow it."""
        with self._lock:
            self.default = version
            for session in self.sessions.values():
                if not session.is_pinned:
                    session.version = version

    @answered
    def ListModels(self, request: Any) -> Any:  # noqa: N802
        return models_pb2.ListModelsResponse(models=[self._model(MODEL)])

    @answered
    def GetModel(self, request: Any) -> Any:  # noqa: N802
        return models_pb2.GetModelResponse(model=self._model(request.name))

    @answered
    def Predict(self, request: Any) -> Any:  # noqa: N802
        y = unpack(request.inputs[0])
        version = self._version(request.model)
        return models_pb2.PredictResponse(
            outputs=[tensor("y", y)], state=[tensor("sum", y)], model_version=version
        )

    @answered
    def ListSlowSessions(self, request: Any) -> Any:  # noqa: N802
        return models_pb2.ListSlowSessionsResponse()

    # Sessions.

    def _session(self, session_id: str) -> Session:
        if session_id not in self.sessions:
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                "SESSION_NOT_FOUND",
                f"session {session_id!r} is not there",
                session_id=session_id,
            )
        return self.sessions[session_id]

    def _open_as(
        self, request: Any, session_ids: list[str], batch_size: int, source: Session | None = None
    ) -> list[Session]:
        """Opens sessions; the same request again means the same sessions, as long as they are there."""
        before = self._made.get(request.request_id)
        if before is not None:
            for session in before:
                self._session(session.session_id)
            return before
        if source is not None:
            version, is_pinned = source.version, source.is_pinned
        else:
            version, is_pinned = self._version(request.model), request.model != MODEL
        made = [self._open(one, batch_size, version, is_pinned) for one in session_ids]
        return self._made.setdefault(request.request_id, made)

    def _open(self, session_id: str, batch_size: int, version: int, is_pinned: bool) -> Session:
        session_id = session_id or next(self._ids)
        state = np.zeros((batch_size, FEATURES), np.float32)
        new = Session(session_id, batch_size, state, version=version, is_pinned=is_pinned)
        return self.sessions.setdefault(session_id, new)

    def _info(self, session: Session) -> sessions_pb2.Session:
        return sessions_pb2.Session(
            session_id=session.session_id,
            model=MODEL,
            model_fingerprint=self._fingerprint(session.version),
            batch_size=session.batch_size,
            revision=session.revision,
            position=session.position,
            model_version=session.version,
            model_version_pinned=session.is_pinned,
        )

    @answered
    def OpenSession(self, request: Any) -> Any:  # noqa: N802
        self._model(request.model)
        resumed = request.session_id in self.sessions
        (opened,) = self._open_as(request, [request.session_id], request.batch_size)
        return sessions_pb2.OpenSessionResponse(session=self._info(opened), resumed=resumed)

    @answered
    def OpenSessions(self, request: Any) -> Any:  # noqa: N802
        ids = list(request.session_ids) or [""] * request.count
        opened = self._open_as(request, ids, request.batch_size)
        return sessions_pb2.OpenSessionsResponse(
            session_ids=[one.session_id for one in opened],
            model_fingerprint=self._fingerprint(opened[0].version),
            model_version=opened[0].version,
        )

    @answered
    def CloseSession(self, request: Any) -> Any:  # noqa: N802
        self._session(request.session_id)
        del self.sessions[request.session_id]
        return sessions_pb2.CloseSessionResponse()

    @answered
    def CloseSessions(self, request: Any) -> Any:  # noqa: N802
        closed = [self.sessions.pop(one, None) for one in request.session_ids]
        return sessions_pb2.CloseSessionsResponse(closed=sum(one is not None for one in closed))

    def CloseMatchingSessions(self, request: Any, context: Any) -> Any:  # noqa: N802
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "")

    ExportSessions = ImportSessions = CloseMatchingSessions

    @answered
    def GetSession(self, request: Any) -> Any:  # noqa: N802
        return sessions_pb2.GetSessionResponse(session=self._info(self._session(request.session_id)))

    @answered
    def ListSessions(self, request: Any) -> Any:  # noqa: N802
        """One session a page."""
        names = sorted(one for one in self.sessions if one.startswith(request.session_id_prefix))
        at = int(request.page_token or 0)
        more = at + 1 < len(names)
        return sessions_pb2.ListSessionsResponse(
            sessions=[self._info(self.sessions[one]) for one in names[at : at + 1]],
            next_page_token=str(at + 1) if more else "",
        )

    @answered
    def GetState(self, request: Any) -> Any:  # noqa: N802
        session = self._session(request.session_id)
        return sessions_pb2.GetStateResponse(
            state=[tensor("sum", session.state), tensor("count", session.state)],
            session=self._info(session),
        )

    @answered
    def ForkSession(self, request: Any) -> Any:  # noqa: N802
        old = self._session(request.session_id)
        (new,) = self._open_as(request, [request.new_session_id], old.batch_size, old)
        new.state, new.revision, new.position = old.state, old.revision, old.position
        return sessions_pb2.ForkSessionResponse(session=self._info(new))

    @answered
    def GetStates(self, request: Any) -> Any:  # noqa: N802
        """As much as fits: `most_states` sessions in one reply."""
        if not request.without_state and len(request.session_ids) > self.most_states:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_TOO_LARGE", "name fewer at once")
        response = sessions_pb2.GetStatesResponse(model=MODEL)
        states = []
        for i, session_id in enumerate(request.session_ids):
            try:
                if session_id in self.busy:
                    self.busy.remove(session_id)
                    raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "too much waits")
                session = self._session(session_id)
            except Refusal as refusal:
                response.errors.add(members=[i]).error.CopyFrom(message(refusal.fault, refusal.fault))
                continue
            states.append(session.state)
            response.model_version = session.version
            response.model_fingerprint = self._fingerprint(session.version)
            response.members.append(i)
            response.batch_sizes.append(session.batch_size)
            response.revisions.append(session.revision)
            response.positions.append(session.position)
        if states and not request.without_state:
            response.state.extend(tensor(name, np.concatenate(states)) for name in ("sum", "count"))
        return response

    @answered
    def ForkSessions(self, request: Any) -> Any:  # noqa: N802
        old = [self._session(session_id) for session_id in request.session_ids]
        ids = list(request.new_session_ids) or [""] * len(old)
        new = self._open_as(request, ids, old[0].batch_size, old[0])
        for one, source in zip(new, old, strict=True):
            one.state, one.revision, one.position = source.state, source.revision, source.position
        return sessions_pb2.ForkSessionsResponse(
            session_ids=[one.session_id for one in new],
            model=MODEL,
            model_fingerprint=self._fingerprint(old[0].version),
            model_version=old[0].version,
            batch_size=old[0].batch_size,
            revisions=[one.revision for one in new],
            positions=[one.position for one in new],
        )

    # Changes.

    def _change(self, session: Session, expected: int | None, request_id: int, change: Any) -> Any:
        """The rule of the protocol: apply, replay, or refuse."""
        if expected is not None and expected + 1 == session.revision and request_id == session.request_id:
            return (*session.remembered[:-1], True)
        if expected is not None and expected != session.revision:
            raise Refusal(
                grpc.StatusCode.ABORTED,
                "REVISION_CONFLICT",
                f"revision is {session.revision}",
                expected_revision=str(expected),
                actual_revision=str(session.revision),
            )
        y = change(session)
        if y is not None:
            y = np.resize(y, (*y.shape[:-1], self.widths[session.version]))
        self.applied += 1
        session.revision += 1
        session.request_id = request_id
        session.remembered = (y, session.revision, session.position, False)
        return session.remembered

    @answered
    def Step(self, request: Any) -> Any:  # noqa: N802
        session = self._session(request.session_id)
        x = unpack(request.inputs[0])
        y, revision, position, replayed = self._change(
            session, request.expected_revision, request.request_id, lambda s: step(s, x)
        )
        outputs = [] if request.outputs == sessions_pb2.OUTPUT_SELECTION_NONE else [tensor("y", y)]
        return sessions_pb2.StepResponse(
            outputs=outputs,
            states=states_of(request.states, y),
            revision=revision,
            position=position,
            replayed=replayed,
            model_version=session.version,
        )

    @answered
    def ResetStates(self, request: Any) -> Any:  # noqa: N802
        session = self._session(request.session_id)
        _, revision, position, replayed = self._change(
            session, request.expected_revision, request.request_id, reset
        )
        return sessions_pb2.ResetStatesResponse(
            revision=revision, position=position, replayed=replayed, model_version=session.version
        )

    def StepStream(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        self.metadata["StepStream"] = dict(context.invocation_metadata())
        for request in requests:
            fault = self.enter("StepStream", request)
            if fault is not None and fault.member is None and not fault.after_work:
                abort(context, fault)
            with self._lock:
                responses = self._frame(in_full(request), fault)
            if fault is not None and fault.member is None:
                # One part may have got through before the stream broke.
                yield from responses[:-1]
                abort(context, fault)
            yield from responses

    def _frame(self, request: Any, fault: Fault | None) -> list[Any]:
        frame = request.step if request.HasField("step") else request.reset
        parts = np.array_split(np.arange(len(frame.session_ids)), self.parts)
        of = [self.sessions[one].version if one in self.sessions else 0 for one in frame.session_ids]
        responses = [
            self._part(request, frame, [i for i in part.tolist() if of[i] == version], fault)
            for part in parts
            for version in sorted({of[i] for i in part.tolist()})
        ]
        responses[-1].last = True
        if frame.HasField("expected_revision") or frame.request_id_base:
            for response in responses:
                shorten(response)
        return responses

    def _part(self, request: Any, frame: Any, members: list[int], fault: Fault | None) -> Any:
        response = sessions_pb2.StepStreamResponse(frame_id=request.frame_id)
        outputs = []
        for i in members:
            try:
                if fault is not None and fault.member == i:
                    raise Refusal(fault.code, fault.reason, fault.message)
                outputs.append(self._member(request, frame, i, response))
            except Refusal as refusal:
                error = response.errors.add(members=[i])
                error.error.CopyFrom(message(refusal.fault, fault))
        if request.HasField("step") and outputs and frame.outputs != sessions_pb2.OUTPUT_SELECTION_NONE:
            response.outputs.append(tensor("y", np.concatenate(outputs)))
        return response

    def _member(self, request: Any, frame: Any, i: int, response: Any) -> Any:
        session = self._session(frame.session_ids[i])
        rows = [self.sessions[one].batch_size if one in self.sessions else 1 for one in frame.session_ids]
        start = sum(rows[:i])
        change: Callable[[Session], Any] = reset
        if request.HasField("step"):
            x = unpack(frame.inputs[0])[start : start + rows[i]]
            anew = list(frame.reset_mask[start : start + rows[i]])
            change = lambda s: step(s, x, anew)  # noqa: E731
        y, revision, position, replayed = self._change(
            session, frame.expected_revisions[i], frame.request_ids[i], change
        )
        response.members.append(i)
        response.model_version = session.version
        response.revisions.append(revision)
        response.positions.append(position)
        if replayed:
            response.replayed_members.append(i)
        return y


def message(told: Fault, fault: Fault | None) -> errors_pb2.Error:
    """An error on the stream."""
    return errors_pb2.Error(
        code=told.code.value[0],
        message=told.message,
        reason=told.reason,
        metadata=dict(told.metadata),
        retry_after_ms=int(1000 * (fault.retry_after_s if fault is not None else 0)),
    )


def abort(context: grpc.ServicerContext, fault: Fault) -> NoReturn:
    """Ends a call with a status, and with details if there is a reason."""
    if not fault.reason:
        context.abort(fault.code, fault.message)
    status = status_pb2.Status(code=fault.code.value[0], message=fault.message)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=fault.reason, domain="stepwell", metadata=dict(fault.metadata))
    )
    if fault.retry_after_s:
        delay = error_details_pb2.RetryInfo()
        delay.retry_delay.FromMicroseconds(int(fault.retry_after_s * 1e6))
        status.details.add().Pack(delay)
    context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))
    context.abort(fault.code, fault.message)
    raise AssertionError("abort raises")
