"""What is asked of the engine and what it answers: plain values, no wire format.

Many changes travel as one `Frame`: a unary Step is a frame of one session, a message of a stream is a
frame of many. Its reply comes as one or more `Part`s, each an event-loop callback to the frame's sink.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.errors import ServerError
from stepwell_server.program import Program

Array = npt.NDArray[np.generic]
#: Tensors by name. The name "" stands for the model's only input or state tensor.
Tensors = Mapping[str, Array]
Members = npt.NDArray[np.intp]


class Select(enum.Enum):
    """Which time steps of the temporal outputs come back."""

    ALL = "all"
    LAST = "last"
    NONE = "none"


@dataclasses.dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as of its last completed change."""

    session_id: str
    model: str
    fingerprint: str
    batch_size: int
    revision: int
    position: int
    created: float
    """Seconds since the epoch."""
    last_used: float
    """Seconds since the epoch."""
    resident: bool


@dataclasses.dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as it is served."""

    name: str
    program: Program
    sessions: int


@dataclasses.dataclass(frozen=True, slots=True)
class Opened:
    """Answer to opening or forking."""

    session: SessionInfo
    resumed: bool = False
    replayed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class StateRead:
    """Answer to reading a state: `(batch_size, ...)` each, in the model's order."""

    state: Mapping[str, Array]
    session: SessionInfo


@dataclasses.dataclass(frozen=True, slots=True)
class Predicted:
    """Answer to a run without a session."""

    outputs: Mapping[str, Array]
    state: Mapping[str, Array]


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """Members of a frame that failed alike. `members` None: all of the frame's."""

    members: Members | None
    error: ServerError


@dataclasses.dataclass(slots=True)
class Part:
    """A part of a frame's reply. Every member of the frame is in exactly one part."""

    members: Members | None
    """Members applied in this part, ascending indexes; None: every member of the frame."""
    revisions: npt.NDArray[np.uint64]
    """After the change, one per applied member."""
    positions: npt.NDArray[np.uint64]
    """After the change, one per applied member."""
    outputs: Mapping[str, Array]
    """Rows of the applied members one after the other, `(rows, T, ...)` or `(rows, ...)`."""
    replayed: bool = False
    """All applied members of this part were answered with a remembered reply."""
    failures: Sequence[Failure] = ()
    last: bool = True
    """No part of this frame follows."""


Sink = Callable[[Part], None]


@dataclasses.dataclass(slots=True, eq=False)
class Frame:
    """The same change for each of many sessions of one model. `eq=False`: a frame is itself.

    Give either `inputs` (a step) or `reset=True` (with `state` None for the model's initial state).
    """

    session_ids: Sequence[str]
    sink: Sink
    inputs: Tensors | None = None
    """`(R, T, features...)` or `(R, features...)`, R the sum of the sessions' batch sizes."""
    reset: bool = False
    state: Tensors | None = None
    """`(R, ...)` each; with `rows`, `(len(rows), ...)`."""
    rows: Sequence[int] | None = None
    """Reset of these rows only; the frame then has one session."""
    expected: npt.NDArray[np.uint64] | None = None
    """One per session; None: applied at any revision."""
    request_ids: npt.NDArray[np.uint64] | None = None
    """One per session; 0 or None: none."""
    batch_sizes: npt.NDArray[np.intp] | None = None
    """Rows of each session as the caller knows them; None: the sessions' own."""
    select: Select = Select.ALL
    deadline: float = float("inf")
    """On the clock's monotonic time. Members that still wait then are dropped unapplied."""
    source: object = None
    """Who sent it: the scheduler takes turns between sources."""
    cancelled: bool = False
    """Set by `Engine.cancel`. Members that still wait are dropped unapplied."""


@dataclasses.dataclass(slots=True)
class StepReply:
    """Answer to a single step."""

    revision: int
    position: int
    outputs: Mapping[str, Array]
    """`(batch_size, T, ...)` or `(batch_size, ...)`; views of arrays that only this answer and its neighbours share."""
    replayed: bool


@dataclasses.dataclass(slots=True, eq=False)
class Single:
    """A step of one session. What many callers send at the same time is worked on together."""

    session_id: str
    inputs: Tensors
    settle: Callable[[StepReply | ServerError], None]
    """Called once, on the event loop, with what became of it."""
    expected: int | None = None
    request_id: int = 0
    batch_size: int | None = None
    """The session's, as the caller knows it; None: not said."""
    select: Select = Select.ALL
    deadline: float = float("inf")
    """On the clock's monotonic time."""
    source: object = None
    """Who sent it."""
    cancelled: bool = False
    """Set by `Engine.cancel`: dropped unapplied if it still waits."""
    frame: Frame | None = None
    """The frame it became, where it was not plain."""


class Observer:
    """What the engine tells of its doings. This one listens to nothing; `metrics` has one that does.

    Called on the event loop; must be quick and must not raise.
    """

    def session_event(self, event: str, model: str, session_id: str) -> None:
        """`event`: opened, resumed, forked, closed, expired."""

    def sessions_opened(self, model: str, count: int) -> None:
        """Many at once by OpenSessions; also told one by one for a single one: never both."""

    def stage(self, model: str, stage: str, seconds: float, count: int) -> None:
        """`count` changes spent `seconds` each in `stage`: wait (for a pass), commit (by a store on disk), total."""

    def pass_done(self, model: str, rows: int, time_steps: int, seconds: float) -> None:
        """A pass ran `rows` rows for `time_steps` time steps."""

    def stepped_alone(self, model: str, seconds: float) -> None:
        """A single step ran at once, alone: `pass_done`, `stage` and `applied` in one."""

    def applied(self, model: str, change: str, count: int, row_steps: int) -> None:
        """`count` changes (`change`: step, reset, predict) were applied: `row_steps` rows x time steps."""

    def failed(self, model: str, reason: str, count: int) -> None:
        """`count` changes were refused with `reason`."""
