"""The long version of the fault tests of replicas: `make soak-cluster ARGS="--kills 500 --seed 7"`.

Three replicas share a Valkey: one alone, a primary that Sentinels watch, or a Cluster. Clients of two kinds keep them busy:
`replica_driver`, which speaks the protocol to all at once, and the SDK with the addresses of all. In rounds of some troubles each,
replicas are killed, paused, restarted one after the other and cut off from Valkey, and Valkey is killed, paused and failed
over. After each round the checker judges what the clients were told: lost, twice and wrong must be 0, and no error may
reach a caller of the SDK. What is found wrong is kept, with the seed to find it again. In the end the replicas are restarted
one after the other under a crowd: as many sessions of the SDK as `--crowd` says.

In rounds of `losses` Valkey does not wait for its replicas, so that fail-overs lose what was acknowledged: `linearizability` judges
that it is the last changes of each session, and nothing else. No caller of the SDK is there, who would see it.

It says how long the SDK's callers waited for the first answer after a kill, of sessions whose replica was killed, and how
long the steps of the crowd took.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import numpy as np

from stepwell.testing import ServerStartError
from support.checks import history
from support.checks.checker import Report
from support.load import replica_faults
from support.load.driver import PlayerCounts
from support.load.driver_process import DriverProcess, Loading, ReplicaDriverProcess
from support.load.many_sessions import restart_under_load
from support.peers.proxy import Proxy
from support.servers.fault_servers import verdict, verdict_of_losses
from support.servers.replica_processes import Replicas
from support.servers.server_process import forecast
from support.servers.valkey_servers import Cluster, Sentinels, Valkey

REPLICAS = 3
A_ROUND = 10
CROWD = 100_000
SYNC, ASYNC = ("--durability", "sync"), ("--durability", "async")
STORES = ("async", "sync", "sentinel", "cluster")
KINDS = {
    "kills": STORES,
    "pauses": STORES,
    "rolls": STORES,
    "parts": ("async", "sync"),
    "restarts": ("sync", "cluster"),
    "stalls": ("async", "sync", "cluster"),
    "failovers": ("sentinel",),
    "losses": ("sentinel-async",),
}
"""Which trouble each kind of store can have: of those where it loses nothing, but for the last kind."""
MIX = PlayerCounts(frames=40, calls=4, threads=4, groups=4, group_size=8)


@dataclasses.dataclass
class Total:
    """What was done so far."""

    wanted: dict[str, int]
    done: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    acknowledged: int = 0
    again: int = 0
    reads: int = 0
    lost: int = 0
    twice: int = 0
    wrong: int = 0
    taken_back: int = 0
    """What was acknowledged and is lost where that may be."""
    waits_s: list[float] = dataclasses.field(default_factory=list)
    """Of callers of the SDK, after kills."""
    quiet_s: list[float] = dataclasses.field(default_factory=list)
    """The same a little before each kill."""

    def add(self, report: Report) -> None:
        self.acknowledged += report.acknowledged
        self.again += report.answered_again
        self.reads += report.reads
        self.lost += report.count("lost") + report.count("gone")
        self.twice += report.count("twice")
        self.taken_back += report.taken_back
        self.wrong += report.count("wrong") + report.count("error")

    def __str__(self) -> str:
        done = ", ".join(f"{kind} {self.done[kind]}/{self.wanted[kind]}" for kind in KINDS)
        waits = ""
        if self.waits_s:
            after, before = (np.quantile(waits_s, [0.5, 0.99]) for waits_s in (self.waits_s, self.quiet_s))
            waits = f"; first answer after a kill: median {after[0]:.3f} s, p99 {after[1]:.3f} s"
            waits += f" (a second before it: {before[0]:.3f} s, {before[1]:.3f} s)"
        return (
            f"{done}; changes acknowledged {self.acknowledged} ({self.again} again), reads {self.reads},"
            f" lost {self.lost}, twice {self.twice}, wrong {self.wrong}; taken back by fail-overs that may"
            f" {self.taken_back}{waits}"
        )


class Round:
    """Fresh replicas and a fresh Valkey, and some troubles of one kind."""

    def __init__(self, kind: str, count: int, seed: str, folder: Path, total: Total) -> None:
        self._chance = random.Random(seed)
        self._kind = kind
        self._count = count
        self._store = self._chance.choice(KINDS[kind])
        self._total = total
        self._kills: list[float] = []
        """When."""
        self.folder = folder
        self._seed = seed

    def run(self) -> list[Report]:
        """Go through it; the reports say what the checker found."""
        self.folder.mkdir()
        if self._kind == "losses":
            return [self._lose(self.folder / "by_protocol")]
        by_protocol, sdk = self.folder / "by_protocol", self.folder / "sdk"
        with self._replicas() as (replicas, act):
            seeds = [self._chance.getrandbits(31) for _ in range(2)]
            with (
                ReplicaDriverProcess(replicas.addresses, by_protocol, seeds[0], pause_s=0.03) as load,
                DriverProcess(replicas.address, sdk, seeds[1], mix=MIX, pause_s=0.4, hurry=False) as other,
            ):
                try:
                    for _ in range(self._count):
                        other.wait_acknowledged(1)
                        act(load)
                        self._total.done[self._kind] += 1
                    other.wait_acknowledged(50)
                    load.stop()
                    other.stop()
                finally:
                    (self.folder / "log").write_text(replicas.logs())
        ops = history.load([sdk])
        self._total.waits_s += waits_after(ops, self._kills)
        self._total.quiet_s += waits_after(ops, [moment_s - 1.0 for moment_s in self._kills])
        return [verdict(by_protocol), verdict(sdk)]

    def _lose(self, by_protocol: Path) -> Report:
        """Fail-overs that lose something. Callers of the SDK would see it, so there are none."""
        chance = self._chance
        with (
            Sentinels(replicas=1) as watched,
            Replicas(watched.url(), REPLICAS, *ASYNC) as replicas,
            ReplicaDriverProcess(
                replicas.addresses, by_protocol, chance.getrandbits(31), pause_s=0.03
            ) as load,
            contextlib.closing(history.Log(by_protocol, 0)) as log,
        ):
            try:
                for _ in range(self._count):
                    load.wait_acknowledged(50)
                    replica_faults.lose(watched, load, chance, log)
                    self._total.done[self._kind] += 1
                load.stop()
            finally:
                (self.folder / "log").write_text(replicas.logs())
        return verdict_of_losses(by_protocol)

    @contextlib.contextmanager
    def _replicas(self) -> Iterator[tuple[Replicas, Callable[[Loading], None]]]:
        chance, short = self._chance, replica_faults.SHORT
        with contextlib.ExitStack() as stack:
            single: Valkey | None = None
            ways: list[Proxy] = []
            match self._store:
                case "sentinel":
                    watched = stack.enter_context(Sentinels(replicas=1, append="always"))
                    urls, durability = [watched.url("&replicas=1")] * REPLICAS, SYNC
                case "cluster":
                    cluster = stack.enter_context(Cluster(append="always"))
                    urls, durability = [cluster.url(f"&{short}")] * REPLICAS, SYNC
                case _:
                    durability = SYNC if self._store == "sync" else ASYNC
                    single = stack.enter_context(
                        Valkey(append="always" if durability is SYNC else "everysec")
                    )
                    ways = [stack.enter_context(Proxy(single.address, i)) for i in range(REPLICAS)]
                    addresses = [way.address if self._kind == "parts" else single.address for way in ways]
                    urls = [f"valkey://{address}/0?{short}" for address in addresses]
            rows = ("--resident-rows", str(chance.choice([16, 65536])))
            replicas = stack.enter_context(Replicas(urls, REPLICAS, *durability, *rows))

            def act(load: Loading) -> None:
                match self._kind:
                    case "kills":
                        killed = replica_faults.kill_replica(replicas, load, chance, self._killed)
                        assert killed.pid is not None
                    case "pauses":
                        replica_faults.pause_replica(replicas, load, chance)
                    case "rolls":
                        replica_faults.restart_replicas(replicas, load, chance)
                    case "parts":
                        replica_faults.part(ways, load, chance)
                    case "failovers":
                        replica_faults.fail_over(watched, load, chance)
                    case "restarts":
                        replica_faults.restart_valkey(
                            single or chance.choice(cluster.primaries), load, chance
                        )
                    case "stalls":
                        replica_faults.pause_valkey(single or chance.choice(cluster.primaries), load, chance)

            yield replicas, act

    def _killed(self) -> None:
        self._kills.append(time.monotonic())

    def __str__(self) -> str:
        return f"{self._kind} on {self._store} (seed {self._seed}), kept in {self.folder}"


def waits_after(ops: list[history.Op], moments_s: list[float]) -> list[float]:
    """How long steps waited for an answer that were under way when a replica was killed, or the next ones after it.

    Nobody sees from outside which of the sessions the killed replica had: of `REPLICAS` it has its share, and those are the ones
    that wait longest. So of each kill the longest waits count, that share of all.
    """
    steps = sorted(
        (op for op in ops if op.call.kind == "step" and op.acknowledged_s), key=lambda op: op.called_s
    )
    found: list[float] = []
    for killed_s in moments_s:
        first: dict[str, float] = {}
        for op in steps:
            if (
                op.acknowledged_s > killed_s
                and op.call.session not in first
                and op.called_s < killed_s + 10.0
            ):
                first[op.call.session] = op.acknowledged_s - max(op.called_s, killed_s)
        waits = sorted(first.values(), reverse=True)
        found += waits[: max(1, round(len(waits) / REPLICAS))]
    return found


def crowd(count: int, seed: int) -> bool:
    """Restart replicas under so many sessions; whether all was well."""
    with Valkey() as valkey, Replicas(valkey.url(), REPLICAS, *ASYNC) as replicas:
        try:
            print(f"{REPLICAS} restarts: {restart_under_load(replicas, count, seed)}", flush=True)
        except (AssertionError, ServerStartError) as error:
            print(
                f"{count} sessions while replicas were restarted (seed {seed}): {error}\n{replicas.logs()}",
                flush=True,
            )
            return False
    return True


def soak(wanted: dict[str, int], sessions: int, seed: int) -> int:
    """Run all rounds, and then the crowd of so many sessions, if there are any. Returns the exit code."""
    total, began_s = Total(wanted), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="stepwell-soak-cluster-"))
    print(f"seed {seed}, what is found wrong is kept in {folder}", flush=True)
    forecast()  # made once
    sizes = [
        (kind, min(A_ROUND, count - done))
        for kind, count in wanted.items()
        for done in range(0, count, A_ROUND)
    ]
    random.Random(seed).shuffle(sizes)
    failed = False
    for number, (kind, count) in enumerate(sizes):
        one, wrong = Round(kind, count, f"{seed}/{number}", folder / str(number), total), ""
        try:
            reports = one.run()
        except (AssertionError, ServerStartError) as error:
            wrong = f"it broke off: {error}"
        else:
            for report in reports:
                total.add(report)
            wrong = "\n".join(str(found) for report in reports for found in report.violations[:10])
        print(f"{time.monotonic() - began_s:6.0f} s  {total}", flush=True)
        if wrong:
            failed = True
            print(f"{one}\n{wrong}", flush=True)
        else:
            shutil.rmtree(one.folder)
    if not failed:
        folder.rmdir()
    if sessions:
        failed |= not crowd(sessions, seed)
    return int(failed)


def main() -> int:
    """Read the arguments and go."""
    parser = argparse.ArgumentParser(description=__doc__)
    defaults = {
        "kills": 500,
        "pauses": 200,
        "rolls": 20,
        "parts": 50,
        "restarts": 20,
        "stalls": 20,
        "failovers": 40,
        "losses": 30,
    }
    for kind, count in defaults.items():
        parser.add_argument(f"--{kind}", type=int, help=f"how many; {count} if no kind is named, else 0")
    parser.add_argument(
        "--crowd",
        type=int,
        help=f"sessions, while all replicas are restarted once; {CROWD} if no kind is named, else 0",
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    named = {kind: getattr(arguments, kind) for kind in defaults if getattr(arguments, kind) is not None}
    if not named and arguments.crowd is None:
        return soak(defaults, CROWD, arguments.seed)
    return soak(dict.fromkeys(defaults, 0) | named, arguments.crowd or 0, arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
