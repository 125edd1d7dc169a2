"""The client without I/O: builds requests, tracks sessions, reads replies. Used by both clients.

Each operation is a flow (`_base.flow`). Arguments are checked before the flow yields for the first time, so that
invalid ones cost no call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from stepwell._base import addresses
from stepwell._base.flow import Flow
from stepwell._base.log import LOG
from stepwell._batching.frames import Change, Counts, Frame, Indexes, Part
from stepwell._batching.step_arguments import as_one, pack_reset, selected, step_change
from stepwell._batching.steps import Step, Stepped
from stepwell._core.finisher import TRY_FOR_S
from stepwell._core.group_tracker import GroupTracker
from stepwell._core.lanes import FrameExchange
from stepwell._core.observer import Observer
from stepwell._core.retrier import Retrier
from stepwell._core.tracker import SessionTracker, is_unknown, new_request_id
from stepwell._core.versions import VersionWatch, is_pinned, name_of, reference
from stepwell._routing.ranking import keys_of
from stepwell._routing.replica import ReplicaInfo
from stepwell._routing.router import Router, Watcher, are_several
from stepwell._state import arguments
from stepwell._state.display import Listing
from stepwell._state.infos import Inputs, Mask, ModelInfo, Outputs, Rows, ServerInfo, SessionInfo, SlowSession
from stepwell._state.state import State, States
from stepwell._state.tensors import Packed, to_messages, unpack_all
from stepwell._state.trace import Trace, last_states, traced
from stepwell._tape.recording import counts_of, indexes_of, record_step, wanted_states
from stepwell._tape.reel import Reel
from stepwell._transport.connecting import Contact
from stepwell._transport.retry import Clock, Deadline, RetryPolicy
from stepwell.config import ClientConfig, check_switch, check_timeout
from stepwell.errors import InvalidInputError, ModelMismatchError, SessionGoneError, StepwellError
from stepwell.v1 import models_pb2, sessions_pb2

if TYPE_CHECKING:
    from stepwell._core.tracing import Tracing

_Opening: TypeAlias = (
    sessions_pb2.OpenSessionRequest
    | sessions_pb2.OpenSessionsRequest
    | sessions_pb2.ForkSessionRequest
    | sessions_pb2.ForkSessionsRequest
)


MAX_IDS = 4096
"""Sessions that one request may close or read."""


def _drop(flow: Flow[None]) -> None:
    """Discards a flow without running it."""


T = TypeVar("T")


class Core:
    """The operations of a client and of its sessions."""

    def __init__(
        self,
        config: ClientConfig,
        policy: RetryPolicy | None = None,
        clock: Clock = time.monotonic,
        *,
        finish: Callable[[Flow[None]], None] = _drop,
        watch: Callable[[Router], Watcher] | None = None,
    ) -> None:
        """The operations for one server.

        Args:
            config: The configuration of the client.
            policy: The retry policy.
            clock: Monotonic, in seconds.
            finish: Runs a flow in the background; returns immediately.
            watch: Creates the watcher of the replicas.
        """
        self._finish = finish
        hooks = config.event_hooks
        self.router = router = (
            Router(config.targets, clock, watch=watch, hooks=hooks) if are_several(config.targets) else None
        )
        """Chooses replicas; None if there is one server."""
        reasons = None if router is None else router.reasons
        contact = Contact(config.address, config.connect_timeout_s, reasons=reasons)
        self.retrier = Retrier(
            policy or RetryPolicy(),
            config.max_message_bytes,
            contact,
            renews_tokens=callable(config.token),
            router=router,
        )
        self._config = config
        self._timeout_s = config.timeout_s
        self._clock = clock
        self._last_deadline: Deadline | None = None
        self.observer = None if hooks is None else Observer(hooks, config.address, clock)
        """Creates the events of calls; None if there are no hooks."""
        self.versions = VersionWatch(hooks, config.address)
        """Reports sessions that move to another version of their model."""
        self._tracing: Tracing | None = None
        if config.tracing:
            from stepwell._core.tracing import Tracing

            self._tracing = Tracing(config.address)
        self.is_direct = self.router is None and self.observer is None and self._tracing is None
        """Whether the first attempt of a step needs no flow: there is one server, and no hooks or spans."""
        self._models: dict[str, ModelInfo] = {}

    def watched(self, flow: Flow[T]) -> Flow[T]:
        """Adds event hooks and spans to a flow."""
        if self.observer is not None:
            flow = self.observer.observed(flow)
        return flow if self._tracing is None else self._tracing.traced(flow)

    @property
    def is_on_this_machine(self) -> bool:
        """Whether the client's servers are on this machine."""
        return addresses.are_on_this_machine(self._config.address)

    @property
    def max_message_bytes(self) -> int:
        """Size of the largest message to send or receive."""
        return self._config.max_message_bytes

    def deadline(self, timeout_s: float | None) -> Deadline:
        """A call's time limit, starting now. Calls that begin in the same moment share it."""
        limit_s = self._timeout_s if timeout_s is None else check_timeout("timeout_s", timeout_s)
        last = self._last_deadline
        if last is None or limit_s != last.limit_s or self._clock() > last.shared_until_s:
            last = self._last_deadline = Deadline(limit_s, self._clock)
        return last

    def exchange(self, frame: Frame, deadline: Deadline, on_part: Callable[[Part], None]) -> Flow[None]:
        """Sends a frame, or one to each replica of its members, until every member has a final answer."""
        return FrameExchange(self.retrier, frame, deadline, on_part, self.max_message_bytes).run()

    @property
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        """The replicas as they are known now; a client of one server has one."""
        if self.router is None:
            return (ReplicaInfo(self._config.address, True),)
        return tuple(
            [ReplicaInfo(each.address, not each.is_down, each.error) for each in self.router.replicas]
        )

    def by_replica(self, ids: Sequence[str]) -> list[Indexes]:
        """Groups sessions by replica: for each one the indexes of its sessions in `ids`."""
        if self.router is None or not ids:
            return [np.arange(len(ids))]
        return [own for _, own in self.router.split(keys_of(ids))]

    # Models.

    def server_info(self, deadline: Deadline) -> Flow[ServerInfo]:
        """The server and all its models."""
        reply: models_pb2.ListModelsResponse = yield from self.retrier.call(
            "ListModels", models_pb2.ListModelsRequest(), deadline
        )
        return ServerInfo._from_message(reply)

    def slow_sessions(self, limit: int, deadline: Deadline) -> Flow[list[SlowSession]]:
        """Sessions with slow steps."""
        request = models_pb2.ListSlowSessionsRequest(limit=arguments.check_count("limit", limit))
        reply: models_pb2.ListSlowSessionsResponse = yield from self.retrier.call(
            "ListSlowSessions", request, deadline
        )
        return [
            SlowSession(each.session_id, each.model, each.seconds, each.age_seconds, each.tenant)
            for each in reply.sessions
        ]

    def models(self, deadline: Deadline) -> Flow[list[ModelInfo]]:
        """All models, sorted by name."""
        return Listing((yield from self.server_info(deadline)).models)

    def model(self, name: str, deadline: Deadline) -> Flow[ModelInfo]:
        """One model, as the server describes it now."""
        request = models_pb2.GetModelRequest(name=arguments.check_model(name))
        reply: models_pb2.GetModelResponse = yield from self.retrier.call("GetModel", request, deadline)
        info = self._models[name] = ModelInfo._from_message(reply.model)
        self.learn(info)
        return info

    def learn(self, info: ModelInfo) -> None:
        """Remembers a model that the server has described."""
        self._models[reference(info.name, info.version)] = info
        if any(each.is_default for each in info.versions if each.version == info.version):
            self._models[info.name] = info

    def known_model(
        self, name: str, deadline: Deadline, *, fingerprint: str = "", session_id: str = ""
    ) -> Flow[ModelInfo]:
        """One model as the server has described it before; asks again if that had another fingerprint.

        `session_id`: the session that uses it.
        """
        known = self._models.get(name)
        if known is not None and fingerprint in ("", known.fingerprint):
            return known
        return (yield from self._model_of(name, session_id, deadline))

    def _model_of(self, name: str, session_id: str, deadline: Deadline) -> Flow[ModelInfo]:
        """A model as the server describes it now; for a session, that of the version that it is on now.

        The version that its handle knows may have been unloaded since.
        """
        if session_id:
            session = yield from self.session(session_id, deadline)
            name = reference(session.model, session.model_version)
        return (yield from self.model(name, deadline))

    def states(
        self,
        model: str,
        fingerprint: str,
        states: States | None,
        rows: int,
        deadline: Deadline,
        session_id: str = "",
    ) -> Flow[tuple[Packed, ...]]:
        """A state as a request takes it; empty for the model's initial one.

        Args:
            model: Name of the model.
            fingerprint: Fingerprint of the model of the session; empty for any.
            states: As the caller gave them.
            rows: Number of rows that each must have.
            deadline: Of their call.
            session_id: Session that they are for; empty: none.
        """
        if states is None:
            return ()
        known = self._models.get(model)
        if known is not None and fingerprint in ("", known.fingerprint):
            try:
                return arguments.pack_states(states, known, rows)
            except (InvalidInputError, ModelMismatchError):
                pass  # the cached description may be old: check again with a new one
        fresh = yield from self._model_of(model, session_id, deadline)
        return arguments.pack_states(states, fresh, rows)

    def predict(
        self,
        model: str,
        inputs: Inputs,
        states: States | None,
        deadline: Deadline,
        reset: Mask | None = None,
    ) -> Flow[tuple[Outputs, State]]:
        """Outputs and final state of a run without a session."""
        packed = arguments.pack_inputs(inputs)
        rows = packed[0].shape[0]
        mask = np.frombuffer(b"" if reset is None else pack_reset(reset, packed), np.bool_)
        info = yield from self.known_model(arguments.check_model(model), deadline)
        state = yield from self.states(model, "", states, rows, deadline)
        request = models_pb2.PredictRequest(
            model=model, inputs=to_messages(packed), state=to_messages(state), reset_mask=mask.tolist()
        )
        reply: models_pb2.PredictResponse = yield from self.retrier.call("Predict", request, deadline)
        if reply.model_version not in (0, info.version):  # the default has moved since it was described
            info = yield from self.known_model(reference(info.name, reply.model_version), deadline)
        final = State(
            unpack_all(reply.state),
            model=info.name,
            fingerprint=info.fingerprint,
            batch_size=rows,
            structure=info.structure,
        )
        return as_one(unpack_all(reply.outputs)), final

    # Sessions as seen from the client.

    def open_session(
        self,
        model: str,
        batch_size: int,
        session_id: str | None,
        state: States | None,
        must_be_new: bool,
        max_idle_s: float | None,
        deadline: Deadline,
    ) -> Flow[SessionTracker]:
        """Opens or resumes a session."""
        rows = arguments.check_count("batch_size", batch_size)
        request = sessions_pb2.OpenSessionRequest(
            model=arguments.check_model(model),
            session_id=arguments.optional_session_id("session_id", session_id),
            batch_size=rows,
            must_be_new=must_be_new,
            request_id=new_request_id(),
            max_idle=arguments.check_max_idle(max_idle_s),
        )
        request.state.extend(to_messages((yield from self.states(model, "", state, rows, deadline))))
        if isinstance(state, State):  # the model it was checked against; the default may have moved since
            request.model_fingerprint = self._models[model].fingerprint
        reply: sessions_pb2.OpenSessionResponse = yield from self._open("OpenSession", request, deadline)
        return SessionTracker(reply.session, resumed=reply.resumed)

    def open_sessions(
        self,
        model: str,
        n: int,
        batch_size: int,
        session_ids: Sequence[str] | None,
        deadline: Deadline,
        *,
        resume: bool = False,
        max_idle_s: float | None = None,
    ) -> Flow[GroupTracker]:
        """Opens many sessions, or resumes those that are live."""
        count, rows = arguments.check_count("n", n), arguments.check_count("batch_size", batch_size)
        ids = arguments.check_session_ids(session_ids, count, f"n = {count} ids")
        check_switch("resume", resume)
        if resume and session_ids is None:
            raise InvalidInputError("session_ids must be given with resume=True; got None")
        request = sessions_pb2.OpenSessionsRequest(
            model=arguments.check_model(model),
            count=count,
            session_ids=ids,
            batch_size=rows,
            request_id=new_request_id(),
            resume=resume,
            max_idle=arguments.check_max_idle(max_idle_s),
        )
        reply: sessions_pb2.OpenSessionsResponse = yield from self._open("OpenSessions", request, deadline)
        tracker = GroupTracker(
            name_of(model),
            reply.model_fingerprint,
            rows,
            reply.session_ids,
            reply.revisions,
            reply.positions,
            version=reply.model_version,
            uids=reply.uids,
            is_pinned=is_pinned(model),
            router=self.router,
        )
        tracker.resume(reply.resumed, reply.model_versions)
        return tracker

    def fork_sessions(
        self,
        sources: Sequence[str],
        session_ids: Sequence[str] | None,
        deadline: Deadline,
        *,
        is_pinned: bool,
        max_idle_s: float | None = None,
    ) -> Flow[GroupTracker]:
        """Opens sessions with the states of others: all of them or none."""
        if not sources:
            raise InvalidInputError("a group must have at least one session to fork; it has none")
        count = len(sources)
        ids = arguments.check_session_ids(session_ids, count, f"one id for each of {count} sessions")
        request = sessions_pb2.ForkSessionsRequest(
            session_ids=sources,
            new_session_ids=ids,
            request_id=new_request_id(),
            max_idle=arguments.check_max_idle(max_idle_s),
        )
        reply: sessions_pb2.ForkSessionsResponse = yield from self._open("ForkSessions", request, deadline)
        return GroupTracker(
            reply.model,
            reply.model_fingerprint,
            reply.batch_size,
            reply.session_ids,
            reply.revisions,
            reply.positions,
            version=reply.model_version,
            uids=reply.uids,
            is_pinned=is_pinned,
            router=self.router,
        )

    def _open(self, rpc: str, request: _Opening, deadline: Deadline) -> Flow[Any]:
        """Makes a call that opens sessions; the result is its response.

        If it ends without an answer, or its caller gives up, it may have opened sessions whose ids nobody knows.
        Those are closed in the background. Sessions that the caller named are left to the caller.
        """
        try:
            return (yield from self.retrier.call(rpc, request, deadline, changes=True))
        except StepwellError as error:
            if is_unknown(error) and not _names_sessions(request):
                self._finish(self._close_made(rpc, request, Deadline(TRY_FOR_S, self._clock)))
            raise
        except GeneratorExit:  # Ctrl-C, or a cancelled task
            if not _names_sessions(request):
                self._finish(self._close_made(rpc, request, Deadline(TRY_FOR_S, self._clock)))
            raise

    def _close_made(self, rpc: str, request: _Opening, deadline: Deadline) -> Flow[None]:
        """Closes the sessions that a call has opened: repeating the same request returns their ids."""
        LOG.info("%s ended without an answer; closing any sessions that it opened in the background", rpc)
        try:
            reply = yield from self.retrier.call(rpc, request, deadline, changes=True)
            is_group = rpc.endswith("Sessions")
            made = reply.session_ids if is_group else [reply.session.session_id]
            uids = reply.uids if is_group else [reply.session.uid]
            yield from self.close_sessions(made, deadline, np.array(uids, np.uint64))
        except StepwellError as error:
            LOG.warning(
                "%s ended without an answer, and any sessions that it opened could not be closed: %s",
                rpc,
                error,
            )
            raise
        LOG.info("closed %d sessions that %s had opened", len(made), rpc)

    def close_sessions(self, ids: Sequence[str], deadline: Deadline, uids: Counts | None = None) -> Flow[int]:
        """Closes sessions in requests of at most `MAX_IDS` ids, each with a request id of its own.

        Args:
            ids: Sessions to close; those that do not exist are skipped.
            deadline: Of all requests together.
            uids: `(n,)`, or one for all; None or empty to close whichever sessions have the ids.

        Returns:
            The number of closed sessions.
        """
        closed = 0
        for own in self.by_replica(ids):
            for start in range(0, len(own), MAX_IDS):
                part = own[start : start + MAX_IDS]
                request = sessions_pb2.CloseSessionsRequest(
                    session_ids=[ids[i] for i in part.tolist()], request_id=new_request_id()
                )
                if uids is not None and len(uids):
                    some = uids if len(uids) == 1 else uids[part]
                    request.uids.extend((some[:1] if (some == some[0]).all() else some).tolist())
                reply: sessions_pb2.CloseSessionsResponse = yield from self.retrier.call(
                    "CloseSessions", request, deadline, changes=True
                )
                closed += reply.closed
        return closed

    def session_info(self, session_id: str, deadline: Deadline) -> Flow[SessionInfo]:
        """One session as of its last completed change."""
        return SessionInfo._from_message((yield from self.session(session_id, deadline)))

    def session(self, session_id: str, deadline: Deadline) -> Flow[sessions_pb2.Session]:
        request = sessions_pb2.GetSessionRequest(
            session_id=arguments.check_session_id("session_id", session_id)
        )
        reply: sessions_pb2.GetSessionResponse = yield from self.retrier.call("GetSession", request, deadline)
        return reply.session

    def close_session(self, session_id: str, deadline: Deadline, *, uid: int = 0) -> Flow[None]:
        """Deletes a session; with a `uid` no other session that has the id now."""
        request = sessions_pb2.CloseSessionRequest(
            session_id=arguments.check_session_id("session_id", session_id),
            request_id=new_request_id(),
            uid=uid,
        )
        yield from self.retrier.call("CloseSession", request, deadline, changes=True)

    # One session.

    def step_change(
        self,
        tracker: SessionTracker,
        inputs: Inputs,
        outputs: object = "all",
        time: object = "all",
        reset: Mask | None = None,
        rows: Rows | None = None,
        states: object = "none",
    ) -> Change:
        """Checks the arguments of a step."""
        count = tracker.batch_size
        chosen: tuple[int, ...] = ()
        if rows is not None:
            chosen = arguments.check_rows(rows, count) or ()
            if not chosen:
                raise InvalidInputError("rows must select at least one row; got none")
            if chosen == tuple(range(count)):
                chosen = ()
        return step_change(
            inputs,
            len(chosen) or count,
            outputs=outputs,
            time=time,
            reset=reset,
            states=states,
            rows=chosen,
        )

    def step(
        self,
        tracker: SessionTracker,
        change: Change,
        deadline: Deadline,
        reels: Sequence[Reel] = (),
        tried: tuple[Step, StepwellError] | None = None,
    ) -> Flow[Outputs | Trace]:
        """Advances a session. The result is what its caller receives.

        Args:
            tracker: The session.
            change: The step.
            deadline: Its time limit.
            reels: They record it.
            tried: A first attempt that was made before and has failed.
        """
        info: ModelInfo | None = None
        wanted = wanted_states(reels) if reels else "none"
        if (
            reels
            or change.states == "all"
            # The same call may have been sent by a tape that wanted all states.
            or (change.states == "last" and tracker.pending is not None)
        ):  # the model says which arrays of the reply have a time axis
            name = reference(tracker.model, tracker.model_version)
            info = yield from self.known_model(
                name, deadline, fingerprint=tracker.fingerprint, session_id=tracker.session_id
            )
        stepped: Stepped
        step, failed = tried or (tracker.step(Step, change, deadline, wanted), None)
        before = tracker.position
        try:
            if failed is None and self.router is None:
                try:  # most steps need one attempt, and none of the retrier's work
                    stepped = yield step
                except StepwellError as error:
                    failed = error
            if failed is not None or self.router is not None:
                stepped = yield from self.retrier.step(step, failed)
        except StepwellError as error:
            raise tracker.failed(error) from None
        revision, position, version, names, arrays, stepped_states = stepped
        previous = tracker.applied(revision, position, version)
        named = dict(zip(names, arrays, strict=True))
        if reels and info is not None:
            members = counts_of(tracker, before)
            record_step(reels, change, info, members, named, traced(stepped_states, info))
        if previous:
            yield from self.moved(tracker, previous)
        outputs = selected(named, change)
        if change.states == "none":
            return outputs
        states = traced(stepped_states, info)
        if change.states == "last":
            states = last_states(states)
        return Trace(outputs, states, revision, position, tracker.model_version)

    def moved(self, tracker: SessionTracker, previous: int) -> Flow[None]:
        """Reports that a session has moved from a version of its model to another."""
        return self.versions.moved(tracker.model, [tracker.session_id], previous, tracker.model_version)

    def reset_states(
        self,
        tracker: SessionTracker,
        states: States | None,
        rows: Rows | None,
        deadline: Deadline,
        position: int = 0,
        reels: Sequence[Reel] = (),
    ) -> Flow[None]:
        """Sets the state of a session, or some rows of it; `position` is the position of the whole state."""
        position = arguments.check_position(position)
        if position and (states is None or rows is not None):
            raise InvalidInputError(
                f"position must be 0 unless states are given for all rows; got {position}"
            )
        chosen = arguments.check_rows(rows, tracker.batch_size)
        if chosen == ():
            return
        count = tracker.batch_size if chosen is None else len(chosen)
        packed = yield from self.states(
            tracker.reference, tracker.fingerprint, states, count, deadline, tracker.session_id
        )
        change = Change("reset", packed, rows=chosen or (), position=position)
        request = sessions_pb2.ResetStatesRequest(
            position=position,
            session_id=tracker.session_id,
            state=to_messages(packed),
            rows=change.rows,
            expected_revision=tracker.revision,
            request_id=tracker.begin(change).request_id,
        )
        before = tracker.position
        try:
            reply: sessions_pb2.ResetStatesResponse = yield from self.retrier.call(
                "ResetStates", request, deadline, changes=True
            )
        except StepwellError as error:
            raise tracker.failed(error) from None
        previous = tracker.applied(reply.revision, reply.position, reply.model_version)
        for reel in reels:
            reel.mark("set" if packed else "reset", indexes_of(chosen), counts_of(tracker, before))
        if previous:
            yield from self.moved(tracker, previous)

    def get_state(self, session_id: str, deadline: Deadline) -> Flow[State]:
        """Reads the state of a session."""
        request = sessions_pb2.GetStateRequest(session_id=session_id)
        reply: sessions_pb2.GetStateResponse = yield from self.retrier.call("GetState", request, deadline)
        return State(
            unpack_all(reply.state),
            model=reply.session.model,
            fingerprint=reply.session.model_fingerprint,
            batch_size=reply.session.batch_size,
            revision=reply.session.revision,
            position=reply.session.position,
            structure=reply.model_structure,
        )

    def fork(
        self,
        tracker: SessionTracker,
        session_id: str | None,
        max_idle_s: float | None,
        deadline: Deadline,
    ) -> Flow[SessionTracker]:
        """Opens a session with the state of another."""
        request = sessions_pb2.ForkSessionRequest(
            session_id=tracker.session_id,
            new_session_id=arguments.optional_session_id("session_id", session_id),
            request_id=new_request_id(),
            max_idle=arguments.check_max_idle(max_idle_s),
        )
        reply: sessions_pb2.ForkSessionResponse = yield from self._open("ForkSession", request, deadline)
        return SessionTracker(reply.session)

    def refresh(self, tracker: SessionTracker, deadline: Deadline) -> Flow[None]:
        """Updates revision and position to the server's."""
        previous = tracker.refresh((yield from self.session(tracker.session_id, deadline)))
        if previous:
            yield from self.moved(tracker, previous)

    def close(self, tracker: SessionTracker, deadline: Deadline) -> Flow[None]:
        """Deletes a session. Succeeds if it no longer exists, also if another session has its id now, which then stays."""
        try:
            yield from self.close_session(tracker.session_id, deadline, uid=tracker.uid)
        except SessionGoneError:
            return


def _names_sessions(request: _Opening) -> bool:
    """Whether the caller chose the ids of the sessions that a request opens."""
    if isinstance(request, sessions_pb2.OpenSessionRequest):
        return bool(request.session_id)
    if isinstance(request, sessions_pb2.OpenSessionsRequest):
        return bool(request.session_ids)
    if isinstance(request, sessions_pb2.ForkSessionsRequest):
        return bool(request.new_session_ids)
    return bool(request.new_session_id)
