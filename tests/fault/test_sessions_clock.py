"""The clock on the wall jumps by hours, while the server runs and while it is away: sessions do not notice."""

from __future__ import annotations

from pathlib import Path

import pytest

import stepwell
from support.load.driver import MODEL
from support.load.driver_process import DriverProcess
from support.servers.fault_servers import FaultyServer, verdict

DAY_S = 86_400
IDLE_S = 3_600


@pytest.mark.slow
def test_jumps_end_no_session(tmp_path: Path) -> None:
    history = tmp_path / "history"
    with (
        FaultyServer(tmp_path / "data", "--max-session-idle-s", str(IDLE_S)) as server,
        stepwell.connect(server.address) as client,
        DriverProcess(server.address, history, seed=41) as driver,
    ):
        client.open_session(MODEL, session_id="idle").reset_states()
        for jump_s in (DAY_S, -3 * DAY_S):
            driver.wait_acknowledged(60)
            server.tell(f"jump {jump_s}")
            driver.wait_acknowledged(60)
            assert client.session_info("idle").revision == 1
            server.kill()
            server.restart()  # the clock stays where it is
            assert client.session_info("idle").revision == 1
        driver.wait_acknowledged(60)
        driver.stop()
    verdict(history).require_clean()


def wait_expired(client: stepwell.Client, session_id: str) -> None:
    """Ask until it is gone; asking does not count as use."""
    while True:
        try:
            client.session_info(session_id)
        except stepwell.SessionExpiredError:
            return


@pytest.mark.parametrize("jump_s", [pytest.param(DAY_S, marks=pytest.mark.slow), -DAY_S])
def test_a_jump_keeps_no_session_alive(tmp_path: Path, jump_s: int) -> None:
    """What is idle for too long expires, whatever the clock on the wall says."""
    with (
        FaultyServer(tmp_path / "data", "--max-session-idle-s", "0.2") as server,
        stepwell.connect(server.address) as client,
    ):
        client.open_session(MODEL, session_id="idle")
        server.tell(f"jump {jump_s}")
        wait_expired(client, "idle")
        server.restart()
        with pytest.raises(stepwell.SessionExpiredError):
            client.session_info("idle")
