"""The one way in which changes become true: kept by the store first, then said by the table, then answered.

If the store could not keep one, its sessions leave the arena and the table: what the store holds is the truth, and
is loaded when they are next named.
"""

from __future__ import annotations

from collections.abc import Callable

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.durability.records import Outcome, Records
from stepwell_server.errors import ServerError
from stepwell_server.store.base import Batch

Answer = Callable[[ServerError | None], None]


class Committer:
    """Makes outcomes true. Lives on the event loop; records are also made by the store's thread."""

    def __init__(
        self,
        table: SessionTable,
        group: GroupCommit,
        records: Records,
        clock: Clock,
        *,
        release: Callable[[Handles], None],
        drop: Callable[[Handles, ServerError], None],
    ) -> None:
        """See the module.

        Args:
            table: The sessions.
            group: Commits to the store.
            records: What the store is to keep.
            clock: For when sessions were last used.
            release: Ends claims and starts what waited.
            drop: Takes claimed sessions whose rows are not what the store holds out of arena and table.
        """
        self._table = table
        self._group = group
        self._records = records
        self._clock = clock
        self._release = release
        self._drop = drop

    @property
    def is_durable(self) -> bool:
        """The store keeps changes before they are true."""
        return self._group.is_durable

    def commit(self, outcome: Outcome, answer: Answer) -> None:
        """Make an outcome true and have its callers answered, now or later; then its sessions' claims end.

        Args:
            outcome: Of claimed sessions.
            answer: Called with None when it is true, else with why it never will be. It must not raise.
        """

        def done(error: ServerError | None) -> None:
            if error is not None:
                answer(error)
                self._drop(outcome.handles, error)
                return
            self._set(outcome)
            answer(None)
            self._release(outcome.handles)

        if not self._group.is_durable:
            done(None)
            return
        last_used = self._clock.now()
        self._group.submit(
            lambda: Batch(puts=self._records.of(outcome, last_used)), len(outcome.handles), done
        )

    def _set(self, outcome: Outcome) -> None:
        table, handles = self._table, outcome.handles
        table.revision[handles] = outcome.revisions
        table.position[handles] = outcome.positions
        table.request_id[handles] = outcome.request_ids
        table.used[handles] = self._clock.monotonic()
        outcome.model.replies.remember(handles, outcome.replies, outcome.arrays)
