"""What the driver of the fault tests writes down of attempts at several replicas."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from support.checks import history
from support.checks.history import Call, End, Log
from support.load.driver import Table
from support.load.replica_driver import ReplicaRouter

LATE = stepwell.DeadlineExceededError("late", outcome="unknown")
CONFLICT = stepwell.RevisionConflictError("another made it", expected=0, actual=1)
DONE = End(outcome="acknowledged", revision=1, position=1)


@contextlib.contextmanager
def router(path: Path) -> Iterator[ReplicaRouter]:
    """A router over replicas that are not there."""
    with contextlib.closing(Log(path, 1)) as log:
        table = Table(log, random.Random(1), np.random.default_rng(1), asyncio.Event(), 0.0, hurry=False)
        nothing: Any = object()
        yield ReplicaRouter(table, [nothing])


class Attempts:
    """An attempt that ends in given ways, one after the other."""

    def __init__(self, *ends: End | stepwell.StepwellError) -> None:
        self._ends = list(ends)

    async def __call__(self, _at: object, _limit_s: float) -> End:
        end = self._ends.pop(0) if len(self._ends) > 1 else self._ends[0]
        if isinstance(end, End):
            return end
        raise end


@pytest.mark.parametrize(
    ("ends", "outcomes"),
    [
        ([DONE], ["acknowledged"]),
        ([LATE, DONE], ["unknown", "acknowledged"]),
        ([LATE, CONFLICT], ["unknown", "not_applied"]),
    ],
)
async def test_attempts_of_unknown_outcome_are_in_the_history_of_a_change(
    tmp_path: Path, ends: Sequence[End | stepwell.StepwellError], outcomes: list[str]
) -> None:
    with router(tmp_path / "history") as routed:
        call = Call(kind="reset", session="a", expected=0)
        await routed.change(call, Attempts(*ends))
    (op,) = history.load([tmp_path / "history"])
    assert [end.outcome for _, end in op.ends] == outcomes


async def test_attempts_of_unknown_outcome_are_in_the_history_of_a_fork(tmp_path: Path) -> None:
    with router(tmp_path / "history") as routed:
        await routed.asked(Call(kind="fork", session="b", parent="a"), Attempts(LATE, DONE))
    (op,) = history.load([tmp_path / "history"])
    assert [end.outcome for _, end in op.ends] == ["unknown", "acknowledged"]
