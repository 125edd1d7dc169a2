"""Turns changes into jobs: claims their sessions, applies the exactly-once rule, and gets rows for them.

Changes that cannot start yet wait for their session, or for rows, in `queues`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from typing_extensions import override

from stepwell_server.clock import Clock
from stepwell_server.core.exactly_once import Kind, Verdict, judge, kind_of, mismatches
from stepwell_server.core.scheduler import ALL_CALLERS, Source
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Observer, Select
from stepwell_server.engine.change import (
    MAX_ERRORS,
    NO_STATES,
    Change,
    Reply,
    SimpleOrigin,
    changed_elsewhere,
    shared_error,
)
from stepwell_server.engine.commit.committer import Committer
from stepwell_server.engine.commit.records import Outcome
from stepwell_server.engine.content import reused_request
from stepwell_server.engine.intake.pager import ALL_HERE, PageInErrors, Pager
from stepwell_server.engine.intake.queues import Inboxes, RowQueue, SessionQueues, Starter, joined_where_alike
from stepwell_server.engine.job import Job
from stepwell_server.engine.state.replies import ReplyForm, named_states
from stepwell_server.engine.types import U64, Mask, Members, Tensors
from stepwell_server.errors import (
    NoRows,
    RevisionConflict,
    ServerError,
    SessionGone,
    StateCorrupt,
    VersionElsewhere,
)
from stepwell_server.logs import Log

_log = Log("engine.admission")

Wait = Callable[[Change, Members], None]
Judge = Callable[[Change, Members, Handles], Handles]
_NO_MEMBERS: Members = np.zeros(0, np.intp)


class Admission(Starter):
    """Claims the sessions of changes and hands jobs to the models' queues. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        queues: SessionQueues,
        row_queue: RowQueue,
        pager: Pager,
        committer: Committer,
        inboxes: Inboxes,
        *,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._table = table
        self._queues = queues
        self._row_queue = row_queue
        self._pager = pager
        self._committer = committer
        self._inboxes = inboxes
        self._clock = clock
        self._observer = observer

    def drain(self) -> None:
        """Admit what waits in the inboxes.

        It arrived before any call that is not a change, and must not be overtaken.
        """
        for inbox in list(self._inboxes.waiting):
            self.admit(joined_where_alike(inbox.drain()))

    def admit(self, changes: Sequence[Change]) -> None:
        """Start changes, or put their members in their sessions' queues."""
        for change in changes:
            self.admit_some(change, change.members)

    def admit_some(self, change: Change, members: Members) -> None:
        """`admit` for some members of a change."""
        while len(members):
            # checked each time: the store may have failed what was started, and its session may have left the
            # table
            members = self._live(change, members)
            claimed = self._table.claimed[change.handles[members]]
            if np.count_nonzero(claimed):
                self._queues.enqueue(self, change, members[claimed])
                members = members[~claimed]
            first, members = self._first(change, members)
            if len(first):
                self._release(self.start_due(change, first))

    def _live(self, change: Change, members: Members) -> Members:
        """Members whose sessions exist; the others are looked up again."""
        stale = self._table.birth[change.handles[members]] != change.births[members]
        if not np.count_nonzero(stale):
            return members
        self.retry_lookup(change, members[stale])
        there: Members = members[~stale]
        return there

    @staticmethod
    def _first(change: Change, members: Members) -> tuple[Members, Members]:
        """Members that are the first of their session, and those that name it again and come after."""
        if change.connections is None or len(set(change.handles[members].tolist())) == len(members):
            return members, _NO_MEMBERS
        is_first = np.zeros(len(members), np.bool_)
        is_first[np.unique(change.handles[members], return_index=True)[1]] = True
        return members[is_first], members[~is_first]

    def _release(self, done: Handles) -> None:
        if len(done):
            self._queues.release(done)

    @override
    def start_due(self, change: Change, members: Members) -> Handles:
        handles = change.handles[members]
        self._queues.claim(handles)
        if self._row_queue.count(change.model.index):
            # earlier changes still wait for rows: only those that need none continue
            absent = self._table.row[handles] < 0
            if absent.any():
                self._wait_for_rows(change, members[absent])
                members, handles = members[~absent], handles[~absent]
        return self._page_in(change, members, handles, self._wait_for_rows)

    @override
    def retry_lookup(self, change: Change, members: Members) -> None:
        self._release(self._retry_lookup(change, members))

    def on_conflict(self, change: Change, members: Members) -> None:
        """Another server changed the sessions of members before their change was stored.

        They are claimed and paged out.
        """
        self._observer.judged_again(change.model.name, len(members))
        self.retry_lookup(change, members)

    def _retry_lookup(self, change: Change, members: Members) -> Handles:
        """Look members' sessions up again because they have changed, `MAX_TRIES` times at most.

        Existing sessions are claimed by these members, and their records are read again. Sessions that left the
        table are looked up in the store.

        Returns:
            Claimed sessions that are done.
        """
        handles = change.handles[members]
        is_there = self._table.birth[handles] == change.births[members]
        is_over = change.count_try(members)
        done: Handles = handles[is_there & is_over]
        if np.count_nonzero(is_over):
            for group in change.alike(members[is_over]):
                change.fail(group, changed_elsewhere(change.session_ids[int(group[0])]))
        gone, claimed = members[~(is_there | is_over)], is_there & ~is_over
        if len(gone):
            assert change.find_again is not None, "an accepted change has it"
            change.find_again(change, gone, self.admit_some)
        more = self._page_in(change, members[claimed], handles[claimed], self._wait_for_rows, compare=True)
        return np.concatenate([done, more])

    @override
    def start_waiting(self, change: Change, members: Members) -> None:
        done: list[Handles] = []
        for dropped, error in change.drop(members, self._clock.monotonic()):
            done.append(change.handles[dropped])
            members = np.setdiff1d(members, dropped)
            change.fail(dropped, error)
        if len(members):
            done.append(self._page_in(change, members, change.handles[members], self._wait_again))
        if done:
            self._release(np.concatenate(done))

    def _wait_for_rows(self, change: Change, members: Members) -> None:
        self._row_queue.add(self, change, members)

    def _wait_again(self, change: Change, members: Members) -> None:
        self._row_queue.put_back(self, change, members)

    def _page_in(
        self, change: Change, members: Members, handles: Handles, wait: Wait, *, compare: bool = False
    ) -> Handles:
        """Get rows for claimed sessions and judge their members, or queue them.

        With `compare`, sessions that have rows are also compared with the store.

        Returns:
            Sessions that are done already.
        """
        if not len(members):
            return handles

        def later(came: Handles, refused: PageInErrors) -> None:
            where = np.isin(handles, came)
            self._on_paged_in(change, members[where], handles[where], refused)

        judge = self._judge_as_stored if compare else self._judge
        paged = self._pager.page_in(change.model, handles, later, reread=compare)
        if paged is ALL_HERE:
            return judge(change, members, handles)
        here = np.isin(handles, paged.coming, invert=True)
        return self._judge_present(change, members[here], handles[here], paged.refused, wait, judge)

    def _on_paged_in(self, change: Change, members: Members, handles: Handles, refused: PageInErrors) -> None:
        """Continue with members whose sessions were read from the store, or could not be."""
        for dropped, error in change.drop(members, self._clock.monotonic()):
            change.fail(dropped, error)
            for handle in change.handles[dropped].tolist():
                self._queues.end(handle, refused.get(handle))
            members = np.setdiff1d(members, dropped)
        handles = change.handles[members]
        ended = [
            place
            for place, handle in enumerate(handles.tolist())
            if isinstance(refused.get(handle), (SessionGone, VersionElsewhere))
        ]
        for place in ended:
            handle = int(handles[place])
            change.fail(members[place : place + 1], refused[handle])
            self._queues.end(handle, refused[handle])
        members, handles = np.delete(members, ended), np.delete(handles, ended)
        wait, judge = self._wait_for_rows, self._judge_as_stored
        self._release(self._judge_present(change, members, handles, refused, wait, judge))

    def _judge_present(
        self,
        change: Change,
        members: Members,
        handles: Handles,
        refused: PageInErrors,
        wait: Wait,
        judge: Judge,
    ) -> Handles:
        """Judge members, except those whose sessions stay away: these fail, or wait for rows.

        Returns as `_page_in` does.
        """
        if not len(members):
            return handles
        if not refused:
            return judge(change, members, handles)
        out = np.isin(handles, list(refused))
        failed: list[int] = []
        waiting: list[int] = []
        for member, handle in zip(members[out].tolist(), handles[out].tolist(), strict=True):
            if isinstance(refused[handle], NoRows):
                waiting.append(member)
            else:
                change.fail(np.array([member]), refused[handle])
                failed.append(handle)
        wait(change, np.array(waiting, np.intp))
        done = handles[:0]
        if not out.all():
            done = judge(change, members[~out], handles[~out])
        return np.concatenate([np.array(failed, np.intp), done])

    def _judge(self, change: Change, members: Members, handles: Handles) -> Handles:
        """Start members that are the next change of their sessions, by the table. Returns as `_page_in` does.

        Other servers may have changed the sessions, so only a record can show that a member is not the next change.
        """
        verdict = self._verdict(change, members, handles)
        if verdict is None:
            return self._begin(change, members, handles)
        apply = verdict[0].apply
        done = self._retry_lookup(change, members[~apply])
        return np.concatenate([done, self._begin(change, members[apply], handles[apply])])

    def _judge_as_stored(self, change: Change, members: Members, handles: Handles) -> Handles:
        """Start or answer members; the table has the sessions' records as of the claim. Returns as `_page_in` does."""
        done = handles[:0]
        if change.continued_model:
            is_begun = self._table.position[handles] > 0
            for place in np.flatnonzero(~is_begun).tolist():  # another server has reset it meanwhile
                error = changed_elsewhere(change.session_ids[int(members[place])])
                change.fail(members[place : place + 1], error)
            done, members, handles = handles[~is_begun], members[is_begun], handles[is_begun]
        verdict = self._verdict(change, members, handles)
        if verdict is not None:
            self._answer_unapplied(change, members, handles, *verdict)
            apply = verdict[0].apply
            done, members, handles = np.concatenate([done, handles[~apply]]), members[apply], handles[apply]
        return np.concatenate([done, self._begin(change, members, handles)])

    def _verdict(
        self, change: Change, members: Members, handles: Handles
    ) -> tuple[Verdict, tuple[Mask, Mask]] | None:
        """Apply the exactly-once rule. None: all are the next change; else which are, and which reuse a request id."""
        expected, requests = change.expected, change.request_ids
        verdict = judge(
            self._table.revision[handles],
            self._table.request_id[handles],
            None if expected is None else expected[members],
            None if requests is None else requests[members],
        )
        if verdict is None:
            return None
        reused = self._reused(change, members, handles, verdict.same_id)
        is_own = ~(reused[0] | reused[1])
        own = dataclasses.replace(verdict, apply=verdict.apply & is_own, replay=verdict.replay & is_own)
        return own, reused

    def _begin(self, change: Change, members: Members, handles: Handles) -> Handles:
        """Start members that are to be applied. Returns as `_page_in` does."""
        try:
            if len(members):
                self._apply(change, members, handles)
        except Exception as error:
            # nothing has been handed on: answer the callers and free the sessions
            change.fail(members, _log.internal("a change could not be started", error))
            return handles
        return handles[:0]

    def _answer_unapplied(
        self, change: Change, members: Members, handles: Handles, verdict: Verdict, reused: tuple[Mask, Mask]
    ) -> None:
        for which in reused:
            self._refuse_reused(change, members[which])
        replayed = np.flatnonzero(verdict.replay)
        for places, outputs, kept in change.model.replies.recall_many(handles[replayed]):
            some = replayed[places]
            own = handles[some]  # a copy: the caller must not see later changes of the sessions
            states = kept if change.keeps_states else self._states_now(change, members[some], own)
            if not self._are_of_rows(change, members[some], own, outputs, states):
                problem = StateCorrupt(
                    f"the remembered reply of session {self._table.session_id(int(own[0]))!r} must have the rows"
                    " of the change; it has a different number",
                    session_id=self._table.session_id(int(own[0])),
                )
                change.fail(members[some], shared_error(problem, len(some)))
                continue
            kind = "reset" if change.reset else "step"
            self._observer.replayed(change.model.name, kind, len(some))
            revisions, positions = self._table.revision[own], self._table.position[own]
            change.succeed(members[some], Reply(revisions, positions, outputs, states, replayed=True))
        conflicts = np.flatnonzero(verdict.conflict)
        for places, expected, actual in _alike(
            change, members[conflicts], self._table.revision[handles[conflicts]]
        ):
            some = members[conflicts[places]]
            error = RevisionConflict(
                self._table.session_id(int(handles[conflicts[places[0]]])), expected, actual
            )
            change.fail(some, shared_error(error, len(some)))

    def _are_of_rows(
        self, change: Change, members: Members, handles: Handles, outputs: Tensors, states: Tensors
    ) -> bool:
        """Whether remembered tensors have the rows that members ask for, which writers of replies rely on."""
        count, wanted = len(self._rows_of(change, handles)), change.state_rows_among(members)
        state_count = count if wanted is None else len(wanted)
        return all(len(array) == count for array in outputs.values()) and all(
            len(array) == state_count for array in states.values()
        )

    def _reused(self, change: Change, members: Members, handles: Handles, same_id: Mask) -> tuple[Mask, Mask]:
        """Which members have the request id of another change: of another kind, or of this kind with other content."""
        other_kind, other_content = np.zeros_like(same_id), np.zeros_like(same_id)
        if np.count_nonzero(same_id):
            stored = self._table.digest[handles[same_id]]
            other_kind[same_id], other_content[same_id] = mismatches(
                stored, change.digests_of(members[same_id])
            )
        return other_kind, other_content

    def _refuse_reused(self, change: Change, members: Members) -> None:
        """Answer members whose request id belongs to another change: either all of another kind, or none."""
        own = Kind.RESET if change.reset else Kind.STEP
        for group in _in_groups(change, members):
            kind = kind_of(int(self._table.digest[change.handles[group[0]]]))
            error = reused_request(change.session_ids[int(group[0])], kind, own)
            change.fail(group, shared_error(error, len(group)))

    def _states_now(self, change: Change, members: Members, handles: Handles) -> Tensors:
        """The states after a step that is its sessions' last change: their current ones, if requested."""
        if change.states is Select.NONE:
            return NO_STATES
        rows, wanted = self._rows_of(change, handles), change.state_rows_among(members)
        states = change.model.arena.read(rows if wanted is None else rows[wanted])
        with_time = change.with_time and change.states is Select.ALL
        return named_states(change.model.program.state, states, with_time=with_time)

    def _rows_of(self, change: Change, handles: Handles) -> Rows:
        """Rows of the arena that a step of sessions advances."""
        rows = self._table.rows_of(handles)
        return rows if change.advancing is None else rows[change.advancing]

    def _apply(self, change: Change, members: Members, handles: Handles) -> None:
        if change.reset:
            self._reset(change, members, handles)
            return
        sources = self._sources(change, members)
        # each caller's part fits into one pass
        most = max(1, change.model.max_batch_rows // len(sources))
        jobs = [
            self._job(change, part, source)
            for source, some in sources
            for part in _split(some, change.sizes, most)
        ]
        for job in jobs:
            change.model.ready.add(job)
        change.model.work.ring()

    def _sources(self, change: Change, members: Members) -> list[tuple[Source, Members]]:
        """Members by source, so that one caller with much work does not keep others out of the next pass.

        If all waiting work fits into one pass, a single job is the least work.
        """
        only, model = change.only_source, change.model
        if only is not None:
            return [(only, members)]
        if model.ready.rows_waiting + len(members) <= model.max_batch_rows:
            if model.ready.rows_waiting + len(members) <= model.rows_of_a_short_pass:
                return [(ALL_CALLERS, members)]
            sources = list(change.by_source(members))
            # if all have similar amounts, shorter passes benefit nobody
            if len(members) <= len(sources) * min(len(own) for _, own in sources):
                return [(ALL_CALLERS, members)]
            return sources
        return list(change.by_source(members))

    def _job(self, change: Change, members: Members, source: Source) -> Job:
        is_whole = len(members) == len(change.session_ids)
        handles = change.handles if is_whole else change.handles[members]
        rows = None if is_whole else change.rows_of(members)
        resets = change.reset_rows
        return Job(
            owner=change,
            members=members,
            handles=handles,
            rows=self._table.rows_of(handles) if change.advancing is None else self._rows_of(change, handles),
            sizes=change.sizes if is_whole else change.sizes[members],
            inputs=change.arrays if rows is None else [array[rows] for array in change.arrays],
            steps=change.steps,
            with_time=change.with_time,
            select=change.select,
            source=source,
            queued_at=self._clock.monotonic(),
            reset_rows=resets if resets is None or rows is None else resets[rows],
            advancing=change.advancing,
            states=change.states,
            state_rows=None if change.state_index is None else change.state_rows_among(members),
        )

    def _reset(self, change: Change, members: Members, handles: Handles) -> None:
        table, model = self._table, change.model
        rows = table.rows_of(handles)
        some = change.rows is not None
        if change.rows is not None:
            rows = rows[np.array(change.rows, np.intp)]
        if not change.arrays:
            model.arena.reset(rows, model.program.initial)
        elif some or len(members) == change.size:
            model.arena.write(rows, change.arrays)
        else:
            picked = change.rows_of(members)
            model.arena.write(rows, [array[picked] for array in change.arrays])
        outcome = Outcome(
            model,
            handles,
            table.revision[handles] + np.uint64(1),
            table.position[handles] if some else np.full(len(handles), change.position, np.uint64),
            change.requests_of(members),
            change.digests_of(members),
            np.full(len(handles), ReplyForm.EMPTY, np.uint8),
            SimpleOrigin(change, members),
        )

        def answer(error: ServerError | None, places: Members | None) -> None:
            own, applied = (members, outcome) if places is None else (members[places], outcome.part(places))
            if error is not None:
                change.fail(own, error)
                return
            row_count = len(change.rows) if change.rows is not None else int(change.sizes[own].sum())
            self._observer.applied(model.name, "reset", len(own), row_count)
            change.succeed(own, Reply(applied.revisions, applied.positions, {}, NO_STATES))

        self._committer.commit(outcome, answer, lambda places: self.on_conflict(change, members[places]))


def _in_groups(change: Change, members: Members) -> Iterator[Members]:
    """Members in groups that share an error; a few members have one each."""
    if not len(members):
        return
    if len(members) <= MAX_ERRORS:
        for place in range(len(members)):
            yield members[place : place + 1]
        return
    yield from change.alike(members)


def _alike(change: Change, members: Members, actual: U64) -> Iterator[tuple[Members, int, int]]:
    """Places of members that share a conflict error, with the revision they expected and the actual one.

    A few members have an error each, and so have those of several callers. Among many, members with equal expected
    and actual revisions share one: an error for each of 65,536 would block the event loop for seconds.
    """
    expected = change.expected_of(members)
    wanted = np.zeros(len(members), np.uint64) if expected is None else expected
    if len(members) <= MAX_ERRORS or len(change.alike(members)) > 1:
        for place in range(len(members)):
            yield np.array([place]), int(wanted[place]), int(actual[place])
        return
    _, which = np.unique(np.stack([wanted, actual]), axis=1, return_inverse=True)
    order = np.argsort(which, kind="stable")
    for places in np.split(order, np.flatnonzero(np.diff(which[order])) + 1):
        yield places, int(wanted[places[0]]), int(actual[places[0]])


def _split(members: Members, sizes: Rows, limit: int) -> list[Members]:
    """Split neighbours into parts that fit into a pass."""
    own = sizes[members]
    if int(np.add.reduce(own)) <= limit:
        return [members]
    parts, start, rows = [], 0, 0
    for index, size in enumerate(own.tolist()):
        if rows and rows + size > limit:
            parts.append(members[start:index])
            start, rows = index, 0
        rows += size
    return [*parts, members[start:]]
