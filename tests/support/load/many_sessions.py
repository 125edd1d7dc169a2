"""Very many sessions of the SDK over all replicas at once, in groups whose steps are checked, while something happens to the replicas.

Steps are made for all that are there, one group after the other, until it is told to stop. No error may reach a caller; each
session must have made every step once; and what some of them answered must be what the model gives.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from types import TracebackType
from typing import Any, Self

import numpy as np

import stepwell
from support.checks.replay import TOLERANCE, LstmState
from support.load.driver import FEATURES, MODEL, PATIENCE_S
from support.servers.fault_servers import replayed
from support.servers.replica_processes import Replicas

A_GROUP = 500
_BATCH_SIZE = 4
_QUANTILES = {"median": 0.5, "p99": 0.99, "at most": 1.0}


class ManySessions:
    """Steps sessions from its `with` block's beginning to its end, in a thread of its own.

    Args:
        address: of all replicas.
        count: how many sessions.
        seed: of their inputs.
    """

    def __init__(self, address: str, count: int, seed: int) -> None:
        self._address = address
        self._sizes = [min(A_GROUP, count - done) for done in range(0, count, A_GROUP)]
        self._numbers = np.random.default_rng(seed)
        self._stop = threading.Event()
        self._more = threading.Condition()
        self.rounds = 0
        """How often all sessions have been stepped."""
        self.steps = 0
        """Of sessions, answered."""
        self.waits_s: list[float] = []
        """How long the steps of groups took, in the order in which they were answered."""
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None and self.error is not None:
            raise AssertionError(f"an error reached a caller: {self.error!r}") from self.error

    def wait_steps(self, more: int) -> None:
        """Wait until this many more steps are answered."""
        with self._more:
            wanted = self.steps + more
            there = self._more.wait_for(
                lambda: self.steps >= wanted or self.error is not None, 10 * PATIENCE_S
            )
        assert there, f"{self.steps} steps were answered, {wanted} were expected"
        assert self.error is None, f"an error reached a caller: {self.error!r}"

    def wait_round(self) -> None:
        """Wait until every session has been stepped at least once more, from now on."""
        self.wait_steps(2 * sum(self._sizes))

    def summary(self, quiet: int) -> str:
        """What it did, in words, where replicas were left alone for the first `quiet` steps of groups."""
        alone, after = (
            ", ".join(
                [
                    f"{name} {value:.3f} s"
                    for name, value in zip(
                        _QUANTILES, np.quantile(waits_s, list(_QUANTILES.values())), strict=True
                    )
                ]
            )
            for waits_s in (self.waits_s[:quiet], self.waits_s[quiet:])
        )
        return (
            f"{sum(self._sizes)} sessions made {self.steps} steps, each once and all right, and no error reached a caller;"
            f" a step of {self._sizes[0]} took {after} (before the first restart: {alone})"
        )

    def _run(self) -> None:
        try:
            asyncio.run(self._play())
        except BaseException as error:
            self.error = error
        with self._more:
            self._more.notify_all()

    async def _play(self) -> None:
        async with stepwell.aio.connect(self._address, timeout_s=PATIENCE_S) as client:
            self._groups = [
                await client.open_sessions(
                    MODEL, size, session_ids=[f"crowd.{place}.{i}" for i in range(size)]
                )
                for place, size in enumerate(self._sizes)
            ]
            self._states = [replayed().initial(size) for size in self._sizes]
            workers = [self._work(worker) for worker in range(min(_BATCH_SIZE, len(self._groups)))]
            await asyncio.gather(*workers)
            for group, state in zip(self._groups, self._states, strict=True):
                await self._audit(group, state)

    async def _work(self, worker: int) -> None:
        while not self._stop.is_set():
            for place in range(worker, len(self._groups), _BATCH_SIZE):
                await self._step(place)
            self.rounds += worker == 0

    async def _step(self, place: int) -> None:
        group, state = self._groups[place], self._states[place]
        x = self._numbers.standard_normal((len(group), FEATURES)).astype(np.float32)
        began_s = time.monotonic()
        y = np.asarray(await group.step(x))
        self.waits_s.append(time.monotonic() - began_s)
        right, self._states[place] = replayed().step(state, x)
        far = float(np.abs(y - right).max())
        assert far < TOLERANCE, f"group {place} answered what is {far} from the right"
        with self._more:
            self.steps += len(group)
            self._more.notify_all()

    @staticmethod
    async def _audit(group: Any, state: LstmState) -> None:
        """Nothing is lost and nothing was made twice."""
        await group.refresh()
        told = set(group.revisions.tolist()) | set(group.positions.tolist())
        assert told == {state.position}, (
            f"sessions have made {sorted(told)} steps, {state.position} were answered"
        )
        read = await group.get_states()
        for name, right in state.named().items():
            far = float(np.abs(np.asarray(read[name]) - right).max())
            assert math.isfinite(far), name
            assert far < TOLERANCE, f"{name} is {far} from the right"


def restart_under_load(replicas: Replicas, count: int, seed: int) -> str:
    """Restart replicas one after the other, while very many sessions are stepped. Returns what the crowd did, in words.

    Raises:
        AssertionError: an error reached a caller, a step was lost, made twice or wrong, or a replica did not end well.
    """
    with ManySessions(replicas.address, count, seed) as crowd:
        crowd.wait_steps(count)
        quiet = len(crowd.waits_s)
        for one in replicas:
            assert one.stop() == 0, one.logs()
            crowd.wait_steps(count)
            one.start()
        crowd.wait_round()
    return crowd.summary(quiet)
