"""Both clients with three real replicas on a real Valkey, which are killed, stopped and paused while sessions are stepped.

No caller gets an error, and each session answers what its steps make of it, each step once.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import pytest

import stepwell
from support import secured
from support.checks.replay import LstmDense
from support.load.driver import FEATURES, MODEL
from support.load.moving_defaults import Reference
from support.processes import until
from support.servers.replica_servers import replicas
from support.servers.server_process import forecast
from support.servers.valkey_servers import Valkey

pytestmark = pytest.mark.skipif(
    secured.is_on(), reason="the kinds of connections are tried by test_sdk_replicas"
)
MEMBERS, SINGLES = 24, 3
TIMEOUT_S = 100.0


class Stepper:
    """Steps of a group or of a session, one after the other, held against what they must answer."""

    def __init__(self, count: int, seed: int) -> None:
        self._reference = Reference({1: LstmDense.load(forecast().path)}, count)
        self._numbers = np.random.default_rng(seed)
        self.count = count
        self.done = 0
        self.took_s: list[float] = []

    def draw(self) -> Any:
        self._began_s = time.monotonic()
        return self._numbers.standard_normal((self.count, FEATURES)).astype(np.float32)

    def answered(self, x: Any, y: Any) -> None:
        self.took_s.append(time.monotonic() - self._began_s)
        self._reference.step(x, np.asarray(y))
        self.done += 1


class Users:
    """A client of each kind that steps a group and some sessions until it is stopped."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.groups = [Stepper(MEMBERS, seed) for seed in (1, 2)]
        self.singles = [[Stepper(1, 10 * at + seed) for seed in range(SINGLES)] for at in (1, 2)]
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(2 + SINGLES)
        self._running: list[Future[None]] = []
        self.client = stepwell.connect(address, timeout_s=TIMEOUT_S)
        self.aio: Any = None

    @property
    def steppers(self) -> list[Stepper]:
        return [*self.groups, *self.singles[0], *self.singles[1]]

    def __enter__(self) -> Self:
        self._begin(lambda: asyncio.run(self._tasks()))
        group = self.client.open_sessions(MODEL, MEMBERS)
        self._begin(lambda: self._steps(group, self.groups[0]))
        for at, stepper in enumerate(self.singles[0]):
            session = self.client.open_session(MODEL, session_id=f"thread-{at}")
            self._begin(functools.partial(self._steps, session, stepper))
        return self

    def _begin(self, work: Callable[[], None]) -> None:
        self._running.append(self._pool.submit(work))

    def _steps(self, handle: Any, stepper: Stepper) -> None:
        while not self._stop.is_set():
            x = stepper.draw()
            stepper.answered(x, handle.step(x))
        revisions = [handle.revision] if stepper.count == 1 else handle.revisions.tolist()
        assert set(revisions) == {stepper.done}

    async def _tasks(self) -> None:
        async with stepwell.aio.connect(self.address, timeout_s=TIMEOUT_S) as self.aio:
            group = await self.aio.open_sessions(MODEL, MEMBERS)
            handles = [await self.aio.open_session(MODEL, session_id=f"task-{at}") for at in range(SINGLES)]
            await asyncio.gather(
                *(
                    self._task(handle, stepper)
                    for handle, stepper in zip(
                        [group, *handles], [self.groups[1], *self.singles[1]], strict=True
                    )
                )
            )

    async def _task(self, handle: Any, stepper: Stepper) -> None:
        while not self._stop.is_set():
            x = stepper.draw()
            stepper.answered(x, await handle.step(x))
        revisions = [handle.revision] if stepper.count == 1 else handle.revisions.tolist()
        assert set(revisions) == {stepper.done}

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        self.client.close()
        for done in self._running:
            done.result()

    def progress(self, steps: int = 5) -> None:
        """Return when everybody has made so many steps more."""
        before = [stepper.done for stepper in self.steppers]

        def have() -> bool:
            for running in self._running:
                if running.done():
                    running.result()
            return all(own.done >= was + steps for own, was in zip(self.steppers, before, strict=True))

        until(have)

    def see(self, *is_up: bool) -> None:
        """Return when both clients see the replicas so."""
        until(
            lambda: all(
                tuple(replica.is_up for replica in client.replicas) == is_up
                for client in (self.client, self.aio)
                if client is not None
            )
        )

    def take_slowest_s(self) -> float:
        """The longest step since this was asked last."""
        taken = [own for stepper in self.steppers for own in stepper.took_s]
        for stepper in self.steppers:
            stepper.took_s = []
        return max(taken, default=0.0)


@pytest.mark.slow
def test_replicas_that_are_killed_stopped_and_paused_fail_no_caller() -> None:
    with (
        Valkey(append="everysec") as valkey,
        replicas(valkey, 3) as servers,
        Users(",".join(server.address for server in servers)) as users,
    ):
        users.progress()
        for at, end in ((0, servers[0].kill), (1, servers[1].stop)):
            users.take_slowest_s()
            end()
            users.progress()
            print(f"{end.__name__}: the slowest step took {users.take_slowest_s():.3f} s")
            users.see(*(other != at for other in range(3)))
            servers[at].restart()
            users.see(True, True, True)
            users.progress()
        paused = servers[0].pid
        assert paused is not None
        users.take_slowest_s()
        os.kill(paused, signal.SIGSTOP)
        users.progress()
        print(f"paused: the slowest step took {users.take_slowest_s():.3f} s")
        users.see(False, True, True)
        os.kill(paused, signal.SIGCONT)
        users.see(True, True, True)
        users.progress()
