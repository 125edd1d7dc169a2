"""How a change comes in: its sessions are found, it is checked, too much is refused, and it waits in an inbox.

A change whose sessions are not all in the table waits until the store has said what it has of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles, SessionTable, are_missing
from stepwell_server.engine.change import Change, MustPart
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.eager import Rest, finish, start
from stepwell_server.engine.intake.admission import Admission
from stepwell_server.engine.intake.inbox import MAX_WAITING_BYTES, Held, Inbox
from stepwell_server.engine.intake.parting import parted
from stepwell_server.engine.intake.validation import Refusals, Validation, require_lists
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.loading import Arrivals, Seen
from stepwell_server.engine.sizes import Sizes
from stepwell_server.engine.types import Members
from stepwell_server.errors import Overloaded, ServerError, Stopping
from stepwell_server.store.base import Store

#: Rows of changes that may wait for their sessions to be loaded, over all models.
MAX_LOADING_ROWS = 65_536
_LOAD_AGAIN_S = 0.1
_NOBODY: Members = np.zeros(0, np.intp)

#: Members without a session that are refused in one go: of more others have turns meanwhile.
REFUSED_AT_ONCE = 1024


class Submission:
    """Takes changes. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        directory: Directory,
        arrivals: Arrivals,
        validation: Validation,
        held: Held,
        admission: Admission,
        inboxes: Mapping[int, Inbox],
        commits: GroupCommit,
        store: Store,
        *,
        sizes: Sizes,
        clock: Clock,
    ) -> None:
        self._table = table
        self._directory = directory
        self._arrivals = arrivals
        self._validation = validation
        self._held = held
        self._admission = admission
        self._inboxes = inboxes
        """By the number of the model."""
        self._commits = commits
        self._store = store
        self._sizes, self._quotas = sizes, sizes.quotas
        self._clock = clock
        self.is_accepting = True
        """Changes are taken; else they are refused, since the server is stopping."""
        self._loading: set[asyncio.Task[None]] = set()
        """Changes that wait for their sessions to be loaded."""
        self.loading_rows = 0
        """Theirs."""

    @property
    def is_loading(self) -> bool:
        """A change waits for its sessions to be loaded."""
        return bool(self._loading)

    def require_accepting(self) -> None:
        """Refuse what comes while the server is stopping.

        Raises:
            Stopping: it is.
        """
        if not self.is_accepting:
            raise Stopping("the server is stopping; it was not applied")

    def submit(self, change: Change) -> None:
        """See `Engine.submit`."""
        if not self.is_accepting:
            self.require_accepting()
        if change.reset:
            self._commits.require_room()  # a step waits for its pass, and passes wait for the store
        require_lists(change)
        handles = self._table.find_all(change.session_ids)
        may_be_over = self._clock.monotonic() > self._table.next_end
        if may_be_over or self._arrivals.waiting or are_missing(handles):
            away = self._arrivals.away(change.session_ids, handles)
            if len(away):
                if change.may_part:
                    raise MustPart(away)
                self._load(change)
                return
        try:
            self._take(change, handles, self._directory.here)
        except ServerError as error:
            error.model = change.model_name
            raise

    def _take(self, change: Change, handles: Handles, seen: Seen, *, is_anew: bool = False) -> None:
        """Check a change and put it into its inbox; `is_anew`: its sessions are as the store has them now."""
        missing = np.flatnonzero(handles < 0) if are_missing(handles) else _NOBODY
        if len(missing) == change.size:
            self._refuse_missing(change, missing, seen)
            return
        reply_bytes = change.reply_bytes
        refused: Refusals | None = None
        problem: ServerError | None = None
        try:
            refused = self._validation.check(change, handles)
        except MustPart as part:
            if change.may_part or not part.are_alike:
                raise
            self._take_parts(change, part.members, seen, is_anew=is_anew)
            return
        except ServerError as error:
            problem = error
        is_refused = problem is not None or bool(refused)
        if is_refused and not is_anew and not self._are_as_stored(change, handles):
            # other servers may have made other sessions of these ids, which it fits
            change.reply_bytes = reply_bytes
            if change.may_part:
                raise MustPart(np.arange(change.size))
            self._load(change, anew=True)
            return
        if problem is not None:
            raise problem
        assert refused is not None, "it was checked"
        inbox = self._inboxes[change.model.index]
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
            inbox.put(change)

    def _are_as_stored(self, change: Change, handles: Handles) -> bool:
        """Whether the store says at once that the table has what it has of sessions that are in the table."""
        there = np.flatnonzero(handles >= 0)
        ids = [change.session_ids[place] for place in there.tolist()]
        work = self._store.fetch(ids, self._table.stamp[handles[there]].tolist())
        found = start(work)
        if isinstance(found, Rest):
            found.close()  # it is asked again, in the order of all that names the sessions
            return False
        return all(each.is_known for each in found)

    def _take_parts(self, change: Change, others: Members, seen: Seen, *, is_anew: bool) -> None:
        """Take a change of sessions of several versions: each part fails or goes on by itself."""
        parts = parted(change, others)
        for part in parts:
            try:
                self._take(part, self._directory.find_all(part.session_ids, seen), seen, is_anew=is_anew)
            except ServerError as error:
                part.fail(np.arange(part.size), error)
        change.reply_bytes = sum(part.reply_bytes for part in parts)

    def _charge(self, quotas: Quotas, change: Change) -> Sequence[tuple[Members, ServerError]]:
        """Charge who asks for a change that is held; the members that are refused leave it."""
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

    def _load(self, change: Change, *, anew: bool = False) -> None:
        """Let a change wait until its sessions are in the table, behind what came before for each of them.

        `anew`: as other servers left them.

        Raises:
            Overloaded: too much waits already.
        """
        tensors = [
            array
            for array in ((change.state if change.reset else change.inputs) or {}).values()
            if array.ndim
        ]
        rows = max([len(array) for array in tensors], default=len(change.session_ids))
        count, held = sum(array.nbytes for array in tensors), self._held
        if self.loading_rows and self.loading_rows + rows > MAX_LOADING_ROWS:
            raise Overloaded(
                f"rows waiting for their sessions to be loaded must stay within {MAX_LOADING_ROWS};"
                f" {self.loading_rows} wait and {rows} came",
                retry_after_s=_LOAD_AGAIN_S,
            )
        if held.bytes and held.bytes + count > MAX_WAITING_BYTES:
            raise Overloaded(
                f"input bytes waiting must stay within {MAX_WAITING_BYTES}; {held.bytes} wait and {count} came",
                retry_after_s=_LOAD_AGAIN_S,
            )
        self.loading_rows += rows
        held.bytes += count
        change.members = np.arange(change.size)

        def go_on(seen: Seen) -> None:
            try:
                self._take(change, self._directory.find_all(change.session_ids, seen), seen, is_anew=anew)
            except ServerError as error:
                change.fail(np.arange(change.size), error)

        def ended() -> None:
            self.loading_rows -= rows
            held.bytes -= count

        self._when_loaded(change, change.members, ended, go_on, anew=anew)

    def _when_loaded(
        self,
        change: Change,
        members: Members,
        ended: Callable[[], None],
        go_on: Callable[[Seen], None],
        *,
        anew: bool = False,
    ) -> None:
        """Call `ended`, and `go_on` unless nobody waits for the members any more, when their turn has come."""
        ids = [change.session_ids[member] for member in members.tolist()]

        async def wait() -> None:
            try:
                seen = await self._arrivals.wait(ids, anew=anew)
            except ServerError as error:
                ended()
                change.fail(members, error)
                return
            ended()
            dropped = change.drop(members, self._clock.monotonic())
            if sum(len(some) for some, _ in dropped) < len(members):
                go_on(seen)
                return
            for some, why in dropped:
                change.fail(some, why)

        rest = start(wait())
        if isinstance(rest, Rest):
            task = asyncio.create_task(finish(rest))
            self._loading.add(task)
            task.add_done_callback(self._loading.discard)

    def _refuse_missing(self, change: Change, members: Members, seen: Seen) -> None:
        for group in change.alike(members):
            if len(group) <= REFUSED_AT_ONCE:
                for some, error in self._directory.why_not_all(change.session_ids, group, seen):
                    change.fail(some, error)
                continue
            task = asyncio.create_task(self._refuse_in_pieces(change, group, seen))
            self._loading.add(task)
            task.add_done_callback(self._loading.discard)

    async def _refuse_in_pieces(self, change: Change, members: Members, seen: Seen) -> None:
        for some, error in await self._directory.why_not_many(change.session_ids, members, seen):
            change.fail(some, error)

    def find_again(self, change: Change, members: Members) -> None:
        """Admit members whose sessions have left the table since they were checked, where these are to be had again."""

        def go_on(seen: Seen) -> None:
            self._admission.admit_some(change, self._found_again(change, members, seen))

        self._when_loaded(change, members, lambda: None, go_on)

    def _found_again(self, change: Change, members: Members, seen: Seen) -> Members:
        found = self._directory.find_all([change.session_ids[member] for member in members.tolist()], seen)
        fits = found >= 0
        fits &= self._table.batch_size[found] == change.own_sizes(members)
        fits &= self._table.model[found] == change.model.index
        change.handles[members[fits]] = found[fits]
        change.births[members[fits]] = self._table.birth[found[fits]]
        gone = members[~fits]
        if len(gone):
            self._refuse_missing(change, gone, seen)
        return members[fits]
