"""Processes that are measured where this one is: a server runs much that no test runs in its own process."""

from __future__ import annotations

import os
from collections.abc import Sequence


def program(module: str = "stepwell_server") -> Sequence[str]:
    """What Python runs for a server, for `ServerProcess`, or for a command; measured where this process is.

    The process writes its data beside those of the test run, which combines them. It must end by itself: a process that
    is killed writes none.
    """
    if "TEST_COVERAGE" not in os.environ:
        return ("-m", module)
    from support.line_coverage import DATA_FILE, ROOT

    data, rules = f"--data-file={DATA_FILE}", f"--rcfile={ROOT / 'pyproject.toml'}"
    return ("-m", "coverage", "run", "--parallel-mode", data, rules, "-m", module)
