"""Tapes of sessions and groups of a real server: what is on them is what Keras computes, step by step."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell import InvalidInputError
from support.sdk.client_kinds import SHELLS, connect
from support.servers.served import Served, draw, keras_model

ATOL = 1e-5


@pytest.fixture(params=[SHELLS[0], SHELLS[2]])
async def client(request: pytest.FixtureRequest, served: Served) -> AsyncIterator[Any]:
    async with connect(request.param, served.address, timeout_s=100.0) as client:
        yield client


class Keras:
    """Steps the model `seq` with Keras, as a session of these rows."""

    def __init__(self, rows: int) -> None:
        self.model = keras_model("seq")
        self.h = self.c = np.zeros((rows, 8), np.float32)

    def step(self, x: Any) -> tuple[Any, Any, Any]:
        cell, dense = self.model.get_layer("lstm").cell, self.model.get_layer("y")
        out, (h, c) = cell(x, [self.h, self.c])
        self.h, self.c = np.asarray(h), np.asarray(c)
        return np.asarray(dense(out)), self.h, self.c


async def test_a_tape_has_what_keras_computes_step_by_step(client: Any) -> None:
    """Single steps, several time steps, resets, and rows that restart in the middle of a call."""
    rows, keras = 2, Keras(2)
    singles, several, starts = draw(rows, 3), draw(rows, 4), np.array([[0, 0, 1, 0], [0, 0, 0, 0]], bool)
    ones = {"lstm/h": np.ones((rows, 8)), "lstm/c": np.ones((rows, 8))}
    wanted = [keras.step(singles[:, t]) for t in range(3)]
    for t in range(4):
        keras.h, keras.c = (np.where(starts[:, t : t + 1], 0, each) for each in (keras.h, keras.c))
        wanted.append(keras.step(several[:, t]))
    keras.h = keras.c = np.ones((rows, 8), np.float32)
    wanted.append(keras.step(singles[:, 0]))
    async with await client.open_session("seq", batch_size=rows) as session:
        with session.record() as tape:
            answers = [await session.step(singles[:, t]) for t in range(3)]
            answers += list(np.moveaxis(await session.step(several, reset=starts), 1, 0))
            await session.reset_states(ones)
            answers.append(await session.step(singles[:, 0]))
        await session.step(singles[:, 1])  # after the block
    assert len(tape) == 8
    y, h, c = (np.stack(each) for each in zip(*wanted, strict=True))
    np.testing.assert_allclose(tape.states["lstm/h"], h, atol=ATOL)
    np.testing.assert_allclose(tape.states["lstm/c"], c, atol=ATOL)
    np.testing.assert_allclose(tape.outputs["y"], y, atol=ATOL)
    assert np.array_equal(tape.outputs["y"], np.stack(answers))
    x = np.concatenate([singles, several, singles[:, :1]], axis=1)
    assert np.array_equal(tape.inputs["x"], np.moveaxis(x, 1, 0))
    assert tape.revisions.tolist() == [1, 2, 3, 4, 4, 4, 4, 6]
    assert tape.positions.tolist() == [1, 2, 3, 4, 5, 6, 7, 1]
    assert [(mark.index, mark.kind, mark.rows) for mark in tape.marks] == [
        (5, "reset", (0,)),
        (7, "set", (0, 1)),
    ]
    assert (tape.model, tape.batch_size, tape.dropped, tape.stopped) == ("seq", rows, 0, "")
    assert len(tape.fingerprint) == 64
    day = np.timedelta64(dt.timedelta(days=1))
    assert np.abs(tape.times - np.datetime64(dt.datetime.now(dt.UTC).replace(tzinfo=None))).max() < day


async def test_calls_return_what_they_return_without_a_tape(client: Any) -> None:
    x = draw(2, 5)
    calls: list[dict[str, Any]] = [
        {},
        {"outputs": "last"},
        {"outputs": "none"},
        {"outputs": ["y"], "time": "last"},
        {"states": "last"},
        {"states": "all"},
        {"rows": [1]},
    ]
    async with await client.open_session("seq", batch_size=2) as session, await session.fork() as plain:
        with session.record() as tape:
            for call in calls:
                some = x[call.get("rows", [0, 1])]
                with_tape, without = await session.step(some, **call), await plain.step(some, **call)
                if isinstance(without, stepwell.Trace):
                    assert with_tape.states.has_time == without.states.has_time
                    assert {name: a.tobytes() for name, a in with_tape.states.items()} == {
                        name: a.tobytes() for name, a in without.states.items()
                    }
                    with_tape, without = with_tape.outputs, without.outputs
                assert repr(with_tape) == repr(without), call
        assert np.array_equal(tape.states["lstm/h"][-1, 1], (await plain.get_state())["lstm/h"][1])
    assert tape.states["lstm/h"].shape == (35, 2, 8)
    known = ~np.isnan(tape.outputs["y"]).any(axis=2)
    last = [False] * 4 + [True]
    each = [True] * 5
    assert known[:, 1].tolist() == each + last + [False] * 5 + last + each * 3
    assert known[:, 0].tolist() == each + last + [False] * 5 + last + each * 2 + [False] * 5
    assert np.isnan(tape.states["lstm/h"][30:, 0]).all()
    assert not np.isnan(tape.states["lstm/h"][:, 1]).any()


@pytest.mark.parametrize("states", ["last", False])
async def test_fewer_states(client: Any, states: Any) -> None:
    async with await client.open_session("seq") as session:
        with session.record(states) as tape:
            await session.step(draw(1, 3))
            await session.step(draw(1))
        after = await session.get_state()
    if not states:
        assert dict(tape.states) == {}
        with pytest.raises(KeyError, match=r"'lstm/h'; the states on the tape are \[\]"):
            tape.states["lstm/h"]
        return
    assert np.isnan(tape.states["lstm/h"]).all(axis=(1, 2)).tolist() == [True, True, False, False]
    assert np.array_equal(tape.states["lstm/h"][-1], after["lstm/h"])


async def test_several_inputs_and_outputs_and_integers(client: Any, served: Served) -> None:
    """Inputs and outputs without a time axis, and integers."""
    one, several = served.draw("multi", 1), served.draw("multi", 1, 4)
    async with await client.open_session("multi") as session:
        with session.record(states="last") as tape:
            y = await session.step(one)
            z = await session.step(several)
    assert tape.inputs["token"].dtype == np.int32
    for name, array in one.items():
        assert np.array_equal(tape.inputs[name][0], array)
        has_time = several[name].shape != array.shape
        parts = np.moveaxis(several[name], 1, 0) if has_time else [several[name]] * 4
        assert np.array_equal(tape.inputs[name][1:], parts)
    assert np.array_equal(
        tape.outputs["each"], np.concatenate([y["each"][None], np.moveaxis(z["each"], 1, 0)])
    )
    assert np.array_equal(tape.outputs["head"][[0, 4]], np.stack([y["head"], z["head"]]))
    assert np.isnan(tape.outputs["head"][1:4]).all()


async def test_changes_of_others_leave_a_gap(client: Any) -> None:
    async with await client.open_session("seq") as session:
        with session.record() as tape:
            await session.step(draw(1, 2))
            async with connect("async", client.address) as other:
                again = await other.open_session("seq", session_id=session.id)
                await again.step(draw(1))
                with pytest.raises(stepwell.RevisionConflictError):
                    await session.step(draw(1))
            await session.refresh()
            await session.step(draw(1))
            await session.reset_states(rows=[0])
    assert (tape.revisions.tolist(), tape.positions.tolist()) == ([1, 1, 3], [1, 2, 4])
    assert [(mark.index, mark.kind) for mark in tape.marks] == [(2, "gap"), (3, "reset")]


async def test_a_bounded_tape_drops_the_oldest_time_steps(client: Any) -> None:
    x = draw(1, 40)
    async with await client.open_session("seq") as session:
        with session.record() as whole, session.record(max_steps=6) as tape:
            for t in range(20):
                if t in (7, 15):
                    await session.reset_states()
                await session.step(x[:, t])
            await session.step(x[:, 20:31])
    assert (len(tape), tape.dropped) == (6, 25)
    for kind in ("inputs", "outputs", "states"):
        for name, array in getattr(whole, kind).items():
            assert np.array_equal(getattr(tape, kind)[name], array[-6:])
    assert tape.positions.tolist() == whole.positions[-6:].tolist()
    assert tape.marks == []
    assert [mark.index for mark in whole.marks] == [7, 15]
    assert [mark.index for mark in whole[10:].marks] == [5]


async def test_a_reply_with_states_that_is_too_large_changes_nothing(client: Any) -> None:
    x = draw(1, 70_000)  # 64 bytes of states each
    async with await client.open_session("seq") as session:
        with (
            session.record() as tape,
            pytest.raises(InvalidInputError, match="the reply to the step must be"),
        ):
            await session.step(x)
        await session.step(x, outputs="last")
        assert (len(tape), tape.marks, session.position) == (0, [], 70_000)


async def test_a_group(client: Any) -> None:
    """Members, some of them in another order, resets of some, and a view that the tape does not see."""
    keras = Keras(6)
    async with await client.open_sessions("seq", 3, batch_size=2) as group:
        with group.record() as tape:
            x = draw(6, 2)
            await group.step(x)
            some = draw(4)
            await group.step(some, members=[2, 0])
            await group.reset_states(members=[1])
            await group.step(draw(6), reset=np.array([True, False, False]))
            await group[1].step(draw(2))
            last = draw(6)
            await group.step(last)
            state = await group.get_states()
    first = [keras.step(x[:, t])[1] for t in range(2)]
    np.testing.assert_allclose(tape.states["lstm/h"][:2], first, atol=ATOL)
    assert tape.inputs["x"].shape == (5, 6, 3)
    assert np.array_equal(tape.inputs["x"][2, [4, 5, 0, 1]], some)
    assert np.isnan(tape.states["lstm/h"][2, 2:4]).all()
    assert np.array_equal(tape.states["lstm/h"][-1], state["lstm/h"])
    assert tape.revisions.tolist() == [[1, 1, 1], [1, 1, 1], [2, 1, 2], [3, 3, 3], [4, 5, 4]]
    assert tape.positions.tolist() == [[1, 1, 1], [2, 2, 2], [3, 2, 3], [1, 1, 4], [2, 3, 5]]
    assert [(mark.index, mark.kind, mark.rows) for mark in tape.marks] == [
        (3, "reset", (0, 1, 2, 3)),
        (4, "gap", (2, 3)),
    ]


async def test_a_member_that_fails_is_recorded_when_the_call_is_repeated(client: Any) -> None:
    x = draw(3)
    async with await client.open_sessions("seq", 3) as group:
        with group.record() as tape:
            await client.close_session(group.ids[1])
            with pytest.raises(stepwell.SessionNotFoundError):
                await group.step(x)
            assert len(tape) == 0
            await group[[0, 2]].step(x[[0, 2]])
            await group.step(x[[0, 2]], members=[0, 2])
    assert (len(tape), [(mark.kind, mark.rows) for mark in tape.marks]) == (1, [("gap", (0, 2))])


def test_threads_share_a_session_and_its_tape(served: Served) -> None:
    """Each step is on the tape once, in the order of revisions, and every slice is consistent."""
    with stepwell.connect(served.address) as client, client.open_session("seq") as session:
        seen = []
        with session.record(max_steps=50) as tape:

            def step() -> None:
                for _ in range(20):
                    session.step(draw(1))
                    some = tape[:]
                    seen.append((len(some), len(some.states["lstm/h"]), some.revisions.tolist()))

            threads = [threading.Thread(target=step) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert tape.revisions.tolist() == list(range(31, 81))
    assert tape.marks == []
    for length, states, revisions in seen:
        assert length == states == len(revisions)
        assert revisions == list(range(revisions[0], revisions[0] + length))


async def test_arguments_are_checked(client: Any) -> None:
    async with await client.open_session("seq") as session:
        with pytest.raises(InvalidInputError, match="states must be True, False or 'last'; got 'first'"):
            session.record(states="first")
        with pytest.raises(InvalidInputError, match="max_steps must be at least 1; got 0"):
            session.record(max_steps=0)
        bare = session.record()
        outside = r"record\(\) must be used in a with block, `with session.record\(\) as tape:`; got "
        for use, words in (
            (len, r"len\(\)"),
            (lambda tape: tape[:3], "an index"),
            (lambda tape: tape.states, r"\.states"),
            (lambda tape: tape.save("x"), r"\.save"),
        ):
            with pytest.raises(InvalidInputError, match=outside + words):
                use(bare)
        assert not hasattr(bare, "nothing")
        with bare as tape:
            assert len(tape) == 0
        with session.record() as tape:
            pass
        with pytest.raises(TypeError, match=r"a tape must be indexed by a slice, .*; got 3"):
            tape[3]
        with pytest.raises(InvalidInputError, match="the step of a slice of a tape must be 1; got 2"):
            tape[::2]
    with pytest.raises(stepwell.ClosedError), session.record():
        pass
