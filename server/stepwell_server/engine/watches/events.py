"""Events of watched sessions, and what a caller wants of them."""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Callable, Collection, Sequence

from stepwell_server.engine.types import Tensors
from stepwell_server.errors import ServerError

#: Bytes of an event besides its tensors.
_EVENT_BYTES = 256
_numbers = itertools.count(1)


class Kind(enum.Enum):
    """What an event reports."""

    PRESENT = "present"
    """The session as it is, without the change that made it so."""
    STEP = "step"
    RESET = "reset"
    ENDED = "ended"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a watch reports."""

    inputs: bool = False
    outputs: bool = False
    states: bool = False
    state_names: Collection[str] = ()
    """State tensors to report; empty: all."""
    revisions: int = 1
    """Report a change after this many changes, unless `interval_s` is set."""
    interval_s: float = 0.0
    """Report a change after this time; 0: by `revisions`."""

    @property
    def what(self) -> tuple[bool, bool, bool, Collection[str]]:
        """The tensors that it reports."""
        return self.inputs, self.outputs, self.states, self.state_names


@dataclasses.dataclass(slots=True, kw_only=True)
class Event:
    """A change of a session, or the session as it is."""

    session_id: str
    kind: Kind
    revision: int
    position: int = 0
    time: float = 0.0
    """Seconds since the epoch."""
    model: str = ""
    uid: int = 0
    version: int = 0
    time_steps: int = 0
    rows: Sequence[int] = ()
    """The rows that were stepped or reset; empty: all."""
    inputs: Tensors = dataclasses.field(default_factory=dict)
    """Of the last time step: `(rows, ...)`."""
    outputs: Tensors = dataclasses.field(default_factory=dict)
    """Of the last time step: `(rows, ...)`."""
    states: Tensors = dataclasses.field(default_factory=dict)
    """`(batch_size, ...)`."""
    skipped: int = 0
    """Changes since the session's previous event that were not due, or not seen by this server."""
    dropped: int = 0
    """Changes since then that were due while the queue was full."""
    from_store: bool = False
    """Another server made the change."""
    error: ServerError | None = None
    """Why the session ended."""
    sample: int = 0
    """Number of the `Sample` that it is made of; 0: none."""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of its tensors."""
        tensors = (self.inputs, self.outputs, self.states)
        return sum(array.nbytes for each in tensors for array in each.values())

    @property
    def byte_count(self) -> int:
        """Bytes that it takes in a queue, about."""
        return _EVENT_BYTES + self.tensor_bytes


@dataclasses.dataclass(kw_only=True)
class Sample:
    """A session at one revision. Its tensors are copied when the first watch needs them; all watches share them."""

    kind: Kind
    session_id: str
    uid: int
    revision: int
    position: int
    model: str
    version: int
    time: float
    read: Callable[[str], Tensors]
    """Copies the "inputs", the "outputs" or the "states" of the session, which is claimed now."""
    time_steps: int = 0
    rows: Sequence[int] = ()
    is_elsewhere: bool = False
    """Another server made the last change."""

    def __post_init__(self) -> None:
        self._known: dict[str, Tensors] = {}
        self._number = next(_numbers)

    def _read(self, what: str) -> Tensors:
        found = self._known.get(what)
        if found is None:
            found = self._known[what] = self.read(what)
        return found

    def event(self, wanted: Wanted, kind: Kind, *, from_store: bool = False) -> Event:
        """An event of this kind: that of the sample, or `PRESENT`."""
        event = Event(
            session_id=self.session_id,
            kind=kind,
            revision=self.revision,
            position=self.position,
            time=self.time,
            version=self.version,
            from_store=from_store,
            sample=self._number,
        )
        if kind is Kind.PRESENT:
            event.model, event.uid = self.model, self.uid
        else:
            event.time_steps, event.rows = self.time_steps, self.rows
        if kind is Kind.STEP:
            event.inputs = self._read("inputs") if wanted.inputs else {}
            event.outputs = self._read("outputs") if wanted.outputs else {}
        if wanted.states:
            states, names = self._read("states"), wanted.state_names
            event.states = {name: states[name] for name in states if name in names} if names else states
        return event
