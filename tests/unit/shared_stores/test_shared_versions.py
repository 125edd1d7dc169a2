"""Versions over servers that share a store: a change of one is a change of all, and each session goes one way only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np
import pytest

from stepwell_server.engine.api import DefaultMove, SessionPolicy
from stepwell_server.engine.state.fields import Mark
from stepwell_server.engine.versions import document
from stepwell_server.errors import (
    ModelInUse,
    SpecsDiffer,
    Unavailable,
    VersionElsewhere,
    VersionExists,
    VersionNotFound,
)
from support.engine.fake_executor import PLAIN, WAIT_S
from support.engine.harness import Answer, Harness, x
from support.engine.two_engines import make_resident_on_both, serving_two
from support.engine.version_changes import (
    fails_exactly,
    hold_commits,
    load_2,
    record_of,
    stored_versions,
    two_versions,
)
from support.engine.versions import WIDE, after, serving, weights, widen
from support.stores.durable import start_task, until
from support.stores.kinds import SHARED

KEEP, CARRY = SessionPolicy.KEEP, SessionPolicy.CARRY
MIGRATE, RESET = SessionPolicy.MIGRATE, SessionPolicy.RESET
INITIAL = np.array([[0.5, -0.25]], np.float32)
BOTH = {"plain@1": PLAIN, "plain@2": weights(2)}
FIRST, SECOND = x(1, seed=1), x(1, seed=2)

pytestmark = SHARED


@pytest.fixture
async def servers(request: pytest.FixtureRequest, store_kind: str) -> AsyncIterator[tuple[Harness, Harness]]:
    """Two servers with versions 1, the default, and 2."""
    mark = request.node.get_closest_marker("engine")
    async with two_versions(**mark.kwargs if mark else {}) as found:
        yield found


@pytest.fixture
async def version_2(first: Harness, second: Harness) -> None:
    """Loads version 2 on both servers; the default stays 1."""
    await load_2(first, second)


# ------------------------------------------------------------------------------------------------------- what follows


@pytest.mark.usefixtures("version_2")
@pytest.mark.parametrize("policy", [CARRY, RESET])
async def test_a_change_of_the_default_is_one_for_all(
    policy: SessionPolicy, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    assert await first.engine.set_default("plain", 2, policy) == DefaultMove(1, 1)
    await second.internals.look()
    assert second.engine.version("plain") == 2
    info = await second.engine.session_info("a")
    assert (info.version, info.position) == (2, 0 if policy is RESET else 1)
    answer = await second.step("a", FIRST)
    assert answer.version == 2
    state = after(1, INITIAL, [x(1)])[1] if policy is CARRY else weights(2).initial[0][None]
    np.testing.assert_array_equal(answer.outputs["y"], after(2, state, [FIRST])[0])
    assert (await first.step("a", FIRST)).version == 2


@pytest.mark.usefixtures("version_2")
@pytest.mark.stores("fake_shared")  # the one on Valkey does not tell of changes yet
async def test_the_store_tells_of_changes_at_once(first: Harness, second: Harness) -> None:
    second.store.is_told = True
    await first.engine.set_default("plain", 2, KEEP)
    for _ in range(50):
        if second.engine.version("plain") == 2:
            break
        await asyncio.sleep(0)
    assert second.engine.version("plain") == 2


async def test_labels_follow_and_a_label_of_an_unloaded_version_refers_to_another_server(
    first: Harness, second: Harness
) -> None:
    await load_2(first)
    await first.engine.set_label("plain", "canary", 2)
    await second.internals.look()
    await fails_exactly(
        second.open("a", model="plain:canary"), VersionElsewhere, r"needs version 2 of model 'plain'"
    )
    await load_2(second)
    await second.open("a", model="plain:canary")
    assert (await second.engine.session_info("a")).version == 2
    await second.engine.set_label("plain", "canary", 0)
    await first.internals.look()
    with pytest.raises(VersionNotFound):
        first.engine.version("plain:canary")


@pytest.mark.usefixtures("version_2")
async def test_several_changes_at_once_are_made_in_their_order(first: Harness, second: Harness) -> None:
    await first.engine.load_version("plain", 3, weights(3))
    await second.engine.load_version("plain", 3, weights(3))
    await second.open("a")
    await second.open("b", model="plain@2")
    await first.engine.set_default("plain", 2, CARRY)
    await first.open("c")
    await second.engine.session_info("c")  # it learns of the first move
    await first.engine.set_default("plain", 3, RESET)
    await first.engine.set_default("plain", 1, CARRY)
    await second.internals.look()
    versions = {name: (await second.engine.session_info(name)).version for name in "abc"}
    assert versions == {"a": 1, "b": 2, "c": 1}
    answer = await second.step("a", FIRST)
    # anew on 3, which it was on without being used there, and carried on
    np.testing.assert_array_equal(answer.outputs["y"], after(1, weights(1).initial[0][None], [FIRST])[0])


async def test_a_busy_session_is_migrated_after_its_pass() -> None:
    async with serving_two({"plain": PLAIN}, migrations={"widen": widen}, threads=True) as (first, second):
        for at in (first, second):
            await at.engine.load_version("plain", 2, WIDE)
        await make_resident_on_both(first, second, "a")
        slow = await second.begin_pass("a", FIRST)
        await first.engine.set_default("plain", 2, MIGRATE, "widen")
        looking = await start_task(second.internals.look())
        second.hooks.open_gate()
        assert (await slow.only()).version == 1
        await asyncio.wait_for(looking, WAIT_S)
        answer = await second.step("a", SECOND)
        assert answer.version == 2
        state = widen({"sum": after(1, INITIAL, [x(1), FIRST])[1]})["wide"]
        wanted = np.asarray(state) * np.float32(0.5) + np.tile(SECOND, 2) + np.float32(1)
        np.testing.assert_array_equal(answer.outputs["z"], wanted)


# --------------------------------------------------------------------------------------------- who has not heard of it


@pytest.mark.usefixtures("version_2")
async def test_a_server_that_has_not_seen_a_change_continues_as_before(
    first: Harness, second: Harness
) -> None:
    await second.open("a")
    await first.engine.set_default("plain", 2, CARRY)
    answer = await second.step("a", FIRST)
    assert answer.version == 1
    assert await record_of(second, "a") == Mark(1, 0, is_pinned=False)
    later = await first.step("a", SECOND)
    assert later.version == 2
    np.testing.assert_array_equal(later.outputs["y"], after(2, after(1, INITIAL, [FIRST])[1], [SECOND])[0])


@pytest.mark.usefixtures("version_2")
async def test_a_session_of_a_later_epoch_waits_for_its_document(first: Harness, second: Harness) -> None:
    await first.open("a")
    await first.engine.set_default("plain", 2, CARRY)
    await first.step("a", FIRST)
    assert await record_of(first, "a") == Mark(2, 1, is_pinned=False)
    answer = await second.step("a", SECOND)
    assert (answer.version, answer.revision) == (2, 2)
    assert second.engine.version("plain") == 2


@pytest.mark.usefixtures("version_2")
async def test_an_outdated_copy_is_never_used_for_later_requests(first: Harness, second: Harness) -> None:
    """It loses its commit, and what the store has then is not made on the version that it knows."""
    await make_resident_on_both(first, second, "a")
    await first.engine.set_default("plain", 2, CARRY)
    await first.step("a", FIRST)
    await fails_exactly(second.step("a", SECOND), VersionElsewhere, "does not know yet.*send it again")
    answer = await second.step("a", SECOND)
    assert (answer.version, answer.revision) == (2, 3)
    state = after(2, after(1, INITIAL, [x(1)])[1], [FIRST])[1]
    np.testing.assert_array_equal(answer.outputs["y"], after(2, state, [SECOND])[0])


@pytest.mark.usefixtures("version_2")
async def test_there_and_back_is_not_where_it_was(first: Harness, second: Harness) -> None:
    """The version is the same, the moves are not: they would be made twice."""
    await make_resident_on_both(first, second, "a")
    await first.engine.set_default("plain", 2, RESET)
    await first.engine.set_default("plain", 1, CARRY)
    await first.step("a", FIRST)
    await fails_exactly(second.step("a", SECOND), VersionElsewhere, "does not know yet")
    answer = await second.step("a", SECOND)
    assert (answer.version, answer.revision, answer.position) == (1, 3, 2)
    assert await record_of(second, "a") == Mark(1, 2, is_pinned=False)


@pytest.mark.usefixtures("version_2")
async def test_a_session_of_the_same_id_that_was_opened_elsewhere_on_another_version_is_another(
    first: Harness, second: Harness
) -> None:
    await first.open("a", model="plain@2")
    await second.engine.close_session("a")
    await second.open("a")
    await fails_exactly(
        first.step("a", FIRST),
        VersionElsewhere,
        "a session belongs to version 1 of model 'plain', but is still on",
    )
    answer = await first.step("a", FIRST)
    assert answer.version == 1
    np.testing.assert_array_equal(answer.outputs["y"], after(1, INITIAL, [FIRST])[0])


@pytest.mark.usefixtures("version_2")
async def test_a_session_that_follows_has_the_id_of_one_that_was_pinned(
    first: Harness, second: Harness
) -> None:
    """It was opened where the last move is not known yet; who knew the pinned one must not keep it there."""
    await first.open("a", model="plain@2")
    await second.engine.set_default("plain", 2, CARRY)
    await second.engine.close_session("a")
    await second.open("a")
    await first.engine.set_default("plain", 1, RESET)
    with contextlib.suppress(VersionElsewhere):  # it knows the other one still
        await first.step("a", FIRST)
    assert (await first.step("a", FIRST)).version == 1
    assert await record_of(first, "a") == Mark(1, 2, is_pinned=False)


@pytest.mark.usefixtures("version_2")
@pytest.mark.parametrize("is_faster", [False, True])
@pytest.mark.parametrize("policy", [CARRY, RESET])
async def test_a_step_under_way_when_the_default_moves_elsewhere_is_kept_before_it_or_refused(
    policy: SessionPolicy, is_faster: bool, first: Harness, second: Harness
) -> None:
    """It is kept as of before if nobody was faster, and else not at all."""
    await make_resident_on_both(first, second, "a")
    held = hold_commits(second.store)
    slow = second.submit("a", FIRST, expected=1, request_ids=7)
    await held
    await first.engine.set_default("plain", 2, policy)
    if is_faster:
        await first.step("a", SECOND, expected=1, request_ids=8)
    looking = await start_task(second.internals.look())
    await until(lambda: second.engine.version("plain") == 2)
    second.store.release()
    (answer,) = await slow.all()
    await asyncio.wait_for(looking, WAIT_S)
    if is_faster:
        assert isinstance(answer, Unavailable), answer
        assert "a session belongs to version 2 of model 'plain', but is still on version 1" in str(answer)
        assert await record_of(first, "a") == Mark(2, 1, is_pinned=False)
        answer = await second.step("a", SECOND, expected=1, request_ids=8)
        assert (answer.revision, answer.replayed) == (2, True)
        return
    assert isinstance(answer, Answer)
    assert (answer.version, answer.revision) == (1, 2)
    assert await record_of(first, "a") == Mark(1, 0, is_pinned=False)
    again = await first.step("a", FIRST, expected=1, request_ids=7)
    assert again.replayed
    np.testing.assert_array_equal(again.outputs["y"], answer.outputs["y"])
    assert (await second.step("a", SECOND)).version == 2


@pytest.mark.usefixtures("version_2")
async def test_a_session_opened_by_a_server_unaware_of_the_move_moves_as_well(
    first: Harness, second: Harness
) -> None:
    await first.engine.set_default("plain", 2, CARRY)
    await second.open("a")
    assert (await second.engine.session_info("a")).version == 1
    assert (await first.step("a", FIRST)).version == 2


async def test_a_version_that_another_server_has_loaded_since_is_known_when_it_is_met(
    first: Harness, second: Harness
) -> None:
    await load_2(first)
    await first.open("a", model="plain@2")
    await fails_exactly(
        second.step("a", FIRST), VersionElsewhere, "session 'a' is on version 2 of model 'plain'"
    )
    await load_2(second)
    assert (await second.step("a", FIRST)).version == 2


@pytest.mark.usefixtures("version_2")
async def test_where_the_store_cannot_be_asked_for_a_change_nothing_is_judged_by_the_old_one(
    first: Harness, second: Harness
) -> None:
    await first.open("a")
    await first.engine.set_default("plain", 2, CARRY)
    await first.step("a", FIRST)
    second.store.documents_error = Unavailable("the store is away")
    await fails_exactly(second.step("a", SECOND), Unavailable, "the store is away")
    second.store.documents_error = None
    assert (await second.step("a", SECOND)).version == 2


# ------------------------------------------------------------------------------------------------- what is not loaded


@pytest.mark.parametrize("is_used", [False, True])
async def test_sessions_of_a_version_that_is_not_here_wait_for_it(
    is_used: bool, first: Harness, second: Harness
) -> None:
    await load_2(first)
    await make_resident_on_both(first, second, "a", "b")
    await first.engine.set_default("plain", 2, CARRY)
    if is_used:
        await first.step("a", FIRST)
    await second.internals.look()
    for _ in range(2):
        await fails_exactly(
            second.step("a", FIRST), VersionElsewhere, "another server on the same store may have it"
        )
    await fails_exactly(second.state("b"), VersionElsewhere, "session 'b' is on version 2 of model 'plain'")
    await fails_exactly(second.open("new"), VersionElsewhere, "the call needs version 2 of model 'plain'")
    own = second.engine.catalogue()["plain"]
    assert (own.default, own.wanted) == (1, 2)
    await second.open("pinned", model="plain@1")
    await load_2(second)
    answer = await second.step("a", SECOND)
    assert (answer.version, answer.revision) == (2, 3 if is_used else 2)
    await second.open("new")
    assert (await second.engine.session_info("new")).version == 2


async def test_what_is_under_way_when_the_sessions_leave_for_what_is_not_here(
    first: Harness, second: Harness
) -> None:
    await load_2(first)
    await make_resident_on_both(first, second, "a")
    held = hold_commits(second.store)
    slow = second.submit("a", FIRST)
    await held
    behind = second.submit("a", SECOND)
    await first.engine.set_default("plain", 2, CARRY)
    await second.internals.look()
    second.store.release()
    assert (await slow.only()).version == 1
    await fails_exactly(behind.only(), VersionElsewhere)
    await second.settled()
    assert second.internals.loaded() == []
    assert (await first.step("a", SECOND)).revision == 3


# ------------------------------------------------------------------------------------------------- two change at once


@pytest.mark.usefixtures("version_2")
async def test_the_same_file_is_loaded_by_each(first: Harness, second: Harness) -> None:
    assert [each["version"] for each in (await stored_versions(first))["versions"]] == [1, 2]
    await fails_exactly(first.engine.load_version("plain", 2, weights(2)), VersionExists, "2 is loaded")


async def test_a_number_is_one_file(first: Harness, second: Harness) -> None:
    await load_2(first)
    before = await stored_versions(first)
    await fails_exactly(
        second.engine.load_version("plain", 2, weights(3)),
        VersionExists,
        "2 is another file on the servers that share the store: load it as 3",
    )
    assert (await stored_versions(first)) == before
    assert [model.version for model in second.internals.models] == [1]
    assert second.engine.next_version("plain") == 3
    await second.engine.load_version("plain", 3, weights(3))


async def test_of_two_that_load_other_files_under_one_number_one_is_refused(
    first: Harness, second: Harness
) -> None:
    held = hold_commits(second.store)
    slow = await start_task(second.engine.load_version("plain", 2, weights(3)))
    await held
    await load_2(first)
    second.store.release()
    await fails_exactly(slow, VersionExists, "another file")
    await second.open("a", model="plain@1")


@pytest.mark.usefixtures("version_2")
async def test_two_make_the_same_version_the_default(first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a")
    held = hold_commits(second.store)
    slow = await start_task(second.engine.set_default("plain", 2, CARRY))
    await held
    assert await first.engine.set_default("plain", 2, CARRY) == DefaultMove(1, 1)
    second.store.release()
    assert (await slow).sessions <= 1
    assert (await stored_versions(first))["epoch"] == 1, "it is one move"
    assert await second.engine.set_default("plain", 2, CARRY) == DefaultMove(2, 0)


@pytest.mark.usefixtures("version_2")
async def test_a_change_is_checked_again_against_the_changes_of_others(
    first: Harness, second: Harness
) -> None:
    for at in (first, second):
        await at.engine.load_version("plain", 3, WIDE)
    await second.open("a")
    held = hold_commits(second.store)
    slow = await start_task(second.engine.set_default("plain", 2, CARRY))
    await held
    await first.engine.set_default("plain", 3, RESET)
    second.store.release()
    await fails_exactly(slow, SpecsDiffer, "from version 3 of model 'plain' to 2")
    assert second.engine.version("plain") == 3
    assert (await second.step("a", x(1))).version == 3


@pytest.mark.usefixtures("version_2")
async def test_a_default_that_only_seems_set_is_set_in_the_store(first: Harness, second: Harness) -> None:
    await first.engine.set_default("plain", 2, CARRY)
    assert await second.engine.set_default("plain", 1, CARRY) == DefaultMove(2, 0)
    await first.internals.look()
    assert first.engine.version("plain") == 1


@pytest.mark.usefixtures("version_2")
async def test_changes_that_are_always_too_late_are_given_up(first: Harness, second: Harness) -> None:
    tries, before = 0, len(second.store.asked("commit"))
    second.store.commits_held = True
    labelling = await start_task(second.engine.set_label("plain", "canary", 2))
    while not labelling.done():
        asked = asyncio.ensure_future(second.store.until("commit", before + tries + 1))
        await asyncio.wait({asked, labelling}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        tries += 1
        await first.engine.set_label("plain", f"other-{tries}", 1)
        second.store.release_once()
    await fails_exactly(labelling, Unavailable, "being changed by other servers again and again")
    assert 1 < tries < 50
    assert "canary" not in (await stored_versions(first))["labels"]


@pytest.mark.usefixtures("version_2")
async def test_a_write_whose_answer_is_lost_is_read_back(first: Harness, second: Harness) -> None:
    first.store.fail(Unavailable("the connection broke"), kept=True)
    assert await first.engine.set_default("plain", 2, CARRY) == DefaultMove(1, 0)
    assert first.engine.version("plain") == (await stored_versions(first))["default"] == 2
    first.store.commit_error = Unavailable("the store is away")
    await fails_exactly(first.engine.set_default("plain", 1, CARRY), Unavailable, "away")
    assert first.engine.version("plain") == (await stored_versions(first))["default"] == 2


# ---------------------------------------------------------------------------------------------------- begin and end


async def test_the_first_to_come_says_the_default() -> None:
    async with serving_two({"plain": PLAIN}, BOTH) as (first, second):
        assert second.engine.version("plain") == 1
        assert ((await stored_versions(first))["default"], (await stored_versions(first))["highest"]) == (
            1,
            2,
        )
        await second.open("a", model="plain@2")
        await fails_exactly(first.step("a", x(1)), VersionElsewhere)


async def test_a_server_whose_file_is_another_does_not_start(first: Harness) -> None:
    store = await first.store.another()
    with pytest.raises(
        document.DocumentError, match=r"version 1 of model 'plain' must be the same file .*plain@2=PATH"
    ):
        async with serving({"plain": weights(2)}, store=store):
            raise AssertionError("it started")
    await store.close()


@pytest.mark.usefixtures("version_2")
async def test_a_server_that_ends_a_version_ends_it_for_itself(first: Harness, second: Harness) -> None:
    await first.engine.set_label("plain", "canary", 2)
    await second.internals.look()
    await first.engine.unload_version("plain", 1, force=True)
    await second.internals.look()
    assert second.engine.version("plain") == 1
    assert second.engine.version("plain:canary") == 2
    await second.open("a")
    await fails_exactly(first.step("a", x(1)), VersionElsewhere)
    await first.engine.load_version("plain", 1, PLAIN)
    assert (await first.step("a", x(1))).version == 1
    assert not first.engine.catalogue()["plain"].wanted


@pytest.mark.usefixtures("version_2")
async def test_a_version_with_sessions_elsewhere_is_in_use(first: Harness, second: Harness) -> None:
    await second.open("a", model="plain@2")
    await fails_exactly(first.engine.unload_version("plain", 2), ModelInUse, "it has 1")
    await make_resident_on_both(first, second, "b")
    await second.engine.close_session("a")
    await first.engine.unload_version("plain", 2)
