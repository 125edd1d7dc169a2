"""What `linearizability` searches with: the value of a session, what may happen to it, and what an order must have."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

from support.checks.history import End, Op

Life = Literal["absent", "live", "closed", "expired"]
State: TypeAlias = Any
"""The state of a model, with its position."""


@dataclasses.dataclass(frozen=True)
class Rollback:
    """A fail-over took the last writes of a session back."""

    at: int
    """When, on the clock of the history."""
    session: str
    writes: int
    """How many of the session's."""
    life: Life
    """The state afterwards."""
    revision: int = 0
    """Of a session that is live afterwards."""


@dataclasses.dataclass(frozen=True)
class Loss:
    """A fail-over may have taken last writes of any session back, and nobody says which. Moments of the history's clock."""

    since: int
    """What was acknowledged before is not lost."""
    low: int
    high: int
    """It happened between these two; from then on nobody asks the old primary."""


@dataclasses.dataclass(frozen=True)
class PermittedEvents:
    """What may happen to sessions besides what callers ask for."""

    idle_s: float = math.inf
    """Seconds without a change after which a session may expire."""
    time_of: Callable[[int], float] = float
    """Seconds, by the clock of the history."""
    rollbacks: Sequence[Rollback] = ()
    losses: Sequence[Loss] = ()
    most_nodes: int = 200_000
    """Of a search: with more of them a session is not judged."""
    ends_after: Callable[[str, float, float], float] | None = None
    """When a session may end by itself at the earliest that was changed last at a moment, from another one on, in seconds;
    beside `idle_s`."""

    def may_end_at(self, session: str, used_at: float, now: float) -> float:
        """When a session may end by itself at the earliest that was changed last at a moment, from another one on."""
        idle_at = used_at + self.idle_s
        return idle_at if self.ends_after is None else min(idle_at, self.ends_after(session, used_at, now))

    @property
    def may_end(self) -> bool:
        """Whether any session may."""
        return self.ends_after is not None or self.idle_s < math.inf


@dataclasses.dataclass(slots=True, eq=False)
class Value:
    """Of the register; `before` is what the last write replaced."""

    life: Life
    revision: int
    state: State
    opened_with: int
    used_at: float
    before: Value | None
    trail: int
    """Tells which writes made it, in which order."""
    op: Op | None = None
    """That wrote it."""
    undone_by: float | None = None
    """It was made by an attempt that is taken back, before this moment; None: it was not."""
    old: Value | None = None
    """What an old primary has, which some servers still ask."""
    old_until: float = -math.inf

    def write(self, item: int, life: Life, op: Op | None = None, **changed: Any) -> Value:
        fields: dict[str, Any] = {
            "revision": self.revision,
            "state": self.state,
            "opened_with": self.opened_with,
            "used_at": self.used_at,
        }
        trail = hash((self.trail, item))
        old = {"old": self.old, "old_until": self.old_until}
        return Value(life=life, before=self, trail=trail, op=op, **(fields | old | changed))

    def split(self, back: Value, loss: Loss) -> Value:
        """Another primary begins with what was before, and this goes on at the old one for a while, if that takes time."""
        if loss.low == loss.high:
            return back
        old = dataclasses.replace(self, old=None)
        trail = hash((back.trail, self.trail, loss.low))
        return dataclasses.replace(back, trail=trail, old=old, old_until=loss.high)

    def left_by_loss(self) -> Iterator[Value]:
        """This, where a fail-over comes back to it: that it was taken back may be lost too, and then it stays."""
        yield self
        if self.undone_by is not None:
            yield dataclasses.replace(self, undone_by=None, trail=hash((self.trail, "stays")))

    def with_old(self, old: Value) -> Value:
        """The current value, with another one at the old primary."""
        return dataclasses.replace(self, trail=hash((self.trail, old.trail)), old=old)

    def old_for(self, item: Item) -> Value | None:
        """The value at the old primary, if a call may have reached it."""
        return self.old if item.low < self.old_until else None

    def stale_for(self, item: Item) -> Iterator[Value]:
        """What may be read beside this: what the old primary has, first by itself, then as a replica that is a little behind."""
        if (old := self.old_for(item)) is None:
            return
        yield old
        before = self.before
        while before is not None and before.old is not None and before.old_until == self.old_until:
            yield before
            before = before.before

    def has(self, op: Op) -> bool:
        """Whether an operation is among its writes."""
        at: Value | None = self
        while at is not None:
            if at.op is op:
                return True
            at = at.before
        return False

    def __str__(self) -> str:
        return f"live at revision {self.revision}" if self.life == "live" else self.life


@dataclasses.dataclass(slots=True, eq=False)
class Item:
    """Calls that the order must contain."""

    kind: Literal["effect", "look", "rollback", "loss", "undo"]
    low: int
    high: float
    op: Op | None = None
    end: End | None = None
    rollback: Rollback | None = None
    must: bool = True
    is_attempt: bool = False
    """An effect that is taken back."""
    loss: Loss | None = None

    def __str__(self) -> str:
        if self.op is None:
            return f"fail-over {self.rollback or self.loss}"
        call, end = self.op.call, self.end
        told = "" if end is None else f" told {end.outcome} revision {end.revision} {end.error}"
        return f"{call.kind} {self.op.number} ({self.low}, {self.high}) expected {call.expected}{told}"
