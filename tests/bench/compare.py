"""Compare the server with what bounds it, in one run: bare echoes, the program in process, the seed's way, memory.

    python tests/bench/compare.py                 everything, about twelve minutes on two cores
    python tests/bench/compare.py one many        some cases
    python tests/bench/compare.py --repeats 5

Each case measures its contenders in turn, back and forth, and compares them pair by pair: on a shared
machine times are noisy and ratios hold. Results are printed and written to out/bench/compare.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from bench import harness
from bench.cases import CASES, Lab
from bench.harness import OUT, Line


def main() -> int:
    """Run the cases. Exit code 0 whatever the numbers say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"Which: {', '.join(CASES)}. Default: all.")
    parser.add_argument("--repeats", type=int, default=3, help="Turns of each case.")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="How long each contender is measured in a turn."
    )
    parser.add_argument("--python-load", action="store_true", help="Use load.py even where load.cc compiles.")
    parser.add_argument("--out", type=Path, default=OUT / "compare.json", help="Where the results go.")
    options = parser.parse_args()
    unknown = set(options.cases) - CASES.keys()
    if unknown:
        parser.error(f"CASE must be among {', '.join(CASES)}; got {', '.join(sorted(unknown))}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    OUT.mkdir(parents=True, exist_ok=True)
    harness.save_models()
    generator = harness.Generator(compiled=not options.python_load)
    machine = harness.describe_machine(generator)
    for name, value in machine.items():
        console.print(f"{name}: {value}", highlight=False)
    lines = run(options.cases or list(CASES), generator, options.repeats, options.seconds, console)
    console.print(table(lines))
    options.out.write_text(
        json.dumps({"machine": machine, "lines": [as_json(line) for line in lines]}, indent=1)
    )
    return 0


def run(
    names: list[str], generator: harness.Generator, repeats: int, run_s: float, console: Console
) -> list[Line]:
    """Run cases one after the other, on servers that live as long."""
    lines: list[Line] = []
    with (
        harness.serve(*harness.MODELS) as server,
        harness.script_server("echo_server.py", "--uvloop") as echo,
        harness.script_server("echo_server.py") as plain_echo,
    ):
        lab = Lab(server, echo, plain_echo, generator, repeats, run_s)
        for name in names:
            began = time.monotonic()
            lines += CASES[name](lab)
            console.print(f"{name}: {time.monotonic() - began:.0f} s", highlight=False)
    return lines


def as_json(line: Line) -> dict[str, Any]:
    return dataclasses.asdict(line) | {"reached": line.reached}


def number(value: float | None) -> str:
    """Three digits that say something."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(lines: list[Line]) -> Table:
    """The lines for people."""
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("CASE", "UNIT"):
        drawn.add_column(heading)
    drawn.add_column("STEPWELL", justify="right")
    drawn.add_column("COMPARED WITH")
    for heading in ("THEIRS", "RATIO"):
        drawn.add_column(heading, justify="right")
    for heading in ("TARGET", "REACHED"):
        drawn.add_column(heading)
    for line in lines:
        target = "" if line.target is None else f"{line.target[0]} {line.target[1]:g}"
        reached = {True: "yes", False: "no", None: ""}[line.reached]
        figures = (number(line.ours), line.baseline, number(line.theirs), number(line.ratio))
        drawn.add_row(line.case, line.unit, *figures, target, reached)
    return drawn


if __name__ == "__main__":
    sys.exit(main())
