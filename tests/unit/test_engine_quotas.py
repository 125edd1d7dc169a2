"""Quotas where they are charged: at the engine, for whoever asks."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepwell_server.core.callers import Caller, Role
from stepwell_server.core.namespaces import prefix_of, tenant_of
from stepwell_server.core.quotas import NOTHING, Limits, QuotaTable, Usage
from stepwell_server.engine.quotas import OTHER, Quotas
from stepwell_server.engine.sessions.transfer import ExistingPolicy, ImportOutcome, SessionRecord
from stepwell_server.errors import InvalidInput, Overloaded, QuotaExceeded, ServerError
from stepwell_server.rpc.status import to_proto
from stepwell_server.store.counts import usage_of_record
from stepwell_server.store.disk.store import DiskStore
from support.clock import ManualClock
from support.engine.harness import Harness, fails, running, x
from support.stores.durable import Disk, begun, stalled

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


async def test_steps_are_charged_to_who_asks_and_refused_with_the_time_to_wait() -> None:
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
        assert error.message == "steps_per_second of caller 'acme/ann' must stay within 5, 5 at once; 3 came"
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


async def test_sessions_and_rows_are_those_that_are_there_whatever_happened() -> None:
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
        beginning = await begun(at.open("c"))
        await stalled(disk.store)
        await fails(at.open("d"), QuotaExceeded, "there are 3, and 1 came")
        closing = await begun(at.engine.close_session("a"))
        await fails(at.open("d"), QuotaExceeded, "there are 3, and 1 came")
        disk.store.go_on()
        await asyncio.gather(beginning, closing)
        await at.open("d")
        await fails(at.engine.fork("b"), QuotaExceeded, "there are 3, and 1 came")


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
    assert "rows of all callers together must stay within 7; there are 4, and 5 came" in error.message
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
            "rows of caller 'acme/ann' must stay within 5; there are 2, and 4 came",
        )
        forked = await at.engine.fork(first, caller=ANN)
        told = await fails(
            at.engine.fork_sessions([first], caller=ANN),
            QuotaExceeded,
            "rows of caller 'acme/ann' must stay within 5; there are 4, and 2 came",
        )
        assert dict(to_proto(told).metadata) == {"quota": "rows", "limit": "5"}
        # it does not matter who closes it
        await at.engine.close_session(forked.session.session_id)
        assert without_bytes(at.quotas.callers()) == {"acme/ann": (1, 2)}
        await opened(at, ANN, 1, 2)
        await fails(
            opened(at, ANN),
            QuotaExceeded,
            "sessions of caller 'acme/ann' must stay within 3; there are 3, and 1",
        )
        # who brings a session has it, whatever its record says
        (record,) = await at.engine.export_sessions([first], deadline=float("inf"))
        assert not isinstance(record, ServerError)
        arriving = [SessionRecord(f"{namespace}copy", first, bytes(record))]
        assert isinstance(
            (await at.engine.import_sessions(arriving, ExistingPolicy.REPLACE, ANN))[0], QuotaExceeded
        )
        assert (await at.engine.import_sessions(arriving, ExistingPolicy.REPLACE, OTHERS))[
            0
        ] is ImportOutcome.IMPORTED
        assert without_bytes(at.quotas.callers()) == {"acme/ann": (3, 4)}
        # a session that is replaced stays whose it was, whoever does it
        await at.step(first, x(2))
        again = [SessionRecord(first, first, bytes(record))]
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
