"""Versions of a model come and go, and sessions live through it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import SessionPolicy
from stepwell_server.engine.sessions.transfer import ExistingPolicy, SessionRecord
from stepwell_server.errors import (
    InvalidInput,
    MigrationFailed,
    ModelInUse,
    ModelNotFound,
    SessionExists,
    SessionGone,
    SpecsDiffer,
    VersionElsewhere,
    VersionExists,
    VersionNotFound,
)
from support.engine.fake_executor import PLAIN, WAIT_S
from support.engine.harness import Harness, fails, x
from support.engine.versions import WIDE, after, carry_to, serving, weights, widen
from support.stores.durable import start_task

KEEP, CARRY = SessionPolicy.KEEP, SessionPolicy.CARRY
MIGRATE, RESET = SessionPolicy.MIGRATE, SessionPolicy.RESET
INITIAL = np.array([[0.5, -0.25]], np.float32)


@pytest.fixture
async def at(request: pytest.FixtureRequest, store_kind: str) -> AsyncIterator[Harness]:
    """An engine that serves versions, made by `serving`."""
    mark = request.node.get_closest_marker("engine") or pytest.mark.engine.mark
    async with serving(*mark.args, **mark.kwargs) as found:
        yield found


async def at_version(at: Harness, session_id: str) -> tuple[int, bool]:
    info = await at.engine.session_info(session_id)
    return info.version, info.is_pinned


async def test_references_mean_versions(store_kind: str, at: Harness) -> None:
    await at.engine.load_version("plain", 2, weights(2), source="two.keras")
    await at.engine.load_version("plain", 7, weights(7))
    await at.engine.set_label("plain", "canary", 7)
    for ref, version in (("plain", 1), ("plain@2", 2), ("plain@7", 7), ("plain:canary", 7)):
        assert at.engine.model(ref).version == version
        opened = await at.engine.open_session(ref, session_id=ref)
        assert (opened.session.version, opened.session.is_pinned) == (version, ref != "plain")
        answer = await at.step(ref, x(1))
        start = weights(version).initial[0][None]
        np.testing.assert_array_equal(answer.outputs["y"], after(version, start, [x(1)])[0])
        assert answer.version == version
    for ref, error, said in (
        ("plain@3", VersionNotFound, r"version of model 'plain' must be .* \[1, 2, 7\]; got 3"),
        (
            "plain:nothing",
            VersionNotFound,
            r"label of model 'plain' must be .* \['canary'\]; got 'nothing'",
        ),
        ("other@1", ModelNotFound, "model must be one of"),
        ("plain@x", InvalidInput, "model must be NAME, NAME@VERSION"),
    ):
        await fails(at.engine.open_session(ref, session_id="new"), error, said)
    info = at.engine.model("plain")
    assert [(v.version, v.is_default, list(v.labels), v.source) for v in info.versions] == [
        (1, True, [], ""),
        (2, False, [], "two.keras"),
        (7, False, ["canary"], ""),
    ]
    assert at.engine.next_version("plain") == 8


@pytest.mark.engine(resident_rows=3)
async def test_a_carried_session_continues_with_its_state_under_the_new_weights(
    store_kind: str, at: Harness
) -> None:
    names = [f"s{i}" for i in range(7)]  # more than there are rows: some are paged out
    await at.open(*names)
    before = {name: await at.step(name, x(1, seed=i), request_ids=9) for i, name in enumerate(names)}
    await at.engine.load_version("plain", 2, weights(2))
    moved = await at.engine.set_default("plain", 2, CARRY)
    assert (moved.previous, moved.sessions) == (1, 7)
    for i, name in enumerate(names):
        state = after(1, INITIAL, [x(1, seed=i)])[1]
        info = await at.engine.session_info(name)
        assert (info.version, info.revision, info.position) == (2, 1, 1)
        np.testing.assert_array_equal((await at.state(name))["sum"], state)
        again = await at.step(name, x(1, seed=i), request_ids=9, expected=0)
        assert again.replayed
        assert again.version == 2
        np.testing.assert_array_equal(again.outputs["y"], before[name].outputs["y"])
        answer = await at.step(name, x(1, seed=50 + i), expected=1)
        assert (answer.version, answer.revision, answer.position) == (2, 2, 2)
        np.testing.assert_array_equal(answer.outputs["y"], after(2, state, [x(1, seed=50 + i)])[0])
    answer = await at.open_and_step("new", x(1))
    np.testing.assert_array_equal(answer.outputs["y"], after(2, weights(2).initial[0][None], [x(1)])[0])


@pytest.mark.engine(threads=True)
async def test_requests_under_way_end_on_the_version_where_they_began(store_kind: str, at: Harness) -> None:
    await at.open("a", "b")
    await at.engine.load_version("plain", 2, weights(2))
    first = await at.begin_pass("a", x(1, 3))  # three time steps
    second = at.submit("a", x(1, seed=1))  # waits in the session's line
    third = at.submit("b", x(1, seed=2))  # waits in the inbox
    await at.engine.set_default("plain", 2, CARRY)
    last = at.submit("a", x(1, seed=3))
    at.hooks.open_gate()
    _, state = after(1, INITIAL, list(np.moveaxis(x(1, 3), 1, 0)))
    one = await first.only()
    assert one.version == 1
    two, state = await second.only(), after(1, state, [x(1, seed=1)])[1]
    assert (two.version, two.revision) == (1, 2)
    other = await third.only()
    assert other.version == 1
    three = await last.only()
    assert (three.version, three.revision) == (2, 3)
    np.testing.assert_array_equal(three.outputs["y"], after(2, state, [x(1, seed=3)])[0])
    b = after(1, INITIAL, [x(1, seed=2)])[1]
    np.testing.assert_array_equal(
        (await at.step("b", x(1, seed=4))).outputs["y"], after(2, b, [x(1, seed=4)])[0]
    )


async def test_kept_sessions_stay_until_they_end(store_kind: str, at: Harness) -> None:
    await at.open("old")
    await at.engine.load_version("plain", 2, weights(2))
    moved = await at.engine.set_default("plain", 2, KEEP)
    assert moved == type(moved)(1, 0)
    await at.open("new")
    assert await at_version(at, "old") == (1, False)
    assert await at_version(at, "new") == (2, False)
    np.testing.assert_array_equal((await at.step("old", x(1))).outputs["y"], after(1, INITIAL, [x(1)])[0])
    assert at.engine.model("plain").versions[0].is_draining
    assert await at.internals.sessions_by_version("plain") == {1: 1, 2: 1}
    await fails(
        at.engine.unload_version("plain", 1),
        ModelInUse,
        r"version 1 of model 'plain' must have no sessions .* it has 1",
    )
    await at.engine.close_session("old")
    await at.engine.unload_version("plain", 1)
    with pytest.raises(VersionElsewhere if store_kind in {"fake_shared", "valkey"} else VersionNotFound):
        at.engine.model("plain@1")
    assert [model.version for model in at.internals.models] == [2]
    # what moved once is not what is kept: those on 1 would go nowhere, those on 2 go to 3
    await carry_to(at, 3)
    assert await at_version(at, "new") == (3, False)


async def test_pinned_sessions_stay_when_others_move(store_kind: str, at: Harness) -> None:
    await at.engine.open_session("plain@1", session_id="pinned")
    await at.open("follows")
    await at.step("pinned", x(1))
    await carry_to(at, 2)
    assert await at_version(at, "pinned") == (1, True)
    assert await at_version(at, "follows") == (2, False)
    state = after(1, INITIAL, [x(1)])[1]
    answer = await at.step("pinned", x(1, seed=1))
    np.testing.assert_array_equal(answer.outputs["y"], after(1, state, [x(1, seed=1)])[0])
    opened = await at.engine.fork("pinned", new_session_id="fork")
    assert (opened.session.version, opened.session.is_pinned) == (1, True)
    await fails(
        at.engine.open_session("plain@2", session_id="pinned"),
        SessionExists,
        "is open on version 1 of model 'plain'; got version 2",
    )
    assert (await at.engine.open_session("plain@1", session_id="pinned")).resumed
    assert (await at.engine.open_session("plain", session_id="pinned")).resumed


@pytest.mark.engine(resident_rows=2)
async def test_sessions_move_to_a_version_and_back(store_kind: str, at: Harness) -> None:
    await at.open("a", "b", "c")
    states = dict.fromkeys("abc", INITIAL)
    await at.engine.load_version("plain", 2, weights(2))
    version = 1
    for turn in range(6):
        for name in "abc" if turn % 2 else "a":
            answer = await at.step(name, x(1, seed=turn))
            y, states[name] = after(version, states[name], [x(1, seed=turn)])
            np.testing.assert_array_equal(answer.outputs["y"], y)
            assert answer.version == version
        version = 3 - version
        await at.engine.set_default("plain", version, CARRY)


@pytest.mark.parametrize("policy", [RESET, MIGRATE])
@pytest.mark.parametrize("resident_rows", [64, 2])
async def test_sessions_are_reset_or_migrated_to_a_version_with_other_tensors(
    policy: SessionPolicy, resident_rows: int, store_kind: str
) -> None:
    async with serving(resident_rows=resident_rows, migrations={"widen": widen}) as at:
        names = ["a", "b", "c", "d"]
        await at.open(*names)
        before = {name: await at.step(name, x(1, seed=i), request_ids=5) for i, name in enumerate(names)}
        long = await at.step("d", x(1, 3, seed=8), request_ids=6)
        await at.engine.load_version("plain", 2, WIDE)
        await fails(
            at.engine.set_default("plain", 2, CARRY),
            SpecsDiffer,
            r"state 'sum' is missing; state 'wide' is new.*output 'z' is new",
        )
        assert await at_version(at, "a") == (1, False)
        await at.engine.set_default("plain", 2, policy)
        for i, name in enumerate(names):
            steps = [x(1, seed=i)] + (list(np.moveaxis(x(1, 3, seed=8), 1, 0)) if name == "d" else [])
            old = after(1, INITIAL, steps)[1]
            state: Any = WIDE.initial[0][None]
            if policy is MIGRATE:
                state = np.concatenate([old, -old], axis=1)
            info = await at.engine.session_info(name)
            revision, position = (2, 4) if name == "d" else (1, 1)
            assert (info.version, info.revision) == (2, revision)
            assert info.position == (0 if policy is RESET else position)
            np.testing.assert_array_equal((await at.state(name))["wide"], state)
            told = long if name == "d" else before[name]
            again = await at.step(
                name, x(1, seed=i), request_ids=6 if name == "d" else 5, expected=revision - 1
            )
            assert again.replayed
            np.testing.assert_array_equal(again.outputs["y"], told.outputs["y"])
            answer = await at.step(name, x(1, seed=40 + i), expected=revision)
            expected = state * np.float32(0.5) + np.tile(x(1, seed=40 + i), 2) + np.float32(1)
            np.testing.assert_array_equal(answer.outputs["z"], expected)
            assert answer.position == (1 if policy is RESET else position + 1)


@pytest.mark.engine(threads=True)
async def test_a_busy_session_is_reset_after_its_pass_and_refuses_waiting_steps(
    store_kind: str, at: Harness
) -> None:
    await at.open("a", "b")
    await at.engine.load_version("plain", 2, WIDE)
    first = await at.begin_pass("a", x(1))
    waits = at.submit("a", x(1, seed=1))
    await at.engine.set_default("plain", 2, RESET)
    at.hooks.open_gate()
    assert (await first.only()).version == 1
    await fails(waits.only(), Exception, "moved to version 2 of model 'plain' while the request waited")
    info = await at.engine.session_info("a")
    assert (info.version, info.revision, info.position) == (2, 1, 0)
    answer = await at.step("a", x(1, seed=2), expected=1)
    assert (answer.version, answer.revision, answer.position) == (2, 2, 1)


async def test_a_migration_that_fails_changes_nothing(store_kind: str) -> None:
    def raises(states: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("no such state")

    def short(states: dict[str, Any]) -> dict[str, Any]:
        return {"wide": np.zeros((1, 3), np.float32)}

    def nothing(states: dict[str, Any]) -> dict[str, Any]:
        return {}

    def not_a_number(states: dict[str, Any]) -> dict[str, Any]:
        return {"wide": np.full((len(states["sum"]), 4), np.nan, np.float32)}

    given = {"raises": raises, "short": short, "nothing": nothing, "nan": not_a_number}
    async with serving(migrations=given) as at:
        await at.open_and_step("a", x(1))
        await at.engine.load_version("plain", 2, WIDE)
        for name, said in (
            ("raises", "'raises' raised RuntimeError: no such state"),
            ("short", r"'short' must return state 'wide' of shape \[1, 4\]"),
            ("nothing", r"'nothing' must return the states \['wide'\]; it returned \[\]"),
            ("nan", "'nan' must return finite numbers"),
            ("other", "migration must be one that the server was started with"),
            ("", "migration must be one that the server was started with"),
        ):
            await fails(at.engine.set_default("plain", 2, MIGRATE, name), MigrationFailed, said)
            assert await at_version(at, "a") == (1, False)
            assert at.engine.model("plain").version == 1


async def test_impossible_changes_of_versions_are_refused(store_kind: str, at: Harness) -> None:
    await at.open("a")
    for call, error, message in (
        (
            at.engine.load_version("plain", 1, weights(2)),
            VersionExists,
            "must be new; 1 is loaded: load it as 2",
        ),
        (at.engine.load_version("pl@in", 1, weights(2)), InvalidInput, "name of a model must be"),
        (at.engine.load_version("plain", 0, weights(2)), InvalidInput, "version must be 1 to"),
        (at.engine.set_default("plain", 2, CARRY), VersionNotFound, r"\[1\]; got 2"),
        (at.engine.set_label("plain", "canary", 2), VersionNotFound, r"\[1\]; got 2"),
        (
            at.engine.set_label("plain", "canary", 0),
            VersionNotFound,
            r"label to remove .* \[\]; got 'canary'",
        ),
        (at.engine.set_label("plain", "12", 1), InvalidInput, "label must be"),
        (at.engine.unload_version("plain", 1), ModelInUse, "it has 1"),
    ):
        await fails(call, error, message)
    await at.engine.load_version("plain", 2, weights(2))
    await at.engine.close_session("a")
    await fails(at.engine.unload_version("plain", 1), ModelInUse, "must not be the default")
    await fails(at.engine.unload_version("other", 1), ModelNotFound)
    assert at.engine.model("plain").version == 1


@pytest.mark.engine(resident_rows=4)
async def test_versions_share_rows_where_they_can(store_kind: str, at: Harness) -> None:
    await at.engine.load_version("plain", 2, weights(2))
    await at.engine.load_version("plain", 3, WIDE)
    one, two, three = at.internals.models
    assert one.arena is two.arena
    assert one.slots is two.slots
    assert three.arena is not one.arena
    for i in range(3):
        await at.engine.open_session("plain@1", session_id=f"one{i}")
        await at.engine.open_session("plain@2", session_id=f"two{i}")
    states: dict[str, Any] = {}
    for turn in range(3):  # six sessions on four rows: those of one version push those of the other out
        for i in range(3):
            for version, name in ((1, f"one{i}"), (2, f"two{i}")):
                start = states.get(name, weights(version).initial[0][None])
                answer = await at.step(name, x(1, seed=turn * 10 + i))
                y, states[name] = after(version, start, [x(1, seed=turn * 10 + i)])
                np.testing.assert_array_equal(answer.outputs["y"], y)
    assert one.slots.resident <= 4


async def test_members_of_several_versions_are_read_together(store_kind: str, at: Harness) -> None:
    await at.engine.load_version("plain", 2, weights(2))
    await at.engine.open_session("plain@2", session_id="b")
    await at.open("a", "c")
    read = await at.engine.get_states(["a", "b", "c"])
    np.testing.assert_array_equal(read.members, [0, 1, 2])
    np.testing.assert_array_equal(
        read.state["sum"], np.concatenate([INITIAL, weights(2).initial[0][None], INITIAL])
    )
    assert read.version == 0


async def test_sessions_of_several_versions_are_not_forked_together(store_kind: str, at: Harness) -> None:
    await at.engine.load_version("plain", 2, weights(2))
    await at.engine.open_session("plain@2", session_id="b")
    await at.open("a", "c")
    message = "session_ids must be sessions of one version of their model; got sessions of several"
    await fails(
        at.engine.fork_sessions(["a", "b", "c"], new_session_ids=["x", "y", "z"]), InvalidInput, message
    )
    forked = await at.engine.fork_sessions(["a", "c"], new_session_ids=["x", "z"])
    assert forked.version == 1
    assert (await at.engine.fork_sessions(["b"], new_session_ids=["y"])).version == 2


async def test_a_model_ends_and_begins_again() -> None:
    async with serving({"plain": PLAIN, "other": weights(2)}) as at:
        await at.open_and_step("a", x(1))
        await at.engine.unload_version("plain", 1, force=True)
        assert at.engine.model_names() == ["other"]
        await fails(at.engine.open_session("plain"), ModelNotFound)
        await at.engine.load_version("plain", 1, PLAIN)
        answer = await at.step("a", x(1, seed=1))
        np.testing.assert_array_equal(answer.outputs["y"], after(1, INITIAL, [x(1), x(1, seed=1)])[0])


async def test_a_session_of_a_version_that_is_not_loaded_expires() -> None:
    async with serving({"plain": PLAIN, "other": weights(2)}, max_session_idle_s=60.0) as at:
        await at.open("a")
        await at.engine.unload_version("plain", 1, force=True)
        await fails(at.step("a", x(1)), ModelNotFound)
        at.clock.advance(61)
        await at.internals.expire_idle()
        await at.engine.load_version("plain", 1, PLAIN)
        await fails(at.step("a", x(1)), SessionGone)


@pytest.mark.parametrize("policy", [CARRY, MIGRATE])
@pytest.mark.parametrize("resident_rows", [64, 1])
async def test_an_export_is_of_the_current_version(
    policy: SessionPolicy, resident_rows: int, store_kind: str
) -> None:
    def add_one(states: dict[str, Any]) -> dict[str, Any]:
        return {"sum": states["sum"] + np.float32(1)}

    async with serving(migrations={"add_one": add_one}, resident_rows=resident_rows) as at:
        await at.open("a", "b")  # with one row, "a" is paged out
        state = (await at.state("a"))["sum"]
        await at.state("b")
        await at.engine.load_version("plain", 2, weights(2))
        await at.engine.set_default("plain", 2, policy)
        record = await at.exported("a")
        await at.engine.import_sessions([SessionRecord("copy", "a", record)], ExistingPolicy.REFUSE)
        assert await at_version(at, "copy") == (2, False)
        wanted = state + np.float32(policy is MIGRATE)
        np.testing.assert_array_equal((await at.state("copy"))["sum"], wanted)


async def test_sessions_that_are_made_while_the_default_moves_move_too(store_kind: str, at: Harness) -> None:
    await at.engine.load_version("plain", 2, weights(2))
    moving = await start_task(at.engine.set_default("plain", 2, CARRY))
    await at.open("a", "b")
    await moving
    assert await at_version(at, "a") == (2, False)
    assert (await at.step("a", x(1))).version == 2


async def test_a_session_that_ends_while_it_is_late_for_a_move_holds_up_no_other(
    store_kind: str, at: Harness
) -> None:
    await at.open("a")
    await at.engine.load_version("plain", 2, weights(2))
    moving = await start_task(at.engine.set_default("plain", 2, RESET))
    await at.engine.close_session("a")
    await moving
    await asyncio.wait_for(at.engine.set_default("plain", 1, CARRY), WAIT_S)


@pytest.mark.parametrize(
    ("others", "unloaded", "default", "new_default"), [([2, 3], 3, 2, 2), ([2], 2, 0, 4), ([2, 3], 2, 3, 4)]
)
async def test_the_default_that_is_wanted_outlives_other_versions(
    others: list[int], unloaded: int, default: int, new_default: int, store_kind: str, at: Harness
) -> None:
    """A version other than the default is unloaded, or the substitute for the default."""
    await at.engine.unload_version("plain", 1)
    for version in others:
        await at.engine.load_version("plain", version, weights(version))
    await at.engine.unload_version("plain", unloaded, force=unloaded == 2)
    own = at.engine.catalogue()["plain"]
    assert (own.default, own.wanted) == (default, 1)
    if new_default not in others:
        await at.engine.load_version("plain", new_default, weights(new_default))
    assert (await at.engine.set_default("plain", new_default, CARRY)).previous == 1


@pytest.mark.engine(resident_rows=1)
async def test_a_default_that_comes_back_by_keep_keeps_its_new_sessions(store_kind: str, at: Harness) -> None:
    await carry_to(at, 2)
    await at.engine.set_default("plain", 1, KEEP)
    await at.open("a", "b")
    await at.state("a")
    await at.state("b")
    assert await at_version(at, "a") == (1, False)
    assert (await at.step("a", x(1))).version == 1


@pytest.mark.engine(threads=True)
async def test_a_read_of_several_versions_never_reads_another_session_of_a_handle(at: Harness) -> None:
    await at.engine.load_version("plain", 2, weights(2))
    await at.engine.open_session("plain@1", session_id="a")
    await at.engine.open_session("plain@2", session_id="b")
    busy = await at.begin_pass("a", x(1, 3))
    reading = asyncio.create_task(at.engine.get_states(["a", "b"]))
    await asyncio.sleep(0)  # it waits for `a` now
    await at.engine.close_session("b")
    await at.engine.open_session("plain@2", session_id="c", state={"sum": np.full((1, 2), 7, np.float32)})
    at.hooks.open_gate()
    await busy.only()
    read = await reading
    assert read.members.tolist() == [0]
    assert 7.0 not in read.state["sum"]
    ((members, error),) = read.errors
    assert members.tolist() == [1]
    assert isinstance(error, SessionGone)


async def test_a_session_that_is_paged_out_makes_moves_that_others_need_no_more(at: Harness) -> None:
    await at.open_and_step("asleep", x(1))
    at.internals.page_out("asleep")
    for version in range(2, 8):
        await at.engine.load_version("plain", version, weights(version))
        await at.engine.set_default("plain", version, RESET)
        await at.engine.unload_version("plain", version - 1)
    await at.internals.forget_unused("plain")
    answer = await at.step("asleep", x(1))
    assert answer.version == 7
    np.testing.assert_array_equal(answer.outputs["y"], after(7, weights(7).initial[0][None], [x(1)])[0])
