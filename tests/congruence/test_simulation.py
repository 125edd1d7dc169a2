"""Replicas on one store, simulated: see `support.sim.schedule`. `tests/fault/simulate.py` runs as many schedules as one likes."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from stepwell_server.engine.intake.admission import Admission
from stepwell_server.engine.intake.paging import Pager
from stepwell_server.engine.sessions.attempts import Attempts
from stepwell_server.engine.sessions.creation import Creation, Fresh
from support.samples import ALL
from support.sim.network import Weather
from support.sim.programs import Mix
from support.sim.schedule import Plan, Schedule, run
from support.sim.store import Bugs

_BLOCK, _BLOCKS = 40, 5 if ALL else 3


@pytest.mark.parametrize("block", range(_BLOCKS))
def test_schedules_hold(block: int) -> None:
    reports = []
    for seed in range(block * _BLOCK, (block + 1) * _BLOCK):
        try:
            reports.append(run(seed).report)
        except AssertionError as error:
            raise AssertionError(f"tests/fault/simulate.py --trace --seed {seed}: {error}") from error
    # much happens in them, else they would hold because there is nothing in them
    print(
        {
            name: sum(getattr(report, name) for report in reports)
            for name in ("acknowledged", "unknown", "reads", "forks")
        }
    )
    assert sum(report.acknowledged for report in reports) > 500
    assert sum(report.unknown for report in reports) > 20
    assert sum(report.reads for report in reports) > 100
    assert sum(report.forks for report in reports) > 3


def test_a_seed_gives_the_same_schedule_again() -> None:
    """Also in another process, whose sets are in another order."""
    traces = [run(seed).trace for seed in (1, 2, 3)]
    assert len(set(traces)) == 3
    assert [run(seed).trace for seed in (1, 2, 3)] == traces
    program = "from support.sim.schedule import run; print(*(run(seed).trace for seed in (1, 2, 3)))"
    other = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": "."},
        check=True,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert other.stdout.split() == traces


# ------------------------------------------------------------------------------- bugs that are put in are found


def is_found(seeds: range, bugs: Bugs | None = None, **changes: Any) -> bool:
    """Whether one of some schedules shows that something is wrong."""
    for seed in seeds:
        plan = dataclasses.replace(Plan.drawn(seed), **copy.deepcopy(changes))
        try:
            result = Schedule(seed, plan=plan, bugs=bugs).run()
        except AssertionError:
            return True
        if result.report.violations:
            return True
    return False


@pytest.mark.parametrize("bug", ["ignores_tombstones", "unknown_is_kept"])
def test_a_store_with_a_bug_is_found(bug: str) -> None:
    assert is_found(range(200), Bugs(**{bug: True}))


def test_a_store_that_takes_its_own_change_for_a_conflict_is_found() -> None:
    """It needs an answer that is lost, and a change of another replica before the second attempt."""
    changes: dict[str, Any] = {"faults": ("cut",), "fault_every_s": 0.3, "guests": 2}
    assert is_found(range(200), Bugs(conflicts_after_attempts=True), **changes)


def test_a_store_that_compares_revisions_alone_is_found() -> None:
    """They come twice where a fail-over takes writes back."""
    changes: dict[str, Any] = {
        "must_sync": False,
        "faults": ("fail_over",),
        "fault_every_s": 0.3,
        "guests": 2,
    }
    assert is_found(range(200), Bugs(ignores_stamps=True), **changes)


@pytest.mark.parametrize("bug", ["waits_for_no_disk", "fences_nothing"])
def test_a_store_that_does_not_wait_for_the_disk_is_found(bug: str) -> None:
    changes: dict[str, Any] = {
        "must_sync": True,
        "flush_s": 0.3,
        "faults": ("fail_over",),
        "fault_every_s": 0.3,
        "guests": 2,
    }
    assert is_found(range(50, 250), Bugs(**{bug: True}), **changes)


def test_a_replica_that_judges_by_its_own_copy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Admission._judge

    def judge_at_once(self: Admission, *args: Any, is_fresh: bool = False) -> Any:
        return judge(self, *args, is_fresh=True)

    monkeypatch.setattr(Admission, "_judge", judge_at_once)
    assert is_found(range(200))


def test_a_replica_that_reads_its_own_copy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(_self: Pager, *_args: Any) -> None:
        """Believe what is in the arena."""

    compare: Callable[..., Awaitable[None]] = nothing
    monkeypatch.setattr(Pager, "compare", compare)
    mix = Mix(think_s=1e-3, read=6.0)
    changes: dict[str, Any] = {"owners": [["a"]], "guests": 2, "mix": mix, "faults": ("cut", "kill")}
    assert is_found(range(100), resident_rows=64, idle_s=0.0, **changes)


def test_an_attempt_that_takes_back_what_another_was_answered_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call for many sessions of which the store did not say what it kept: it was undone, whoever had come again meanwhile."""

    async def believe(_self: Attempts, *_args: Any) -> bool:
        return True

    def never(fresh: Fresh) -> bool:
        return len(fresh.ids) == 1

    monkeypatch.setattr(Attempts, "_take_over", believe)
    monkeypatch.setattr(Creation, "_may_come_again", staticmethod(never))
    changes: dict[str, Any] = {
        "together": True,
        "owners": [["a", "b", "c"]],
        "shards": 3,
        "faults": ("cut",),
        "fault_every_s": 0.2,
        "mix": Mix(step=1.0, close=3.0, think_s=0.02),
        "weather": Weather(lost=0.3, late=0.2, late_s=5.0),
        "moves": False,
        "seconds": 15.0,
    }
    assert is_found(range(100), **changes)
    monkeypatch.undo()
    assert not is_found(range(20), **changes)
