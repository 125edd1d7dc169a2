"""Shows that a run divided among processes is collecting its tests, which pytest-xdist does without a word."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class CollectionProgress:
    """A plugin of pytest for the process that divides the tests: a line at first, then one each interval and each worker.

    Args:
        write_line: Prints a line.
        interval_s: Seconds between two lines.
    """

    def __init__(self, write_line: Callable[[str], object], interval_s: float = 15.0) -> None:
        self._write_line = write_line
        self._interval_s = interval_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        self._began = 0.0
        self._waiting = 0

    def pytest_xdist_setupnodes(self, specs: list[object]) -> None:
        """The workers are about to start."""
        self._began = time.monotonic()
        self._waiting = len(specs)
        self._write_line(
            f"collecting ... {self._waiting} workers import all tests, and TensorFlow: half a minute on two idle cores"
        )
        self._thread.start()

    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        """One worker has collected its tests."""
        self._waiting -= 1
        self._write_line(
            f"collecting ... {len(ids)} tests, {self._waiting} workers to go ({self._elapsed()})"
        )
        if not self._waiting:
            self.pytest_sessionfinish()

    def pytest_sessionfinish(self) -> None:
        """The run ends, perhaps without any test."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _repeat(self) -> None:
        while not self._over.wait(self._interval_s):
            self._write_line(f"collecting ... {self._elapsed()}")

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._began:.0f} s"
