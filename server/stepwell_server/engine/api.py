"""What the engine answers and tells: plain values, no wire format. What is asked of it is in `change`."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from stepwell_server.core.namespaces import SEPARATOR, inner, prefix_of
from stepwell_server.core.slots import Rows
from stepwell_server.engine.types import U64, Array, Mask, Members, Tensors
from stepwell_server.errors import ServerError
from stepwell_server.program import Program


class Select(enum.Enum):
    """For which time steps outputs, or states, come back."""

    ALL = "all"
    LAST = "last"
    NONE = "none"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SessionFilter:
    """Which sessions are meant: those for which all of it holds."""

    model: str = ""
    """Empty: of any model."""
    tenant: str | None = None
    """Whose; empty: those of no tenant; None: everybody's."""
    prefix: str = ""
    """Of their ids, as the tenant calls them."""
    idle_longer_s: float | None = None
    """Nobody has changed, read or resumed them for longer than this. None: that does not matter."""

    @property
    def ids_begin_with(self) -> str:
        """What the ids begin with, as the table has them."""
        if not self.tenant:
            return self.prefix if self.tenant is None else inner("", self.prefix)
        return prefix_of(self.tenant) + self.prefix

    @property
    def is_by_prefix_alone(self) -> bool:
        """Whether every session fits whose id begins with `ids_begin_with`."""
        return self.tenant != "" and not self.model and self.idle_longer_s is None

    def is_of_tenant(self, session_id: str) -> bool:
        """Whether a session whose id begins so is whose it has to be."""
        return self.tenant != "" or SEPARATOR not in session_id


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
    max_idle_s: float = math.inf
    """It expires when nobody has used it for so many seconds; infinity: never."""
    version: int = 0
    """Of the model, on which its next change runs; 0: it is not known."""
    is_pinned: bool = False
    """It stays on that version, whatever becomes the default."""
    uid: int = 0
    """Tells sessions apart that had the same id one after the other."""
    request_id: int = 0
    """Of its last change; 0: that had none."""


class SessionPage(list[SessionInfo]):
    """Some sessions of a list, in the order of their ids."""

    next: str | None = None
    """The id behind which the next page begins; None: this is the last."""


class SessionPolicy(enum.Enum):
    """What becomes of the sessions that follow the default when it moves to another version."""

    KEEP = "keep"
    """They stay on their version."""
    CARRY = "carry"
    """They go on with their states under the new weights."""
    MIGRATE = "migrate"
    """A function makes their new states of the old ones."""
    RESET = "reset"
    """They begin anew."""


@dataclasses.dataclass(frozen=True, slots=True)
class VersionInfo:
    """A version of a model that is loaded."""

    version: int
    fingerprint: str
    is_default: bool
    labels: Sequence[str]
    sessions: int
    """Those in memory."""
    source: str
    """The file that it came from; empty: it is not known."""
    loaded: float
    """When, in seconds since the epoch."""
    is_draining: bool
    """It was the default, and is to be unloaded when its last session has ended."""


@dataclasses.dataclass(frozen=True, slots=True)
class DefaultChange:
    """A version becomes the default of its model."""

    version: int
    policy: SessionPolicy
    """What becomes of the sessions that follow the default."""
    migration: str = ""
    """The function for `MIGRATE`; empty: the only one there is."""
    leaves: bool | None = None
    """The default before drains; None: if its sessions stay on it."""


@dataclasses.dataclass(frozen=True, slots=True)
class DefaultMove:
    """What a change of the default did."""

    previous: int
    """The version that was the default."""
    sessions: int
    """Those in memory that go to the new one."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as it is served."""

    name: str
    program: Program
    sessions: int
    """Of all versions."""
    version: int = 0
    """That of `program`."""
    versions: Sequence[VersionInfo] = ()
    """Those that are loaded, in their order."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelStats:
    """What a model has and does now."""

    name: str
    sessions: int
    resident_rows: int
    max_resident_rows: int
    queued_rows: int
    """Rows and changes that wait for a pass or for their session."""
    max_queued_rows: int
    """With more of them changes are refused."""
    max_pass_rows: int
    queued_bytes: int
    """Bytes of inputs that wait, over all models."""
    uncommitted: int = 0
    """Sessions whose changes wait for the store, over all models."""


@dataclasses.dataclass(frozen=True, slots=True)
class OpenResult:
    """Answer to opening or forking."""

    session: SessionInfo
    resumed: bool = False
    replayed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class OpenManyResult:
    """Answer to opening or forking many sessions."""

    session_ids: Sequence[str]
    model: str
    fingerprint: str
    batch_size: int
    revisions: U64
    """`(n,)`."""
    positions: U64
    """`(n,)`."""
    uids: U64
    """`(n,)`: see `SessionInfo.uid`."""
    first: SessionInfo
    """The first of them."""
    replayed: bool = False
    version: int = 0
    """Of the model."""
    resumed: Mask | None = None
    """`(n,)`: which existed before; None: none of them did."""
    versions: U64 | None = None
    """`(n,)`: the version of each; None: all are on `version`."""


@dataclasses.dataclass(frozen=True, slots=True)
class StateResult:
    """Answer to reading a state: `(batch_size, ...)` each, in the model's order."""

    state: Mapping[str, Array]
    session: SessionInfo
    structure: str = ""
    """Of its model: `Program.structure`."""


@dataclasses.dataclass(frozen=True, slots=True)
class StatesResult:
    """Answer to reading the states of many sessions of one model; members are named by their index."""

    model: str
    """Empty if none was read."""
    fingerprint: str
    state: Mapping[str, Array]
    """`(R, ...)` each, in the model's order: the rows of those that were read, one session after the other."""
    members: Members
    """Those that were read, ascending."""
    sizes: Rows
    """Rows of each that was read."""
    revisions: U64
    """Of each that was read, when it was read."""
    positions: U64
    """Of each that was read, when it was read."""
    errors: Sequence[tuple[Members, ServerError]]
    """The others, and why."""
    version: int = 0
    """Of the model; 0: they are on several, or none was read."""
    are_pinned: bool = False
    """All of them stay on that version."""
    structure: str = ""
    """Of their model: `Program.structure`; empty: they have different ones."""


@dataclasses.dataclass(frozen=True, slots=True)
class PredictResult:
    """Answer to a run without a session."""

    outputs: Mapping[str, Array]
    state: Mapping[str, Array]
    version: int = 0
    """Of the model."""


@dataclasses.dataclass(slots=True)
class ChangeResult:
    """Answer to a change of one session."""

    revision: int
    """After the change."""
    position: int
    """After the change."""
    outputs: Tensors
    """`(batch_size, T, ...)` or `(batch_size, ...)`; views of arrays that only this answer and its neighbours share."""
    replayed: bool = False
    """It is the remembered answer to a change that was sent again."""
    states: Tensors = dataclasses.field(default_factory=dict)
    """Those that were asked for: `(rows, T, ...)` or `(rows, ...)`."""
    version: int = 0
    """Of the model, as in `change.Replies`."""


class Trace(Protocol):
    """A call that is traced, on its way through the engine. Times are the clock's monotonic ones. On the event loop."""

    def stage(self, name: str, began: float, ended: float, /) -> None:
        """It was in a stage: `queue` (until its pass) or `commit` (until the store had it)."""

    def ran(
        self, others: Sequence[Trace], model: str, rows: int, time_steps: int, began: float, ended: float, /
    ) -> None:
        """A pass of so many rows and time steps ran for `others`, of which it is one: told to one of them."""


class Observer:
    """What the engine tells of its doings. This one listens to nothing; `metrics` has one that does.

    Called on the event loop; must be quick and must not raise.
    """

    def model_served(self, model: str, program: Program) -> None:
        """Sessions of a model may come from now on."""

    def session_event(self, event: str, model: str, session_id: str) -> None:
        """`event`: opened, resumed, forked, closed, expired."""

    def sessions_opened(self, model: str, count: int, event: str = "opened") -> None:
        """Many at once, opened or forked; also told one by one for a single one: never both."""

    def session_events(self, event: str, model: str, count: int) -> None:
        """Many at once: closed, expired, imported. Never told one by one as well."""

    def stage(self, model: str, stage: str, seconds: float, count: int) -> None:
        """`count` changes spent `seconds` each in `stage`: wait (for a pass), commit (by a store on disk), total."""

    def pass_done(self, model: str, rows: int, time_steps: int, seconds: float) -> None:
        """A pass ran `rows` rows for `time_steps` time steps."""

    def stepped_alone(self, model: str, session_id: str, seconds: float, now: float) -> None:
        """A single step ran at once, alone: `pass_done`, `stage`, `applied` and `slow` in one."""

    def slow(self, model: str, session_id: str, seconds: float, now: float) -> None:
        """A step took `seconds` until its answer at `now`: the slowest of a pass."""

    def applied(self, model: str, change: str, count: int, row_steps: int) -> None:
        """`count` changes (`change`: step, reset, predict) were applied: `row_steps` rows x time steps."""

    def replayed(self, model: str, change: str, count: int) -> None:
        """`count` retries of what had been applied (`change`: step, reset, open, fork) got the first answer."""

    def judged_again(self, model: str, count: int) -> None:
        """`count` changes are judged again, because another server has changed their sessions."""

    def paged(self, model: str, direction: str, sessions: int, seconds: float) -> None:
        """Sessions were moved together from the store into the arena (`in`) or out of it (`out`)."""
