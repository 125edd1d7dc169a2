"""A server that gets a new version again and again while sessions come, go and are stepped, and what it takes meanwhile."""

from __future__ import annotations

import dataclasses
import random
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import stepwell
from support.checks.replay import TOLERANCE, LstmDense
from support.load.driver import FEATURES, MODEL
from support.load.moving_defaults import PATIENCE_S, Admin
from support.secured import Server
from support.servers.fault_servers import arguments
from support.servers.server_process import forecast, retrained

_SESSIONS = 20
MAX_BYTES = 16 << 20
"""That memory may grow in the second half, which is more than what the allocator keeps now and then."""

LATE = 3
"""Threads that a server may have started in the second half only: each is when it is first needed. A thread that each
reload left behind would be twenty."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """The resources of a process at one moment."""

    rss_bytes: int
    threads: int
    descriptors: int
    temporary: int
    """Files in its folder for temporary ones."""
    cached: int
    """Programs in its cache."""

    @classmethod
    def by(cls, pid: int, folder: Path, cache: Path) -> Usage:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        return cls(
            int(status["VmRSS"].split()[0]) * 1024,
            int(status["Threads"]),
            len(list(Path(f"/proc/{pid}/fd").iterdir())),
            sum(1 for _ in folder.rglob("*")),
            sum(1 for _ in cache.rglob("*")),
        )


@dataclasses.dataclass(frozen=True)
class Reloaded:
    """What was seen over some reloads."""

    taken: Sequence[Usage]
    """Before the first, and at the end of each tenth of them."""
    seconds: float

    @property
    def growth_bytes(self) -> int:
        """Of memory in the second half: the median of its last tenths less that of its first."""
        rss = [each.rss_bytes for each in self.taken]
        return int(statistics.median(rss[-3:]) - statistics.median(rss[5:8]))

    def require_level(self) -> None:
        """Itself ends with what it had in the middle.

        Raises:
            AssertionError: something grew on.
        """
        middle, end = self.taken[len(self.taken) // 2], self.taken[-1]
        for name, late in (("threads", LATE), ("descriptors", 0), ("temporary", 0), ("cached", 0)):
            assert getattr(end, name) <= getattr(middle, name) + late, f"{name} grew: {self.taken}"
        assert self.growth_bytes < MAX_BYTES, f"memory grew by {self.growth_bytes} bytes: {self.taken}"

    @property
    def first_growth_bytes(self) -> int:
        """Of memory in the first half."""
        rss = [each.rss_bytes for each in self.taken]
        return int(statistics.median(rss[4:7]) - rss[0])


def reload(folder: Path, reloads: int, seed: int, *extra: str) -> Reloaded:
    """Reload the model of one server so often, which keeps its files in a folder.

    Raises:
        AssertionError: a step failed, or is not what the weights of its version make of the carried state.
    """
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    chance, numbers = random.Random(seed), np.random.default_rng(seed)
    files = [forecast(), retrained()]
    models = [LstmDense.load(saved.path) for saved in files]
    # a cache of its own: other processes of the test run add to theirs
    cache = folder / "cache"
    cache.mkdir(mode=0o700)
    for entry in files[0].cache_dir.glob("*.stepwell"):
        shutil.copy2(entry, cache)
    options = {**arguments(folder / "data", extra), "cache_dir": cache, "env": {"TMPDIR": str(temporary)}}
    server = Server(**options)
    taken: list[Usage] = []
    with server, stepwell.connect(server.address, timeout_s=PATIENCE_S) as client:
        assert server.pid is not None
        admin, began_s = Admin(server.address), time.monotonic()
        group = client.open_sessions(MODEL, _SESSIONS)
        state = models[0].initial(_SESSIONS)
        others: list[stepwell.Session] = []
        for count in range(reloads + 1):
            if count % max(1, reloads // 10) == 0:
                taken.append(Usage.by(server.pid, temporary, cache))
            if count == reloads:
                break
            for _ in range(chance.randrange(3)):
                x = numbers.standard_normal((_SESSIONS, FEATURES)).astype(np.float32)
                y, state = models[count % 2].step(state, x)
                assert np.abs(np.asarray(group.step(x)) - y).max() < TOLERANCE
            others.append(client.open_session(MODEL))
            others[-1].step(np.zeros((1, FEATURES), np.float32))
            if len(others) > 5:
                others.pop(chance.randrange(5)).close()
            version = admin.load(
                files[(count + 1) % 2].path, sessions="SESSION_POLICY_CARRY", unload_previous=True
            )
            admin.wait_alone(version)
        for session in others:
            session.close()
        admin.close()
        return Reloaded(taken, time.monotonic() - began_s)
