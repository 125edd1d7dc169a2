"""Two servers on one store: sessions of a client end when no server has heard of it for its lease, and only then."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from stepwell_server.core.namespaces import SEPARATOR
from stepwell_server.errors import InvalidInput, Overloaded, SessionExpired, Unavailable
from stepwell_server.store.base import End
from support.awaited import RemoteStore
from support.durable import begun
from support.engine import Harness, x
from support.fake_executor import WAIT_S
from support.replicas import Times, sweeping, two_in_time

pytestmark = pytest.mark.stores("awaited")
ONE, TWO = 11, 2**64 - 1
LEASE_60 = (ONE, 60_000)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def unnamed(at: Harness, lease: tuple[int, int] = LEASE_60) -> str:
    return (await at.engine.open_session("plain", lease=lease)).session.session_id


async def ended(*servers: Harness) -> int:
    """How many sessions ended by what the timers of servers do."""
    return sum([await at.inside.end_leases() for at in servers])


async def test_sessions_of_a_client_that_is_gone_end_whoever_opened_them() -> None:
    async with two_in_time() as (first, second, times):
        gone = [
            await unnamed(first),
            *(await second.engine.open_sessions("plain", count=3, lease=LEASE_60)).session_ids,
        ]
        stays = [await unnamed(first, (TWO, 90_000)), await unnamed(second, (TWO, 30_000_000))]
        await first.open("named")
        times.advance(59.0)
        assert await ended(first, second) == 0
        times.advance(2.0)
        assert await ended(first, second) == 4
        for at in (first, second):
            with pytest.raises(SessionExpired, match="client had been gone"):
                await at.state(gone[0])
        assert {info.session_id for info in (await second.engine.list_sessions())[0]} == {*stays, "named"}
        assert first.store.shared.tombstones(gone[-1:])[0].end is End.LEFT


async def test_a_client_is_there_for_all_when_one_server_hears_of_it() -> None:
    async with two_in_time() as (first, second, times):
        name = await unnamed(first)
        for _ in range(6):
            times.advance(40.0)
            await second.engine.renew_lease(ONE)
            await second.engine.renew_lease(77)  # nobody's
            assert await ended(first, second) == 0
        times.advance(61.0)
        assert await ended(first, second) == 1
        with pytest.raises(SessionExpired):
            await first.step(name, x(1))


@pytest.mark.parametrize("use", ["step", "read", "resume"])
async def test_a_session_that_another_server_uses_stays_without_its_client(use: str) -> None:
    async with two_in_time() as (first, second, times):
        name = await unnamed(first)
        await unnamed(first)  # of the same client, and not used
        for turn in range(4):
            times.advance(40.0)
            if use == "step":
                await second.step(name, x(1))
            elif use == "read":
                await second.state(name)
            else:
                await second.engine.open_session("plain", session_id=name, lease=LEASE_60)
            await turns()
            # who resumes it is the client, and there
            assert await ended(first, second) == int(turn == 1 and use != "resume")


async def test_a_server_that_was_held_up_ends_nothing_of_a_client_that_is_there_by_now() -> None:
    async with two_in_time() as (first, second, times):
        name = await unnamed(first)
        times.advance(61.0)
        store: RemoteStore = first.store
        sweep = await sweeping(store, first.inside.end_leases())
        times.advance(10.0)  # it sleeps
        await second.engine.renew_lease(ONE)
        store.let_go()
        assert await asyncio.wait_for(sweep, WAIT_S) == 0
        assert await ended(first) == 0
        assert (await first.step(name, x(1))).revision == 1


async def test_the_store_is_told_of_a_client_at_most_every_tenth_of_its_lease() -> None:
    async with two_in_time() as (first, _, times):
        await unnamed(first)
        await turns()
        store: RemoteStore = first.store
        for _ in range(60):
            times.advance(1.0)
            await first.engine.renew_lease(ONE)
        assert len(store.asked("renew")) == 11, "one when the session was opened"
        before = len(store.asked("renew"))
        await asyncio.gather(*[first.engine.renew_lease(client) for client in range(100, 3000)])
        told = store.asked("renew")[before:]
        assert sum(map(len, told)) == 2900
        assert len(told) == 3, "together"


async def test_who_renews_is_told_when_the_store_does_not_hear_of_it() -> None:
    async with two_in_time() as (first, second, times):
        await unnamed(first)
        await turns()
        store: RemoteStore = first.store
        store.told_error = Unavailable("away")
        await first.engine.renew_lease(ONE)  # the store has just been told
        times.advance(20.0)
        for _ in range(2):
            with pytest.raises(Unavailable, match="away"):
                await first.engine.renew_lease(ONE)
        await second.engine.renew_lease(ONE)
        store.told_error = None
        await first.engine.renew_lease(ONE)
        with pytest.raises(InvalidInput, match="client_id must be random and not 0"):
            await first.engine.renew_lease(0)


async def test_who_gives_up_a_renewal_leaves_no_error_behind() -> None:
    left: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: left.append(context))
    async with two_in_time() as (first, _, _):
        store: RemoteStore = first.store
        store.commits_held = True
        renewal = await begun(first.engine.renew_lease(ONE))
        await store.until("renew")
        renewal.cancel()
        store.told_error = Unavailable("away")
        store.let_go()
        await turns()
        store.told_error = None  # it has frames that have the future
    del renewal
    gc.collect()
    assert left == []


async def test_few_clients_wait_while_the_store_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell_server.engine.sessions.using.MOST_WAITING", 3)
    async with two_in_time() as (first, _, _):
        store: RemoteStore = first.store
        store.commits_held = True
        waiting = [await begun(first.engine.renew_lease(client)) for client in range(1, 5)]
        await store.until("renew")
        with pytest.raises(Overloaded, match="clients of which the store is to be told") as refused:
            await asyncio.gather(*[first.engine.renew_lease(client) for client in range(10, 15)])
        assert refused.value.retry_after_s > 0
        store.let_go()
        await asyncio.wait_for(asyncio.gather(*waiting), WAIT_S)


async def test_a_client_of_which_nothing_is_known_is_not_taken_for_gone_where_it_may_be_silent_for_long() -> (
    None
):
    async with two_in_time() as (first, second, times):
        await unnamed(first, (TWO, 7200_000))
        await turns()
        first.store.together.clients.clear()  # a store forgets when a client was heard of
        times.advance(7300.0)
        assert await ended(first, second) == 0, "its time begins anew"
        times.advance(7300.0)
        assert await ended(second) == 1


async def test_a_tenants_sessions_end_as_others_do() -> None:
    async with two_in_time() as (first, second, times):
        names = (
            await first.engine.open_sessions("plain", count=2, lease=LEASE_60, namespace=f"acme{SEPARATOR}")
        ).session_ids
        times.advance(61.0)
        assert await ended(second) == 2
        assert first.store.shared.tombstones(names)[0].session_id.startswith("acme")
        assert first.store.shared.count_of(f"acme{SEPARATOR}") == 0


async def test_the_first_of_two_limits_ends_a_session() -> None:
    async with two_in_time(max_session_idle_s=100.0) as (first, second, times):
        left, idle = await unnamed(first), await unnamed(first, (TWO, 1000_000))
        times.advance(80.0)
        assert await ended(first, second) == 1
        times.advance(30.0)
        assert await ended(first, second) == 1
        for name, why in ((left, "client had been gone"), (idle, "max_session_idle_s")):
            with pytest.raises(SessionExpired, match=why):
                await second.state(name)


def test_clocks_of_the_tests_are_far_apart() -> None:
    times = Times()
    assert abs(times.first.now() - times.second.now()) > 10 * 3600


@pytest.mark.parametrize("lease", [None, (TWO, 600_000)])
async def test_who_resumes_a_session_has_its_lease_for_all_servers(lease: tuple[int, int] | None) -> None:
    async with two_in_time(resident_rows=1) as (first, second, times):
        name = await unnamed(first)
        await first.step(name, x(1))
        before = await first.state(name)
        resumed = await second.engine.open_session("plain", session_id=name, lease=lease)
        assert resumed.resumed
        assert (resumed.session.lease_s, resumed.session.revision) == (600.0 if lease else 0.0, 1)
        times.advance(500.0)
        assert await ended(first, second) == 0, "the client that is gone has nothing to do with it any more"
        after = await first.state(name)
        assert (after["sum"].tobytes(), (await first.engine.session_info(name)).lease_s) == (
            before["sum"].tobytes(),
            resumed.session.lease_s,
        )
        assert (await first.step(name, x(1), expected=1)).revision == 2
        times.advance(601.0)
        assert await ended(first, second) == (1 if lease else 0)


async def test_a_lease_changes_though_another_server_changes_the_session() -> None:
    async with two_in_time() as (first, second, _):
        name = await unnamed(first)
        await second.state(name)
        store: RemoteStore = second.store
        store.commits_held = True
        resuming = await begun(second.engine.open_session("plain", session_id=name))
        await store.until("commit")
        await first.step(name, x(1))
        store.let_go()
        resumed = await resuming
        assert resumed.session.lease_s == 0.0
        assert (await first.step(name, x(1), expected=1)).revision == 2
        assert (await first.engine.session_info(name)).lease_s == 0.0


async def test_who_resumes_is_told_when_the_store_does_not_keep_the_lease() -> None:
    async with two_in_time() as (first, second, _):
        name = await unnamed(first)
        await second.state(name)
        store: RemoteStore = second.store
        store.commit_error = Unavailable("away")
        with pytest.raises(Unavailable, match="away"):
            await second.engine.open_session("plain", session_id=name)
        store.commit_error = None
        assert (await second.engine.session_info(name)).lease_s == 60.0
        assert (await second.step(name, x(1))).revision == 1
