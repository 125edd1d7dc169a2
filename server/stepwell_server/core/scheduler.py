"""Which jobs go into the next pass.

A job is work on the rows of one or more sessions for one or more time steps. Sources (callers' streams,
or calls) take turns, so that one with a thousand jobs does not starve one with a single job. A job of
several time steps goes back to the end of its source's line after each pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler must know of a job."""

    @property
    def row_count(self) -> int:
        """Rows it brings into a pass."""

    @property
    def steps_left(self) -> int:
        """Time steps it still has to run."""

    @property
    def source(self) -> Hashable:
        """Who sent it."""


J = TypeVar("J", bound=Schedulable)


class Scheduler(Generic[J]):
    """The ready jobs of one model, by source. Each session is in at most one of them."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._lines: dict[Hashable, deque[J]] = {}
        self.rows_waiting = 0

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, job: J) -> None:
        """Put a job at the end of its source's line; a new source goes to the end of the round."""
        self._lines.setdefault(job.source, deque()).append(job)
        self.rows_waiting += job.row_count

    def next_pass(self) -> list[J]:
        """Take the jobs of the next pass: one of each source in turn, up to `max_rows` rows.

        A job of more rows than `max_rows` makes a pass of its own. Sources whose first job does not fit
        keep their place at the head of the next round.
        """
        chosen: list[J] = []
        room = self._max_rows
        turn = list(self._lines)
        while turn and room > 0:
            served = []
            for source in turn:
                line = self._lines[source]
                rows = line[0].row_count
                if rows > room and chosen:
                    continue
                chosen.append(self._take(source, line))
                room -= rows
                if line:
                    served.append(source)
                if room <= 0:
                    break
            turn = served
        return chosen

    def steps_together(self, chosen: Sequence[J], budget: int) -> int:
        """For how many time steps the chosen jobs may run in one pass: 1 if anything else waits."""
        if self._lines or budget <= 1:
            return 1
        return max(1, min(budget, *(job.steps_left for job in chosen)))

    def _take(self, source: Hashable, line: deque[J]) -> J:
        job = line.popleft()
        self.rows_waiting -= job.row_count
        del self._lines[source]
        if line:
            self._lines[source] = line  # at the end of the round
        return job
