"""Connections that are refused, dropped, held up, cut and doubled: every change is made once all the same.

And the proof that the checker would see it if not: servers without the rule that makes it so.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from stepwell.testing import LocalServer
from support import secured
from support.checks.checker import Report
from support.load.driver import PlayerCounts
from support.load.driver_process import DriverProcess
from support.peers.proxy import Fate, Proxy
from support.servers.fault_servers import FaultyServer, local, verdict

BAD: tuple[Fate, ...] = ("refuse", "drop", "truncate", "delay", "double", "double")


@pytest.mark.slow
def test_bad_connections(tmp_path: Path) -> None:
    history, seed = tmp_path / "history", 1
    with (
        local(None) as server,
        Proxy(server.address, seed, BAD) as proxy,
        DriverProcess(proxy.address, history, seed, pause_s=0.01) as driver,
    ):
        for _ in range(8):
            driver.wait_acknowledged(150)
            proxy.be(*BAD)
        assert set(proxy.seen) == set(BAD)
        proxy.be("clean")
        driver.stop()
    report = verdict(history).require_clean()
    assert report.acknowledged > 1000
    assert report.reads > 20


def doubled(server: LocalServer, history: Path) -> Report:
    """What the checker says of a server to which everything comes twice."""
    with (
        server,
        Proxy(server.address, 3, ("double",)) as proxy,
        DriverProcess(proxy.address, history, 3, mix=PlayerCounts(frames=4, groups=1)) as driver,
    ):
        driver.wait_acknowledged(150)
        driver.stop()
    return verdict(history)


@pytest.mark.slow
@pytest.mark.parametrize("defect", ["forget-requests", "judge-nothing"])
def test_a_server_that_does_not_know_what_it_has_done_is_caught(tmp_path: Path, defect: str) -> None:
    """Without the dedupe the doubled connections apply steps twice. That is what the checker is for."""
    report = doubled(FaultyServer(None, defect=defect), tmp_path / "history")
    assert report.count("twice") > 0, report
    with pytest.raises(AssertionError, match=r"session 'life0.* revision \d+"):
        report.require_clean()


@pytest.mark.slow
def test_the_same_server_without_the_defect_is_not(tmp_path: Path) -> None:
    """With TLS and tokens: a sample of what `make soak` does with all of these tests."""
    with secured.switched_on():
        server = FaultyServer(None)
        doubled(server, tmp_path / "history").require_clean()
    assert server.address.startswith(secured.SCHEME)
