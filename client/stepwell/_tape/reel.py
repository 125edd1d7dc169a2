"""The growing content of a tape that records."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stepwell._state.infos import StateSelection
from stepwell._state.tensors import Array
from stepwell._tape.content import KINDS, Content
from stepwell._tape.frames import Frames, Mask, Members, Rows
from stepwell._tape.marks import MarkKind, Marks
from stepwell._tape.series import Series

STATES: Sequence[StateSelection] = ("none", "last", "all")
"""Selections of states, each with those of the one before."""


class Subject(NamedTuple):
    """The session or group that is recorded, as it is when the recording begins."""

    model: str
    fingerprint: str
    batch_size: int
    is_group: bool
    revisions: npt.NDArray[np.uint64]
    """(members,)."""
    positions: npt.NDArray[np.uint64]
    """(members,)."""
    versions: npt.NDArray[np.uint64]
    """(members,)."""


class Reel:
    """Collects time steps for a tape. A source appends frames and resets; the tape reads `content`. Thread-safe."""

    def __init__(
        self,
        subject: Subject,
        states: StateSelection,
        max_steps: int | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """An empty reel.

        Args:
            subject: The session or group.
            states: States to keep.
            max_steps: Time steps to keep; None: all.
            clock: Time since the epoch, in nanoseconds.
        """
        self.states = states
        self._subject = subject
        self._max_steps = max_steps
        self._clock = clock
        members = len(subject.revisions)
        self._rows = np.arange(members * subject.batch_size).reshape(members, subject.batch_size)
        """The rows of each member."""
        self._lock = threading.Lock()
        self._revisions = Series(np.empty((0, members), np.uint64))
        self._positions = Series(np.empty((0, members), np.uint64))
        self._times = Series(np.empty(0, "datetime64[us]"))
        self._arrays: dict[str, dict[str, Series]] = {kind: {} for kind in KINDS}
        self._marks = Marks(self._rows.size)
        self._last = Members(None, *[counts.copy() for counts in self._counts(subject)])
        self._length = self._dropped = 0
        self._is_over = False
        self._stopped = ""

    @staticmethod
    def _counts(subject: Subject) -> tuple[Array, Array, Array, Array]:
        return subject.revisions, subject.positions, subject.positions, subject.versions

    def content(self) -> Content:
        """The content now. Later time steps do not change it."""
        with self._lock:
            count = self._length
            return Content(
                model=self._subject.model,
                fingerprint=self._subject.fingerprint,
                batch_size=self._subject.batch_size,
                is_group=self._subject.is_group,
                revisions=self._revisions.values(count),
                positions=self._positions.values(count),
                times=self._times.values(count),
                arrays={
                    kind: {name: series.values(count) for name, series in arrays.items()}
                    for kind, arrays in self._arrays.items()
                },
                marks=self._marks.listed(self._dropped),
                dropped=self._dropped,
                stopped=self._stopped,
            )

    def append(self, frames: Frames) -> None:
        """Appends the time steps of a change.

        The change has been applied, so this raises no error: if the time steps do not fit, recording stops.
        """
        with self._lock:
            if self._is_over:
                return
            try:
                reason = self._mismatch(frames)
                if not reason:
                    self._append(frames)
            except MemoryError:
                reason = "no memory was left"
            if reason:
                self._stop(reason)

    def mark(self, kind: MarkKind, rows: Rows | None, members: Members) -> None:
        """Appends a reset of some rows. `rows`: None for all."""
        with self._lock:
            if not self._is_over:
                self._adopt(members)
                self._marks.add(self._end, kind, rows)

    def stop(self, reason: str) -> None:
        """Ends the recording early. `reason`: the end of a sentence."""
        with self._lock:
            self._stop(reason)

    def end(self) -> None:
        """Ends the recording: changes that are still active are not recorded."""
        with self._lock:
            self._is_over = True

    def _stop(self, reason: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._stopped = f"recording stopped after time step {self._end}: {reason}"

    @property
    def _end(self) -> int:
        """Number of time steps since the beginning."""
        return self._dropped + self._length

    def _parts(self, frames: Frames) -> Mapping[str, Mapping[str, Array]]:
        states = {} if self.states == "none" else frames.states
        return {"inputs": frames.inputs, "outputs": frames.outputs, "states": states}

    def _mismatch(self, frames: Frames) -> str:
        """Why the time steps do not fit on the tape; empty if they do."""
        for kind, arrays in self._parts(frames).items():
            for name, array in arrays.items():
                series = self._arrays[kind].get(name)
                shape = array.shape[2:]
                if series is not None and series.shape[1:] != shape:
                    return f"{kind}/{name} changed its shape from {series.shape[1:]} to {shape}"
        return ""

    def _append(self, frames: Frames) -> None:
        count, before = frames.count, self._length
        whole = self._mark_restarts(frames)
        members = frames.members
        some = _selected(members.indexes)
        positions = np.repeat(self._last.positions[None], count, axis=0)
        positions[:, some] = _positions(members, whole[:, some])
        self._adopt(members)
        self._positions.append(positions)
        self._revisions.append(np.repeat(self._last.revisions[None], count, axis=0))
        self._times.append(np.full(count, self._clock() // 1000, "datetime64[us]"))
        for kind, arrays in self._parts(frames).items():
            own = self._arrays[kind]
            for name, array in arrays.items():
                if name not in own:
                    like = np.empty((self._rows.size, *array.shape[2:]), array.dtype)
                    own[name] = Series.missing(before, like)
            for name, series in own.items():
                series.append_part(count, arrays.get(name), frames.rows)
        self._length += count
        if self._max_steps is not None and self._length > self._max_steps:
            self._drop(self._length - self._max_steps)

    def _mark_restarts(self, frames: Frames) -> Mask:
        """Marks the rows that restarted. Returns which members restarted completely, (count, members)."""
        restarts = np.zeros((frames.count, self._rows.size), np.bool_)
        if frames.restarts is not None:
            restarts[:, _selected(frames.rows)] = frames.restarts
        by_member = restarts.reshape(frames.count, *self._rows.shape)
        by_member[0, self._reset_before(frames, by_member)] = True
        for i in np.flatnonzero(restarts.any(axis=1)).tolist():
            self._marks.add(self._end + i, "reset", np.flatnonzero(restarts[i]))
        whole: Mask = np.asarray(by_member.all(axis=2))
        return whole

    def _reset_before(self, frames: Frames, restarts: Mask) -> Mask:
        """Members that a new version of their model reset before this step: only their positions say so."""
        members = frames.members
        some = _selected(members.indexes)
        found = np.zeros(len(self._rows), np.bool_)
        whole: Mask = np.asarray(restarts.all(axis=2))
        is_next = members.revisions == self._last.revisions[some] + np.uint64(1)
        is_short = members.positions == frames.count
        found[some] = is_next & is_short & (members.before != 0) & ~whole[:, some].any(axis=0)
        return found

    def _adopt(self, members: Members) -> None:
        """Adopts the counts of members after a change. Marks changes in between that the tape has not seen."""
        last, some = self._last, _selected(members.indexes)
        self._mark_members("gap", some, members.revisions != last.revisions[some] + np.uint64(1))
        known = last.versions[some]
        moved = (known != members.versions) & (known != 0) & (members.versions != 0)
        self._mark_members("version", some, moved)
        last.revisions[some] = members.revisions
        last.positions[some] = members.positions
        last.versions[some] = members.versions

    def _mark_members(self, kind: MarkKind, some: Rows | slice, chosen: Mask) -> None:
        if chosen.any():
            self._marks.add(self._end, kind, self._rows[some][chosen].reshape(-1))

    def _drop(self, count: int) -> None:
        for series in (self._revisions, self._positions, self._times):
            series.drop(count)
        for arrays in self._arrays.values():
            for series in arrays.values():
                series.drop(count)
        self._dropped += count
        self._length -= count
        self._marks.drop(self._dropped)


def _selected(indexes: Rows | None) -> Rows | slice:
    return slice(None) if indexes is None else indexes


def _positions(members: Members, restarts: Mask) -> npt.NDArray[np.uint64]:
    """Positions after each time step of a change, (count, members); `restarts`: before which of them they became 0."""
    times = np.arange(len(restarts))[:, None]
    last = np.maximum.accumulate(np.where(restarts, times, -1), axis=0)
    own = np.where(last < 0, times + 1 + members.before.astype(np.int64), times + 1 - last)
    return own.astype(np.uint64)
