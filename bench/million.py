"""A million sessions on one server: what they cost, and what their number does to a step, a start, a list.

    python bench/million.py                         about eight minutes on two cores, two gigabytes of disk
    python bench/million.py --sessions 50000 --seconds 2

Rows of memory are few (`--resident-rows`), so that nearly every random step finds its session paged out. A hot
set, a quarter of the rows, is stepped between the others and stays. Everything is checked: replies by
their errors, and after the kill that no answered step was lost. Results are printed and written to out/bench/million.json.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in (".", "tests"))

import numpy as np
from google.protobuf import duration_pb2
from rich.console import Console

from bench import disk, harness
from bench.harness import OUT
from bench.many import OPEN_BATCH_SIZE, ManySessions, Places, Watch, quantile_ms
from bench.tables import number
from stepwell.testing import LocalServer

FRAME = 256
TASKS = 4
"""Frames in flight."""
CHECKED = 500
"""Sessions whose revision is compared with the steps that were answered, after the kill."""
PAGES = 20
_SAMPLED = 50
"""One step in so many is preceded by a look at whether its session is resident."""
_WATCHED = 0
"""The session that is stepped while something else goes on."""


@dataclasses.dataclass
class Plan:
    """What is measured."""

    sessions: int
    resident_rows: int
    durability: str
    memory_sessions: int
    seconds: float

    @property
    def on_disk(self) -> str:
        """The sessions on disk, as lines name them."""
        return f"{self.sessions:,} on disk"


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table."""

    case: str
    unit: str
    value: float
    baseline: str = ""
    """What it is compared with; empty for nothing."""
    theirs: float | None = None
    ratio: float | None = None


class Report:
    """Collects lines and says how far it is."""

    def __init__(self, console: Console) -> None:
        self.lines: list[Line] = []
        self._console = console
        self._began = time.perf_counter()

    def add(self, case: str, unit: str, value: float, against: tuple[str, float] | None = None) -> None:
        """A line; `against` is what it is compared with."""
        name, theirs = against or ("", None)
        ratio = value / theirs if theirs else None
        self.lines.append(Line(case, unit, value, name, theirs, ratio))
        compared = f", {name}: {number(theirs)}, ratio {number(ratio)}" if name else ""
        self.say(f"{case}: {number(value)} {unit}{compared}")

    def say(self, text: str) -> None:
        """A line of progress."""
        self._console.print(f"[{time.perf_counter() - self._began:6.1f} s] {text}", highlight=False)


# --- parts ---


async def open_all(many: ManySessions, count: int, report: Report, kind: str) -> None:
    """Open the sessions, while one of them is stepped."""
    await many.open(1)
    calls = []
    began = time.perf_counter()
    async with Watch(many, _WATCHED) as watch:
        while len(many.ids) < count:
            calls.append(await many.open(min(OPEN_BATCH_SIZE, count - len(many.ids))))
            if len(calls) % 20 == 0:
                report.say(f"{len(many.ids):,} sessions are open")
    taken = time.perf_counter() - began
    case = f"{kind}: sessions opened, {OPEN_BATCH_SIZE:,} in a call"
    report.add(case, "sessions/s", count / taken)
    report.add(f"{kind}: such a call, the longest", "s", max(calls))
    report.add(f"{kind}: a step meanwhile, p99", "ms", quantile_ms(watch.latencies, 0.99))


async def step_in_frames(
    many: ManySessions, among: Places | int, seconds: float, tasks: int = TASKS
) -> float:
    """Frames of random sessions from several tasks; returns steps/s."""
    began = time.perf_counter()
    until = began + seconds
    lines = [many.frames(np.random.default_rng(task), FRAME, among, until) for task in range(tasks)]
    steps = sum(await asyncio.gather(*lines))
    return steps / (time.perf_counter() - began)


@dataclasses.dataclass
class Singles:
    """Single steps of sessions that stay and of others, taken in turn."""

    hot: list[float] = dataclasses.field(default_factory=list)
    cold: list[float] = dataclasses.field(default_factory=list)
    resident: dict[str, list[bool]] = dataclasses.field(default_factory=lambda: {"hot": [], "cold": []})

    async def measure(self, many: ManySessions, hot: Places, cold: Places, seconds: float) -> None:
        """Step one of each, again and again. `cold` are named once each: when they end, so does the run."""
        until = time.perf_counter() + seconds
        for turn, place in enumerate(cold.tolist()):
            if time.perf_counter() >= until:
                return
            warm = int(hot[turn % len(hot)])
            if turn % _SAMPLED == 0:
                self.resident["hot"].append((await many.session(warm)).resident)
                self.resident["cold"].append((await many.session(place)).resident)
            self.hot.append(await many.step(warm))
            self.cold.append(await many.step(place))

    def say(self, report: Report, kind: str) -> None:
        """The lines."""
        for share, name in ((0.5, "p50"), (0.99, "p99")):
            hot, cold = quantile_ms(self.hot, share), quantile_ms(self.cold, share)
            report.add(f"{kind}: a step of a session paged out, {name}", "ms", cold, ("resident", hot))
        share_hot, share_cold = (float(np.mean(self.resident[name])) for name in ("hot", "cold"))
        report.say(
            f"{len(self.hot):,} steps of each; resident before the step:"
            f" {share_hot:.1%} of the hot ones, {share_cold:.1%} of the others"
        )


def pick(plan: Plan, sessions: int) -> tuple[Places, Places]:
    """The hot set, and the others in random order."""
    order = np.random.default_rng(1).permutation(np.arange(1, sessions))
    count = min(plan.resident_rows // 4, sessions // 4)
    return order[:count], order[count:]


async def list_pages(many: ManySessions, report: Report, kind: str) -> None:
    """Pages of a thousand, from the first on, and one of all that have a prefix."""
    taken, token = [], ""
    for _ in range(PAGES):
        seconds, page = await many.page(token)
        taken.append(seconds)
        token = page.next_page_token
        if not token:
            break
    report.add(f"{kind}: a page of 1,000 of the list, p50", "ms", quantile_ms(taken, 0.5))
    async with Watch(many, _WATCHED) as watch:
        seconds, page = await many.page(prefix=many.ids[0][:4])
    report.add(f"{kind}: a page by a prefix that all have", "ms", seconds * 1e3)
    report.add(f"{kind}: a step meanwhile, the longest", "ms", quantile_ms(watch.latencies, 1.0))
    idle: dict[str, Any] = {"idle_longer": duration_pb2.Duration(seconds=1), "skip_total": True}
    taken, token = [], ""
    async with Watch(many, _WATCHED) as watch:
        for _ in range(PAGES):
            seconds, page = await many.page(token, **idle)
            taken.append(seconds)
            token = page.next_page_token
    report.add(f"{kind}: a page of idle sessions, p50", "ms", quantile_ms(taken, 0.5))
    report.add(f"{kind}: a step meanwhile, p99", "ms", quantile_ms(watch.latencies, 0.99))


async def list_by_command(server: LocalServer, report: Report, kind: str) -> None:
    """What a person waits for, the start of Python included."""
    for options in ("", "--idle-longer 1s", "--model small"):
        argv = [sys.executable, "-m", "stepwell", "sessions", "list", "--limit", "20", *options.split()]
        began = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            *argv, "--server", server.address, stdout=asyncio.subprocess.PIPE
        )
        shown, _ = await process.communicate()
        seconds = time.perf_counter() - began
        if process.returncode or shown.count(b"\n") != 21:
            raise RuntimeError(f"20 sessions must be listed; got {shown[:200]!r}")
        report.add(f"{kind}: stepwell sessions list --limit 20 {options}".rstrip(), "s", seconds)


async def close_some(many: ManySessions, report: Report, kind: str) -> None:
    """As many sessions as one call opens, closed by the prefix of their IDs."""
    prefix = "closed-by-prefix-"
    await many.open(OPEN_BATCH_SIZE, prefix)
    async with Watch(many, _WATCHED) as watch:
        began = time.perf_counter()
        closed = await many.close_matching(prefix)
        taken = time.perf_counter() - began
    report.add(f"{kind}: closed by a prefix, {closed:,}", "sessions/s", closed / taken)
    report.add(f"{kind}: a step meanwhile, p99", "ms", quantile_ms(watch.latencies, 0.99))


async def load(many: ManySessions, plan: Plan, report: Report, kind: str, hot: Places, cold: Places) -> None:
    """Frames and single steps, of sessions that stay and of any."""
    sessions = len(many.ids)
    await many.step_all(hot, FRAME)
    resident = await step_in_frames(many, hot, plan.seconds)
    report.add(f"{kind}: frames of {FRAME}, resident sessions", "steps/s", resident)
    anyone = await step_in_frames(many, sessions, 2 * plan.seconds)
    case = f"{kind}: frames of {FRAME}, random sessions"
    report.add(case, "steps/s", anyone, ("resident", resident))
    await many.step_all(hot, FRAME)
    quiet = Singles()
    await quiet.measure(many, hot, cold[: len(cold) // 2], 2 * plan.seconds)
    quiet.say(report, f"{kind}, alone")
    beside = Singles()
    frames = asyncio.create_task(step_in_frames(many, hot, plan.seconds, tasks=1))
    await beside.measure(many, hot, cold[len(cold) // 2 :], plan.seconds)
    rate = await frames
    report.say(f"during {rate:,.0f} steps/s in frames of {FRAME} resident sessions, one in flight:")
    beside.say(report, f"{kind}, during frames")


def memory_lines(server: LocalServer, sessions: int, before: int, report: Report, kind: str) -> None:
    """What the server takes now, and what each session added."""
    assert server.pid is not None
    whole, own = memory_of(server.pid)
    report.add(f"{kind}: resident memory", "GiB", whole / 2**30)
    report.add(f"{kind}: of this its own, not pages of the file", "GiB", own / 2**30)
    report.add(f"{kind}: its own by session", "B", (own - before) / sessions)


def memory_of(pid: int) -> tuple[int, int]:
    """Resident memory of a process, and what of it is not pages of files."""
    own = harness.status_bytes(pid, "RssAnon")
    return harness.resident_bytes(pid), own


# --- after a kill ---


async def restart(
    many: ManySessions, server: LocalServer, plan: Plan, report: Report, hot: Places, cold: Places
) -> None:
    """Kill the server, start it again, and see what is there."""
    kind = plan.on_disk
    server.kill()
    began = time.perf_counter()
    server.restart()
    ready = time.perf_counter()
    report.add(f"{kind}, killed: exec to ready", "s", ready - began)
    await many.reconnect()
    await many.step(int(cold[-1]))
    report.add(f"{kind}, killed: exec to the answer of an old session", "s", time.perf_counter() - began)
    rng = np.random.default_rng(2)
    checked = np.unique(np.concatenate([rng.choice(len(many.ids), CHECKED), hot[:CHECKED], cold[:CHECKED]]))
    for place in checked.tolist():
        found = (await many.session(place)).revision
        if found != many.made[place]:
            raise RuntimeError(f"{many.made[place]} steps of a session were answered; it says {found}")
    report.say(f"{len(checked):,} sessions have as many steps as were answered")
    await many.step_all(hot, FRAME)
    unnamed = np.setdiff1d(cold[:-1], checked)
    rng.shuffle(unnamed)
    first = Singles()
    await first.measure(many, hot, unnamed, plan.seconds)
    first.say(report, f"{kind}, not named since the start")
    await name_many(many, server, plan, report, unnamed[len(first.cold) :])


async def name_many(
    many: ManySessions, server: LocalServer, plan: Plan, report: Report, unnamed: Places
) -> None:
    """What the server's own memory grows by for each session that is named the first time since its start."""
    assert server.pid is not None
    await many.step_all(unnamed[: plan.resident_rows], FRAME)  # from here on the rows are all in use
    before = memory_of(server.pid)[1]
    some = unnamed[plan.resident_rows :][: len(many.ids) // 4]
    if not len(some):
        return
    await many.step_all(some, FRAME)
    grown = memory_of(server.pid)[1] - before
    kind = plan.on_disk
    report.add(f"{kind}: memory by session named since the start, {len(some):,}", "B", grown / len(some))


# --- the whole ---


async def durable(plan: Plan, report: Report) -> None:
    """All sessions, on disk."""
    kind = plan.on_disk
    with disk.data_folder() as folder:
        case = f"the disk itself ({disk.file_system(OUT)}): fdatasync of 4 KiB, p50"
        report.add(case, "ms", disk.flush_ms(folder))
        options = ["--resident-rows", str(plan.resident_rows), "--durability", plan.durability]
        with harness.serve("small", extra_args=options, data_dir=folder) as server:
            assert server.pid is not None
            before = memory_of(server.pid)[1]
            async with ManySessions(server.address, at_most=plan.sessions) as many:
                await open_all(many, plan.sessions, report, kind)
                hot, cold = pick(plan, plan.sessions)
                await load(many, plan, report, kind, hot, cold)
                await list_pages(many, report, kind)
                await list_by_command(server, report, kind)
                memory_lines(server, plan.sessions, before, report, kind)
                used = disk.bytes_used(folder)
                report.add(f"{kind}: on the disk", "GiB", used / 2**30)
                report.add(f"{kind}: on the disk by session", "B", used / plan.sessions)
                await restart(many, server, plan, report, hot, cold)
                await list_by_command(server, report, f"{kind}, killed")
                await close_some(many, report, kind)


async def volatile(plan: Plan, report: Report) -> None:
    """Fewer sessions, in memory."""
    kind = f"{plan.memory_sessions:,} in memory"
    with harness.serve("small", extra_args=["--resident-rows", str(plan.resident_rows)]) as server:
        assert server.pid is not None
        before = memory_of(server.pid)[1]
        async with ManySessions(server.address, at_most=plan.memory_sessions) as many:
            await open_all(many, plan.memory_sessions, report, kind)
            hot, cold = pick(plan, plan.memory_sessions)
            await load(many, plan, report, kind, hot, cold)
            await list_pages(many, report, kind)
            await list_by_command(server, report, kind)
            memory_lines(server, plan.memory_sessions, before, report, kind)
            await close_some(many, report, kind)


def main() -> int:
    """Run. Exit code 0 whatever the numbers say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", type=int, default=1_000_000, help="On disk.")
    parser.add_argument("--resident-rows", type=int, default=10_000, help="Sessions that are in memory.")
    parser.add_argument("--durability", choices=("async", "sync"), default="async")
    parser.add_argument("--memory-sessions", type=int, default=100_000, help="In memory; 0: none.")
    parser.add_argument("--seconds", type=float, default=10.0, help="How long each part is measured.")
    parser.add_argument("--out", type=Path, default=OUT / "million.json", help="Where the results go.")
    options = parser.parse_args()
    plan = Plan(
        options.sessions,
        options.resident_rows,
        options.durability,
        options.memory_sessions,
        options.seconds,
    )
    minimum = 4 * FRAME  # A quarter of the sessions is the hot set, and a frame has no session twice.
    for option, count, exempt in (
        ("--sessions", plan.sessions, ""),
        ("--memory-sessions", plan.memory_sessions, "0, or "),
        ("--resident-rows", plan.resident_rows, ""),
    ):
        if count < minimum and (count or not exempt):
            parser.error(f"{option} must be {exempt}{minimum} or more; got {count}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    OUT.mkdir(parents=True, exist_ok=True)
    harness.save_models()
    machine = harness.describe_machine()
    report = Report(console)
    for name, value in machine.items():
        console.print(f"{name}: {value}", highlight=False)
    asyncio.run(durable(plan, report))
    if plan.memory_sessions:
        asyncio.run(volatile(plan, report))
    options.out.write_text(json.dumps(as_document(machine, plan, report.lines), indent=1))
    return 0


def as_document(machine: dict[str, str], plan: Plan, lines: Sequence[Line]) -> dict[str, Any]:
    """What is kept of a run."""
    shown = [dataclasses.asdict(line) for line in lines]
    return {"machine": machine, "plan": dataclasses.asdict(plan), "lines": shown}


if __name__ == "__main__":
    sys.exit(main())
