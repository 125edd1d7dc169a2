"""Run schedules of the simulation: `--seed 7 --trace` shows one, `--runs 1000` tries as many fresh ones."""

from __future__ import annotations

import argparse
import collections
import secrets
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.sim.schedule import Schedule


def main() -> int:
    """Returns 1 if a schedule failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="the one schedule to run, or the first of --runs")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--trace", action="store_true", help="print all that happens")
    options = parser.parse_args()
    first = secrets.randbelow(2**40) if options.seed is None else options.seed
    failed, began, total = [], time.monotonic(), collections.Counter[str]()
    for seed in range(first, first + options.runs):
        try:
            result = Schedule(seed, show=options.trace).run()
            result.report.require_clean()
        except Exception as error:
            failed.append(seed)
            print(f"seed {seed} failed: {error}", flush=True)
            if not isinstance(error, AssertionError):
                traceback.print_exc()
            continue
        report = result.report
        total.update(
            sessions=report.sessions, changes=report.acknowledged, unknown=report.unknown, reads=report.reads
        )
        total["seconds"] += round(result.seconds)
    spent = time.monotonic() - began
    counts = ", ".join(f"{count} {name}" for name, count in total.items())
    print(f"{options.runs} schedules from seed {first} in {spent:.0f} s: {counts}; {len(failed)} failed")
    if failed:
        print("run one again: .venv/bin/python tests/fault/simulate.py --trace --seed", failed[0])
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
