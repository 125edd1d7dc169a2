"""Quotas of sessions, rows, steps and bytes, where the engine charges them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import AsyncIterator, Awaitable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepwell_server.core.callers import Caller, Role
from stepwell_server.core.namespaces import prefix_of, tenant_of
from stepwell_server.core.quotas import NOTHING, SESSION_BYTES, Limits, QuotaTable, Usage
from stepwell_server.engine.api import Select, SessionPolicy
from stepwell_server.engine.quotas import OTHER, Quotas
from stepwell_server.engine.sessions.transfer import ExistingPolicy, ImportOutcome, SessionRecord
from stepwell_server.errors import InvalidInput, Overloaded, QuotaExceeded, ServerError
from stepwell_server.rpc.status import to_proto
from stepwell_server.store import counts
from stepwell_server.store.counts import usage_of_record
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.fields import pack_fields
from support.clock import ManualClock
from support.engine.fake_executor import PLAIN
from support.engine.harness import Harness, fails, running, x
from support.engine.two_engines import two_in_time
from support.engine.versions import WIDE, serving, widen
from support.stores.durable import Disk, damage, stalled, start_task
from support.stores.records import decode

ANN, BOB = Caller("ann", "acme", Role.USER), Caller("bob", "beta", Role.USER)
OTHERS = Caller("eve", "acme", Role.USER)


async def recount(at: Harness) -> dict[str, Usage]:
    """What each tenant has, by the records of its sessions."""
    table = at.internals.table
    handles = np.flatnonzero(table.birth[: table.end] > 0)
    ids = [table.session_id(handle) for handle in handles.tolist()]
    found: dict[str, Usage] = {}
    for session_id, record in zip(
        ids, await at.engine.export_sessions(ids, deadline=float("inf")), strict=True
    ):
        assert not isinstance(record, ServerError)
        _, usage = usage_of_record(session_id, record)
        tenant = tenant_of(session_id)
        found[tenant] = found.get(tenant, NOTHING) + usage
    return found


def without_bytes(found: Mapping[str, Usage]) -> dict[str, tuple[int, int]]:
    return {name: (usage.sessions, usage.rows) for name, usage in found.items()}


async def test_steps_are_charged_to_their_caller_and_refused_with_the_time_to_wait() -> None:
    quotas = QuotaTable(
        tenants={"acme": Limits(steps_per_second=10, burst=20)},
        callers={"acme/ann": Limits(steps_per_second=5)},
    )
    async with running(quotas=quotas) as at:
        await at.open("a", "b", "c")
        await at.submit("a", x(1, 5), caller=ANN).only()
        with pytest.raises(QuotaExceeded) as refused:
            at.submit("a", x(1, 3), caller=ANN)
        error = refused.value
        assert isinstance(error, Overloaded)
        assert error.retry_after_s == pytest.approx(0.6)
        assert (
            error.message
            == "steps_per_second of caller 'acme/ann' must stay within 5, with at most 5 at once; this call has 3"
        )
        told = to_proto(error)
        assert (told.reason, dict(told.metadata)) == (
            "QUOTA_EXCEEDED",
            {"quota": "steps_per_second", "limit": "5"},
        )
        assert told.retry_after_ms == 600
        # the tenant was not charged for what its caller may not do
        # and an admin of another tenant, who acts in it, is not its caller of that name
        await at.submit("b", x(1, 10), caller=Caller("ann", "acme", Role.ADMIN, own_tenant="beta")).only()
        await at.submit("b", x(1, 5), caller=OTHERS).only()
        with pytest.raises(QuotaExceeded, match="steps_per_second of tenant 'acme' must stay within 10"):
            at.submit("b", x(1), caller=OTHERS)
        await at.submit("c", x(1, 50), caller=BOB).only()
        at.clock.advance(0.6)
        await at.submit("a", x(1, 3), caller=ANN).only()
        with pytest.raises(InvalidInput, match=r"at most the burst of the quota .* 'acme', 20; got 21"):
            at.submit("a", x(1, 21), caller=OTHERS)
        await fails(at.engine.predict("plain", {"": x(4)}, caller=ANN), QuotaExceeded)
        assert at.quotas is not None
        counts = at.quotas.counts()
        assert counts.steps == {"acme": 23, "beta": 50, "": 0}
        assert counts.refused["acme", "steps_per_second"] == 3
        assert sum(counts.refused.values()) == 3


async def test_of_a_change_of_many_callers_each_is_charged_for_its_own() -> None:
    quotas = QuotaTable(tenants={"acme": Limits(steps_per_second=1, burst=2)})
    async with running(quotas=quotas) as at:
        await at.open("a", "b", "c", "d")
        answers = at.submit(
            ["a", "b", "c", "d"],
            x(4),
            batch_sizes=[1] * 4,
            connections=["1", "2", "1", "1"],
            callers=[ANN, BOB, ANN, OTHERS],
        )
        first, second, third, fourth = await answers.all()
        assert isinstance(fourth, QuotaExceeded), "its tenant has nothing left"
        assert not any(isinstance(each, Exception) for each in (first, second, third))


async def test_bytes_are_held_until_the_answer() -> None:
    row = x(1).nbytes
    quotas = QuotaTable(Limits(bytes_in_flight=2 * row))
    async with running(quotas=quotas, threads=True) as at:
        await at.open("a", "b", "c")
        held = [await at.begin_pass("a", x(1)), at.submit("b", x(1))]
        with pytest.raises(QuotaExceeded, match="bytes_in_flight of all callers together must stay within"):
            at.submit("c", x(1))
        await fails(at.engine.predict("plain", {"": x(1)}), QuotaExceeded)
        at.hooks.open_gate()
        for answers in held:
            await answers.only()
        await at.step("c", x(1))
        with pytest.raises(InvalidInput, match="send fewer at once"):
            at.submit(["a", "b", "c"], x(3))


async def test_counted_sessions_and_rows_match_the_records_after_random_calls() -> None:
    quotas = QuotaTable(tenants={"acme": Limits(sessions=5, rows=7), "beta": Limits(sessions=4)})
    chosen, refused = random.Random(7), 0
    async with running(quotas=quotas, resident_rows=6, max_session_idle_s=50) as at:
        assert at.quotas is not None
        for n in range(400):
            prefix = prefix_of(chosen.choice(["acme", "beta", ""]))
            ids = [f"{prefix}s{chosen.randrange(8)}" for _ in range(2)]
            try:
                match chosen.randrange(10):
                    case 0 | 1:
                        await at.engine.open_session(
                            "plain", session_id=ids[0], batch_size=chosen.randint(1, 3)
                        )
                    case 2:
                        await at.engine.open_sessions("plain", session_ids=list(dict.fromkeys(ids)))
                    case 3:
                        await at.engine.fork(ids[0], new_session_id=ids[1])
                    case 4:
                        await at.engine.close_sessions(ids)
                    case 5:
                        at.clock.advance(20)
                        await at.internals.expire_idle()
                        await at.settled()
                    case 6:
                        (record,) = await at.engine.export_sessions(ids[:1], deadline=float("inf"))
                        if not isinstance(record, ServerError):
                            again = chosen.choice([ids[0], f"{ids[0]}-copy"])
                            told = await at.engine.import_sessions(
                                [SessionRecord(again, ids[0], bytes(record))], ExistingPolicy.REPLACE
                            )
                            refused += isinstance(told[0], QuotaExceeded)
                    case 7 | 8:
                        rows = (await at.engine.session_info(ids[0])).batch_size
                        await at.step(ids[0], x(rows, chosen.choice([1, 1, 2, 5]), seed=n))
                    case 9:
                        await at.submit(ids[0], reset=True).only()
            except QuotaExceeded:
                refused += 1
            except ServerError:  # what else is refused changes nothing
                pass
            listed, _ = await at.engine.list_sessions(limit=100)  # what is idle has ended
            if n % 10 == 0:
                await at.settled()
                for info in listed:
                    await at.engine.session_info(info.session_id)
                assert dict(at.quotas.tenants()) == await recount(at)
        assert refused


@pytest.mark.stores("sync")
async def test_the_last_place_is_given_once_also_while_others_begin_and_end(disk: Disk) -> None:
    async with disk.engine(quotas=QuotaTable(Limits(sessions=3))) as at:
        await at.open("a", "b")
        disk.store.stall()
        beginning = await start_task(at.open("c"))
        await stalled(disk.store)
        await fails(at.open("d"), QuotaExceeded, "there are 3, and this call adds 1")
        closing = await start_task(at.engine.close_session("a"))
        await fails(at.open("d"), QuotaExceeded, "there are 3, and this call adds 1")
        disk.store.release()
        await asyncio.gather(beginning, closing)
        await at.open("d")
        await fails(at.engine.fork("b"), QuotaExceeded, "there are 3, and this call adds 1")


@pytest.mark.engine(quotas=QuotaTable(default=Limits(rows=7)))
async def test_an_import_makes_no_session_larger_than_its_tenant_may_have_rows(at: Harness) -> None:
    assert at.quotas is not None

    async def brought() -> object:
        assert not isinstance(record, ServerError)
        arriving = SessionRecord("a", "a", bytes(record))
        return (await at.engine.import_sessions([arriving], ExistingPolicy.REPLACE))[0]

    await at.engine.open_session("plain", session_id="a", batch_size=6)
    (record,) = await at.engine.export_sessions(["a"], deadline=float("inf"))
    await at.engine.close_session("a")
    await at.engine.open_session("plain", session_id="a", batch_size=1)
    await at.engine.open_session("plain", session_id="b", batch_size=3)
    assert isinstance(error := await brought(), QuotaExceeded)
    assert (
        "rows of all callers together must stay within 7; there are 4, and this call adds 5" in error.message
    )
    await at.submit("a", x(1)).only()  # it is there as it was
    assert dict(at.quotas.tenants()) == await recount(at)
    assert without_bytes(at.quotas.tenants()) == {"": (2, 4)}
    await at.engine.close_session("b")
    assert await brought() is ImportOutcome.REPLACED
    assert dict(at.quotas.tenants()) == await recount(at)
    assert without_bytes(at.quotas.tenants()) == {"": (1, 6)}


async def test_what_a_store_has_counts_from_the_start_and_tenants_beyond_the_limit_share_a_label() -> None:
    quotas = Quotas(QuotaTable(tenants={"acme": Limits(sessions=2)}), ManualClock(), max_labels=2)
    quotas.begin([f"{prefix_of('acme')}{n}" for n in range(2)], Usage(1, 3, 30))
    for n in range(5):
        quotas.begin([f"{prefix_of(f't{n}')}s"], Usage(1, 1, 10))
        quotas.charge(Caller("", f"t{n}", Role.USER), 2, 0)
    counts = quotas.counts()
    assert counts.sessions == {"acme": 2, "t0": 1, OTHER: 4}
    assert counts.rows == {"acme": 6, "t0": 1, OTHER: 4}
    assert counts.bytes == {"acme": 60, "t0": 10, OTHER: 40}
    assert counts.steps == {"acme": 0, "t0": 2, OTHER: 8}
    assert counts.refused["acme", "sessions"] == counts.refused["t0", "rows"] == 0  # there before the first
    with pytest.raises(QuotaExceeded, match="sessions of tenant 'acme' must stay within 2; there are 2"):
        quotas.begin([f"{prefix_of('acme')}x"], Usage(1, 1, 10))


@contextlib.asynccontextmanager
async def kept_in(folder: Path, **options: Any) -> AsyncIterator[Harness]:
    """A server whose sessions are there for the next one."""
    store = DiskStore(folder, durability="async", clock=ManualClock())
    try:
        async with running(store=store, **options) as at:
            yield at
    finally:
        store.close()


@pytest.mark.stores("memory")
async def test_sessions_and_rows_of_a_caller_are_those_that_it_made(tmp_path: Path) -> None:
    table = QuotaTable(callers={"acme/ann": Limits(sessions=3, rows=5)})
    namespace = prefix_of("acme")

    async def opened(at: Harness, who: Caller, rows: int = 1, count: int = 1) -> list[str]:
        made = await at.engine.open_sessions(
            "plain", count=count, batch_size=rows, namespace=namespace, caller=who
        )
        return list(made.session_ids)

    async with kept_in(tmp_path, quotas=table) as at:
        assert at.quotas is not None
        (first,) = await opened(at, ANN, 2)
        await opened(at, OTHERS, 3, 4)  # another caller of the tenant, without a quota
        await fails(
            opened(at, ANN, 2, 2),
            QuotaExceeded,
            "rows of caller 'acme/ann' must stay within 5; there are 2, and this call adds 4",
        )
        forked = await at.engine.fork(first, caller=ANN)
        told = await fails(
            at.engine.fork_sessions([first], caller=ANN),
            QuotaExceeded,
            "rows of caller 'acme/ann' must stay within 5; there are 4, and this call adds 2",
        )
        assert dict(to_proto(told).metadata) == {"quota": "rows", "limit": "5"}
        # it does not matter who closes it
        await at.engine.close_session(forked.session.session_id)
        assert without_bytes(at.quotas.callers()) == {"acme/ann": (1, 2)}
        await opened(at, ANN, 1, 2)
        await fails(
            opened(at, ANN),
            QuotaExceeded,
            "sessions of caller 'acme/ann' must stay within 3; there are 3, and this call adds 1",
        )
        # who brings a session has it, whatever its record says
        record = await at.exported(first)
        arriving = [SessionRecord(f"{namespace}copy", first, record)]
        assert isinstance(
            (await at.engine.import_sessions(arriving, ExistingPolicy.REPLACE, ANN))[0], QuotaExceeded
        )
        assert (await at.engine.import_sessions(arriving, ExistingPolicy.REPLACE, OTHERS))[
            0
        ] is ImportOutcome.IMPORTED
        assert without_bytes(at.quotas.callers()) == {"acme/ann": (3, 4)}
        # a session that is replaced stays whose it was, whoever does it
        await at.step(first, x(2))
        again = [SessionRecord(first, first, record)]
        assert (await at.engine.import_sessions(again, ExistingPolicy.REPLACE, OTHERS))[
            0
        ] is ImportOutcome.REPLACED
        assert without_bytes(at.quotas.callers()) == {"acme/ann": (3, 4)}
        await at.step(first, x(2))
        counts = at.quotas.counts()
        assert counts.refused["acme", "sessions"] == 2
        assert counts.refused["acme", "rows"] == 2
    # the records say whose they are: also after a restart, and when the caller has no quota any more
    for after in (table, QuotaTable()):
        async with kept_in(tmp_path, quotas=after) as at:
            assert at.quotas is not None
            assert without_bytes(at.quotas.callers()) == {"acme/ann": (3, 4)}
            await at.step(first, x(2))
    async with kept_in(tmp_path, quotas=table) as at:
        assert at.quotas is not None
        listed, _ = await at.engine.list_sessions(limit=100)
        await at.engine.close_sessions([info.session_id for info in listed])
        assert without_bytes(at.quotas.callers()) == {}
        await opened(at, ANN, 1, 3)


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


async def test_sessions_begin_within_it_however_they_begin() -> None:
    async with running(quotas=limited(3 * SESSION + ROW)) as at:
        await at.open("a")
        record = await at.exported("a")
        await at.open("b", batch_size=2)
        assert known(at) == 2 * SESSION + ROW
        error = await refused(at.engine.open_session("plain", session_id="c", batch_size=2))
        assert error.message == (
            f"bytes of all callers together must stay within {3 * SESSION + ROW}; there are {2 * SESSION + ROW},"
            f" and this call adds {SESSION + ROW}"
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
        assert await at.exported("a") == record, "it stays as it is"
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
        before = await at.exported("b")
        refused_step(at, "b", 3)
        assert await at.exported("b") == before
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


async def test_only_the_callers_over_the_limit_are_refused() -> None:
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
    async with disk.engine(quotas=QuotaTable(), is_killed=True) as at:
        await at.open("a", batch_size=2)
        await at.open("b", "c")
        await at.step("a", x(2, 4))
        await at.step("b", x(1, 2))
        before = known(at)
    async with disk.engine(quotas=QuotaTable()) as at:
        assert known(at) == before > 3 * SESSION + ROW
        for session_id in "abc":
            await at.step(session_id, x(2 if session_id == "a" else 1))
        assert known(at) == 3 * SESSION + ROW


@pytest.mark.stores("async")
async def test_a_damaged_session_counts_until_it_is_closed(disk: Disk) -> None:
    async with disk.engine(quotas=QuotaTable(), is_killed=True) as at:
        await at.open("a", "b")
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
            records = [(name, await at.exported(name)) for name in names]
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
        record = await at.exported(names[0])
        for existing, name in ((ExistingPolicy.REPLACE, names[1]), (ExistingPolicy.REFUSE, f"{acme}new")):
            (told,) = await at.engine.import_sessions([SessionRecord(name, names[0], record)], existing)
            assert not isinstance(told, ServerError)
            await check()
        for name in names:
            await at.engine.close_session(name)
            await check()


@pytest.mark.stores("fake_shared", "valkey")
async def test_sessions_without_a_tenant_are_shown_before_the_first_step() -> None:
    """A server that starts asks a shared store for them, though no quota names them."""
    async with running(quotas=QuotaTable()) as at:
        await at.open("a", "b")
        started = Quotas(QuotaTable(), ManualClock())
        await started.count(at.store)
        assert started.counts().sessions == {"": 2}
        await at.settled()


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
