"""Triton's requests that a front passes as columns: which run together, which run alone, and their answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from stepwell_server.addresses import Address
from stepwell_server.catalog.known_files import KnownFiles
from stepwell_server.core.callers import ANYBODY, Caller, Role
from stepwell_server.engine.api import SessionPolicy
from stepwell_server.engine.change import Change
from stepwell_server.engine.types import Members
from stepwell_server.errors import Overloaded, ServerError, SessionNotFound
from stepwell_server.rpc import tenancy
from stepwell_server.rpc.fronts.base import Ended, InputColumn, OutputColumn, StepColumns, Steps
from stepwell_server.rpc.server import RpcServer
from stepwell_server.rpc.status import Status, code_of, message_of
from stepwell_server.rpc.steps.columns import ColumnSteps
from stepwell_server.rpc.tracing import CallTrace
from stepwell_server.rpc.triton.columns import ColumnInference
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.sequences import session_id_of
from support.engine.catalog_on_engine import FakeLoads, live_models
from support.engine.fake_executor import PLAIN, RICH
from support.engine.versions import WIDE, serving, weights
from support.rpc import calls
from support.rpc.fake_call import Requests
from support.rpc.no_figures import no_figures
from support.triton.triton_requests import Client, inference

FLOAT32, INT32 = 1, 7
DATATYPES = {FLOAT32: "FP32", INT32: "INT32"}
#: No message of a stream has ended.
_NO_TIMES = np.zeros(0)


class Batch:
    """What became of each request. `ColumnReplies`; all of them are calls."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.replayed: list[int] = []
        self.done: dict[int, Any] = {}
        """The revision, or the status and what a stream is told."""
        self.versions: dict[int, int] = {}
        """Of those that were done."""
        self.outputs: list[OutputColumn] = []
        self.requests: list[bytes] = []
        self.alone: list[int] = []
        """Those that were asked for as they came."""
        self.gone_members: list[int] = []

    def applied(
        self,
        members: Members | None,
        revisions: Any,
        positions: Any,
        outputs: Sequence[OutputColumn],
        *,
        replayed: bool,
        model_version: int,
    ) -> Ended:
        self.replayed += self._members(members) if replayed else []
        self.outputs.extend(outputs)
        for member, revision in zip(self._members(members), revisions.tolist(), strict=True):
            self._put(member, revision)
            self.versions[member] = model_version
        return Ended(np.zeros(len(positions)), _NO_TIMES)

    def failed(self, members: Members | None, status: Status, error: bytes) -> Ended:
        for member in self._members(members):
            self._put(member, (status.code.name, error.decode()))
        return Ended(np.zeros(len(self._members(members))), _NO_TIMES)

    def request(self, member: int) -> bytes:
        assert member not in self.done
        self.alone.append(member)
        return self.requests[member]

    def untraced(self) -> Sequence[int]:
        return ()

    def gone(self) -> Members:
        return np.array(self.gone_members, np.intp)

    def _put(self, member: int, what: object) -> None:
        assert member not in self.done
        self.done[member] = what

    def _members(self, members: Members | None) -> list[int]:
        return list(range(self._count)) if members is None else members.tolist()


class Traces:
    """Traces every message, and notes how each ended. `Tracer`, and `CallTrace`."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, str, object]] = []

    def of_call(self, method: str, metadata: Mapping[str, str | bytes]) -> None:
        raise AssertionError("no call is made")

    def of_frame(self, method: str, traceparent: str) -> None:
        raise AssertionError("no frame is sent")

    def of_messages(self, method: str, count: int) -> Mapping[int, CallTrace]:
        return dict.fromkeys(range(count), self)

    def stage(self, name: str, began: float, ended: float) -> None:
        """It was in a stage."""

    def ran(self, *_: object) -> None:
        """It was in a pass."""

    def end(self, code: str, reason: str, facts: Mapping[str, str | int]) -> None:
        self.ended.append((code, reason, facts["session.id"]))


class Front:
    """Hands over requests of sequences of a model."""

    def __init__(self, client: Client, tracer: Traces | None = None) -> None:
        self.client = client
        self.observer = Requests()
        at = client.harness
        self.steps: Steps = ColumnSteps(
            at.engine,
            at.clock,
            1 << 20,
            self.observer,
            ColumnInference(client.inference).wire,
            tracer,
        )
        self.changes: list[Change] = []
        submit = at.engine.submit

        def counted(change: Change) -> Members:
            self.changes.append(change)
            return submit(change)

        at.engine.submit = counted

    async def begin(self, *ids: int, model: str = "plain", rows: int = 1) -> None:
        """START each."""
        for one in ids:
            await self.client.infer(np.ones((rows, 2), np.float32), model=model, sequence_id=one, start=True)
        self.changes.clear()

    def take(
        self,
        *ids: int,
        model: tuple[str, str] = ("plain", ""),
        sizes: Sequence[int] = (),
        inputs: Sequence[InputColumn] = (),
        outputs: Sequence[str] = (),
        batch: Batch | None = None,
        **columns: Any,
    ) -> Batch:
        """A step of each sequence."""
        batch = batch or Batch(len(ids))
        x = np.ones((sum(sizes) or len(ids), 2), np.float32)
        inputs = inputs or [InputColumn("x", FLOAT32, (2,), x.tobytes())]
        rows = np.array(sizes or [1] * len(ids), np.uint32)
        for place, one in enumerate(ids):
            asked = pb.ModelInferRequest(model_name=model[0], model_version=model[1], id=f"r{place}")
            asked.parameters["sequence_id"].int64_param = one
            for name, numbers in (("revision", "expected"), ("request_id", "request_ids")):
                if numbers in columns:
                    asked.parameters[f"stepwell_{name}"].uint64_param = int(columns[numbers][place])
            asked.outputs.extend(
                pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs
            )
            for column in inputs:
                size = len(column.data) // int(rows.sum())
                start, end = size * int(rows[:place].sum()), size * int(rows[: place + 1].sum())
                shape = [int(rows[place]), *column.tail]
                asked.inputs.add(name=column.name, datatype=DATATYPES[column.dtype], shape=shape)
                asked.raw_input_contents.append(column.data[start:end])
            batch.requests.append(asked.SerializeToString())
        self.steps.take(
            StepColumns(
                [tenancy.internal_id(self.client.who, session_id_of(model[0], one)) for one in ids],
                [f"caller of {one}" for one in ids],
                [self.client.who],
                rows,
                False,
                columns.get("expected"),
                columns.get("request_ids"),
                np.array(columns.get("deadlines", [np.inf] * len(ids))),
                0,
                outputs,
                inputs,
                np.ones(len(ids), np.uint32),
                batch,
                model,
            )
        )
        return batch

    async def settled(self) -> None:
        """Return when all that was taken has its answer."""
        await self.client.inference.wait_idle()
        await self.client.harness.settled()

    async def refusal(self, request: bytes) -> tuple[str, str]:
        """How a call of this request is refused, which no front has read: code and message."""
        with pytest.raises(ServerError) as refused:
            await self.client.send(pb.ModelInferRequest.FromString(request))
        return code_of(refused.value).name, message_of(refused.value)

    def statistics(self) -> pb.InferStatistics:
        return self.client.inference.models.find("plain", "").statistics.message().inference_stats


@asynccontextmanager
async def front(**options: Any) -> AsyncIterator[Front]:
    async with inference(**options) as client:
        yield Front(client)


@pytest.fixture
async def at() -> AsyncIterator[Front]:
    async with front() as found:
        yield found


async def test_steps_of_running_sequences_are_one_change(at: Front) -> None:
    await at.begin(*range(1, 13))
    before = at.statistics()
    batch = at.take(*range(1, 13))
    await at.client.harness.settled()
    assert [change.size for change in at.changes] == [12]
    assert batch.done == dict.fromkeys(range(12), 2)
    assert not batch.alone
    assert at.observer.done == [("ModelInfer", "OK")] * 12
    assert at.statistics().success.count - before.success.count == 12
    alone = at.take(3)
    await at.client.harness.settled()
    assert alone.done == {0: 3}


@pytest.mark.parametrize("why", ["no session", "not begun", "reset", "another model", "other rows"])
async def test_requests_that_do_not_fit_their_sequence_are_answered_like_calls(why: str) -> None:
    """The others are still one change."""
    async with front(programs={"plain": PLAIN, "other": PLAIN}) as at:
        engine, harness = at.client.harness.engine, at.client.harness
        await at.begin(1, 2, 4)
        if why == "not begun":
            await engine.open_session("plain", session_id="triton/plain/3")
        elif why == "reset":
            await at.begin(3)
            await harness.submit("triton/plain/3", reset=True).only()
        elif why == "another model":
            await engine.open_session("other", session_id="triton/plain/3")
            await harness.step("triton/plain/3", np.ones((1, 2), np.float32))
        elif why == "other rows":
            await at.begin(3, rows=2)
        at.changes.clear()
        for ids in ([1, 3, 2, 3, 1, 4], [3, 1], [3]):
            batch = at.take(*ids)
            await at.settled()
            threes = [place for place, one in enumerate(ids) if one == 3]
            assert batch.alone == threes
            assert sorted(batch.done) == list(range(len(ids)))
            for place in threes:
                assert batch.done[place] == await at.refusal(batch.requests[place])
        assert [change.size for change in at.changes if change.size > 1] == [6, 2]
        assert at.observer.refusals == {"INVALID_INPUT": 4}


async def test_requests_wait_for_another_one_of_their_sequence_and_keep_their_order(at: Front) -> None:
    """As behind a START that is not answered: those of other sequences do not wait."""
    await at.begin(1, 2, 3)
    running = at.client.inference.sequences.enter("triton/plain/3")
    first, second = at.take(1, 3, 2, 3), at.take(3, 1)
    await at.client.harness.settled()
    assert (first.done, second.done) == ({0: 2, 2: 2}, {1: 3})
    idle = asyncio.create_task(at.client.inference.wait_idle())
    await asyncio.sleep(0)
    assert not idle.done()
    running.leave()
    await idle
    assert (first.done, second.done) == ({0: 2, 1: 2, 2: 2, 3: 3}, {0: 4, 1: 3})
    assert [output.name for output in second.outputs] == ["y", "y"]
    assert at.observer.done == [("ModelInfer", "OK")] * 6
    statistics = at.statistics()
    assert (statistics.success.count, statistics.fail.count) == (3 + 6, 0)


async def test_a_request_of_a_gone_client_is_not_served_when_it_is_next(at: Front) -> None:
    await at.begin(1)
    running = at.client.inference.sequences.enter("triton/plain/1")
    batch = at.take(1, 1)
    batch.gone_members = [0]
    running.leave()
    await at.settled()
    assert batch.done == {1: 2}


async def test_a_server_that_stops_answers_requests_that_are_served_alone() -> None:
    async with inference() as client:
        engine, clock, silent = client.harness.engine, client.harness.clock, calls.Front()
        server = RpcServer(silent, clock=clock, observer=calls.Observer(), max_message_bytes=1 << 20)
        await server.start(Address("", 0))
        live = live_models(engine, clock, FakeLoads())
        server.serve(engine, live, known_files=KnownFiles(engine, {}, None), figures=no_figures())
        at = Front(client)
        at.steps = silent.steps
        batch = at.take(9)
        await server.finish()
        assert batch.done == {0: await at.refusal(batch.requests[0])}
        await live.close()


async def test_the_trace_of_each_request_ends_with_its_answer() -> None:
    async with inference() as client:
        traces = Traces()
        at = Front(client, traces)
        await at.begin(1, 2)
        at.take(1, 9, 2, inputs=[InputColumn("x", FLOAT32, (2,), np.ones(6, np.float32).tobytes())])
        await at.settled()
        assert sorted(traces.ended) == [
            ("INVALID_ARGUMENT", "INVALID_INPUT", "triton/plain/9"),
            ("OK", "", "triton/plain/1"),
            ("OK", "", "triton/plain/2"),
        ]


async def test_a_request_with_wrong_rows_keeps_its_place_in_the_sequence(at: Front) -> None:
    await at.begin(1, 2)
    batch = at.take(1, 2, 1, sizes=[2, 1, 1])
    await at.settled()
    assert batch.alone == [0, 2]
    assert (batch.done[1], batch.done[2]) == (2, 2)
    assert "must specify batch-size 1" in batch.done[0][1]
    many = at.take(1, 2, sizes=[1025, 1])
    await at.settled()
    assert many.done == {0: await at.refusal(many.requests[0]), 1: 3}
    assert "batch-size must be <= 1024" in many.done[0][1]


async def test_late_requests_and_repeated_ends_get_their_own_answers(at: Front) -> None:
    await at.begin(1, 2, 3)
    now = at.client.harness.clock.monotonic()
    late = at.take(1, 2, 3, deadlines=[np.inf, now, np.inf])
    await at.settled()
    assert (late.done[0], late.done[2]) == (2, 2)
    assert late.done[1][0] == "UNAVAILABLE"
    assert late.done[1][1].startswith("Request timeout expired: ")
    numbers = {"stepwell_revision": 2, "stepwell_request_id": 7}
    await at.client.infer(np.ones((1, 2), np.float32), sequence_id=1, end=True, **numbers)
    expected, request_ids = np.full(2, 2, np.uint64), np.array([7, 8], np.uint64)
    known = at.take(1, 3, expected=expected, request_ids=request_ids)
    await at.settled()
    assert (known.done, known.alone, known.replayed) == ({0: 3, 1: 3}, [0], [0])


@pytest.mark.parametrize(
    "said",
    [
        {"model": ("nothing", "")},
        {"model": ("plain", "2")},
        {"outputs": ["q"]},
        {"outputs": ["y", "y"]},
        {"inputs": [InputColumn("x", INT32, (2,), bytes(8))]},
        {"inputs": [InputColumn("q", FLOAT32, (2,), bytes(8))]},
        {"inputs": [InputColumn("x", FLOAT32, (3,), bytes(12))]},
        {"inputs": [InputColumn("x", FLOAT32, (1, 1, 2), bytes(8))]},
        {"inputs": [InputColumn("x", FLOAT32, (), bytes(4))]},
        {"inputs": [InputColumn(name, FLOAT32, (2,), bytes(8)) for name in ("x", "q")]},
    ],
)
async def test_requests_that_fit_no_model_are_answered_like_calls(at: Front, said: Any) -> None:
    await at.begin(1)
    batch = at.take(1, **said)
    await at.settled()
    assert batch.done == {0: await at.refusal(batch.requests[0])}
    assert not at.changes


async def test_only_requested_outputs_are_returned() -> None:
    """One number is a dimension of one."""
    async with front(programs={"rich": RICH}) as at:
        first = [
            ("x", np.ones((1, 2), np.float32)),
            ("token", np.ones((1, 1), np.int32)),
            ("gain", np.ones((1, 1), np.float32)),
        ]
        await at.client.infer(*first, model="rich", sequence_id=1, start=True)
        inputs = [
            InputColumn("gain", FLOAT32, (1,), np.ones(1, np.float32).tobytes()),
            InputColumn("x", FLOAT32, (3, 2), np.ones(6, np.float32).tobytes()),
            InputColumn("token", INT32, (3, 1), np.ones(3, np.int32).tobytes()),
        ]
        for outputs, shapes in (
            ((), [("y", (3, 2)), ("head", (3,))]),
            (("head", "y"), [("head", (3,)), ("y", (3, 2))]),
        ):
            batch = at.take(1, model=("rich", "1"), inputs=inputs, outputs=outputs)
            await at.client.harness.settled()
            assert [(output.name, tuple(output.tail)) for output in batch.outputs] == shapes


@pytest.mark.parametrize("who", [ANYBODY, Caller("ann", "acme", Role.USER)], ids=str)
async def test_each_failure_has_tritons_message(at: Front, who: Caller) -> None:
    at.client.who = who
    await at.begin(1, 2, 3)
    internals = at.client.harness.internals
    x = np.array([[1, 1], [1, np.nan], [1, 1]], np.float32)
    batch = at.take(1, 2, 3, inputs=[InputColumn("x", FLOAT32, (2,), x.tobytes())])
    name = tenancy.internal_id(who, "triton/plain/3")
    internals.turns.forget(int(internals.handle(name)[0]), SessionNotFound(name, "gone"))
    await at.client.harness.settled()
    assert batch.done[0] == 2
    assert batch.done[1][0] == batch.done[2][0] == "INVALID_ARGUMENT"
    assert "index [0, 1]" in batch.done[1][1]
    assert batch.done[2][1].startswith(
        "inference request for sequence 3 to model 'plain' must specify the START"
    )
    assert at.observer.refusals == {"INVALID_INPUT": 2}
    assert at.statistics().fail.count == 2


@pytest.mark.parametrize("who", [ANYBODY, Caller("ann", "acme", Role.USER)], ids=str)
async def test_overload_is_refused_as_triton_does(
    at: Front, monkeypatch: pytest.MonkeyPatch, who: Caller
) -> None:
    at.client.who = who
    await at.begin(1, 2)

    def full(change: Change) -> None:
        raise Overloaded(f"too much waits, of {min(change.session_ids)!r}", retry_after_s=1.0)

    monkeypatch.setattr(at.client.harness.engine, "submit", full)
    batch = at.take(1, 2)
    assert batch.done == {
        member: ("UNAVAILABLE", f"Exceeds maximum queue size: too much waits, of 'triton/plain/{one}'")
        for member, one in enumerate((1, 2))
    }


async def test_after_a_defect_no_call_waits(at: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    await at.begin(1, 2)

    def broken(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(at.client.harness.engine, "submit", broken)
    batch = at.take(1, 9, 2)
    assert {code for code, _ in batch.done.values()} == {"INTERNAL"}
    monkeypatch.setattr(at.client.inference.models, "find", broken)
    batch = at.take(1, 2)
    assert sorted(batch.done) == [0, 1]
    assert batch.done[0][1].startswith("internal error")


async def test_sequences_of_several_versions_are_answered_by_their_own() -> None:
    """Those that the tensors do not fit, or that are on another version than is asked for, go another way."""
    async with serving() as harness:
        at, engine = Front(Client(harness)), harness.engine
        await at.begin(1, 2)
        await engine.load_version("plain", 2, weights(2))
        await engine.set_default("plain", 2, SessionPolicy.KEEP)
        await at.begin(3, 4)
        for version, ran in (("", {1: 1, 2: 1, 3: 2, 4: 2}), ("1", {1: 1, 2: 1}), ("2", {3: 2, 4: 2})):
            batch = at.take(1, 3, 2, 4, model=("plain", version))
            await at.settled()
            found = {(1, 3, 2, 4)[member]: int(number) for member, number in batch.versions.items()}
            assert found == ran
            assert len(batch.alone) == 4 - len(ran)
        counts = [at.client.inference.models.find("plain", str(v)).statistics.message() for v in (1, 2)]
        assert [count.inference_stats.success.count for count in counts] == [2 + 2 + 2, 2 + 2 + 2]
        await engine.load_version("plain", 3, WIDE)
        await engine.set_default("plain", 3, SessionPolicy.KEEP)
        await at.begin(5)
        batch = at.take(1, 5, 3)
        await at.settled()
        assert (sorted(batch.alone), batch.versions) == ([0, 2], {0: 1, 1: 3, 2: 2})
        assert sorted(output.name for output in batch.outputs) == ["y", "y", "z"]
        for text in ("4", "x"):
            batch = at.take(1, model=("plain", text))
            await at.settled()
            assert batch.done == {0: await at.refusal(batch.requests[0])}


async def test_after_a_carry_replies_have_the_new_version() -> None:
    async with serving() as harness:
        at, engine = Front(Client(harness)), harness.engine
        await at.begin(1, 2)
        await engine.load_version("plain", 2, weights(2))
        assert at.take(1, 2).done == {}
        await harness.settled()
        await engine.set_default("plain", 2, SessionPolicy.CARRY)
        batch = at.take(1, 2)
        await harness.settled()
        assert batch.versions == {0: 2, 1: 2}
