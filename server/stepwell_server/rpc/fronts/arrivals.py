"""What has come over the wire and is not done yet.

What came over one connection is done in its order. While several connections are active, large batches and the
beginnings of calls are parts of large work, each in an iteration of the event loop of its own (see `LoopQueue`): tenants,
callers and connections have equal numbers of them. A connection that is alone does not wait.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Callable, Collection
from typing import Any

#: Two connections that had something to do within this many seconds are both active.
ACTIVE_S = 0.05
#: Sessions of a large batch.
LARGE = 64
#: Tasks that begin at once for a connection that is alone: another that comes meanwhile waits for them.
_MAX_TASKS = 32


class Kind(enum.Enum):
    """What an arrival is."""

    BATCH = enum.auto()
    """Plain steps: done at once, but not before tasks have looked at what came before over the same connections."""
    TASK = enum.auto()
    """A task has to look at it, in the next iteration of the event loop."""
    EVENT = enum.auto()


@dataclasses.dataclass(slots=True, eq=False)
class _Item:
    kind: Kind
    is_large: bool
    """It keeps the event loop for a while."""
    peers: Collection[str]
    what: Any
    behind: int
    """Connections on which something is before it."""
    is_queued: bool = False
    """It waits as a part of large work."""


class Arrivals:
    """What has come and is not done. Lives on the event loop."""

    def __init__(
        self,
        do: Callable[[Any], None],
        later: Callable[[Kind, Collection[str], Callable[[], None]], None],
        now: Callable[[], float],
    ) -> None:
        """`do` does one of them; `later` calls something as a part of the large work of some connections."""
        self._do = do
        self._later = later
        self._now = now
        self._lines: dict[str, collections.deque[_Item]] = {}
        """What waits, by connection."""
        self._due: collections.deque[str] = collections.deque()
        """Connections whose first may be done."""
        self._unlooked: collections.Counter[str] = collections.Counter()
        """Of each connection, what tasks have not looked at yet."""
        self._held: set[str] = set()
        """Connections of which a batch is not done whole."""
        self._latest = ""
        self.is_contended = False
        """Several connections are active."""
        self._contended_until = 0.0

    @property
    def has_due(self) -> bool:
        """There is something for `go_on`."""
        return bool(self._due)

    def add(
        self, kind: Kind, peers: Collection[str], what: Any, size: int = 1, *, is_all: bool = False
    ) -> None:
        """Put what came over some connections behind what came before over them, for `go_on`.

        `is_all`: nothing else has come. Then it is done at once, if nothing waits and no other connection is active.
        """
        first = next(iter(peers), "")
        if len(peers) > 1 or first != self._latest:
            if self._latest:
                self.is_contended, self._contended_until = True, self._now() + ACTIVE_S
            self._latest = first
        elif self.is_contended:
            self.is_contended = self._now() < self._contended_until
        if is_all and not (self._lines or self._unlooked or self._held or self.is_contended):
            self._do(what)
            return
        item = _Item(kind, kind is Kind.TASK or size >= LARGE, peers, what, 0)
        for peer in peers:
            line = self._lines.setdefault(peer, collections.deque())
            item.behind += bool(line)
            line.append(item)
        if not item.behind:
            self._due.append(first)

    def go_on(self) -> None:
        """Do what may be done now, and have the rest done as parts of large work."""
        tasks = _MAX_TASKS
        while self._due:
            line = self._lines.get(self._due[0])
            if not (line and self._may_begin(line[0])):
                self._due.popleft()
            elif line[0].is_large and (self.is_contended or not tasks):
                self._queue(line[0])
            else:
                tasks -= line[0].kind is Kind.TASK
                self._finish(line[0])

    def _may_begin(self, item: _Item) -> bool:
        if item.behind or item.is_queued or not self._held.isdisjoint(item.peers):
            return False
        return item.kind is not Kind.BATCH or self._unlooked.keys().isdisjoint(item.peers)

    def _queue(self, item: _Item) -> None:
        item.is_queued = True
        self._later(item.kind, item.peers, lambda: self._finish(item))

    def _finish(self, item: _Item) -> None:
        for peer in item.peers:
            line = self._lines[peer]
            line.popleft()
            if line:
                line[0].behind -= 1
                self._due.append(peer)
            else:
                del self._lines[peer]
        self._do(item.what)

    def hold(self, peers: Collection[str]) -> None:
        """Do nothing more of some connections, until `release`: the batch that was just done has parts left."""
        self._held.update(peers)

    def release(self, peers: Collection[str]) -> None:
        """Let connections that were held continue; one batch at a time holds a connection."""
        self._held.difference_update(peers)
        self._due.extend(peers)

    def looking(self, peer: str) -> None:
        """A task is to look at what came over a connection."""
        self._unlooked[peer] += 1

    def looked(self, peer: str) -> None:
        """A task has looked at what came over a connection."""
        self._unlooked[peer] -= 1
        if not self._unlooked[peer]:
            del self._unlooked[peer]
            if peer in self._lines:
                self._due.append(peer)
