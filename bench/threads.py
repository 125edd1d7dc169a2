"""Where a step's time goes: processor time of a server's threads, with the bare server for comparison."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import stepwell
from bench import bare, disk, harness, loads
from bench.harness import MODELS, Key, Measure, Point, Result
from bench.loads import Plan, Times
from stepwell.testing import LocalServer
from support.telemetry.scrape import Scrape

MODEL = "small"
SESSIONS = (1, 32, 256)
KINDS = ("unary", "stream")
DURABILITY = {"memory": (), "sync": ("--durability", "sync")}

_ROLES = {
    "stepwell-front": "wire",
    "bare-front": "wire",
    "compute": "compute",
    "store": "store",
    "store-log": "store",
    "stepwell-log": "store",
}
"""By the name that the kernel has, without a number; the main thread is the event loop."""
ROLES = ("wire", "loop", "compute", "store", "other")


def thread_times_s(pid: int) -> Mapping[str, float]:
    """Processor time of the threads of a process so far, in seconds, by role.

    The wire of a lone connection runs on the event loop's thread, and counts there.
    """
    times = dict.fromkeys(ROLES, 0.0)
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            name = (task / "comm").read_text().strip()
            role = "loop" if task.name == str(pid) else _ROLES.get(name.partition("_")[0], "other")
            times[role] += int((task / "schedstat").read_text().split()[0]) / 1e9
    return times


StepsAndPasses: TypeAlias = tuple[int, int]
"""Made by a server since its start."""


def threads(plan: Plan) -> list[Point]:
    """The same load on the bare server and on two servers, in memory and on disk; rates are compared with the bare one."""
    with contextlib.ExitStack() as stack:
        servers = {}
        for store, durability in DURABILITY.items():
            folder = None if store == "memory" else stack.enter_context(disk.data_folder())
            options = (*durability, "--metrics-listen", "127.0.0.1:0")
            servers[store] = stack.enter_context(harness.serve(MODEL, extra_args=options, data_dir=folder))
        program = harness.program_path(servers["memory"], MODEL)
        bare_server = stack.enter_context(bare.serve(program))
        measures: dict[Key, Measure] = {}
        for kind in KINDS:
            for count in SESSIONS:
                measures["bare", kind, count] = functools.partial(_bare, bare_server, kind, count, plan.times)
                for store, server in servers.items():
                    measures[store, kind, count] = functools.partial(
                        _stepwell, server, kind, count, plan.times
                    )
        return harness.measured(
            ("server", "kind", "sessions"), measures, plan.repeats, lambda key: ("bare", *key[1:])
        )


def _bare(server: bare.BareServer, kind: str, count: int, times: Times) -> Result:
    load = functools.partial(bare.singly, server, MODEL, kind, count, times)
    return profiled(server.pid, server.steps_and_passes, load)


def _stepwell(server: LocalServer, kind: str, count: int, times: Times) -> Result:
    assert server.pid is not None
    with (
        harness.alive(server),
        stepwell.connect(server.address) as client,
        client.open_sessions(MODEL, count) as group,
    ):
        metrics = client.server_info().metrics_address
        assert metrics

        def made() -> StepsAndPasses:
            scrape = Scrape.of(metrics)
            steps, passes = (scrape.value(f"stepwell_pass_rows_{part}", MODEL) for part in ("sum", "count"))
            return int(steps), int(passes)

        path, requests = loads.step_requests(kind, group.ids, MODELS[MODEL][1])
        return profiled(server.pid, made, lambda: loads.generate(server.address, path, kind, requests, times))


def profiled(pid: int, made: Callable[[], StepsAndPasses], load: Callable[[], Result]) -> Result:
    """The result of a load, with rows per pass and each role's microseconds per step, warm-up included."""
    steps, passes = made()
    before = thread_times_s(pid)
    result = load()
    after = thread_times_s(pid)
    steps_after, passes_after = made()
    steps, passes = steps_after - steps, passes_after - passes
    times = {f"{role}_us": (after[role] - before[role]) / steps * 1e6 for role in ROLES}
    kept = {name: result[name] for name in ("rate", "p50_ms", "p99_ms", "client_us")}
    return kept | times | {"server_us": sum(times.values()), "rows": steps / passes}
