"""Replicas are killed, stopped and paused under load, and others go on with their sessions: none lost, none twice.

The short version of `make soak-cluster`.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from support.load.driver_process import ReplicaDriverProcess
from support.servers.fault_servers import verdict
from support.servers.replica_processes import Replicas
from support.servers.valkey_servers import Valkey

REPLICAS = 3


@pytest.mark.slow
def test_replicas_are_killed(tmp_path: Path) -> None:
    """One after the other; clients go on with those that are there, and the killed one comes back into the middle of it."""
    history, chance = tmp_path / "history", random.Random(31)
    with (
        Valkey() as valkey,
        Replicas(valkey.url(), REPLICAS, "--durability", "async") as replicas,
        ReplicaDriverProcess(replicas.addresses, history, seed=31) as driver,
    ):
        for replica in replicas:
            driver.wait_acknowledged(chance.randrange(60, 150))
            replica.kill()
            driver.wait_acknowledged(60)
            replica.start()
        driver.wait_acknowledged(100)
        driver.stop()
    report = verdict(history).require_clean()
    assert report.acknowledged > 450
    assert report.answered_again > 0
    assert report.reads > 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defect", "sorts"),
    [
        ("trust-copies", {"lost", "wrong", "gone"}),
        ("commit-blindly", {"lost"}),
        ("forget-requests", {"wrong"}),
        ("answer-early", {"lost"}),
    ],
    ids=["trust-copies", "commit-blindly", "forget-requests", "answer-early"],
)
def test_a_replica_that_breaks_a_rule_is_caught(tmp_path: Path, defect: str, sorts: set[str]) -> None:
    """The proof that a stale read, a lost change and a forgotten answer would be seen."""
    history = tmp_path / "history"
    with (
        Valkey() as valkey,
        Replicas(valkey.url(), 2, "--durability", "async", defect=defect) as replicas,
        ReplicaDriverProcess(replicas.addresses, history, seed=32) as driver,
    ):
        driver.wait_acknowledged(400)
        driver.kill()
    report = verdict(history)
    found = {one.sort for one in report.violations}
    assert found & sorts, report
