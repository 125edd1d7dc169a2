"""Two servers on one store: stamps tell records apart, and what is read or refused is what the store has now."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.sessions import directory, lookup
from stepwell_server.errors import RevisionConflict, ServerError, SessionNotFound, Unavailable
from stepwell_server.store.base import Batch
from stepwell_server.store.record import decode_header
from support.engine.harness import Harness, fails, kinds, x
from support.engine.two_engines import make_resident_on_both, two
from support.stores.durable import begun, same_reply
from support.stores.gates import Gated
from support.stores.kinds import SHARED

pytestmark = SHARED


async def test_a_revision_that_comes_twice_is_not_taken_for_the_first(
    first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    store: Gated = first.store
    (before,) = await store.found("a")
    await first.step("a", x(1, seed=1))
    await store.put_back("a", before)
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
    store: Gated = first.store
    (before,) = await store.found("a")
    await first.step("a", x(1, seed=1))
    await store.put_back("a", before)
    await second.step("a", x(1, seed=2))
    answer = await first.step("a", x(1, seed=3), expected=2)  # of what the store has
    assert answer.revision == 3
    wanted = await second.state("a")
    assert wanted["sum"].tobytes() == (await first.state("a"))["sum"].tobytes()


async def test_a_commit_that_is_sent_again_is_kept_once() -> None:
    async with two() as (first, _):
        await first.open("a")
        store: Gated = first.store
        batches: list[Batch] = []
        apply = store.apply

        async def twice(batch: Batch) -> Any:
            kept = bytes(batch.puts[0][1])
            batches.append(batch)
            await apply(batch)
            assert bytes(batch.puts[0][1]) == kept
            return await apply(batch)

        store.apply = twice  # type: ignore[method-assign]
        assert (await first.step("a", x(1), expected=0, request_ids=1)).revision == 1
        assert len(batches) == 1
        assert batches[0].stamps[0] != 0


async def test_a_retry_is_answered_by_what_the_store_has_now(first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a")
    applied = await first.step("a", x(1), expected=1, request_ids=9)
    store: Gated = first.store
    reads = len(store.asked("read"))
    same_reply(await first.step("a", x(1), expected=1, request_ids=9), applied)
    assert len(store.asked("read")) > reads
    await second.step("a", x(1), expected=2, request_ids=10)
    refused = await fails(first.step("a", x(1), expected=1, request_ids=9), RevisionConflict)
    assert refused.actual == 3


async def step_while_read(first: Harness, second: Harness, **options: Any) -> tuple[Any, asyncio.Task[Any]]:
    """A read on the second server that has its turn, and waits for the store; another that waits behind it."""
    store: Gated = second.store
    store.reads_held = True
    held = await begun(second.engine.get_states(["a"], **options))
    await store.until("read", len(store.asked("read")))
    await first.step("a", x(1, seed=4))
    behind = await begun(second.engine.get_states(["a"], **options))
    store.let_go()
    return await held, behind


@pytest.mark.parametrize("with_state", [True, False])
async def test_a_read_behind_a_read_shows_what_was_answered_before_it_began(
    with_state: bool, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    _, behind = await step_while_read(first, second, with_state=with_state)
    read = await behind
    assert read.revisions.tolist() == [2]
    if with_state:
        assert read.state["sum"].tobytes() == (await first.state("a"))["sum"].tobytes()


async def test_a_fork_is_of_what_was_answered_before_it_began(first: Harness, second: Harness) -> None:
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
    store: Gated = second.store
    store.commits_held = True
    loses = second.submit("a", x(1), expected=1, request_ids=10)
    await store.until("commit")
    await first.step("a", x(1), expected=1, request_ids=9)
    await first.step("a", x(1), expected=2, request_ids=10)
    info = (
        await second.engine.session_info("a")
        if call == "describe"
        else (await second.engine.open_session("plain", session_id="a")).session
    )
    assert (info.revision, info.position) == (3, 3)
    store.let_go()
    await fails(loses.only(), RevisionConflict)


@pytest.mark.parametrize("again", [True, False])
async def test_a_session_that_was_closed_elsewhere_while_something_is_under_way(
    again: bool, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    store: Gated = second.store
    store.commits_held = True
    loses = second.submit("a", x(1))
    await store.until("commit")
    await first.engine.close_session("a")
    if again:
        opening = await begun(second.engine.open_session("plain", session_id="a", batch_size=2))
        store.let_go()
        opened = await opening
        assert not opened.resumed
        assert opened.session.batch_size == 2
        assert opened.session.revision > 1
    else:
        await fails(second.engine.session_info("a"), SessionNotFound)
        store.let_go()
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


async def test_what_is_undone_is_only_what_this_call_made(first: Harness, second: Harness) -> None:
    store: Gated = second.store
    store.commits_held = True
    opening = await begun(second.engine.open_sessions("plain", session_ids=["a", "b", "c"]))
    await store.until("commit")
    await first.open("b")
    store.let_go_once("commit")  # `a` and `c` are made, `b` is taken: the call undoes its own
    await store.until("commit", 2)
    await first.engine.close_session("a")
    await first.engine.open_session("plain", session_id="a", batch_size=2)
    store.let_go()
    await fails(opening, ServerError)
    assert (await first.engine.session_info("a")).batch_size == 2
    await fails(first.engine.session_info("c"), SessionNotFound)


async def test_nothing_is_read_that_the_store_cannot_confirm(first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a")
    store: Gated = second.store
    store.read_error = Unavailable("the store is away")
    await fails(second.state("a"), Unavailable)
    await fails(second.engine.session_info("a"), Unavailable)
    store.read_error = None
    assert (await second.state("a"))["sum"].shape == np.zeros((1, 2)).shape


async def test_a_change_that_does_not_fit_reads_its_session_once_and_leaves_no_error_behind() -> None:
    left: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: left.append(context))
    async with two() as (first, second):
        await make_resident_on_both(first, second, "a")
        store: Gated = first.store
        before = len(store.asked("read"))
        store.read_error = Unavailable("away")
        (refused,) = await first.submit("a", np.zeros((1, 5))).all()
        assert isinstance(refused, Unavailable)
        assert store.asked("read")[before] == ("a",)
        store.read_error = None
    gc.collect()
    assert left == []


async def test_records_of_sessions_that_others_opened_anew_say_so() -> None:
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
    for module in (directory, lookup):
        monkeypatch.setattr(module, "READ_BATCH_SIZE", 1)
    async with two() as (first, second):
        await make_resident_on_both(first, second, "a", "b")
        store: Gated = second.store
        store.reads_held, so_far = True, len(store.asked("read"))
        read = await begun(second.engine.get_states(["a", "b"]))
        await store.until("read", so_far + 1)
        store.let_go_once()
        await store.until("read", so_far + 2)
        store.commit_error = Unavailable("the store is away")
        assert kinds(await second.submit("a", x(1)).all()) == ["Unavailable"]
        assert second.internals.loaded() == ["b"]
        store.let_go()
        ((members, error),) = (await read).errors
        assert (members.tolist(), type(error)) == ([0], Unavailable), "nobody has closed it"
