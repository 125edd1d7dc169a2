"""Write the table of layers with a state into docs/explanation/models.md; or check with `--check` that it is up to date.

Each row is a model of tests/support/models/layers.py, which tests compare with Keras. It is compiled here: names, shapes
and sizes are what the program has. A check compiles one row in four, and new ones; tests/congruence/test_compile_layers.py
checks all of them in `make soak`.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "explanation" / "models.md"
MARK = "<!-- The next table is written by scripts/layer_table.py (make layer-table). -->"
TABLE = re.compile(rf"(?<={re.escape(MARK)}\n\n).*?(?=\n\n)", re.DOTALL)
CHECKED_ONE_IN = 4
HEADINGS = (
    "layers",
    "state of one row",
    "it holds",
    "bytes of a row",
    "bytes that a step replaces",
    "multiply-adds of a step",
)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
logging.getLogger("tensorflow").setLevel(logging.ERROR)  # It complains about many models in one process.
sys.path.insert(0, str(ROOT / "tests"))

from stepwell_server.program import Program  # noqa: E402  after the path
from support.models import layers, programs  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table, or check it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if it differs")
    options = parser.parse_args(arguments)
    before = PAGE.read_text(encoding="utf-8")
    (present,) = TABLE.findall(before)
    table = "\n".join(lines(present.splitlines() if options.check else ()))
    if table == present:
        return 0
    if options.check:
        for line in sorted(set(table.splitlines()) - set(present.splitlines())):
            print(f"should be in {PAGE.relative_to(ROOT)}: {line}")
        print("The table of layers is out of date: run `make layer-table`.", file=sys.stderr)
        return 1
    PAGE.write_text(TABLE.sub(lambda _: table, before), encoding="utf-8")
    return 0


def lines(trusted: Sequence[str] = ()) -> Iterator[str]:
    """Yield the lines of the table. Of `trusted`, those of most rows are taken as they are."""
    yield f"| {' | '.join(HEADINGS)} |"
    yield "| --- | --- | --- | ---: | ---: | ---: |"
    with tempfile.TemporaryDirectory(prefix="stepwell-") as folder:
        path = Path(folder, "model.keras")
        for place, row in enumerate(layers.ROWS):
            found = [line for line in trusted if line.startswith(f"| {code_of(row)} |")]
            if found and place % CHECKED_ONE_IN:
                yield found[0]
                continue
            layers.build(row).save(path)
            yield line_of(row, programs.compile_model(path))


def code_of(row: layers.Row) -> str:
    """Return the first cell of a row."""
    code = [f"`{each}`".replace("'", '"') for each in row.code]
    return ", ".join(code) + ("" if row.features == (64,) else f" on {row.features}")


def line_of(row: layers.Row, program: Program) -> str:
    """Return the line of a row, from its compiled model."""
    states = [f"`{spec.name}` {spec.shape}" for spec in program.state]
    sizes = (program.state_row_bytes, program.changed_state_row_bytes, program.multiply_adds)
    cells = (
        code_of(row),
        ", ".join(states) or "none",
        row.keeps,
        *(f"{size:,}" for size in sizes),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
