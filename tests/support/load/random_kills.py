"""Kills a server at random moments under load, and starts it again."""

from __future__ import annotations

import random
import threading

from stepwell.testing import LocalServer
from support.load.driver_process import DriverProcess

_MAX_CHANGES = 120
_LONGEST_S = 0.03


def kill_at_random(server: LocalServer, driver: DriverProcess, chance: random.Random, kills: int) -> None:
    """Each kill comes some acknowledged changes after the last, and a moment later, anywhere in what is under way."""
    for _ in range(kills):
        driver.wait_acknowledged(chance.randrange(_MAX_CHANGES))
        threading.Event().wait(chance.uniform(0, _LONGEST_S))
        assert server.kill() == -9, f"the server had ended by itself:\n{server.logs()}"
        server.restart()
