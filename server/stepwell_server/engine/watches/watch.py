"""One watch: which changes of its sessions it reports, and the queue of its events."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence

from stepwell_server.clock import Clock
from stepwell_server.engine.watches.events import Event, Kind, Sample, Wanted
from stepwell_server.errors import ServerError, SessionNotFound

MAX_EVENTS = 2048
"""Events that wait for a slow reader, besides the ends of sessions."""
MAX_BYTES = 4 << 20
"""Bytes of events that wait for a slow reader, up to the last event."""
MAX_TAKEN_EVENTS = 256
"""Events that are returned together."""
NEVER = 2**64 - 1
"""A revision that no session has."""
#: A session that could not be read is tried again after this time.
_RETRY_S = 0.02
#: A sampled change may come later than its interval by this time, and by as long as the interval, before the session is
#: read: a change has inputs and outputs, and the session as it is has none.
_MAX_LATE_S = 0.25


class Budget:
    """The bytes of the events that wait, of all watches."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.sent = self.dropped = 0
        """Events that were returned to readers, and those for which there was no room."""

    @property
    def is_full(self) -> bool:
        """Whether further events of watches that have one already are dropped."""
        return self.held >= self.limit


class _Progress:
    """What a watch has reported of a session."""

    __slots__ = ("at", "check_at", "counted", "dropped", "revision", "uid", "version")

    def __init__(self) -> None:
        self.uid: int | None = None
        """None: nothing was reported yet."""
        self.revision = 0
        """Of the last event."""
        self.version = 0
        """The model version of the last event."""
        self.counted = 0
        """The last revision that was due."""
        self.at = 0.0
        """When that was, on the monotonic clock."""
        self.check_at = math.inf
        """When the watch checks whether it has reported the session's last change; infinity: it need not."""
        self.dropped = 0


class Watch:
    """The events of some sessions for one caller. Lives on the event loop."""

    def __init__(
        self,
        session_ids: Sequence[str],
        wanted: Wanted,
        clock: Clock,
        budget: Budget,
        catch_up: Callable[[Watch, Sequence[str]], None],
        ended: Callable[[Watch, str], None],
    ) -> None:
        """Make a watch without events.

        Args:
            session_ids: The sessions.
            wanted: What it reports.
            clock: The source of time.
            budget: Counts the bytes of its events.
            catch_up: Called to read sessions whose last changes were not reported.
            ended: Called when it no longer watches a session.
        """
        self.wanted = wanted
        self._sessions = {session_id: _Progress() for session_id in session_ids}
        self._clock = clock
        self._budget = budget
        self._catch_up, self._ended = catch_up, ended
        self._queue: deque[tuple[Event, int]] = deque()
        """Events, with the bytes that they take."""
        self._bytes = 0
        self._behind: set[str] = set()
        """Sessions of which an event was dropped, and nothing was reported since."""
        self._checks: list[tuple[float, str]] = []
        """A heap: when to check which session. Entries that do not equal its `check_at` are void."""
        self._rung = asyncio.Event()
        self._error: ServerError | None = None

    @property
    def session_ids(self) -> Sequence[str]:
        """The sessions that have not ended."""
        return list(self._sessions)

    # ------------------------------------------------------------------------------------------------- what happens

    def takes(self, session_id: str, uid: int, revision: int) -> bool:
        """A session was changed on this server, and the store has the change. Whether to call `note`."""
        progress = self._sessions.get(session_id)
        if progress is None or (progress.uid is not None and progress.uid != uid):
            return False
        return progress.uid is None or self._is_due(progress, revision)

    def next_due(self, session_id: str) -> tuple[int, float]:
        """The revision from which on, and the time from which on `takes` may accept a change."""
        progress = self._sessions.get(session_id)
        if progress is None:
            return NEVER, math.inf
        if progress.uid is None:
            return 0, -math.inf
        if self.wanted.interval_s:
            return NEVER, progress.at + self.wanted.interval_s
        return min(NEVER, progress.counted + self.wanted.revisions), math.inf

    def is_missing(self, session_id: str, revision: int, version: int) -> bool:
        """Whether nothing was reported of a session at this revision, or on this version of its model."""
        progress = self._sessions.get(session_id)
        if progress is None:
            return False
        return session_id in self._behind or revision > progress.revision or version != progress.version

    def try_later(self, session_id: str) -> None:
        """A session cannot be read now."""
        self._check(session_id, self._sessions[session_id], self._clock.monotonic() + _RETRY_S)

    def note(self, sample: Sample) -> None:
        """Report a change that `takes` has accepted."""
        progress = self._sessions[sample.session_id]
        self._report(progress, sample, Kind.PRESENT if progress.uid is None else sample.kind)

    def present(self, sample: Sample) -> None:
        """A session was read."""
        session_id = sample.session_id
        progress = self._sessions.get(session_id)
        if progress is None:
            return
        if progress.uid not in {None, sample.uid}:
            message = f"session {session_id!r} was closed, and another one has its id now"
            self.end(session_id, SessionNotFound(session_id, message))
        elif progress.uid is None or session_id in self._behind:
            self._report(progress, sample, Kind.PRESENT)
        elif sample.revision > progress.revision or sample.version != progress.version:
            # a move to another version makes no revision, so that none is awaited
            is_moved = sample.revision == progress.revision and not self.wanted.interval_s
            if is_moved or self._is_due(progress, sample.revision):
                self._report(progress, sample, Kind.PRESENT)
            elif self.wanted.interval_s and progress.check_at == math.inf:
                self._check(session_id, progress, progress.at + self.wanted.interval_s)
                self._rung.set()

    def end(self, session_id: str, error: ServerError) -> None:
        """A session has ended, or cannot be read."""
        progress = self._sessions.pop(session_id, None)
        if progress is None:
            return
        self._behind.discard(session_id)
        self._put(
            Event(
                session_id=session_id,
                kind=Kind.ENDED,
                revision=progress.revision,
                time=self._clock.now(),
                error=error,
            )
        )
        self._ended(self, session_id)

    def stop(self, error: ServerError) -> None:
        """End the watch with an error, after the events that wait."""
        self._error = error
        self._rung.set()

    def close(self) -> None:
        """Forget everything: nobody reads it any more."""
        self._budget.held -= self._bytes
        self._bytes = 0
        self._queue.clear()
        for session_id in self.session_ids:
            del self._sessions[session_id]
            self._ended(self, session_id)

    # --------------------------------------------------------------------------------------------------- the reader

    async def next(self) -> list[Event]:
        """Wait for the next events. Empty: all sessions have ended, and the events of their ends were returned.

        Raises:
            ServerError: see `stop`.
        """
        while True:
            if self._queue:
                return self._take()
            if self._error is not None:
                raise self._error
            if not self._sessions:
                return []
            self._rung.clear()
            late = self._late()
            if late:
                self._catch_up(self, late)
            if not self._queue:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._rung.wait(), self._pause_s())

    def _take(self) -> list[Event]:
        events: list[Event] = []
        while self._queue and len(events) < MAX_TAKEN_EVENTS:
            event, size = self._queue.popleft()
            self._bytes -= size
            self._budget.held -= size
            events.append(event)
        self._budget.sent += len(events)
        return events

    def _check(self, session_id: str, progress: _Progress, when: float) -> None:
        """Check a session at that time, and no longer at another."""
        progress.check_at = when
        heapq.heappush(self._checks, (when, session_id))

    def _late(self) -> list[str]:
        """Sessions that are to be checked now."""
        now, late = self._clock.monotonic(), list[str]()
        while self._checks and self._checks[0][0] <= now:
            when, session_id = heapq.heappop(self._checks)
            progress = self._sessions.get(session_id)
            if progress is None or progress.check_at != when:
                continue
            progress.check_at = math.inf
            due_at = self._due_at(progress)
            if now < due_at and session_id not in self._behind:  # it was reported since
                self._check(session_id, progress, due_at)
            else:
                late.append(session_id)
        return late

    def _pause_s(self) -> float | None:
        """Time until `_late` may have a session; None: only a change makes one late."""
        if not self._checks:
            return None
        return max(_RETRY_S, self._checks[0][0] - self._clock.monotonic())

    def _due_at(self, progress: _Progress) -> float:
        interval_s = self.wanted.interval_s
        return progress.at + interval_s + min(interval_s, _MAX_LATE_S)

    # ----------------------------------------------------------------------------------------------------- the rules

    def _is_due(self, progress: _Progress, revision: int) -> bool:
        if self.wanted.interval_s:
            return self._clock.monotonic() >= progress.at + self.wanted.interval_s
        return revision >= progress.counted + self.wanted.revisions

    def _report(self, progress: _Progress, sample: Sample, kind: Kind) -> None:
        """Queue an event, or count it as dropped if there is no room."""
        is_first = progress.uid is None
        if not is_first and sample.revision < progress.revision:
            return
        progress.counted, progress.at = sample.revision, self._clock.monotonic()
        # where slow readers hold all there is, a reader that keeps up still gets one event at a time
        is_full = bool(self._queue) and self._budget.is_full
        if len(self._queue) >= MAX_EVENTS or self._bytes >= MAX_BYTES or is_full:
            self._budget.dropped += 1
            progress.dropped += not is_first
            if sample.session_id not in self._behind:
                self._behind.add(sample.session_id)
                if progress.check_at > progress.at:
                    self._check(sample.session_id, progress, progress.at)
            return
        self._behind.discard(sample.session_id)
        if self.wanted.interval_s and progress.check_at == math.inf:
            self._check(sample.session_id, progress, self._due_at(progress))
        event = sample.event(self.wanted, kind, from_store=sample.is_elsewhere and not is_first)
        if not is_first:
            missing = max(0, sample.revision - progress.revision - (kind is not Kind.PRESENT))
            event.dropped = min(progress.dropped, missing)
            event.skipped = missing - event.dropped
        progress.uid, progress.revision, progress.version = sample.uid, sample.revision, sample.version
        progress.dropped = 0
        self._put(event)

    def _put(self, event: Event) -> None:
        size = event.byte_count
        self._bytes += size
        self._budget.held += size
        self._queue.append((event, size))
        self._rung.set()
