"""What a later server's records say beside what is known here is not lost when an earlier one steps their sessions."""

from __future__ import annotations

import dataclasses

import pytest

from stepwell_server.engine.state.fields import split
from stepwell_server.errors import StateCorrupt
from stepwell_server.store.base import Batch
from stepwell_server.store.fields import CRITICAL, pack_fields
from support.durable import Disk, Troubled
from support.engine import x
from support.records import decode

pytestmark = pytest.mark.stores("async", "sync")
FIELDS = pack_fields({2: b"tenant", 77: bytes(range(100))})
NAMES = [f"s{i}" for i in range(20)]


def give_fields(store: Troubled, session_id: str, fields: bytes) -> None:
    """Have a session's record be as a later server would have written it."""
    stored = store.store.get(session_id)
    assert stored is not None
    record = decode(session_id, stored)
    later = dataclasses.replace(record, fields=fields, revision=record.revision + 1)
    store.store.commit(Batch(puts=[(session_id, later.encode(session_id))]))


def fields_of(store: Troubled, session_id: str) -> bytes:
    """The fields of a record beside that of its version."""
    stored = store.store.get(session_id)
    assert stored is not None
    return split(decode(session_id, stored).fields)[1]


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("names", [["s3"], NAMES])
async def test_a_change_keeps_them(disk: Disk, names: list[str], steps: int) -> None:
    """Of one session and of a group, of one time step and of several, when the session was paged out in between."""
    async with disk.engine() as at:
        await at.open(*NAMES)
        disk.kill()
    give_fields(disk.store, "s3", FIELDS)
    async with disk.engine(resident_rows=len(NAMES)) as at:
        for revision in (2, 3):
            rows = x(len(names), *([steps] if steps else []))
            await at.submit(names, rows).all()
            assert (await at.engine.session_info("s3")).revision == revision
            assert fields_of(disk.store, "s3") == FIELDS
            await at.open(*[f"t{revision}-{i}" for i in range(len(NAMES))])
        await at.single("s3", x(1)).only()
        assert fields_of(disk.store, "s3") == FIELDS
        await at.submit("s3", reset=True).all()
        assert fields_of(disk.store, "s3") == FIELDS
        assert fields_of(disk.store, "s4") == b""
        disk.kill()
    async with disk.engine() as at:
        await at.step("s3", x(1))
        assert fields_of(disk.store, "s3") == FIELDS


async def test_they_go_with_their_session(disk: Disk) -> None:
    async with disk.engine() as at:
        await at.open("s")
        disk.kill()
    give_fields(disk.store, "s", FIELDS)
    async with disk.engine() as at:
        await at.step("s", x(1))
        await at.engine.close_session("s")
        await at.open("s")
        await at.step("s", x(1))
        assert fields_of(disk.store, "s") == b""


async def test_a_session_with_a_critical_one_is_not_stepped_and_not_changed(disk: Disk) -> None:
    async with disk.engine() as at:
        await at.open("s", "t")
        await at.step("t", x(1))
        disk.kill()
    give_fields(disk.store, "s", pack_fields({9 | CRITICAL: b"key"}))
    stored = disk.store.store.get("s")
    async with disk.engine() as at:
        with pytest.raises(StateCorrupt, match="critical field 0x8009, which this server does not know"):
            await at.step("s", x(1))
        with pytest.raises(StateCorrupt):
            await at.open("s")
        assert disk.store.store.get("s") == stored
        assert (await at.step("t", x(1))).revision == 2
