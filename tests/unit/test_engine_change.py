"""What a step may ask for beside its inputs, and whose turn it is when more waits than fits into a pass."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest

from stepwell_server.core.callers import ANYBODY, Caller, Role
from stepwell_server.core.scheduler import Scheduler, source_of
from stepwell_server.engine.api import Select
from stepwell_server.engine.change import Change, joined
from stepwell_server.errors import Internal, InvalidInput, Overloaded, RevisionConflict
from support.checks.model_of_sessions import initial, ran
from support.engine.fake_executor import BAD, RICH
from support.engine.harness import BOTH_WAYS, Answer, Answers, CallbackAnswers, Harness, fails, running, x
from support.stores.kinds import IN_PROCESS


@BOTH_WAYS
@pytest.mark.parametrize("steps", [0, 1, 4])
async def test_rows_of_the_mask_begin_anew_and_the_others_go_on(threads: bool, steps: int) -> None:
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
async def test_with_all_rows_in_the_mask_the_position_begins_anew_and_a_retry_is_the_same_change(
    threads: bool,
) -> None:
    async with running(threads=threads) as at:
        await at.open("a")
        await at.step("a", x(1, 5))
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
async def test_steps_with_and_without_a_mask_of_one_turn_are_each_right(at: Harness) -> None:
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


@IN_PROCESS  # Valkey may answer a later pass first
@pytest.mark.engine(threads=True, max_batch_rows=4, resident_rows=64)
async def test_a_modest_caller_is_in_the_next_pass_whatever_a_greedy_one_has_sent(at: Harness) -> None:
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


@pytest.mark.stores("memory", "async", "sync")  # others are read anew for each, and the line is too long
@pytest.mark.engine(threads=True, max_batch_rows=64, resident_rows=4)
async def test_steps_of_one_session_that_all_conflict_are_each_answered(at: Harness) -> None:
    await at.open("a", "busy")
    await at.begin_pass("busy", x(1))
    waiting = [at.single("a", x(1), expected=7) for _ in range(1500)]
    at.hooks.open_gate()
    for answers in waiting:
        await fails(answers.only(), RevisionConflict)


@pytest.mark.parametrize("where", ["intake.admission.Job", "passes.loop.Pass"])
@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
async def test_to_run_out_of_memory_is_too_much_at_once_and_harms_no_session(
    where: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_arguments: object, **_named: object) -> None:
        raise error

    async with running() as at:
        await at.open("a", "b")
        monkeypatch.setattr(f"stepwell_server.engine.{where}", breaks)
        answers = await at.submit(["a", "b"], x(2)).all()
        monkeypatch.undo()
        kind = Overloaded if error is MemoryError else Internal
        assert [type(answer) for answer in answers] == [kind, kind]
        assert (await at.submit(["a", "b"], x(2), expected=[0, 0]).all())[0] != answers[0]
        assert (await at.engine.session_info("a")).revision == 1


async def test_a_caller_who_cannot_be_told_of_a_reset_costs_nobody_else() -> None:
    def raises(_answer: object) -> None:
        raise RuntimeError("nobody is there")

    async with running() as at:
        await at.open("a")
        at.engine.submit(Change(["a"], CallbackAnswers(raises), reset=True))
        assert (await at.submit("a", reset=True).only()).revision == 2
