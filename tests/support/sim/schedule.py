"""One schedule of a simulation: what is there, what goes wrong and when, all drawn from its seed; and whether it held.

`run(seed)` has some real engines (of `support.engine.fake_executor`) serve callers over modelled shards of one store, while
replicas are paused, killed and started, messages are late, lost or overtake each other, and shards fail over. Then all is
mended, whoever waits must be answered, and every replica is asked for every session. `linearizability` judges the history.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Coroutine
from typing import Any

from support.checks import linearizability
from support.checks.checker import Report
from support.checks.register import Loss, PermittedEvents
from support.engine.internals import Internals
from support.sim.callers import Callers
from support.sim.client import Bugs, make_nodes
from support.sim.idle_limits import ENDED_S, Holder, Limits
from support.sim.joint_opens import Together
from support.sim.nemesis import FAULTS, Nemesis
from support.sim.network import Network, Weather
from support.sim.plain_model import PlainModel
from support.sim.programs import Mix, Owner, guest, read_everywhere
from support.sim.quota import PREFIX, Admission, WatchedQuotas, require_kept
from support.sim.replica import Replica
from support.sim.world import Hang, World

_MAX_NODES, _MAX_BLIND = 20_000, 2_000
"""Of a search: a session that needs more is not judged."""


@dataclasses.dataclass
class Plan:
    """The kind of a schedule."""

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
    limit_s: float
    """The longest idle limit of sessions that have their own; 0: there are none."""
    most: int
    """Sessions of all owners together, who are one tenant; 0: any number."""
    together: bool = False
    """Owners open their sessions, and fork them, many by one call."""
    contested: bool = False
    """Others do so too, and want some of the same sessions."""

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
        return cls(
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
            limit_s=0.0,
            most=0,
        )._with_more(draw)

    def _with_more(self, draw: random.Random) -> Plan:
        """The same, with what few schedules have."""
        match draw.choice(["limits", "quotas", "together", "contested", "reuse", "", "", ""]):
            case "limits":
                return dataclasses.replace(
                    self, limit_s=draw.choice([6.0, 10.0]), idle_s=30.0, seconds=25.0, owners=[["a"]]
                )
            case "quotas":
                names = [f"{PREFIX}{name}" for name in "abcdef"]
                mix = dataclasses.replace(self.mix, close=6.0, fork=0.0, rest=0.0)
                return dataclasses.replace(
                    self, most=2, owners=[[name] for name in names], rivals=False, idle_s=0.0, mix=mix
                )
            case "together":
                mix = dataclasses.replace(
                    self.mix, fork_many=draw.choice([0.0, 0.3]), resume_many=draw.choice([0.0, 1.0])
                )
                return dataclasses.replace(self, together=True, mix=mix)
            case "reuse":
                return dataclasses.replace(self, mix=dataclasses.replace(self.mix, reuse=3.0))
            case "contested":
                return dataclasses.replace(self, contested=True)
        return self


@dataclasses.dataclass
class Result:
    """The outcome of a schedule."""

    seed: int
    trace: str
    report: Report
    turns: int
    seconds: float


class Schedule:
    """One run."""

    def __init__(
        self,
        seed: int,
        *,
        plan: Plan | None = None,
        bugs: Bugs | None = None,
        is_told: bool = True,
        show: bool = False,
    ) -> None:
        """`is_told` False: the verdict is that of who does not know what fail-overs took back."""
        self._is_told = is_told
        self.seed = seed
        self.plan = plan or Plan.drawn(seed)
        self.world = World(seed, show=show)
        self.network = Network(self.world, self.plan.weather)
        self.shards = make_nodes(
            self.world,
            self.plan.shards,
            bugs or Bugs(),
            must_sync=self.plan.must_sync,
            flush_s=self.plan.flush_s,
        )
        self._book: list[Admission] = []
        self.replicas = [
            Replica(
                self.world,
                self.network,
                self.shards,
                f"replica-{number}",
                skew_s=self.world.random.uniform(-300, 300),
                resident_rows=self.plan.resident_rows,
                idle_s=self.plan.idle_s,
                threads=self.plan.threads,
                most=self.plan.most,
                book=self._book,
            )
            for number in range(self.plan.replicas)
        ]
        self.callers = Callers(self.world, self.network, self.replicas)
        self._limits = Limits(self.plan.limit_s)
        self._nemesis = Nemesis(
            self.world,
            self.network,
            self.shards,
            self.replicas,
            self.plan.faults,
            every_s=self.plan.fault_every_s,
            versions=self.plan.moves,
        )

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
        # what a fail-over took back is not the session's last change any more
        assert lost or not (reused := self.callers.reused), (
            f"applied under the id of another change: {reused}"
        )
        terms = PermittedEvents(
            self.plan.idle_s or float("inf"),
            self.world.time_of,
            lost,
            most_nodes=_MAX_NODES,
            ends_after=self._limits.ends_after if self.plan.limit_s else None,
        )
        report = linearizability.check(self.callers.history.ops, PlainModel(), terms)
        if lost:
            self._check_blindly(report, terms)
        judged = [each for each in report.violations if each.what != linearizability.TOO_MANY]
        report.unjudged += len(report.violations) - len(judged)
        report.violations = judged
        if self.plan.most:
            births = [birth for shard in self.shards for birth in shard.births]
            require_kept(births, self._book, self.plan.most)
        return Result(self.seed, self.world.trace, report, self.world.turns, self.world.now)

    def _check_blindly(self, report: Report, terms: PermittedEvents) -> None:
        """As who has a real store must, which does not say what a fail-over lost. What takes too long is left."""
        moments = sorted({each.at for each in terms.rollbacks})
        losses = [Loss(0, at, at) for at in moments]
        blind = linearizability.check(
            self.callers.history.ops,
            PlainModel(),
            dataclasses.replace(terms, rollbacks=(), losses=losses, most_nodes=_MAX_BLIND),
        )
        if not self._is_told:
            report.violations = []
        report.violations += blind.violations

    def _run(self) -> None:
        world, plan, callers = self.world, self.plan, self.callers
        world.note("plan", plan)
        weather = dataclasses.replace(self.network.weather)
        self.network.weather.calm()
        for replica in self.replicas:
            replica.start()
        world.run(lambda: all(each.is_ready for each in self.replicas), 1000.0, "the start")
        self.network.weather = weather
        began = world.now
        owners = [Owner(callers, plan.mix, names, together=plan.together) for names in plan.owners]
        names = [name for group in plan.owners for name in group]
        work = [owner.run(began + plan.seconds) for owner in owners]
        work += [
            guest(callers, names, began + plan.seconds, plan.mix.think_s * 2) for _ in range(plan.guests)
        ]
        if plan.rivals:
            work += [Owner(callers, plan.mix, ["r"], must_be_new=True).open_once("r") for _ in range(3)]
        work += [
            Holder(callers, self._limits, plan.mix).run(began + plan.seconds)
            for _ in range(2 if plan.limit_s else 0)
        ]
        if plan.contested:
            sets = [["m0", "m1"], ["m1", "m2"]]
            work += [Together(callers, plan.mix, each).run(began + plan.seconds) for each in sets]
        tasks = self._begin(work)
        world.after(0.3, self._nemesis.begin)
        world.run(lambda: world.now >= began + plan.seconds, plan.seconds + 10, "the work")
        self._heal()
        self._load_everywhere()
        self._finish(tasks, "callers must be answered")
        if plan.limit_s:
            self._pass(plan.limit_s + ENDED_S)
        everything = sorted({op.call.session for op in callers.history.ops})
        self._finish(self._begin([read_everywhere(callers, everything)]), "sessions must be read")
        self._require_all_ended()
        self._require_known()
        self._settle()

    def _require_all_ended(self) -> None:
        """Nobody has used sessions with limits of their own for long: they are gone."""
        there = {session for shard in self.shards for session in shard.live()}
        left = sorted(there & self._limits.of.keys())
        assert not left, f"their limits are over, and they are there: {left}"

    def _require_known(self) -> None:
        """Every replica counts what the tenant has in truth."""
        if not self.plan.most:
            return
        self._pass(2.0)
        there = sum(session.startswith(PREFIX) for shard in self.shards for session in shard.live())
        for replica in self.replicas:
            quotas, found = replica.quotas, list[Any]()
            assert quotas is not None
            self._ask_quotas(replica, quotas, found)
            assert found == [there], f"{replica.name} knows of {found}, there are {there}"

    def _ask_quotas(self, replica: Replica, quotas: WatchedQuotas, found: list[Any]) -> None:
        replica.call(lambda _engine: quotas.known(), found.append)
        self.world.run(lambda: bool(found), 60.0, "the store must be asked")

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
        self._nemesis.is_over = True
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
            Internals(engine).check_books(None)
            assert not (defects := replica.defects + loop.defects), defects
        assert not self.callers.loop.defects, self.callers.loop.defects


def run(seed: int, **options: Any) -> Result:
    """Run the schedule of a seed, and judge it: see `Schedule.run`."""
    result = Schedule(seed, **options).run()
    result.report.require_clean()
    return result


__all__ = ["FAULTS", "Hang", "Plan", "Result", "Schedule", "run"]
