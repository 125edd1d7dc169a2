"""The one path by which changes take effect: stored first, then written to the table, then answered.

If the store could not keep a change, its sessions leave the arena and the table. They are loaded from the store
when they are next used. If another server changed a session meanwhile (a conflict), its change is judged again by
the new record: a retry gets the first answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import Observer, StepWrite
from stepwell_server.engine.commit.group_commit import GroupCommit
from stepwell_server.engine.commit.records import Outcome, Records
from stepwell_server.engine.sizes import Sizes
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import Members
from stepwell_server.errors import OutcomeUnknown, ServerError
from stepwell_server.store import base
from stepwell_server.store.base import ALL_KEPT, SOLE, Batch, CommitResult, OnAnswer, stamped
from stepwell_server.store.record import JoinedPuts, Puts

_NO_HANDLES: Handles = np.zeros(0, np.intp)
Answer = Callable[[ServerError | None, Members | None], None]
"""Called with the error, or None, and the places in the outcome that it is for; None: all of them."""
Rejudge = Callable[[Members], None]
"""Called with places in the outcome whose sessions another server changed; they are claimed and paged out."""


class Recorder:
    """Writes a record of every change to the store. Lives on the event loop; the store's thread also builds records."""

    def __init__(
        self,
        commits: GroupCommit,
        table: SessionTable,
        records: Records,
        *,
        new_stamp: Callable[[], int],
        clock: Clock,
        observer: Observer,
    ) -> None:
        """For `new_stamp` see `Store.new_stamp`."""
        self._commits = commits
        self._table = table
        self._records = records
        self._new_stamp = new_stamp
        self._clock = clock
        self._observer = observer

    @property
    def is_sole(self) -> bool:
        """Whether no other server writes to the store."""
        return self._new_stamp() == SOLE

    def keep(self, outcome: Outcome, sizes: Sizes, done: OnAnswer) -> None:
        """Store an outcome of claimed sessions; `done` is called afterwards, possibly before this returns."""
        count, last_used = len(outcome.handles), self._clock.now()
        outcome.stamp = self._new_stamp()

        def build() -> Batch:
            puts = self._records.of(outcome, last_used)
            if outcome.stamp == SOLE:  # no other server writes there
                return Batch(puts=puts)
            follows = self._table.stamp[outcome.handles]
            if isinstance(puts, JoinedPuts) and np.count_nonzero(follows != follows[0]):
                # records of different lengths are not in the outcome's order
                follows = self._table.stamp[self._table.find_all([session_id for session_id, _ in puts])]
            return Batch(
                puts=puts,
                resized=sizes.resized(outcome) if _may_resize(outcome) else (),
                follows=follows,
                stamps=stamped(outcome.stamp, count),
            )

        self._keep(outcome.model, build, count, done)

    def keep_puts(self, outcome: PackedOutcome, puts: Puts, done: OnAnswer) -> None:
        """Store records of an outcome of claimed sessions in a store of one server: see `keep`."""
        self._keep(outcome.model, lambda: Batch(puts=puts), len(puts), done, (outcome.steps,), puts)

    def _keep(
        self,
        model: Model,
        build: Callable[[], Batch],
        count: int,
        done: OnAnswer,
        steps: Sequence[object] = (),
        puts: Puts | None = None,
    ) -> None:
        clock, began = self._clock, self._clock.monotonic()

        def kept(committed: CommitResult | ServerError) -> None:
            self._observer.stage(model.name, "commit", clock.monotonic() - began, count)
            done(committed)

        self._commits.submit(build, count, kept, is_change=True, steps=steps, puts=puts)


class PackedOutcome(Protocol):
    """The result of changes to some sessions, laid out by compiled code."""

    model: Model
    puts: Puts
    """The records."""
    steps: StepWrite
    """Holds the answers, which the store may send once it has the records: see `Write.steps`."""

    def handles(self) -> Handles:
        """The sessions, which are claimed."""

    def apply(self) -> None:
        """Apply it to the table, end the claims, and answer the callers unless the store has."""

    def fail(self, error: ServerError) -> None:
        """Answer the callers."""


class Committer:
    """Commits outcomes. Lives on the event loop."""

    def __init__(
        self,
        sizes: Sizes,
        recorder: Recorder | None,
        clock: Clock,
        *,
        release: Callable[[Handles], None],
        drop: Callable[[Handles, ServerError], None],
        discard: Callable[[Model, Handles], None],
        watched: Callable[[Outcome, Members | None], None],
    ) -> None:
        self._sizes, self._table = sizes, sizes.table
        self._recorder = recorder
        """None: the arena is the source of truth, and changes are not recorded."""
        self._clock = clock
        self._release = release
        """Ends claims and starts queued operations."""
        self._drop = drop
        """Removes claimed sessions from arena and table because their rows differ from the store."""
        self._discard = discard
        """Removes such sessions from the arena only."""
        self._watched = watched
        """Called with outcomes in the table, while any session is watched; places as for `Answer`."""

    def commit(self, outcome: Outcome, answer: Answer, rejudge: Rejudge) -> None:
        """Commit an outcome of claimed sessions and answer its callers, now or later; then end the claims.

        Neither `answer` nor `rejudge` may raise.
        """
        if self._recorder is None:
            self._set(outcome, answer, None)
            return

        def done(committed: CommitResult | ServerError) -> None:
            if committed is ALL_KEPT:
                self._set(outcome, answer, None)
            elif isinstance(committed, ServerError):
                answer(committed, None)
                self._drop(outcome.handles, committed)
            else:
                self._settle(outcome, committed, answer, rejudge)

        self._recorder.keep(outcome, self._sizes, done)

    def commit_packed(self, outcome: PackedOutcome) -> None:
        """`commit` for a store of one server, which keeps all or nothing."""
        assert self._recorder is not None, "without a store there are no records"

        def done(committed: CommitResult | ServerError) -> None:
            handles = outcome.handles()
            if isinstance(committed, ServerError):
                outcome.fail(committed)
                self._drop(handles, committed)
            else:
                outcome.apply()
                self._release(handles)

        self._recorder.keep_puts(outcome, outcome.puts, done)

    def applied(self) -> None:
        """Sessions that were claimed and committed in this iteration are free; nothing waits for their claims."""
        self._release(_NO_HANDLES)

    @property
    def is_recording(self) -> bool:
        """Whether changes are written to the store."""
        return self._recorder is not None

    @property
    def may_conflict(self) -> bool:
        """Whether other servers write to the store."""
        return self._recorder is not None and not self._recorder.is_sole

    def keeps_sizes(self, model: Model, handles: Sequence[int]) -> bool:
        """Whether replies in the arena leave the sessions as large as they are: no former reply is kept as arrays."""
        if not model.replies.series.keys().isdisjoint(handles):
            return False
        return self._sizes.are_without_arrays(model, np.array(handles, np.intp))

    def _settle(self, outcome: Outcome, committed: CommitResult, answer: Answer, rejudge: Rejudge) -> None:
        """Handle each session by its own result."""
        ids = [self._table.session_id(handle) for handle in outcome.handles.tolist()]
        fates = np.array([committed.of(session_id).value for session_id in ids])
        kept = np.flatnonzero(fates == base.Outcome.KEPT.value)
        unknown = np.flatnonzero(fates == base.Outcome.UNKNOWN.value)
        conflicts = np.flatnonzero(fates == base.Outcome.CONFLICT.value)
        handles = outcome.handles
        if len(kept):
            self._set(outcome.part(kept), answer, kept)
        if len(unknown):
            error = outcome_unknown()
            answer(error, unknown)
            self._drop(handles[unknown], error)
        if len(conflicts):
            self._discard(outcome.model, handles[conflicts])
            rejudge(conflicts)

    def _set(self, outcome: Outcome, answer: Answer, places: Members | None) -> None:
        """Apply what was stored to the table; `places`: part of a larger outcome, None: all."""
        table, handles = self._table, outcome.handles
        if _may_resize(outcome):
            self._sizes.settle(outcome)
        table.revision[handles] = outcome.revisions
        table.position[handles] = outcome.positions
        table.request_id[handles] = outcome.request_ids
        table.digest[handles] = outcome.digests
        table.used[handles] = self._clock.monotonic()
        table.reply[handles] = outcome.replies
        if self._recorder is not None:
            table.recorded[handles] = outcome.revisions
        if outcome.stamp:  # otherwise there is no record
            table.stamp[handles] = outcome.stamp
        if outcome.arrays or outcome.model.replies.series:
            outcome.model.replies.remember(handles, outcome.arrays)
        if table.watched_ids:
            self._watched(outcome, places)
        answer(None, places)
        self._release(handles)


def _may_resize(outcome: Outcome) -> bool:
    """Whether the records may have changed size. Few do, and the check must be free for the others."""
    return bool(outcome.arrays or outcome.model.replies.series or outcome.model.epoch)


def outcome_unknown() -> OutcomeUnknown:
    """The error for a change that the store may or may not have kept."""
    return OutcomeUnknown("the store must confirm the change; it did not answer, and may have kept it")
