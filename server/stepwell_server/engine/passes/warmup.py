"""Running a program before anyone waits for it: its buffers are made, its cost is learnt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Select
from stepwell_server.engine.job import Job
from stepwell_server.engine.passes.batch import Pass
from stepwell_server.engine.passes.runner import Runner
from stepwell_server.errors import ServerError
from stepwell_server.program import Program

_SIZES = (1, 8, 64, 256)
_TIMES = 3


class _Nobody:
    def drop(self, _members: Rows, _now: float) -> Sequence[tuple[Rows, ServerError]]:
        return ()

    def fail(self, _members: Rows, error: ServerError) -> None:
        raise error


def warm_up(runner: Runner, program: Program, max_rows: int) -> None:
    """Run zeros through a program at several batch sizes; no session's rows are written.

    Before the model serves: it uses the runner's first lane.
    """
    for size in _SIZES:
        for _ in range(_TIMES):
            if size <= max_rows:
                runner.try_out(Pass(program, [_job(program, size)], 1))


def _job(program: Program, size: int) -> Job:
    rows = np.zeros(size, np.intp)
    return Job(
        _Nobody(),
        members=np.arange(size),
        handles=None,
        rows=rows,
        sizes=np.ones(size, np.intp),
        inputs=[np.zeros((size, *spec.shape), spec.dtype) for spec in program.inputs],
        steps=1,
        with_time=False,
        select=Select.LAST,
        source=None,
        queued_at=0.0,
    )
