"""The queue of received messages that are not processed yet.

Messages of one connection are processed in order. While several connections are active, large batches and new calls are
parts of large work, each in its own iteration of the event loop (see `LoopQueue`), shared fairly between tenants, callers
and connections. A single active connection does not wait.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Callable, Collection, Sequence
from typing import Any

#: Two connections with messages within this many seconds are both active.
ACTIVE_S = 0.05
#: Number of sessions that make a batch large.
LARGE = 64
#: Limit of tasks that start in one iteration for a single active connection. A second connection waits for them.
_MAX_TASKS = 32


class Kind(enum.Enum):
    """Kind of an arrival."""

    BATCH = enum.auto()
    """Steps as columns: applied at once, after the tasks of earlier arrivals on the same connections have run."""
    TASK = enum.auto()
    """A message for a task, which runs in the next iteration of the event loop."""
    EVENT = enum.auto()
    """Anything else that happened to a call, such as the end of a write. It makes no connection active."""


@dataclasses.dataclass(slots=True, eq=False)
class _Item:
    kind: Kind
    is_large: bool
    """Whether it blocks the event loop for a while."""
    peers: Collection[str]
    what: Any
    behind: int
    """Number of its connections that have earlier arrivals."""
    is_queued: bool = False
    """Whether it waits as a part of large work."""


class Arrivals:
    """The arrivals that are not processed yet. Lives on the event loop."""

    def __init__(
        self,
        do: Callable[[Any], None],
        defer: Callable[[Kind, Collection[str], Callable[[], None]], None],
        now: Callable[[], float],
    ) -> None:
        """`do` processes an arrival. `defer` calls a function as a part of the large work of some connections."""
        self._do = do
        self._defer = defer
        self._now = now
        self._lines: dict[str, collections.deque[_Item]] = {}
        """Waiting arrivals by connection."""
        self.due: collections.deque[str] = collections.deque()
        """Connections whose first arrival may be processed: work for `run_due`."""
        self._tasks: collections.Counter[str] = collections.Counter()
        """Number of arrivals whose tasks have not run yet, by connection."""
        self._held: set[str] = set()
        """Connections with a partly processed batch."""
        self._latest = ""
        self.is_contended = False
        """Whether several connections are active."""
        self._contended_until = 0.0

    def add(
        self, kind: Kind, peers: Sequence[str], what: Any, size: int = 1, *, is_all: bool = False
    ) -> None:
        """Queue an arrival on some connections behind their earlier ones, for `run_due`.

        `is_all`: nothing else has arrived. It is then processed at once, if nothing waits and no other connection is active.
        """
        first = peers[0] if peers else ""
        if kind is Kind.EVENT:  # such as the end of a write: it costs the others nothing
            pass
        elif len(peers) > 1 or first != self._latest:
            if self._latest:
                self.is_contended, self._contended_until = True, self._now() + ACTIVE_S
            self._latest = first
        elif self.is_contended:
            self.is_contended = self._now() < self._contended_until
        if is_all and not (self._lines or self._tasks or self._held or self.is_contended):
            self._do(what)
            return
        item = _Item(kind, kind is Kind.TASK or size >= LARGE, peers, what, 0)
        for peer in peers:
            line = self._lines.setdefault(peer, collections.deque())
            item.behind += bool(line)
            line.append(item)
        if not item.behind:
            self.due.append(first)

    def run_due(self) -> None:
        """Process the arrivals that are due, and schedule large ones as parts of large work."""
        tasks = _MAX_TASKS
        while self.due:
            line = self._lines.get(self.due[0])
            if not (line and self._may_begin(line[0])):
                self.due.popleft()
            elif line[0].is_large and (self.is_contended or not tasks):
                self._queue(line[0])
            else:
                tasks -= line[0].kind is Kind.TASK
                self._finish(line[0])

    def _may_begin(self, item: _Item) -> bool:
        if item.behind or item.is_queued or not self._held.isdisjoint(item.peers):
            return False
        return item.kind is not Kind.BATCH or self._tasks.keys().isdisjoint(item.peers)

    def _queue(self, item: _Item) -> None:
        item.is_queued = True
        self._defer(item.kind, item.peers, lambda: self._finish(item))

    def _finish(self, item: _Item) -> None:
        for peer in item.peers:
            line = self._lines[peer]
            line.popleft()
            if line:
                line[0].behind -= 1
                self.due.append(peer)
            else:
                del self._lines[peer]
        self._do(item.what)

    def hold(self, peers: Collection[str]) -> None:
        """Hold back some connections until `release`, because their batch is only partly processed."""
        self._held.update(peers)

    def release(self, peers: Collection[str]) -> None:
        """Let held connections continue. A connection is held by one batch at a time."""
        self._held.difference_update(peers)
        self.due.extend(peers)

    def task_started(self, peer: str) -> None:
        """An arrival on a connection was handed to a task."""
        self._tasks[peer] += 1

    def task_ended(self, peer: str) -> None:
        """The task of an arrival on a connection has run."""
        self._tasks[peer] -= 1
        if not self._tasks[peer]:
            del self._tasks[peer]
            if peer in self._lines:
                self.due.append(peer)
