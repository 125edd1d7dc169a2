"""How frames become jobs: order per session, the exactly-once rule, bounded queues."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.claims import Claims
from stepwell_server.core.exactly_once import Verdict, judge
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import Members, Observer
from stepwell_server.engine.call import Call
from stepwell_server.engine.durability.committer import Change, Keeper
from stepwell_server.engine.framecall import too_late
from stepwell_server.engine.intake.paging import Pager
from stepwell_server.engine.intake.row_queue import Parking
from stepwell_server.engine.job import Job
from stepwell_server.engine.state.model import ServedModel
from stepwell_server.engine.state.replies import Kept
from stepwell_server.errors import Overloaded, RevisionConflict, ServerError

#: Changes that may wait in one session's line.
MAX_LINE = 256
#: Rows that may wait for passes, in passes of full size.
MAX_WAITING_PASSES = 64
#: Bytes of inputs that may wait, over all models.
MAX_WAITING_BYTES = 512 << 20


class Hold:
    """A turn in a session's line for something that is no change: a read, a fork, the closing."""

    __slots__ = ("deadline", "granted", "rows")

    def __init__(self, granted: asyncio.Future[None], deadline: float, *, rows: bool) -> None:
        self.granted = granted
        self.deadline = deadline
        self.rows = rows


Waiter: TypeAlias = "tuple[Call, int] | Hold"


class Admission:
    """Takes frames in, claims their sessions and hands jobs to the models' loops."""

    def __init__(
        self,
        table: SessionTable,
        models: Sequence[ServedModel],
        *,
        clock: Clock,
        observer: Observer,
        pager: Pager,
        keeper: Keeper,
    ) -> None:
        self._pager = pager
        self._keeper = keeper
        keeper.release = self.release
        self._table = table
        self._models = models
        self._clock = clock
        self._observer = observer
        self._claims: Claims[Waiter] = Claims(table)
        self._parking = Parking(table, models, pager, self._start_parked)
        self._parking.release = self.release
        self._waiters: Counter[int] = Counter()
        self.bytes_waiting = 0

    def waiting(self, model: int) -> int:
        """Rows and changes of a model that wait for a pass or for their session."""
        return self._models[model].loop.rows_waiting + self._waiters[model] + self._parking.count(model)

    @property
    def has_parked(self) -> bool:
        """Changes wait for their sessions' rows."""
        return bool(self._parking)

    def require_room(self, call: Call) -> None:
        """Refuse a frame if too much waits already.

        Raises:
            Overloaded: with the time after which there should be room.
        """
        self.require_rows(call.model, call.row_count)
        self.require_bytes(call.model, call.byte_count)

    def require_bytes(self, model: int, count: int) -> None:
        """Refuse `count` bytes of inputs if too many wait already.

        Raises:
            Overloaded: with the time after which there should be room.
        """
        if self.bytes_waiting and self.bytes_waiting + count > MAX_WAITING_BYTES:
            raise Overloaded(
                f"input bytes waiting must stay within {MAX_WAITING_BYTES};"
                f" {self.bytes_waiting} wait and {count} came",
                retry_after_s=max(0.01, self._models[model].loop.expected_wait_s() / 2),
            )

    def require_rows(self, model: int, count: int, gathered: int = 0) -> None:
        """Refuse `count` rows if too many wait already; `gathered` wait elsewhere.

        Raises:
            Overloaded: with the time after which there should be room.
        """
        loop = self._models[model].loop
        limit = MAX_WAITING_PASSES * loop.max_batch_rows
        waiting = self.waiting(model) + gathered
        if waiting and waiting + count > limit:
            raise Overloaded(
                f"rows waiting for model {self._models[model].name!r} must stay within {limit};"
                f" {waiting} wait and {count} came",
                retry_after_s=max(0.01, loop.expected_wait_s() / 2),
            )

    def admit(self, call: Call, members: Members) -> None:
        """Start members of a frame, or put them in their sessions' lines."""
        self.bytes_waiting += call.byte_count
        call.on_end = lambda: self._let_go(call)
        self._admit(call, members)

    def _admit(self, call: Call, members: Members) -> None:
        handles = call.handles[members]
        claimed = self._table.claimed[handles]
        if claimed.any():
            self._line_up(call, members[claimed])
            members = members[~claimed]
        if len(members):
            self._start_first(call, members)

    def _let_go(self, call: Call) -> None:
        self.bytes_waiting -= call.byte_count

    def claim(self, handles: Handles) -> None:
        """Claim sessions that have nothing under way, for something that is no change and needs no rows."""
        self._claims.claim(handles)

    async def hold(self, handle: int, deadline: float, *, rows: bool = True) -> None:
        """Claim one session for something that is no change, when its turn comes.

        Args:
            handle: The session.
            deadline: On the clock's monotonic time.
            rows: The session's rows are needed.

        Raises:
            DeadlineExceeded, SessionGone, Overloaded: it did not come.
        """
        if not self._table.claimed[handle]:
            error = self._claim_one(handle, rows=rows)
            if error is not None:
                self.release(np.array([handle]))
                raise error
            return
        if self._claims.waiting(handle) >= MAX_LINE:
            raise self._line_full(handle)
        hold = Hold(asyncio.get_running_loop().create_future(), deadline, rows=rows)
        self._waiters[int(self._table.model[handle])] += 1
        self._claims.wait(handle, hold)
        try:
            await hold.granted
        except asyncio.CancelledError:
            granted = hold.granted
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self.release(np.array([handle]))  # the turn came in the same moment
            raise

    def _claim_one(self, handle: int, *, rows: bool) -> ServerError | None:
        """Claim a session; return why its rows cannot be had, if they are needed."""
        handles = np.array([handle])
        self._claims.claim(handles)
        if not rows:
            return None
        return self._pager.page_in(self._models[self._table.model[handle]], handles).get(handle)

    def release(self, handles: Handles) -> None:
        """End claims and start what waited for them."""
        due = self._claims.release(handles)
        while due:
            again: list[int] = []
            calls: dict[Call, list[int]] = {}
            for handle, waiter in due:
                self._waiters[int(self._table.model[handle])] -= 1
                if isinstance(waiter, Hold):
                    again += [] if self._grant(waiter, handle) else [handle]
                elif self._skip(*waiter):
                    again.append(handle)
                else:
                    calls.setdefault(waiter[0], []).append(waiter[1])
            for call, members in calls.items():
                chosen = np.sort(np.array(members, np.intp))
                again += self._start_claimed(call, chosen).tolist()
            due = self._claims.release(np.array(again, np.intp)) if again else []
        self._parking.room_may_have_come()

    def room_may_have_come(self) -> None:
        """Rows can be had that could not be had before: let in who waits for them. Claims that end say so by themselves."""
        self._parking.room_may_have_come()

    def close_line(self, handle: int, model: int, error: ServerError) -> None:
        """Refuse what waited for a session that has gone away, of the model of that number."""
        for waiter in self._claims.drop_line(handle):
            self._waiters[model] -= 1
            if isinstance(waiter, Hold):
                if not waiter.granted.done():
                    waiter.granted.set_exception(error)
            else:
                waiter[0].fail(np.array([waiter[1]]), error)
        self._parking.room_may_have_come()

    def _grant(self, hold: Hold, handle: int) -> bool:
        """Whether the turn is taken."""
        if hold.granted.done():
            return False
        if self._clock.monotonic() >= hold.deadline:
            hold.granted.set_exception(too_late())
            return False
        error = self._claim_one(handle, rows=hold.rows)
        if error is not None:
            hold.granted.set_exception(error)
            return False
        hold.granted.set_result(None)
        return True

    def _skip(self, call: Call, member: int) -> bool:
        dropped = call.drop(np.array([member]), self._clock.monotonic())
        for members, error in dropped:
            call.fail(members, error)
        return bool(dropped)

    def _line_up(self, call: Call, members: Members) -> None:
        for member in members.tolist():
            handle = int(call.handles[member])
            if self._claims.waiting(handle) >= MAX_LINE:
                call.fail(np.array([member]), self._line_full(handle))
            else:
                self._waiters[call.model] += 1
                self._claims.wait(handle, (call, member))

    def _line_full(self, handle: int) -> Overloaded:
        model = self._models[self._table.model[handle]]
        return Overloaded(
            f"changes waiting for session {self._table.session_id(handle)!r} must stay within {MAX_LINE}",
            retry_after_s=max(0.01, model.loop.expected_wait_s()),
        )

    def _start_first(self, call: Call, members: Members) -> None:
        """Start members, those of a session that is named again after its first one."""
        handles = call.handles[members]
        first = np.unique(handles, return_index=True)[1] if call.may_repeat else handles
        if len(first) == len(handles):
            self._start(call, members)
            return
        is_first = np.zeros(len(members), np.bool_)
        is_first[first] = True
        self._start(call, members[is_first])
        self._admit(call, members[~is_first])

    def _start(self, call: Call, members: Members) -> None:
        freed = self._start_claimed(call, members)
        if len(freed):
            self.release(freed)

    def _start_claimed(self, call: Call, members: Members) -> Handles:
        """Claim, judge and start members whose turn it is; return sessions that are done with already."""
        handles = call.handles[members]
        self._claims.claim(handles)
        if self._parking.count(call.model):
            # who came before has not found room yet: only those that need none go on
            absent = self._table.row[handles] < 0
            if absent.any():
                self._parking.park(call, members[absent])
                members, handles = members[~absent], handles[~absent]
        return self._bring_in(call, members, handles, self._parking.park)

    def _start_parked(self, call: Call, members: Members) -> Handles:
        """Start members that waited for rows, unless they should not go on; as `_start_claimed`."""
        done: list[Handles] = []
        for dropped, error in call.drop(members, self._clock.monotonic()):
            done.append(call.handles[dropped])
            members = np.setdiff1d(members, dropped)
            call.fail(dropped, error)
        if len(members):
            done.append(self._bring_in(call, members, call.handles[members], self._parking.put_back))
        return np.concatenate(done) if done else call.handles[:0]

    def _bring_in(
        self, call: Call, members: Members, handles: Handles, park: Callable[[Call, Members], None]
    ) -> Handles:
        """Have the rows of claimed sessions and judge their members, or let them wait for rows."""
        if not len(members):
            return handles
        refused = self._pager.page_in(self._models[call.model], handles)
        if not refused:
            return self._judge(call, members, handles)
        out = np.isin(handles, list(refused))
        failed: list[int] = []
        parked: list[int] = []
        for member, handle in zip(members[out].tolist(), handles[out].tolist(), strict=True):
            if isinstance(refused[handle], Overloaded):
                parked.append(member)
            else:
                call.fail(np.array([member]), refused[handle])
                failed.append(handle)
        park(call, np.array(parked, np.intp))
        done = self._judge(call, members[~out], handles[~out]) if not out.all() else handles[:0]
        return np.concatenate([np.array(failed, np.intp), done])

    def _judge(self, call: Call, members: Members, handles: Handles) -> Handles:
        verdict = judge(
            self._table.revision[handles],
            self._table.request_id[handles],
            call.expects(members),
            call.request_ids(members),
        )
        if verdict.apply.all():
            return self._apply(call, members, handles)
        self._answer_unapplied(call, members, handles, verdict)
        rest = verdict.apply
        done = self._apply(call, members[rest], handles[rest]) if rest.any() else handles[:0]
        return np.concatenate([handles[~rest], done])

    def _answer_unapplied(self, call: Call, members: Members, handles: Handles, verdict: Verdict) -> None:
        table = self._table
        for member, handle in zip(members[verdict.replay], handles[verdict.replay].tolist(), strict=True):
            outputs = self._models[call.model].replies.recall(handle)
            one = np.array([handle])  # not a slice: the caller must not see the session move on
            call.succeed(np.array([member]), table.revision[one], table.position[one], outputs, replayed=True)
        for member, handle in zip(members[verdict.conflict], handles[verdict.conflict].tolist(), strict=True):
            expected = 0 if call.expected is None else int(call.expected[member])
            call.fail(
                np.array([member]),
                RevisionConflict(table.session_id(handle), expected, int(table.revision[handle])),
            )

    def _apply(self, call: Call, members: Members, handles: Handles) -> Handles:
        if call.is_reset:
            return self._reset(call, members, handles)
        for part in self._split(call.sizes[members], call.model):
            self._add_job(call, members[part], handles[part])
        return handles[:0]

    def _split(self, sizes: Members, model: int) -> list[slice]:
        limit = self._models[model].loop.max_batch_rows
        if int(sizes.sum()) <= limit:
            return [slice(0, len(sizes))]
        parts, start, rows = [], 0, 0
        for index, size in enumerate(sizes.tolist()):
            if rows and rows + size > limit:
                parts.append(slice(start, index))
                start, rows = index, 0
            rows += size
        return [*parts, slice(start, len(sizes))]

    def _add_job(self, call: Call, members: Members, handles: Handles) -> None:
        checked = call.checked
        assert checked is not None, "a step has inputs"
        whole = len(members) == call.size
        rows = None if whole else call.rows(members)
        job = Job(
            call,
            members=members,
            handles=handles,
            rows=self._table.rows_of(handles),
            sizes=call.sizes[members],
            inputs=[array if rows is None else array[rows] for array in checked.arrays],
            steps=checked.steps,
            with_time=checked.with_time,
            select=call.select,
            source=call.source,
            queued_at=self._clock.monotonic(),
        )
        self._models[call.model].loop.add(job)

    def _reset(self, call: Call, members: Members, handles: Handles) -> Handles:
        table, model = self._table, self._models[call.model]
        rows = table.rows_of(handles)
        if call.reset_rows is not None:
            rows = rows[np.array(call.reset_rows, np.intp)]
        if call.state is None:
            model.arena.reset(rows)
        elif call.reset_rows is not None or len(members) == call.size:
            model.arena.write(rows, call.state)
        else:
            picked = call.rows(members)
            model.arena.write(rows, [array[picked] for array in call.state])
        some = call.reset_rows is not None
        change = Change(
            model,
            handles,
            table.revision[handles] + np.uint64(1),
            table.position[handles] if some else np.zeros(len(handles), np.uint64),
            call.request_ids(members),
            np.full(len(handles), Kept.EMPTY, np.uint8),
        )

        def answer(error: ServerError | None) -> None:
            if error is not None:
                call.fail(members, error)
                return
            self._observer.applied(model.name, "reset", len(handles), len(rows))
            call.succeed(members, change.revisions, change.positions, {})

        return self._keeper.keep(change, answer)
