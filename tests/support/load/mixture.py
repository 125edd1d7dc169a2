"""A mixture of calls at high concurrency, whose answers are recorded and judged.

Many tasks on several connections step, reset, read, fork, close and reopen some sessions at the same time, by unary calls
and by frames, with retries, wrong inputs, cancelled calls, short deadlines and sessions that expire. At the end
`checks/mixture_replay` replays the history of each session.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from stepwell.v1 import models_pb2, models_pb2_grpc, sessions_pb2_grpc
from stepwell.v1 import sessions_pb2 as pb
from support import secured
from support.checks.mixture_replay import CARRIED, Change, Model, Replay, Session, Values, Wrong
from support.peers import wire
from support.peers.wire import Refusal, tensors

PATIENCE_S = 60.0
CONNECTIONS = 3
MAX_WRONG = 10
"""Wrong answers after which it ends."""
IDLE_S = 1
"""The idle limit of sessions that may expire."""
_SELECTIONS = pb.OutputSelection.values()


class Mixture:
    """The tasks, and what they have seen."""

    def __init__(
        self,
        address: str,
        seed: int,
        tasks: int,
        sessions: int,
        *,
        token: str | None = None,
        second: Path | None = None,
        may_expire: bool = True,
    ) -> None:
        """`token`: of its calls. `second`: the file of a version, to move defaults and to load it; None: it may not.

        `may_expire`: some sessions have short idle limits.
        """
        self._second, self._may_expire = second, may_expire
        self._address = address
        self._seed = seed
        self._chance = random.Random(seed)
        self._rng = np.random.default_rng(seed)
        self._task_count, self._session_count = tasks, sessions
        self._metadata = None if token is None else (("authorization", f"Bearer {token}"),)
        self.sessions: list[Session] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self._until = 0.0
        self._frames = 0
        self._stubs: list[Any] = []
        self._models: dict[str, Model] = {}
        self._initial: dict[tuple[str, int], Values] = {}
        self._streams: list[_Stream] = []

    async def run(self, seconds: float) -> None:
        """Play, then judge."""
        async with contextlib.AsyncExitStack() as stack:
            options = [*wire.OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
            for _ in range(CONNECTIONS):
                channel = await stack.enter_async_context(secured.channel_aio(self._address, options))
                self._stubs.append(sessions_pb2_grpc.SessionServiceStub(channel))
                self._predictor = models_pb2_grpc.ModelServiceStub(channel)
                self._admin = models_pb2_grpc.ModelAdminServiceStub(channel)
            await self._describe()
            for stub in self._stubs:
                for _ in range(2):
                    stream = _Stream(stub.StepStream(metadata=self._metadata))
                    self._streams.append(stream)
            self.sessions = [self._new_session(number) for number in range(self._session_count)]
            self._until = time.monotonic() + seconds
            players = [asyncio.create_task(self._play()) for _ in range(self._task_count)]
            if self._second:
                players.append(asyncio.create_task(self._switch_versions()))
                players.append(asyncio.create_task(self._load_and_unload(self._second)))
            _, hung = await asyncio.wait(players, timeout=seconds + 2 * PATIENCE_S)
            if hung:
                self.wrong += [f"a task has no end: {_where(task)}" for task in hung]
                return
            for stream in self._streams:
                await stream.end()
            await self._read_all()
            await self._judge()

    async def _describe(self) -> None:
        listed = await self._predictor.ListModels(
            models_pb2.ListModelsRequest(), timeout=PATIENCE_S, metadata=self._metadata
        )
        for model in listed.models:
            self._models[model.name] = Model(model.name, model.inputs, model.outputs, model.state)

    def _new_session(self, number: int) -> Session:
        chance, names = self._chance, list(self._models)
        model = chance.choice([CARRIED, CARRIED, *names])
        size = chance.choice([1, 1, 1, 1, 1, 2, 3])
        may_expire = self._may_expire and chance.random() < 0.2
        return Session(f"mix-{number}", model, size, chance.random() < 0.5, may_expire=may_expire)

    @property
    def _stub(self) -> Any:
        return self._chance.choice(self._stubs)

    async def _play(self) -> None:
        while time.monotonic() < self._until and len(self.wrong) < MAX_WRONG:
            try:
                await self._act_once()
            except Wrong as wrong:
                self.wrong.append(str(wrong))
            except Exception as error:
                self.wrong.append("".join(traceback.format_exception(error)[-4:]))

    async def _act_once(self) -> None:
        chance = self._chance
        session = chance.choice(self.sessions)
        if not session.is_exclusive:
            await self._act(session)
        elif chance.random() < 0.25:
            await self._frame_of_exclusive()
        elif session.is_taken:
            await asyncio.sleep(0)
        else:
            with _taken([session]):
                await self._act(session)

    async def _act(self, session: Session) -> None:
        if not session.is_open:
            await self._open(session)
            return
        kinds = {"step": 60, "reset": 4, "read": 5, "wrong": 6, "chunk": 5, "close": 1}
        if session.is_exclusive:
            kinds |= {"cancel": 6, "late": 4, "again": 8, "other": 4, "fork": 2, "series": 3}
            kinds |= {"idle": 4} if session.may_expire else {}
        else:
            kinds |= {"frame": 30, "twins": 8}
        kind = self._chance.choices(list(kinds), list(kinds.values()))[0]
        self.counts[kind] += 1
        try:
            await getattr(self, f"_{kind}")(session)
        except _Refused as refused:
            if not _has_expired(session, refused.refusal):
                raise
            self.counts["expired"] += 1

    # --- what a task may do ---

    async def _open(self, session: Session) -> None:
        state = None
        model = self._models[session.model]
        if self._chance.random() < 0.3:
            state = model.draw_state(self._rng, session.batch_size)
        request = pb.OpenSessionRequest(
            model=session.model,
            session_id=session.session_id,
            batch_size=session.batch_size,
            state=tensors(state or {}),
            request_id=self._id(),
        )
        if session.may_expire:
            request.max_idle.seconds = IDLE_S
        elif self._chance.random() < 0.5:
            request.max_idle.seconds = 3600
        answer = await self._call("OpenSession", request)
        if not answer.resumed:
            session.begins[answer.session.revision] = state
            session.positions[answer.session.revision] = answer.session.position
        session.revision = max(session.revision, answer.session.revision)
        session.is_open = True
        session.last = None

    def _drawn(self, session: Session, steps: int, **more: Any) -> tuple[pb.StepRequest, Change]:
        inputs = self._models[session.model].draw(self._rng, session.batch_size, steps)
        chance = self._chance
        change = Change(inputs, steps, select=chance.choice(_SELECTIONS))
        request = pb.StepRequest(
            session_id=session.session_id, inputs=tensors(inputs), outputs=change.select, **more
        )
        if chance.random() < 0.05:
            change.names = [chance.choice(self._models[session.model].outputs).name]
            request.output_names.extend(change.names)
        if chance.random() < 0.05:
            change.mask = [chance.random() < 0.5 for _ in range(session.batch_size)]
            request.reset_mask.extend(change.mask)
        return request, change

    def _id(self) -> int:
        return self._chance.getrandbits(64) | 1

    async def _step(self, session: Session, steps: int = 0) -> None:
        chance, more = self._chance, dict[str, Any]()
        if chance.random() < 0.5:
            more["request_id"] = self._id()
        if chance.random() < 0.3:
            more["expected_revision"] = session.revision
        request, change = self._drawn(session, steps or chance.choice([0, 0, 0, 1]), **more)
        await self._sent(session, request, change)

    async def _chunk(self, session: Session) -> None:
        await self._step(session, self._chance.choice([2, 3, 7]))

    async def _idle(self, session: Session) -> None:
        """A step when the session expires, a little before or after that."""
        await asyncio.sleep(self._chance.gauss(IDLE_S, 0.02))
        await self._step(session)

    async def _series(self, session: Session) -> None:
        """Steps that ask for states."""
        request, change = self._drawn(session, 0, states=pb.STATE_SELECTION_LAST)
        await self._sent(session, request, change)

    async def _sent(self, session: Session, request: pb.StepRequest, change: Change) -> None:
        before = session.revision
        try:
            answer = await self._call("Step", request)
        except _Refused as refused:
            self._judge_refusal(session, request, refused.refusal, before)
            return
        self._note(session, request, change, answer)

    def _note(self, session: Session, request: Any, change: Change, answer: pb.StepResponse) -> None:
        if answer.replayed:
            raise Wrong(f"{session.session_id}: a new change was answered as a replay")
        if request.HasField("expected_revision") and answer.revision != request.expected_revision + 1:
            raise Wrong(f"{session.session_id}: revision {answer.revision} after {request.expected_revision}")
        change.outputs, change.version = wire.arrays(answer.outputs), answer.model_version
        change.position = answer.position
        if answer.states:
            change.states = wire.arrays(answer.states)
        session.applied(answer.revision, change)
        session.last = (request, answer) if session.is_exclusive else None

    def _judge_refusal(self, session: Session, request: Any, refusal: Refusal, before: int) -> None:
        """Refusals of valid requests."""
        reason = refusal.reason
        self.counts[f"refused {reason}"] += 1
        if _has_expired(session, refusal):
            return
        if reason == "REVISION_CONFLICT" and request.HasField("expected_revision"):
            if not session.is_exclusive:
                return
            if request.expected_revision != session.revision:
                return
        if reason in {"OVERLOADED", "UNAVAILABLE"}:  # a version that moves, while its sessions are paged out
            return
        if reason == "SESSION_NOT_FOUND" and not session.is_exclusive:
            return  # another task has closed it
        raise Wrong(f"{session.session_id} at {before}: {refusal}")

    async def _frame(self, session: Session) -> None:
        """A frame of shared sessions of one model; some answers are conflicts, some sessions are closed."""
        others = [
            one
            for one in self.sessions
            if one.model == session.model and one.is_open and not one.is_exclusive and one is not session
        ]
        some = self._chance.sample(others, min(len(others), self._chance.choice([0, 1, 3, 8, 30])))
        await self._send_frame([session, *some])

    async def _frame_of_exclusive(self) -> None:
        model = self._chance.choice(list(self._models))
        open_ones = [one for one in self.sessions if one.model == model and one.is_exclusive and one.is_open]
        some = self._chance.sample(open_ones, min(len(open_ones), self._chance.choice([1, 2, 5, 20])))
        with _taken([one for one in some if not one.is_taken]) as held:
            if held:
                self.counts["exclusive frame"] += 1
                await self._send_frame(held)

    async def _send_frame(self, some: Sequence[Session]) -> None:
        chance = self._chance
        steps = chance.choice([0, 0, 0, 0, 1, 3])
        sizes = [one.batch_size for one in some]
        model = self._models[some[0].model]
        inputs = model.draw(self._rng, sum(sizes), steps)
        select = chance.choice(_SELECTIONS)
        fields: dict[str, Any] = {"outputs": select}
        if chance.random() < 0.5:
            fields["request_ids"] = [self._id() for _ in some]
        if chance.random() < 0.5 or max(sizes) > 1:
            fields["batch_sizes"] = sizes
        has_expected = chance.random() < 0.4
        if has_expected:
            fields["expected_revisions"] = [one.revision for one in some]
        before = [one.revision for one in some]
        frame = pb.StepFrame(session_ids=[one.session_id for one in some], inputs=tensors(inputs), **fields)
        answers = await self._exchange(frame)
        refused = wire.of_members(answers, len(some))
        starts = np.cumsum([0, *sizes])
        rows = wire.rows_of(answers, sizes)
        for part in answers:
            members = list(range(len(some))) if part.all_members else list(part.members)
            if part.replayed_members:
                raise Wrong(f"a new frame has replayed members {list(part.replayed_members)}")
            for place, member in enumerate(members):
                one, low, high = some[member], starts[member], starts[member + 1]
                own = {name: array[low:high] for name, array in inputs.items()}
                change = Change(own, steps, select=select, outputs=rows[member], version=part.model_version)
                change.position = part.positions[place]
                revision = part.revisions[place]
                if has_expected and revision != before[member] + 1:
                    raise Wrong(f"{one.session_id}: revision {revision} after {before[member]}")
                one.applied(revision, change)
                one.last = None
        for member, refusal in refused.items():
            one = some[member]
            request = pb.StepRequest(session_id=one.session_id)
            if has_expected:
                request.expected_revision = before[member]
            self._judge_refusal(one, request, refusal, before[member])

    async def _exchange(self, frame: Any) -> list[Any]:
        self._frames += 1
        return await self._chance.choice(self._streams).exchange(self._frames, frame)

    async def _twins(self, session: Session) -> None:
        """The same request by two connections at the same time: one applies it."""
        more = {"expected_revision": session.revision, "request_id": self._id()}
        request, change = self._drawn(session, self._chance.choice([0, 1]), **more)
        first, second = self._chance.sample(self._stubs, 2)
        ends = await asyncio.gather(
            self._call("Step", request, first), self._call("Step", request, second), return_exceptions=True
        )
        answers = [end for end in ends if isinstance(end, pb.StepResponse)]
        for end in ends:
            if isinstance(end, _Refused):
                self._judge_refusal(session, request, end.refusal, request.expected_revision)
            elif isinstance(end, BaseException):
                raise end
        fresh = [answer for answer in answers if not answer.replayed]
        if len(fresh) > 1 or (answers and not fresh):
            raise Wrong(f"{session.session_id}: twins were applied {len(fresh)} times of {len(answers)}")
        for answer in answers:
            same = answer.revision, answer.position, wire.data(answer.outputs)
            if same != (fresh[0].revision, fresh[0].position, wire.data(fresh[0].outputs)):
                raise Wrong(f"{session.session_id}: a replay differs from the first answer")
        if fresh:
            self._note(session, request, change, fresh[0])

    async def _again(self, session: Session) -> None:
        """Send the last request again."""
        if session.last is None:
            return
        request, first = session.last
        if not request.request_id:
            return
        answer = await self._call("Step", request)
        same = [(one.revision, one.position, wire.data(one.outputs)) for one in (answer, first)]
        if not answer.replayed or same[0] != same[1]:
            raise Wrong(
                f"{session.session_id}: a retry at {first.revision} got {answer.revision}: {answer}"[:400]
            )

    async def _other(self, session: Session) -> None:
        """Send other content with the last request id, and revisions that are wrong."""
        if session.last is not None and session.last[0].request_id:
            request, _ = self._drawn(session, 0, request_id=session.last[0].request_id)
            if self._chance.random() < 0.5:
                request.expected_revision = session.revision + self._chance.choice([-1, 0])
            await self._refused(session, request, "INVALID_INPUT")
        request, _ = self._drawn(session, 0, request_id=self._id())
        request.expected_revision = (session.revision + self._chance.choice([1, 2, -1, 2**63])) % 2**64
        await self._refused(session, request, "REVISION_CONFLICT")

    async def _refused(self, session: Session, request: Any, reason: str) -> None:
        try:
            await self._call("Step", request)
        except _Refused as refused:
            found = refused.refusal.reason
            if _has_expired(session, refused.refusal):
                return
            if found != reason and not (found == "SESSION_NOT_FOUND" and not session.is_exclusive):
                raise Wrong(f"{session.session_id}: {refused.refusal} instead of {reason}") from None
        else:
            raise Wrong(f"{session.session_id}: not refused by {reason}: {request}"[:400])

    def _drawn_with_outputs(self, session: Session) -> tuple[pb.StepRequest, Change]:
        """A step whose outputs show which version ran it: the answer to a retry does not."""
        more = {"expected_revision": session.revision, "request_id": self._id()}
        request, change = self._drawn(session, 0, **more)
        change.select = pb.OUTPUT_SELECTION_UNSPECIFIED
        request.outputs = pb.OUTPUT_SELECTION_UNSPECIFIED
        return request, change

    async def _cancel(self, session: Session) -> None:
        request, change = self._drawn_with_outputs(session)
        call = self._stub.Step(request, timeout=PATIENCE_S, metadata=self._metadata)
        if self._chance.random() < 0.7:
            await asyncio.sleep(self._chance.choice([0, 0, 0.0005, 0.002]))
        call.cancel()
        await self._resolve(session, request, change)

    async def _late(self, session: Session) -> None:
        request, change = self._drawn_with_outputs(session)
        limit_s = self._chance.choice([0.0002, 0.001, 0.003, 0.01])
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self._stub.Step(request, timeout=limit_s, metadata=self._metadata)
        await self._resolve(session, request, change)

    async def _resolve(self, session: Session, request: pb.StepRequest, change: Change) -> None:
        """Retry a change of unknown outcome: it is applied once."""
        answer = await self._call("Step", request)
        if answer.revision != request.expected_revision + 1:
            raise Wrong(f"{session.session_id}: {answer.revision} after {request.expected_revision}")
        self.counts["resolved by a replay"] += answer.replayed
        is_replay, answer.replayed = answer.replayed, False
        self._note(session, request, change, answer)
        if is_replay and session.model == CARRIED:
            change.version = 0

    async def _reset(self, session: Session) -> None:
        state = None
        if self._chance.random() < 0.6:
            state = self._models[session.model].draw_state(self._rng, session.batch_size)
        request = pb.ResetStatesRequest(
            session_id=session.session_id,
            state=tensors(state or {}),
            position=self._chance.choice([0, 5]) if state else 0,
        )
        if self._chance.random() < 0.5:
            request.request_id = self._id()
        try:
            answer = await self._call("ResetStates", request)
        except _Refused as refused:
            self._judge_refusal(session, request, refused.refusal, session.revision)
            return
        change = Change(None, state=state, position=answer.position, version=answer.model_version)
        if answer.position != request.position:
            raise Wrong(f"{session.session_id}: position {answer.position} instead of {request.position}")
        session.applied(answer.revision, change)
        session.last = None

    async def _read(self, session: Session) -> None:
        try:
            answer = await self._call("GetState", pb.GetStateRequest(session_id=session.session_id))
        except _Refused as refused:
            self._judge_refusal(session, pb.StepRequest(), refused.refusal, session.revision)
            return
        session.read(answer.session.revision, wire.arrays(answer.state))

    async def _wrong(self, session: Session) -> None:
        """Requests that break a rule: nothing may change."""
        model, chance = self._models[session.model], self._chance
        inputs = model.draw(self._rng, session.batch_size, 0)
        name = chance.choice(list(inputs))
        array = inputs[name]
        kind = chance.choice(["value", "rows", "name", "shape", "dtype", "missing"])
        is_float = array.dtype.kind not in "iub"
        if kind == "dtype" or (kind == "value" and is_float):
            array = array.astype(np.float64) if is_float else array.astype(np.float32)
            if is_float:
                array.flat[chance.randrange(array.size)] = chance.choice([np.nan, np.inf, -np.inf])
        elif kind == "value" and array.dtype.kind == "i":
            array = np.full_like(array, chance.choice([10**6, -77]))
        elif kind == "rows":
            array = np.concatenate([array, array])
        elif kind in {"shape", "value"}:
            array = array[..., None, None]
        sent = dict(inputs)
        del sent[name]
        if kind != "missing":
            sent["nobody" if kind == "name" else name] = array
        request = pb.StepRequest(session_id=session.session_id, inputs=tensors(sent), request_id=self._id())
        if chance.random() < 0.5 or session.batch_size > 1:
            await self._refused(session, request, "INVALID_INPUT")
            return
        frame = pb.StepFrame(session_ids=[session.session_id] * chance.choice([1, 2]), inputs=request.inputs)
        refusals = wire.of_members(await self._exchange(frame), len(frame.session_ids))
        reasons = {refusal.reason for refusal in refusals.values()}
        if len(refusals) != len(frame.session_ids) or not reasons <= {
            "INVALID_INPUT",
            "SESSION_NOT_FOUND",
            "SESSION_EXPIRED",
        }:
            raise Wrong(f"{session.session_id}: a wrong frame ({kind}) was refused by {refusals}")

    async def _fork(self, session: Session) -> None:
        number = len(self.sessions)
        twin = Session(f"mix-{number}", session.model, session.batch_size, is_exclusive=True)
        self.sessions.append(twin)
        request = pb.ForkSessionRequest(
            session_id=session.session_id, new_session_id=twin.session_id, request_id=self._id()
        )
        with _taken([twin]):
            answer = (await self._call("ForkSession", request)).session
            if answer.revision != session.revision:
                raise Wrong(f"{session.session_id}: forked at {answer.revision}, not {session.revision}")
            twin.begins[answer.revision] = (session.session_id, answer.revision)
            twin.positions[answer.revision] = answer.position
            twin.revision, twin.is_open = answer.revision, True

    async def _close(self, session: Session) -> None:
        """Close, and mostly open again at once."""
        session.ended()
        request = pb.CloseSessionRequest(session_id=session.session_id, request_id=self._id())
        try:
            await self._call("CloseSession", request)
        except _Refused as refused:
            self._judge_refusal(session, pb.StepRequest(), refused.refusal, session.revision)
        if len(self.sessions) < 2 * self._session_count or self._chance.random() < 0.3:
            await self._open(session)
        elif session.is_exclusive:
            self.sessions = [one for one in self.sessions if one is not session] + [session]

    async def _switch_versions(self) -> None:
        """Move the sessions of a model to its other version and back, under traffic."""
        version = 1
        while time.monotonic() < self._until and len(self.wrong) < MAX_WRONG:
            await asyncio.sleep(0.5)
            version = 3 - version
            request = models_pb2.SetDefaultRequest(
                name=CARRIED, version=version, sessions=models_pb2.SESSION_POLICY_CARRY
            )
            await self._admin.SetDefault(request, timeout=PATIENCE_S)
            self.counts["moved default"] += 1

    async def _load_and_unload(self, second: Path) -> None:
        """Versions come, have sessions that are stepped, and are unloaded under them."""
        number = 0
        while time.monotonic() < self._until and len(self.wrong) < MAX_WRONG:
            number += 1
            name = self._chance.choice([CARRIED, "brought"])
            request = models_pb2.LoadModelRequest(name=name, path=str(second), keep_default=name == CARRIED)
            try:
                loaded = [part async for part in self._admin.LoadModel(request, timeout=PATIENCE_S)][-1]
                model = f"{name}@{loaded.version}"
                ids = [f"brief-{number}-{place}" for place in range(8)]
                opening = pb.OpenSessionsRequest(model=model, session_ids=ids)
                await self._call("OpenSessions", opening)
                steppers = [asyncio.create_task(self._step_until_gone(one)) for one in ids]
                await asyncio.sleep(self._chance.uniform(0.05, 0.5))
                unload = models_pb2.UnloadModelRequest(name=name, version=loaded.version, force=True)
                await self._admin.UnloadModel(unload, timeout=PATIENCE_S)
                self.counts["unloaded versions"] += 1
                await asyncio.gather(*steppers)
            except (Wrong, _Refused, grpc.aio.AioRpcError) as error:
                self.wrong.append(f"a version that came and went: {error}")

    async def _step_until_gone(self, session_id: str) -> None:
        drawn = self._models[CARRIED].draw(self._rng, 1, 0)
        request, revision = pb.StepRequest(session_id=session_id, inputs=tensors(drawn)), 0
        while True:
            try:
                answer = await self._call("Step", request)
            except _Refused as refused:
                reason = refused.refusal.reason
                if reason == "OVERLOADED":
                    continue
                if reason not in {
                    "SESSION_NOT_FOUND",
                    "SESSION_LOST",
                    "MODEL_NOT_FOUND",
                    "MODEL_VERSION_NOT_FOUND",
                }:
                    raise Wrong(f"{session_id}: {refused.refusal}") from None
                return
            revision += 1
            if answer.revision != revision:
                raise Wrong(f"{session_id}: revision {answer.revision} instead of {revision}")

    async def _call(self, name: str, request: Any, stub: Any = None) -> Any:
        try:
            call = getattr(stub or self._stub, name)
            return await call(request, timeout=PATIENCE_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise _Refused(wire.of_call(error), request) from None

    async def _read_all(self) -> None:
        for session in self.sessions:
            if session.is_open:
                try:
                    await self._read(session)
                except Wrong as wrong:
                    self.wrong.append(str(wrong))

    async def _judge(self) -> None:
        replay = Replay(self.sessions, self._models, self._predict, self._initial_state)
        await replay.run()
        self.wrong += replay.wrong
        self.counts["replayed changes"] += replay.replayed
        self.counts["checked reads"] += replay.checked_reads

    async def _predict(self, request: models_pb2.PredictRequest) -> models_pb2.PredictResponse:
        answer: models_pb2.PredictResponse = await self._predictor.Predict(
            request, timeout=PATIENCE_S, metadata=self._metadata
        )
        return answer

    async def _initial_state(self, model: str, rows: int) -> Values:
        found = self._initial.get((model, rows))
        if found is None:
            request = pb.OpenSessionRequest(model=model, batch_size=rows)
            opened = (await self._call("OpenSession", request)).session.session_id
            answer = await self._call("GetState", pb.GetStateRequest(session_id=opened))
            found = self._initial[model, rows] = wire.arrays(answer.state)
        return found


@contextlib.contextmanager
def _taken(sessions: Sequence[Session]) -> Iterator[Sequence[Session]]:
    """Sessions that only this task uses meanwhile."""
    for one in sessions:
        one.is_taken = True
    try:
        yield sessions
    finally:
        for one in sessions:
            one.is_taken = False


def _where(task: asyncio.Task[None]) -> str:
    """The lines at which a task and the coroutines that it awaits are."""
    lines: list[str] = []
    at: Any = task.get_coro()
    while (frame := getattr(at, "cr_frame", None)) is not None:
        lines.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        at = at.cr_await
    return " > ".join(lines)


def _has_expired(session: Session, refusal: Refusal) -> bool:
    """Whether this is the end of a session that may expire, which is then opened again."""
    if not session.may_expire or refusal.reason != "SESSION_EXPIRED":
        return False
    session.ended()
    return True


class _Refused(Exception):
    def __init__(self, refusal: Refusal, request: Any) -> None:
        super().__init__(f"{refusal} of {type(request).__name__} {request}"[:2000])
        self.refusal = refusal


class _Stream:
    """A stream that many tasks use at the same time."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._waiting: dict[int, tuple[list[Any], asyncio.Future[list[Any]]]] = {}
        self._writing = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())

    async def exchange(self, number: int, frame: Any) -> list[Any]:
        done: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = ([], done)
        async with self._writing:
            await self._call.write(pb.StepStreamRequest(frame_id=number, step=frame))
        return await asyncio.wait_for(done, PATIENCE_S)

    async def end(self) -> None:
        await self._call.done_writing()
        await self._reader

    async def _read(self) -> None:
        async for part in self._call:
            parts, done = self._waiting[part.frame_id]
            parts.append(part)
            if part.last:
                del self._waiting[part.frame_id]
                done.set_result(parts)
