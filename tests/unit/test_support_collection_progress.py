"""What a run of many tests shows before its first dot."""

from __future__ import annotations

import re
import threading

from support.collection_progress import CollectionProgress


def test_lines_come_while_workers_collect_and_end_with_the_last_of_them() -> None:
    lines: list[str] = []
    ticked = threading.Event()

    def write_line(line: str) -> None:
        lines.append(line)
        if re.fullmatch(r"collecting \.\.\. \d+ s", line):
            ticked.set()

    progress = CollectionProgress(write_line, interval_s=0.001)
    progress.pytest_xdist_setupnodes([object(), object()])
    assert lines[0].startswith("collecting ... 2 workers import all tests")
    assert ticked.wait(60)
    for workers in (1, 0):
        progress.pytest_xdist_node_collection_finished(object(), ["a", "b", "c"])
        assert [
            line for line in lines if line.startswith(f"collecting ... 3 tests, {workers} workers to go (")
        ]
    shown = len(lines)
    assert not progress._thread.is_alive()
    progress.pytest_sessionfinish()
    assert len(lines) == shown


def test_a_run_that_ends_early_ends_it() -> None:
    progress = CollectionProgress(lambda line: None)
    progress.pytest_sessionfinish()
    progress.pytest_xdist_setupnodes([object()])
    progress.pytest_sessionfinish()
    assert not progress._thread.is_alive()
