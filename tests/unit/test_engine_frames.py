"""Frames: many sessions in one message, each with a fate of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell_server.errors import InvalidInput, ServerError, SessionNotFound
from support.checks.model_of_sessions import initial, ran
from support.engine.fake_executor import BAD, PLAIN
from support.engine.harness import Answer, Harness, kinds, x

SIZES = {"a": 1, "b": 3, "c": 2, "d": 1}


def stepped(state: np.ndarray, value: np.ndarray) -> np.ndarray:
    return ran(state, value)[0]


async def opened(at: Harness) -> None:
    for session_id, size in SIZES.items():
        await at.open(session_id, batch_size=size)


def bytes_of(answer: Answer | ServerError) -> bytes:
    assert isinstance(answer, Answer)
    data: bytes = answer.outputs["y"].tobytes()
    return data


@pytest.mark.parametrize("order", ["abcd", "dcba", "bd", "cab"])
@pytest.mark.parametrize("steps", [None, 1, 4])
@pytest.mark.parametrize("said", [False, True])
@pytest.mark.engine(threads=True, max_batch_rows=4)
async def test_sessions_of_mixed_batch_sizes_share_a_frame(
    order: str, steps: int | None, said: bool, at: Harness
) -> None:
    await opened(at)
    sizes = [SIZES[name] for name in order]
    value = x(sum(sizes), *([] if steps is None else [steps]))
    batch_sizes = sizes if said else None
    answers = await at.submit(list(order), value, sizes=sizes, batch_sizes=batch_sizes).all()
    low = 0
    for size, answer in zip(sizes, answers, strict=True):
        wanted = stepped(initial(size), value[low : low + size])
        assert bytes_of(answer) == wanted.tobytes()
        low += size


@pytest.mark.parametrize("gone", [[0], [1], [3], [0, 2], [1, 2, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("reset", [False, True])
async def test_sessions_that_are_gone_shift_nobodys_rows(gone: list[int], reset: bool, at: Harness) -> None:
    await opened(at)
    ids = [f"gone-{name}" if i in gone else name for i, name in enumerate(SIZES)]
    sizes = list(SIZES.values())
    value = x(sum(sizes))
    how: dict[str, Any] = {"reset": True, "state": {"": value}} if reset else {"x": value}
    answers = await at.submit(ids, sizes=sizes, batch_sizes=sizes, **how).all()
    low = 0
    for member, (session_id, size) in enumerate(zip(ids, sizes, strict=True)):
        own, low, answer = value[low : low + size], low + size, answers[member]
        if member in gone:
            assert isinstance(answer, SessionNotFound)
            assert answer.session_id == session_id
        elif reset:
            assert (await at.state(session_id))["sum"].tobytes() == own.tobytes()
        else:
            assert bytes_of(answer) == stepped(initial(size), own).tobytes()


async def test_one_that_is_gone_shifts_nobody_even_if_sizes_are_not_said(at: Harness) -> None:
    await opened(at)
    value = x(1 + 5 + 2)
    answers = await at.submit(["a", "nobody", "c"], value, sizes=[1, 5, 2]).all()
    assert kinds(answers) == ["Answer", "SessionNotFound", "Answer"]
    assert bytes_of(answers[0]) == stepped(initial(1), value[:1]).tobytes()
    assert bytes_of(answers[2]) == stepped(initial(2), value[6:]).tobytes()


async def test_several_ended_sessions_without_sizes_have_one_row_each(at: Harness) -> None:
    await opened(at)
    answers = await at.submit(["g", "a", "h"], x(3)).all()
    assert kinds(answers) == ["SessionNotFound", "Answer", "SessionNotFound"]
    assert bytes_of(answers[1]) == stepped(initial(1), x(3)[1:2]).tobytes()


@pytest.mark.parametrize("sizes", [[1, 0], [0, 1], [2, -1], [2**62, -(2**62) + 1], [2**63 - 1, 2]])
@pytest.mark.parametrize("value", [x(1), np.full((1, 2), np.nan)], ids=["finite", "nan"])
async def test_batch_sizes_that_cannot_be_are_refused(
    sizes: list[int], value: np.ndarray, at: Harness
) -> None:
    await at.open("a", "d")
    with pytest.raises(InvalidInput, match=r"^batch_sizes must be 1 to"):
        at.submit(["a", "d"], value, batch_sizes=sizes)


@pytest.mark.parametrize(
    ("dtype", "number", "says"),
    [
        (np.float32, np.nan, "got nan at index [1, 1, 0]"),
        (np.float64, 1e39, "must fit float32; got 1e+39 at index [1, 1, 0]"),
    ],
)
async def test_members_with_bad_numbers_fail_alone(
    dtype: type[Any], number: float, says: str, at: Harness
) -> None:
    await opened(at)
    value = x(7, 2).astype(dtype)
    value[2, 1, 0] = number
    value[6, 0, 1] = np.inf
    answers = await at.submit(list("abcd"), sizes=[1, 3, 2, 1], inputs={"": value}).all()
    assert kinds(answers) == ["Answer", "InvalidInput", "Answer", "InvalidInput"]
    assert says in str(answers[1])
    assert "finite numbers within float32's range; got inf at index [0, 0, 1]" in str(answers[3])
    assert bytes_of(answers[2]) == stepped(initial(2), value[4:6].astype(np.float32)).tobytes()


async def test_states_that_are_not_finite_fail_alone(at: Harness) -> None:
    await opened(at)
    value = x(7)
    value[3, 0] = np.inf
    answers = await at.submit(list("abcd"), sizes=[1, 3, 2, 1], reset=True, state={"sum": value}).all()
    assert kinds(answers) == ["Answer", "InvalidInput", "Answer", "Answer"]
    assert "state 'sum' must hold finite numbers" in str(answers[1])
    assert (await at.state("c"))["sum"].tobytes() == value[4:6].tobytes()
    assert (await at.state("b"))["sum"].tobytes() == initial(3).tobytes()


@pytest.mark.engine(threads=True)
async def test_each_member_is_judged_for_itself(at: Harness) -> None:
    await at.open(*"abcdef")
    first = x(6)
    before = await at.submit(list("abcdef"), first, request_ids=range(11, 17)).all()
    await at.begin_pass("f", x(1, seed=1), expected=1)
    value = x(7, seed=2)
    value[1] = first[1]  # what b was sent before: its request id stands for that
    value[4, 0] = BAD
    #        a: new    b: again   c: stale   gone      d: new     e: bad      f: waits in line
    ids = ["a", "b", "c", "gone", "e", "d", "f"]
    frame = at.submit(
        ids,
        value,
        expected=[1, 0, 0, 0, 1, 1, 2],
        request_ids=[21, 12, 22, 23, 24, 25, 26],
        sizes=[1] * 7,
    )
    at.hooks.open_gate()
    answers = await frame.all()
    wanted = [
        "Answer",
        "Answer",
        "RevisionConflict",
        "SessionNotFound",
        "InvalidInput",
        "Answer",
        "Answer",
    ]
    assert kinds(answers) == wanted
    replayed = [answer.replayed for answer in answers if isinstance(answer, Answer)]
    assert replayed == [False, True, False, False]
    assert bytes_of(answers[1]) == bytes_of(before[1])
    revisions = {name: (await at.engine.session_info(name)).revision for name in "abcdef"}
    assert revisions == {"a": 2, "b": 1, "c": 1, "d": 2, "e": 1, "f": 3}
    for member in (0, 5):
        one = ids[member]
        _, start = ran(initial(1), first["abcdef".index(one)][None])
        assert bytes_of(answers[member]) == stepped(start, value[member][None]).tobytes()


@pytest.mark.engine(threads=True)
async def test_a_frame_of_resets_sets_each_session_to_its_own_rows(at: Harness) -> None:
    await opened(at)
    await at.begin_pass("b", x(3), sizes=[3])
    value = x(7, seed=3)
    # one waits in line, one is stale: the others' rows must not shift
    frame = at.submit(list("abcd"), sizes=[1, 3, 2, 1], reset=True, state={"": value}, expected=[0, 1, 5, 0])
    at.hooks.open_gate()
    assert kinds(await frame.all()) == ["Answer", "Answer", "RevisionConflict", "Answer"]
    for name, low, high in (("a", 0, 1), ("b", 1, 4), ("d", 6, 7)):
        assert (await at.state(name))["sum"].tobytes() == value[low:high].tobytes()
    assert (await at.state("c"))["sum"].tobytes() == initial(2).tobytes()


async def test_a_frame_of_resets_to_zero(at: Harness) -> None:
    await opened(at)
    await at.submit(list("abcd"), x(7), sizes=[1, 3, 2, 1]).all()
    for answer in await at.submit(list("ac"), sizes=[1, 2], reset=True).all():
        assert isinstance(answer, Answer)
        assert (answer.revision, answer.position, answer.outputs) == (2, 0, {})
    assert (await at.state("c"))["sum"].tobytes() == np.stack([PLAIN.initial[0]] * 2).tobytes()
    assert (await at.engine.session_info("b")).position == 1


@pytest.mark.parametrize("change", [{"reset": True}, {"x": x(2)}], ids=["reset", "step"])
async def test_rows_are_of_one_session(change: dict[str, Any], at: Harness) -> None:
    """A message cannot ask for rows of several. `test_refusals_sessions` has all other refusals."""
    await at.open("a", "d")
    with pytest.raises(InvalidInput, match=r"^rows must come with a single session; got 2 sessions"):
        await at.submit(["a", "d"], rows=[0], **change).require_all_applied()
    assert [(await at.engine.session_info(name)).revision for name in "ad"] == [0, 0]


@pytest.mark.engine({"plain": PLAIN, "other": PLAIN}, resident_rows=2)
async def test_two_models_do_not_share_passes_or_rows(at: Harness) -> None:
    await at.open("a", "b", model="plain")
    await at.open("c", "d", model="other")
    assert all([(await at.engine.session_info(name)).resident for name in "abcd"])
    assert [stats.sessions for stats in at.engine.stats()] == [2, 2]
    assert [info.name for info in at.engine.models()] == ["other", "plain"]
    answers = [at.submit(list(names), x(2)) for names in ("ab", "cd")]
    for each in answers:
        assert kinds(await each.all()) == ["Answer", "Answer"]
    assert sorted(at.events.passes) == [(2, 1), (2, 1)]


@pytest.mark.engine(max_session_idle_s=60, resident_rows=256)
async def test_members_gone_for_the_same_reason_share_an_error_that_names_each(at: Harness) -> None:
    expired = [f"e{i}" for i in range(40)]
    await at.open(*expired)
    at.clock.advance(61)
    await at.open("live")
    ids = [*expired, *(f"never{i}" for i in range(50)), "s-00000000-AAAAAAAAAAAAAAAAAAAAAA", "live"]
    answers = await at.submit(ids, x(len(ids))).all()
    wanted = [*["SessionExpired"] * 40, *["SessionNotFound"] * 50, "SessionLost", "Answer"]
    assert kinds(answers) == wanted
    assert len({id(answer) for answer in answers if isinstance(answer, ServerError)}) == 3
    assert "(and so for 49 others of the session_ids)" in str(getattr(answers[40], "message", ""))
