"""A request id stands for one change: with another kind of change, or other content, it is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import OpenResult, Select
from stepwell_server.engine.change import Awaited, Change
from stepwell_server.errors import InvalidInput, RevisionConflict, ServerError
from support.engine.harness import BOTH_WAYS, Harness, fails, running, x

KIND, CONTENT = "it stands for a step, and a reset came", "it stands for a step with other content"
X = x(4, seed=1)
FIRST = {"inputs": {"": X}}
MASK = np.array([True, False, True, False])
OTHERS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any], str]] = {
    "a reset": (FIRST, {"reset": True}, KIND),
    "other inputs": (FIRST, {"inputs": {"": X + 1}}, CONTENT),
    "signs": (FIRST, {"inputs": {"": -X}}, CONTENT),
    "rows in another order": (FIRST, {"inputs": {"": X[::-1]}}, CONTENT),
    "more time steps": (FIRST, {"inputs": {"": np.stack([X, X], 1)}}, CONTENT),
    "a reset mask": (FIRST, {"inputs": {"": X}, "reset_rows": MASK}, CONTENT),
    "another reset mask": (
        {"inputs": {"": X}, "reset_rows": MASK},
        {"inputs": {"": X}, "reset_rows": ~MASK},
        CONTENT,
    ),
    "all rows": ({"inputs": {"": X[:2]}, "rows": [1, 3]}, FIRST, CONTENT),
    "other rows": (
        {"inputs": {"": X[:2]}, "rows": [1, 3]},
        {"inputs": {"": X[:2]}, "rows": [3, 1]},
        CONTENT,
    ),
    "no outputs": (FIRST, {"inputs": {"": X}, "select": Select.NONE}, CONTENT),
    "outputs of the last step": (FIRST, {"inputs": {"": X}, "select": Select.LAST}, CONTENT),
    "an output by its name": (FIRST, {"inputs": {"": X}, "output_names": ["y"]}, CONTENT),
    "states": (FIRST, {"inputs": {"": X}, "states": Select.LAST}, CONTENT),
    "zeros of another sign": ({"inputs": {"": 0 * X}}, {"inputs": {"": -0.0 * X}}, CONTENT),
    "a step": ({"reset": True}, FIRST, "it stands for a reset, and a step came"),
    "other states": (
        {"reset": True, "state": {"": X}},
        {"reset": True, "state": {"": X + 1}},
        "it stands for a reset with other content",
    ),
    "the initial state": (
        {"reset": True, "state": {"": X}},
        {"reset": True},
        "it stands for a reset with other content",
    ),
    "other rows reset": (
        {"reset": True, "rows": [0]},
        {"reset": True, "rows": [1]},
        "it stands for a reset with other content",
    ),
    "another position": (
        {"reset": True, "position": 4},
        {"reset": True, "position": 5},
        "it stands for a reset with other content",
    ),
}


async def sent(at: Harness, said: Mapping[str, Any], request_id: int = 7, expected: int | None = None) -> Any:
    answer = Awaited()
    change = Change(["a"], answer, **said)
    change.request_ids = np.array([request_id], np.uint64)
    if expected is not None:
        change.expected = np.array([expected], np.uint64)
    at.engine.submit(change)
    return await answer.get()


@pytest.mark.parametrize("expected", [None, 0])
@pytest.mark.parametrize("other", OTHERS)
async def test_another_change_with_a_request_id_is_refused(other: str, expected: int | None) -> None:
    first, second, message = OTHERS[other]
    async with running() as at:
        await at.open("a", batch_size=4)
        applied = await sent(at, first, expected=expected)
        state = (await at.state("a"))["sum"]
        caught = await fails(sent(at, second, expected=expected), InvalidInput)
        assert caught.message.startswith(
            f"request_id must be new for a different change of session 'a': {message}"
        )
        assert np.array_equal((await at.state("a"))["sum"], state)
        again = await sent(at, first, expected=expected)
        assert again.replayed
        assert (again.revision, again.position) == (applied.revision, applied.position)
        later = await sent(at, second, request_id=8, expected=None if expected is None else 1)
        assert not later.replayed


@pytest.mark.parametrize("expected", [None, 0, 1])
@pytest.mark.parametrize("other", OTHERS)
async def test_another_change_is_refused_also_where_its_revision_fits(
    other: str, expected: int | None
) -> None:
    first, second, message = OTHERS[other]
    async with running() as at:
        await at.open("a", batch_size=4)
        await sent(at, first, expected=0)
        state = (await at.state("a"))["sum"]
        await fails(sent(at, second, expected=expected), InvalidInput, message)
        assert np.array_equal((await at.state("a"))["sum"], state)
        await fails(sent(at, second, expected=2), RevisionConflict)
        later = await sent(at, first, expected=1)
        assert (later.revision, later.replayed) == (2, False)


@BOTH_WAYS
@pytest.mark.parametrize("way", ["alone", "with others", "in slices", "in line", "in a pass"])
async def test_a_step_that_fits_is_refused_whichever_way_it_would_run(way: str, threads: bool) -> None:
    """On the short way of a lone step, in a pass with others, cut into slices, and while others are at work."""
    async with running(threads=threads, steps=1) as at:
        await at.open("a", "b")
        times = [5] if way == "in slices" else []
        value = x(1, *times, seed=1)
        await at.step("a", value, expected=0, request_ids=7)
        state = (await at.state("a"))["sum"].tobytes()
        again: dict[str, Any] = {"expected": 1, "request_ids": 7}
        if way == "with others":
            refused, applied = await at.submit(
                ["a", "b"], np.concatenate([value + 1, value]), expected=[1, 0], request_ids=[7, 8]
            ).all()
            assert not isinstance(applied, ServerError)
            assert isinstance(refused, InvalidInput)
        elif way == "in line":
            # judged when the change before it has ended: that one has the id then
            before = at.submit("a", value, expected=1, request_ids=9)
            behind = at.submit("a", value + 1, expected=2, request_ids=9)
            assert (await before.only()).revision == 2
            await fails(behind.only(), InvalidInput)
            return
        elif way == "in a pass":
            other = await at.begin_pass("b", value, expected=0, request_ids=8) if threads else None
            refused_answers = at.submit("a", value + 1, **again)
            at.hooks.open_gate()
            await fails(refused_answers.only(), InvalidInput)
            if other is not None:
                await other.only()
        else:
            await fails(at.step("a", value + 1, **again), InvalidInput)
        assert (await at.state("a"))["sum"].tobytes() == state
        applied_again = await at.step("a", value, **again)
        assert (applied_again.revision, applied_again.replayed) == (2, False)


async def test_the_same_change_is_replayed_whichever_way_it_comes() -> None:
    """Alone, in a frame with others, with other columns beside it, as float64, cut from a larger array."""
    rng = np.random.default_rng(5)
    async with running() as at:
        names = [f"s{number}" for number in range(9)]
        sizes = rng.integers(1, 4, len(names))
        for name, size in zip(names, sizes.tolist(), strict=True):
            await at.open(name, batch_size=size)
        values = rng.standard_normal((int(sizes.sum()), 3, 2)).astype(np.float32)
        masks = rng.random((len(values), 3)) < 0.5
        ends = np.cumsum(sizes)
        own = [slice(end - size, end) for size, end in zip(sizes.tolist(), ends.tolist(), strict=True)]
        requests = np.arange(1, len(names) + 1, dtype=np.uint64)

        async def step(which: list[int], inputs: Any, mask: Any, states: Select = Select.LAST) -> list[Any]:
            change = at.submit(
                [names[place] for place in which],
                inputs,
                sizes=[int(sizes[place]) for place in which],
                request_ids=requests[which],
                reset_rows=mask,
                states=states,
            )
            return list(await change.all())

        def part(which: list[int]) -> tuple[Any, Any]:
            return (
                np.concatenate([values[own[place]] for place in which]),
                np.concatenate([masks[own[place]] for place in which]).reshape(-1),
            )

        first = await step([*range(9)], values, masks.reshape(-1))
        assert not any(reply.replayed for reply in first)
        for which in ([0], [3], [8], [2, 1], [*range(8, -1, -1)], [0, 4, 8]):
            inputs, mask = part(which)
            again = await step(which, inputs.astype(np.float64), mask)
            assert all(reply.replayed for reply in again), which
        (refused,) = await step([0], part([0])[0] * 2, part([0])[1])
        assert isinstance(refused, InvalidInput)


@pytest.mark.parametrize("count", [80, 1024])
@pytest.mark.parametrize("expected", [None, 0, 1])
async def test_only_the_members_with_other_content_are_refused(count: int, expected: int | None) -> None:
    async with running(resident_rows=count) as at:
        names = [f"s{number}" for number in range(count)]
        await at.engine.open_sessions("plain", session_ids=names)
        values, requests = x(count, seed=3), np.arange(1, count + 1, dtype=np.uint64)
        await at.submit(names, values, request_ids=requests).all()
        other = values.copy()
        other[::2] += 1
        revisions = None if expected is None else [expected] * count
        answers = await at.submit(names, other, request_ids=requests, expected=revisions).all()
        for member, found in enumerate(answers):
            if member % 2:
                assert not isinstance(found, ServerError)
                assert (found.replayed, found.revision) == (expected != 1, 1 + (expected == 1))
            else:
                assert isinstance(found, InvalidInput)
                info = await at.engine.session_info(names[member])
                assert (info.revision, info.position) == (1, 1)


Call = Callable[[Harness], Any]
OPEN = {"model": "plain", "session_id": "b", "request_id": 5}


def opening(**said: Any) -> Call:
    fields = {**OPEN, **said}
    return lambda at: at.engine.open_session(
        fields["model"], **{k: v for k, v in fields.items() if k != "model"}
    )


OPENINGS: dict[str, tuple[Call, Call, str]] = {
    "another batch size": (opening(), opening(batch_size=2), "an opening with other content"),
    "a state": (opening(), opening(state={"": x(1)}), "an opening with other content"),
    "another state": (
        opening(state={"": x(1)}),
        opening(state={"": x(1) + 1}),
        "an opening with other content",
    ),
    "a limit": (opening(), opening(max_idle_ms=5000), "an opening with other content"),
    "another model": (opening(), opening(model="plain@1"), "an opening with other content"),
    "a fork": (
        opening(),
        lambda at: at.engine.fork("a", new_session_id="b", request_id=5),
        "an opening, and a fork came",
    ),
    "an opening of many": (
        opening(batch_size=2),
        lambda at: at.engine.open_sessions("plain", session_ids=["b"], request_id=5),
        "an opening with other content",
    ),
    "forks": (
        opening(),
        lambda at: at.engine.fork_sessions(["a"], new_session_ids=["b"], request_id=5),
        "an opening, and a fork came",
    ),
    "a fork of another one": (
        lambda at: at.engine.fork("a", new_session_id="b", request_id=5),
        lambda at: at.engine.fork("c", new_session_id="b", request_id=5),
        "a fork with other content",
    ),
    "forks of others": (
        lambda at: at.engine.fork_sessions(["a"], new_session_ids=["b"], request_id=5),
        lambda at: at.engine.fork_sessions(["c"], new_session_ids=["b"], request_id=5),
        "a fork with other content",
    ),
    "an opening in place of a fork": (
        lambda at: at.engine.fork("a", new_session_id="b", request_id=5),
        opening(),
        "a fork, and an opening came",
    ),
}


@pytest.mark.parametrize("other", OPENINGS)
async def test_another_opening_with_a_request_id_is_refused(other: str) -> None:
    first, second, message = OPENINGS[other]
    async with running() as at:
        await at.open("a", "c")
        made = await first(at)
        caught = await fails(second(at), InvalidInput)
        assert f"of session 'b': it stands for {message}" in caught.message
        again = await first(at)
        assert again.replayed
        if isinstance(made, OpenResult):
            assert again.session.uid == made.session.uid
        assert len((await at.engine.list_sessions())[0]) == 3


async def test_errors_of_members_are_those_of_the_server(at: Harness) -> None:
    await at.open("a")
    await at.step("a", x(1), request_ids=np.array([7], np.uint64))
    caught = await fails(at.step("a", x(1) + 1, request_ids=np.array([7], np.uint64)), ServerError)
    assert caught.reason == "INVALID_INPUT"
