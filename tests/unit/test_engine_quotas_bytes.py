"""The quota of bytes: what the store keeps of sessions, wherever it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable
from typing import Any

import numpy as np
import pytest

from stepwell_server.core.callers import Caller, Role
from stepwell_server.core.namespaces import prefix_of
from stepwell_server.core.quotas import SESSION_BYTES, Limits, QuotaTable, Usage
from stepwell_server.engine.api import Select, SessionPolicy
from stepwell_server.engine.sessions.transfer import ExistingPolicy, ImportOutcome, SessionRecord
from stepwell_server.errors import QuotaExceeded, ServerError
from stepwell_server.rpc.status import to_proto
from stepwell_server.store import counts
from stepwell_server.store.fields import pack_fields
from support.engine.fake_executor import PLAIN
from support.engine.harness import Harness, fails, running, x
from support.engine.two_engines import two_in_time
from support.engine.versions import WIDE, serving, widen
from support.stores.durable import Disk, damage
from support.stores.records import decode

ANN, BOB = Caller("ann", "acme", Role.USER), Caller("bob", "beta", Role.USER)
ROW = PLAIN.state_row_bytes + sum(spec.row_bytes for spec in PLAIN.outputs)
SESSION = SESSION_BYTES + ROW
#: Of three time steps of one row: shape and data.
SERIES = 1 + 4 * 3 + 3 * 8
#: Of all callers together.
ALL = ""


def limited(most: int) -> QuotaTable:
    return QuotaTable(default=Limits(bytes=most))


def known(at: Harness, tenant: str = ALL) -> int:
    assert at.quotas is not None
    return at.quotas.tenants().get(tenant, Usage()).bytes


async def refused(call: Awaitable[Any]) -> QuotaExceeded:
    caught = await fails(call, QuotaExceeded)
    assert dict(to_proto(caught).metadata)["quota"] == "bytes"
    return caught


def refused_step(at: Harness, session_id: str, steps: int) -> QuotaExceeded:
    with pytest.raises(QuotaExceeded) as caught:
        at.submit(session_id, x(1, steps))
    assert dict(to_proto(caught.value).metadata)["quota"] == "bytes"
    return caught.value


async def exported(at: Harness, session_id: str) -> bytes:
    (record,) = await at.engine.export_sessions([session_id], deadline=float("inf"))
    assert not isinstance(record, ServerError)
    return bytes(record)


async def test_sessions_begin_within_it_however_they_begin() -> None:
    async with running(quotas=limited(3 * SESSION + ROW)) as at:
        await at.open("a")
        record = await exported(at, "a")
        await at.open("b", batch_size=2)
        assert known(at) == 2 * SESSION + ROW
        error = await refused(at.engine.open_session("plain", session_id="c", batch_size=2))
        assert error.message == (
            f"bytes of all callers together must stay within {3 * SESSION + ROW}; there are {2 * SESSION + ROW},"
            f" and {SESSION + ROW} came"
        )
        await refused(at.engine.open_sessions("plain", count=2))
        await refused(at.engine.fork("b"))
        await refused(at.engine.fork_sessions(["a", "a"]))
        larger = with_fields(record)
        (told,) = await at.engine.import_sessions([SessionRecord("d", "a", larger)], ExistingPolicy.REFUSE)
        assert isinstance(told, QuotaExceeded)
        (told,) = await at.engine.import_sessions([SessionRecord("a", "a", larger)], ExistingPolicy.REPLACE)
        assert isinstance(told, QuotaExceeded)
        assert known(at) == 2 * SESSION + ROW
        assert await exported(at, "a") == record, "it stays as it is"
        await at.engine.close_session("b")
        (told,) = await at.engine.import_sessions([SessionRecord("a", "a", larger)], ExistingPolicy.REPLACE)
        assert told is ImportOutcome.REPLACED
        assert known(at) == SESSION + 504
        await refused(at.engine.open_session("plain", session_id="b", batch_size=2))
        await at.engine.close_session("a")
        assert known(at) == 0
        await at.open("b", batch_size=2)
        await at.engine.fork("b", new_session_id="c")
        assert known(at) == 2 * (SESSION + ROW)


def with_fields(record: bytes) -> bytes:
    """A later record of the session, with a field that is not known here, of 500 bytes."""
    changed = dataclasses.replace(decode("a", record), revision=9, fields=pack_fields({99: bytes(500)}))
    return changed.encode("a")


@pytest.mark.stores("memory", "async", "sync")
async def test_a_reply_that_is_kept_counts_and_a_step_that_would_leave_too_much_changes_nothing() -> None:
    async with running(quotas=limited(2 * SESSION + SERIES)) as at:
        await at.open("a", "b")
        await at.step("a", x(1, 3))
        assert known(at) == 2 * SESSION + SERIES
        before = await exported(at, "b")
        refused_step(at, "b", 3)
        assert await exported(at, "b") == before
        await at.step("b", x(1))
        await at.step("a", x(1, 3))  # in place of one that is as large
        refused_step(at, "a", 9)
        await at.step("b", x(1, 3), select=Select.LAST)
        await at.step("a", x(1))
        assert known(at) == 2 * SESSION
        await at.step("b", x(1, 3))
        assert known(at) == 2 * SESSION + SERIES
        await at.submit("b", reset=True).only()
        assert known(at) == 2 * SESSION


@pytest.mark.stores("memory", "async")
async def test_a_session_grows_with_its_model_when_it_is_next_changed() -> None:
    wide = WIDE.state_row_bytes + sum(spec.row_bytes for spec in WIDE.outputs)
    more = 2 * (wide - ROW) - 1
    async with serving(quotas=limited(2 * SESSION + more), migrations={"widen": widen}) as at:
        await at.open("a", "b")
        await at.engine.load_version("plain", 2, WIDE)
        await at.engine.set_default("plain", 2, SessionPolicy.MIGRATE, "widen")
        assert known(at) == 2 * SESSION
        await at.step("a", x(1))
        assert known(at) == 2 * SESSION + wide - ROW
        before = await at.engine.session_info("b")
        refused_step(at, "b", 1)
        assert await at.engine.session_info("b") == before
        await at.engine.close_session("a")
        await at.step("b", x(1))
        assert known(at) == SESSION + wide - ROW


async def test_of_many_callers_who_is_over_it_is_refused_alone() -> None:
    acme, beta = prefix_of("acme") + "s", prefix_of("beta") + "s"
    quotas = QuotaTable(tenants={"acme": Limits(bytes=SESSION)})
    async with running(quotas=quotas) as at:
        await at.open(acme, beta)
        found = await at.submit(
            [acme, beta], x(2, 3), batch_sizes=[1, 1], connections=["1", "2"], callers=[ANN, BOB]
        ).all()
        assert isinstance(found[0], QuotaExceeded)
        assert not isinstance(found[1], ServerError)
        assert (known(at, "acme"), known(at, "beta")) == (SESSION, SESSION + SERIES)
        assert at.quotas is not None
        assert at.quotas.counts().refused["acme", "bytes"] == 1


async def test_a_caller_has_one_of_what_it_has_made() -> None:
    quotas = QuotaTable(callers={"acme/ann": Limits(bytes=SESSION + SERIES + 50)})
    async with running(quotas=quotas) as at:
        name, other = prefix_of("acme") + "s", prefix_of("acme") + "t"
        await at.engine.open_session("plain", session_id=name, caller=ANN)
        await at.engine.open_session("plain", session_id=other)
        await refused(at.engine.fork(name, caller=ANN))
        await at.step(name, x(1, 3))
        await at.step(other, x(1, 30))
        error = refused_step(at, name, 30)
        assert "bytes of caller 'acme/ann' must stay within" in error.message


@pytest.mark.stores("async", "sync")
async def test_it_is_counted_over_restarts_as_it_was(disk: Disk) -> None:
    async with disk.engine(quotas=QuotaTable()) as at:
        await at.open("a", batch_size=2)
        await at.open("b", "c")
        await at.step("a", x(2, 4))
        await at.step("b", x(1, 2))
        before = known(at)
        disk.kill()
    async with disk.engine(quotas=QuotaTable()) as at:
        assert known(at) == before > 3 * SESSION + ROW
        for session_id in "abc":
            await at.step(session_id, x(2 if session_id == "a" else 1))
        assert known(at) == 3 * SESSION + ROW


@pytest.mark.stores("async")
async def test_a_damaged_session_counts_until_it_is_closed(disk: Disk) -> None:
    async with disk.engine(quotas=QuotaTable()) as at:
        await at.open("a", "b")
        disk.kill()
    await damage(disk, "a")
    async with disk.engine(quotas=QuotaTable()) as at:
        assert known(at) == 2 * SESSION
        await at.engine.close_session("a")
        assert known(at) == SESSION


@pytest.mark.stores("fake_shared", "valkey")
async def test_a_store_that_servers_share_counts_it() -> None:
    acme = prefix_of("acme")
    async with running(quotas=QuotaTable()) as at:

        async def check() -> None:
            await at.settled()
            listed, _ = await at.engine.list_sessions()
            names = [info.session_id for info in listed]
            records = [(name, await exported(at, name)) for name in names]
            wanted = sum(counts.usage_of_record(*each)[1].bytes for each in records)
            assert await at.store.count_of(counts.bytes_of("acme")) == wanted

        names = [f"{acme}{n}" for n in range(6)]
        await at.open(*names)
        await check()
        await at.engine.open_session("plain", session_id=f"{acme}limited", max_idle_ms=60_000)
        await check()
        for steps in (3, 3, 1, 5):
            await at.submit(names, np.repeat(x(1, steps), 6, axis=0)).require_all_applied()
            await check()
        await at.step(names[0], x(1, 9))
        await at.step(names[1], x(1))
        await check()
        await at.submit(names[2], reset=True).only()
        await check()
        await at.engine.fork(names[3], new_session_id=f"{acme}fork")
        record = await exported(at, names[0])
        for existing, name in ((ExistingPolicy.REPLACE, names[1]), (ExistingPolicy.REFUSE, f"{acme}new")):
            (told,) = await at.engine.import_sessions([SessionRecord(name, names[0], record)], existing)
            assert not isinstance(told, ServerError)
            await check()
        for name in names:
            await at.engine.close_session(name)
            await check()


@pytest.mark.stores("fake_shared")
async def test_a_limit_holds_for_what_all_servers_keep() -> None:
    acme = prefix_of("acme")
    quotas = QuotaTable(tenants={"acme": Limits(bytes=2 * SESSION + SERIES)})
    async with two_in_time(quotas=quotas) as (first, second, times):
        await first.open(acme + "a", acme + "b")
        await first.step(acme + "a", x(1, 3))
        times.advance(1.0)
        await refused(second.engine.open_session("plain", session_id=acme + "c"))
        assert known(second, "acme") == 2 * SESSION + SERIES
        await first.step(acme + "a", x(1))
        await first.engine.close_session(acme + "b")
        times.advance(1.0)
        await second.engine.open_session("plain", session_id=acme + "c")
        assert known(second, "acme") == 2 * SESSION
