"""Processes that are measured where this one is: a server runs much that no test runs in its own process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coverage import Coverage

_ROOT = Path(__file__).parents[3]


def program(module: str = "stepwell_server") -> Sequence[str]:
    """What Python runs for a server, for `ServerProcess`, or for a command; measured where this process is.

    The process writes its data beside those of the test run, which combines them. It must end by itself: a process that
    is killed writes none.
    """
    measured = Coverage.current()
    if measured is None:
        return ("-m", module)
    data = f"--data-file={measured.get_option('run:data_file')}"
    rules = f"--rcfile={_ROOT / 'pyproject.toml'}"
    return ("-m", "coverage", "run", "--parallel-mode", data, rules, "-m", module)
