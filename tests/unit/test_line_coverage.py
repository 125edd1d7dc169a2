"""The lines that `make coverage` counts are those that coverage.py finds with its trace function."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from coverage import CoverageData

ROOT = Path(__file__).parents[2]
# Functions, a generator, a loop over exceptions, a class whose fields have defaults, and lines that no call reaches.
PROGRAM = """
import contextlib
import threading
import stepwell
from stepwell_server.core.model_names import parse_reference
from stepwell_server.store.valkey.connection.url import parse

def use():
    for text in ("a", "a@2", "a:canary", "a@", "@", "a:" + "b" * 65):
        with contextlib.suppress(ValueError):
            str(parse_reference(text))
    for url in ("valkey://h", "valkeys://me:p@a:1,b/3?prefix=x:&partitions=8", "http://h"):
        with contextlib.suppress(Exception):
            parse(url, {})

use()
thread = threading.Thread(target=use)
thread.start()
thread.join()
"""


def executed(data_file: Path) -> dict[str, set[int]]:
    data = CoverageData(str(data_file))
    data.read()
    return {name: set(data.lines(name) or ()) for name in data.measured_files()}


def run(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    environment["PYTHONPATH"] = str(ROOT / "tests")
    done = subprocess.run(
        [sys.executable, *arguments],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr


def test_its_lines_are_those_of_a_trace_function(tmp_path: Path) -> None:
    traced, probed = tmp_path / "traced", tmp_path / "probed"
    program, with_probes = tmp_path / "program.py", tmp_path / "with_probes.py"
    program.write_text(PROGRAM)
    with_probes.write_text(
        "from pathlib import Path\n"
        "from support.line_coverage import LineCoverage\n"
        "coverage = LineCoverage()\n"
        f"{PROGRAM}\n"
        f"coverage.save(Path({str(probed)!r}))\n"
    )
    run("-m", "coverage", "run", f"--data-file={traced}", f"--rcfile={ROOT / 'pyproject.toml'}", str(program))
    run(str(with_probes))
    (written,) = tmp_path.glob("probed.*")
    seen, expected = executed(written), executed(traced)
    assert {name: lines for name, lines in seen.items() if lines} == {
        name: lines for name, lines in expected.items() if lines
    }
    assert set(seen) == set(expected)
    assert sum(map(len, seen.values())) > 300
