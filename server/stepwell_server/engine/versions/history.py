"""Where the sessions of each version are now: one entry for each time that sessions left a version.

A record has its session's version, and the model's epoch at that time. Each change of the default that moves
sessions begins an epoch, and rewrites all entries. So an entry leads directly to where its sessions are now,
however many changes lie between: a change is one write, whatever the number of sessions, and finding a session is
one lookup.

The epoch is needed because sessions may leave a version more than once. Those on version 1 before a reset must
restart; those opened on it later must not.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Callable, Collection


class MoveKind(enum.Enum):
    """What happens to the state of a session that moves."""

    CARRY = "carry"
    """The state is unchanged."""
    MIGRATE = "migrate"
    """Functions convert it."""
    RESET = "reset"
    """The session restarts from the initial state of its final version."""


@dataclasses.dataclass(frozen=True, slots=True)
class MigrationStep:
    """One step of a migration."""

    function: str
    target: int
    """The version that the function converts to."""


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """Sessions that were on `source` in an epoch before this one are on `target` now."""

    epoch: int
    source: int
    target: int
    how: MoveKind = MoveKind.CARRY
    migrations: tuple[MigrationStep, ...] = ()
    """The steps that convert their states, in order; empty unless they migrate."""
    others: tuple[tuple[int, int], ...] = ()
    """Ranges of forgotten versions, as first and last number. Their records are like those of `source`, and their
    sessions make the same move."""

    def covers(self, version: int) -> bool:
        """Whether it moves the sessions of a version."""
        return version == self.source or any(first <= version <= last for first, last in self.others)

    def then(self, target: int, how: MoveKind, function: str) -> Move:
        """The move extended by another change."""
        if MoveKind.RESET in (self.how, how):
            return dataclasses.replace(self, target=target, how=MoveKind.RESET, migrations=())
        if how is MoveKind.CARRY:
            return dataclasses.replace(self, target=target)
        steps = (*self.migrations, MigrationStep(function, target))
        return dataclasses.replace(self, target=target, how=MoveKind.MIGRATE, migrations=steps)

    def has_effect_of(self, other: Move) -> bool:
        """Whether it has the same effect on its sessions as another move on its own."""
        return (self.target, self.how, self.migrations) == (other.target, other.how, other.migrations)

    def merged_with(self, move: Move) -> Move:
        """The same move, also for the versions of another one."""
        ranges: list[tuple[int, int]] = []
        for first, last in sorted((*self.others, *move.others, (move.source, move.source))):
            if ranges and first <= ranges[-1][1] + 1:
                ranges[-1] = ranges[-1][0], max(last, ranges[-1][1])
            else:
                ranges.append((first, last))
        return dataclasses.replace(self, others=tuple(ranges))

    def overlaps(self, other: Move) -> bool:
        """Whether both move sessions of one version."""
        ends = [(each, number) for each in (self, other) for pair in each.others for number in pair]
        ends += [(self, self.source), (other, other.source)]
        return any((other if each is self else self).covers(number) for each, number in ends)


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """The moves of one model. Immutable: methods that change it return a new history."""

    epoch: int = 0
    """The number of changes so far that moved sessions."""
    moves: tuple[Move, ...] = ()
    """In the order of their epochs; a source has at most one move per epoch."""

    def of(self, version: int, epoch: int) -> Move | None:
        """The move of sessions that were on `version` in `epoch`; None: they are still there."""
        if epoch >= self.epoch:
            return None
        return next((move for move in self.moves if move.epoch > epoch and move.covers(version)), None)

    def with_move(self, source: int, target: int, how: MoveKind, function: str = "") -> History:
        """The history after sessions have moved from `source` to `target`.

        A move with the same effect as the next one of its version is left out, and so is a final one without
        effect.
        """
        epoch = self.epoch + 1
        former = [move.then(target, how, function) if move.target == source else move for move in self.moves]
        moves: list[Move] = []
        following: dict[int, Move] = {}
        for move in reversed([*former, Move(epoch, source, source).then(target, how, function)]):
            next_one = following.get(move.source) or Move(epoch, move.source, move.source)
            if move.others or not move.has_effect_of(next_one):
                following[move.source] = move
                moves.append(move)
        return History(epoch, tuple(reversed(moves)))

    def without(
        self, free: Collection[int], kept: Collection[int], alike: Callable[[int, int], bool]
    ) -> History:
        """Forget versions without sessions, if their only move has the same effect as a later one.

        The later move must be of a version that is `alike`; it then covers their sessions. A version that sessions
        have left more than once is kept, since its number alone does not identify one move. So is a move of
        forgotten versions whose numbers were reused, by a version that is `kept` or that has a move of its own.
        """
        count = Counter(move.source for move in self.moves)
        left: list[Move] = []
        for move in reversed(self.moves):
            if move.source in free and count[move.source] == 1:
                hosts = (
                    i for i, to in enumerate(left) if to.has_effect_of(move) and alike(to.source, move.source)
                )
                place = next(hosts, None)
                if place is not None and not self._is_used_again(move, kept):
                    left[place] = left[place].merged_with(move)
                    continue
            left.append(move)
        return History(self.epoch, tuple(reversed(left)))

    def _is_used_again(self, move: Move, kept: Collection[int]) -> bool:
        """Whether a number that a move covers also belongs to another version."""
        others = [each for each in self.moves if each is not move and (each.others or move.others)]
        return any(map(move.covers, kept)) or any(each.overlaps(move) for each in others)

    def versions(self) -> set[int]:
        """All versions that some move starts from, ends at or goes through, except forgotten ones."""
        return {
            version
            for move in self.moves
            for version in (move.source, move.target, *(step.target for step in move.migrations))
        }

    def renumbered(self, old: int, new: int) -> History:
        """The history with another number for a version."""
        numbers = {old: new}
        moves = [
            dataclasses.replace(
                move,
                source=numbers.get(move.source, move.source),
                target=numbers.get(move.target, move.target),
                migrations=tuple(
                    MigrationStep(step.function, numbers.get(step.target, step.target))
                    for step in move.migrations
                ),
            )
            for move in self.moves
        ]
        return History(self.epoch, tuple(moves))
