"""One schedule of a simulation: what is there, what goes wrong and when, all drawn from its seed; and whether it held.

`run(seed)` has some real engines (of `support.fake_executor`) serve callers over modelled shards of one store, while
replicas are paused, killed and started, messages are late, lost or overtake each other, and shards fail over. Then all is
mended, whoever waits must be answered, and every replica is asked for every session. `linear` judges the history.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Coroutine
from typing import Any

from stepwell_server.engine.api import SessionPolicy
from support import linear
from support.checker import Report
from support.inside import Inside
from support.sim.callers import Callers
from support.sim.model import PlainModel
from support.sim.network import Network, Weather
from support.sim.programs import Mix, Owner, guest, read_everywhere
from support.sim.replica import Replica
from support.sim.shard import Shard
from support.sim.store import Bugs
from support.sim.world import Hang, World

FAULTS = ("pause", "kill", "cut", "cut_callers", "fail_over", "storm", "stall")


@dataclasses.dataclass
class Plan:
    """What a schedule is like."""

    replicas: int
    shards: int
    must_sync: bool
    flush_s: float
    """In `sync`: a write is safe from any fail-over after about so long."""
    idle_s: float
    resident_rows: int
    threads: bool
    faults: tuple[str, ...]
    fault_every_s: float
    weather: Weather
    mix: Mix
    owners: list[list[str]]
    rivals: bool
    moves: bool
    """Replicas load a second version one after the other, and the default moves between the two."""
    guests: int
    seconds: float
    together: bool = False
    """Owners open their sessions, and fork them, many by one call."""

    @classmethod
    def drawn(cls, seed: int) -> Plan:
        """The plan of a seed: each leaves out much, so that what is left happens often."""
        draw = random.Random(f"plan {seed}")
        some = [fault for fault in FAULTS if draw.random() < 0.45]
        mix = Mix(think_s=draw.choice([0.02, 0.1, 0.3]))
        for name in (
            "steps",
            "reset",
            "any_step",
            "read",
            "read_many",
            "look",
            "frame",
            "line",
            "fork",
            "close",
            "resume",
        ):
            if draw.random() < 0.4:
                setattr(mix, name, 0.0)
        mix.close *= draw.choice([1.0, 1.0, 12.0])
        idle_s = draw.choice([0.0, 0.0, 6.0])
        if idle_s:
            mix.rest = draw.choice([0.0, 2.0, 8.0])
        bad = draw.random()
        plan = cls(
            replicas=draw.choice([2, 3, 3]),
            shards=draw.choice([1, 1, 2, 3]),
            must_sync=draw.random() < 0.5,
            flush_s=draw.choice([4e-3, 0.1, 0.3]),
            idle_s=idle_s,
            resident_rows=draw.choice([3, 4, 64]),
            threads=draw.random() < 0.4,
            faults=tuple(some),
            fault_every_s=draw.choice([0.2, 0.5, 1.0, 3.0]),
            weather=Weather(
                lost=0.05 * bad * draw.random(),
                late=0.1 * bad * draw.random(),
                late_s=draw.choice([0.5, 5.0]),
            ),
            mix=mix,
            owners=draw.choice([[["a"]], [["a", "b"]], [["a"], ["b"]], [["a", "b", "c"], ["d"]]]),
            rivals=draw.random() < 0.3,
            moves=draw.random() < 0.25,
            guests=draw.choice([0, 0, 1, 2]),
            seconds=draw.choice([4.0, 8.0, 15.0]),
        )
        plan.together = draw.random() < 0.3
        if plan.together:
            mix.fork_many = draw.choice([0.0, 0.3])
        return plan


@dataclasses.dataclass
class Result:
    """What a schedule came to."""

    seed: int
    trace: str
    report: Report
    turns: int
    seconds: float


class Schedule:
    """One run."""

    def __init__(
        self, seed: int, *, plan: Plan | None = None, bugs: Bugs | None = None, show: bool = False
    ) -> None:
        self.seed = seed
        self.plan = plan or Plan.drawn(seed)
        self.world = World(seed, show=show)
        self.network = Network(self.world, self.plan.weather)
        self.shards = [
            Shard(self.world, number, must_sync=self.plan.must_sync, flush_s=self.plan.flush_s)
            for number in range(self.plan.shards)
        ]
        bugs = bugs or Bugs()
        for shard in self.shards:
            shard.ignores_stamps = bugs.ignores_stamps
            shard.ignores_tombstones = bugs.ignores_tombstones
        self.replicas = [
            Replica(
                self.world,
                self.network,
                self.shards,
                f"replica-{number}",
                bugs,
                skew_s=self.world.random.uniform(-300, 300),
                resident_rows=self.plan.resident_rows,
                idle_s=self.plan.idle_s,
                threads=self.plan.threads,
            )
            for number in range(self.plan.replicas)
        ]
        self.callers = Callers(self.world, self.network, self.replicas)
        self._is_over = False

    # --------------------------------------------------------------------------------------------------------- faults

    def _nemesis(self) -> None:
        draw = self.world.random
        if self._is_over:
            return
        if self.plan.moves:
            replica = draw.choice(self.replicas)
            if not replica.has_second:
                replica.load_second()
            else:
                replica.set_default(
                    draw.choice([1, 2]), draw.choice([SessionPolicy.CARRY, SessionPolicy.KEEP])
                )
        if self.plan.faults:
            getattr(self, f"_{draw.choice(self.plan.faults)}")()
        self.world.after(draw.expovariate(1 / self.plan.fault_every_s), self._nemesis)

    def _then(self, seconds: float, call: Callable[..., object], *args: Any) -> None:
        def end() -> None:
            if not self._is_over:
                call(*args)

        self.world.after(seconds, end)

    def _pause(self) -> None:
        draw = self.world.random
        replica = draw.choice(self.replicas)
        if replica.loop is None or replica.is_paused:
            return
        replica.pause()
        loop, seconds = replica.loop, draw.choice([0.01, 0.3, 2.0, 10.0]) * draw.random()
        self._then(seconds, lambda: replica.resume() if replica.loop is loop else None)

    def _kill(self) -> None:
        draw = self.world.random
        replica = draw.choice(self.replicas)
        if replica.loop is None:
            return
        replica.kill()
        self._then(draw.random() * 2.0, replica.start)

    def _cut(self) -> None:
        draw = self.world.random
        self._cut_off(draw.choice(self.replicas).name, f"shard-{draw.choice(self.shards).number}")

    def _cut_callers(self) -> None:
        self._cut_off("callers", self.world.random.choice(self.replicas).name)

    def _cut_off(self, a: str, b: str) -> None:
        self.world.note("cut", a, b)
        self.network.cut.add((a, b))

        def mend() -> None:
            self.world.note("mend", a, b)
            self.network.cut.discard((a, b))

        self._then(self.world.random.choice([0.1, 1.5, 6.0]) * self.world.random.random(), mend)

    def _fail_over(self) -> None:
        draw, shard = self.world.random, self.world.random.choice(self.shards)
        if shard.is_down:
            return
        self.world.note("down", shard.number)
        shard.is_down = True
        shard.fail_over(draw.choice([0.05, 0.5, 2.0]))

        def up() -> None:
            self.world.note("up", shard.number)
            shard.is_down = False

        self.world.after(draw.choice([0.0, 0.2, 2.0]) * draw.random(), up)

    def _storm(self) -> None:
        weather, draw = self.network.weather, self.world.random
        before = (weather.lost, weather.late)
        weather.lost, weather.late = 0.2 * draw.random(), 0.3 * draw.random()

        def calm() -> None:
            weather.lost, weather.late = before

        self._then(draw.random() * 2.0, calm)

    def _stall(self) -> None:
        shard, draw = self.world.random.choice(self.shards), self.world.random
        before, shard.flush_s = shard.flush_s, 0.5

        def flow() -> None:
            shard.flush_s = before

        self.world.after(draw.random() * 2.0, flow)

    # ------------------------------------------------------------------------------------------------------------ run

    def run(self) -> Result:
        """Run it, and judge what came of it.

        Raises:
            AssertionError: it did not hold, or somebody waits for ever.
        """
        try:
            self._run()
        finally:
            for replica in self.replicas:
                replica.bury()
            self.callers.loop.bury()
        # in `sync` nobody was told of what a fail-over takes back
        lost = [] if self.plan.must_sync else [each for shard in self.shards for each in shard.rollbacks]
        terms = linear.Terms(self.plan.idle_s or float("inf"), self.world.time_of, lost)
        report = linear.check(self.callers.history.ops, PlainModel(), terms)
        return Result(self.seed, self.world.trace, report, self.world.turns, self.world.now)

    def _run(self) -> None:
        world, plan, callers = self.world, self.plan, self.callers
        world.note("plan", plan)
        for replica in self.replicas:
            replica.start()
        world.run(lambda: all(each.is_ready for each in self.replicas), 1000.0, "the start")
        began = world.now
        owners = [Owner(callers, plan.mix, names, together=plan.together) for names in plan.owners]
        names = [name for group in plan.owners for name in group]
        work = [owner.run(began + plan.seconds) for owner in owners]
        work += [
            guest(callers, names, began + plan.seconds, plan.mix.think_s * 2) for _ in range(plan.guests)
        ]
        if plan.rivals:
            work += [Owner(callers, plan.mix, ["r"], must_be_new=True).open_once("r") for _ in range(3)]
        tasks = self._begin(work)
        world.after(0.3, self._nemesis)
        world.run(lambda: world.now >= began + plan.seconds, plan.seconds + 10, "the work")
        self._heal()
        self._load_everywhere()
        self._finish(tasks, "callers must be answered")
        everything = sorted({op.call.session for op in callers.history.ops})
        self._finish(self._begin([read_everywhere(callers, everything)]), "sessions must be read")
        self._settle()

    def _begin(self, work: list[Coroutine[Any, Any, None]]) -> list[asyncio.Task[None]]:
        tasks: list[asyncio.Task[None]] = []
        loop = self.callers.loop
        loop.call_soon(lambda: tasks.extend([loop.create_task(each) for each in work]))
        self.world.run(lambda: len(tasks) == len(work), 1.0, "tasks must begin")
        return tasks

    def _finish(self, tasks: list[asyncio.Task[None]], what: str) -> None:
        self.world.run(lambda: all(task.done() for task in tasks), 120.0, what)
        for task in tasks:
            task.result()

    def _pass(self, seconds: float) -> None:
        until = self.world.now + seconds
        self.world.run(lambda: self.world.now >= until, seconds + 10, "time must pass")

    def _load_everywhere(self) -> None:
        """Sessions may be on either version."""
        if not self.plan.moves:
            return
        self.world.run(lambda: all(each.is_ready for each in self.replicas), 100.0, "replicas must start")
        while left := [each for each in self.replicas if not each.has_second]:
            for replica in left:
                replica.load_second()
            self._pass(5.0)

    def _heal(self) -> None:
        self.world.note("heal")
        self._is_over = True
        self.network.heal()
        self.callers.way.is_calm = True
        for shard in self.shards:
            shard.is_down = False
            shard.flush_s = self.plan.flush_s
        for replica in self.replicas:
            if replica.loop is None:
                replica.start()
            replica.resume()

    def _drain(self, replica: Replica) -> object:
        done: list[object] = []
        replica.call(lambda engine: engine.drain(), done.append)
        self.world.run(lambda: bool(done), 60.0, f"{replica.name} must be idle")
        return done[0]

    def _settle(self) -> None:
        """Every engine ends what it had under way, and its books add up."""
        for replica in self.replicas:
            engine, loop = replica.engine, replica.loop
            assert engine is not None
            assert loop is not None
            drained = self._drain(replica)
            assert drained is None, drained
            Inside(engine).check_books(_Shared)
            assert not (defects := replica.defects + loop.defects), defects
        assert not self.callers.loop.defects, self.callers.loop.defects


class _Shared:
    is_volatile = False


def run(seed: int, **options: Any) -> Result:
    """Run the schedule of a seed, and judge it: see `Schedule.run`."""
    result = Schedule(seed, **options).run()
    result.report.require_clean()
    return result


__all__ = ["FAULTS", "Hang", "Plan", "Result", "Schedule", "run"]
