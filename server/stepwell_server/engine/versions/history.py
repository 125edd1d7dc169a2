"""How sessions get from one version of a model to another: the log of a model's moves, and the way of a session in it.

A record says the version that its session was on and the epoch in which that was so. The moves of later epochs bring it
to where it is now, whenever it is looked at: so a move is one entry here, however many sessions make it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Collection, Sequence


class How(enum.Enum):
    """What becomes of the state of a session that moves."""

    CARRY = "carry"
    """It goes on as it is."""
    MIGRATE = "migrate"
    """A function makes another of it."""
    RESET = "reset"
    """The session begins anew, from the initial state of the version that it ends up on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """Sessions that were on one version in an earlier epoch than this one go to another."""

    epoch: int
    source: int
    target: int
    how: How
    function: str = ""
    """The name of what migrates."""
    until: int = 0
    """The epoch in which they are there then: later than `epoch` where several moves were put together."""

    def says_as(self, other: Move) -> bool:
        """Whether it does the same to sessions of its source as another one to those of its own."""
        own = self.target, self.how, self.function, self.until
        return own == (other.target, other.how, other.function, other.until)


Way = Sequence[Move]
"""The moves that a session makes, one after the other; none: it stays."""


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """The moves of one model. A value: what changes it returns another."""

    epoch: int = 0
    """How many moves there have been."""
    moves: tuple[Move, ...] = ()
    """In the order of their epochs; no two of a source have the same."""

    def way(self, version: int, epoch: int) -> tuple[int, Way]:
        """Where a session goes that was on `version` in `epoch`: the version that it is on now, and by which moves."""
        if epoch >= self.epoch:
            return version, ()
        way: list[Move] = []
        for move in self.moves:  # in their order: one that was passed is of an earlier epoch
            if move.source == version and move.epoch > epoch:
                way.append(move)
                version, epoch = move.target, move.until
        return version, way

    def with_move(self, source: int, target: int, how: How, function: str = "") -> History:
        """The history with one move more.

        Moves that led to `source` are put together with it where one move says as much, so that whoever moved a
        hundred times does not need a hundred moves.
        """
        epoch = self.epoch + 1
        moves: list[Move] = []
        for move in self.moves:
            is_next = move.target == source and not self._leaves(source, move.until)
            joined = self._joined(move, target, how, epoch) if is_next else move
            if not (
                joined.source == joined.target
                and joined.how is How.CARRY
                and not self._leaves(joined.source, joined.epoch)
            ):
                moves.append(joined)
        moves.append(Move(epoch, source, target, how, function, epoch))
        return History(epoch, tuple(moves))

    def follower_in(self, epoch: int) -> int | None:
        """A version whose moves a session makes that followed the default in an epoch; None: there were none since."""
        return next((move.source for move in self.moves if move.epoch > epoch), None)

    def compacted(self, forgettable: Collection[int], alike: Callable[[int, int], bool]) -> History:
        """The history in which of neighbours that say the same of versions which are `alike` only the last one is left.

        It says what sessions do that followed the default on the others, by `follower_in`. A version loses all of its
        moves or none.
        """
        free = set(forgettable)
        while True:
            left: list[Move] = []
            for move in reversed(self.moves):
                says_more = not left or not move.says_as(left[-1]) or not alike(move.source, left[-1].source)
                if says_more or move.source not in free:
                    left.append(move)
            gone = {move.source for move in self.moves} - {move.source for move in left}
            lost = {move.source for move in self.moves if move not in left}
            needed = (lost - gone) | (gone & {move.target for move in left})
            if not needed:
                return History(self.epoch, tuple(reversed(left)))
            free -= needed

    def versions(self) -> set[int]:
        """All versions that some move begins or ends with."""
        return {version for move in self.moves for version in (move.source, move.target)}

    @staticmethod
    def _joined(move: Move, target: int, how: How, epoch: int) -> Move:
        """A move, and the new one, which is its next."""
        if how is How.RESET:  # whatever it was before
            return Move(move.epoch, move.source, target, How.RESET, "", epoch)
        if how is How.CARRY and move.how is not How.MIGRATE:
            return Move(move.epoch, move.source, target, move.how, "", epoch)
        return move

    def renumbered(self, old: int, new: int) -> History:
        """The history in which a version has another number."""
        numbers = {old: new}
        return History(
            self.epoch,
            tuple(
                dataclasses.replace(
                    move,
                    source=numbers.get(move.source, move.source),
                    target=numbers.get(move.target, move.target),
                )
                for move in self.moves
            ),
        )

    def _leaves(self, version: int, epoch: int) -> bool:
        """Whether a later move begins with a version."""
        return any(move.source == version and move.epoch > epoch for move in self.moves)
