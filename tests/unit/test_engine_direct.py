"""Single steps without jobs: which changes run at once, and which go through a pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell_server.core.callers import ANYBODY
from stepwell_server.core.scheduler import ALL_CALLERS, source_of
from stepwell_server.engine.api import Select
from stepwell_server.engine.change import Change
from stepwell_server.engine.intake import admission
from stepwell_server.engine.intake.validation import Validation
from stepwell_server.engine.job import Job
from stepwell_server.errors import Internal, InvalidInput, MessageTooLarge
from support.checks.model_of_sessions import initial, ran
from support.engine.fake_executor import BAD, BROKEN, PLAIN
from support.engine.harness import Answer, Answers, FixedCost, Harness, kinds, running, x

IDS = ["a", "b", "c", "d", "e"]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each job that was made."""
    made: list[int] = []

    class Counted(Job):
        def __post_init__(self) -> None:
            super().__post_init__()
            made.append(self.row_count)

    monkeypatch.setattr(admission, "Job", Counted)
    return made


async def opened(at: Harness) -> None:
    await at.engine.open_sessions("plain", session_ids=IDS)


def frame(at: Harness, ids: list[str], value: np.ndarray, **fields: Any) -> Answers:
    """Steps of as many connections, in one change."""
    answers = Answers([1] * len(ids))
    change = Change(ids, answers, inputs={"": value}, connections=[f"of {name}" for name in ids], **fields)
    at.engine.submit(change)
    return answers


@pytest.mark.stores("memory", "async", "sync", "fake_shared")
@pytest.mark.parametrize("count", [1, 2, 5])
async def test_plain_steps_run_without_a_job(at: Harness, jobs: list[int], count: int) -> None:
    await opened(at)
    states = initial(count)
    for turn in range(3):
        value = x(count, seed=turn)
        answers = await frame(
            at,
            IDS[:count],
            value,
            expected=np.full(count, turn, np.uint64),
            request_ids=np.arange(1, count + 1, dtype=np.uint64) + np.uint64(100 * turn),
        ).all()
        outputs, states = ran(states, value)
        for place, answer in enumerate(answers):
            assert isinstance(answer, Answer), answer
            assert (answer.revision, answer.position, answer.replayed) == (turn + 1, turn + 1, False)
            assert answer.outputs["y"].tobytes() == outputs[place].tobytes()
            assert (await at.state(IDS[place]))["sum"].tobytes() == states[place].tobytes()
    assert not jobs
    assert at.events.passes == [(count, 1)] * 3
    assert at.events.changes == [("step", count, count)] * 3


@pytest.mark.stores("memory")
@pytest.mark.parametrize(
    ("seconds", "other", "runs_at_once"),
    [
        pytest.param(0.7e-3, None, True, id="nobody else"),
        pytest.param(0.9e-3, None, False, id="too long"),
        pytest.param(0.7e-3, "e", False, id="another connection"),
        pytest.param(0.7e-3, "z", False, id="another model"),
        pytest.param(0.3e-3, "z", True, id="short beside another model"),
    ],
)
async def test_a_longer_step_runs_at_once_while_nobody_else_is_active(
    jobs: list[int], seconds: float, other: str | None, runs_at_once: bool
) -> None:
    async with running({"plain": PLAIN, "other": PLAIN}) as at:
        await opened(at)
        await at.engine.open_sessions("other", session_ids=["z"])
        for model in at.internals.models:
            model.cost = FixedCost(seconds, 4)
        at.clock.advance(1)
        for is_over in (False, True):
            await at.submit(IDS[:4], x=x(4), connection="mine").all()
            if other is not None and not is_over:
                await at.submit([other], x=x(1), connection="theirs").all()
            jobs.clear()
            assert kinds(await at.submit(IDS[:4], x=x(4), connection="mine").all()) == ["Answer"] * 4
            assert bool(jobs) is not (runs_at_once or (is_over and other is not None))
            at.clock.advance(1)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The members of each change that was checked."""
    seen: list[int] = []
    check = Validation.check

    def counted(self: Validation, change: Change) -> Any:
        seen.append(change.size)
        return check(self, change)

    monkeypatch.setattr(Validation, "check", counted)
    return seen


@pytest.mark.stores("memory", "sync")
@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        pytest.param({}, "Answer", id="plain"),
        pytest.param({"select": Select.NONE}, "Answer", id="no outputs"),
        pytest.param({"inputs": {"x": x(2, 1)}}, "Answer", id="a time axis"),
    ],
)
async def test_a_plain_step_is_checked_once(
    at: Harness, checks: list[int], fields: dict[str, Any], wanted: str
) -> None:
    await opened(at)
    assert kinds(await at.submit(["a", "b"], **({"x": x(2)} | fields)).all()) == [wanted] * 2
    assert not checks


@pytest.mark.stores("memory", "sync")
@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        pytest.param({"output_names": ["y"]}, ["Answer"] * 2, id="names of outputs"),
        pytest.param(
            {"expected": [2**64 - 1, 0]}, ["RevisionConflict", "Answer"], id="a revision that no session has"
        ),
        pytest.param(
            {"x": np.array([[1, np.inf], [1, 1]])},
            ["InvalidInput", "Answer"],
            id="a number that is not finite",
        ),
        pytest.param({"batch_sizes": [1, 2], "x": x(3)}, ["Answer", "InvalidInput"], id="a size"),
    ],
)
async def test_a_step_that_may_be_wrong_is_checked(
    at: Harness, checks: list[int], fields: dict[str, Any], wanted: list[str]
) -> None:
    await opened(at)
    sizes = {"sizes": fields["batch_sizes"]} if "batch_sizes" in fields else {}
    assert kinds(await at.submit(["a", "b"], **({"x": x(2)} | fields), **sizes).all()) == wanted
    assert checks == [2]


@pytest.mark.stores("memory")
async def test_a_step_whose_reply_is_too_large_is_refused(at: Harness, checks: list[int]) -> None:
    await opened(at)
    with pytest.raises(MessageTooLarge):
        at.submit(["a", "b"], x(2), reply_limit=1)
    assert checks == [2]
    assert (await at.engine.session_info("a")).revision == 0


def repeated(at: Harness) -> Answers:
    return frame(at, ["a", "b", "a"], x(3))


def late(at: Harness) -> Answers:
    return frame(at, ["a", "b"], x(2), deadlines=np.array([0.0, np.inf]), deadline=0.0)


def left(at: Harness) -> Answers:
    answers = Answers([1, 1])
    answers.is_cancelled = True
    at.engine.submit(Change(["a", "b"], answers, inputs={"": x(2)}))
    return answers


@pytest.mark.stores("memory")
@pytest.mark.parametrize(
    ("submit", "wanted", "rows"),
    [
        pytest.param(lambda at: at.submit(["a", "b"], x(2, 3)), ["Answer"] * 2, [2], id="time steps"),
        pytest.param(
            lambda at: at.submit(["a", "b"], x(2), states=Select.LAST), ["Answer"] * 2, [2], id="states"
        ),
        pytest.param(
            lambda at: at.submit(["a", "b"], x(2), reset_rows=np.array([True, False])),
            ["Answer"] * 2,
            [2],
            id="resets",
        ),
        pytest.param(
            lambda at: at.submit(["a", "b"], x(2), expected=[0, 7]),
            ["Answer", "RevisionConflict"],
            [1],
            id="a conflict",
        ),
        pytest.param(
            lambda at: at.submit(["wide", "a"], x(3), sizes=[2, 1]), ["Answer"] * 2, [3], id="several rows"
        ),
        pytest.param(repeated, ["Answer"] * 3, [2, 1], id="a session twice"),
        pytest.param(late, ["DeadlineExceeded", "Answer"], [2], id="a deadline"),
        pytest.param(left, ["Unavailable"] * 2, [2], id="nobody waits"),
    ],
)
async def test_what_is_not_plain_goes_through_a_pass(
    at: Harness, jobs: list[int], submit: Any, wanted: list[str], rows: list[int]
) -> None:
    await opened(at)
    await at.open("wide", batch_size=2)
    assert kinds(await submit(at).all()) == wanted
    assert jobs == rows


@pytest.mark.stores("memory", "async")
async def test_a_step_that_was_sent_again_gets_the_first_answer(at: Harness, jobs: list[int]) -> None:
    await opened(at)
    sent = {"expected": np.zeros(2, np.uint64), "request_ids": np.array([4, 5], np.uint64)}
    first, again = [await frame(at, ["a", "b"], x(2), **sent).all() for _ in range(2)]
    for one, two in zip(first, again, strict=True):
        assert isinstance(one, Answer)
        assert isinstance(two, Answer)
        assert (two.replayed, two.revision) == (True, 1)
        assert one.outputs["y"].tobytes() == two.outputs["y"].tobytes()
    assert not jobs


@pytest.mark.stores("memory")
@pytest.mark.engine(threads=True)
async def test_a_busy_session_keeps_its_turn(at: Harness, jobs: list[int]) -> None:
    await opened(at)
    first = await at.begin_pass("a", x(1, 3))
    others = frame(at, ["a", "b"], x(2, seed=1))
    at.hooks.open_gate()
    assert (await first.only()).revision == 1
    assert [answer.revision for answer in await others.all() if isinstance(answer, Answer)] == [2, 1]
    assert jobs[0] == 1


@pytest.mark.stores("memory", "sync")
async def test_only_the_session_at_fault_fails(at: Harness) -> None:
    await opened(at)
    value = x(3)
    value[1, 0] = BAD
    assert kinds(await frame(at, IDS[:3], value).all()) == ["Answer", InvalidInput.__name__, "Answer"]
    assert [(await at.engine.session_info(name)).revision for name in IDS[:3]] == [1, 0, 1]


@pytest.mark.stores("memory", "sync")
async def test_a_program_that_breaks_changes_nothing(at: Harness) -> None:
    await opened(at)
    value = x(2)
    value[0, 0] = BROKEN
    before = (await at.state("b"))["sum"].tobytes()
    assert kinds(await frame(at, ["a", "b"], value).all()) == [Internal.__name__] * 2
    assert (await at.state("b"))["sum"].tobytes() == before
    assert kinds(await frame(at, ["a", "b"], x(2)).all()) == ["Answer"] * 2


@pytest.mark.stores("memory")
async def test_the_scheduler_knows_who_stepped(at: Harness) -> None:
    await opened(at)
    ready, now = at.internals.models[0].ready, at.clock.monotonic()
    await at.submit(["a", "b"], x(2), connection="one").all()
    assert ready.only_source(now) == source_of(ANYBODY, "one")
    await frame(at, ["c", "d"], x(2)).all()
    assert ready.only_source(now) is None
    assert ready.is_contended(now)
    at.clock.advance(1.0)
    await frame(at, ["c", "d"], x(2)).all()
    assert ready.only_source(at.clock.monotonic()) == ALL_CALLERS
