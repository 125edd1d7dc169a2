"""Callers of the SDK, who know all replicas, see no error while replicas are killed and restarted.

The short version of `make soak-cluster`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.checks import history
from support.load import replica_faults
from support.load.driver import PlayerCounts
from support.load.driver_process import DriverProcess
from support.load.many_sessions import restart_under_load
from support.servers.fault_servers import verdict
from support.servers.replica_processes import Replicas
from support.servers.valkey_servers import Valkey

ASYNC = ("--durability", "async")
MIX = PlayerCounts(frames=12, calls=3, threads=3, groups=2, group_size=6)
pytestmark = pytest.mark.plain("its crowd is of no tenant")


@pytest.fixture
def replicas() -> Iterator[Replicas]:
    with Valkey() as valkey, Replicas(valkey.url(), 3, *ASYNC) as three:
        yield three


@pytest.mark.slow
def test_no_error_reaches_a_caller_whose_replica_is_killed(replicas: Replicas, tmp_path: Path) -> None:
    path, chance = tmp_path / "history", random.Random(51)
    with DriverProcess(replicas.address, path, seed=51, mix=MIX, pause_s=0.05, hurry=False) as load:
        for _ in range(3):
            replica_faults.kill_replica(replicas, load, chance)
        load.wait_acknowledged(100)
        load.stop()
    assert verdict(path).require_clean().acknowledged > 150
    assert history.failures(history.load([path])) == []


@pytest.mark.slow
def test_a_rolling_restart_under_load(replicas: Replicas) -> None:
    """Each session moves to other replicas and back: no error, none lost, none twice, all right."""
    assert restart_under_load(replicas, 2000, seed=52).startswith("2000 sessions made ")
