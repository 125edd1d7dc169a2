"""The cases of `make bench`: what users ask, each as points for the tables and plots of docs/explanation/performance.md."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import stepwell
from bench import disk, harness, loads
from bench.floods import floods, floods_on_disk, new_token
from bench.harness import MODELS, OUT, Key, Measure, Point, Result, measured
from bench.loads import Plan, Times
from bench.shared_store import valkey
from bench.speech import speech
from bench.threads import threads
from stepwell.testing import LocalServer
from stepwell_server.compile.host.compiler import WarmCompiler
from support.certificates import Authority

SESSIONS = (1, 32, 256, 1024)
GROUPS = (32, 256, 1024, 4096)
WIDTH_SESSIONS = (1, 32, 256)
MANY = 256
GATHERED = 1000
PROFILE_S = 3.0
LONG_STEPS = 10_000
BESIDE_LONG = 8
"""Streams that are watched while another client runs long requests."""
_ASYNC, _SYNC = ("--durability", "async"), ("--durability", "sync")
STORES: Mapping[str, tuple[Sequence[str], float | None]] = {
    "memory": ((), None),
    "async": (_ASYNC, None),
    "sync": (_SYNC, None),
    "sync, 0 ms": (_SYNC, 0.0),
    "sync, 0.3 ms": (_SYNC, 0.3e-3),
}
"""Options of each server, and the pause of its log in place of each flush."""
HELD = 50_000
"""Sessions that are opened to see what one takes."""
OPEN_BATCH_SIZE = 10_000
MODELS_LOADED = (1, 10, 50)


Case = Callable[[Plan], list[Point]]


@contextlib.contextmanager
def on_each_front(*models: str) -> Iterator[dict[str, LocalServer]]:
    """A server on each front that is installed."""
    with contextlib.ExitStack() as stack:
        yield {front: stack.enter_context(harness.serve(*models, front=front)) for front in harness.fronts()}


def single(server: LocalServer, model: str, kind: str, sessions: int, times: Times, **more: Any) -> Measure:
    return lambda: loads.singly(server, model, kind, sessions, times, **more)


def group(server: LocalServer, model: str, sessions: int, times: Times) -> Measure:
    return lambda: loads.sdk(server, "group", times, model=model, sessions=sessions)


def sessions(plan: Plan) -> list[Point]:
    """Single steps: how many sessions, as calls or on streams, on both fronts."""
    with on_each_front("small") as servers:
        measures: dict[Key, Measure] = {
            (front, kind, count): single(server, "small", kind, count, plan.times)
            for count in SESSIONS
            for kind in ("unary", "stream")
            for front, server in servers.items()
        }
        return measured(("front", "kind", "sessions"), measures, plan.repeats)


def groups(plan: Plan) -> list[Point]:
    """`SessionGroup.step`, on both fronts."""
    with on_each_front("small") as servers:
        measures: dict[Key, Measure] = {
            (front, "group", count): group(server, "small", count, plan.times)
            for count in GROUPS
            for front, server in servers.items()
        }
        return measured(("front", "kind", "sessions"), measures, plan.repeats)


def sdk(plan: Plan) -> list[Point]:
    """One session in a loop, 1,000 in a gather, and where that client's time goes; ratios are to a bare stub."""
    stubs = {"sync": "stub", "async": "aio_stub"}
    with on_each_front("small") as servers:

        def client(server: LocalServer, how: str) -> Measure:
            more: dict[str, Any] = {"sessions": GATHERED} if how == "gather" else {}
            return lambda: loads.sdk(server, how, plan.times, **more)

        measures: dict[Key, Measure] = {
            (front, how): client(server, how)
            for how in ("stub", "sync", "aio_stub", "async", "gather")
            for front, server in servers.items()
        }
        points = measured(
            ("front", "how"), measures, plan.repeats, lambda key: (key[0], stubs.get(key[1], key[1]))
        )
        front, server = next(iter(servers.items()))
        times = Times(min(PROFILE_S, 2 * plan.times.run_s))
        found = loads.sdk(server, "gather", times, sessions=GATHERED, profile=True)
        return [*points, {"front": front, "how": "profile", **found}]


def width(plan: Plan) -> list[Point]:
    """Wider models: single steps, groups, and the program in process."""
    with harness.serve(*MODELS) as server:
        measures: dict[Key, Measure] = {}
        for model in MODELS:
            for kind in ("unary", "stream"):
                for count in WIDTH_SESSIONS:
                    measures[model, kind, count] = single(server, model, kind, count, plan.times)
            measures[model, "group", MANY] = group(server, model, MANY, plan.times)
            measures[model, "in process", MANY] = lambda model=model: loads.in_process(  # type: ignore[misc]
                server, model, MANY, 2, plan.times
            )
        return measured(("model", "kind", "sessions"), measures, plan.repeats)


def durability(plan: Plan) -> list[Point]:
    """The same load on servers with each store; ratios are to the one in memory."""
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, (options, pause_s) in STORES.items():
            folder = None if name == "memory" else stack.enter_context(disk.data_folder())
            servers[name] = stack.enter_context(
                harness.serve("small", extra_args=options, data_dir=folder, pause_s=pause_s)
            )
        measures: dict[Key, Measure] = {}
        for kind, count in (("unary", 1), ("stream", 1), ("unary", MANY), ("stream", MANY), ("group", MANY)):
            for name, server in servers.items():
                measures[name, kind, count] = (
                    group(server, "small", count, plan.times)
                    if kind == "group"
                    else single(server, "small", kind, count, plan.times)
                )
        probe = stack.enter_context(disk.data_folder())
        flushes = [disk.flush_ms(probe)]
        points = measured(
            ("store", "kind", "sessions"), measures, plan.repeats, lambda key: ("memory", *key[1:])
        )
        flushes.append(disk.flush_ms(probe))
        disk_point = {"store": "disk", "kind": disk.file_system(OUT), "p50_ms": statistics.mean(flushes)}
        return [*points, disk_point]


def triton(plan: Plan) -> list[Point]:
    """Triton's requests beside `Step` and `StepStream`, on the fastest front; ratios are to Stepwell's own."""
    with harness.serve("small") as server:
        measures: dict[Key, Measure] = {}
        for kind in ("unary", "stream"):
            measures["Stepwell", kind] = single(server, "small", kind, MANY, plan.times)
            measures["Triton", kind] = lambda kind=kind: loads.triton(server, "small", kind, MANY, plan.times)  # type: ignore[misc]
        return measured(("protocol", "kind"), measures, plan.repeats, lambda key: ("Stepwell", key[1]))


def long(plan: Plan) -> list[Point]:
    """A few streams, alone and while another client's requests of 10,000 time steps run."""
    with harness.serve("small") as server:
        alone = single(server, "small", "stream", BESIDE_LONG, plan.times)

        def beside() -> Result:
            with loads.long_requests(server, "small", LONG_STEPS):
                return alone()

        measures: dict[Key, Measure] = {("alone",): alone, ("beside",): beside}
        return measured(("when",), measures, plan.repeats, lambda _: ("alone",))


def tls(plan: Plan) -> list[Point]:
    """The same steps in plain text, over TLS, and over TLS by a caller with a token."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        authority = Authority(Path(folder))
        pair = authority.issue()
        options = ("--tls-cert", str(pair.cert), "--tls-key", str(pair.key))
        plain = stack.enter_context(harness.serve("small"))
        secured = stack.enter_context(harness.serve("small", extra_args=options))
        tokens = Path(folder) / "callers.tokens"
        token = new_token(tokens, "bench")
        asking = stack.enter_context(
            harness.serve("small", extra_args=(*options, "--auth-tokens", str(tokens)))
        )
        measures: dict[Key, Measure] = {}
        for kind, count in (("unary", 1), ("stream", 1), ("unary", MANY), ("stream", MANY)):
            measures["plain", kind, count] = single(plain, "small", kind, count, plan.times)
            measures["TLS", kind, count] = single(
                secured, "small", kind, count, plan.times, ca=authority.cert
            )
            measures["TLS, token", kind, count] = single(
                asking, "small", kind, count, plan.times, ca=authority.cert, token=token
            )
        return measured(
            ("transport", "kind", "sessions"), measures, plan.repeats, lambda key: ("plain", *key[1:])
        )


def memory(plan: Plan) -> list[Point]:
    """Memory of a server with one small model, and what a session adds to it beyond its state."""

    def taken(front: str) -> Result:
        with harness.serve("small", front=front) as server, stepwell.connect(server.address) as client:
            assert server.pid is not None
            features = MODELS["small"][1]
            with client.open_sessions("small", 1024) as warm:
                warm.step(np.zeros((1024, features), np.float32))
            before = harness.resident_bytes(server.pid)
            state = client.model("small").state_row_bytes
            groups = [client.open_sessions("small", OPEN_BATCH_SIZE) for _ in range(HELD // OPEN_BATCH_SIZE)]
            # Rows of sessions that were only opened may not have been written yet: that each has its row counts.
            for one in groups:
                one.step(np.zeros((OPEN_BATCH_SIZE, features), np.float32), timeout_s=60)
            after = harness.resident_bytes(server.pid)
        return {"resident_mib": before / 2**20, "session_bytes": (after - before) / HELD - state}

    measures: dict[Key, Measure] = {(front,): lambda front=front: taken(front) for front in harness.fronts()}  # type: ignore[misc]
    return measured(("front",), measures, plan.repeats)


def models(plan: Plan) -> list[Point]:
    """A server of many models of which one is stepped: what the others cost; ratios are to a server of that one."""
    path = harness.model_path("small")
    facts: dict[int, Result] = {}
    with contextlib.ExitStack() as stack:
        measures: dict[Key, Measure] = {}
        for count in MODELS_LOADED:
            paths = {"small": path} | {f"small-{number}": path for number in range(1, count)}
            began = time.perf_counter()
            server = stack.enter_context(harness.serve(models=paths))
            ready_s = time.perf_counter() - began
            assert server.pid is not None
            facts[count] = {"ready_s": ready_s, **harness.taken_by(server.pid)}
            for kind in ("unary", "stream"):
                measures[count, kind] = single(server, "small", kind, 32, plan.times)
        points = measured(("models", "kind"), measures, plan.repeats, lambda key: (1, key[1]))
    return [{**point, **facts[point["models"]]} for point in points]


def start(plan: Plan) -> list[Point]:
    """From exec to ready, with the program in the cache."""

    def ready(front: str) -> Result:
        arguments = ["-m", "stepwell_server", f"small={harness.model_path('small')}", "--front", front]
        arguments += ["--listen", "127.0.0.1:0", "--store", "memory", "--cache-dir", str(OUT / "cache")]
        began = time.perf_counter()
        with harness.started(*arguments) as (_, line):
            taken = time.perf_counter() - began
        if "listening" not in line:
            raise RuntimeError(f"the server did not start: {line}")
        return {"ready_s": taken}

    measures: dict[Key, Measure] = {(front,): lambda front=front: ready(front) for front in harness.fronts()}  # type: ignore[misc]
    return measured(("front",), measures, plan.repeats)


def reload(plan: Plan) -> list[Point]:
    """From the file of a model to its program, beside a server: the first one, another one, the same with other weights."""
    names = list(MODELS)[:2]
    numbers = itertools.count()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)

        def compiled(compiler: WarmCompiler, model: str) -> float:
            # Bytes behind an archive change nothing of it, but that no cache has it.
            file = folder / f"{model}.keras"
            file.write_bytes(harness.model_path(model).read_bytes() + str(next(numbers)).encode())
            began = time.perf_counter()
            compiler.compile(file)
            return time.perf_counter() - began

        def first() -> Result:
            with WarmCompiler(folder / "cache") as compiler:
                return {"compiled_s": compiled(compiler, names[0])}

        with WarmCompiler(folder / "cache") as warm:

            def other() -> Result:
                compiled(warm, names[1])
                return {"compiled_s": compiled(warm, names[0])}

            def same() -> Result:
                compiled(warm, names[0])
                return {"compiled_s": compiled(warm, names[0])}

            measures: dict[Key, Measure] = {
                ("the first one",): first,
                ("another architecture",): other,
                ("other weights",): same,
            }
            return measured(("what",), measures, plan.repeats, lambda _key: ("the first one",))


CASES: Mapping[str, Case] = {
    case.__name__: case
    for case in (
        sessions,
        threads,
        groups,
        sdk,
        width,
        durability,
        valkey,
        triton,
        long,
        floods,
        floods_on_disk,
        tls,
        memory,
        models,
        start,
        reload,
        speech,
    )
}
