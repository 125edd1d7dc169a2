"""What is known of versions survives the server: which are there, which is the default, where sessions are."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import DefaultChange, SessionPolicy
from stepwell_server.engine.catalog import changes
from stepwell_server.engine.sessions.transfer import ExistingPolicy, SessionRecord
from stepwell_server.engine.state.fields import Mark, mark_of
from stepwell_server.engine.versions import document
from stepwell_server.engine.versions.registry import Versions
from stepwell_server.errors import (
    ModelLoadFailed,
    ModelMismatch,
    ServerError,
    Unavailable,
    VersionExists,
    VersionNotFound,
)
from stepwell_server.store.base import Batch
from stepwell_server.store.record import decode_header
from support.engine.fake_executor import PLAIN
from support.engine.harness import Answer, Harness, fails, x
from support.engine.versions import WIDE, after, carry_to, serving, weights, widen
from support.stores.durable import DurableStore, stalled, start_task
from support.stores.kinds import DURABLE, ON_DISK

CARRY, KEEP = SessionPolicy.CARRY, SessionPolicy.KEEP
MIGRATE, RESET = SessionPolicy.MIGRATE, SessionPolicy.RESET
INITIAL = np.array([[0.5, -0.25]], np.float32)
BOTH = {"plain@1": PLAIN, "plain@2": weights(2)}

pytestmark = DURABLE


def on(
    durable_store: DurableStore, programs: Any = None, **options: Any
) -> AbstractAsyncContextManager[Harness]:
    """A server process that serves versions of `plain`."""
    return durable_store.engine(programs, run=serving, **options)


async def marks(durable_store: DurableStore, *session_ids: str) -> list[Mark | None]:
    """What the records of sessions say of their versions."""
    found = [await durable_store.record(session_id) for session_id in session_ids]
    return [mark_of(decode_header(i, r).fields) for i, r in zip(session_ids, found, strict=True) if r]


async def expect(at: Harness, name: str, version: int, state: Any, seed: int, *, weight: int = 0) -> Any:
    """A step runs on a version from a state; the state after it. `weight` is the version's number unless it is given."""
    answer = await at.step(name, x(1, seed=seed))
    assert answer.version == version
    y, state = after(weight or version, state, [x(1, seed=seed)])
    np.testing.assert_array_equal(answer.outputs["y"], y)
    return state


async def test_a_carry_is_one_commit_and_records_follow(durable_store: DurableStore) -> None:
    async with on(durable_store, is_killed=True) as at:
        await at.open("stepped", "idle")
        state = await expect(at, "stepped", 1, INITIAL, 1)
        await at.engine.load_version("plain", 2, weights(2), source="two.keras")
        commits = len(durable_store.store.tried)
        await at.engine.set_default("plain", 2, CARRY)
        assert len(durable_store.store.tried) == commits + 1
        assert not durable_store.store.tried[-1].puts
        assert await marks(durable_store, "stepped", "idle") == [Mark(1, 0, is_pinned=False)] * 2
    async with on(durable_store, BOTH, is_killed=True) as at:
        assert at.engine.model("plain").version == 2
        assert at.engine.model("plain").versions[1].source == "two.keras"
        state = await expect(at, "stepped", 2, state, 2)
        assert await marks(durable_store, "stepped", "idle") == [
            Mark(2, 1, is_pinned=False),
            Mark(1, 0, is_pinned=False),
        ]
    async with on(durable_store, BOTH) as at:
        await expect(at, "stepped", 2, state, 3)
        await expect(at, "idle", 2, INITIAL, 4)


async def test_a_load_that_moves_the_default_is_one_commit(durable_store: DurableStore) -> None:
    async with on(durable_store, is_killed=True) as at:
        await at.open("a")
        state = await expect(at, "a", 1, INITIAL, 1)
        commits = len(durable_store.store.tried)
        becomes = DefaultChange(2, CARRY, leaves=True)
        moved = await at.engine.load_version("plain", 2, weights(2), labels=["new"], becomes=becomes)
        assert (moved.previous, moved.sessions) == (1, 1)
        assert len(durable_store.store.tried) == commits + 1
        state = await expect(at, "a", 2, state, 2)
    async with on(durable_store, BOTH) as at:
        versions = at.engine.model("plain").versions
        assert [(v.is_default, v.is_draining, list(v.labels)) for v in versions] == [
            (False, True, []),
            (True, False, ["new"]),
        ]
        await expect(at, "a", 2, state, 3)


@pytest.mark.parametrize("why", ["store", "stopped", "specs"])
async def test_a_load_that_cannot_become_the_default_leaves_nothing(
    durable_store: DurableStore, why: str
) -> None:
    def stop() -> None:
        raise ModelLoadFailed("nobody wants it any more")

    async with on(durable_store) as at:
        await at.open("a")
        known = dict(at.engine.catalogue().get("plain", Versions("plain")).known)
        if why == "store":
            durable_store.store.fail(Unavailable("the disk is full"))
        await fails(
            at.engine.load_version(
                "plain",
                2,
                WIDE if why == "specs" else weights(2),
                labels=["new"],
                becomes=DefaultChange(2, CARRY),
                begin=stop if why == "stopped" else lambda: None,
            ),
            ServerError,
        )
        own = at.engine.catalogue()["plain"]
        assert (own.known, own.labels, own.default, own.history.epoch) == (known, {}, 1, 0)
        assert [model.version for model in at.internals.models] == [1]
        state = await expect(at, "a", 1, INITIAL, 1)
        assert at.engine.next_version("plain") == 2, "the number is free"
        await at.engine.load_version("plain", 2, weights(2), becomes=DefaultChange(2, CARRY))
        await expect(at, "a", 2, state, 2)


async def test_a_limit_for_being_idle_goes_along(durable_store: DurableStore) -> None:
    async with on(durable_store, is_killed=True) as at:
        for name in ("stepped", "idle"):
            await at.engine.open_session("plain", session_id=name, max_idle_ms=60_000)
        await at.step("stepped", x(1))
        await at.engine.load_version("plain", 2, weights(2), source="two.keras")
        await at.engine.set_default("plain", 2, CARRY)
        assert (await at.step("stepped", x(1))).version == 2
        (exported,) = await at.engine.export_sessions(["idle"], deadline=float("inf"))
        assert decode_header("idle", exported).max_idle_ms == 60_000  # type: ignore[arg-type]
    async with on(durable_store, BOTH) as at:
        for name in ("stepped", "idle"):
            assert (await at.engine.session_info(name)).max_idle_s == 60.0
        at.clock.advance(50.0)
        assert (await at.step("idle", x(1))).version == 2
        await at.expire(after_s=10.5)
        assert [info.session_id for info in (await at.engine.list_sessions())[0]] == ["idle"]


@pytest.mark.parametrize("kept", [False, True])
async def test_a_carry_that_is_cut_off_has_happened_for_all_or_for_none(
    durable_store: DurableStore, *, kept: bool
) -> None:
    names = ["a", "b", "c"]
    async with on(durable_store) as at:
        await at.open(*names)
        states = {name: await expect(at, name, 1, INITIAL, i) for i, name in enumerate(names)}
        await at.engine.load_version("plain", 2, weights(2))
        durable_store.store.stall(kept=kept)
        moving = await start_task(at.engine.set_default("plain", 2, CARRY))
        await stalled(durable_store.store)
        durable_store.kill()
        moving.cancel()
    version = 2 if kept else 1
    async with on(durable_store, BOTH) as at:
        assert at.engine.model("plain").version == version
        for i, name in enumerate(names):
            await expect(at, name, version, states[name], 10 + i)


async def test_a_carry_that_the_store_cannot_keep_changes_nothing(durable_store: DurableStore) -> None:
    async with on(durable_store) as at:
        await at.open("a")
        await at.engine.load_version("plain", 2, weights(2))
        durable_store.store.fail(Unavailable("the disk is full"))
        await fails(at.engine.set_default("plain", 2, CARRY), Unavailable)
        assert at.engine.model("plain").version == 1
        state = await expect(at, "a", 1, INITIAL, 1)
        await at.engine.set_default("plain", 2, CARRY)
        await expect(at, "a", 2, state, 2)
        durable_store.store.fail(Unavailable("the disk is full"))
        await fails(at.engine.load_version("plain", 3, weights(3)), Unavailable)
        with pytest.raises(VersionNotFound):
            at.engine.model("plain@3")
        await at.engine.load_version("plain", 3, weights(3))


@pytest.mark.parametrize("policy", [RESET, MIGRATE])
async def test_a_session_with_a_pending_move_moves_when_it_is_read(
    policy: SessionPolicy, durable_store: DurableStore
) -> None:
    options: dict[str, Any] = {"migrations": {"widen": widen}}
    async with on(durable_store, **options, is_killed=True) as at:
        await at.open("a", "b")
        state = await expect(at, "a", 1, INITIAL, 1)
        told = await at.step("a", x(1, seed=2), request_ids=7)
        state = after(1, state, [x(1, seed=2)])[1]
        await at.engine.load_version("plain", 2, WIDE)
        await at.engine.set_default("plain", 2, policy)
    wide = WIDE.initial[0][None] if policy is RESET else np.concatenate([state, -state], axis=1)
    async with on(durable_store, {"plain@2": WIDE}, **options) as at:
        info = await at.engine.session_info("a")
        assert (info.version, info.revision, info.position) == (2, 2, 0 if policy is RESET else 2)
        again = await at.step("a", x(1, seed=2), request_ids=7, expected=1)
        assert again.replayed
        np.testing.assert_array_equal(again.outputs["y"], told.outputs["y"])
        np.testing.assert_array_equal((await at.state("a"))["wide"], wide)
        listed, _ = await at.engine.list_sessions()
        assert [(each.session_id, each.version) for each in listed] == [("a", 2), ("b", 2)]
        record = await at.exported("b")
        await at.engine.import_sessions([SessionRecord("copy", "b", record)], ExistingPolicy.REFUSE)
        b = WIDE.initial[0][None] if policy is RESET else np.concatenate([INITIAL, -INITIAL], axis=1)
        np.testing.assert_array_equal((await at.state("copy"))["wide"], b)


async def test_kept_and_pinned_sessions_are_where_they_were(durable_store: DurableStore) -> None:
    async with on(durable_store, is_killed=True) as at:
        await at.engine.load_version("plain", 2, weights(2))
        await at.engine.open_session("plain@1", session_id="pinned")
        await at.open("kept")
        await at.engine.set_default("plain", 2, KEEP)
        await at.open("new")
        await carry_to(at, 3)
        await at.engine.set_label("plain", "canary", 2)
    async with on(durable_store, {**BOTH, "plain@3": weights(3)}) as at:
        assert at.engine.model("plain:canary").version == 2
        await expect(at, "pinned", 1, INITIAL, 1)
        await expect(at, "kept", 1, INITIAL, 2)
        await expect(at, "new", 3, weights(2).initial[0][None], 3)
        assert await at.internals.sessions_by_version("plain") == {1: 2, 3: 1}


@pytest.mark.parametrize("at_start", [True, False])
async def test_a_draining_version_drains_after_a_restart_too(
    durable_store: DurableStore, *, at_start: bool
) -> None:
    def draining(at: Harness) -> list[bool]:
        return [version.is_draining for version in at.engine.model("plain").versions]

    async with on(durable_store, is_killed=True) as at:
        await at.open("a")
        for version, policy, leaves in ((2, KEEP, None), (3, CARRY, None), (4, CARRY, True)):
            await at.engine.load_version("plain", version, weights(version), source=f"{version}.keras")
            await at.engine.set_default("plain", version, policy, leaves=leaves)
        assert draining(at) == [True, False, True, False]
        await at.engine.set_label("plain", "old", 3)
        assert draining(at) == [True, False, False, False]
        await at.engine.set_label("plain", "old", 0)
    programs = {f"plain@{version}": PLAIN if version == 1 else weights(version) for version in range(1, 5)}
    async with on(durable_store, programs if at_start else {"plain@1": PLAIN}) as at:
        if not at_start:
            for version in (2, 3, 4):
                await at.engine.load_version("plain", version, weights(version), source=f"{version}.keras")
        assert draining(at) == [True, False, True, False]
        # what was unloaded and is loaded again by somebody stays
        await at.engine.unload_version("plain", 3)
        await at.engine.load_version("plain", 3, weights(3))
        await at.engine.set_default("plain", 1, CARRY)
        assert draining(at) == [False] * 4


@ON_DISK  # another server may have it
async def test_a_default_that_is_not_loaded_yet_is_waited_for(durable_store: DurableStore) -> None:
    async with on(durable_store, is_killed=True) as at:
        await at.open("a")
        await carry_to(at, 2)
    async with on(durable_store, is_killed=True) as at:  # version 1 alone
        assert at.engine.model("plain").version == 1
        await fails(
            at.step("a", x(1)), VersionNotFound, "is on version 2 of model 'plain', which is not loaded"
        )
        catalogue = at.engine.catalogue()["plain"]
        assert catalogue.wanted == 2
        await at.engine.load_version("plain", 2, weights(2))
        assert at.engine.model("plain").version == 2
        await expect(at, "a", 2, INITIAL, 1)
    async with on(durable_store) as at:  # or the sessions come back
        await at.engine.set_default("plain", 1, CARRY)
        state = after(2, INITIAL, [x(1, seed=1)])[1]
        await expect(at, "a", 1, state, 2)


async def test_a_session_opened_on_a_version_that_others_left_stays(durable_store: DurableStore) -> None:
    async with on(durable_store, is_killed=True) as at:
        await at.open("moved")
        await carry_to(at, 2)
        await at.engine.set_default("plain", 1, KEEP)
        await at.open("a")
        state = await expect(at, "a", 1, INITIAL, 1)
    async with on(durable_store, BOTH) as at:
        await expect(at, "a", 1, state, 2)
        assert (await at.engine.session_info("moved")).version == 2


@ON_DISK  # another server may have it
async def test_a_session_opened_after_the_default_was_unloaded_stays(durable_store: DurableStore) -> None:
    async with on(durable_store, is_killed=True) as at:
        await at.engine.load_version("plain", 2, weights(2))
        await at.engine.set_default("plain", 2, RESET)
        await at.engine.unload_version("plain", 2, force=True)
        await at.open("a")
        state = await expect(at, "a", 1, INITIAL, 1)
    async with on(durable_store) as at:
        await expect(at, "a", 1, state, 2)


@ON_DISK  # a number stays one file while other servers may serve it
async def test_a_number_has_one_set_of_weights_while_sessions_may_have_them(
    durable_store: DurableStore,
) -> None:
    async with on(durable_store) as at:
        await at.open("a")
        await carry_to(at, 2)
        await at.engine.unload_version("plain", 1)
        await fails(
            at.engine.load_version("plain", 1, weights(3)),
            VersionExists,
            r"1 had other weights, .* load it as 3",
        )
        await at.engine.load_version("plain", 1, PLAIN)


@ON_DISK  # no server starts with another file
async def test_the_file_of_a_version_was_replaced(durable_store: DurableStore) -> None:
    async with on(durable_store) as at:
        await at.open("a")
    async with on(durable_store, {"plain": weights(5)}) as at:
        await fails(at.step("a", x(1)), ModelMismatch, "belongs to model 'plain' with fingerprint f-plain")


@ON_DISK  # no server starts with another file
async def test_the_file_of_a_version_that_sessions_have_left_was_replaced(
    durable_store: DurableStore,
) -> None:
    async with on(durable_store, is_killed=True) as at:
        await at.open("plain", "marked")
        await at.engine.open_session("plain@1", session_id="pinned")
        await carry_to(at, 2)
        await at.engine.set_default("plain", 1, CARRY)
        states = {name: await expect(at, name, 1, INITIAL, 1) for name in ("plain", "marked")}
        await at.engine.set_default("plain", 2, CARRY)
        states["marked"] = await expect(at, "marked", 2, states["marked"], 2)
    replaced = {"plain@1": weights(5), "plain@2": weights(2)}
    async with on(durable_store, replaced, is_killed=True) as at:
        await fails(
            at.step("pinned", x(1)), ModelMismatch, "belongs to model 'plain' with fingerprint f-plain"
        )
        await at.open("new")
        await at.engine.set_default("plain", 1, CARRY)
        await expect(at, "marked", 1, states["marked"], 3, weight=5)
        await expect(at, "plain", 1, states["plain"], 3, weight=5)


@ON_DISK  # no server starts with another file
async def test_a_file_that_was_replaced_comes_back(durable_store: DurableStore) -> None:
    async with on(durable_store, is_killed=True) as at:
        await at.open("a", "b")
        states = {name: await expect(at, name, 1, INITIAL, 1) for name in ("a", "b")}
        await carry_to(at, 2)
    async with on(durable_store, {"plain@1": weights(5), "plain@2": weights(2)}, is_killed=True) as at:
        states["b"] = await expect(at, "b", 2, states["b"], 2)
        await at.engine.set_label("plain", "kept", 2)  # the store says what is known now
    async with on(durable_store, BOTH) as at:
        known = at.engine.catalogue()["plain"].known
        assert {version: each.fingerprint for version, each in known.items()} == {
            1: "f-plain",
            2: "f-plain-2",
        }
        for name in ("a", "b"):
            await expect(at, name, 2, states[name], 3)


async def test_moves_that_nobody_makes_are_forgotten(
    durable_store: DurableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "MAX_KNOWN_VERSIONS", 8)
    async with on(durable_store, is_killed=True) as at:
        await at.open("asleep", "active")
        asleep = await expect(at, "asleep", 1, INITIAL, 0)
        active = INITIAL
        for version in range(2, 42):
            await carry_to(at, version)
            await at.engine.unload_version("plain", version - 1)
            active = await expect(at, "active", version, active, version)
        own = at.engine.catalogue()["plain"]
        assert len(own.history.moves) <= 8
        assert len(own.known) <= 8
        assert len(at.internals.models) == 1
        asleep = await expect(at, "asleep", 41, asleep, 1)
    async with on(durable_store, {"plain@41": weights(41)}) as at:
        await expect(at, "asleep", 41, asleep, 2)
        await expect(at, "active", 41, active, 3)


@pytest.mark.parametrize("count", [1, 20])  # records of many sessions are laid out together
async def test_what_ends_behind_a_move_is_carried_after_a_kill(
    durable_store: DurableStore, count: int
) -> None:
    names = [f"s{i}" for i in range(count)]
    async with on(durable_store, threads=True, is_killed=True) as at:
        await at.open(*names)
        await at.engine.load_version("plain", 2, weights(2))
        under_way = await at.begin_pass(names, x(count))
        await at.engine.set_default("plain", 2, CARRY)
        at.hooks.open_gate()
        answers = await under_way.all()
        assert [answer.version for answer in answers if isinstance(answer, Answer)] == [1] * count
        assert set(await marks(durable_store, *names)) == {Mark(1, 0, is_pinned=False)}
    async with on(durable_store, BOTH) as at:
        assert await at.internals.sessions_by_version("plain") == {2: count}
        assert (await at.step(names[-1], x(1))).version == 2


async def test_sessions_follow_the_default_after_the_document_of_their_last_move_was_lost(
    durable_store: DurableStore,
) -> None:
    async with on(durable_store, is_killed=True) as at:
        await at.open("a")
        await carry_to(at, 2)
        state = await expect(at, "a", 2, INITIAL, 1)
    await durable_store.write(Batch(documents=[(document.name_of("plain"), None)]))
    async with on(durable_store, BOTH, is_killed=True) as at:
        state = await expect(at, "a", 2, state, 2)
        await carry_to(at, 3)
        state = await expect(at, "a", 3, state, 3)
    async with on(durable_store, {**BOTH, "plain@3": weights(3)}) as at:
        await expect(at, "a", 3, state, 4)
