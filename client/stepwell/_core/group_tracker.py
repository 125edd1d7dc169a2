"""Tracks the sessions of a group on the client, as `_core.tracker` does a single one.

A group, its sub-groups and the handles of its members share one tracker. So each sees what another has changed, and
the same call of any handle of the same members can complete a failed change.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stepwell._batching.frames import Change, Counts, Frame, Gathered, Indexes
from stepwell._batching.sets import SessionSet
from stepwell._batching.steps import Step
from stepwell._core.lanes import divide, keys_in
from stepwell._core.locks import Locks, Some
from stepwell._core.tracker import (
    PendingChange,
    SessionTracker,
    explained,
    is_unknown,
    new_request_ids,
    with_states,
)
from stepwell._core.versions import reference
from stepwell._routing.router import Router


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A change without an answer for some of its members."""

    change: Change
    """The call, as its caller made it."""
    sent: Change
    """As in `PendingChange`."""
    members: Indexes
    expected: Counts
    """Revision that each member must have."""
    request_ids: Counts


class Move(NamedTuple):
    """Members that have moved to another version of the model."""

    members: Indexes
    previous: int
    version: int


class GroupTracker:
    """Tracks many sessions of one model and batch size. Thread-safe for changes of different members."""

    def __init__(
        self,
        model: str,
        fingerprint: str,
        batch_size: int,
        ids: Sequence[str],
        revisions: Sequence[int] = (),
        positions: Sequence[int] = (),
        *,
        version: int = 0,
        uids: Sequence[int] = (),
        is_pinned: bool = False,
        router: Router | None = None,
    ) -> None:
        count = len(ids)
        self._router = router
        self.model = model
        self.fingerprint = fingerprint
        self.batch_size = batch_size
        self.ids = tuple(ids)
        self.revisions = np.array(revisions or [0] * count, np.uint64)
        self.positions = np.array(positions or [0] * count, np.uint64)
        self.model_versions = np.full(count, version, np.uint64)
        """0 if the server does not report it."""
        self.uids = np.zeros(count, np.uint64)
        self.uids[:] = uids or 0  # a single one stands for all
        """As in `SessionTracker`, of each member."""
        self.is_pinned = is_pinned
        self.resumed = np.zeros(count, np.bool_)
        """Which sessions were live before this client opened them."""
        self.locks = Locks(count)
        self.everyone: Indexes = np.arange(count)
        self.everyone.flags.writeable = False
        self._ids = np.array(self.ids, object)
        self._lock = threading.Lock()
        """Guards the pending changes."""
        self._pending: dict[int, Pending] = {}
        self._pending_of = np.zeros(count, np.intp)
        """Number of the pending change of each member; 0: none."""
        self._number = 0
        self._set = SessionSet(self.ids, np.full(count, batch_size, np.intp))
        # As in `SessionTracker`, for each member.
        self.unknown = np.zeros(count, np.bool_)
        self.ahead = np.zeros(count, np.bool_)

    def resume(self, resumed: Sequence[bool], versions: Sequence[int]) -> None:
        """Records which sessions were resumed, and the version of each; empty: none was, and all have the same."""
        if resumed:
            self.resumed[:] = resumed
        if versions:
            self.model_versions[:] = versions

    def begin(self, change: Change, members: Indexes, states: str = "none") -> Frame:
        """Begins a change of members; returns its frame. The same change again has the same request ids.

        `states` is as in `SessionTracker.begin`.
        """
        where = self._where(members)
        self.ahead[where] |= self.unknown[where]
        self.unknown[where] = True
        with self._lock:
            named = self._named(members)
            pending = self._same(change, members)
            if pending is None:
                expected = self.revisions[where].copy()  # a slice would change with the revisions
                request_ids = self._request_ids(named, members)
                pending = Pending(change, with_states(change, states), members, expected, request_ids)
                self._put(pending)
        rows = named.rows if named is not None else np.full(len(members), self.batch_size, np.intp)
        ids = named.ids if named is not None else self._ids[members].tolist()
        return Frame(pending.sent, ids, rows, pending.expected, pending.request_ids, named)

    @property
    def is_pending(self) -> bool:
        """Whether a change of any member has no answer yet."""
        return bool(self._pending)

    def _request_ids(self, named: SessionSet | None, members: Indexes) -> Counts:
        """Request ids that count up by 1, for a group on several replicas within each replica."""
        request_ids = new_request_ids(len(members))
        if self._router is None or named is None or not self._router.replicas:
            return request_ids
        ordered = np.empty_like(request_ids)
        ordered[np.concatenate([own for _, own, _ in divide(self._router, named, keys_in(named))])] = (
            request_ids
        )
        return ordered

    def _same(self, change: Change, members: Indexes) -> Pending | None:
        """The pending change of these members, if it is this one."""
        number = int(self._pending_of[members[0]])
        pending = self._pending.get(number)
        if pending is None or not (self._pending_of[members] == number).all():
            return None
        return pending if np.array_equal(pending.members, members) and pending.change == change else None

    def _put(self, pending: Pending) -> None:
        """Remembers a pending change. Drops other pending changes of any of its members completely."""
        self._drop(pending.members)
        self._number += 1
        self._pending[self._number] = pending
        self._pending_of[self._where(pending.members)] = self._number

    def _drop(self, members: Indexes) -> None:
        if not self._pending or not len(members):
            return
        numbers = self._pending_of[self._where(members)]
        dropped = set(numbers.tolist()) if np.count_nonzero(numbers != numbers[:1]) else {int(numbers[0])}
        for number in dropped - {0}:
            self._pending_of[self._where(self._pending[number].members)] = 0
            del self._pending[number]

    def _where(self, members: Indexes) -> Some:
        """Members as an index of the columns."""
        return slice(0, len(self.ids)) if members is self.everyone else as_index(members)

    def _named(self, members: Indexes) -> SessionSet | None:
        """The set of these members, if they are the whole group."""
        if members is self.everyone:
            return self._set
        is_everyone = len(members) == len(self.ids) and (members == self.everyone).all()
        return self._set if is_everyone else None

    def reference_of(self, members: Indexes) -> str:
        """The model version that some members use, as requests name it; that of the first member if they differ."""
        return reference(self.model, int(self.model_versions[members[0]]) if len(members) else 0)

    def settle(self, members: Indexes, gathered: Gathered) -> list[Move]:
        """Records which members applied a change. Failed members stay pending; their errors are made ready to raise.

        Returns the members that have moved to another version of the model.
        """
        if not gathered.failures and gathered.applied.all():
            self._set_applied(self._where(members), gathered.revisions, gathered.positions)
            self.drop(members)
            return self._move(members, gathered.model_versions)
        applied = members[gathered.applied]
        self._set_applied(applied, gathered.revisions[gathered.applied], gathered.positions[gathered.applied])
        for i, error in gathered.failures.items():
            self.unknown[members[i]] = is_unknown(error)
            gathered.failures[i] = explained(error, ahead=bool(self.ahead[members[i]]))
        if not gathered.failures:
            self.drop(members)
        return self._move(applied, gathered.model_versions[gathered.applied])

    def _set_applied(self, where: Some, revisions: Counts, positions: Counts) -> None:
        self.revisions[where] = revisions
        self.positions[where] = positions
        self.unknown[where] = self.ahead[where] = False

    def _move(self, members: Indexes, versions: Counts) -> list[Move]:
        """Records the version of each member; 0: the server does not report it."""
        before = self.model_versions[self._where(members)]
        others = (versions != before) & (versions != 0)
        if not others.any():
            return []
        members, before, versions = members[others], before[others], versions[others]
        self.model_versions[members] = versions
        self.fingerprint = ""
        pairs = sorted(set(zip(before.tolist(), versions.tolist(), strict=True)))
        return [
            Move(members[(before == old) & (versions == new)], old, new) for old, new in pairs if old != 0
        ]

    def refresh(self, members: Indexes, revisions: Counts, positions: Counts, versions: Counts) -> list[Move]:
        """Updates members to the server's values, and drops changes without an answer. Returns what `settle` returns."""
        self.drop(members)
        self._set_applied(members, revisions, positions)
        return self._move(members, versions)

    def pending_of(self, member: int) -> PendingChange | None:
        """The change that is pending for one member alone."""
        with self._lock:
            pending = self._pending.get(int(self._pending_of[member]))
        if pending is None or len(pending.members) > 1:
            return None
        return PendingChange(pending.change, pending.sent, int(pending.request_ids[0]))

    def put_pending_of(self, member: int, pending: PendingChange | Step) -> None:
        """Remembers a change that is pending for one member alone."""
        members = np.array([member])
        request_ids = np.array([pending.request_id], np.uint64)
        with self._lock:
            self._put(Pending(pending.change, pending.sent, members, self.revisions[members], request_ids))

    def drop(self, members: Indexes) -> None:
        """Forgets the pending changes of members."""
        with self._lock:
            self._drop(members)


class MemberTracker(SessionTracker):
    """Tracks one member of a group, in the group's columns."""

    __slots__ = ("_group", "_member")

    def __init__(self, group: GroupTracker, member: int) -> None:
        self._group = group
        self._member = member
        self.session_id = group.ids[member]
        self.model = group.model
        self.batch_size = group.batch_size
        self.resumed = bool(group.resumed[member])

    @property
    def fingerprint(self) -> str:
        return self._group.fingerprint

    @fingerprint.setter
    def fingerprint(self, fingerprint: str) -> None:
        if fingerprint != self._group.fingerprint:
            self._group.fingerprint = ""  # the others' may be another one

    @property
    def uid(self) -> int:
        return int(self._group.uids[self._member])

    @uid.setter
    def uid(self, uid: int) -> None:
        self._group.uids[self._member] = uid

    @property
    def model_version(self) -> int:
        return int(self._group.model_versions[self._member])

    @model_version.setter
    def model_version(self, version: int) -> None:
        self._group.model_versions[self._member] = version

    @property
    def model_version_pinned(self) -> bool:
        return self._group.is_pinned

    @model_version_pinned.setter
    def model_version_pinned(self, is_pinned: bool) -> None:
        self._group.is_pinned = is_pinned

    @property
    def revision(self) -> int:
        return int(self._group.revisions[self._member])

    @revision.setter
    def revision(self, revision: int) -> None:
        self._group.revisions[self._member] = revision

    @property
    def position(self) -> int:
        return int(self._group.positions[self._member])

    @position.setter
    def position(self, position: int) -> None:
        self._group.positions[self._member] = position

    @property
    def _unknown(self) -> bool:
        return bool(self._group.unknown[self._member])

    @_unknown.setter
    def _unknown(self, unknown: bool) -> None:
        self._group.unknown[self._member] = unknown

    @property
    def _ahead(self) -> bool:
        return bool(self._group.ahead[self._member])

    @_ahead.setter
    def _ahead(self, ahead: bool) -> None:
        self._group.ahead[self._member] = ahead

    @property
    def pending(self) -> PendingChange | Step | None:
        return self._group.pending_of(self._member)

    @pending.setter
    def pending(self, pending: PendingChange | Step | None) -> None:
        if pending is None:
            self._group.drop(np.array([self._member]))
        else:
            self._group.put_pending_of(self._member, pending)


def as_index(members: Indexes) -> Some:
    """Members as a slice, which is cheaper, if they are consecutive."""
    if len(members) and members[-1] - members[0] == len(members) - 1 and (np.diff(members) == 1).all():
        return slice(int(members[0]), int(members[-1]) + 1)
    return members
