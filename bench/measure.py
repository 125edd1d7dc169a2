"""Measure what users ask of the server: rates and latencies by sessions, width, durability, protocol, transport.

    python bench/measure.py                    everything, at most fourteen minutes on two cores
    python bench/measure.py sessions tls       some cases; the results of the others stay
    python bench/measure.py --repeats 5

Each case measures its contenders in turn, back and forth: on a shared machine times are noisy and ratios of
neighbours hold. Results go to out/bench/results.json after each case; a case that fails is said so there and here,
and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in (".", "tests"))

from bench import harness
from bench.cases import CASES
from bench.harness import MODELS, OUT, Point
from bench.loads import Plan, Times

RESULTS = OUT / "results.json"
Document = dict[str, Any]
"""By case: machine, repeats, run_s, took_s, points and, where the whole case failed, error."""


def main() -> int:
    """Run the cases. The numbers have no say in the exit code, failures have."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"Which: {', '.join(CASES)}. Default: all.")
    parser.add_argument("--repeats", type=int, default=3, help="Turns of each case.")
    parser.add_argument(
        "--seconds", type=float, default=1.2, help="How long each point is measured in a turn."
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="Where the results go.")
    options = parser.parse_args()
    unknown = set(options.cases) - CASES.keys()
    if unknown:
        parser.error(f"CASE must be among {', '.join(CASES)}; got {', '.join(sorted(unknown))}")
    if options.repeats < 1 or not 0 < options.seconds <= 60:
        parser.error("--repeats must be 1 or more, --seconds above 0 and at most 60")
    OUT.mkdir(parents=True, exist_ok=True)
    for name, value in harness.describe_machine().items():
        print(f"{name}: {value}")
    harness.save_models()
    with harness.serve(*MODELS):
        pass  # its programs are in the cache from here on
    document: Document = {}
    if options.cases and options.out.exists():
        document = json.loads(options.out.read_text())["cases"]
    return run_cases(
        options.cases or list(CASES), Plan(Times(options.seconds), options.repeats), document, options.out
    )


def run_cases(names: Sequence[str], plan: Plan, document: Document, out: Path) -> int:
    """Run cases one after the other and keep the results of each when it ends; returns how it went as an exit code."""
    failed = []
    for name in names:
        found: Document = {
            "machine": harness.describe_machine(),
            "repeats": plan.repeats,
            "run_s": plan.times.run_s,
            "points": [],
        }
        began = time.monotonic()
        try:
            found["points"] = CASES[name](plan)
        except Exception as error:  # whatever it is, the other cases can be measured
            found["error"] = f"{type(error).__name__}: {error}"
        found["took_s"] = time.monotonic() - began
        document[name] = found
        out.write_text(json.dumps({"cases": document}, indent=1))
        print(f"\n{name}: {found['took_s']:.0f} s")
        for point in found["points"]:
            print(f"  {in_words(point)}", flush=True)
        errors = [one["error"] for one in (found, *found["points"]) if "error" in one]
        if errors:
            failed.append(name)
            print(f"  FAILED: {errors[0]}", file=sys.stderr, flush=True)
    if failed:
        print(f"\nFailed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def in_words(point: Point) -> str:
    """A point for people."""
    said = []
    for name, value in point.items():
        if isinstance(value, dict):
            said.append(f"{name} {{{in_words(value)}}}")
        elif isinstance(value, float):
            said.append(f"{name}={value:,.3g}" if abs(value) < 100 else f"{name}={value:,.0f}")
        else:
            said.append(f"{name}={str(value).splitlines()[0]}")
    return ", ".join(said)


if __name__ == "__main__":
    sys.exit(main())
