"""The curves: steps/s and latency against live sessions, against rows per frame, against LSTM width.

Uses `stepwell bench`, the load generator for users, so that each point can be had by hand. Each curve is
gone through several times; the results are medians, in out/bench/sweep.json. About six minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import harness
from bench.harness import HERE, OUT, WIDTHS, Generator

LIVE_SESSIONS = (1, 10, 100, 1_000, 10_000, 100_000)
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
AT_ONCE = 256
"""Sessions stepped at once in modes that step them one by one; the others take turns."""
WIDTH_SESSIONS = 256

Point = dict[str, Any]


class Sweep:
    """Runs `stepwell bench` against a server."""

    def __init__(self, address: str, run_s: float) -> None:
        self._address, self._run_s = address, run_s

    def bench(self, model: str, mode: str, sessions: int, *options: str) -> Point:
        """One point."""
        arguments = ["-m", "stepwell", "bench", model, "--server", self._address, "--mode", mode]
        arguments += ["--sessions", str(sessions), "--duration-s", str(self._run_s), "--warm-up-s", "0.7"]
        output = harness.run_python(*arguments, "--timeout-s", "60", "--processes", "1", "--json", *options)
        result = json.loads(output)
        if result["errors"]:
            raise RuntimeError(f"{result['errors']}: {result['first_error']}")
        keep = {key: result[key] for key in ("steps_per_s", "server_cpu_ms_per_1000_steps")}
        return keep | {"p50_ms": result["latency_ms"]["p50"], "p99_ms": result["latency_ms"]["p99"]}

    def in_process(self, program: Path, rows: int) -> Point:
        """The program by itself on two threads."""
        arguments = (str(HERE / "in_process.py"), str(program), str(rows), "2", str(self._run_s))
        return {"steps_per_s": json.loads(harness.run_python(*arguments))["rate"]}


def sessions_curves(sweep: Sweep) -> dict[str, list[Point]]:
    """Against live sessions: each steps by itself, coalesced by the SDK, or in groups."""
    curves: dict[str, list[Point]] = {"stream": [], "frames": [], "group": []}
    for count in LIVE_SESSIONS:
        at_once = ("--concurrency", str(min(count, AT_ONCE)))
        curves["stream"].append({"x": count} | sweep.bench("small", "stream", count, *at_once))
        curves["frames"].append({"x": count} | sweep.bench("small", "frames", count))
        curves["group"].append({"x": count} | sweep.bench("small", "group", count))
    return curves


def rows_curves(sweep: Sweep) -> dict[str, list[Point]]:
    """Against rows per frame, with one frame in flight or two."""
    curves: dict[str, list[Point]] = {}
    for in_flight in (1, 2):
        points = curves[f"{in_flight} in flight"] = []
        for rows in ROWS:
            options = ("--group-size", str(rows), "--concurrency", str(in_flight))
            points.append({"x": rows} | sweep.bench("small", "group", rows * in_flight, *options))
    return curves


def width_curves(sweep: Sweep, programs: Sequence[Path]) -> dict[str, list[Point]]:
    """Against the width of the LSTM, and what the program does by itself."""
    curves: dict[str, list[Point]] = {"stream": [], "group": [], "in process": []}
    half = ("--group-size", str(WIDTH_SESSIONS // 2), "--concurrency", "2")
    for units, program in zip(WIDTHS, programs, strict=True):
        model = f"width{units}"
        curves["stream"].append({"x": units} | sweep.bench(model, "stream", WIDTH_SESSIONS))
        curves["group"].append({"x": units} | sweep.bench(model, "group", WIDTH_SESSIONS, *half))
        curves["in process"].append({"x": units} | sweep.in_process(program, WIDTH_SESSIONS))
    return curves


def medians(turns: Sequence[dict[str, list[Point]]]) -> dict[str, list[Point]]:
    """The medians over several turns, point by point."""
    first = turns[0]
    return {
        name: [
            {key: statistics.median(turn[name][i][key] for turn in turns) for key in point}
            for i, point in enumerate(points)
        ]
        for name, points in first.items()
    }


def main() -> int:
    """Measure the curves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="Times that each curve is gone through.")
    parser.add_argument("--seconds", type=float, default=1.5, help="How long each point is measured.")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    harness.save_models()
    with harness.serve("small", *(f"width{units}" for units in WIDTHS)) as server:
        sweep = Sweep(server.address, options.seconds)
        programs = [harness.program_path(server, f"width{units}") for units in WIDTHS]
        sweeps: dict[str, Callable[[], dict[str, list[Point]]]] = {
            "sessions": lambda: sessions_curves(sweep),
            "rows": lambda: rows_curves(sweep),
            "width": lambda: width_curves(sweep, programs),
        }
        document: dict[str, Any] = {"machine": harness.describe_machine(Generator())}
        for name, run in sweeps.items():
            document[name] = medians([run() for _ in range(options.repeats)])
            print(f"{name}: done", flush=True)
    (OUT / "sweep.json").write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
