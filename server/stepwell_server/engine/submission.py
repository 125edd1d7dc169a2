"""Accepts changes: `submit` finds the sessions, `_take` checks the change, `_queue` puts it into its model's inbox.

A change whose sessions are not all in the table waits for the `Lookup`. If the table's data leads to a refusal, the
session is looked up again and compared with the store, unless the store says at once that the table is right. A
change is split if its members are on several versions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles, SessionTable, are_missing
from stepwell_server.engine.api import OnFailed, StepBatch
from stepwell_server.engine.change import Change
from stepwell_server.engine.commit.group_commit import GroupCommit
from stepwell_server.engine.eager import Rest, finish, start
from stepwell_server.engine.intake.queues import MAX_WAITING_BYTES, Inboxes
from stepwell_server.engine.intake.split import part_of
from stepwell_server.engine.intake.validation import Refusals, Validation, require_lists
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.lookup import Lookup, LookupResult
from stepwell_server.engine.sizes import Sizes
from stepwell_server.engine.types import Mask, Members
from stepwell_server.errors import Overloaded, ServerError, Stopping
from stepwell_server.logs import Log

_log = Log("engine.submission")
#: Rows that may wait for their sessions to be loaded, over all models.
MAX_LOADING_ROWS = 65_536
_RETRY_AFTER_S = 0.1
_NO_MEMBERS: Members = np.zeros(0, np.intp)

#: Members without a session that are refused in one batch; other work runs between batches.
REFUSAL_BATCH_SIZE = 1024


class Submission:
    """Accepts changes. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        directory: Directory,
        lookup: Lookup,
        validation: Validation,
        inboxes: Inboxes,
        commits: GroupCommit,
        *,
        sizes: Sizes,
        clock: Clock,
    ) -> None:
        self._table = table
        self._directory = directory
        self._lookup = lookup
        self._validation = validation
        self._inboxes = inboxes
        self._commits = commits
        self._sizes, self._quotas = sizes, sizes.quotas
        self._clock = clock
        self.is_accepting = True
        """False: the server is stopping, and changes are refused."""
        self._loading: set[asyncio.Task[None]] = set()
        """Tasks of changes that wait for their sessions to be loaded."""
        self.loading_rows = 0
        """The rows of those changes."""

    @property
    def is_loading(self) -> bool:
        """Whether a change waits for its sessions to be loaded."""
        return bool(self._loading)

    def require_accepting(self) -> None:
        """Refuse a request while the server is stopping.

        Raises:
            Stopping: the server is stopping.
        """
        if not self.is_accepting:
            raise Stopping("the server is stopping; the request was not applied")

    def require_open(self) -> None:
        """Refuse a call that begins sessions while the server is stopping or too much waits for the store.

        Raises:
            Stopping, Overloaded: one of these is the case.
        """
        self.require_accepting()
        self._commits.require_room()

    def submit(self, change: Change) -> Members:
        """See `Engine.submit`."""
        if not self.is_accepting:
            self.require_accepting()
        if change.reset:
            self._commits.require_room()  # a step waits for its pass, and passes wait for the store
        table = self._table
        handles = table.find_all(change.session_ids)
        require_lists(change, handles)
        if self._lookup.waiting or are_missing(handles) or self._clock.monotonic() > table.next_end:
            away = self._lookup.away(change.session_ids, handles)
            if len(away) and change.may_skip_members:
                return self._take_without(change, away, self._directory.here)
            if len(away):
                self._look_up(change)
                return _NO_MEMBERS
        elif self._quotas is None and self._run_at_once(change, handles):
            return _NO_MEMBERS
        try:
            left = self._take(change, handles, _NO_MEMBERS, self._directory.here)
            if len(left) and not change.may_skip_members:
                self._look_up(_only(change, left), compare=True)
                return _NO_MEMBERS
        except ServerError as error:
            error.model = change.model_name
            raise
        return left

    def run_batch(self, batch: StepBatch, room: int, fail: OnFailed) -> bool:
        """See `Engine.run_batch`."""
        table = self._table
        if not self.is_accepting or self._quotas is not None or self._lookup.waiting:
            return False
        if self._clock.monotonic() > table.next_end:
            return False
        handle = table.find(batch.first_id)
        return handle is not None and self._inboxes.of[int(table.model[handle])].run_batch(batch, room, fail)

    def _run_at_once(self, change: Change, handles: Handles) -> bool:
        """Run a change whose sessions are in the table, if it is plain and nothing waits. Otherwise it must be checked."""
        change.find_again = self._find_again
        return self._inboxes.of[int(self._table.model[handles[0]])].run_at_once(change, handles)

    def _take_found(self, change: Change, seen: LookupResult) -> Members:
        """`_take` for a change whose sessions were looked up: those that exist are in the table now."""
        handles = self._directory.find_all(change.session_ids, seen)
        missing = np.flatnonzero(handles < 0)
        if len(missing) == change.size:
            self._refuse_missing(change, missing, seen)
            return _NO_MEMBERS
        return self._take(change, handles, missing, seen)

    def _take(self, change: Change, handles: Handles, missing: Members, seen: LookupResult) -> Members:
        """Check a change some of whose sessions exist, and queue it.

        Returns:
            The members that were not taken. If the change must not skip members: those whose sessions are in doubt,
            because
            the store may have newer data.

        Raises:
            ServerError: the change is refused as a whole; no member is answered.
        """
        if change.messages is not None or change.continued_model:
            mismatched = self._validation.mismatched(change, handles)
            if len(mismatched):
                return self._take_without(change, mismatched, seen)
        reply_bytes = change.reply_bytes
        refused: Refusals = []
        problem: ServerError | None = None
        is_doubted = True  # the refusal may be due to outdated data in the table
        try:
            others = self._validation.look(change, handles)
            if len(others):
                return self._take_apart(change, others, seen)
            refused, is_doubted = self._validation.check(change)
        except ServerError as error:
            problem = error
        if is_doubted and not (seen.is_compared or self._directory.are_as_stored(handles[handles >= 0])):
            # other servers may have created other sessions with these ids, which the change fits
            change.reply_bytes = reply_bytes
            return np.arange(change.size)
        if problem is not None:
            raise problem
        self._queue(change, refused, missing, seen)
        return _NO_MEMBERS

    def _queue(self, change: Change, refused: Refusals, missing: Members, seen: LookupResult) -> None:
        """Count and charge a checked change, put it into its model's inbox, and answer the other members.

        Raises:
            ServerError: too much waits, or a quota is exceeded; no member is answered.
        """
        inbox = self._inboxes.of[change.model.index]
        if len(change.members):
            inbox.hold(change)
            if self._quotas is not None:
                for some, why in self._charge(self._quotas, change):
                    change.fail(some, why)
        for member, why in refused:
            change.fail(np.array([member]), why)
        if len(missing):
            self._refuse_missing(change, missing, seen)
        if len(change.members):
            change.find_again = self._find_again
            inbox.put(change)

    def _take_without(self, change: Change, members: Members, seen: LookupResult) -> Members:
        """Take a change without some members; return all that were left out.

        The rest of their messages, and members that must not overtake them, are left out too.
        """
        out = change.with_followers(members)
        rest = np.setdiff1d(np.arange(change.size), out)
        return np.union1d(out, self._take_parts(change, [rest], seen)) if len(rest) else out

    def _take_apart(self, change: Change, others: Members, seen: LookupResult) -> Members:
        """Take a change to sessions of several versions or models as two independent changes."""
        if change.messages is not None:
            others = change.whole_messages(others)
        rest = np.setdiff1d(np.arange(change.size), others)
        # otherwise a single message names sessions of several
        return self._take_parts(change, [rest, others], seen) if len(rest) else others

    def _take_parts(self, change: Change, parts: Sequence[Members], seen: LookupResult) -> Members:
        """Take parts of a change independently; return the members that were not taken. For errors see `part_of`."""
        left, reply_bytes = _NO_MEMBERS, 0
        for members in parts:
            part, own = part_of(change, members), _NO_MEMBERS
            everybody = np.arange(part.size)
            try:
                own = self._take_found(part, seen)
            except ServerError as error:
                if part.messages is None:
                    part.fail(everybody, error)
                else:
                    own = everybody
            except Exception as error:
                part.fail(everybody, _log.internal("a part of a change could not be taken", error))
            left = np.union1d(left, members[own])
            reply_bytes += part.reply_bytes
        change.reply_bytes = reply_bytes
        return left

    def _charge(self, quotas: Quotas, change: Change) -> Sequence[tuple[Members, ServerError]]:
        """Charge the caller of a held change; refused members leave the change."""
        give = change.on_end
        assert give is not None, "it is held"
        try:
            refused, release = quotas.charge_change(change, self._sizes.growth(change))
        except ServerError:
            give()
            raise

        def ended() -> None:
            give()
            release()

        change.on_end = ended
        return refused

    def _look_up(self, change: Change, *, compare: bool = False) -> None:
        """Queue a change until its sessions are in the table, behind earlier changes of each of them.

        With `compare`, the sessions are read as other servers left them.

        Raises:
            Overloaded: too much waits already.
        """
        tensors = [
            array
            for array in ((change.state if change.reset else change.inputs) or {}).values()
            if array.ndim
        ]
        rows = max([len(array) for array in tensors], default=len(change.session_ids))
        count, held = sum(array.nbytes for array in tensors), self._inboxes
        if self.loading_rows and self.loading_rows + rows > MAX_LOADING_ROWS:
            raise Overloaded(
                f"rows waiting for their sessions to be loaded must stay within {MAX_LOADING_ROWS};"
                f" {self.loading_rows} wait, and this call adds {rows}",
                retry_after_s=_RETRY_AFTER_S,
            )
        if held.bytes and held.bytes + count > MAX_WAITING_BYTES:
            raise Overloaded(
                f"input bytes waiting must stay within {MAX_WAITING_BYTES}; {held.bytes} wait, and this call adds {count}",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._count_loading(rows, count)
        change.members = np.arange(change.size)
        waiting = change

        def found(seen: LookupResult) -> Sequence[str]:
            nonlocal waiting
            own = waiting
            self._count_loading(-rows, -count)
            if self._are_dropped(own, own.members):
                return ()
            try:
                left = self._take_found(own, seen)
            except ServerError as error:
                failed(error)
                return ()
            if not len(left):
                return ()
            self._count_loading(rows, count)
            waiting = _only(own, left)
            waiting.members = np.arange(waiting.size)
            return waiting.session_ids

        def failed(error: ServerError) -> None:
            waiting.fail(np.arange(waiting.size), error)

        def unseen(error: ServerError) -> None:
            self._count_loading(-rows, -count)
            failed(error)

        self._when_found(change.session_ids, found, unseen, compare=compare)

    def _count_loading(self, rows: int, byte_count: int) -> None:
        self.loading_rows += rows
        self._inboxes.bytes += byte_count

    def _are_dropped(self, change: Change, members: Members) -> bool:
        """Whether no caller waits for any of the members; if so, they have been answered."""
        dropped = change.drop(members, self._clock.monotonic())
        if sum(len(some) for some, _ in dropped) < len(members):
            return False
        for some, why in dropped:
            change.fail(some, why)
        return True

    def _when_found(
        self,
        session_ids: Sequence[str],
        found: Callable[[LookupResult], Sequence[str]],
        failed: Callable[[ServerError], None],
        *,
        compare: bool = False,
    ) -> None:
        """Look sessions up in order; then call `found` as `Lookup.wait` does, or `failed`."""

        async def wait() -> None:
            try:
                await self._lookup.wait(session_ids, reread=compare, use=found)
            except ServerError as error:
                failed(error)

        rest = start(wait())
        if isinstance(rest, Rest):
            task = asyncio.create_task(finish(rest))
            self._loading.add(task)
            task.add_done_callback(self._loading.discard)

    def _refuse_missing(self, change: Change, members: Members, seen: LookupResult) -> None:
        for group in change.alike(members):
            if len(group) <= REFUSAL_BATCH_SIZE:
                for some, error in self._directory.errors_for(change.session_ids, group, seen):
                    change.fail(some, error)
                continue
            task = asyncio.create_task(self._refuse_in_pieces(change, group, seen))
            self._loading.add(task)
            task.add_done_callback(self._loading.discard)

    async def _refuse_in_pieces(self, change: Change, members: Members, seen: LookupResult) -> None:
        for some, error in await self._directory.errors_for_many(change.session_ids, members, seen):
            change.fail(some, error)

    def _find_again(self, change: Change, members: Members, admit: Callable[[Change, Members], None]) -> None:
        """Look up members whose sessions left the table after the check.

        Members whose sessions exist are admitted; the others are answered.
        """

        def found(seen: LookupResult) -> Sequence[str]:
            if not self._are_dropped(change, members):
                admit(change, self._found_again(change, members, seen))
            return ()

        ids = [change.session_ids[member] for member in members.tolist()]
        self._when_found(ids, found, lambda error: change.fail(members, error))

    def _found_again(self, change: Change, members: Members, seen: LookupResult) -> Members:
        found = self._directory.find_all([change.session_ids[member] for member in members.tolist()], seen)
        fits: Mask = (found >= 0) & (self._table.batch_size[found] == change.own_sizes(members))
        fits &= self._table.model[found] == change.model.index
        change.handles[members[fits]] = found[fits]
        change.births[members[fits]] = self._table.birth[found[fits]]
        gone = members[~fits]
        if len(gone):
            self._refuse_missing(change, gone, seen)
        return members[fits]


def _only(change: Change, members: Members) -> Change:
    """A change of these members only; the change itself if they are all of its members."""
    return change if len(members) == change.size else part_of(change, members)
