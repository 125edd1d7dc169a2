"""Marks of a tape: resets, and other events between two time steps."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

MarkKind: TypeAlias = Literal["reset", "set", "gap", "version"]
"""An event on a tape: rows were reset to the initial state, rows were set to other values, changes are missing on the
tape, or a session moved to another version of its model.
"""
KINDS: tuple[MarkKind, ...] = get_args(MarkKind)
_OF_STATE: tuple[MarkKind, ...] = ("reset", "set")


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """An event between two time steps of a tape.

    Example:
        >>> with session.record() as tape:
        ...     y = session.step(np.ones((1, 3), np.float32))
        ...     session.reset_states()
        ...     y = session.step(np.ones((1, 3), np.float32))
        >>> tape.marks
        [Mark(index=1, kind='reset', rows=(0,))]
    """

    index: int
    """Index of the time step that follows; `len(tape)` if none follows."""
    kind: MarkKind
    """ "reset": rows got the model's initial state. "set": rows got other values. "gap": the session changed in a way
    that the tape does not show, for example by another client. "version": the session moved to another version of its
    model.
    """
    rows: tuple[int, ...]
    """Rows that it concerns, in ascending order."""


class Marks:
    """The marks of a growing tape: at most one of each kind at an index, so that their number is bounded."""

    def __init__(self, rows: int) -> None:
        """`rows`: number of rows of the tape."""
        self._rows = rows
        self._at: dict[int, dict[MarkKind, npt.NDArray[np.bool_]]] = {}

    def add(self, index: int, kind: MarkKind, rows: npt.NDArray[np.intp] | None) -> None:
        """Adds a mark, or adds rows to the mark of this kind. `rows`: None for all.

        A row that is reset several times between two time steps keeps only the last of these marks.
        """
        chosen = np.zeros(self._rows, np.bool_)
        chosen[slice(None) if rows is None else rows] = True
        here = self._at.setdefault(index, {})
        if kind in _OF_STATE:
            for other in _OF_STATE:
                if other in here:
                    here[other] &= ~chosen
        here[kind] = here[kind] | chosen if kind in here else chosen

    def drop(self, index: int) -> None:
        """Drops the marks before an index."""
        for old in [each for each in self._at if each < index]:
            del self._at[old]

    def listed(self, first: int) -> list[Mark]:
        """All marks in their order, with indexes that count from `first`."""
        return [
            Mark(index - first, kind, tuple(np.flatnonzero(here[kind]).tolist()))
            for index, here in sorted(self._at.items())
            for kind in KINDS
            if kind in here and here[kind].any()
        ]
