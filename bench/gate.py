"""Compare the speed of this tree with the wheels of a commit, or with the bare wire, in alternating pairs.

    python bench/gate.py --against v0.1.0            the wheels of a tag or a commit
    python bench/gate.py --against bare              the bare wire of bench/front_prototype
    python bench/gate.py --against main --loads "stream 32" "group 1024" --pairs 40

Each pair starts both servers anew, in memory and on disk with `sync`, and loads them in turns; the next pair begins with
the other one. Shown are medians of the ratios of pairs, this tree divided by the other, with a 95 % bootstrap interval.
The exit code is 1 if an interval lies wholly beyond its bound: 5 % worse than a commit, or worse than a goal for the bare
wire. It is 2 if there is nothing to compare with. Results go to out/bench/gate.json, or gate-bare.json.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in (".", "tests"))

from against import builds
from against.builds import Build, BuildError
from against.pair import BuiltServer
from bench import bare, disk, harness, loads
from bench.harness import MODELS, OUT, Result
from bench.loads import Times
from bench.pairs import Bound, Interval, Verdict, interval_of
from stepwell.testing import LocalServer

BARE = "bare"
MODEL = "small"
STORES: Mapping[str, Sequence[str]] = {"memory": (), "sync": ("--durability", "sync")}
MAX_LOSS = 0.05
"""How much worse than a commit the tree may be."""
MIN_PAIRS = 20
HIGHER_IS_BETTER = {"rate": True, "p50_ms": False, "start_s": False, "resident_mib": False}
BARE_BOUNDS: Mapping[tuple[str, int], tuple[str, float]] = {
    ("unary", 1): ("p50_ms", 1.05),
    ("stream", 1): ("p50_ms", 1.05),
    ("unary", 32): ("rate", 0.95),
    ("stream", 32): ("rate", 0.9),
    ("unary", 256): ("rate", 0.86),
    ("stream", 256): ("rate", 0.91),
}
"""Goals for ratios to the bare wire."""


@dataclass(frozen=True)
class Load:
    """Sessions of a server with this store, each with one step on its way."""

    store: str
    kind: str
    sessions: int
    model: str = MODEL

    def __str__(self) -> str:
        name = f"{self.kind} {self.sessions}"
        return name if self.model == MODEL else f"{self.model} {name}"


LOADS = [
    *(
        Load(store, kind, sessions)
        for store in STORES
        for kind, counts in {"unary": (1, 32, 256), "stream": (1, 32, 256), "group": (1024,)}.items()
        for sessions in counts
    ),
    *(
        Load("memory", kind, sessions, model)
        for model in ("medium", "large")
        for kind in ("unary", "stream")
        for sessions in (32, 256)
    ),
]

SERVER = "server"
Row: TypeAlias = tuple[str, str, str]
"""Store, load (or SERVER, of the process itself) and the name of the number."""
Numbers: TypeAlias = dict[Row, float]
Ratios: TypeAlias = Mapping[Row, Sequence[float]]


class Contender(Protocol):
    """A server to compare."""

    @property
    def name(self) -> str:
        """What it is, for people."""

    def begin(self, store: str, stack: contextlib.ExitStack) -> tuple[int, Callable[[Load, Times], Result]]:
        """Start a server until the stack ends; its process, and what loads it."""


@dataclass(frozen=True)
class BuiltContender:
    """The server and the SDK of a build."""

    build: Build
    models: Mapping[str, Path]
    cache_dir: Path

    @property
    def name(self) -> str:
        """The build's."""
        return self.build.name

    def begin(self, store: str, stack: contextlib.ExitStack) -> tuple[int, Callable[[Load, Times], Result]]:
        """See `Contender`."""
        folder = None if store == "memory" else stack.enter_context(disk.data_folder())
        options = ("--log-level", "warning", *STORES[store])
        server = BuiltServer(self.build, self.models, folder, self.cache_dir, *options)
        stack.enter_context(server)
        assert server.pid is not None
        return server.pid, functools.partial(self._measure, server)

    def _measure(self, server: LocalServer, load: Load, times: Times) -> Result:
        if load.kind != "group":
            return loads.singly(server, load.model, load.kind, load.sessions, times)
        return loads.sdk(
            server, "group", times, python=self.build.python, model=load.model, sessions=load.sessions
        )


@dataclass(frozen=True)
class BareContender:
    """The bare wire; it has no store, groups or rules."""

    program: Path
    name: str = "the bare wire"

    def begin(self, store: str, stack: contextlib.ExitStack) -> tuple[int, Callable[[Load, Times], Result]]:
        """See `Contender`."""
        server = stack.enter_context(bare.serve(self.program))
        return server.pid, lambda load, times: bare.singly(server, MODEL, load.kind, load.sessions, times)


def compare(tree: Contender, other: Contender, chosen: Sequence[Load], pairs: int, times: Times) -> Ratios:
    """The ratios of each pair, the tree divided by the other, by row."""
    ratios: dict[Row, list[float]] = collections.defaultdict(list)
    for number in range(pairs):
        print(f"\rpair {number + 1} of {pairs}", end="", file=sys.stderr, flush=True)
        order = (tree, other) if number % 2 == 0 else (other, tree)
        found = _pair(order, chosen, times)
        for row, value in found[tree.name].items():
            ratios[row].append(value / found[other.name][row])
    print(file=sys.stderr)
    return ratios


def _pair(order: Sequence[Contender], chosen: Sequence[Load], times: Times) -> Mapping[str, Numbers]:
    found: dict[str, Numbers] = {one.name: {} for one in order}
    stores = dict.fromkeys(load.store for load in chosen)
    with contextlib.ExitStack() as stack:
        begun = {}
        for store, one in itertools.product(stores, order):
            before = time.perf_counter()
            begun[store, one.name] = one.begin(store, stack)
            found[one.name][store, SERVER, "start_s"] = time.perf_counter() - before
        for load, one in itertools.product(chosen, order):
            _, measure = begun[load.store, one.name]
            result = measure(load, times)
            for name in ("rate", "p50_ms"):
                found[one.name][load.store, str(load), name] = result[name]
        for (store, name), (pid, _) in begun.items():
            found[name][store, SERVER, "resident_mib"] = harness.resident_bytes(pid) / 2**20
    return found


def bounds(against: str) -> Callable[[Row], Bound | None]:
    """The bound of each row; a row without one is shown only."""
    goals = {f"{kind} {count}": goal for (kind, count), goal in BARE_BOUNDS.items()}

    def bound(row: Row) -> Bound | None:
        _, load, name = row
        is_rate = HIGHER_IS_BETTER[name]
        if against != BARE:
            return Bound(1 - MAX_LOSS if is_rate else 1 + MAX_LOSS, is_rate)
        goal_name, limit = goals.get(load, ("", 0.0))
        return Bound(limit, is_rate) if name == goal_name else None

    return bound


@dataclass(frozen=True)
class Judged:
    """A row of the report."""

    row: Row
    interval: Interval
    limit: float | None
    verdict: str


def judge(ratios: Ratios, bound_of: Callable[[Row], Bound | None]) -> list[Judged]:
    """Every row with its interval and what its bound says of it."""
    judged = []
    for row, values in ratios.items():
        interval, bound = interval_of(values), bound_of(row)
        verdict = "" if bound is None else bound.judge(interval).value
        judged.append(Judged(row, interval, None if bound is None else bound.limit, verdict))
    return judged


def report(judged: Sequence[Judged]) -> int:
    """Print the rows; the exit code."""
    print(f"{'store':8}{'load':18}{'':14}{'median':>8}{'95 % interval':>18}{'bound':>8}")
    for one in judged:
        store, load, name = one.row
        found, limit = one.interval, "" if one.limit is None else f"{one.limit:.2f}"
        interval = f"{found.low:.3f} to {found.high:.3f}"
        line = f"{store:8}{load:18}{name:14}{found.median:8.3f}{interval:>18}{limit:>8}  {one.verdict}"
        print(line.rstrip())
    beyond = sum(one.verdict == Verdict.BEYOND.value for one in judged)
    print(f"{beyond} of {len(judged)} rows lie wholly beyond their bounds")
    return 1 if beyond else 0


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(dict.fromkeys(map(str, LOADS)))
    parser.add_argument("--against", required=True, metavar="COMMIT", help=f"a commit, a tag, or {BARE}")
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each load (default: %(default)s)")
    parser.add_argument(
        "--loads", nargs="+", choices=names, default=names, metavar="LOAD", help="default: all"
    )
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES), help="default: all")
    options = parser.parse_args(arguments)
    if options.pairs < 1 or not 0 < options.seconds <= 60:
        parser.error("--pairs must be 1 or more, --seconds above 0 and at most 60")
    OUT.mkdir(parents=True, exist_ok=True)
    harness.save_models()
    chosen = [load for load in LOADS if str(load) in options.loads and load.store in options.stores]
    try:
        tree, other = _contenders(options.against)
    except (BuildError, bare.CannotBuild) as error:
        print(error, file=sys.stderr)
        return 2
    if options.against == BARE:
        chosen = [
            load for load in chosen if load.store == "memory" and load.kind != "group" and load.model == MODEL
        ]
    print(f"{tree.name} against {other.name}, {options.pairs} pairs of {options.seconds:g} s", flush=True)
    ratios = compare(tree, other, chosen, options.pairs, Times(options.seconds, options.seconds / 2))
    if options.against == BARE:
        ratios = {row: values for row, values in ratios.items() if row[1] != SERVER}
    judged = judge(ratios, bounds(options.against))
    document: dict[str, Any] = {
        "machine": harness.describe_machine(),
        "against": other.name,
        "pairs": options.pairs,
        "run_s": options.seconds,
        "rows": [asdict(one) for one in judged],
    }
    out = OUT / ("gate-bare.json" if options.against == BARE else "gate.json")
    out.write_text(json.dumps(document, indent=1))
    return report(judged)


def _contenders(against: str) -> tuple[Contender, Contender]:
    """The tree and the other, both with their programs compiled."""
    models = {name: harness.model_path(name) for name in MODELS}
    tree = BuiltContender(builds.of_tree(), models, OUT / "cache")
    with harness.serve(*MODELS) as server:
        program = harness.program_path(server, MODEL)
    if against == BARE:
        bare.library()
        return tree, BareContender(program)
    build = builds.of_commit(against, functools.partial(print, file=sys.stderr, flush=True))
    assert build.cache_dir is not None
    other = BuiltContender(build, models, build.cache_dir)
    with contextlib.ExitStack() as stack:
        other.begin("memory", stack)
    return tree, other


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
