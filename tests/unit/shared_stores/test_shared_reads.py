"""Two servers on one store: what they read, list, count, import and refuse is what the store has now."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import SessionFilter
from stepwell_server.engine.sessions import directory
from stepwell_server.engine.sessions.transfer import ExistingPolicy, ImportOutcome, SessionRecord
from stepwell_server.errors import (
    OutcomeUnknown,
    RevisionConflict,
    ServerError,
    SessionExists,
    SessionNotFound,
    Unavailable,
)
from stepwell_server.store.base import Batch
from stepwell_server.store.record import decode_header
from support.engine.fake_executor import PLAIN
from support.engine.harness import Harness, fails, kinds, x
from support.engine.two_engines import Times, held, make_resident_on_both, two
from support.stores.durable import same_reply, start_task
from support.stores.kinds import SHARED

pytestmark = SHARED


async def test_a_revision_that_comes_twice_is_not_taken_for_the_first(
    first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    (before,) = await first.store.found("a")
    await first.step("a", x(1, seed=1))
    await first.store.put_back("a", before)
    other = await second.step("a", x(1, seed=2), request_ids=7)
    assert other.revision == 2
    # the first server has a state of revision 2 as well: it is of the write that was lost
    refused = await fails(first.step("a", x(1), expected=1, request_ids=9), RevisionConflict)
    assert (refused.expected, refused.actual) == (1, 2)
    assert (await first.state("a"))["sum"].tobytes() == (await second.state("a"))["sum"].tobytes()
    await first.step("a", x(1, seed=3), expected=2)
    assert (await second.step("a", x(1), expected=3)).revision == 4


async def test_a_change_of_a_write_that_was_lost_is_not_kept(first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a")
    (before,) = await first.store.found("a")
    await first.step("a", x(1, seed=1))
    await first.store.put_back("a", before)
    await second.step("a", x(1, seed=2))
    answer = await first.step("a", x(1, seed=3), expected=2)  # of what the store has
    assert answer.revision == 3
    wanted = await second.state("a")
    assert wanted["sum"].tobytes() == (await first.state("a"))["sum"].tobytes()


async def test_a_commit_that_is_sent_again_is_kept_once(first: Harness) -> None:
    await first.open("a")
    batches: list[Batch] = []
    apply = first.store.apply

    async def twice(batch: Batch) -> Any:
        kept = bytes(batch.puts[0][1])
        batches.append(batch)
        await apply(batch)
        assert bytes(batch.puts[0][1]) == kept
        return await apply(batch)

    first.store.apply = twice
    assert (await first.step("a", x(1), expected=0, request_ids=1)).revision == 1
    assert len(batches) == 1
    assert batches[0].stamps[0] != 0


async def test_a_retry_is_answered_from_the_current_stored_session(first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a")
    applied = await first.step("a", x(1), expected=1, request_ids=9)
    reads = len(first.store.asked("read"))
    same_reply(await first.step("a", x(1), expected=1, request_ids=9), applied)
    assert len(first.store.asked("read")) > reads
    await second.step("a", x(1), expected=2, request_ids=10)
    refused = await fails(first.step("a", x(1), expected=1, request_ids=9), RevisionConflict)
    assert refused.actual == 3


async def step_while_read(first: Harness, second: Harness, **options: Any) -> tuple[Any, asyncio.Task[Any]]:
    """A read on the second server that has its turn, and waits for the store; another that waits behind it."""
    second.store.reads_held = True
    held = await start_task(second.engine.get_states(["a"], **options))
    await second.store.until("read", len(second.store.asked("read")))
    await first.step("a", x(1, seed=4))
    behind = await start_task(second.engine.get_states(["a"], **options))
    second.store.release()
    return await held, behind


@pytest.mark.parametrize("with_state", [True, False])
async def test_a_read_behind_a_read_shows_every_change_answered_before_it_began(
    with_state: bool, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    _, behind = await step_while_read(first, second, with_state=with_state)
    read = await behind
    assert read.revisions.tolist() == [2]
    if with_state:
        assert read.state["sum"].tobytes() == (await first.state("a"))["sum"].tobytes()


async def test_a_fork_has_every_change_answered_before_it_began(first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a")
    await first.step("a", x(1, seed=4))
    forked = await second.engine.fork("a", new_session_id="b")
    assert forked.session.revision == 2
    assert (await second.state("b"))["sum"].tobytes() == (await first.state("a"))["sum"].tobytes()


@pytest.mark.parametrize("call", ["describe", "resume"])
async def test_a_session_with_something_under_way_is_described_as_the_store_has_it(
    call: str, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    loses = await held(second, lambda: second.submit("a", x(1), expected=1, request_ids=10))
    await first.step("a", x(1), expected=1, request_ids=9)
    await first.step("a", x(1), expected=2, request_ids=10)
    info = (
        await second.engine.session_info("a")
        if call == "describe"
        else (await second.engine.open_session("plain", session_id="a")).session
    )
    assert (info.revision, info.position) == (3, 3)
    second.store.release()
    await fails(loses.only(), RevisionConflict)


@pytest.mark.parametrize("again", [True, False])
async def test_a_session_that_was_closed_elsewhere_while_something_is_under_way(
    again: bool, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    loses = await held(second, lambda: second.submit("a", x(1)))
    await first.engine.close_session("a")
    if again:
        opening = await start_task(second.engine.open_session("plain", session_id="a", batch_size=2))
        second.store.release()
        opened = await opening
        assert not opened.resumed
        assert opened.session.batch_size == 2
        assert opened.session.revision > 1
    else:
        await fails(second.engine.session_info("a"), SessionNotFound)
        second.store.release()
    await fails(loses.only(), SessionNotFound)


@pytest.mark.parametrize("said", [True, False])
async def test_a_step_that_fits_the_session_which_has_the_id_now_is_applied(
    said: bool, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    await first.engine.close_session("a")
    await first.engine.open_session("plain", session_id="a", batch_size=3)
    sizes = {"batch_sizes": [3]} if said else {}
    answer = await second.submit("a", x(3), sizes=[3], **sizes).only()
    assert answer.outputs["y"].shape[0] == 3
    with pytest.raises(ServerError, match="3"):
        await second.submit("a", x(2), sizes=[2], **{k: [2] for k in sizes}).only()


async def test_a_failed_call_undoes_only_its_own_changes(first: Harness, second: Harness) -> None:
    opening = await held(second, lambda: second.engine.open_sessions("plain", session_ids=["a", "b", "c"]))
    await first.open("b")
    second.store.release_once("commit")  # `a` and `c` are made, `b` is taken: the call undoes its own
    await second.store.until("commit", 2)
    await first.engine.close_session("a")
    await first.engine.open_session("plain", session_id="a", batch_size=2)
    second.store.release()
    await fails(opening, ServerError)
    assert (await first.engine.session_info("a")).batch_size == 2
    await fails(first.engine.session_info("c"), SessionNotFound)


async def test_nothing_is_read_that_the_store_cannot_confirm(first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a")
    second.store.read_error = Unavailable("the store is away")
    await fails(second.state("a"), Unavailable)
    await fails(second.engine.session_info("a"), Unavailable)
    second.store.read_error = None
    assert (await second.state("a"))["sum"].shape == np.zeros((1, 2)).shape


async def test_a_change_that_does_not_fit_reads_its_session_once_and_leaves_no_error_behind() -> None:
    left: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: left.append(context))
    async with two() as (first, second):
        await make_resident_on_both(first, second, "a")
        before = len(first.store.asked("read"))
        first.store.read_error = Unavailable("away")
        (refused,) = await first.submit("a", np.zeros((1, 5))).all()
        assert isinstance(refused, Unavailable)
        assert first.store.asked("read")[before] == ("a",)
        first.store.read_error = None
    gc.collect()
    assert left == []


async def test_records_of_sessions_that_others_reopened_show_it() -> None:
    names = [f"s{number}" for number in range(64)]
    async with two() as (first, second):
        await make_resident_on_both(first, second, *names)
        for _ in range(3):  # these sessions come together again and again: their records are laid out once
            await second.submit(names, x(64)).require_all_applied()
        first.clock.advance(100.0)
        await first.engine.close_sessions(names)
        opened = await first.engine.open_sessions("plain", session_ids=names)
        await second.submit(names, x(64)).require_all_applied()
        for name, revision in zip(names, opened.revisions.tolist(), strict=True):
            info = await first.engine.session_info(name)
            assert (info.revision, info.position) == (revision + 1, 1)
            stored = (await first.store.found(name))[0].record
            assert stored is not None
            assert decode_header(name, stored).created == first.clock.now()


async def test_a_session_that_leaves_the_table_between_the_parts_of_a_long_lookup_is_not_taken_for_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(directory, "LOOKUP_BATCH_SIZE", 1)
    async with two() as (first, second):
        await make_resident_on_both(first, second, "a", "b")
        second.store.reads_held, so_far = True, len(second.store.asked("read"))
        read = await start_task(second.engine.get_states(["a", "b"]))
        await second.store.until("read", so_far + 1)
        second.store.release_once()
        await second.store.until("read", so_far + 2)
        second.store.commit_error = Unavailable("the store is away")
        assert kinds(await second.submit("a", x(1)).all()) == ["Unavailable"]
        assert second.internals.loaded() == ["b"]
        second.store.release()
        ((members, error),) = (await read).errors
        assert (members.tolist(), type(error)) == ([0], Unavailable), "nobody has closed it"


async def listed(at: Harness, **query: Any) -> list[tuple[str, int]]:
    return [(info.session_id, info.revision) for info in (await at.engine.list_sessions(**query))[0]]


@pytest.mark.engine(resident_rows=8)
async def test_a_table_that_is_too_large_forgets_paged_out_and_long_unused_sessions(
    first: Harness, second: Harness, times: Times
) -> None:
    names = [f"s{number:03}" for number in range(100)]
    for at in range(0, 100, 4):
        times.advance(1.0)
        await first.open(*names[at : at + 4])
        await first.submit(names[at : at + 4], x(4)).all()
    first.internals.sweep.max_paged_out = 40
    assert await first.internals.sweep.trim() > 52
    left = first.internals.loaded()
    assert left == names[-len(left) :], "the last used ones stay"
    assert len(left) <= 40 + 8
    assert await first.internals.sweep.trim() == 0
    assert [name for name, _ in await listed(first)] == names
    answers = await first.submit(names[::-4], x(25), expected=[1] * 25).all()
    assert kinds(answers) == ["Answer"] * 25
    assert (await second.step(names[3], x(1), expected=2)).revision == 3


@pytest.mark.engine(resident_rows=2, threads=True)
async def test_sessions_with_requests_under_way_stay_in_the_table(first: Harness) -> None:
    await first.open("a", "b", "c", "d")
    answers = await first.begin_pass("a", x(1), sizes=[1])
    waiting = first.submit("a", x(1), sizes=[1])
    first.internals.sweep.max_paged_out = 0
    await first.internals.sweep.trim()
    assert "a" in first.internals.loaded()
    first.hooks.open_gate()
    assert (await answers.only()).revision == 1
    assert (await waiting.only()).revision == 2


@pytest.mark.parametrize("wanted", [{}, {"idle_longer_s": -1.0}])
async def test_lists_show_the_sessions_in_the_store(
    wanted: dict[str, Any], first: Harness, second: Harness, times: Times
) -> None:
    await make_resident_on_both(first, second, "a", "b")
    assert await listed(second, **wanted) == [("a", 1), ("b", 1)]
    times.advance(5.0)
    await first.step("a", x(1))
    times.advance(30.0)
    await first.open("c")
    assert await listed(second, **wanted) == [("a", 2), ("b", 1), ("c", 0)]
    await first.engine.close_session("b")
    assert await listed(second, **wanted) == [("a", 2), ("c", 0)]
    infos = (await second.engine.list_sessions(**wanted))[0]
    idle = {info.session_id: times.second.now() - info.last_used for info in infos}
    assert idle == {"a": pytest.approx(30.0), "c": pytest.approx(0.0)}


@pytest.mark.engine(max_session_idle_s=100.0)
async def test_a_session_that_is_over_is_not_listed(first: Harness, second: Harness, times: Times) -> None:
    await make_resident_on_both(first, second, "a")
    times.advance(101.0)
    await first.open("b")
    for at in (first, second):
        assert await listed(at) == [("b", 0)]


async def test_models_say_how_many_sessions_there_are_on_all_servers(
    first: Harness, second: Harness, times: Times
) -> None:
    await first.open("a", "b")
    await second.open("c")
    for at in (first, second):
        await at.engine.refresh_counts()
        assert at.engine.models()[0].sessions == at.engine.stats()[0].sessions == 3
    before = len(first.store.asked("count"))
    for _ in range(5):
        await first.engine.refresh_counts()
    assert len(first.store.asked("count")) == before, "it was just asked"
    await second.open("d")
    times.advance(1.0)
    await first.engine.refresh_counts()
    assert first.engine.models()[0].sessions == 4


async def test_what_is_closed_for_being_idle_was_used_on_no_server(
    first: Harness, second: Harness, times: Times
) -> None:
    await make_resident_on_both(first, second, "a", "b", "c")
    times.advance(60.0)
    await second.step("a", x(1))
    await second.state("b")
    for _ in range(20):
        await asyncio.sleep(0)
    times.advance(10.0)
    closed, _ = await first.engine.close_matching(SessionFilter(idle_longer_s=50.0), limit=10)
    assert closed == 1
    assert await listed(second) == [("a", 2), ("b", 1)]
    await fails(second.state("c"), SessionNotFound)


async def test_a_session_that_is_used_while_it_is_closed_for_being_idle_stays(
    first: Harness, second: Harness, times: Times
) -> None:
    await make_resident_on_both(first, second, "a", "b")
    times.advance(60.0)
    first.store.commits_held = True
    closing = asyncio.create_task(first.engine.close_matching(SessionFilter(idle_longer_s=50.0), limit=10))
    await first.store.until("commit", len(first.store.asked("commit")) + 1)
    assert (await second.step("a", x(1))).revision == 2
    first.store.release()
    closed, _ = await closing
    assert closed == 1
    for at in (first, second):
        assert await listed(at) == [("a", 2)]
    assert np.isfinite((await first.state("a"))["sum"]).all()


async def exported(at: Harness, session_id: str, *, to: str = "") -> SessionRecord:
    record = await at.exported(session_id)
    return SessionRecord(to or session_id, session_id, bytes(record))


async def test_a_session_is_replaced_in_one_commit_also_after_another_server_changed_it(
    first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    record, state = await exported(first, "a"), (await first.state("a"))["sum"]
    await first.step("a", x(1, seed=2))
    await second.state("a")
    second.store.commits_held = True
    before = len(second.store.asked("commit"))
    replacing = await start_task(second.engine.import_sessions([record], ExistingPolicy.REPLACE))
    await second.store.until("commit", before + 1)
    await first.step("a", x(1, seed=3))
    second.store.release()
    assert await replacing == [ImportOutcome.REPLACED]
    assert len(second.store.asked("commit")) == before + 2, "the first one met the other server's change"
    assert not any(batch.deletes for batch in second.store.tried), "the session never was away"
    for at in (first, second):
        assert (await at.engine.session_info("a")).revision == 1
        assert np.array_equal((await at.state("a"))["sum"], state)
    await first.step("a", x(1), expected=1)


@pytest.mark.engine(programs={"plain": PLAIN, "other": PLAIN})
async def test_a_session_of_another_model_is_replaced_and_counted_where_it_belongs(
    first: Harness, second: Harness
) -> None:
    await first.open("other", model="other")
    record = await exported(first, "other", to="a")
    await make_resident_on_both(first, second, "a")
    assert await second.engine.import_sessions([record], ExistingPolicy.REPLACE) == [ImportOutcome.REPLACED]
    assert (await first.engine.session_info("a")).model == "other"
    assert [await first.store.count_of(model) for model in ("plain", "other")] == [0, 2]


@pytest.mark.parametrize("kept", [False, True])
async def test_if_the_store_does_not_say_whether_it_replaced_one_its_word_counts(
    kept: bool, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    record = await exported(first, "a")
    await second.step("a", x(1))
    second.store.unknown["a"] = kept
    (result,) = await second.engine.import_sessions([record], ExistingPolicy.REPLACE)
    assert isinstance(result, OutcomeUnknown)
    for at in (first, second):
        assert (await at.engine.session_info("a")).revision == (1 if kept else 2)


@pytest.mark.engine(threads=True)
async def test_a_session_replaced_after_it_left_the_table_is_not_reported_as_away(
    first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a", "b")
    records = [await exported(first, name) for name in "ab"]
    await first.submit(["a", "b"], x(2)).all()
    blocked = await second.begin_pass("a", x(1))
    replacing = await start_task(second.engine.import_sessions(records, ExistingPolicy.REPLACE))
    assert second.internals.removal.forget_idle(["b"]) == 1
    second.hooks.open_gate()
    assert await replacing == [ImportOutcome.REPLACED] * 2
    assert not any(batch.deletes for batch in second.store.tried)
    await blocked.all()


async def test_an_import_that_another_server_overtakes_is_judged_again(
    first: Harness, second: Harness
) -> None:
    await first.open("a")
    records = [await exported(first, "a", to=name) for name in ("b", "c")]
    importing = await held(second, lambda: second.engine.import_sessions(records, ExistingPolicy.REFUSE))
    await first.open("b", batch_size=2)
    second.store.release()
    refused, imported = await importing
    assert isinstance(refused, SessionExists)
    assert imported is ImportOutcome.IMPORTED
    assert (await second.engine.session_info("b")).batch_size == 2
