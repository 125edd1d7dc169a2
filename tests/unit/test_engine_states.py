"""States returned with a step, masks of time steps, steps of some rows, and the size of replies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import Select
from stepwell_server.errors import InvalidInput, MessageTooLarge, ModelNotFound, Overloaded, SessionGone
from support.checks.model_of_sessions import initial, traced
from support.engine.fake_executor import BAD, PLAIN, RICH, advance
from support.engine.harness import BOTH_WAYS, Answer, Harness, fails, running, x
from support.stores.durable import same_reply

SHAPES = pytest.mark.parametrize("given", [(3,), (3, 1), (3, 6)], ids=["no axis", "T=1", "T=6"])


@BOTH_WAYS
@SHAPES
@pytest.mark.parametrize("select", Select)
async def test_states_come_back_as_asked_for_and_to_a_retry_too(
    threads: bool, given: tuple[int, ...], select: Select
) -> None:
    value = x(*given)
    outputs, after = traced(initial(3), value if value.ndim == 3 else value[:, None])
    timed = value.ndim == 3
    async with running(threads=threads, resident_rows=4) as at:
        for number, states in enumerate(Select):
            for rows in (None, [2, 0]):
                name = f"{number}{rows}"
                await at.open(name, batch_size=3)
                said: dict[str, Any] = {"states": states, "state_rows": rows, "select": select}
                if states is Select.NONE:
                    said["state_rows"] = None
                first = await at.step(name, value, expected=0, request_ids=9, **said)
                await at.open_and_step("other", x(1))
                await at.state("other")
                again = await at.step(name, value, expected=0, request_ids=9, **said)
                assert not first.replayed
                same_reply(again, first)
                assert set(first.outputs) == ({"y"} if select is not Select.NONE else set())
                if select is Select.ALL:
                    assert first.outputs["y"].tobytes() == outputs.tobytes()
                chosen = after if rows is None else after[rows]
                if states is Select.NONE:
                    assert not first.states
                else:
                    wanted = chosen if timed and states is Select.ALL else chosen[:, -1]
                    assert first.states["sum"].shape == wanted.shape
                    assert first.states["sum"].tobytes() == wanted.tobytes()
                assert (await at.state(name))["sum"].tobytes() == after[:, -1].tobytes()
                await at.engine.close_session("other")


@pytest.mark.parametrize("states", [Select.LAST, Select.ALL])
async def test_several_states_in_their_order(states: Select) -> None:
    inputs = {"x": x(2, 5), "token": np.ones((2, 5), np.int32), "gain": np.array([2, 3], np.float32)}
    async with running({"rich": RICH}, steps=2) as at:
        await at.open("a", batch_size=2, model="rich")
        answer = await at.submit("a", sizes=[2], inputs=inputs, states=states).only()
        now, seen = [np.stack([value, value]) for value in RICH.initial], []
        for t in range(5):
            _, now = advance([inputs["x"][:, t], inputs["token"][:, t], inputs["gain"]], now)
            seen.append(now)
        assert list(answer.states) == ["sum", "count"]
        for place, array in enumerate(answer.states.values()):
            wanted = np.stack([s[place] for s in seen], 1) if states is Select.ALL else now[place]
            assert (array.dtype, array.tobytes()) == (wanted.dtype, wanted.tobytes())


@BOTH_WAYS
@pytest.mark.parametrize("most", [4, 64], ids=["in passes of 4 rows", "in one pass"])
async def test_members_of_a_frame_that_ask_for_states_get_their_own(threads: bool, most: int) -> None:
    """Also where one of them fails, the frame is more than a pass, and plain steps share the passes."""
    sizes = [1, 2, 3, 2, 1]
    names = [f"s{i}" for i in range(5)]
    value = x(sum(sizes), 4)
    value[2, 1, 0] = BAD  # of s1
    async with running(threads=threads, max_batch_rows=most, steps=3) as at:
        for name, size in zip(names, sizes, strict=True):
            await at.open(name, batch_size=size)
        await at.open("plain")
        plain = at.single("plain", x(1, 4, seed=3))
        said: dict[str, Any] = {"sizes": sizes, "request_ids": [1, 2, 3, 4, 5], "expected": [0] * 5}
        said |= {"states": Select.ALL, "state_members": [1, 2, 4]}
        first = await at.submit(names, value, **said).all()
        again = await at.submit(names, np.where(value == BAD, np.float32(0), value), **said).all()
        starts = np.cumsum([0, *sizes])
        for i in (0, 2, 3, 4):
            one, two = first[i], again[i]
            assert isinstance(one, Answer)
            assert isinstance(two, Answer)
            assert two.replayed
            outputs, after = traced(initial(sizes[i]), value[starts[i] : starts[i + 1]])
            assert one.outputs["y"].tobytes() == two.outputs["y"].tobytes() == outputs.tobytes()
            for answer in (one, two):
                states = answer.states.get("sum", np.zeros(0))
                assert states.tobytes() == (after.tobytes() if i in {2, 4} else b"")
        assert isinstance(first[1], InvalidInput)
        assert isinstance(again[1], Answer)
        assert not again[1].replayed
        assert (await plain.only()).outputs["y"].tobytes() == traced(initial(1), x(1, 4, seed=3))[0].tobytes()


@pytest.mark.engine(threads=True)
async def test_steps_with_and_without_states_in_one_pass_are_each_right(at: Harness) -> None:
    names = [f"s{i}" for i in range(6)]
    await at.open(*names, "busy")
    await at.begin_pass("busy", x(1))
    kinds = [Select.NONE, Select.LAST, Select.ALL]
    waiting = [at.single(name, x(1, 1, seed=i), states=kinds[i % 3]) for i, name in enumerate(names)]
    at.hooks.open_gate()
    for i, answers in enumerate(waiting):
        after = traced(initial(1), x(1, 1, seed=i))[1]
        states = (await answers.only()).states
        assert [array.tobytes() for array in states.values()] == [after.tobytes()] * (i % 3 > 0)
        assert [array.shape for array in states.values()] == [(), [(1, 2)], [(1, 1, 2)]][i % 3] or i % 3 == 0
    assert [rows for rows, _ in at.events.passes] == [1, 6], "they share a pass all the same"


@BOTH_WAYS
@pytest.mark.parametrize("cut", [1, 3, 100])
async def test_a_mask_of_time_steps_is_as_steps_with_masks_one_after_the_other(
    threads: bool, cut: int
) -> None:
    rng = np.random.default_rng(cut)
    async with running(threads=threads, steps=cut) as at:
        await at.open("a", "b", batch_size=3)
        for seed in range(4):
            mask, value = rng.random((3, 7)) < 0.4, x(3, 7, seed=seed)
            if seed == 2:
                mask[:, 4] = True
            at_once = await at.step("a", value, reset_rows=mask.reshape(-1), states=Select.ALL)
            single = [
                await at.step("b", value[:, t], reset_rows=mask[:, t], states=Select.LAST) for t in range(7)
            ]
            assert at_once.position == single[-1].position
            outputs = np.stack([answer.outputs["y"] for answer in single], 1)
            states = np.stack([answer.states["sum"] for answer in single], 1)
            assert at_once.outputs["y"].tobytes() == outputs.tobytes()
            assert at_once.states["sum"].tobytes() == states.tobytes()
            if seed == 2:
                assert at_once.position == 3 or mask[:, 5:].all(axis=0).any()
            predicted = await at.engine.predict("plain", {"": value}, {"": x(3)}, reset=mask.reshape(-1))
            outputs, after = traced(x(3), value, mask)
            assert predicted.outputs["y"].tobytes() == outputs.tobytes()
            assert predicted.state["sum"].tobytes() == after[:, -1].tobytes()


async def test_positions_of_a_frame_begin_where_all_rows_of_the_session_do(at: Harness) -> None:
    await at.open("a", "b", "c", batch_size=2)
    await at.submit(["a", "b", "c"], x(6, 2), sizes=[2, 2, 2]).all()
    mask = np.zeros((6, 5), np.bool_)
    mask[0:2, 0] = mask[0:2, 3] = True  # a: twice
    mask[2, 1] = mask[3, 2] = True  # b: never at once
    answers = await at.submit(["a", "b", "c"], x(6, 5), sizes=[2, 2, 2], reset_rows=mask.reshape(-1)).all()
    assert [answer.position for answer in answers if isinstance(answer, Answer)] == [2, 7, 7]


@pytest.mark.parametrize("rows", [[0, 3], [0, 3, 5, 9]])
async def test_predictions_in_several_jobs_reset_their_own_rows(rows: list[int]) -> None:
    mask = np.zeros(10, np.bool_)
    mask[rows] = True
    async with running(max_batch_rows=4, steps=2) as at:
        predicted = await at.engine.predict("plain", {"": x(10, 3)}, {"": x(10)}, reset=mask)
        outputs, _ = traced(x(10), x(10, 3), mask[:, None])
        assert predicted.outputs["y"].tobytes() == outputs.tobytes()
        await fails(
            at.engine.predict("plain", {"": x(10, 3)}, reset=np.ones(20, np.bool_)),
            InvalidInput,
            "one for each of 10 rows and 3 time steps; got 20",
        )


@BOTH_WAYS
@pytest.mark.parametrize("given", [(), (1,), (5,)], ids=["no axis", "T=1", "T=5"])
@pytest.mark.parametrize("select", Select)
async def test_some_rows_advance_and_the_others_keep_their_state(
    threads: bool, given: tuple[int, ...], select: Select
) -> None:
    rows, value = [3, 0], x(2, *given, seed=1)
    async with running(threads=threads, resident_rows=5, steps=2) as at:
        await at.open("a", batch_size=4)
        await at.step("a", x(4, 2))
        before = (await at.state("a"))["sum"]
        mask = np.array([False, True])
        series = value if given else value[:, None]
        outputs, after = traced(before[rows], series, mask[:, None])
        said: dict[str, Any] = {"expected": 1, "request_id": 7, "rows": rows, "reset_rows": mask}
        said |= {"select": select, "states": Select.LAST, "state_rows": [0]}
        first = await at.single("a", value, **said).only()
        await at.open("b", "c")  # then a is paged out
        await at.step("b", x(1))
        again = await at.single("a", value, **said).only()
        same_reply(again, first)
        shown = {Select.ALL: outputs if given else outputs[:, 0], Select.LAST: outputs[:, -1]}
        wanted = {"y": shown[select].tobytes()} if select is not Select.NONE else {}
        assert {name: array.tobytes() for name, array in first.outputs.items()} == wanted
        assert first.states["sum"].tobytes() == after[1:, -1].tobytes()
        assert (first.revision, first.position) == (2, 2 + series.shape[1])
        whole = before.copy()
        whole[rows] = after[:, -1]
        assert (await at.state("a"))["sum"].tobytes() == whole.tobytes()
        everyone: dict[str, Any] = {"rows": [0, 1, 2, 3], "expected": 2, "reset_rows": np.ones(4, np.bool_)}
        last = await at.single("a", x(4), **everyone).only()
        assert last.position == 1


@pytest.mark.engine(threads=True)
async def test_steps_of_one_row_each_of_sessions_of_several_come_together(at: Harness) -> None:
    names = [f"s{i}" for i in range(4)]
    await at.open(*names, batch_size=3)
    await at.open("busy", "one")
    await at.begin_pass("busy", x(1))
    waiting = [at.single(name, x(1, seed=i), rows=[i % 3]) for i, name in enumerate(names)]
    waiting.append(at.single("one", x(1, seed=4)))
    at.hooks.open_gate()
    for i, (name, answers) in enumerate(zip([*names, "one"], waiting, strict=True)):
        outputs, after = traced(initial(1), x(1, 1, seed=i).reshape(1, 1, 2))
        assert (await answers.only()).outputs["y"].tobytes() == outputs.tobytes()
        if name != "one":
            state = initial(3)
            state[i % 3] = after[0, -1]
            assert (await at.state(name))["sum"].tobytes() == state.tobytes()


async def test_all_rows_in_another_order_are_all_rows(at: Harness) -> None:
    await at.open("a", batch_size=3)
    await at.step("a", x(3))
    answer = await at.single("a", x(3, 2), rows=[2, 0, 1], reset_rows=np.ones(3, np.bool_)).only()
    assert answer.position == 2
    assert (await at.state("a"))["sum"].tobytes() == traced(initial(3), x(3, 2))[1][[1, 2, 0], -1].tobytes()


@pytest.mark.engine(steps=1)
async def test_a_failed_step_of_some_rows_changes_none(at: Harness) -> None:
    await at.open("a", batch_size=3)
    before = (await at.state("a"))["sum"]
    value = x(2, 4)
    value[1, 2, 0] = BAD
    with pytest.raises(InvalidInput):
        await at.single("a", value, rows=[2, 1], states=Select.ALL).only()
    assert (await at.state("a"))["sum"].tobytes() == before.tobytes()
    assert (await at.engine.session_info("a")).revision == 0


def limits(rows: int, steps: int, states: int) -> int:
    """Bytes of a reply of all outputs and so many states."""
    return 100 + rows * steps * PLAIN.output_bytes[0] + states * PLAIN.state_row_bytes


@pytest.mark.parametrize(
    ("said", "states"),
    [
        ({"states": Select.ALL}, 2 * 3),
        ({"states": Select.LAST}, 2),
        ({"states": Select.ALL, "state_rows": [1]}, 3),
        ({"states": Select.NONE}, 0),
    ],
)
async def test_states_count_towards_the_size_of_the_reply(
    said: dict[str, Any], states: int, at: Harness
) -> None:
    await at.open("a", batch_size=2)
    limit = limits(2, 3, states)
    await at.step("a", x(2, 3), reply_limit=limit, reply_bytes=100, **said)
    for select, less in ((Select.ALL, limit), (Select.NONE, 100 + states * PLAIN.state_row_bytes)):
        if less == 100:
            continue
        with pytest.raises(MessageTooLarge, match="the reply to the step must be at most") as caught:
            await at.submit(
                "a", x(2, 3), sizes=[2], reply_limit=less - 1, reply_bytes=100, select=select, **said
            ).only()
        assert ("or for the states of fewer rows" in str(caught.value)) == bool(states)
    assert (await at.engine.session_info("a")).revision == 1


async def held(at: Harness, **said: Any) -> int:
    await at.open("a", batch_size=2)
    answers = await at.begin_pass("a", x(2, 50), sizes=[2], **said)
    (stats,) = at.engine.stats()
    at.hooks.open_gate()
    await answers.only()
    await at.settled()
    assert not at.engine.stats()[0].queued_bytes
    await at.engine.close_session("a")
    return stats.queued_bytes


@pytest.mark.engine(threads=True)
async def test_states_to_be_sent_count_as_bytes_that_wait(
    monkeypatch: pytest.MonkeyPatch, at: Harness
) -> None:
    plain = await held(at)
    assert await held(at, states=Select.ALL) == plain + 2 * 50 * PLAIN.state_row_bytes
    assert await held(at, states=Select.ALL, state_rows=[1]) == plain + 50 * PLAIN.state_row_bytes
    monkeypatch.setattr("stepwell_server.engine.intake.queues.MAX_WAITING_BYTES", 2 * plain)
    await at.open("a", "b")
    first = await at.begin_pass("a", x(1, 50))
    with pytest.raises(Overloaded, match="bytes waiting must stay within"):
        at.submit("b", x(1, 76), states=Select.ALL)
    second = at.submit("b", x(1, 76))
    at.hooks.open_gate()
    await first.only()
    await second.only()


_LIMIT = 4096
#: A row of all outputs at one time step.
_STEP_BYTES = sum(spec_bytes for spec_bytes in PLAIN.output_bytes)
_FITS = (_LIMIT - 100) // _STEP_BYTES


def _x(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).random((*shape, *PLAIN.inputs[0].shape), np.float32)


async def test_time_steps_count() -> None:
    assert all(spec.temporal for spec in PLAIN.outputs)
    async with running() as at:
        await at.open_and_step("a", _x(1, _FITS), reply_limit=_LIMIT, reply_bytes=100)
        with pytest.raises(
            MessageTooLarge, match=r"the reply to the step must be at most 4096 bytes; it would be"
        ):
            await at.submit("a", _x(1, _FITS + 1), reply_limit=_LIMIT, reply_bytes=100).only()
        assert (await at.engine.session_info("a")).revision == 1


async def test_outputs_that_are_not_sent_do_not_count_towards_the_limit_of_a_reply(at: Harness) -> None:
    await at.open("a")
    for select in (Select.LAST, Select.NONE):
        await at.step("a", _x(1, _FITS + 1), reply_limit=_LIMIT, reply_bytes=100, select=select)
    await at.step("a", _x(1, 1), reply_limit=_STEP_BYTES + 100, reply_bytes=100)


async def test_rows_of_all_members_count(at: Harness) -> None:
    await at.open("a", "b")
    limit = 2 * _STEP_BYTES * 3 + 100
    for member in await at.submit(["a", "b"], _x(2, 3), reply_limit=limit, reply_bytes=100).all():
        assert not isinstance(member, Exception)
    with pytest.raises(MessageTooLarge):
        await at.submit(["a", "b"], _x(2, 4), reply_limit=limit, reply_bytes=100).require_all_applied()


async def test_sessions_that_are_gone_are_said_to_be_gone(at: Harness) -> None:
    with pytest.raises(SessionGone):
        await at.submit("gone", _x(1, _FITS + 1), reply_limit=_LIMIT).only()


async def test_predictions_count_the_final_state_too(at: Harness) -> None:
    rows = 3
    limit = rows * (_STEP_BYTES * 2 + PLAIN.state_row_bytes) + 100
    await at.engine.predict("plain", {"": _x(rows, 2)}, reply_limit=limit, reply_bytes=100)
    await fails(
        at.engine.predict("plain", {"": _x(rows, 2)}, reply_limit=limit - 1, reply_bytes=100),
        MessageTooLarge,
        "the reply to the prediction",
    )
    await fails(at.engine.predict("other", {"": _x(1, 2)}, reply_limit=limit), ModelNotFound)
