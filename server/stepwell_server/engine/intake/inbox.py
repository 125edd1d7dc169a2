"""Where the changes of one model wait for its loop's next turn, in the order in which they came; and how much may.

Rows are limited for each model, bytes of inputs over all of them: what is too much is refused with a delay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

from stepwell_server.core.scheduler import Source
from stepwell_server.engine.change import Change, joined, kind_of, may_join
from stepwell_server.engine.state.model import Model
from stepwell_server.errors import Overloaded

#: Rows that may wait for passes, in passes of full size.
MAX_WAITING_PASSES = 64
#: Bytes of inputs that may wait, over all models.
MAX_WAITING_BYTES = 512 << 20


@dataclasses.dataclass(slots=True)
class Held:
    """What waits over all models: the one count of it."""

    bytes: int = 0
    """Of inputs that wait or run."""
    inboxes: dict[Inbox, None] = dataclasses.field(default_factory=dict)
    """Those in which something waits, in the order in which it came."""


class Inbox:
    """The changes that have come for one model. Lives on the event loop.

    A change is put here when it has been checked; its sessions may be gone by the time it is drained.
    """

    def __init__(self, model: Model, held: Held) -> None:
        """Nothing waits of the model; `held` is of all models."""
        self._model = model
        self._held = held
        self._waiting: list[Change] = []
        self._rows = 0
        self.most_waiting = MAX_WAITING_PASSES * model.max_batch_rows
        """So many rows and changes may wait, unless one change alone has more."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def rows(self) -> int:
        """Rows of the changes that wait here."""
        return self._rows

    @property
    def deadline(self) -> float:
        """The earliest of those that wait here."""
        return min((change.deadline for change in self._waiting), default=float("inf"))

    def is_of(self, source: Source) -> bool:
        """Whether all that waits here was sent by one source."""
        return all(change.only_source == source for change in self._waiting)

    @property
    def waiting(self) -> int:
        """Rows and changes that wait: here, for their session, for rows, for a pass."""
        return self._rows + self._model.ready.rows_waiting + self._model.waiting

    def require_room(self, rows: int, byte_count: int) -> None:
        """Refuse so many rows and bytes of inputs if too much waits already.

        Raises:
            Overloaded: with the time after which there should be room.
        """
        model, held, waiting = self._model, self._held.bytes, self.waiting
        limit = self.most_waiting
        if waiting and waiting + rows > limit:
            raise Overloaded(
                f"rows waiting for model {model.name!r} must stay within {limit}; {waiting} wait and {rows} came",
                retry_after_s=max(0.01, model.expected_wait_s / 2),
            )
        if held and held + byte_count > MAX_WAITING_BYTES:
            raise Overloaded(
                f"input bytes waiting must stay within {MAX_WAITING_BYTES}; {held} wait and {byte_count} came",
                retry_after_s=max(0.01, model.expected_wait_s / 2),
            )

    def hold(self, change: Change) -> None:
        """Count the bytes of a change until every member has its answer.

        Raises:
            Overloaded: too much waits already, and nothing is counted.
        """
        count, held = change.byte_count, self._held
        self.require_room(change.row_count, count)
        held.bytes += count

        def give() -> None:
            held.bytes -= count

        change.on_end = give

    def put(self, change: Change) -> None:
        """Let a change that is held wait for the next turn."""
        if not self._waiting:
            self._held.inboxes[self] = None
        self._waiting.append(change)
        self._rows += change.row_count
        self._model.work.ring()

    def drain(self) -> list[Change]:
        """Take everything that waits."""
        waiting = self._waiting
        if waiting:
            self._waiting, self._rows = [], 0
            del self._held.inboxes[self]
        return waiting


def joined_where_alike(waiting: list[Change]) -> list[Change]:
    """The same, with steps of one row that are alike as one change. What a session was sent stays in its order."""
    if len(waiting) < 2:
        return waiting
    found: list[Change] = []
    groups: dict[Hashable, list[Change]] = {}
    kinds: dict[str, Hashable] = {}
    """The group that each session is in."""

    def end_groups() -> None:
        found.extend(joined(group) for group in groups.values())
        groups.clear()
        kinds.clear()

    for change in waiting:
        if not may_join(change):
            end_groups()
            found.append(change)
            continue
        kind, session_id = kind_of(change), change.session_ids[0]
        if kinds.get(session_id, kind) != kind:
            end_groups()  # what the session was sent before must go first, and is in another group
        kinds[session_id] = kind
        groups.setdefault(kind, []).append(change)
    end_groups()
    return found
