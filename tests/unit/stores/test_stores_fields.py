"""What a later server's records say beside what is known here is not lost when an earlier one steps their sessions."""

from __future__ import annotations

import dataclasses

import pytest

from stepwell_server.engine.state.fields import split
from stepwell_server.errors import StateCorrupt
from stepwell_server.store.fields import CRITICAL, pack_fields
from support.engine.harness import fails, x
from support.stores.durable import DurableStore
from support.stores.kinds import DURABLE
from support.stores.records import decode

pytestmark = DURABLE
FIELDS = pack_fields({2: b"tenant", 77: bytes(range(100))})
NAMES = [f"s{i}" for i in range(20)]


async def give_fields(durable_store: DurableStore, session_id: str, fields: bytes) -> None:
    """Have a session's record be as a later server would have written it."""
    stored = await durable_store.record(session_id)
    assert stored is not None
    record = decode(session_id, stored)
    later = dataclasses.replace(record, fields=fields, revision=record.revision + 1)
    await durable_store.put(session_id, later.encode(session_id))


async def fields_of(durable_store: DurableStore, session_id: str) -> bytes:
    """The fields of a record beside that of its version."""
    stored = await durable_store.record(session_id)
    assert stored is not None
    return split(decode(session_id, stored).fields)[1]


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("names", [["s3"], NAMES])
async def test_a_change_keeps_them(durable_store: DurableStore, names: list[str], steps: int) -> None:
    """Of one session and of a group, of one time step and of several, when the session was paged out in between."""
    async with durable_store.engine() as at:
        await at.open(*NAMES)
        durable_store.kill()
    await give_fields(durable_store, "s3", FIELDS)
    async with durable_store.engine(resident_rows=len(NAMES)) as at:
        for revision in (2, 3):
            rows = x(len(names), *([steps] if steps else []))
            await at.submit(names, rows).all()
            assert (await at.engine.session_info("s3")).revision == revision
            assert await fields_of(durable_store, "s3") == FIELDS
            await at.open(*[f"t{revision}-{i}" for i in range(len(NAMES))])
        await at.single("s3", x(1)).only()
        assert await fields_of(durable_store, "s3") == FIELDS
        await at.submit("s3", reset=True).all()
        assert await fields_of(durable_store, "s3") == FIELDS
        assert await fields_of(durable_store, "s4") == b""
        durable_store.kill()
    async with durable_store.engine() as at:
        await at.step("s3", x(1))
        assert await fields_of(durable_store, "s3") == FIELDS


async def test_they_go_with_their_session(durable_store: DurableStore) -> None:
    async with durable_store.engine() as at:
        await at.open("s")
        durable_store.kill()
    await give_fields(durable_store, "s", FIELDS)
    async with durable_store.engine() as at:
        await at.step("s", x(1))
        await at.engine.close_session("s")
        await at.open("s")
        await at.step("s", x(1))
        assert await fields_of(durable_store, "s") == b""


async def test_a_session_with_a_critical_one_is_not_stepped_and_not_changed(
    durable_store: DurableStore,
) -> None:
    async with durable_store.engine() as at:
        await at.open("s", "t")
        await at.step("t", x(1))
        durable_store.kill()
    await give_fields(durable_store, "s", pack_fields({9 | CRITICAL: b"key"}))
    stored = await durable_store.record("s")
    async with durable_store.engine() as at:
        await fails(
            at.step("s", x(1)), StateCorrupt, "critical field 0x8009, which this server does not know"
        )
        await fails(at.open("s"), StateCorrupt)
        assert await durable_store.record("s") == stored
        assert (await at.step("t", x(1))).revision == 2
