"""Sessions that nobody named end when their client has been gone for as long as its lease, and only then."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from stepwell_server.errors import InvalidInput, SessionExpired
from stepwell_server.store.base import Batch, End
from stepwell_server.store.fields import LEASE, pack_fields, unpack_fields
from stepwell_server.store.memory import MemoryStore
from support.durable import Disk, begun
from support.engine import Harness, running, x
from support.records import decode

ONE, TWO = 11, 2**64 - 1
LEASE_60 = (ONE, 60_000)
# where others use the store, it knows of clients: test_engine_replicas_leases
OWN = pytest.mark.stores("memory", "async", "sync")


async def unnamed(at: Harness, lease: tuple[int, int] | None = LEASE_60, **options: Any) -> str:
    return (await at.engine.open_session("plain", lease=lease, **options)).session.session_id


async def ids(at: Harness) -> set[str]:
    return {info.session_id for info in (await at.engine.list_sessions())[0]}


async def refused(call: Callable[[], Awaitable[object]]) -> str:
    with pytest.raises(SessionExpired) as caught:
        await call()
    return caught.value.message


@OWN
async def test_a_session_ends_when_its_client_is_gone_and_a_retry_is_told_so() -> None:
    async with running() as at:
        one = await unnamed(at)
        group = (await at.engine.open_sessions("plain", count=3, lease=LEASE_60)).session_ids
        fork = (await at.engine.fork(one, lease=LEASE_60)).session.session_id
        group = [*group, *(await at.engine.fork_sessions([one, one], lease=LEASE_60)).session_ids]
        stays = {await unnamed(at, None), await unnamed(at, (TWO, 61_000))}
        await at.open("named")
        stays.add(
            (await at.engine.open_session("plain", session_id="with", lease=LEASE_60)).session.session_id
        )
        stays.add((await at.engine.open_sessions("plain", session_ids=["n"], lease=LEASE_60)).session_ids[0])
        stays.add((await at.engine.fork(one, new_session_id="f", lease=LEASE_60)).session.session_id)
        info = await at.engine.session_info(one)
        assert (info.lease_s, (await at.engine.session_info("with")).lease_s) == (60.0, 0.0)
        at.clock.advance(59.9)
        assert await at.inside.end_leases() == 0
        at.clock.advance(0.2)
        assert await at.inside.end_leases() == 7
        await at.settled()
        assert await ids(at) == {"named", *stays}
        for name in (one, *group, fork):
            message = await refused(functools.partial(at.engine.get_state, name))
            assert "its client had been gone for longer than the lease" in message
        at.clock.advance(1.0)
        assert await at.inside.end_leases() == 1, "the other client's"
        await at.settled()
        assert ("expired", one) in at.events.sessions


@OWN
async def test_a_client_is_there_while_it_says_so_and_while_its_sessions_are_used() -> None:
    async with running(threads=True) as at:
        told, stepped, claimed = (
            await unnamed(at),
            await unnamed(at, (TWO, 60_000)),
            await unnamed(at, (5, 60_000)),
        )
        for _ in range(5):
            at.clock.advance(50.0)
            await at.engine.renew_lease(ONE)
            await at.engine.renew_lease(77)  # nobody's
            await at.step(stepped, x(1))
            await at.state(claimed)
            assert await at.inside.end_leases() == 0
        answer = await at.begin_pass(claimed, x(1))
        at.clock.advance(70.0)
        assert await at.inside.end_leases() == 2, "what is under way is use"
        at.hooks.open_gate()
        assert (await answer.only()).revision == 1
        await at.settled()
        assert await ids(at) == {claimed}
        at.clock.advance(59.0)
        assert await at.inside.end_leases() == 0
        at.clock.advance(61.0)
        assert await at.inside.end_leases() == 1
        del told
        with pytest.raises(InvalidInput, match="client_id must be random and not 0; got 0"):
            await at.engine.renew_lease(0)


@OWN
async def test_many_clients_come_and_go_and_nothing_is_left_of_them() -> None:
    async with running(resident_rows=8) as at:
        for turn in range(4):
            for client in range(1, 200):
                await at.engine.open_sessions(
                    "plain", count=1 + client % 3, lease=(client + turn * 50, 60_000)
                )
            at.clock.advance(30.0)
            for client in range(1, 100):
                await at.engine.renew_lease(client + turn * 50)
            at.clock.advance(31.0)
            gone = await at.inside.end_leases()
            assert gone == sum(1 + client % 3 for client in range(100, 200))
            at.clock.advance(60.0)
            assert await at.inside.end_leases() == sum(1 + client % 3 for client in range(1, 100))
            await at.settled()
            assert await ids(at) == set()
            assert len(at.inside.leases) == 0


@OWN
async def test_who_resumes_a_session_takes_its_lease_over() -> None:
    async with running() as at:
        first, second, third = [await unnamed(at) for _ in range(3)]
        opened = await at.engine.open_session("plain", session_id=first, lease=(TWO, 90_000))
        assert (opened.resumed, opened.session.lease_s) == (True, 90.0)
        opened = await at.engine.open_session("plain", session_id=second)  # of an older release, say
        assert opened.session.lease_s == 0.0
        at.clock.advance(61.0)
        assert await at.inside.end_leases() == 1
        await at.settled()
        assert await ids(at) == {first, second}
        assert "gone" in await refused(lambda: at.engine.open_session("plain", session_id=third))
        at.clock.advance(30.0)
        assert await at.inside.end_leases() == 1
        await at.settled()
        assert await ids(at) == {second}


async def test_a_named_session_that_is_resumed_has_no_lease() -> None:
    async with running() as at:
        for _ in range(2):
            opened = await at.engine.open_session("plain", session_id="named", lease=(TWO, 60_000))
            assert opened.session.lease_s == 0.0
            assert (await at.engine.session_info("named")).lease_s == 0.0
        at.clock.advance(61.0)
        assert await at.inside.end_leases() == 0
        await at.settled()
        assert await ids(at) == {"named"}


def field_of(disk: Disk, session_id: str) -> dict[int, bytes]:
    stored = disk.store.get(session_id)
    return unpack_fields(decode(session_id, stored).fields)


@pytest.mark.stores("async", "sync")
async def test_a_restart_begins_the_time_anew_and_keeps_the_lease(disk: Disk) -> None:
    async with disk.engine(resident_rows=64) as at:
        group = list((await at.engine.open_sessions("plain", count=20, lease=LEASE_60)).session_ids)
        others = list((await at.engine.open_sessions("plain", count=20, lease=(TWO, 600_000))).session_ids)
        await at.open(*[f"n{number}" for number in range(20)])
        together = [*group, *others, *(f"n{number}" for number in range(20))]
        for revision in range(3):  # those with a lease and those without share a pass, in a template and not
            answers = await at.submit(together, x(60)).all()
            assert [getattr(answer, "revision", None) for answer in answers] == [revision + 1] * 60
        await at.submit(group[:1], x(1, 4)).all()
        at.clock.advance(59.0)
        disk.kill(away_s=1000.0)
    assert set(field_of(disk, group[0])) == set(field_of(disk, group[5])) == {LEASE}
    assert field_of(disk, "n3") == {}
    async with disk.engine() as at:
        assert await at.inside.end_leases() == 0
        await at.step(group[3], x(1))  # in the table from here on
        await at.engine.renew_lease(TWO)
        at.clock.advance(59.0)
        assert await at.inside.end_leases() == 0
        at.clock.advance(1.5)
        assert await at.inside.end_leases() == 1, "the one that is in the table"
        at.clock.advance(60.0)  # the store is not looked through all the time
        assert await at.inside.end_leases() == 19
        await at.settled()
        assert await ids(at) == {*others, *(f"n{number}" for number in range(20))}
        assert "client had been gone" in await refused(lambda: at.engine.get_state(group[0]))
        assert disk.store.tombstones(group[:1])[0].end is End.LEFT
        assert (await at.engine.session_info(others[0])).lease_s == 600.0
        assert (await at.engine.list_sessions(prefix=others[0]))[0][0].lease_s == 600.0
        disk.kill()
    async with disk.engine() as at:
        assert "client had been gone" in await refused(lambda: at.engine.get_state(group[0]))


@pytest.mark.stores("async", "sync")
async def test_other_fields_stay_beside_a_lease(disk: Disk) -> None:
    async with disk.engine() as at:
        name = await unnamed(at)
        disk.kill()
    record = decode(name, disk.store.get(name))
    fields = pack_fields({**unpack_fields(record.fields), 2: b"tenant"})
    later = type(record)(**{**vars_of(record), "fields": fields, "revision": 1})
    disk.store.store.commit(Batch(puts=[(name, later.encode(name))]))
    async with disk.engine() as at:
        await at.step(name, x(1))
        assert field_of(disk, name).keys() == {2, LEASE}
        await at.engine.open_session("plain", session_id=name)
        await at.step(name, x(1))
        assert field_of(disk, name) == {2: b"tenant"}


def vars_of(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


async def test_a_session_is_not_ended_that_is_used_while_others_are() -> None:
    """Between the parts, which let others have a turn."""
    async with running(store=MemoryStore()) as at:
        group = (await at.engine.open_sessions("plain", count=1200, lease=LEASE_60)).session_ids
        at.clock.advance(61.0)
        ending = await begun(at.inside.end_leases())
        await at.state(group[-1])
        assert await ending == 1199
        await at.settled()
        assert await ids(at) == {group[-1]}
