"""The demo of the console: three users whose readings a small model forecasts, each in a session of its own.

`scripts/console_demo.py` trained the model on such readings, and compiled it.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from stepwell.client import Client
from stepwell.errors import StepwellError
from stepwell.session import Session

Floats: TypeAlias = npt.NDArray[np.float32]

MODEL = "readings"
USERS = ("ana", "ben", "chloe")
STEPS_PER_S = 10
_SERVER = "stepwell_server"
_FILE = Path("console", "demo.stepwell")


def model_file() -> Path:
    """The compiled model, in the server's package.

    Raises:
        LookupError: The server's package is not installed.
    """
    found = importlib.util.find_spec(_SERVER)
    for folder in (found and found.submodule_search_locations) or ():
        return Path(folder) / _FILE
    raise LookupError(f"the package {_SERVER} is not installed")


def readings(period: float, seed: int, *, bursts: bool = False) -> Iterator[float]:
    """Readings without end: a wave with a slow swell and noise; or calm, with a burst now and then."""
    random = np.random.default_rng(seed)
    phase, swell = random.uniform(0, 2 * np.pi, 2)
    left = 0
    for step in range(1 << 62):
        angle = 2 * np.pi * step / period
        value = np.sin(angle + phase) * (0.7 + 0.3 * np.sin(angle / 9 + swell))
        if bursts:
            left = left - 1 if left else 12 * int(random.random() < 0.03)
            value = 0.25 * value + (0.9 if left else -0.5)
        yield float(value + random.normal(0, 0.04))


def sources() -> Mapping[str, Iterator[float]]:
    """The readings of each user."""
    return {
        "ana": readings(24, 1),
        "ben": readings(60, 2),
        "chloe": readings(36, 3, bursts=True),
    }


def live(client: Client, stop: threading.Event) -> None:
    """Feed the users' readings to their sessions until `stop`. The console may change the sessions meanwhile."""
    given, sessions = sources(), dict[str, Session]()
    while not stop.wait(1 / STEPS_PER_S):
        for user in USERS:
            try:
                if user not in sessions:
                    sessions[user] = client.open_session(MODEL, session_id=user)
                sessions[user].step(np.array([[next(given[user])]], np.float32))
            except StepwellError:  # stepped, reset or closed by somebody else: take it up as it is now
                sessions.pop(user, None)
