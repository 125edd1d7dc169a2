"""Single steps in compiled code and in numpy: one table of cases, with the same answers, sessions and records after it."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import grpc.aio
import numpy as np
import pytest

from stepwell.v1 import sessions_pb2 as pb
from stepwell.v1 import sessions_pb2_grpc
from stepwell_server.addresses import Address
from stepwell_server.catalog.known_files import KnownFiles
from stepwell_server.clock import SystemClock
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.engine.api import SessionPolicy, StepBatch
from stepwell_server.engine.passes.compiled import CompiledSteps
from stepwell_server.engine.watches.events import Wanted
from stepwell_server.errors import Unavailable
from stepwell_server.metrics.observer import PrometheusObserver
from stepwell_server.program import Program
from stepwell_server.rpc.fronts.arrivals import LARGE
from stepwell_server.rpc.fronts.base import StepColumns
from stepwell_server.rpc.server import RpcServer
from stepwell_server.rpc.steps.columns import ColumnSteps
from stepwell_server.store.disk import reserve
from stepwell_server.store.disk.wal import writers
from stepwell_server.store.record import HEADER, decode_header, is_sound
from support.engine.catalog_on_engine import FakeLoads, live_models
from support.engine.fake_executor import BAD, BROKEN, PLAIN, RICH, RINGS, with_windows
from support.engine.harness import STORES, FixedCost, Harness, running
from support.engine.versions import weights
from support.peers.wire import tensor
from support.rpc.no_figures import no_figures
from support.run_folder import memory_folder
from support.samples import examples
from support.servers.both_fronts import needs_native
from support.stores.durable import Disk, until

pytestmark = needs_native
IDS = ["a", "b", "c", "wide"]
STORE_KINDS = ("memory", "async", "sync", "sync_python")
LIMIT = 1 << 16
PATIENCE_S = 60.0
_Run = Callable[[ColumnSteps, StepBatch, Callable[[], StepColumns]], bool]
_COLUMNS = ("revision", "position", "request_id", "digest", "reply", "claimed", "used", "bytes")
_rng = np.random.default_rng(7)


def x(*shape: int) -> Any:
    return _rng.standard_normal((*shape, 2)).astype(np.float32)


def frame(ids: Sequence[str], *arrays: Any, names: Sequence[str] = ("",), **fields: Any) -> pb.StepFrame:
    inputs = [tensor(array, name) for array, name in zip(arrays, names, strict=True)]
    return pb.StepFrame(session_ids=ids, inputs=inputs, **fields)


def rich(
    ids: Sequence[str], *, time: bool = False, order: Sequence[int] = (0, 1, 2), first: int = 1
) -> pb.StepFrame:
    count = len(ids)
    tensors = [x(count), _rng.integers(9, size=count, dtype=np.int32), _rng.random(count, np.float32)]
    if time:
        tensors[:2] = [tensors[0][:, None], tensors[1][:, None]]
    named = [("x", "token", "gain")[place] for place in order]
    return frame(
        ids, *[tensors[place] for place in order], names=named, request_ids=range(first, first + count)
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """Frames that are sent one after the other, and which of those that the front parses compiled code runs."""

    frames: Sequence[pb.StepFrame]
    compiled: Sequence[bool]
    model: str = "plain"


def sent_twice(*fields: dict[str, Any]) -> list[pb.StepFrame]:
    value = x(2)
    return [frame(["a", "b"], value, **own) for own in fields]


CASES = {
    "one session": Case([frame(["a"], x(1))], [True]),
    "sessions in any order": Case([frame(["c", "a", "b"], x(3)), frame(["b", "c"], x(2))], [True] * 2),
    "a named input": Case([frame(["a", "b"], x(2), names=["x"])], [True]),
    "a time axis": Case([frame(["a", "b"], x(2, 1), request_ids=[4, 5])], [True]),
    "the last time step": Case(
        [frame(["a", "b"], x(2, 1), outputs=pb.OUTPUT_SELECTION_LAST, request_ids=[4, 5])], [True]
    ),
    "no outputs": Case(
        [frame(["a", "b"], x(2), outputs=pb.OUTPUT_SELECTION_NONE, request_ids=[4, 5])], [True]
    ),
    "all outputs": Case(
        [frame(["a", "b"], x(2), outputs=pb.OUTPUT_SELECTION_ALL, request_ids=[4, 5])], [True]
    ),
    "revisions and request ids": Case(
        [
            frame(["a", "b"], x(2), expected_revisions=[turn, turn], request_ids=[turn + 1, turn + 9])
            for turn in range(3)
        ],
        [True] * 3,
    ),
    "rows of their own": Case([frame(["a", "b"], x(2), batch_sizes=[1, 1])], [True]),
    "several inputs": Case(
        [rich(["a", "b"]), rich(["c"]), rich(["c", "b"], time=True, first=7)], [True] * 3, "rich"
    ),
    "rings": Case(
        [frame(list(ids), x(len(ids))) for ids in ["a", "ab", "cab", "b"] * 5],
        [True] * 20,
        "rings",
    ),
    "rings after time steps": Case(
        [frame(["a", "b"], x(2, 9)), frame(["a", "c"], x(2)), frame(["b"], x(1)), frame(["a"], x(1))],
        [False, False, False, True],
        "rings",
    ),
    "inputs in another order": Case([rich(["a", "b", "c"], order=(2, 0, 1))], [True], "rich"),
    "a missing input": Case([rich(["a", "b"], order=(0, 1))], [False], "rich"),
    "a retry": Case(sent_twice(*[{"expected_revisions": [0, 0], "request_ids": [4, 5]}] * 2), [True, False]),
    "a retry without a revision": Case(sent_twice(*[{"request_ids": [4, 5]}] * 2), [True, False]),
    "a request id with other content": Case(
        [frame(["a", "b"], x(2), expected_revisions=[0, 0], request_ids=[4, 5]) for _ in range(2)],
        [True, False],
    ),
    "a conflict": Case([frame(["a", "b"], x(2), expected_revisions=[0, 7])], [False]),
    "a revision that no session has": Case([frame(["a", "b"], x(2), expected_revisions=[2**64 - 1, 0])], []),
    "an unknown session": Case([frame(["a", "nobody"], x(2))], [False]),
    "a session twice": Case([frame(["a", "b", "a"], x(3))], [False]),
    "a session of several rows": Case([frame(["a", "wide"], x(3), batch_sizes=[1, 2])], [False]),
    "sizes that are wrong": Case([frame(["a", "b"], x(3), batch_sizes=[1, 2])], [False]),
    "sessions of two models": Case([frame(["a", "other"], x(2))], [False]),
    "time steps": Case([frame(["a", "b"], x(2, 3))], [False]),
    "steps after time steps": Case(
        [
            frame(["a", "b"], x(2, 3)),
            frame(["c"], x(1)),
            frame(["a"], x(1)),
            frame(["a"], x(1)),
            frame(["b"], x(1)),
        ],
        [False, True, False, True, False],
    ),
    "names of outputs": Case([frame(["a", "b"], x(2), output_names=["y"])], [False]),
    "an unknown output": Case([frame(["a", "b"], x(2), output_names=["z"])], [False]),
    "states": Case([frame(["a", "b"], x(2), states=pb.STATE_SELECTION_LAST)], []),
    "NaN": Case([frame(["a", "b"], np.array([[1, 2], [1, np.nan]], np.float32))], [False]),
    "another dtype": Case([frame(["a", "b"], x(2).astype(np.float64))], [False]),
    "another name": Case([frame(["a", "b"], x(2), names=["z"])], [False]),
    "another shape": Case([frame(["a", "b"], _rng.random((2, 3), np.float32))], [False]),
    "an input that the program refuses": Case(
        [frame(["a", "b"], np.array([[BAD, 0], [1, 1]], np.float32)), frame(["a"], x(1))], [False, True]
    ),
    "an input that breaks the program": Case(
        [frame(["a"], np.array([[BROKEN, 0]], np.float32)), frame(["a"], x(1))], [False, True]
    ),
}


@pytest.fixture(params=STORE_KINDS)
def store_kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kind of the stores that `running` makes; with `sync_python` a thread of Python writes the log."""
    with (
        tempfile.TemporaryDirectory(dir=memory_folder()) as folder,
        mock.patch.object(reserve, "RESERVE_BYTES", 1 << 16),
        mock.patch.multiple(STORES, kind=request.param.partition("_")[0], folder=Path(folder)),
        mock.patch.object(writers, "NATIVE", None if request.param == "sync_python" else writers.NATIVE),
    ):
        yield request.param


@asynccontextmanager
async def served(store: Any = None, plain: Program = PLAIN) -> AsyncIterator[tuple[Harness, Any]]:
    """An engine behind a native front, and a stub of the service."""
    from stepwell_server.rpc.fronts.native import NativeFront

    observer = PrometheusObserver()
    second = dataclasses.replace(PLAIN, fingerprint="second")
    programs = {"plain": plain, "rich": RICH, "rings": RINGS, "second": second}
    async with running(programs, observer=observer, store=store) as at:
        server = RpcServer(
            NativeFront(SystemClock(), FrontLimits(LIMIT)),
            clock=at.clock,
            observer=observer,
            max_message_bytes=LIMIT,
        )
        address = await server.start(Address("127.0.0.1", 0))
        models = live_models(at.engine, at.clock, FakeLoads())
        server.serve(at.engine, models, known_files=KnownFiles(at.engine, {}, None), figures=no_figures())
        async with grpc.aio.insecure_channel(str(address)) as channel:
            yield at, sessions_pb2_grpc.SessionServiceStub(channel)
        await server.close()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether compiled code ran each batch."""
    return spied(monkeypatch, ColumnSteps.run)


def spied(patch: pytest.MonkeyPatch, run: _Run) -> list[bool]:
    found: list[bool] = []

    def spy(self: ColumnSteps, batch: StepBatch, columns: Callable[[], StepColumns]) -> bool:
        found.append(run(self, batch, columns))
        return found[-1]

    patch.setattr(ColumnSteps, "run", spy)
    return found


async def played(case: Case) -> tuple[list[bytes], list[Any]]:
    """The answers to a case, and its sessions afterwards."""
    async with served() as (at, stub):
        await at.open("a", model=case.model)
        await at.open("b", model=f"{case.model}@1")  # pinned: it does not move to other versions
        await at.open("c", model=case.model)
        await at.engine.close_session("c", request_id=77)
        await at.open("c", model=case.model)  # its record has a field of its own
        await at.open("wide", model=case.model, batch_size=2)
        await at.open("other", model="second")
        stream = stub.StepStream()
        answers = []
        for number, step in enumerate(case.frames, 1):
            await stream.write(pb.StepStreamRequest(frame_id=number, step=step))
            parts: list[Any] = []
            while not (parts and parts[-1].last):
                parts.append(await stream.read())
            for part in parts:
                for failure in part.errors:  # an internal error has a random id
                    failure.error.metadata.pop("error_id", None)
                    failure.error.message = re.sub(
                        r"internal error \w+", "internal error", failure.error.message
                    )
                answers.append(part.SerializeToString(deterministic=True))
        await stream.done_writing()
        table = at.internals.table
        handles = table.find_all([*IDS, "other"])
        columns = [getattr(table, name)[handles].tolist() for name in _COLUMNS]
        states = [await at.state(name) for name in [*IDS, "other"]]
        records = [] if STORES.kind == "memory" else [stored(at.store, name) for name in IDS]
        return answers, [
            *columns,
            *[[array.tobytes() for array in state.values()] for state in states],
            *records,
        ]


def stored(store: Any, session_id: str) -> bytes:
    """The record of a session without what is random."""
    record = store.get(session_id)
    assert is_sound(session_id, record)
    head = np.frombuffer(record[: HEADER.itemsize], HEADER).copy()
    head["checksum"] = head["opened_with"] = 0
    return head.tobytes() + bytes(record[HEADER.itemsize :])


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
async def test_compiled_code_and_numpy_agree(
    case: Case, store_kind: str, runs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = await played(case)
    assert runs == list(case.compiled)
    spied(monkeypatch, lambda _self, _batch, _columns: False)
    assert compiled == await played(case)


def large_frames() -> list[pb.StepFrame]:
    """Steps of a group, then of the same sessions in another order, and one that names a session twice."""
    names = [f"s{number}" for number in range(LARGE)]
    shuffled = [str(name) for name in _rng.permutation(names)]
    count = len(names)
    return [
        frame(names, x(count)),
        frame(names, x(count), request_ids=range(1, count + 1), expected_revisions=[1] * count),
        frame(shuffled, x(count)),
        frame([*shuffled[1:], shuffled[1]], x(count)),
    ]


async def group_played(frames: Sequence[pb.StepFrame]) -> tuple[list[bytes], list[bytes]]:
    """The answers to frames of a large group, and the states of its sessions afterwards."""
    async with served() as (at, stub):
        names = list(frames[0].session_ids)
        await at.open(*names)
        stream = stub.StepStream()
        answers = list[bytes]()
        for number, step in enumerate(frames, 1):
            await stream.write(pb.StepStreamRequest(frame_id=number, step=step))
            while not (part := await stream.read()).last:
                answers.append(part.SerializeToString(deterministic=True))
            answers.append(part.SerializeToString(deterministic=True))
        await stream.done_writing()
        states = [array.tobytes() for name in names for array in (await at.state(name)).values()]
        if STORES.kind != "memory":
            states += [stored(at.store, name) for name in names]
        return answers, states


async def test_a_large_group_runs_in_compiled_code(
    store_kind: str, runs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = large_frames()
    compiled = await group_played(frames)
    assert runs == [True, True, True, False]
    spied(monkeypatch, lambda _self, _batch, _columns: False)
    assert compiled == await group_played(frames)


async def test_a_longer_frame_runs_at_once_while_nobody_else_is_active(runs: list[bool]) -> None:
    async with served() as (at, stub):
        await at.open("a", "b", "c", "d")
        stream = stub.StepStream()

        async def sent(seconds: float) -> None:
            for model in at.internals.models:
                model.cost = FixedCost(seconds, 2)
            await stream.write(pb.StepStreamRequest(frame_id=1, step=frame(["a", "b"], x(2))))
            assert not (await stream.read()).errors

        at.clock.advance(1)
        await sent(0.7e-3)
        await sent(0.9e-3)
        assert runs == [True, False], "beyond 0.8 ms a pass on threads is faster"
        at.clock.advance(1)
        await sent(0.3e-3)
        await at.submit(["c", "d"], x=x(2), connection="another").all()
        await sent(0.7e-3)
        assert runs[2:] == [True, False], "another one would wait for it"
        await sent(0.3e-3)
        assert runs[4:] == [True]
        await stream.done_writing()


def random_frames(seed: int) -> list[pb.StepFrame]:
    """Steps of some sessions, of which some repeat an earlier frame, conflict, or are not plain."""
    rng = np.random.default_rng(seed)
    frames: list[pb.StepFrame] = []
    for number in range(12):
        if frames and rng.random() < 0.2:
            frames.append(frames[rng.integers(len(frames))])
            continue
        ids = list(rng.permutation(["a", "b", "c"])[: rng.integers(1, 4)])
        times = [(), (), (1,), (3,)][rng.integers(4)] if number else ()
        value = rng.standard_normal((len(ids), *times, 2)).astype(np.float32)
        if number and rng.random() < 0.1:
            value.flat[rng.integers(value.size)] = rng.choice([np.nan, np.inf])
        fields: dict[str, Any] = {"outputs": int(rng.integers(4))}
        if rng.random() < 0.6:
            fields["request_ids"] = [number * 10 + place + 1 for place in range(len(ids))]
        if rng.random() < 0.3:
            fields["expected_revisions"] = rng.integers(number + 1, size=len(ids)).tolist()
        frames.append(frame(ids, value, **fields))
    return frames


@pytest.mark.parametrize(
    ("seed", "store_kind"),
    [(seed, STORE_KINDS[seed % len(STORE_KINDS)]) for seed in range(examples(200))],
    indirect=["store_kind"],
)
async def test_compiled_code_and_numpy_agree_on_random_frames(
    seed: int, store_kind: str, runs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(random_frames(seed), [])
    compiled = await played(case)
    assert any(runs)
    spied(monkeypatch, lambda _self, _batch, _columns: False)
    assert compiled == await played(case)


async def test_a_retry_gets_the_outputs_that_compiled_code_kept(runs: list[bool]) -> None:
    step = frame(["a", "b"], x(2), expected_revisions=[0, 0], request_ids=[4, 5])
    answers, _ = await played(Case([step, step], []))
    first, again = [pb.StepStreamResponse.FromString(answer) for answer in answers]
    assert again.outputs == first.outputs
    assert list(again.replayed_members) == [0, 1]
    assert runs == [True, False]


async def test_a_session_that_waits_or_is_paged_out_is_declined(runs: list[bool]) -> None:
    async with served() as (at, stub):
        await at.open(*IDS[:2])
        at.internals.page_out("a")
        request = pb.StepRequest(session_id="a", inputs=[tensor(x(1))])
        assert (await stub.Step(request)).revision == 1
        assert runs == [False]
        assert (await stub.Step(request)).revision == 2
        assert runs == [False, True]


@pytest.mark.parametrize("are_rings", [False, True])
async def test_versions_that_share_rows_with_rings_are_declined_where_whole_windows_are_copied(
    are_rings: bool, runs: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = [with_windows(are_rings=each) for each in (are_rings, not are_rings)]
    async with served(plain=first) as (at, stub):
        await at.engine.load_version("plain", 2, dataclasses.replace(second, fingerprint="f-later"))
        one, two = [model for model in at.internals.models if model.name == "plain"]
        assert one.arena is two.arena
        for version in (1, 2):
            await at.open(f"v{version}", model=f"plain@{version}")
        for step in range(9):
            value = tensor(x(1))
            answers = [
                await stub.Step(pb.StepRequest(session_id=f"v{version}", inputs=[value]))
                for version in (1, 2)
            ]
            assert [answer.revision for answer in answers] == [step + 1] * 2
            assert answers[0].outputs == answers[1].outputs
    assert runs == [True, False] * 9
    assert "raised" not in caplog.text


async def test_the_columns_of_a_longer_table_are_used(
    runs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served() as (at, stub):
        await at.open("a")
        request = pb.StepRequest(session_id="a", inputs=[tensor(x(1))])
        assert (await stub.Step(request)).revision == 1
        at.internals.table._grow()
        assert (await stub.Step(request)).revision == 2
        assert at.internals.table.revision[at.internals.handle("a")].tolist() == [2]
        assert runs == [True, True]


@pytest.mark.parametrize("broken", ["_attached", "_run"])
async def test_steps_whose_batch_raises_are_answered_by_a_pass(
    broken: str, runs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served() as (at, stub):
        await at.open("a")
        request = pb.StepRequest(session_id="a", inputs=[tensor(x(1))])
        with monkeypatch.context() as patch:
            patch.setattr(CompiledSteps, broken, raises)
            assert (await stub.Step(request, timeout=PATIENCE_S)).revision == 1
        assert (await stub.Step(request, timeout=PATIENCE_S)).revision == 2
        assert runs == [False, True]


def raises(*_: object) -> None:
    raise RuntimeError("planted")


async def test_sessions_that_moved_to_another_version_are_stepped(runs: list[bool]) -> None:
    async with served() as (at, stub):
        await at.open("a")
        await at.engine.load_version("plain", 2, weights(2), source="two.keras")
        await at.engine.set_default("plain", 2, SessionPolicy.CARRY)
        request = pb.StepRequest(session_id="a", inputs=[tensor(x(1))])
        answers = [await stub.Step(request) for _ in range(2)]
        assert [(answer.revision, answer.model_version) for answer in answers] == [(1, 2), (2, 2)]
        assert runs == [True, True]


@pytest.fixture
def disk(store_kind: str) -> Iterator[Disk]:
    """A data directory whose store fails and stalls when the test wants."""
    assert store_kind != "memory"
    found = Disk()
    yield found
    found.close()


@pytest.mark.parametrize("store_kind", STORE_KINDS[1:], indirect=True)
async def test_a_step_is_answered_when_the_store_has_it(disk: Disk, runs: list[bool]) -> None:
    async with served(disk.store) as (at, stub):
        await at.open(*IDS[:2])
        watch = at.engine.watch_sessions(["a"], Wanted(inputs=True, outputs=True, states=True), "me")
        assert len(await watch.next()) == 1
        disk.store.stall()
        request = pb.StepRequest(session_id="a", inputs=[tensor(x(1))])
        first = asyncio.ensure_future(stub.Step(request))
        await disk.store.stalled()
        table, handle = at.internals.table, at.internals.handle("a")
        assert table.claimed[handle].all()
        assert not table.revision[handle].any(), "nobody sees it before"
        second = asyncio.ensure_future(stub.Step(request))
        await until(lambda: at.internals.turns)  # it waits for the session
        table._grow()
        assert not first.done()
        disk.store.release()
        assert [(await first).revision, (await second).revision] == [1, 2]
        seen = await watch.next()
        assert [event.revision for event in seen] == [1, 2]
        assert [event.inputs["x"].tobytes() for event in seen] == [request.inputs[0].data] * 2
        at.engine.end_watch(watch)
        assert runs == [True, False]
        header = decode_header("a", await disk.record("a") or b"")
        assert (header.revision, header.position) == (2, 2)


@pytest.mark.parametrize("store_kind", ["sync"], indirect=True)
async def test_the_thread_that_wrote_the_log_answers(store_kind: str, runs: list[bool]) -> None:
    """The event loop may notice the end of the write later, but before it reads what is sent after the answer."""
    assert store_kind == "sync"
    request = pb.StepRequest(session_id="a", inputs=[tensor(x(1))])
    async with served() as (at, stub):
        await at.open("a")
        with mock.patch.object(writers.NativeWriter, "take", return_value=None):
            assert (await stub.Step(request, timeout=PATIENCE_S)).revision == 1
            assert not at.internals.table.revision[at.internals.handle("a")].any()
        assert (await stub.Step(request, timeout=PATIENCE_S)).revision == 2
        assert runs == [True, True]


@pytest.mark.parametrize("store_kind", STORE_KINDS[1:], indirect=True)
async def test_a_step_that_the_store_could_not_keep_changes_nothing(disk: Disk, runs: list[bool]) -> None:
    async with served(disk.store) as (at, stub):
        await at.open(*IDS[:2])
        stream = stub.StepStream()
        request = frame(["a", "b"], x(2), expected_revisions=[0, 0], request_ids=[4, 5])
        disk.store.fail(Unavailable("the disk is full"))
        await stream.write(pb.StepStreamRequest(frame_id=1, step=request))
        (failure,) = (await stream.read()).errors
        assert (list(failure.members), failure.error.message) == ([], "the disk is full")
        assert "a" not in at.internals.table, "the store is the truth"
        await stream.write(pb.StepStreamRequest(frame_id=2, step=request))
        reply = await stream.read()
        assert list(reply.revisions) == [1, 1]
        await stream.done_writing()
        disk.store.fail(Unavailable("the disk is full"))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.Step(pb.StepRequest(session_id="a", inputs=[tensor(x(1))]))
        assert (failed.value.code(), failed.value.details()) == (
            grpc.StatusCode.UNAVAILABLE,
            "the disk is full",
        )
        assert runs == [True, False, True]
