"""Which jobs go into the next pass.

A job is work on the rows of one or more sessions for one or more time steps. Tenants take turns, then the callers of a
tenant, then the connections of a caller: so that whoever has a thousand jobs, or a thousand connections, has one share.
Where others are about, shares are counted in rows (a surplus round robin: Adiseshu, Parulkar, Varghese, "A reliable and
scalable striping protocol", SIGCOMM 1996; see also Shreedhar and Varghese, "Efficient fair queuing using deficit round
robin", SIGCOMM 1995), and jobs of many sessions are parted. A job of several time steps goes back to the end of its
line after each pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Generic, Protocol, Self, TypeVar

from stepwell_server.core.callers import Caller

#: So long after it had a job in a pass a source counts as one of those that are about, in seconds.
COMPANY_S = 0.05
#: Who has less to do than this part of a short pass has every other pass without the others.
_LIGHT = 4
#: Rows of one turn where shares are counted.
_QUANTUM = 16

Source = tuple[Hashable, ...]
"""Whose job it is: tenant, caller, connection. Turns are taken at each place, from the first on."""


def source_of(who: Caller, connection: Hashable) -> Source:
    """The source of what a caller asks for over a connection."""
    return (who.tenant, who.name, connection)


class Schedulable(Protocol):
    """What the scheduler must know of a job."""

    @property
    def row_count(self) -> int:
        """Rows it brings into a pass."""

    @property
    def steps_left(self) -> int:
        """Time steps it still has to run."""

    @property
    def source(self) -> Source:
        """Who sent it."""

    @property
    def may_part(self) -> bool:
        """`part` can be called."""

    def part(self, rows: int, /) -> Self:
        """Take its first sessions away, of so many rows together but at least one session, as a job of their own.

        Itself if they are all.
        """


J = TypeVar("J", bound=Schedulable)


class _Line(Generic[J]):
    """The jobs of one source, or the lines of those that share a tenant, a caller; in the order of their turns."""

    __slots__ = ("debt", "jobs", "lines")

    def __init__(self) -> None:
        self.lines: dict[Hashable, _Line[J]] = {}
        self.jobs: deque[J] = deque()
        self.debt = 0
        """Rows that it had beyond its share: it lets so many turns go by."""

    def add(self, job: J, path: Source) -> None:
        line = self
        for key in path:
            found = line.lines.get(key)
            if found is None:
                found = line.lines[key] = _Line()
            line = found
        line.jobs.append(job)

    def next(self) -> Source:
        """Whose turn it is."""
        path, line = [], self
        while line.lines:
            if len(line.lines) > 1:
                line.settle()
            key = next(iter(line.lines))
            path.append(key)
            line = line.lines[key]
        return tuple(path)

    def settle(self) -> None:
        """Put those that are in debt at the end, for a share less of it."""
        while True:
            key = next(iter(self.lines))
            line = self.lines[key]
            if line.debt <= 0:
                return
            if all(other.debt > 0 for other in self.lines.values()):
                least = min(other.debt for other in self.lines.values())
                for other in self.lines.values():
                    other.debt -= least
                continue
            line.debt -= _QUANTUM
            self.lines[key] = self.lines.pop(key)

    def at(self, path: Source) -> _Line[J]:
        line = self
        for key in path:
            line = line.lines[key]
        return line

    def turn(self, path: Source, debt: int = 0) -> None:
        """A source has had its turn: it goes to the end, everywhere, or is gone if nothing of it is left."""
        lines = [self]
        for key in path:
            lines.append(lines[-1].lines[key])
        for parent, key, line in zip(lines[-2::-1], reversed(path), reversed(lines), strict=False):
            del parent.lines[key]
            if line.jobs or line.lines:
                line.debt += debt
                parent.lines[key] = line

    def put_first(self, path: Source, jobs: deque[J], debt: int) -> None:
        """Give a source its place at the head again."""
        line = self
        for key in path:
            found = line.lines.pop(key, None) or _Line()
            line.lines = {key: found, **line.lines}
            line = found
        line.jobs, line.debt = jobs, debt


class Scheduler(Generic[J]):
    """The ready jobs of one model, by source. Each session is in at most one of them."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._root: _Line[J] = _Line()
        self._only: J | None = None
        """The job that waits, as long as there is no other: it is in no line yet."""
        self._about: dict[Source, tuple[float, int]] = {}
        """When each source had jobs in a pass last, and of how many rows; the latest last."""
        self._first: set[Source] = set()
        """Sources that have the next pass for themselves."""
        self._was_first = False
        """They had the latest pass for themselves."""
        self.rows_waiting = 0

    def __bool__(self) -> bool:
        return self._only is not None or bool(self._root.lines)

    def add(self, job: J) -> None:
        """Put a job at the end of its source's line; a new source goes to the end of the round."""
        self.rows_waiting += job.row_count
        if self:
            self._line_up()
            self._root.add(job, job.source)
        else:
            self._only = job

    def _line_up(self) -> None:
        if self._only is not None:
            self._root.add(self._only, self._only.source)
            self._only = None

    def has_company(self, now: float) -> bool:
        """Several sources may be about: what `most_rows` says counts."""
        about, only = self._about, self._only
        if only is not None and len(about) == 1 and only.source in about:
            return False
        self._forget_those_gone(now)
        return only is None or len(about) > (only.source in about)

    def only_source(self, now: float) -> Source | None:
        """The source that had jobs in passes of late, if there was just one."""
        self._forget_those_gone(now)
        return next(iter(self._about)) if len(self._about) == 1 else None

    def _forget_those_gone(self, now: float) -> None:
        about = self._about
        while about and next(iter(about.values()))[0] < now - COMPANY_S:
            del about[next(iter(about))]

    def most_rows(self, now: float, bound: int) -> int | None:
        """Rows of the next pass at most, for the sake of those that will come while it runs; None: as many as fit.

        Who is alone, or where all have the like of it to do, may have full passes; else they have `bound` rows.
        """
        if self.rows_waiting <= bound or not self.has_company(now):
            return None
        self._line_up()
        waiting = self._rows_by_source()
        rows = {source: rows for source, (_, rows) in self._about.items()} | waiting
        if len(rows) < 2:
            return None
        most = max(bound, len(rows) * min(rows.values()))
        light = {source for source, count in waiting.items() if count <= bound // _LIGHT}
        self._first = light if not self._was_first and len(light) < len(waiting) else set()
        return most

    def next_pass(self, now: float = 0.0, most: int | None = None) -> list[J]:
        """Take the jobs of the next pass: one of each source in turn, up to `max_rows` rows.

        With `most` it has so many at most, shared in rows: jobs that may are parted. A job that has more by itself makes
        a pass of its own. Sources whose first job does not fit keep their place at the head of the next round.
        """
        only = self._only
        if only is not None and most is None:
            self._only, self._was_first = None, False
            self.rows_waiting -= only.row_count
            chosen, rows = [only], {only.source: only.row_count}
        else:
            self._line_up()
            room = self._max_rows if most is None else min(most, self._max_rows)
            chosen, rows = self._chosen(room, most is not None)
        about = self._about
        for source, count in rows.items():
            about.pop(source, None)
            about[source] = (now, count)
        return chosen

    def _chosen(self, room: int, is_limited: bool) -> tuple[list[J], dict[Source, int]]:
        root = self._root
        first, self._first = self._first if is_limited else set(), set()
        self._was_first = bool(first)
        chosen: dict[J, int] = {}
        """Rows of each."""
        rows: dict[Source, int] = {}
        aside: list[tuple[Source, deque[J], int]] = []
        """Sources whose first job does not fit."""
        while root.lines and room > 0:
            source = root.next()
            line = root.at(source)
            job = line.jobs[0]
            before = chosen.get(job, 0)
            left = job.row_count - before
            count = min(left, room, _QUANTUM) if is_limited and job.may_part else left
            if (count > room and chosen) or (first and source not in first):
                aside.append((source, line.jobs, line.debt))
                line.jobs = deque()
                root.turn(source)
                continue
            chosen[job] = before + count
            rows[source] = rows.get(source, 0) + count
            room -= count
            if count == left:
                line.jobs.popleft()
            root.turn(source, count - _QUANTUM if is_limited and count > _QUANTUM else 0)
        for source, jobs, debt in reversed(aside):
            root.put_first(source, jobs, debt)
        return [self._take(job, count) for job, count in chosen.items()], rows

    def _take(self, job: J, count: int) -> J:
        """A job, or its part of so many rows, of which the rest has stayed at the head of its line."""
        if count == job.row_count:
            self.rows_waiting -= count
            return job
        part = job.part(count)
        self.rows_waiting -= part.row_count
        if part is job:  # it is one session, and has more rows than were meant
            line = self._root.at(job.source)
            line.jobs.popleft()
            if not line.jobs:
                self._root.turn(job.source)
        return part

    def _rows_by_source(self) -> dict[Source, int]:
        found: dict[Source, int] = {}
        lines: list[tuple[Source, _Line[J]]] = [((), self._root)]
        while lines:
            path, line = lines.pop()
            lines += [((*path, key), child) for key, child in line.lines.items()]
            if line.jobs:
                found[path] = sum(job.row_count for job in line.jobs)
        return found

    def steps_together(self, chosen: Sequence[J], budget: int) -> int:
        """For how many time steps the chosen jobs may run in one pass: 1 if anything else waits."""
        if self or budget <= 1:
            return 1
        return max(1, min(budget, *(job.steps_left for job in chosen)))
