"""Values that the engine returns and reports, independent of the wire format. Requests are in `change`."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from stepwell_server.core.callers import Caller
from stepwell_server.core.namespaces import SEPARATOR, inner, prefix_of
from stepwell_server.core.scheduler import Source, source_of
from stepwell_server.core.slots import Rows
from stepwell_server.engine.types import U64, Array, Mask, Members, Tensors
from stepwell_server.errors import ServerError
from stepwell_server.program import Program, TensorSpec


class Select(enum.Enum):
    """Which time steps' outputs or states are returned."""

    ALL = "all"
    LAST = "last"
    NONE = "none"


OnFailed: TypeAlias = "Callable[[ServerError], None]"
"""Gets the error that all steps of a batch must be answered with."""

StepRecords: TypeAlias = tuple[list[str], list[int], bytes, bytes, bytes]
"""Records of a batch: ids, sizes, the ids as `encode_ids` returns them, the records, and their checksums."""
SharedFacts: TypeAlias = tuple[float, bytes, bytes]
"""What a batch's records share: the time in seconds since the epoch, and the fields of sessions without others, which
are not pinned or pinned to their version."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepRules:
    """What compiled code must know to run the single steps of a model."""

    handles: Mapping[str, int]
    """Handles of all sessions by id."""
    model: int
    """The model's number in the session table."""
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    states: Sequence[Array]
    """The arena's states."""
    gaps: Sequence[int]
    """Of those that are rings: a step reads every so many elements. Of others 0."""
    kept: Sequence[Array]
    """The arena's outputs."""
    steps: Array
    """Of each row: the steps since its rings were written as a whole. Empty: there are no rings."""
    digest_weights: Sequence[int]
    digest_prefix: int
    digest_seeds: Mapping[Select, tuple[int, int]]
    """Seeds of digests: without a time axis, and with one."""
    texts: tuple[bytes, int]
    """The texts in its sessions' records, and how many bytes of them are the fingerprint."""
    fields: Mapping[int, bytes]
    """Extension fields of some sessions' records, by handle, without that of their version."""
    fields_of: Callable[[int], bytes]
    """Returns all fields of such a session's record."""


class StepWrite(Protocol):
    """Steps of a batch that are in the arena, and are not committed yet. Their sessions are claimed."""

    def handles(self) -> bytes:
        """Return the handles of its sessions, a column of intp."""

    def withdraw(self) -> bool:
        """Never answer. Returns False if it was answered, because a log has the records."""

    def records(self) -> StepRecords | None:
        """Return the records for the store. None: there is none to keep them."""


class StepKernel(Protocol):
    """Compiled code for the single steps of a model: `Direct`, except for the program and the scheduling."""

    def attach(self, columns: Sequence[Array]) -> None:
        """Use these columns of the session table from now on."""

    def claim(self, batch: Any, now: float) -> bool:
        """Claim the sessions of a batch if all of its steps may run now. False: nothing changed."""

    def watched(self, write: StepWrite, now: float) -> list[tuple[int, list[bytes]]]:
        """Return the sessions of a batch whose watches may report it: their handles and their inputs as bytes."""

    def claimed(self) -> list[int]:
        """Return the handles of the claimed sessions."""

    def cancel(self) -> None:
        """End the claims of a batch that is not written."""

    def given(self, inputs: Sequence[Array], states: Sequence[Array]) -> Any:
        """Return these arrays of an executor for `gather`; they may have more rows than a batch."""

    def results(self, outputs: Sequence[Array], states: Sequence[Array]) -> Any:
        """Return these arrays of an executor for `write`; they may have more rows than a batch."""

    def gather(self, batch: Any, given: Any) -> None:
        """Copy inputs and states of the claimed batch into the executor's arrays."""

    def write(self, batch: Any, results: Any, version: int, shared: SharedFacts | None) -> StepWrite:
        """Write the executor's results to the arena, and lay out records with these facts. If it raises, nothing changed.

        The claims end with `commit`, or when the sessions are dropped because the store failed.
        """

    def commit(self, write: StepWrite, now: float) -> None:
        """Write the steps to the table, end the claims, answer unless that has happened, and count the answers."""


class NewKernel(Protocol):
    """Makes compiled code for a model."""

    def __call__(self, rules: StepRules, /) -> StepKernel:
        """Return the code for a model with these rules."""


@dataclasses.dataclass(slots=True)
class StepBatch:
    """Steps that compiled code has parsed. It has their content, and answers them."""

    handle: Any
    """The compiled code's own object."""
    size: int
    """Number of sessions."""
    first_id: str
    """Id of the first session."""
    connections: Sequence[str]
    """The connections that sent them, each once."""
    caller: Caller | None
    """The caller of all of them; None: there are several."""
    new_kernel: NewKernel

    @property
    def only_source(self) -> Source | None:
        """The source of all of them; None: there are several."""
        if self.caller is None or len(self.connections) > 1:
            return None
        return source_of(self.caller, self.connections[0])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SessionFilter:
    """Selects the sessions that meet all of its conditions."""

    model: str = ""
    """A model, on all its versions, or NAME@VERSION, or NAME:LABEL. Empty: any model."""
    version: int = 0
    """What the list makes of a version or label in `model`, which is the name alone then. 0: any version."""
    tenant: str | None = None
    """The owner; empty: sessions without a tenant; None: sessions of all tenants."""
    prefix: str = ""
    """The beginning of their ids, in the tenant's form."""
    idle_longer_s: float | None = None
    """Not changed, read or resumed for longer than this. None: any."""

    @property
    def ids_begin_with(self) -> str:
        """The beginning of the ids in the table's form."""
        if not self.tenant:
            return self.prefix if self.tenant is None else inner("", self.prefix)
        return prefix_of(self.tenant) + self.prefix

    @property
    def is_by_prefix_alone(self) -> bool:
        """Whether every session matches whose id begins with `ids_begin_with`."""
        return self.tenant != "" and not self.model and self.idle_longer_s is None

    def is_of_tenant(self, session_id: str) -> bool:
        """Whether a session whose id begins with `ids_begin_with` also has the right owner."""
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
    """It expires after this many seconds without use; infinity: never."""
    version: int = 0
    """The model version of its next change; 0: unknown."""
    is_pinned: bool = False
    """It stays on that version even if the default changes."""
    uid: int = 0
    """Distinguishes sessions that had the same id one after the other."""
    request_id: int = 0
    """The request id of its last change; 0: that change had none."""


class SessionPage(list[SessionInfo]):
    """One page of a list of sessions, sorted by id."""

    next: str | None = None
    """The id after which the next page begins; None: this is the last page."""


class SessionPolicy(enum.Enum):
    """What happens to the sessions that follow the default when it moves to another version."""

    KEEP = "keep"
    """They stay on their version."""
    CARRY = "carry"
    """They keep their states under the new weights."""
    MIGRATE = "migrate"
    """A function converts their states."""
    RESET = "reset"
    """They restart from the initial state."""


@dataclasses.dataclass(frozen=True, slots=True)
class VersionInfo:
    """A loaded version of a model."""

    version: int
    fingerprint: str
    is_default: bool
    labels: Sequence[str]
    sessions: int
    """Sessions in memory."""
    source: str
    """The file it came from; empty: unknown."""
    loaded: float
    """Load time, in seconds since the epoch."""
    is_draining: bool
    """It was the default, and will be unloaded when its last session ends."""


@dataclasses.dataclass(frozen=True, slots=True)
class DefaultChange:
    """A request to make a version the default of its model."""

    version: int
    policy: SessionPolicy
    """What happens to the sessions that follow the default."""
    migration: str = ""
    """The function for `MIGRATE`; empty: the only one registered."""
    leaves: bool | None = None
    """Whether the previous default drains; None: if its sessions stay on it."""


@dataclasses.dataclass(frozen=True, slots=True)
class DefaultMove:
    """The result of a change of the default."""

    previous: int
    """The previous default version."""
    sessions: int
    """Sessions in memory that move to the new default."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that is served."""

    name: str
    program: Program
    sessions: int
    """Of all versions."""
    version: int = 0
    """The version of `program`."""
    versions: Sequence[VersionInfo] = ()
    """The loaded versions, ascending."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelStats:
    """Current figures of a model."""

    name: str
    sessions: int
    resident_rows: int
    max_resident_rows: int
    queued_rows: int
    """Rows and changes that wait for a pass or for their session."""
    max_queued_rows: int
    """Changes beyond this are refused."""
    max_pass_rows: int
    queued_bytes: int
    """Waiting input bytes, over all models."""
    uncommitted: int = 0
    """Sessions whose changes wait for the store, over all models."""
    resident_sessions: int = 0
    """Sessions whose state is in memory."""


@dataclasses.dataclass(frozen=True, slots=True)
class OpenResult:
    """The result of opening or forking a session."""

    session: SessionInfo
    resumed: bool = False
    replayed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class OpenManyResult:
    """The result of opening or forking many sessions."""

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
    """`(n,)`: which sessions existed before; None: none did."""
    versions: U64 | None = None
    """`(n,)`: the version of each; None: all are on `version`."""


@dataclasses.dataclass(frozen=True, slots=True)
class StateResult:
    """A state that was read: `(batch_size, ...)` for each tensor, in the model's order."""

    state: Mapping[str, Array]
    session: SessionInfo
    structure: str = ""
    """The model's `Program.structure`."""


@dataclasses.dataclass(frozen=True, slots=True)
class StatesResult:
    """The states of many sessions of one model; members are identified by their index."""

    model: str
    """Empty if no session was read."""
    fingerprint: str
    state: Mapping[str, Array]
    """`(R, ...)` each, in the model's order: the rows of the sessions that were read, one after the other."""
    members: Members
    """The sessions that were read, ascending."""
    sizes: Rows
    """Rows of each session that was read."""
    revisions: U64
    """Their revisions at that time."""
    positions: U64
    """Their positions at that time."""
    errors: Sequence[tuple[Members, ServerError]]
    """The sessions that were not read, and why."""
    version: int = 0
    """Of the model; 0: several versions, or no session was read."""
    are_pinned: bool = False
    """Whether all of them stay on that version."""
    structure: str = ""
    """The model's `Program.structure`; empty: theirs differ."""


@dataclasses.dataclass(frozen=True, slots=True)
class PredictResult:
    """The result of a run without a session."""

    outputs: Mapping[str, Array]
    state: Mapping[str, Array]
    version: int = 0
    """Of the model."""


@dataclasses.dataclass(slots=True)
class ChangeResult:
    """The result of a change of one session."""

    revision: int
    """After the change."""
    position: int
    """After the change."""
    outputs: Tensors
    """`(batch_size, T, ...)` or `(batch_size, ...)`; views of arrays shared with the other sessions of the pass."""
    replayed: bool = False
    """Whether this is the remembered reply to a change that was sent again."""
    states: Tensors = dataclasses.field(default_factory=dict)
    """The requested states: `(rows, T, ...)` or `(rows, ...)`."""
    version: int = 0
    """Of the model, as in `change.Replies`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """How a session was changed."""

    time_steps: int
    """0: it was reset."""
    rows: Sequence[int]
    """The rows that were stepped or reset; empty: all."""
    inputs: Sequence[Array]
    """The inputs of the last time step, `(rows, ...)` each; empty for a reset. Views: copy them to keep them."""


class Origin(Protocol):
    """Says how the sessions of an outcome were changed, to those who watch them."""

    def made(self, place: int, /) -> Made:
        """How the session at this place was changed."""


class Trace(Protocol):
    """Receives the stages of a traced call. Times are on the clock's monotonic time. Called on the event loop."""

    def stage(self, name: str, began: float, ended: float, /) -> None:
        """The call spent this time in a stage: `queue` (until its pass) or `commit` (until the store had it)."""

    def ran(
        self, others: Sequence[Trace], model: str, rows: int, time_steps: int, began: float, ended: float, /
    ) -> None:
        """A pass ran for the traced calls `others`; reported to one of them only."""


class Observer:
    """Receives the engine's events and ignores them; `metrics` has one that counts.

    Called on the event loop. Methods must be quick and must not raise.
    """

    def model_served(self, model: str, program: Program) -> None:
        """A model is now served."""

    def session_event(self, event: str, model: str, session_id: str) -> None:
        """`event`: opened, resumed, forked, closed, expired."""

    def sessions_opened(self, model: str, count: int, event: str = "opened") -> None:
        """Several sessions were opened or forked together; a single one is a `session_event` instead."""

    def session_events(self, event: str, model: str, count: int) -> None:
        """Several sessions were closed, expired or imported together; not reported as single events."""

    def stage(self, model: str, stage: str, seconds: float, count: int) -> None:
        """`count` changes spent `seconds` each in `stage`: wait (for a pass), commit (by a store on disk), total."""

    def pass_done(self, model: str, rows: int, time_steps: int, seconds: float) -> None:
        """A pass ran `rows` rows for `time_steps` time steps."""

    def stepped(self, model: str, session_id: str, rows: int, seconds: float, now: float) -> None:
        """Single steps of this many rows ran without a wait: combines `pass_done`, `stage`, `applied` and `slow`."""

    def slow(self, model: str, session_id: str, seconds: float, now: float) -> None:
        """The slowest step of a pass took `seconds` until its answer at `now`."""

    def applied(self, model: str, change: str, count: int, row_steps: int) -> None:
        """`count` changes (`change`: step, reset, predict) were applied: `row_steps` rows x time steps."""

    def replayed(self, model: str, change: str, count: int) -> None:
        """`count` retries of applied changes (`change`: step, reset, open, fork) got the first answer."""

    def judged_again(self, model: str, count: int) -> None:
        """`count` changes are judged again, because another server changed their sessions."""

    def paged(self, model: str, direction: str, sessions: int, seconds: float) -> None:
        """Sessions were moved together from the store into the arena (`in`) or out of it (`out`)."""
