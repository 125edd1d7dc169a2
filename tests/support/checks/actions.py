"""What may happen to sessions: actions, and programs of them that hypothesis draws. `action_player` does what they say."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

NAMES = "abcdefgh"


@dataclasses.dataclass(frozen=True)
class Open:
    name: str
    batch_size: int
    with_state: bool
    max_idle_s: int = 0
    """Of the session, where sessions expire; 0: no limit of its own."""


@dataclasses.dataclass(frozen=True)
class Change:
    names: tuple[str, ...]
    kind: str
    """step, reset, or again: the last change of each name, as it was."""
    steps: int
    """Time steps; 0: without a time axis."""
    select: str
    expects: str
    """next, stale, ahead or nothing."""
    with_request: bool
    bad: frozenset[int]
    """Members whose input the program refuses."""
    rows: tuple[int, ...] | None
    """For a reset of some rows, or a single step of some."""
    with_state: bool
    single: bool
    cancel: bool
    anew: str
    """For a step: which rows are reset before it: none, some, all; or before its time steps: now and then, each."""
    states: str
    """For a step: which states come back."""
    half: bool
    """Of every other member, or row, only."""


@dataclasses.dataclass(frozen=True)
class Simple:
    kind: str
    """read, close, predict, let go, gate, cancel, settle, tick."""
    name: str
    number: int


@dataclasses.dataclass(frozen=True)
class Fork:
    name: str
    new: str


@dataclasses.dataclass(frozen=True)
class ReadMany:
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ForkMany:
    names: tuple[str, ...]
    new: tuple[str, ...]
    """As many names at least; the first ones count."""


Action = Open | Change | Simple | Fork | ReadMany | ForkMany

names = st.sampled_from(NAMES)
opens = st.builds(Open, names, st.integers(1, 3), st.booleans(), st.sampled_from([0, 0, 12, 30, 80]))
changes = st.builds(
    Change,
    st.lists(names, min_size=1, max_size=5, unique=True).map(tuple),
    st.sampled_from(["step", "step", "step", "step", "reset", "again", "again", "reused"]),
    st.sampled_from([0, 0, 1, 2, 5]),
    st.sampled_from(["ALL", "ALL", "LAST", "NONE"]),
    st.sampled_from(["next", "next", "next", "next", "stale", "ahead", "nothing"]),
    st.sampled_from([True, True, True, False]),
    st.sampled_from([frozenset(), frozenset(), frozenset(), frozenset([0]), frozenset([1, 3])]),
    st.sampled_from([None, None, (0,), (1, 0)]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([False, False, False, False, True]),
    st.sampled_from(["none", "none", "none", "some", "all", "now and then", "each"]),
    st.sampled_from(["NONE", "NONE", "NONE", "LAST", "ALL", "ALL"]),
    st.booleans(),
)
simple = st.builds(
    Simple,
    st.sampled_from(
        ["read", "read", "close", "predict", "let go", "let go", "gate", "cancel", "settle", "tick"]
    ),
    names,
    st.integers(0, 9),
)
forks = st.builds(Fork, names, names)
some_names = st.lists(names, min_size=1, max_size=5, unique=True).map(tuple)
reads = st.builds(ReadMany, some_names)
many_forks = st.builds(
    ForkMany,
    st.lists(names, min_size=1, max_size=3).map(tuple),
    st.lists(names, min_size=3, max_size=3, unique=True).map(tuple),
)
programs = st.lists(
    st.one_of(changes, changes, changes, changes, simple, simple, opens, forks, reads, many_forks),
    min_size=25,
    max_size=100,
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """How the engine is put together."""

    resident_rows: int
    max_batch_rows: int
    threads: bool
    steps: int
    idle: bool


shapes = st.builds(
    Shape,
    st.sampled_from([4, 7, 64]),
    st.sampled_from([3, 8, 64]),
    st.booleans(),
    st.sampled_from([1, 3]),
    st.booleans(),
)
