"""What has come over the wire, in the order in which it is done: tenants, callers and connections take turns.

What came over one connection is done in its order. While several are about, what would keep the event loop for long (a
large batch, the beginning of calls) is done a little at a time, so that whoever sends much of it does not hold up the
others: tenants take turns, then the callers of a tenant, then the connections of a caller, as in `core.scheduler`.
Whoever is alone does not wait.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Callable, Collection
from typing import Any

#: So long after two connections had something to do both are about, in seconds.
COMPANY_S = 0.05
#: Sessions of a batch that is done a batch at a time.
LARGE = 64
#: What may be begun in one turn while others are about: tasks, and large batches.
_TASKS, _LARGE_BATCHES = 1, 1
#: Tasks that begin in one turn for a connection that is alone: who comes meanwhile waits for them.
_MAX_TASKS = 32


class Kind(enum.Enum):
    """What an arrival is."""

    BATCH = enum.auto()
    """Plain steps: done at once, but not before tasks have looked at what came before over the same connections."""
    TASK = enum.auto()
    """A task has to look at it, in the next turn of the event loop."""
    EVENT = enum.auto()


@dataclasses.dataclass(slots=True, eq=False)
class _Item:
    kind: Kind
    size: int
    peers: Collection[str]
    what: Any
    behind: int
    """Connections on which something is before it."""


class Arrivals:
    """What has come and is not done. Lives on the event loop."""

    def __init__(
        self, do: Callable[[Any], None], now: Callable[[], float], whose: Callable[[str], tuple[str, str]]
    ) -> None:
        """`do` does one of them; `whose` says the tenant and the caller of a connection, empty: unknown."""
        self._do = do
        self._now = now
        self._whose = whose
        self._lines: dict[str, collections.deque[_Item]] = {}
        """By connection, in the order of their turns."""
        self._unlooked: collections.Counter[str] = collections.Counter()
        """Of each connection, what tasks have not looked at yet."""
        self._held: set[str] = set()
        """Connections of which a batch is not done whole."""
        self._turns: dict[tuple[str, str], int] = {}
        """When each tenant (`(TENANT, "")`) and each caller last had what is done a little at a time, in such turns."""
        self._turn = 0
        self._latest = ""
        self.has_company = False
        """Several connections are about, when something came or was done last."""
        self._company_until = 0.0

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(
        self, kind: Kind, peers: Collection[str], what: Any, size: int = 1, *, is_all: bool = False
    ) -> None:
        """Put what came over some connections behind what came before over them.

        `is_all`: nothing else has come. Then there is no order to find, and if nothing waits either it is done at once.
        """
        first = next(iter(peers), "")
        if len(peers) > 1 or first != self._latest:
            if self._latest:
                self.has_company, self._company_until = True, self._now() + COMPANY_S
            self._latest = first
        elif self.has_company:
            self.has_company = self._now() < self._company_until
        if is_all and not (self._lines or self._unlooked or self._held or self.has_company):
            self._do(what)
            return
        item = _Item(kind, size, peers, what, 0)
        for peer in peers:
            line = self._lines.get(peer)
            if line is None:
                line = self._lines[peer] = collections.deque()
            item.behind += bool(line)
            line.append(item)

    def go_on(self, *, is_extra: bool = False) -> bool:
        """Do what may be done in this turn, in turn; whether it was a large batch, while others are about.

        `is_extra`: it is no turn for large batches, unless nobody else is about.
        """
        # after a long turn the last arrival is long ago, and several connections may wait all the same
        alone = len(self._lines) <= 1 and (not self.has_company or self._now() >= self._company_until)
        tasks, large = _MAX_TASKS, 1 << 30
        if not alone:
            tasks, large = _TASKS, 0 if is_extra else _LARGE_BATCHES
        went_on, was_large = True, False
        while went_on and self._lines:
            went_on = False
            for peer in list(self._lines) if alone else self._in_turn():
                line = self._lines.get(peer)
                while line:
                    item = line[0]
                    if not self._held.isdisjoint(item.peers):
                        break
                    if item.kind is Kind.TASK:
                        if not tasks:
                            break
                        tasks -= 1
                    elif item.kind is Kind.BATCH:
                        if item.behind or not self._unlooked.keys().isdisjoint(item.peers):
                            break
                        if item.size >= LARGE:
                            if not large:
                                break
                            large -= 1
                            was_large = not alone
                    went_on = True
                    if not alone and (item.kind is Kind.TASK or item.size >= LARGE):
                        self._had_turn(item)
                    self._taken(item)
                    self._do(item.what)
                    if item.kind is Kind.TASK and not alone:
                        break  # the next connection's turn
        return was_large

    def _in_turn(self) -> list[str]:
        """Connections on which something waits, those first whose tenant, and then whose caller, has waited longest."""
        turns = self._turns

        def latest(peer: str) -> tuple[int, int]:
            tenant, caller = self._whose(peer)
            return turns.get((tenant, ""), 0), turns.get((tenant, caller), 0)

        return sorted(self._lines, key=latest) if len(self._lines) > 1 else list(self._lines)

    def _had_turn(self, item: _Item) -> None:
        self._turn += 1
        for peer in item.peers:
            tenant, caller = self._whose(peer)
            self._turns[tenant, ""] = self._turns[tenant, caller] = self._turn

    def _taken(self, item: _Item) -> None:
        for peer in item.peers:
            line = self._lines.pop(peer)
            line.popleft()
            if line:
                self._lines[peer] = line  # at the end of the round
                line[0].behind -= 1
        if not self._lines:
            self._turns.clear()

    def hold(self, peers: Collection[str]) -> None:
        """Do nothing more of some connections, until `release`: the batch that was just done has parts left."""
        self._held.update(peers)

    def release(self, peers: Collection[str]) -> None:
        """Go on with connections that were held; one batch at a time holds a connection."""
        self._held.difference_update(peers)

    def looking(self, peer: str) -> None:
        """A task is to look at what came over a connection."""
        self._unlooked[peer] += 1

    def looked(self, peer: str) -> None:
        """A task has looked at what came over a connection."""
        self._unlooked[peer] -= 1
        if not self._unlooked[peer]:
            del self._unlooked[peer]
