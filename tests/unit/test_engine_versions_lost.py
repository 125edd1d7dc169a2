"""Versions over servers that share a store, when moves are old, or the store has lost what it knew of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import SessionPolicy
from stepwell_server.engine.versions import document
from stepwell_server.errors import (
    InvalidInput,
    ModelMismatch,
    Unavailable,
    VersionElsewhere,
)
from stepwell_server.store.base import Batch
from support.engine.harness import Harness, x
from support.engine.two_engines import make_resident_on_both
from support.engine.version_changes import fails_exactly, hold_commits, load_2, stored_versions, two_versions
from support.engine.versions import after, carry_to, weights
from support.stores.durable import start_task
from support.stores.fake_shared_store import RemoteStore

KEEP, CARRY = SessionPolicy.KEEP, SessionPolicy.CARRY
MIGRATE, RESET = SessionPolicy.MIGRATE, SessionPolicy.RESET
INITIAL = np.array([[0.5, -0.25]], np.float32)
FIRST, SECOND, THIRD = x(1, seed=1), x(1, seed=2), x(1, seed=3)

pytestmark = pytest.mark.stores("fake_shared")


# ------------------------------------------------------------------------------------------------------- old moves


async def test_a_server_that_was_stopped_for_many_moves_still_reports_an_understandable_error() -> None:
    """Its version is forgotten by then; what it keeps and what it opens follows all the same."""
    async with two_versions() as (first, second):
        await load_2(first, second)
        await make_resident_on_both(first, second, "a", "b")
        await first.engine.set_default("plain", 2, CARRY)
        await second.internals.look()
        store: RemoteStore = second.store
        held = hold_commits(store)
        slow = second.submit("a", FIRST)
        await held
        opening = await start_task(second.engine.open_session("plain", session_id="new"))
        for version in range(3, 30):
            await carry_to(first, version)
            await first.engine.unload_version("plain", version - 1)
        await first.engine.unload_version("plain", 1)
        await first.internals.forget_unused("plain")
        assert [each["version"] for each in (await stored_versions(first))["versions"]] == [28, 29]
        assert len((await stored_versions(first))["moves"]) == 1
        store.release()
        assert (await slow.only()).version == 2
        assert (await opening).session.version == 2
        answer = await first.step("a", SECOND)
        assert (answer.version, answer.revision) == (29, 3)
        state = after(2, after(1, INITIAL, [x(1)])[1], [FIRST])[1]
        np.testing.assert_array_equal(answer.outputs["y"], after(29, state, [SECOND])[0])
        assert (await first.step("new", FIRST)).version == 29
        assert (await first.step("b", FIRST)).version == 29


async def test_a_number_that_was_forgotten_is_another_version() -> None:
    async with two_versions() as (first, second):
        await load_2(first, second)
        await first.open("a", "b")
        await first.engine.load_version("plain", 3, weights(3))
        for version in (2, 3):
            await first.engine.set_default("plain", version, CARRY)
            await first.step("b", FIRST)
        for version in (1, 2):
            await first.engine.unload_version("plain", version)
        await first.internals.forget_unused("plain")
        assert [each["version"] for each in (await stored_versions(first))["versions"]] == [2, 3]
        await first.engine.load_version("plain", 1, weights(7))
        assert (await first.step("a", FIRST)).version == 3
        await first.open("new", model="plain@1")
        answer = await first.step("new", FIRST)
        np.testing.assert_array_equal(answer.outputs["y"], after(7, weights(7).initial[0][None], [FIRST])[0])


async def test_versions_that_sessions_are_on_or_somebody_wants_are_not_forgotten() -> None:
    async with two_versions() as (first, second):
        await load_2(first)
        await first.open("pinned", model="plain@2")
        await carry_to(first, 3)
        await first.engine.unload_version("plain", 2, force=True)
        await first.internals.forget_unused("plain")
        assert [each["version"] for each in (await stored_versions(first))["versions"]] == [1, 2, 3]
        await second.internals.look()
        await load_2(second)
        assert (await second.step("pinned", FIRST)).version == 2


async def test_a_session_of_a_forgotten_version_is_asked_for_where_that_is_still_loaded() -> None:
    async with two_versions() as (first, second):
        await load_2(first, second)
        await second.engine.unload_version("plain", 2)
        await second.internals.forget_unused("plain")
        assert [each["version"] for each in (await stored_versions(second))["versions"]] == [1]
        await first.open("a", model="plain@2")
        await fails_exactly(second.step("a", FIRST), VersionElsewhere, "version 2")
        assert (await first.step("a", FIRST)).version == 2


# ------------------------------------------------------------------------------------- a store that has lost something


async def lose(at: Harness, content: dict[str, Any] | None) -> None:
    kept = None if content is None else json.dumps(content).encode()
    at.store.shared.commit(Batch(documents=[(document.name_of("plain"), kept)]))


@pytest.mark.parametrize("is_gone", [False, True])
async def test_a_change_that_the_store_has_lost_is_written_again(is_gone: bool) -> None:
    async with two_versions() as (first, second):
        await load_2(first, second)
        await second.internals.look()
        before, change = await stored_versions(first), second.engine.catalogue()["plain"].change
        await first.engine.set_default("plain", 2, CARRY)
        await lose(first, None if is_gone else before)
        assert change < first.engine.catalogue()["plain"].change
        await first.internals.look()
        assert (await stored_versions(first))["default"] == 2
        await second.internals.look()
        assert second.engine.version("plain") == 2


async def test_sessions_of_a_move_that_nobody_knows_any_more_stay_and_follow_the_next() -> None:
    async with two_versions() as (first, second):
        await load_2(first, second)
        await second.internals.look()
        before = await stored_versions(first)
        await first.open("a", "b")
        await first.engine.set_default("plain", 2, CARRY)
        await first.step("a", FIRST)
        await lose(first, before)  # and the server that knew it is gone
        answer = await second.step("a", SECOND)
        assert (answer.version, answer.revision) == (2, 2)
        assert (await second.step("b", FIRST)).version == 1
        assert (await stored_versions(second))["epoch"] == 1
        await second.engine.set_default("plain", 2, CARRY)
        assert (await second.step("b", SECOND)).version == 2
        await second.engine.set_default("plain", 1, CARRY)
        assert (await second.step("a", THIRD)).version == 1


async def test_a_record_of_no_version_that_ever_was_is_refused_for_good() -> None:
    async with two_versions() as (first, second):
        await load_2(first)
        await first.open("a", model="plain@2")
        await lose(first, None)
        await fails_exactly(second.step("a", x(1)), ModelMismatch)


async def test_a_document_of_a_later_server_is_not_followed() -> None:
    async with two_versions() as (first, second):
        await lose(first, (await stored_versions(first)) | {"form": 4})
        await fails_exactly(
            second.engine.set_label("plain", "canary", 1), Unavailable, "a later server wrote it"
        )
        await fails_exactly(second.engine.set_label("plain", "", 1), InvalidInput)
        assert (await second.engine.open_session("plain")).session.version == 1
