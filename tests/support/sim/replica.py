"""One replica: a real engine on an event loop of its own, which can be paused, killed and started anew."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from stepwell_server.core.idle import IdleLimits
from stepwell_server.engine.api import SessionPolicy
from stepwell_server.engine.engine import Engine
from stepwell_server.engine.state.resident import ResidentRows
from stepwell_server.errors import Unavailable, VersionExists
from support.engine.fake_executor import PLAIN, FakeExecutor, Hooks
from support.engine.harness import Events, FixedCost
from support.engine.internals import Internals
from support.sim.client import open_store
from support.sim.network import Network
from support.sim.node import ModelNode
from support.sim.quota import Admission, WatchedQuotas
from support.sim.world import NodeLoop, World

#: Other weights would do the same here: what is computed says nothing of the version that did it.
SECOND = dataclasses.replace(PLAIN, fingerprint="f-plain-2")


class SkewedClock:
    """The clock of one machine: it runs as the world's does, and people have set it more or less well."""

    def __init__(self, world: World, skew_s: float) -> None:
        self._world = world
        self._skew_s = skew_s

    def monotonic(self) -> float:
        return 1000.0 + self._world.now

    def now(self) -> float:
        return 1_700_000_000.0 + self._skew_s + self._world.now


class LatePool:
    """Threads that run passes: what they are given is done a little later."""

    def __init__(self, loop: NodeLoop) -> None:
        self._loop = loop

    def submit(self, work: Callable[[], object]) -> None:
        if self._loop.is_dead:
            return
        self._loop.call_later(self._loop.world.random.random() * 5e-3, work)

    def shutdown(self, *, wait: bool) -> None:
        """There is nothing."""


class Replica:
    """A machine with one server after the other on it."""

    def __init__(
        self,
        world: World,
        network: Network,
        nodes: Sequence[ModelNode],
        name: str,
        *,
        skew_s: float,
        resident_rows: int,
        idle_s: float,
        threads: bool,
        most: int,
        book: list[Admission],
    ) -> None:
        """`most` sessions of a tenant, 0 for any number; `book` gets what its quotas count."""
        self.world = world
        self.network = network
        self.nodes = nodes
        self.name = name
        self.clock = SkewedClock(world, skew_s)
        self._resident_rows = resident_rows
        self._idle_s = idle_s
        self._threads = threads
        self._most = most
        self._book = book
        self.quotas: WatchedQuotas | None = None
        self.lives = 0
        self.loop: NodeLoop | None = None
        self.engine: Engine | None = None
        """None while it starts, or is dead."""
        self.has_second = False
        """The second version of the model is in its folder, and is loaded when it starts."""
        self.buried: list[NodeLoop] = []
        self.defects: list[str] = []

    def start(self) -> None:
        """Start a server that knows nothing."""
        self.lives += 1
        self.world.note("start", self.name)
        loop = self.loop = NodeLoop(self.world, self.name)
        loop.call_soon(lambda: loop.create_task(self._boot(loop)))

    async def _boot(self, loop: NodeLoop) -> None:
        whose = f"{self.name}/{self.lives}"
        while True:
            try:
                store = await open_store(loop, self.network, self.nodes, self.clock, whose=whose)
            except Unavailable:
                await asyncio.sleep(0.5)
                continue
            quotas = None
            if self._most:
                quotas = WatchedQuotas(self.world, self.clock, self._most, whose, self._book)
            engine = Engine(
                store=store,
                clock=self.clock,
                observer=Events(),
                max_batch_rows=3,
                resident_rows=ResidentRows(self._resident_rows),
                idle_limits=IdleLimits(self._idle_s),
                compute_threads=2,
                executor=lambda program: FakeExecutor(program, Hooks()),
                quotas=quotas,
            )
            for version, program in enumerate([PLAIN, SECOND] if self.has_second else [PLAIN], 1):
                engine.begin_with("plain", version, program)
            internals = Internals(engine)
            internals.use_pool(LatePool(loop))
            try:
                if quotas is not None:
                    await quotas.count(store)
                await engine.start()
                break
            except Unavailable:
                await asyncio.sleep(0.5)
        for model in internals.models:
            model.cost = FixedCost(1.0 if self._threads else 0.0, 2)
        self.engine, self.quotas = engine, quotas
        self.world.note("ready", self.name)

    @property
    def is_ready(self) -> bool:
        """It takes calls, or will when it is not paused any more."""
        return self.engine is not None

    @property
    def is_paused(self) -> bool:
        """As by SIGSTOP."""
        return self.loop is not None and self.loop.is_paused

    def pause(self) -> None:
        """Nothing of it runs until `resume`; what it has sent is on its way."""
        if self.loop is not None:
            self.world.note("pause", self.name)
            self.loop.is_paused = True

    def resume(self) -> None:
        """Let it go on as if nothing had been."""
        if self.loop is not None and self.loop.is_paused:
            self.world.note("resume", self.name)
            self.loop.is_paused = False

    def load_second(self) -> None:
        """Serve the second version of the model too, from now on and after the next start."""
        if not self.is_ready or self.has_second:
            return

        def done(result: Any) -> None:
            self.world.note("loaded", self.name, type(result).__name__)
            self.has_second |= result is None or isinstance(result, VersionExists)

        self.call(lambda engine: engine.load_version("plain", 2, SECOND), done)

    def set_default(self, version: int, policy: SessionPolicy) -> None:
        """Let the other version be the default, here and everywhere, if it can be now."""
        if not self.is_ready:
            return

        def done(result: Any) -> None:
            self.world.note("default", version, policy.name, self.name, type(result).__name__)

        self.call(lambda engine: engine.set_default("plain", version, policy), done)

    def kill(self) -> None:
        """All that it knew is gone; what it has sent is on its way."""
        if self.loop is not None:
            self.world.note("kill", self.name)
            self.defects += self.loop.defects
            self.loop.kill()
            self.buried.append(self.loop)
        self.loop = self.engine = self.quotas = None

    def call(self, work: Callable[[Engine], Awaitable[Any]], done: Callable[[Any], object]) -> None:
        """Do something on the engine when the replica has a turn; `done` gets what it returns, or raises."""
        loop, engine = self.loop, self.engine
        if loop is None or engine is None:
            done(Unavailable("nobody is there"))
            return

        async def do() -> None:
            try:
                done(await work(engine))
            except Exception as error:
                done(error)

        loop.call_soon(lambda: loop.create_task(do()))

    def bury(self) -> None:
        """The end of the simulation."""
        self.kill()
        for loop in self.buried:
            loop.bury()
