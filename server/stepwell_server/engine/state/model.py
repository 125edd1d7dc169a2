"""A loaded version of a model: its program, rows, queued work and costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from stepwell_server.core.cost import Cost
from stepwell_server.core.exactly_once import Kind, prefix_of
from stepwell_server.core.scheduler import Scheduler, Share
from stepwell_server.core.slots import Slots
from stepwell_server.engine.state.arena import Arena
from stepwell_server.engine.state.replies import ReplyMemory
from stepwell_server.engine.state.window_changes import WindowChanges
from stepwell_server.errors import InvalidInput, ModelMismatch
from stepwell_server.program import FINGERPRINT_DIGITS, Program
from stepwell_server.store.record import Texts

#: Under contention a pass takes about this long at most, in seconds, unless its fixed part would exceed this share
#: of it.
SHORT_PASS_S, _MAX_FIXED_SHARE = 0.1e-3, 0.4
#: The same for an iteration of the loop: the pass, if it runs in place, the commit and the answers.
SHORT_ITERATION_S, _MAX_FIXED_SHARE_OF_ITERATION = 0.3e-3, 0.6
#: But so many rows are one pass, unless they take longer than this: with a wide model, passes of a few rows make a
#: third of the steps, and then everyone waits.
_WORTH_ROWS, _WORTH_S = 16, 2e-3


@dataclasses.dataclass(slots=True, eq=False)
class Model:
    """Everything that belongs to one version of a model; `engine` wires what works on it.

    Versions of a name whose records have the same layout share arena, slots and remembered replies.
    """

    index: int
    """Its number in the session table."""
    name: str
    version: int
    program: Program
    arena: Arena
    slots: Slots
    replies: ReplyMemory
    texts: Texts
    """Texts of its sessions' records."""
    sharing: set[int]
    """The numbers of the versions that share its rows, including its own."""
    max_batch_rows: int
    """The most rows of a pass, unless a single change has more."""
    ready: Scheduler[Any]
    """Jobs that wait for a pass."""
    cost: Cost
    """The cost of a pass by its rows, on one thread."""
    work: Share
    """Rung when there is work for the model's loop; its iterations, and its passes on threads."""
    iteration_cost: Cost = dataclasses.field(default_factory=Cost)
    """The cost of an iteration of the model's loop by the rows of its pass, if that runs in place."""
    epoch: int = 0
    """The epoch of its sessions' records: see `engine.versions.history`."""
    left_epoch: int = 0
    """The epoch of records of sessions that moved to another version while work begun on this one was active."""
    digest_prefixes: dict[Kind, np.uint64] = dataclasses.field(init=False)
    """Prefixes of the digests of changes of its sessions: see `core.exactly_once`."""
    changes: WindowChanges | None = dataclasses.field(init=False)
    """How records of steps leave out large windows; None: they have whole rows."""
    is_running: bool = False
    """A pass runs."""
    waiting: int = 0
    """Changes and holds that wait for their session or for rows: see `queues`."""

    def __post_init__(self) -> None:
        dtypes = [(spec.name, str(spec.dtype)) for spec in self.program.inputs]
        dtypes += [(spec.name, str(spec.dtype)) for spec in self.program.state]
        self.digest_prefixes = {kind: prefix_of(kind, dtypes) for kind in Kind}
        self.changes = WindowChanges.of(self.program, self.arena)

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    def require_fingerprint(self, fingerprint: str) -> None:
        """Check the fingerprint that a caller expects; empty: any.

        Raises:
            ModelMismatch: the model has another one.
        """
        own = self.program.fingerprint
        if fingerprint and fingerprint != own:
            raise ModelMismatch(
                f"model_fingerprint must be that of model {self.name!r}, {own[:FINGERPRINT_DIGITS]};"
                f" got {fingerprint[:FINGERPRINT_DIGITS]}",
                model=self.name,
            )

    def require_batch_size(self, batch_size: int) -> None:
        """Check the batch size of a new session.

        Raises:
            InvalidInput: it is less than 1, or more than the arena's rows.
        """
        if not 1 <= batch_size <= self.slots.resident_limit:
            raise InvalidInput(
                f"batch_size must be 1 to resident_rows, {self.slots.resident_limit}; got {batch_size}"
            )

    @property
    def rows_of_a_short_pass(self) -> int:
        """Rows of a pass under contention: few enough for a short wait, but enough to be worth a pass."""
        short = min(
            self.rows_within(SHORT_PASS_S),
            self.iteration_cost.items_within(SHORT_ITERATION_S, _MAX_FIXED_SHARE_OF_ITERATION),
        )
        return short if short >= _WORTH_ROWS else max(short, min(_WORTH_ROWS, self.rows_within(_WORTH_S)))

    def rows_within(self, seconds: float) -> int:
        """Rows of a pass that takes this many seconds on one thread, but enough to be worth a pass."""
        return self.cost.items_within(seconds, _MAX_FIXED_SHARE)

    @property
    def expected_wait_s(self) -> float:
        """The estimated wait of work that arrives now."""
        return self.cost.of(self.ready.rows_waiting)
