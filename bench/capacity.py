"""What sessions and steps cost a replica and Valkey: what docs/operate/scale-out.md is computed from.

    python bench/capacity.py                    about five minutes; writes docs/operate/scaling/measured.json
    python bench/capacity.py --seconds 1 --sessions 2000

Costs are processor time, memory and bytes, which other work on the machine changes little; no rate is measured here. A
real server and a real Valkey (append-only log, `appendfsync always`), one model after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import json
import platform
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in (".", "tests"))

import numpy as np
import psutil

from bench import harness
from bench.harness import MODELS, ROOT
from bench.many import OPEN_BATCH_SIZE, ManySessions
from stepwell.testing import LocalServer
from support.servers.valkey_servers import Valkey

TO = ROOT / "docs" / "operate" / "scaling" / "measured.json"
FRAME = 256
TASKS = 4


class Meter:
    """What the replica and Valkey have used so far."""

    def __init__(self, server: LocalServer, valkey: Valkey) -> None:
        assert server.pid is not None
        self._replica, self._store = psutil.Process(server.pid), psutil.Process(valkey.pid)
        self._valkey = valkey

    def read(self) -> dict[str, float]:
        """Seconds and bytes."""
        info = self._valkey.info("everything")
        return {
            "replica_s": _cpu_s(self._replica),
            "store_s": _cpu_s(self._store),
            "wire": float(info["total_net_input_bytes"]) + float(info["total_net_output_bytes"]),
            "log": float(info["aof_current_size"]),
            "memory": float(info["used_memory"]),
            "rss": float(self._replica.memory_info().rss),
        }

    async def of(self, work: Callable[[], Awaitable[int]]) -> dict[str, float]:
        """The same for each step of some work, which says how many it made."""
        before = self.read()
        count = await work()
        after = self.read()
        return {name: (after[name] - before[name]) / count for name in before}


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def singles(many: ManySessions, seconds: float) -> int:
    """Steps by themselves, of a few sessions each by calls of its own."""
    until, count = time.perf_counter() + seconds, 0

    async def one(place: int) -> None:
        nonlocal count
        while time.perf_counter() < until:
            await many.step(place)
            count += 1

    await asyncio.gather(*(one(place) for place in range(2 * TASKS)))
    return count


async def framed(many: ManySessions, among: int, seconds: float) -> int:
    """Steps in frames of random sessions among the first ones."""
    until = time.perf_counter() + seconds
    rngs = [np.random.default_rng(task) for task in range(TASKS)]
    return sum(await asyncio.gather(*(many.frames(rng, FRAME, among, until) for rng in rngs)))


async def measure(name: str, valkey: Valkey, sessions: int, seconds: float) -> dict[str, float]:
    """The costs of one model."""
    rows = max(4 * FRAME, sessions // 8)
    arguments = ["--store", valkey.url(f"?prefix={name}:"), "--resident-rows", str(rows)]
    with harness.serve(name, extra_args=arguments) as server:
        meter = Meter(server, valkey)
        async with ManySessions(server.address, name, at_most=sessions) as many:
            await many.open(rows)
            await framed(many, rows, seconds / 4)  # what is made once is made
            resident = meter.read()["rss"]
            single = await meter.of(lambda: singles(many, seconds))
            frames = await meter.of(lambda: framed(many, rows, seconds))
            record = float(valkey.ask("STRLEN", _key_of(valkey, name, many.ids[0])))
            before = meter.read()["memory"]
            while len(many.ids) < sessions:
                await many.open(min(OPEN_BATCH_SIZE, sessions - len(many.ids)))
            memory = (meter.read()["memory"] - before) / (sessions - rows)
            cold = await meter.of(lambda: framed(many, sessions, seconds))
    share = 1 - rows / sessions  # of the steps that read their session first
    with harness.serve(name, extra_args=[*arguments[:2], "--resident-rows", "1024"]) as server:
        assert server.pid is not None
        base = float(psutil.Process(server.pid).memory_info().rss)
    return {
        "units": MODELS[name][0],
        "record_bytes": record,
        "replica_single": single["replica_s"],
        "replica_framed": frames["replica_s"],
        "replica_load": max(0.0, cold["replica_s"] - frames["replica_s"]) / share,
        "store_single": single["store_s"],
        "store_framed": frames["store_s"],
        "store_load": max(0.0, cold["store_s"] - frames["store_s"]) / share,
        "store_memory": memory,
        "replica_row": max(1.0, resident - base) / rows,
        "wire_single": single["wire"],
        "wire_framed": frames["wire"],
        "log": frames["log"],
        "base": base,
    }


def _key_of(valkey: Valkey, prefix: str, session_id: str) -> str:
    (key,) = valkey.ask("KEYS", f"{prefix}:*:{session_id}")
    return str(key, "utf-8") if isinstance(key, bytes) else str(key)


async def run(sessions: int, seconds: float) -> dict[str, Any]:
    """All models, one after the other."""
    harness.save_models()
    found = []
    with Valkey() as valkey:
        valkey.ask("CONFIG", "SET", "auto-aof-rewrite-percentage", "0")  # its size is read
        version = valkey.info("server")["valkey_version"]
        for name in MODELS:
            found.append(await measure(name, valkey, sessions, seconds))
            print(name, json.dumps(found[-1]), flush=True)
            valkey.ask("FLUSHALL")
    bases = [each.pop("base") for each in found]
    return {
        "machine": {
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "cores": psutil.cpu_count(),
            "cpu": harness.processor(),
            "valkey": version,
            "python": platform.python_version(),
        },
        "sessions": sessions,
        "frame": FRAME,
        "replica_base_bytes": float(np.median(bases)),
        "models": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", type=int, default=40_000)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each load")
    options = parser.parse_args()
    found = asyncio.run(run(options.sessions, options.seconds))
    TO.parent.mkdir(exist_ok=True)
    TO.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
