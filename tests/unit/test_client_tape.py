"""Tapes without a server: growing arrays, marks, files, and tables. And what a tape does to a change that fails."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell import InvalidInputError, Tape
from stepwell._tape.frames import Frames, Members
from stepwell._tape.marks import Mark
from stepwell._tape.reel import Reel, Subject
from stepwell._tape.series import Series
from support.sdk.client_kinds import connect
from support.sdk.scripted_server import MODEL, Fault, ScriptedServer

SECOND = 1_000_000_000
LOST = Fault(after_work=True)
GAVE_UP = (stepwell.UnavailableError, stepwell.DeadlineExceededError)


def counts(*numbers: int) -> Any:
    return np.array(numbers, np.uint64)


def reel(members: int = 1, batch_size: int = 1, max_steps: int | None = None, states: Any = "all") -> Reel:
    zeros = np.zeros(members, np.uint64)
    subject = Subject(
        "forecast", "f" * 64, batch_size, members > 1, zeros, zeros, np.ones(members, np.uint64)
    )
    ticks = itertools.count(SECOND, SECOND)
    return Reel(subject, states, max_steps, lambda: next(ticks))


def frames(
    revision: int, position: int, count: int = 1, version: int = 1, units: int = 3, **others: Any
) -> Frames:
    """Time steps of a session of one row, with random values."""
    rng = np.random.default_rng()
    members = Members(
        None, counts(revision), counts(max(0, position - count)), counts(position), counts(version)
    )
    return Frames(
        **{
            "count": count,
            "members": members,
            "rows": None,
            "restarts": None,
            "inputs": {"x": rng.standard_normal((count, 1, 2)).astype(np.float32)},
            "outputs": {"y": rng.integers(0, 9, (count, 1))},
            "states": {"lstm/h": rng.standard_normal((count, 1, units)).astype(np.float32)},
            **others,
        }
    )


def recorded(count: int = 5) -> Tape:
    """A tape with everything that a file has to keep: marks, missing values, dropped time steps."""
    source = reel(max_steps=count)
    source.append(frames(1, 2, 2))
    source.mark("reset", None, Members(None, counts(2), counts(2), counts(0), counts(1)))
    source.append(frames(3, count, count, outputs={"y": np.ones((1, 1), np.int64)}))
    return Tape(source.content)


def same(one: Tape, other: Tape) -> bool:
    kinds = ("inputs", "outputs", "states")
    return all(
        list(a) == list(b)
        and all(a[name].tobytes() == b[name].tobytes() and a[name].dtype == b[name].dtype for name in a)
        for a, b in ((getattr(one, kind), getattr(other, kind)) for kind in kinds)
    ) and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("revisions", "positions", "times", "marks", "model", "fingerprint", "dropped", "stopped")
    )


# Growing.


def test_a_series_grows_and_its_views_stay() -> None:
    rng = np.random.default_rng()
    whole = rng.standard_normal((200, 2))
    series, views = Series(np.empty((0, 2))), []
    for i in range(200):
        series.append(whole[i : i + 1])
        if i >= 30:
            series.drop(1)
        views.append(series.values(min(i + 1, 30)))
    for i, view in enumerate(views):
        assert np.array_equal(view, whole[max(0, i - 29) : i + 1])
        assert not view.flags.writeable


def test_missing_values_are_nan_and_integers_become_floats_only_then() -> None:
    source = reel(batch_size=2)

    def add(revision: int, **others: Any) -> None:
        source.append(frames(revision, revision, inputs={}, **others))

    add(1, outputs={"token": np.array([[7, 8]])}, states={})
    tape = Tape(source.content)
    assert tape.outputs["token"].dtype == np.int64
    add(2, outputs={"late": np.array([[True, False]])}, states={})
    add(3, outputs={"token": np.array([[9]])}, rows=np.array([1]), states={})
    missing: Any = np.nan
    token, late = [[7, 8], [missing] * 2, [missing, 9]], [[missing] * 2, [1, 0], [missing] * 2]
    assert np.array_equal(tape.outputs["token"], np.array(token), equal_nan=True)
    assert np.array_equal(tape.outputs["late"], np.array(late), equal_nan=True)


def test_times_are_those_of_the_answers() -> None:
    source = reel()
    source.append(frames(1, 2, 2))
    source.append(frames(2, 3))
    assert Tape(source.content).times.astype("datetime64[s]").astype(int).tolist() == [1, 1, 2]


def test_marks_are_bounded_and_the_last_reset_of_a_row_counts() -> None:
    source = reel(batch_size=3)
    for revision in range(1, 1000):
        kind: Any = "set" if revision % 2 else "reset"
        members = Members(None, counts(revision), counts(0), counts(0), counts(1))
        source.mark(kind, np.array([revision % 3]), members)
    last = {revision % 3: revision for revision in range(1, 1000)}
    expected = {row: "set" if revision % 2 else "reset" for row, revision in last.items()}
    assert {row: mark.kind for mark in Tape(source.content).marks for row in mark.rows} == expected


def test_gaps_and_versions_are_marked() -> None:
    source = reel()
    source.append(frames(1, 1))
    source.append(frames(3, 7))
    source.append(frames(4, 8, version=2))
    source.append(frames(5, 9, version=0))
    source.append(frames(6, 10, version=2))
    assert Tape(source.content).marks == [Mark(1, "gap", (0,)), Mark(2, "version", (0,))]


def test_positions_restart_where_all_rows_restart() -> None:
    source = reel(batch_size=2)
    arrays: dict[str, Any] = {"inputs": {}, "outputs": {}, "states": {}}
    restarts = np.array([[1, 0], [0, 0], [1, 1], [0, 0], [1, 1], [0, 1]], bool)
    members = Members(None, counts(1), counts(10), counts(2), counts(1))
    source.append(frames(1, 2, 6, restarts=restarts, members=members, **arrays))
    one = np.ones((1, 1), bool)
    source.append(frames(2, 3, rows=np.array([1]), restarts=one, **arrays))
    tape = Tape(source.content)
    assert tape.positions.tolist() == [11, 12, 1, 2, 1, 2, 3]
    rows = {0: (0,), 2: (0, 1), 4: (0, 1), 5: (1,), 6: (1,)}
    assert [(mark.index, mark.rows) for mark in tape.marks] == list(rows.items())


@pytest.mark.parametrize("count", [1, 4])
def test_a_reset_by_a_new_version_is_marked_and_positions_begin_anew(count: int) -> None:
    source = reel()
    source.append(frames(1, 7, 7))
    moved = Members(None, counts(2), counts(7), counts(count), counts(2))
    source.append(frames(2, count, count, members=moved))
    tape = Tape(source.content)
    assert tape.positions.tolist() == [*range(1, 8), *range(1, count + 1)]
    assert tape.marks == [Mark(7, "reset", (0,)), Mark(7, "version", (0,))]


def test_a_model_of_another_shape_ends_the_recording() -> None:
    source = reel()
    source.append(frames(1, 2, 2))
    source.append(frames(2, 3, units=4, version=2))
    source.append(frames(3, 4, units=4))
    tape = Tape(source.content)
    assert len(tape) == 2
    assert tape.stopped == (
        "recording stopped after time step 2: states/lstm/h changed its shape from (3,) to (4,)"
    )


def test_a_step_succeeds_though_no_memory_is_left_for_the_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    source = reel()
    source.append(frames(1, 1))

    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Series, "append_part", full)
    source.append(frames(2, 2))
    tape = Tape(source.content)
    assert len(tape) == len(tape.positions) == len(tape.states["lstm/h"]) == 1
    assert tape.stopped == "recording stopped after time step 1: no memory was left"


def test_what_a_terminal_and_a_notebook_show() -> None:
    tape = recorded()
    assert repr(tape) == (
        "Tape(model='forecast', 5 time steps, dropped=2, 1 marks, {x: float32(1, 2), y: float64(1,), "
        "lstm/h: float32(1, 3)})"
    )
    assert "states/lstm/h" in tape._repr_html_()
    assert repr(Tape(reel().content)) == "Tape(model='forecast', 0 time steps, 0 marks, {})"


# Changes that fail: the same call again must be the same request, with a tape or without.


@pytest.mark.parametrize("shell", ["sync", "async without frames"])
@pytest.mark.parametrize("wanted", ["none", "last", "all"])
@pytest.mark.parametrize("recorded_first", [True, False])
async def test_the_same_call_completes_a_change_though_a_tape_ends_or_begins(
    shell: str, wanted: Any, recorded_first: bool
) -> None:
    x = np.random.default_rng().standard_normal((1, 3, 2)).astype(np.float32)
    with ScriptedServer() as server:
        async with connect(shell, server.address, timeout_s=100.0) as client:
            session = await client.open_session(MODEL)
            tapes = [contextlib.nullcontext(), session.record()]
            first, second = reversed(tapes) if recorded_first else tapes
            server.fail("Step", LOST, 1000)
            with pytest.raises(GAVE_UP), first:
                await lose(functools.partial(session.step, x, states=wanted), server)
            server.fail_no_more()
            with second as tape:
                result = await session.step(x, states=wanted)
            assert (server.applied, session.revision) == (1, 1)
            assert len({request.SerializeToString() for request in server.requests("Step")}) == 1
    whole = np.cumsum(x, axis=1)
    if wanted == "none":
        assert np.allclose(result, whole)
    else:
        assert np.allclose(result.states["sum"], whole if wanted == "all" else whole[:, -1])
        assert result.states.has_time == (wanted == "all")
    if not recorded_first:
        assert len(tape) == 3
        assert tape.marks == []
        assert list(tape.states) == ([] if wanted == "none" else ["sum", "count"])


async def test_a_call_that_completes_a_recorded_one_returns_what_it_asks_for_after_another_attempt() -> None:
    """The request asks for states, as the tape did. The call does not."""
    x = np.random.default_rng().standard_normal((1, 3, 2)).astype(np.float32)
    with ScriptedServer() as server:
        async with connect("async without frames", server.address, timeout_s=100.0) as client:
            session = await client.open_session(MODEL)
            server.fail("Step", LOST, 1000)
            with pytest.raises(GAVE_UP), session.record():
                await lose(functools.partial(session.step, x), server)
            server.fail_no_more()
            attempts = len(server.requests("Step"))
            server.fail("Step", LOST, 1)
            result = await session.step(x)
            assert len(server.requests("Step")) == attempts + 2
            assert (server.applied, session.revision) == (1, 1)
    assert np.allclose(result, np.cumsum(x, axis=1))


async def lose(call: Any, server: ScriptedServer) -> None:
    """Makes a call that is applied and gets no answer."""
    for limit_s in (0.2, 2.0, 20.0):  # a busy machine gets more time
        try:
            await call(timeout_s=limit_s)
        except GAVE_UP as error:
            if server.applied and error.outcome == "unknown":
                raise


# Files.


def test_a_saved_tape_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    for tape in (recorded(), recorded()[2:4], Tape(reel().content)):
        tape.save(path)
        again = Tape.load(path)
        assert same(again, tape)
        assert again.batch_size == tape.batch_size
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_pickles_and_copies_have_the_tape_as_it_is() -> None:
    for tape in (recorded(), recorded()[2:4]):
        for again in (pickle.loads(pickle.dumps(tape)), copy.deepcopy(tape)):  # noqa: S301
            assert same(again, tape)
            assert again.batch_size == tape.batch_size


def test_a_saved_tape_of_a_group_is_the_same(tmp_path: Path) -> None:
    source = reel(members=2)
    states = {"lstm/h": np.random.default_rng().standard_normal((1, 1, 3))}
    members = Members(np.array([1]), counts(1), counts(0), counts(1), counts(1))
    source.append(frames(1, 1, members=members, rows=np.array([1]), states=states, inputs={}, outputs={}))
    tape = Tape(source.content)
    tape.save(tmp_path / "run.safetensors")
    again = Tape.load(tmp_path / "run.safetensors")
    assert same(again, tape)
    assert again.revisions.tolist() == [[0, 1]]


def saved(path: Path, **changes: Any) -> Path:
    """A file in which something of a saved tape is other."""
    from safetensors import numpy as safetensors_numpy
    from safetensors import safe_open

    recorded().save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for key, value in changes.items():
        where: dict[str, Any] = tensors if isinstance(value, np.ndarray) else metadata
        where[key] = value
    metadata["names"] = json.dumps(list(tensors))
    metadata = {
        key: value
        for key, value in metadata.items()
        if key != "sha256" and (key not in changes or changes[key] is not None)
    }
    path.write_bytes(safetensors_numpy.save(tensors, metadata=metadata))
    return path


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    recorded().save(path)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match="must have the content that was saved, of the sha256 '"):
        Tape.load(path)


HOSTILE: dict[str, dict[str, Any]] = {
    "another format": {"format": "stepwell-state/2"},
    "a model that moves the cursor": {"model": "\x1b[2J"},
    "batch_size 0": {"batch_size": "0"},
    "batch_size of other arrays": {"batch_size": "2"},
    "batch_size over 32 bits": {"batch_size": str(2**32)},
    "neither one nor a group": {"sessions": "two"},
    "dropped with a sign": {"dropped": "-1"},
    "marks that are no JSON": {"marks": "["},
    "marks nested deeply": {"marks": "[" * 100_000},
    "marks that are no list": {"marks": "{}"},
    "a mark without rows": {"marks": '[[0, "reset"]]'},
    "a mark of another kind": {"marks": '[[0, "pause", [0]]]'},
    "a mark of a list": {"marks": '[[0, ["reset"], [0]]]'},
    "a mark after the end": {"marks": '[[6, "reset", [0]]]'},
    "a mark of another row": {"marks": '[[0, "reset", [1]]]'},
    "a mark of half a row": {"marks": '[[0, "reset", [0.5]]]'},
    "a mark at true": {"marks": '[[true, "reset", [0]]]'},
    "revisions without sessions": {"revisions": np.zeros((5, 0), np.uint64)},
    "revisions of two sessions": {"revisions": np.zeros((5, 2), np.uint64)},
    "revisions of another type": {"revisions": np.zeros((5, 1), np.float32)},
    "positions of other time steps": {"positions": np.zeros((4, 1), np.uint64)},
    "times with two axes": {"times": np.zeros((5, 1), np.int64)},
    "an array of other time steps": {"states/lstm/h": np.zeros((4, 1, 3), np.float32)},
    "an array without rows": {"states/lstm/h": np.zeros(5, np.float32)},
    "an array of another kind": {"weights/w": np.zeros((5, 1), np.float32)},
    "an array without a name": {"states/": np.zeros((5, 1), np.float32)},
    "a boolean that is 2": {"states/b": np.full((5, 1), 2, np.uint8).view(np.bool_)},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_by_its_path(changes: dict[str, Any], tmp_path: Path) -> None:
    path = saved(tmp_path / "t.safetensors", **changes)
    with pytest.raises(
        InvalidInputError, match=r"path must be a tape saved by Tape\.save; .*t\.safetensors"
    ) as caught:
        Tape.load(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "missing", ["model", "fingerprint", "batch_size", "marks", "dropped", "stopped", "names"]
)
def test_a_file_without_its_metadata_is_refused_by_what_is_missing(missing: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "t.safetensors", **{missing: None})
    with pytest.raises(InvalidInputError, match=missing):
        Tape.load(path)


def test_a_file_of_another_kind_is_refused_and_a_missing_one_is_pythons_error(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"no safetensors at all, and longer than a header")
    with pytest.raises(InvalidInputError, match="a tape saved by"):
        Tape.load(tmp_path / "t")
    with pytest.raises(FileNotFoundError, match="nothing"):
        Tape.load(tmp_path / "nothing")


# Tables.


def test_to_xarray() -> None:
    tape = recorded()
    dataset = tape.to_xarray()
    h = dataset["states/lstm/h"]
    assert h.dims == ("time", "row", "lstm.1")
    assert np.array_equal(h.values, tape.states["lstm/h"])
    assert dataset["inputs/x"].dims == ("time", "row", "inputs/x.1")
    assert dataset["outputs/y"].dims == ("time", "row")
    assert dataset["time"].values.tolist() == [2, 3, 4, 5, 6]
    assert dataset["position"].values.tolist() == tape.positions.tolist()
    assert dataset["revision"].dims == ("time",)
    assert np.array_equal(dataset["received"].values.astype("datetime64[us]"), tape.times)
    assert dataset.attrs == {"model": "forecast", "fingerprint": "f" * 64}
    h.values[:] = 0
    assert tape.states["lstm/h"].any()


def test_to_pandas() -> None:
    source = reel(members=2, batch_size=2)
    for revision in (1, 2):
        members = Members(
            None,
            counts(revision, revision),
            counts(revision - 1, revision + 4),
            counts(revision, revision + 5),
            counts(1, 1),
        )
        states = {"lstm/h": np.random.default_rng().standard_normal((1, 4, 3))}
        tokens = {"token": np.arange(4)[None]}
        source.append(frames(1, 1, members=members, states=states, inputs=tokens, outputs={}))
    tape = Tape(source.content)
    frame = tape.to_pandas()
    assert list(frame.index.names) == ["time", "revision", "position", "received", "row"]
    assert frame["inputs"]["token"].to_numpy().reshape(-1).tolist() == [0, 1, 2, 3] * 2
    assert np.array_equal(frame["states"]["lstm/h"].to_numpy().reshape(2, 4, 3), tape.states["lstm/h"])
    assert frame.xs(2, level="row").index.get_level_values("position").tolist() == [6, 7]
    assert frame.index.get_level_values("revision").tolist() == [1] * 4 + [2] * 4
    assert frame.attrs["model"] == "forecast"
    dataset = tape.to_xarray()
    assert dataset["revision"].dims == ("time", "member")
    assert dataset.sizes == {"time": 2, "row": 4, "member": 2, "lstm.1": 3}


def test_tables_of_an_empty_tape() -> None:
    tape = Tape(reel().content)
    assert tape.to_pandas().shape == (0, 0)
    assert tape.to_xarray().sizes["time"] == 0


def test_an_input_may_have_the_name_of_a_layer() -> None:
    source = reel()
    source.append(frames(1, 1, inputs={"lstm": np.ones((1, 1, 7))}))
    dataset = Tape(source.content).to_xarray()
    assert (dataset["inputs/lstm"].shape, dataset["states/lstm/h"].shape) == ((1, 1, 7), (1, 1, 3))
