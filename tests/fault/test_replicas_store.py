"""Replicas whose Valkey is killed, paused, cut off or failed over under load: nothing acknowledged is lost or doubled.

The short version of `make soak-cluster`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.checks.history import Log
from support.load import replica_faults
from support.load.driver_process import ReplicaDriverProcess
from support.peers.proxy import Proxy
from support.servers.fault_servers import verdict, verdict_of_losses
from support.servers.replica_processes import Replicas
from support.servers.valkey_servers import Cluster, Sentinels, Valkey

SYNC, ASYNC = ("--durability", "sync"), ("--durability", "async")


@contextlib.contextmanager
def loaded(history: Path, replicas: Replicas, seed: int) -> Iterator[ReplicaDriverProcess]:
    """Replicas under load, whose history is checked at the end."""
    with ReplicaDriverProcess(replicas.addresses, history, seed) as load:
        load.wait_acknowledged(100)
        yield load
        load.wait_acknowledged(100)
        load.stop()
    report = verdict(history).require_clean()
    assert report.acknowledged > 200
    assert report.answered_again > 0


@pytest.mark.slow
def test_a_replica_that_was_paused_for_longer_than_any_limit(tmp_path: Path) -> None:
    """The classic double owner: it goes on in the middle of what it did, when others have long done it."""
    chance = random.Random(41)
    with (
        Valkey() as valkey,
        Replicas(valkey.url(f"?{replica_faults.SHORT}"), 2, *ASYNC) as replicas,
        loaded(tmp_path / "history", replicas, seed=41) as load,
    ):
        for _ in range(2):
            replica_faults.pause_replica(replicas, load, chance)


@pytest.mark.slow
def test_a_valkey_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    """What `sync` acknowledged is in its file."""
    chance = random.Random(42)
    with (
        Valkey(append="always") as valkey,
        Replicas(valkey.url(f"?{replica_faults.SHORT}"), 2, *SYNC) as replicas,
        loaded(tmp_path / "history", replicas, seed=42) as load,
    ):
        replica_faults.restart_valkey(valkey, load, chance)
        replica_faults.pause_valkey(valkey, load, chance)


@pytest.mark.slow
def test_a_way_to_valkey_that_is_cut(tmp_path: Path) -> None:
    """One replica is cut off, the other goes on."""
    chance = random.Random(43)
    with Valkey() as valkey, contextlib.ExitStack() as stack:
        ways = [stack.enter_context(Proxy(valkey.address, i)) for i in range(2)]
        urls = [f"valkey://{way.address}/0?{replica_faults.SHORT}" for way in ways]
        with Replicas(urls, 2, *ASYNC) as replicas, loaded(tmp_path / "history", replicas, seed=43) as load:
            for _ in range(3):
                replica_faults.part(ways, load, chance)


@pytest.mark.slow
def test_a_primary_that_is_replaced(tmp_path: Path) -> None:
    """With `sync`, and all replicas of Valkey waited for, a fail-over loses nothing that was acknowledged.

    With fewer of them the new primary may be one that was not waited for.
    """
    chance = random.Random(44)
    with (
        Sentinels(replicas=1, append="always") as watched,
        Replicas(watched.url("&replicas=1"), 2, *SYNC) as replicas,
        loaded(tmp_path / "history", replicas, seed=44) as load,
    ):
        replica_faults.fail_over(watched, load, chance)


@pytest.mark.slow
def test_a_fail_over_that_loses_something(tmp_path: Path) -> None:
    """With `async` the last changes of each session may be gone, and nothing else."""
    chance = random.Random(46)
    with (
        Sentinels(replicas=1) as watched,
        Replicas(watched.url(), 2, *ASYNC) as replicas,
        ReplicaDriverProcess(replicas.addresses, tmp_path / "history", 46) as load,
        contextlib.closing(Log(tmp_path / "history", 46)) as log,
    ):
        load.wait_acknowledged(100)
        replica_faults.lose(watched, load, chance, log, "replace")
        load.stop()
    report = verdict_of_losses(tmp_path / "history").require_clean()
    assert report.acknowledged > 200
    assert report.taken_back > 0
    assert report.unjudged < report.sessions / 2


@pytest.mark.slow
def test_a_cluster_one_of_whose_primaries_is_killed(tmp_path: Path) -> None:
    """Sessions of the other primaries go on meanwhile; afterwards all do."""
    chance = random.Random(45)
    with (
        Cluster(append="always") as cluster,
        Replicas(cluster.url(f"&{replica_faults.SHORT}"), 2, *SYNC) as replicas,
        loaded(tmp_path / "history", replicas, seed=45) as load,
    ):
        replica_faults.restart_valkey(chance.choice(cluster.primaries), load, chance)
