"""A store that servers share beside the one on disk, and what Valkey itself takes for as much: `make bench ARGS=valkey`."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import Awaitable, Callable

import uvloop

from bench import disk, harness, loads
from bench.harness import Key, Measure, Point, Result, measured
from bench.loads import Plan, Times
from stepwell_server.store.valkey.connection.requests import Request
from stepwell_server.store.valkey.keys import META
from stepwell_server.store.valkey.store import ValkeyStore
from support.servers.valkey_servers import Valkey
from support.stores.disk_store import template
from support.stores.valkey_store import fresh_prefix, opened, put

MANY = 256
RECORD_BYTES = 600
"""As large as a record of the small model."""
_WARM_UP = 50
PACE_S = 200e-6
"""About as long as nobody asks Valkey between two steps of one session. Who sleeps for that long is woken up later than who
is asked again at once: a round trip takes up to three times as long."""


def valkey(plan: Plan) -> list[Point]:
    """One session and a group of 256 on disk (`async`), and on Valkey without a wait for its disk.

    Beside them the same commits, and a round trip, without a server around: `over` says how many of these the one takes
    longer than the other.
    """
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Valkey(append="everysec"))
        options = ("--durability", "async")
        folder = stack.enter_context(disk.data_folder())
        local = stack.enter_context(harness.serve("small", extra_args=options, data_dir=folder))
        shared = stack.enter_context(
            harness.serve("small", extra_args=(*options, "--store", server.url(f"?prefix={fresh_prefix()}")))
        )
        servers = {"disk": local, "valkey": shared}
        measures: dict[Key, Measure] = {}
        for name, one in servers.items():
            measures[name, "unary", 1] = lambda one=one: loads.singly(one, "small", "unary", 1, plan.times)  # type: ignore[misc]
            measures[name, "group", MANY] = lambda one=one: loads.sdk(  # type: ignore[misc]
                one, "group", plan.times, model="small", sessions=MANY
            )
        for count in (1, MANY):
            measures["commit", "script", count] = _commits(server, count, plan.times)
        measures["round trip", "PING", 0] = _round_trips(server, plan.times)
        measures["paced round trip", "PING", 0] = _round_trips(server, plan.times, PACE_S)
        points = measured(
            ("store", "kind", "sessions"), measures, plan.repeats, lambda key: ("disk", *key[1:])
        )
    p50 = {(point["store"], point["sessions"]): point["p50_ms"] for point in points if "p50_ms" in point}
    script = p50["commit", MANY]
    return [
        *points,
        *(
            {
                "over": f"{kind}s",
                "sessions": 1,
                "count": (p50["valkey", 1] - p50["disk", 1]) / p50[kind, 0],
                "most": 2,
            }
            for kind in ("round trip", "paced round trip")
        ),
        {
            "over": "commits of 256",
            "sessions": MANY,
            "count": (p50["valkey", MANY] - p50["disk", MANY]) / script,
            "most": 2,
        },
    ]


def _commits(server: Valkey, count: int, times: Times) -> Measure:
    """Commits of records that follow the last ones."""

    async def again(store: ValkeyStore) -> Callable[[], Awaitable[None]]:
        ids = [f"s{i}" for i in range(count)]
        records = template(ids, 0, RECORD_BYTES)
        _, stamp = await put(store, records, [0] * count)

        async def once() -> None:
            nonlocal stamp
            _, stamp = await put(store, records, [stamp] * count)

        return once

    return lambda: _timed(server, again, times)


def _round_trips(server: Valkey, times: Times, pause_s: float = 0.0) -> Measure:
    async def again(store: ValkeyStore) -> Callable[[], Awaitable[None]]:
        async def once() -> None:
            await store._requests.ask(Request(META, (b"PING",)))

        return once

    return lambda: _timed(server, again, times, pause_s)


def _timed(
    server: Valkey,
    make: Callable[[ValkeyStore], Awaitable[Callable[[], Awaitable[None]]]],
    times: Times,
    pause_s: float = 0.0,
) -> Result:
    """How long something takes, again and again, `pause_s` after it was done last."""

    async def run() -> Result:
        store = await opened(server.url(f"?prefix={fresh_prefix()}"))
        try:
            once = await make(store)
            for _ in range(_WARM_UP):
                await once()
            took: list[float] = []
            end = time.perf_counter() + times.run_s
            while time.perf_counter() < end:
                if pause_s:
                    time.sleep(pause_s)  # noqa: ASYNC251 - there is nothing else on this event loop
                began = time.perf_counter()
                await once()
                took.append(time.perf_counter() - began)
            return {"p50_ms": 1000 * statistics.median(took), "rate": len(took) / sum(took)}
        finally:
            await store.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())
