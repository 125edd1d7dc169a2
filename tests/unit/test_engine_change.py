"""The parts of a change: options of a step, fairness between callers, and request ids that stand for one change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest

from stepwell_server.core.callers import ANYBODY, Caller, Role
from stepwell_server.core.scheduler import ALL_CALLERS, Scheduler, source_of
from stepwell_server.engine.api import OpenResult, Select
from stepwell_server.engine.change import Awaited, Change, joined
from stepwell_server.engine.state.model import Model
from stepwell_server.errors import Internal, InvalidInput, Overloaded, RevisionConflict, ServerError
from support.checks.model_of_sessions import initial, ran
from support.engine.fake_executor import BAD, RICH
from support.engine.harness import BOTH_WAYS, Answer, Answers, CallbackAnswers, Harness, fails, running, x
from support.stores.kinds import IN_PROCESS


@BOTH_WAYS
@pytest.mark.parametrize("steps", [0, 1, 4])
async def test_rows_of_the_mask_restart_and_the_others_continue(threads: bool, steps: int) -> None:
    shape = (3, steps) if steps else (3,)
    async with running(threads=threads) as at:
        await at.open("a", batch_size=3)
        await at.step("a", x(3, seed=1))
        before = (await at.state("a"))["sum"]
        mask = np.array([True, False, True])
        answer = await at.step("a", x(*shape, seed=2), reset_rows=mask)
        outputs, state = ran(np.where(mask[:, None], initial(3), before), x(*shape, seed=2))
        assert answer.outputs["y"].tobytes() == outputs.tobytes()
        assert (await at.state("a"))["sum"].tobytes() == state.tobytes()
        assert (answer.revision, answer.position) == (2, 1 + max(1, steps))


@BOTH_WAYS
async def test_a_mask_of_all_rows_restarts_the_position_and_a_retry_is_the_same_change(
    threads: bool,
) -> None:
    async with running(threads=threads) as at:
        await at.open_and_step("a", x(1, 5))
        said: dict[str, Any] = {"reset_rows": np.ones(1, np.bool_), "expected": 1, "request_ids": 9}
        first = await at.step("a", x(1, 3, seed=2), **said)
        again = await at.step("a", x(1, 3, seed=2), **said)
        assert (first.revision, first.position, first.replayed) == (2, 3, False)
        assert (again.revision, again.position, again.replayed) == (2, 3, True)
        assert first.outputs["y"].tobytes() == again.outputs["y"].tobytes()
        assert first.outputs["y"].tobytes() == ran(initial(1), x(1, 3, seed=2))[0].tobytes()


@BOTH_WAYS
async def test_a_step_that_fails_resets_nothing(threads: bool) -> None:
    async with running(threads=threads) as at:
        await at.open("a", "b")
        await at.submit(["a", "b"], x(2)).all()
        before = await at.state("a")
        value = x(2, seed=3)
        value[0, 0] = BAD
        answers = await at.submit(["a", "b"], value, reset_rows=np.ones(2, np.bool_)).all()
        assert isinstance(answers[0], InvalidInput)
        assert isinstance(answers[1], Answer)
        assert answers[1].position == 1
        assert (await at.state("a"))["sum"].tobytes() == before["sum"].tobytes()
        assert (await at.engine.session_info("a")).position == 1


@pytest.mark.engine(threads=True)
async def test_steps_with_and_without_a_mask_in_one_pass_are_each_right(at: Harness) -> None:
    names = [f"s{i}" for i in range(6)]
    await at.open(*names, "busy")
    for name in names:
        await at.step(name, x(1, seed=1))
    await at.begin_pass("busy", x(1))
    waiting = [
        at.single(name, x(1, seed=2), reset_rows=np.array([i % 2 == 0])) for i, name in enumerate(names)
    ]
    at.hooks.open_gate()
    once = ran(initial(1), x(1, seed=1))[1]
    for i, answers in enumerate(waiting):
        answer = await answers.only()
        state = initial(1) if i % 2 == 0 else once
        assert answer.outputs["y"].tobytes() == ran(state, x(1, seed=2))[0].tobytes()
        assert answer.position == (1 if i % 2 == 0 else 2)


async def test_outputs_come_by_name_also_when_they_are_remembered() -> None:
    inputs = {"gain": np.array([3], np.float32), "token": np.array([2], np.int32), "x": x(1)}
    async with running({"rich": RICH}) as at:
        await at.open("a", "b", model="rich")
        everything = await at.single("a", None, inputs=inputs).only()
        some: dict[str, Any] = {"inputs": inputs, "request_id": 4, "output_names": ("head",)}
        one = await at.single("b", None, **some).only()
        again = await at.single("b", None, **some).only()
        assert again.replayed
        for answer in (one, again):
            assert list(answer.outputs) == ["head"]
            assert answer.outputs["head"].tobytes() == everything.outputs["head"].tobytes()
        none = await at.single("b", None, inputs=inputs, output_names=("y",), select=Select.NONE).only()
        assert not none.outputs


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({}, id="all outputs"),
        pytest.param({"output_names": ("y",)}, id="names of outputs"),
        pytest.param({"states": Select.LAST}, id="states"),
        pytest.param({"states": Select.LAST, "state_rows": [0]}, id="rows of states"),
        pytest.param({"states": Select.LAST, "state_members": [0]}, id="members of states"),
        pytest.param({"reset_rows": np.array([True])}, id="a mask"),
    ],
)
@pytest.mark.engine(threads=True)
async def test_steps_that_became_one_change_are_replayed_alone(asked: dict[str, Any], at: Harness) -> None:
    await at.open("a", "b", "busy")
    await at.begin_pass("busy", x(1))

    def send(name: str) -> Answers:
        return at.single(name, x(1, seed=ord(name)), request_id=4, **asked)

    together = [send("a"), send("b")]
    at.hooks.open_gate()
    first = [await answers.only() for answers in together]
    again = [await send("a").only(), await send("b").only()]
    assert [(answer.replayed, answer.revision) for answer in again] == [(True, 1)] * 2
    for one, two in zip(first, again, strict=True):
        for found, expected in ((one.outputs, two.outputs), (one.states, two.states)):
            assert {name: array.tobytes() for name, array in found.items()} == {
                name: array.tobytes() for name, array in expected.items()
            }


@IN_PROCESS  # Valkey may answer a later pass first
@pytest.mark.engine(threads=True, max_batch_rows=4, resident_rows=64)
async def test_a_modest_caller_is_in_the_next_pass_despite_a_greedy_one(at: Harness) -> None:
    greedy = [f"g{i}" for i in range(20)]
    await at.open(*greedy, "modest", "busy")
    await at.begin_pass("busy", x(1))
    order: list[str] = []
    for name in [*greedy, "modest"]:
        told = CallbackAnswers(lambda _answer, name=name: order.append(name))  # type: ignore[misc]
        caller = "modest" if name == "modest" else "greedy"
        at.engine.submit(Change([name], told, inputs={"": x(1)}, connection=caller))
    at.hooks.open_gate()
    await at.settled()
    assert "modest" in order[:4]
    assert sorted(order) == sorted([*greedy, "modest"])


async def test_changes_that_become_one_say_of_each_member_who_asked_for_it() -> None:
    ann, bob = Caller("ann", "acme", Role.USER), Caller("bob", "zeta", Role.USER)
    async with running(threads=True, resident_rows=64) as at:
        await at.open("a", "b", "c", "busy")
        await at.begin_pass("busy", x(1))
        changes = [Change([name], Answers([1]), inputs={"": x(1)}, caller=who)
                   for name, who in (("a", ann), ("b", ann), ("c", bob))]  # fmt: skip
        for change in changes:
            at.engine.submit(change)
        alike, different = joined(changes[:2]), joined(changes)
        assert (alike.caller, alike.callers) == (ann, None)
        assert different.callers == [ann, ann, bob]
        at.hooks.open_gate()
        await at.settled()


@pytest.mark.engine(threads=True, resident_rows=64)
async def test_all_that_one_connection_sends_has_one_source(at: Harness) -> None:
    await at.open(*"abcdef", "busy")
    await at.begin_pass("busy", x(1))
    with mock.patch.object(Scheduler, "add", autospec=True, side_effect=Scheduler.add) as add:
        for names, caller in ((["a"], "here"), (["b"], "here"), (["c", "d"], "here")):
            inputs = {"": x(len(names))}
            at.engine.submit(Change(names, Answers([1] * len(names)), inputs=inputs, connection=caller))
        at.hooks.open_gate()
        await at.settled()
        sources = {call.args[1].source for call in add.call_args_list}
    assert sources == {source_of(ANYBODY, "here")}, "or it would have company of itself"


@pytest.mark.engine(threads=True, resident_rows=64)
async def test_steps_of_several_belong_together_while_they_fit_into_a_short_pass(
    at: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits behind more than that counts for whoever sent it: else they would wait as if one had sent all."""
    monkeypatch.setattr(Model, "rows_of_a_short_pass", property(lambda _model: 3))
    await at.open(*"abcdef", "busy")
    await at.begin_pass("busy", x(1))
    senders = ["one", "one", "two"]
    with mock.patch.object(Scheduler, "add", autospec=True, side_effect=Scheduler.add) as add:
        for names in ("abc", "def"):
            change = Change(list(names), Answers([1] * 3), inputs={"": x(3)}, connections=senders)
            at.engine.submit(change)
        at.hooks.open_gate()
        await at.settled()
        sources = [call.args[1].source for call in add.call_args_list]
    assert sources == [ALL_CALLERS, source_of(ANYBODY, "one"), source_of(ANYBODY, "two")]


@pytest.mark.stores("memory", "async", "sync")  # others are read anew for each, and the line is too long
@pytest.mark.engine(threads=True, max_batch_rows=64, resident_rows=4)
async def test_steps_of_one_session_that_all_conflict_are_each_answered(at: Harness) -> None:
    await at.open("a", "busy")
    await at.begin_pass("busy", x(1))
    waiting = [at.single("a", x(1), expected=7) for _ in range(1500)]
    at.hooks.open_gate()
    for answers in waiting:
        await fails(answers.only(), RevisionConflict)


@pytest.mark.parametrize("where", ["intake.admission.Job", "passes.loop.Pass", "passes.direct.Outcome"])
@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
async def test_to_run_out_of_memory_is_too_much_at_once_and_harms_no_session(
    where: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_arguments: object, **_named: object) -> None:
        raise error

    inputs = x(2) if "direct" in where else x(2, 3)
    async with running() as at:
        await at.open("a", "b")
        monkeypatch.setattr(f"stepwell_server.engine.{where}", breaks)
        answers = await at.submit(["a", "b"], inputs).all()
        monkeypatch.undo()
        kind = Overloaded if error is MemoryError else Internal
        assert [type(answer) for answer in answers] == [kind, kind]
        assert (await at.submit(["a", "b"], x(2), expected=[0, 0]).all())[0] != answers[0]
        assert (await at.engine.session_info("a")).revision == 1


async def test_a_failing_callback_of_a_reset_affects_no_other_caller() -> None:
    def raises(_answer: object) -> None:
        raise RuntimeError("nobody is there")

    async with running() as at:
        await at.open("a")
        at.engine.submit(Change(["a"], CallbackAnswers(raises), reset=True))
        assert (await at.submit("a", reset=True).only()).revision == 2


KIND, CONTENT = "it belongs to a step; got a reset", "it belongs to a step with other content"
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
    "a step": ({"reset": True}, FIRST, "it belongs to a reset; got a step"),
    "other states": (
        {"reset": True, "state": {"": X}},
        {"reset": True, "state": {"": X + 1}},
        "it belongs to a reset with other content",
    ),
    "the initial state": (
        {"reset": True, "state": {"": X}},
        {"reset": True},
        "it belongs to a reset with other content",
    ),
    "other rows reset": (
        {"reset": True, "rows": [0]},
        {"reset": True, "rows": [1]},
        "it belongs to a reset with other content",
    ),
    "another position": (
        {"reset": True, "position": 4},
        {"reset": True, "position": 5},
        "it belongs to a reset with other content",
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
        "an opening; got a fork",
    ),
    "an opening of many": (
        opening(batch_size=2),
        lambda at: at.engine.open_sessions("plain", session_ids=["b"], request_id=5),
        "an opening with other content",
    ),
    "forks": (
        opening(),
        lambda at: at.engine.fork_sessions(["a"], new_session_ids=["b"], request_id=5),
        "an opening; got a fork",
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
        "a fork; got an opening",
    ),
}


@pytest.mark.parametrize("other", OPENINGS)
async def test_another_opening_with_a_request_id_is_refused(other: str) -> None:
    first, second, message = OPENINGS[other]
    async with running() as at:
        await at.open("a", "c")
        made = await first(at)
        caught = await fails(second(at), InvalidInput)
        assert f"of session 'b': it belongs to {message}" in caught.message
        again = await first(at)
        assert again.replayed
        if isinstance(made, OpenResult):
            assert again.session.uid == made.session.uid
        assert len((await at.engine.list_sessions())[0]) == 3


async def test_errors_of_members_are_those_of_the_server(at: Harness) -> None:
    await at.open_and_step("a", x(1), request_ids=np.array([7], np.uint64))
    caught = await fails(at.step("a", x(1) + 1, request_ids=np.array([7], np.uint64)), ServerError)
    assert caught.reason == "INVALID_INPUT"
