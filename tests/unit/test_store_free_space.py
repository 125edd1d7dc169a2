"""Reports of a disk that is full, was full, or soon will be."""

from __future__ import annotations

import os
import types
from pathlib import Path

import pytest

from stepwell_server.errors import Unavailable
from stepwell_server.process.readiness import Readiness
from stepwell_server.store.base import Batch, StoreHealth
from stepwell_server.store.disk.free_space import FreeSpace
from stepwell_server.store.in_process import InProcessStore
from stepwell_server.store.memory import MemoryStore
from stepwell_server.store_monitor import StoreMonitor
from support.clock import ManualClock

GIB = 1 << 30


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """So many bytes are free of its 100 GiB."""
    state = types.SimpleNamespace(free=50 * GIB)
    monkeypatch.setattr(
        os,
        "statvfs",
        lambda _: types.SimpleNamespace(
            f_bavail=state.free // 4096, f_blocks=100 * GIB // 4096, f_frsize=4096
        ),
    )
    return state


def test_a_change_that_failed_is_a_problem_until_one_is_kept_and_there_is_room(
    disk: types.SimpleNamespace,
) -> None:
    room = FreeSpace(Path("data"))
    refusals = [Unavailable("still no room")]

    def keep_nothing() -> None:
        if refusals:
            raise refusals.pop()

    assert room.problem(keep_nothing) == ""
    assert refusals, "without a change that failed there is no trial"
    room.failed(Unavailable("no room"), Batch(puts=[("a", b"r" * (4 << 20))]))
    disk.free = 3 << 20
    assert room.problem(keep_nothing) == "still no room"
    assert room.problem(keep_nothing) == f"no room; {3 << 20} bytes are free now"
    disk.free = 5 << 20
    assert room.problem(keep_nothing) == ""
    disk.free = 0
    assert room.problem(keep_nothing) == ""


def test_a_disk_that_is_nearly_full_is_warned_of_until_there_is_clearly_more(
    disk: types.SimpleNamespace,
) -> None:
    room = FreeSpace(Path("data"))
    assert room.warning() == ""
    disk.free = GIB - 4096
    assert room.warning() == f"{GIB - 4096} of {100 * GIB} bytes are free on the disk of data"
    disk.free = GIB + 4096
    assert room.warning()
    disk.free = 2 * GIB
    assert room.warning() == ""


def test_probes_and_log_hear_of_it_once_each_time_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    readiness = Readiness()
    watch = StoreMonitor(InProcessStore(MemoryStore(), ManualClock()), readiness)
    readiness.problem("models", "")
    heard: list[bool] = []
    readiness.listen(lambda report: heard.append(report.is_ready))
    caplog.set_level("INFO")
    for health in (
        *(StoreHealth(), StoreHealth(warning="10 bytes"), StoreHealth(warning="9 bytes")),
        *(StoreHealth(problem="full", warning="0 bytes"), StoreHealth(problem="full", warning="0 bytes")),
        StoreHealth(),
    ):
        watch.report(health)
    assert [record.getMessage() for record in caplog.records] == [
        "the disk of the store is nearly full",
        "the store cannot be used",
        "the store can be used again",
        "the disk of the store has room again",
    ]
    assert readiness.report.problems == readiness.report.warnings == {}
    assert (heard[0], False in heard, heard[-1]) == (True, True, True)
