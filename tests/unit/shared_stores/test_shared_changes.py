"""Two servers on one store: whoever is slower reads what the other wrote, and judges again by it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import Select
from stepwell_server.errors import (
    InvalidInput,
    OutcomeUnknown,
    RevisionConflict,
    SessionExists,
    SessionGone,
    SessionNotFound,
    Unavailable,
)
from stepwell_server.store.base import Batch
from support.checks.model_of_sessions import traced
from support.engine.harness import Answer, Harness, fails, kinds, running, x
from support.engine.two_engines import held, make_resident_on_both, tombstone, two
from support.stores.durable import same_reply, start_task
from support.stores.kinds import SHARED

pytestmark = SHARED


SHAPES = pytest.mark.parametrize("shape", ["lone", "frame", "long", "traced", "reset"])


def change(at: Harness, shape: str, **fields: Any) -> Any:
    if shape == "reset":
        return at.submit("a", reset=True, **fields)
    if shape == "traced":
        fields |= {"states": Select.ALL, "reset_rows": np.array([False, True, False])}
    return at.submit("a", x(1, 3, seed=5) if shape in {"long", "traced"} else x(1, seed=5), **fields)


@SHAPES
async def test_a_retry_on_another_server_gets_the_first_answer(shape: str) -> None:
    async with two(threads=shape == "frame") as (first, second):
        await make_resident_on_both(first, second, "a")
        applied = await change(first, shape, expected=1, request_ids=9).only()
        again = await change(second, shape, expected=1, request_ids=9).only()
        same_reply(again, applied)
        assert (await second.engine.session_info("a")).revision == 2
        await same_state(first, second)


@SHAPES
async def test_another_change_meets_the_revision_that_the_store_has(shape: str) -> None:
    async with two(threads=shape == "frame") as (first, second):
        await make_resident_on_both(first, second, "a")
        await first.step("a", x(1), expected=1, request_ids=9)
        refused = await fails(change(second, shape, expected=1, request_ids=10).only(), RevisionConflict)
        assert (refused.expected, refused.actual) == (1, 2)
        assert (await change(second, shape, expected=2, request_ids=11).only()).revision == 3


@SHAPES
@pytest.mark.parametrize("expected", [None, 1, 2])
async def test_a_request_id_of_another_change_elsewhere_is_refused(shape: str, expected: int | None) -> None:
    """By the server that made the change, and by one whose copy is older; nothing changes."""
    async with two(threads=shape == "frame") as (first, second):
        await make_resident_on_both(first, second, "a")
        await first.step("a", x(1, seed=8), expected=1, request_ids=9)
        state = (await first.state("a"))["sum"].tobytes()
        for at in (second, first):
            await fails(
                change(at, shape, expected=expected, request_ids=9).only(),
                InvalidInput,
                "it belongs to a step",
            )
            assert (await at.engine.session_info("a")).revision == 2
            assert (await at.state("a"))["sum"].tobytes() == state
        assert (await second.step("a", x(1, seed=8), expected=2, request_ids=9)).revision == 3


@SHAPES
async def test_an_older_copy_refuses_no_request_id_by_itself(shape: str) -> None:
    """What the store has decides: there the id is no longer that of the last change."""
    async with two(threads=shape == "frame") as (first, second):
        await make_resident_on_both(first, second, "a")
        await first.step("a", x(1, seed=8), expected=1, request_ids=9)
        await second.state("a")
        await first.step("a", x(1, seed=8), expected=2, request_ids=10)
        refused = await fails(change(second, shape, expected=2, request_ids=9).only(), RevisionConflict)
        assert refused.actual == 3


async def test_a_change_without_an_expected_revision_applies_to_the_stored_session(
    first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    for _ in range(3):
        await first.step("a", x(1))
    answer = await second.step("a", x(1, seed=3))
    assert answer.revision == 5
    other = await first.step("a", x(1, seed=4))
    assert other.revision == 6
    reference = await alone([x(1)] * 4, x(1, seed=3), x(1, seed=4))
    assert answer.outputs["y"].tobytes() == reference[4].tobytes()
    assert other.outputs["y"].tobytes() == reference[5].tobytes()


async def same_state(first: Harness, second: Harness, session_id: str = "a") -> None:
    """Check that a session of the second server has the state of `a` of the first."""
    assert (await second.state(session_id))["sum"].tobytes() == (await first.state("a"))["sum"].tobytes()


async def alone(*steps: Any) -> list[Any]:
    inputs = [each for step in steps for each in (step if isinstance(step, list) else [step])]
    async with running() as at:
        await at.open("a")
        return [(await at.step("a", each)).outputs["y"] for each in inputs]


async def test_each_member_of_a_frame_has_a_fate_of_its_own(first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a", "b", "c", "d")
    kept = await first.step("b", x(1, seed=2), expected=1, request_ids=5)
    await first.step("c", x(1), expected=1, request_ids=99)
    second.store.unknown["d"] = False
    inputs = np.concatenate([x(1), x(1, seed=2), x(1), x(1)])
    answers = await second.submit(list("abcd"), inputs, expected=[1] * 4, request_ids=[5] * 4).all()
    assert kinds(answers) == ["Answer", "Answer", "RevisionConflict", "OutcomeUnknown"]
    assert isinstance(answers[0], Answer)
    assert not answers[0].replayed
    assert isinstance(answers[1], Answer)
    same_reply(answers[1], kept)
    assert (await second.step("d", x(1), expected=1)).revision == 2, "it was not kept, and is read anew"


@pytest.mark.parametrize("states", [Select.LAST, Select.ALL])
async def test_states_are_those_of_the_members_that_were_kept(states: Select) -> None:
    names = ["a", "b", "c", "d"]
    async with two() as (first, second):
        await make_resident_on_both(first, second, *names)
        await first.step("a", x(1))
        await first.step("c", x(1))
        before = {name: (await first.state(name))["sum"] for name in names}
        said: dict[str, Any] = {"expected": [1, 1, 2, 1], "states": states, "state_members": [0, 2, 3]}
        value = x(4, 3, seed=6)
        answers = await second.submit(names, value, **said).all()
        assert kinds(answers) == ["RevisionConflict", "Answer", "Answer", "Answer"]
        for i in (1, 2, 3):
            answer = answers[i]
            assert isinstance(answer, Answer)
            after = traced(before[names[i]], value[i : i + 1])[1]
            wanted = (after if states is Select.ALL else after[:, -1]).tobytes() if i > 1 else b""
            assert answer.states.get("sum", np.zeros(0)).tobytes() == wanted


async def test_requests_behind_a_conflict_keep_their_order(first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a")
    await first.step("a", x(1), expected=1, request_ids=9)
    loses = await held(second, lambda: second.submit("a", x(1), expected=1, request_ids=10))
    behind = second.submit("a", x(1), expected=2, request_ids=11)
    read = await start_task(second.engine.get_state("a"))
    last = second.submit("a", x(1), expected=3, request_ids=12)
    second.store.release()
    assert kinds(await loses.all()) == ["RevisionConflict"]
    assert (await behind.only()).revision == 3
    assert (await read).session.revision == 3
    assert (await last.only()).revision == 4


@pytest.mark.parametrize("kept", [True, False])
@SHAPES
async def test_a_commit_that_is_not_answered_is_not_known(
    shape: str, kept: bool, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    second.store.unknown["a"] = kept
    await fails(change(second, shape, expected=1, request_ids=9).only(), OutcomeUnknown, "may have kept it")
    answer = await change(second, shape, expected=1, request_ids=9).only()
    assert (answer.revision, answer.replayed) == (2, kept), "what the store holds is the truth"
    async with running() as other:
        await other.open_and_step("a", x(1))
        same_reply(answer, await change(other, shape, expected=1, request_ids=9).only(), replayed=kept)
        await same_state(other, second)


async def test_a_session_that_changes_elsewhere_again_and_again_is_given_up_on(
    first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    second.store.commits_held = True
    step = second.submit("a", x(1))
    tries = 0
    while not step.ended:
        await second.store.until("commit", tries + 1)
        await first.step("a", x(1))
        tries += 1
        second.store.release_once()
        asked = asyncio.create_task(second.store.until("commit", tries + 1))
        await asyncio.wait({asked, asyncio.create_task(step.all())}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
    assert kinds(await step.all()) == ["Unavailable"]
    assert 1 < tries < 20
    second.store.release()
    assert (await second.step("a", x(1))).revision == tries + 2


@pytest.mark.parametrize("shape", ["lone", "reset", "read"])
@pytest.mark.engine(resident_rows=1)
async def test_a_session_that_ended_elsewhere_has_ended(shape: str, first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a")
    if shape == "read":  # paged out: so the store is asked
        await second.open("other")
    await first.engine.close_session("a")
    await fails(
        second.state("a") if shape == "read" else change(second, shape, expected=1).only(),
        SessionNotFound,
        "session 'a' was closed",
    )
    assert "a" not in second.internals.loaded()
    await fails(second.state("a"), SessionNotFound, "session 'a' was closed")


async def test_a_session_reopened_with_other_rows_is_another(first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a")
    await first.engine.close_session("a")
    await first.open("a", batch_size=2)
    await fails(second.step("a", x(1), expected=1), SessionGone)
    assert (await second.step("a", x(2))).revision == 3


async def opening_both(first: Harness, second: Harness, **fields: Any) -> tuple[Any, Any]:
    """Both read that there is no session, then both make it; the second is slower."""
    slow = await held(second, lambda: second.engine.open_session("plain", session_id="a", **fields))
    made = await first.engine.open_session("plain", session_id="a", **fields)
    await first.step("a", x(1))
    second.store.release()
    return made, slow


async def test_opening_a_session_that_another_server_has_just_made_resumes_it(
    first: Harness, second: Harness
) -> None:
    made, slow = await opening_both(first, second)
    assert not made.resumed
    opened = await slow
    assert opened.resumed
    assert opened.session.revision == 1
    assert (await second.step("a", x(1))).revision == 2


async def test_an_opening_that_must_be_new_is_refused(first: Harness, second: Harness) -> None:
    _, slow = await opening_both(first, second, must_be_new=True)
    await fails(slow, SessionExists, "session 'a' is open")


async def test_the_same_call_on_both_means_one_session(first: Harness, second: Harness) -> None:
    made, slow = await opening_both(first, second, must_be_new=True, request_id=7)
    opened = await slow
    assert opened.replayed
    assert opened.session.session_id == made.session.session_id
    assert len(await first.store.ids()) == 1


async def test_many_are_opened_or_none_where_another_server_was_faster_with_one(
    first: Harness, second: Harness
) -> None:
    slow = await held(second, lambda: second.engine.open_sessions("plain", session_ids=["x", "a", "y"]))
    await first.open("a")
    second.store.release()
    await fails(slow, SessionExists, "session 'a' is open")
    assert [info.session_id for info in (await first.engine.list_sessions())[0]] == ["a"]
    assert await first.store.count_of("plain") == 1
    opened = await second.engine.open_sessions("plain", session_ids=["x", "y"])
    assert opened.revisions.tolist() == [0, 0], "they never were"


@pytest.mark.parametrize("kept", [True, False])
async def test_an_opening_that_is_not_answered_stays_if_it_was_kept(
    kept: bool, first: Harness, second: Harness
) -> None:
    """Whoever asks another server again may have been told that it is there."""
    second.store.unknown["a"] = kept
    await fails(
        second.engine.open_session("plain", session_id="a", request_id=4),
        OutcomeUnknown,
        "may have kept it",
    )
    opened = await first.engine.open_session("plain", session_id="a", request_id=4)
    assert opened.replayed is kept
    assert (await second.step("a", x(1))).revision == 1


async def test_an_opening_that_was_slow_does_not_bring_a_session_back(
    first: Harness, second: Harness
) -> None:
    slow = await held(
        second, lambda: second.engine.open_session("plain", session_id="a", request_id=4, must_be_new=True)
    )
    assert not (await first.engine.open_session("plain", session_id="a", request_id=4)).replayed
    await first.engine.close_session("a")
    second.store.release()
    await fails(slow, Unavailable, "was opened on another server meanwhile, and has ended")
    await fails(second.state("a"), SessionNotFound, "session 'a' was closed")


@pytest.mark.stores("fake_shared")
async def test_an_opening_that_is_tried_again_begins_as_the_store_says_then(
    first: Harness, second: Harness
) -> None:
    await first.open_and_step("a", x(1))
    await first.engine.close_session("a")
    slow = await held(second, lambda: second.engine.open_session("plain", session_id="a"))
    first.store.shared.commit(Batch(forgets=["a"]))
    first.store.stamps.pop("a", None)
    second.store.release()
    assert (await slow).session.revision == 0, "the store has lost the end of the session before"


async def test_a_session_that_is_being_made_here_may_be_there_already(
    first: Harness, second: Harness
) -> None:
    slow = await held(second, lambda: second.engine.open_session("plain", session_id="a"))
    await first.open("a")
    step = second.submit("a", x(1))
    read = await start_task(second.engine.session_info("a"))
    second.store.release()
    assert (await step.only()).revision == 1
    assert (await read).session_id == "a", "as of its last completed change"
    assert (await slow).resumed


async def revision_by(call: str, at: Harness) -> int:
    """The revision of session `a` in the answer of a call."""
    if call == "info":
        return (await at.engine.session_info("a")).revision
    if call == "state":
        return (await at.engine.get_state("a")).session.revision
    return (await at.engine.open_session("plain", session_id="a")).session.revision


@pytest.mark.parametrize("call", ["info", "state", "resume"])
async def test_a_session_that_has_been_made_here_may_have_been_changed_already(
    call: str, first: Harness, second: Harness
) -> None:
    """The store has kept it, but this server has not heard of it yet, as it was paused."""
    second.store.answers_held = True
    slow = await start_task(second.engine.open_session("plain", session_id="a"))
    await second.store.until("commit")
    await first.step("a", x(1))
    revision = await start_task(revision_by(call, second))
    second.store.release()
    assert await revision == 1
    assert (await slow).session.session_id == "a"


async def test_a_fork_to_an_id_that_another_server_has_just_given_is_refused(
    first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "source")
    slow = await held(second, lambda: second.engine.fork("source", new_session_id="a"))
    await first.open("a")
    second.store.release()
    await fails(slow, SessionExists, "session 'a' is open")
    assert (await second.step("source", x(1))).revision == 2, "it is free again"


async def closing_slowly(second: Harness, **fields: Any) -> Any:
    """A closing whose commit waits for the store."""
    return await held(second, lambda: second.engine.close_session("a", **fields))


@pytest.mark.parametrize("request_id", [5, 6, 0])
async def test_a_closing_does_not_end_a_session_that_was_opened_after_it(
    request_id: int, first: Harness, second: Harness
) -> None:
    """It may be this very closing, sent to another server, that ended the one before: with request id 5 it is."""
    await make_resident_on_both(first, second, "a")
    slow = await closing_slowly(second, request_id=request_id)
    await first.engine.close_session("a", request_id=5)
    first.clock.advance(1.0)
    await first.open_and_step("a", x(1))
    second.store.release()
    if request_id == 5:
        assert await slow is True
    else:
        await fails(slow, Unavailable)
    assert (await second.step("a", x(1))).revision == 4


async def test_a_closing_that_waited_for_a_session_which_was_replaced_is_to_come_again(
    first: Harness, second: Harness
) -> None:
    """The one that has the id now may have been there before the closing came, and may be meant by it."""
    await make_resident_on_both(first, second, "a")
    await first.engine.close_session("a")
    await first.open("a", batch_size=2)
    step = await held(second, lambda: second.submit("a", x(1)))
    closing = await start_task(second.engine.close_session("a"))
    second.store.release()
    assert kinds(await step.all()) == ["SessionReplaced"]
    await fails(closing, Unavailable, "changed by other calls")
    assert (await first.engine.session_info("a")).batch_size == 2


@pytest.mark.parametrize("opens", [True, False])
async def test_a_closing_of_one_session_finds_it_though_another_server_ended_the_one_before(
    opens: bool, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    old = (await second.engine.session_info("a")).uid
    await first.engine.close_session("a", request_id=5)
    first.clock.advance(1.0)
    new = (await first.engine.open_session("plain", session_id="a")).session.uid if opens else 0
    assert new != old
    await fails(second.engine.close_session("a", request_id=6, uid=old), SessionNotFound)
    if opens:
        assert (await first.engine.session_info("a")).uid == new
        assert await second.engine.close_session("a", request_id=7, uid=new) is False
        assert await first.engine.close_session("a", request_id=7, uid=new) is True


@pytest.mark.parametrize("call", ["step", "state", "states"])
async def test_a_request_behind_a_closing_meets_the_session_that_was_opened_after_it(
    call: str, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    slow = await closing_slowly(second, request_id=5)
    await first.engine.close_session("a", request_id=5)
    first.clock.advance(1.0)
    await first.open("a")
    if call == "step":
        step = second.submit("a", x(1))
        second.store.release()
        assert (await step.only()).revision == 3
    elif call == "state":
        read = await start_task(second.engine.get_state("a"))
        second.store.release()
        assert (await read).session.revision == 2
    else:
        states = await start_task(second.engine.get_states(["a"]))
        second.store.release()
        assert [type(error) for _, error in (await states).errors] in ([], [Unavailable])
    assert await slow is True, "this very request, sent to the other server, ended the session before"


@pytest.mark.parametrize("many", [False, True])
async def test_a_session_is_closed_although_another_server_has_changed_it(
    many: bool, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a", "b")
    await first.step("a", x(1))
    if many:
        assert await second.engine.close_sessions(["a", "b"]) == 2
    else:
        assert await second.engine.close_session("a", request_id=5) is False
    assert (await tombstone(first, "a")).revision == 2, "of what it was at last"
    await fails(first.step("a", x(1)), SessionNotFound, "was closed")


@pytest.mark.parametrize("request_id", [5, 6])
async def test_a_session_is_closed_once(request_id: int, first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a")
    assert await first.engine.close_session("a", request_id=5) is False
    if request_id == 5:
        assert await second.engine.close_session("a", request_id=5) is True, "it was this very request"
    else:
        await fails(second.engine.close_session("a", request_id=6), SessionNotFound, "session 'a' was closed")


async def test_those_that_another_server_has_closed_are_not_counted(first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a", "b", "c")
    await first.engine.close_session("b")
    assert await second.engine.close_sessions(["a", "b", "c"]) == 2
    assert len(await first.store.ids()) == await first.store.count_of("plain") == 0


@pytest.mark.parametrize("kept", [True, False])
async def test_a_closing_that_is_not_answered_is_not_known(
    kept: bool, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    second.store.unknown["a"] = kept
    await fails(second.engine.close_session("a", request_id=5), OutcomeUnknown, "may have kept it")
    assert await second.engine.close_session("a", request_id=5) is kept


async def test_a_closing_that_is_cancelled_in_a_conflict_leaves_the_session_free(
    first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    await first.step("a", x(1))
    closing = await held(second, lambda: second.engine.close_session("a"))
    closing.cancel()
    second.store.release()
    await fails(closing, asyncio.CancelledError)
    await second.settled()
    assert (await second.step("a", x(1), request_ids=3)).revision == 3


async def test_a_returning_caller_continues_from_the_revision_on_the_other_server(
    first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a", "b")
    await first.step("a", x(1), expected=1, request_ids=9)
    answers = await second.submit(["a", "b"], x(2), expected=[2, 1], request_ids=[10, 11]).all()
    assert [answer.revision for answer in answers] == [3, 2]  # type: ignore[union-attr]
    refused = await fails(first.step("a", x(1), expected=7), RevisionConflict)
    assert refused.actual == 3, "as the store says, not as this server remembers"


@pytest.mark.parametrize("call", ["state", "info", "resume", "fork"])
async def test_reads_show_the_changes_of_other_servers(call: str, first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a")
    await first.step("a", x(1))
    if call == "fork":
        await second.engine.fork("a", new_session_id="b")
    else:
        assert await revision_by(call, second) == 2
    if call in {"fork", "state"}:
        await same_state(first, second, "b" if call == "fork" else "a")


@pytest.mark.engine(threads=True)
async def test_a_read_keeps_its_place_behind_earlier_requests(first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a", "busy")
    await first.step("a", x(1))
    busy = await second.begin_pass("busy", x(1))
    step = second.submit("a", x(1))  # waits in the inbox as long as a pass runs
    read = await start_task(second.engine.get_state("a"))
    await second.store.until("read", 3)
    for _ in range(10):
        await asyncio.sleep(0)
    second.hooks.open_gate()
    assert (await step.only()).revision == (await read).session.revision == 3
    await busy.only()


async def test_a_step_beside_one_that_is_not_finite_keeps_its_place(first: Harness, second: Harness) -> None:
    await first.open("a", "b")
    inputs = x(2)
    inputs[1] = np.nan
    frame = second.submit(["a", "b"], inputs)
    later = second.submit("a", x(1))
    assert kinds(await frame.all()) == ["Answer", "InvalidInput"]
    assert (await later.only()).revision == 2


@pytest.mark.parametrize("ids", [["a"], ["a", "b"]], ids=["lone", "frame"])
async def test_a_step_that_must_continue_is_not_applied_after_a_reset_elsewhere(
    ids: list[str], first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a", "b")
    await first.submit("a", reset=True).only()
    sizes = np.ones(len(ids), np.intp)
    step = second.submit(ids, x(len(ids)), continued_model="plain", batch_sizes=sizes)
    assert kinds(await step.all()) == ["Unavailable", "Answer"][: len(ids)]
    info = await second.engine.session_info("a")
    assert (info.revision, info.position) == (2, 0)
