"""How the changes of a session reach its tapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

import numpy as np

from stepwell._batching.frames import Change
from stepwell._state.infos import ModelInfo, StateSelection
from stepwell._state.tensors import Array
from stepwell._state.trace import TracedStates
from stepwell._tape.frames import Members, Rows, frames_of
from stepwell._tape.reel import STATES, Reel
from stepwell._tape.tape import Tape
from stepwell.errors import InvalidInputError


class Recording(AbstractContextManager[Tape]):
    """Records while its `with` block runs. Using it like a tape, outside of a block, is an error that says so."""

    def __init__(self, block: AbstractContextManager[Tape]) -> None:
        self._block = block

    def __enter__(self) -> Tape:
        return self._block.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._block.__exit__(kind, error, trace)

    def __len__(self) -> int:
        raise _not_a_tape("len()")

    def __getitem__(self, _index: object) -> object:
        raise _not_a_tape("an index")

    def __getattr__(self, name: str) -> object:
        if hasattr(Tape, name) and not name.startswith("__"):
            raise _not_a_tape(f".{name}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _not_a_tape(what: str) -> InvalidInputError:
    return InvalidInputError(
        f"record() must be used in a with block, `with session.record() as tape:`; got {what} of its result"
    )


class Counts(Protocol):
    """The counts of a session."""

    @property
    def revision(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def model_version(self) -> int: ...


def counts_of(session: Counts, before: int) -> Members:
    """A session alone, after a change. `before`: its position before the change."""
    counts = (session.revision, before, session.position, session.model_version)
    return Members(None, *[np.array([count], np.uint64) for count in counts])


def indexes_of(rows: Sequence[int] | None) -> Rows | None:
    """Rows as an array; None and no rows mean all."""
    return np.array(rows, np.intp) if rows else None


def check_recorded(states: object) -> StateSelection:
    """The states that a tape keeps, as a step requests them."""
    if states is True or states is False:
        return "all" if states else "none"
    if states != "last":
        raise InvalidInputError(f"states must be True, False or 'last'; got {states!r:.100}")
    return "last"


def wanted_states(reels: Sequence[Reel]) -> StateSelection:
    """The states that the reels need together."""
    return max([reel.states for reel in reels], key=STATES.index)


def record_step(
    reels: Sequence[Reel],
    change: Change,
    info: ModelInfo,
    members: Members,
    outputs: Mapping[str, Array],
    states: TracedStates,
    rows: Rows | None = None,
) -> None:
    """Appends an applied step to reels. The arguments are those of `frames_of`; `rows`: those of a group's members."""
    rows = indexes_of(change.rows) if rows is None else rows
    frames = frames_of(change, info, members, rows, outputs, states)
    for reel in reels:
        reel.append(frames)
