"""Where sessions are that were on a version of a model: one entry for each time that sessions left a version.

A record says the version that its session was on, and in which epoch of the model. Each change of the default that takes
sessions along begins an epoch, and rewrites all entries: an entry leads to where its sessions are now, however many
changes lie between. So a change is one write, whatever number of sessions follow it, and a session is found by one look.

The epoch is needed as sessions may leave a version more than once. Those that were on version 1 before a reset must begin
again, and those that were opened on it later must not.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Callable, Collection


class MoveKind(enum.Enum):
    """What becomes of the state of a session that moves."""

    CARRY = "carry"
    """It stays as it is."""
    MIGRATE = "migrate"
    """Functions make another of it."""
    RESET = "reset"
    """The session begins again, from the initial state of the version that it ends up on."""


@dataclasses.dataclass(frozen=True, slots=True)
class MigrationStep:
    """One step of a migration."""

    function: str
    target: int
    """The version whose states it makes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """Sessions that were on `source` in an epoch before this one are on `target` now."""

    epoch: int
    source: int
    target: int
    how: MoveKind = MoveKind.CARRY
    migrations: tuple[MigrationStep, ...] = ()
    """What makes their states, one after the other; empty unless they migrate."""
    others: tuple[tuple[int, int], ...] = ()
    """Numbers of forgotten versions, the first and the last of each range: their records are like those of `source`, and
    their sessions do the same."""

    def covers(self, version: int) -> bool:
        """Whether it takes along the sessions of a version."""
        return version == self.source or any(first <= version <= last for first, last in self.others)

    def then(self, target: int, how: MoveKind, function: str) -> Move:
        """The same sessions after one change more."""
        if MoveKind.RESET in (self.how, how):
            return dataclasses.replace(self, target=target, how=MoveKind.RESET, migrations=())
        if how is MoveKind.CARRY:
            return dataclasses.replace(self, target=target)
        steps = (*self.migrations, MigrationStep(function, target))
        return dataclasses.replace(self, target=target, how=MoveKind.MIGRATE, migrations=steps)

    def has_effect_of(self, other: Move) -> bool:
        """Whether it does the same to its sessions as another one to those of its own."""
        return (self.target, self.how, self.migrations) == (other.target, other.how, other.migrations)

    def merged_with(self, move: Move) -> Move:
        """The same, for the versions of another move too."""
        ranges: list[tuple[int, int]] = []
        for first, last in sorted((*self.others, *move.others, (move.source, move.source))):
            if ranges and first <= ranges[-1][1] + 1:
                ranges[-1] = ranges[-1][0], max(last, ranges[-1][1])
            else:
                ranges.append((first, last))
        return dataclasses.replace(self, others=tuple(ranges))

    def overlaps(self, other: Move) -> bool:
        """Whether both take along sessions of one version."""
        ends = [(each, number) for each in (self, other) for pair in each.others for number in pair]
        ends += [(self, self.source), (other, other.source)]
        return any((other if each is self else self).covers(number) for each, number in ends)


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """The moves of one model. A value: what changes it returns another."""

    epoch: int = 0
    """How many changes there have been that took sessions along."""
    moves: tuple[Move, ...] = ()
    """In the order of their epochs; no two of a source have the same."""

    def of(self, version: int, epoch: int) -> Move | None:
        """The move of sessions that were on `version` in `epoch`; None: they are still there."""
        if epoch >= self.epoch:
            return None
        return next((move for move in self.moves if move.epoch > epoch and move.covers(version)), None)

    def with_move(self, source: int, target: int, how: MoveKind, function: str = "") -> History:
        """The history after sessions have gone from `source` to `target`.

        A move that says as much as the next one of its version is left out, and a last one that says nothing.
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
        """The history that forgets versions no session is on: those whose one move says the same as a later one.

        That later one is of a version which is `alike`, and takes their sessions along. A version that sessions have left
        more than once stays, as one number cannot say which of its moves is meant. So does a move of forgotten versions
        whose numbers were used again: by one that is `kept`, or that has a move of its own.
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
        """Whether a number of a move is that of another version too."""
        others = [each for each in self.moves if each is not move and (each.others or move.others)]
        return any(map(move.covers, kept)) or any(each.overlaps(move) for each in others)

    def versions(self) -> set[int]:
        """All versions that some move begins with, ends with or goes through, but forgotten ones."""
        return {
            version
            for move in self.moves
            for version in (move.source, move.target, *(step.target for step in move.migrations))
        }

    def renumbered(self, old: int, new: int) -> History:
        """The history in which a version has another number."""
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
