"""The processes of a run import test modules in different orders, so that each rewrites and compiles a part of them.

pytest rewrites the assertions of a module when it is imported first, and caches the result in a file. Processes that
import all modules in the same order at the same time find nothing cached: each of them rewrites each module.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from pathlib import Path

import pytest


class ImportOrder:
    """A plugin of pytest for a process that runs part of the tests.

    Args:
        worker: The number of the process, from 0.
        workers: How many there are.
    """

    def __init__(self, worker: int, workers: int) -> None:
        self._worker = worker
        self._workers = workers
        self._places = dict[Path, int]()

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Begin with the own part of the modules in a folder, then take the parts of the others."""
        report = yield
        found = report.result or []
        modules = [node for node in found if isinstance(node, pytest.Module)]
        if isinstance(collector, pytest.Dir) and modules:
            for node in found:
                self._place(node.path)
            parts = [
                modules[(self._worker + k) % self._workers :: self._workers] for k in range(self._workers)
            ]
            others = [node for node in found if not isinstance(node, pytest.Module)]
            report.result = [*itertools.chain.from_iterable(parts), *others]
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Put the tests into the order in which pytest finds them: all processes must have the same one."""
        places = dict[Path, list[int]]()
        for item in items:
            if item.path not in places:
                # folders of folders were not reordered: their places are those in which their tests are found
                places[item.path] = [self._place(node.path) for node in item.listchain()]
        items.sort(key=lambda item: places[item.path])

    def _place(self, path: Path) -> int:
        return self._places.setdefault(path, len(self._places))
