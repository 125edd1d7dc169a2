"""Records of a group are laid out once, and never of sessions that have gone.

How many layouts are kept, and what is remembered to find them, shows nowhere else: it is looked at inside.
"""

from __future__ import annotations

import numpy as np
import pytest

from stepwell_server.engine.commit import records as sheets
from support.engine.harness import Harness, running, x
from support.stores.records import decode

pytestmark = pytest.mark.stores("async", "sync")
COUNT = 40


async def check_stored(at: Harness, ids: list[str]) -> None:
    """The store says of each session what the table and the arena say."""
    for session_id in ids:
        stored = at.store.get(session_id)
        assert stored is not None
        found, info = decode(session_id, stored), (await at.engine.session_info(session_id))
        assert (found.revision, found.position) == (info.revision, info.position)
        state = (await at.state(session_id))["sum"]
        assert state.tobytes() in found.rows
        assert found.created == info.created


async def test_a_group_that_steps_again_shares_a_sheet_and_each_record_is_its_own(at: Harness) -> None:
    ids = [f"s{i}" for i in np.random.default_rng(1).permutation(COUNT)]
    await at.engine.open_sessions("plain", session_ids=ids)
    for step in range(3):
        await at.submit(ids, x(COUNT, seed=step)).all()
        await check_stored(at, ids)
    assert len(at.internals.templates._kept) == 1
    some = ids[5:30]
    for seed, kept in ((9, 1), (10, 2)):
        await at.submit(some, x(len(some), seed=seed)).all()
        await check_stored(at, ids)
        assert len(at.internals.templates._kept) == kept


async def test_sessions_that_come_together_once_leave_no_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheets, "_MAX_SEEN", 3)
    async with running() as at:
        ids = [f"s{i}" for i in range(COUNT)]
        await at.engine.open_sessions("plain", session_ids=ids)
        for start in range(10):
            await at.submit(ids[start:], x(COUNT - start, seed=start)).all()
        await check_stored(at, ids)
        kept = at.internals.templates
        assert not kept._kept
        assert len(kept._seen) == 3


async def test_sessions_that_have_the_handles_of_others_get_a_sheet_of_their_own(at: Harness) -> None:
    first = [f"old{i}" for i in range(COUNT)]
    await at.engine.open_sessions("plain", session_ids=first)
    for seed in range(2):
        await at.submit(first, x(COUNT, seed=seed)).all()
    before = at.internals.table.find_all(first).tolist()
    await at.engine.close_sessions(first)
    at.clock.advance(5)
    # handles are given out again, the last one first
    second = [f"new{i}" for i in reversed(range(COUNT))]
    await at.engine.open_sessions("plain", session_ids=second)
    in_order = sorted(second, key=lambda name: before.index(at.internals.table.find(name)))
    assert at.internals.table.find_all(in_order).tolist() == before
    await at.submit(in_order, x(COUNT, seed=2)).all()
    await check_stored(at, in_order)
    assert at.store.count() == COUNT


@pytest.mark.engine(resident_rows=COUNT)
async def test_new_sessions_do_not_hold_the_outputs_of_whoever_had_their_rows(at: Harness) -> None:
    ids = [f"s{i}" for i in range(COUNT)]
    await at.engine.open_sessions("plain", session_ids=ids)

    def rows(session_id: str) -> bytes:
        stored = at.store.get(session_id)
        assert stored is not None
        return decode(session_id, stored).rows

    fresh = rows("s0")
    await at.submit(ids, x(COUNT)).all()
    assert rows("s0") != fresh
    await at.engine.close_sessions(ids)
    await at.engine.open_sessions("plain", session_ids=ids[:30])
    await at.open("alone", "beside")
    for session_id in (*ids[:30], "alone", "beside"):
        assert rows(session_id) == fresh, session_id


async def test_sheets_are_kept_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheets, "_MAX_BYTES", 20_000)
    async with running() as at:
        ids = [f"s{i}" for i in range(COUNT)]
        await at.engine.open_sessions("plain", session_ids=ids)
        for start in range(0, 20, 2):
            for seed in (start, start + 1):
                await at.submit(ids[start:], x(COUNT - start, seed=seed)).all()
        await check_stored(at, ids)
        kept = at.internals.templates
        assert 0 < sum(sheet.byte_count for _, sheet in kept._kept.values()) == kept._bytes <= 20_000
