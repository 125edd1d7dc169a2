"""Clients that die in the middle of frames: others take their sessions over, by name."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from support.checks import history
from support.load.driver import PlayerCounts
from support.load.driver_process import DriverProcess
from support.servers.fault_servers import local, verdict

MIX = PlayerCounts(frames=6, calls=2, threads=2, groups=3, group_size=8)


@pytest.mark.slow
def test_others_take_over_from_clients_that_die(tmp_path: Path) -> None:
    """Each driver goes on with the sessions of those before it, with the revisions that the server has."""
    path, chance = tmp_path / "history", random.Random(11)
    with local(None) as server:
        for _ in range(3):
            with DriverProcess(server.address, path, seed=11, mix=MIX, pause_s=0.002) as driver:
                driver.wait_acknowledged(chance.randrange(150, 400))
                driver.kill()
        with DriverProcess(server.address, path, seed=11, mix=MIX, pause_s=0.002) as driver:
            driver.wait_acknowledged(200)
            driver.stop()
    cut = [op for op in history.load([path]) if op.call.kind == "step" and not op.ends]
    assert cut, "somebody died with steps under way"
    report = verdict(path).require_clean()
    assert report.unknown >= len(cut)
    assert report.acknowledged > 600
