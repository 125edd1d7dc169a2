"""The store where Sentinels watch a primary, and on a Cluster: fail-overs, and slots that move meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import pytest

from stepwell_server.errors import StoreAway
from stepwell_server.store.base import ALL_KEPT, Batch, End, StoreError, Tombstone
from stepwell_server.store.record import RecordBytes
from stepwell_server.store.valkey.store import ValkeyStore
from support.servers.valkey_servers import Cluster, Sentinels, Valkey, migrate
from support.stores.changes import Windowed
from support.stores.disk_store import record, template
from support.stores.records import scan
from support.stores.valkey_store import end, fresh_prefix, opened, put, shared

T = TypeVar("T")
IDS = [f"s{i}" for i in range(300)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(replicas=1) as running:
        yield running


async def until_kept(
    store: ValkeyStore, ids: Sequence[str], revision: int, follows: Sequence[int]
) -> Sequence[int]:
    """Change sessions as a server would, through whatever happens; their stamps then."""
    stamps = dict(zip(ids, follows, strict=True))
    left = list(ids)
    while left:
        records = [(i, record(i, revision)) for i in left]
        try:
            kept, stamp = await put(store, records, [stamps[i] for i in left])
        except StoreAway:
            continue
        for i in left:
            if i not in kept.conflicts and i not in kept.unknown:
                stamps[i] = stamp
        left = [*kept.conflicts, *kept.unknown]
        if left:
            stamps.update(zip(left, await fetched(store, left), strict=True))
    return [stamps[i] for i in ids]


async def fetched(store: ValkeyStore, ids: Sequence[str]) -> list[int]:
    while True:
        try:
            return [each.stamp for each in await store.fetch(ids)]
        except StoreAway:
            continue


@pytest.mark.slow
async def test_a_cluster_has_it_all(cluster: Cluster) -> None:
    async with shared(cluster.url(), 2) as (a, b):
        kept, first = await put(a, template(IDS), [0] * 300)
        assert kept is ALL_KEPT
        assert (await put(b, template(IDS, 1), [first] * 300))[0] is ALL_KEPT
        assert (await put(a, template(IDS, 1), [first] * 300))[0].conflicts == frozenset(IDS)
        found = await a.fetch(IDS)
        assert [bytes(each.record or b"") for each in found] == [bytes(r) for _, r in template(IDS, 1)]
        assert [name for name, _ in await scan(b, limit=999)] == sorted(IDS)
        assert (await b.count(), await b.count_of("m"), len(await b.heads(limit=999))) == (300, 300, 300)
        stones = [Tombstone(i, End.CLOSED, 1.0) for i in IDS[:99]]
        assert await end(a, stones, [each.stamp for each in found[:99]]) is ALL_KEPT
        assert [each.tombstone for each in await b.fetch(IDS[:99])] == stones
        await a.touch(IDS, [each.stamp for each in found])
        assert await a.apply(Batch(documents=[("d", b"x")])) is ALL_KEPT
        assert await b.documents() == {"d": b"x"}
        assert (await a.check()).problem == ""


async def test_sync_on_a_cluster(cluster: Cluster) -> None:
    async with shared(cluster.url("&timeout_ms=20000"), 2, durability="sync") as (a, b):
        kept, first = await put(a, template(IDS), [0] * 300)
        assert kept is ALL_KEPT
        assert {each.stamp for each in await b.fetch(IDS)} == {first}


async def test_slots_move_to_another_node_meanwhile(cluster: Cluster) -> None:
    """All partitions of one node go to another, step by step as `valkey-cli --cluster reshard` does it."""
    async with shared(cluster.url("&partitions=12"), 2) as (a, b):
        prefix = a._url.prefix
        ids = IDS[:60]
        stamps: Sequence[int] = [(await put(a, template(ids), [0] * 60))[1]] * 60
        source = cluster.primary_of("{0}")
        target = next(node for node in cluster.primaries if node is not source)
        ours = [p for p in range(12) if cluster.primary_of(f"{{{p}}}") is source]
        moving = asyncio.create_task(asyncio.to_thread(move, cluster, source, target, prefix, ours))
        revision = 0
        while not moving.done() or revision < 3:
            revision += 1
            stamps = await until_kept((a, b)[revision % 2], ids, revision, stamps)
        await moving
        assert all(cluster.primary_of(f"{{{p}}}") is target for p in ours)
        assert list(await fetched(a, ids)) == list(stamps)
        assert (await b.count(), await b.count_of("m")) == (60, 60)
        move(cluster, target, source, prefix, ours)
        assert (await put(a, [(i, record(i, 99)) for i in ids], stamps))[0] is ALL_KEPT


@pytest.mark.parametrize(
    ("changes", "first"), [(0, "nothing"), (0, "sessions"), (2, "sessions"), (2, "earlier records")]
)
async def test_calls_wait_for_records_that_have_not_moved_yet(
    cluster: Cluster, changes: int, first: str
) -> None:
    """A session and the records before its change are two keys, of which one may be at another node than the other."""
    x, y = Windowed("x"), Windowed("y")
    async with shared(cluster.url("&partitions=1&timeout_ms=20000"), 2) as (a, b):
        follows = await committed(a, [x.whole, y.whole], [0, 0])
        for _ in range(changes):
            follows = await committed(a, [x.step(), y.step()], follows)
        key, before = a._keys.session("y"), y.whole
        source = cluster.primary_of(key.decode())
        target = next(node for node in cluster.primaries if node is not source)
        slot = cluster.begin_move(source, target, key.decode())
        if first != "nothing":
            migrate(source, target, key if first == "sessions" else a._keys.earlier("y"))
        read = await begun(a.fetch(["y"]), source, target)
        changed = await begun(committed(b, [x.step(), y.step()], follows), source, target)
        cluster.end_move(source, target, slot)
        assert (await read)[0].record in (before, y.whole)
        follows = await changed
        assert [each.record for each in await a.fetch(["x", "y"])] == [x.whole, y.whole]
        assert [each.stamp for each in await b.fetch(["x", "y"])] == follows
        cluster.move_slot(target, source, key.decode())


async def begun(call: Coroutine[Any, Any, T], *nodes: Valkey) -> asyncio.Task[T]:
    """Begin a call, and return when it has ended or has to wait because some of its keys are at another node."""

    def refusals() -> list[str | None]:
        return [node.info("errorstats").get("errorstat_TRYAGAIN") for node in nodes]

    before, task = refusals(), asyncio.create_task(call)
    while not task.done() and refusals() == before:  # noqa: ASYNC110 - the node sets no event
        await asyncio.sleep(0)
    return task


async def committed(store: ValkeyStore, records: Sequence[RecordBytes], follows: Sequence[int]) -> list[int]:
    """Commit records of `x` and `y`, and return their stamps."""
    kept, stamp = await put(store, list(zip("xy", records, strict=True)), follows)
    assert kept is ALL_KEPT
    return [stamp, stamp]


def move(cluster: Cluster, source: Valkey, target: Valkey, prefix: str, partitions: Sequence[int]) -> None:
    for partition in partitions:
        cluster.move_slot(source, target, f"{{{partition}}}")


async def test_a_primary_of_a_cluster_that_was_emptied_is_noticed(cluster: Cluster) -> None:
    async with shared(cluster.url("&partitions=12"), 2) as (a, b):
        ids = IDS[:60]
        assert (await put(a, template(ids), [0] * 60))[0] is ALL_KEPT
        owners = [cluster.primary_of(f"{{{p}}}") for p in range(12)]
        victim = next(node for node in owners if node is not cluster.primary_of("{meta}"))
        gone = [i for i in ids if owners[a._keys.partition(i)] is victim]
        assert 0 < len(gone) < 60
        lone = next(i for i in ids if i not in gone)
        owners[a._keys.partition(lone)].ask("DEL", a._keys.session(lone).decode())
        victim.ask("FLUSHALL")
        # before anybody has looked: none begins
        kept, _ = await put(b, [(gone[0], record(gone[0]))], [0])
        assert kept.conflicts == {gone[0]}
        emptied = sum(owner is victim for owner in owners)
        for store in (a, b):
            health = await store.check()
            assert health.problem == ""
            assert f"{emptied} of 12 partitions of the store were emptied" in health.warning
            assert [bool(store.damage_of(i)) for i in ids] == [i in gone for i in ids]
        (found,) = await b.fetch([lone])
        assert found.tombstone is not None
        assert found.tombstone.end is End.LOST
        assert (await a.fetch([gone[1]]))[0].record is None
        assert (await put(a, [(gone[0], record(gone[0]))], [0]))[0] is ALL_KEPT


async def test_a_primary_of_a_cluster_is_killed(cluster: Cluster) -> None:
    async with shared(cluster.url("&timeout_ms=2000"), 2) as (a, b):
        ids = IDS[:64]
        stamps = await until_kept(a, ids, 0, [0] * 64)
        old = cluster.primary_of("{0}")
        old.kill()
        over = asyncio.create_task(asyncio.to_thread(cluster.fail_over, old))
        stamps = await until_kept(b, ids, 1, stamps)
        await over
        assert cluster.primary_of("{0}") is not old
        assert list(await fetched(a, ids)) == list(stamps)
        health = await a.check()
        assert health.problem == ""
        old.start()
        cluster.wait_ok()


async def test_nodes_that_are_no_cluster_are_refused() -> None:
    with Valkey(append="") as valkey:
        with pytest.raises(StoreError, match=r"must be a node of a Cluster: .*cluster support disabled"):
            await opened(valkey.url("?cluster=true"))
        with pytest.raises(StoreError, match=r"must be a Sentinel: .*unknown command"):
            await opened(valkey.url("?sentinel=main"))
        with Valkey(append="") as replica:
            replica.follow(valkey)
            with pytest.raises(StoreAway, match=f"{replica.address} is a replica, the primary is another"):
                await opened(replica.url("?timeout_ms=2000"))
            # of several the primary is found
            url = f"valkey://{replica.address},{valkey.address}/0?prefix={fresh_prefix()}"
            store = await opened(url)
            assert (await put(store, [("s", record("s"))], [0]))[0] is ALL_KEPT
            await store.close()


async def test_sentinels_name_the_primary_and_the_next_one() -> None:
    with Sentinels() as watched:
        with pytest.raises(StoreError, match="knows no primary named 'other'"):
            await opened(watched.url("").replace("sentinel=stepwell", "sentinel=other"))
        async with shared(watched.url("&timeout_ms=2000"), 2) as (a, b):
            ids = IDS[:64]
            stamps = await until_kept(a, ids, 0, [0] * 64)
            stamps = await until_kept(b, ids, 1, stamps)
            old = watched.primary()
            old.kill()
            over = asyncio.create_task(asyncio.to_thread(watched.fail_over))
            stamps = await until_kept(b, ids, 2, stamps)
            await over
            assert watched.primary() is not old
            assert list(await fetched(a, ids)) == list(stamps)
            assert (await a.check()).problem == ""


async def test_a_primary_that_others_replaced_is_left_though_it_still_answers() -> None:
    """The connections to it stay: but Sentinels say that it is another now."""
    with Sentinels() as watched:
        async with shared(watched.url()) as (store,):
            _, first = await put(store, [("s", record("s"))], [0])
            await asyncio.to_thread(watched.fail_over)
            await store.check()
            assert (await until_kept(store, ["s"], 1, [first]))[0] != first
            assert int(watched.primary().ask("EXISTS", *watched.primary().ask("KEYS", "*s:s"))) == 1


def test_ids_are_spread_evenly() -> None:
    from stepwell_server.store.valkey.keys import Keys

    keys, chance = Keys("p:", 64), random.Random(1)
    counts = [0] * 64
    for _ in range(6400):
        counts[keys.partition(f"user-{chance.randrange(10**9)}")] += 1
    assert max(counts) < 2 * min(counts)
