"""Admits calls. A caller's credential must be valid when a call starts, and for as long as a stream is open."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import heapq
import itertools
import math
from typing import Protocol

from stepwell_server.clock import Clock
from stepwell_server.core.callers import Credential, KnownCaller
from stepwell_server.errors import Unauthenticated
from stepwell_server.logs import Log
from stepwell_server.rpc.access import Access, acting, require
from stepwell_server.rpc.fronts.base import Call, Front

_log = Log("rpc")
LOOK_S = 0.25
"""Interval between two checks of the credentials. A change counts once two checks have seen it."""
MAX_KNOWN = 65_536
"""Maximum number of credentials in the front."""
_BATCH_SIZE = 256
"""Number of credentials to review before yielding to the event loop."""
_CLOSE_S = 1.0
"""Expiry times that differ by less are the same, computed again."""


class Authenticator(Protocol):
    """Authenticates callers. Called on the event loop, for each call whose credential the front does not know."""

    asked: asyncio.Event
    """Set it after a change, to have the files read at once."""

    def identify(self, call: Call) -> KnownCaller:
        """Return the caller of a call, by its metadata and certificate.

        Raises:
            Unauthenticated: the credential is missing or unknown.
        """

    def renewed(self, known: KnownCaller) -> KnownCaller | None:
        """Look up the credential of an authenticated caller again; None: it is no longer valid."""

    async def refresh(self, *, at_once: bool = False) -> bool:
        """Reload changed files, and return whether the known callers have changed.

        `at_once`: read the files even if they seem unchanged.
        """


class GuardedStream:
    """A stream that ends when the credential of its call becomes invalid."""

    def __init__(self, credential: Credential) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._error: Unauthenticated | None = None
        self.credential = credential

    def end(self) -> None:
        """End it, in its task."""
        if self._error is None:
            self._error = Unauthenticated(
                "the credential of this call is no longer valid: it was revoked, changed or expired; send a new one"
            )
            self._task.cancel()

    def instead_of(self, error: BaseException) -> BaseException:
        """Return the stream's own error if it ended only because of `end`, else the error that was raised."""
        if self._error is None or not isinstance(error, asyncio.CancelledError):
            return error
        return error if self._task.uncancel() else self._error


class _Entry:
    """A credential that is known to the front, or used by open streams."""

    __slots__ = ("due", "is_in_front", "known", "streams")

    def __init__(self, known: KnownCaller) -> None:
        self.known = known
        self.due = math.inf
        """Time of its next review, on the monotonic clock."""
        self.is_in_front = False
        """Whether the front knows it, or knew it."""
        self.streams: set[GuardedStream] = set()


class Guard:
    """Admits calls. Lives on the event loop; `follow` must run concurrently."""

    def __init__(self, authenticator: Authenticator, front: Front, clock: Clock) -> None:
        self._authenticator = authenticator
        self._front = front
        self._clock = clock
        self._entries: collections.OrderedDict[Credential, _Entry] = collections.OrderedDict()
        """In order of age, except for those with streams."""
        self._ends: list[tuple[float, int, _Entry]] = []
        """Heap of entries by the time of their next review. Some may have been removed."""
        self._order = itertools.count()

    def admit(self, call: Call, method: str, access: Access) -> KnownCaller:
        """Authenticate the caller of a call, determine its tenant, and check its permission.

        Raises:
            Unauthenticated, PermissionDenied, InvalidInput: the call is refused.
        """
        known = self._authenticator.identify(call)
        who = known.caller
        try:
            who = acting(known.caller, call.metadata)
            require(access, method, who)
            if who is known.caller:
                entry = self._remember(known)
                entry.is_in_front = True
                self._front.know(known.credential, known.caller, known.until)
        finally:
            call.who = who  # also for a refused call, so that the logs name its caller
        return known

    def enter(self, known: KnownCaller) -> GuardedStream:
        """Register the stream of the running task."""
        stream = GuardedStream(known.credential)
        self._remember(known).streams.add(stream)
        return stream

    def leave(self, stream: GuardedStream) -> None:
        """Remove a stream that has ended."""
        entry = self._entries.get(stream.credential)
        if entry is not None:
            entry.streams.discard(stream)
            if not entry.streams and not entry.is_in_front:
                del self._entries[stream.credential]

    async def follow(self) -> None:
        """Check the credentials regularly, and whenever this is asked for, until cancelled."""
        asked = self._authenticator.asked
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asked.wait(), LOOK_S)
            at_once = asked.is_set()
            asked.clear()
            try:
                await self.look(at_once=at_once)
            except Exception as error:
                _log.defect("the callers could not be checked", error)

    async def look(self, *, at_once: bool = False) -> None:
        """End the streams whose credentials are no longer valid, and remove these from the front."""
        if await self._authenticator.refresh(at_once=at_once):
            for number, entry in enumerate(list(self._entries.values()), 1):
                if self._entries.get(entry.known.credential) is entry:
                    self._review(entry)
                if number % _BATCH_SIZE == 0:
                    await asyncio.sleep(0)
            _log.info("reloaded the callers")
        while self._ends and self._ends[0][0] <= self._clock.monotonic():
            _, _, entry = heapq.heappop(self._ends)
            if self._entries.get(entry.known.credential) is entry:
                entry.due = math.inf
                self._review(entry)

    def _remember(self, known: KnownCaller) -> _Entry:
        credential = known.credential
        entry = self._entries.get(credential)
        if entry is not None and entry.known.caller != known.caller:  # the files have just changed
            self._end(entry)
            entry = None
        if entry is None:
            if len(self._entries) >= MAX_KNOWN:
                self._make_room()
            entry = self._entries[credential] = _Entry(known)
        entry.known = known
        self._look_in_time(entry)
        return entry

    def _make_room(self) -> None:
        """Remove the oldest entry without streams, among the first few. Connections bound the number of streams."""
        for _ in range(8):
            oldest = next(iter(self._entries.values()))
            if not oldest.streams:
                self._end(oldest)
                return
            self._entries.move_to_end(oldest.known.credential)

    def _end(self, entry: _Entry) -> None:
        credential = entry.known.credential
        del self._entries[credential]
        self._front.forget([credential])
        for stream in entry.streams:
            stream.end()

    def _review(self, entry: _Entry) -> None:
        known = self._authenticator.renewed(entry.known)
        if known is None:
            self._end(entry)
            return
        until = entry.known.until
        if entry.is_in_front and known.until != until and not abs(known.until - until) < _CLOSE_S:
            self._front.know(known.credential, known.caller, known.until)
        entry.known = known
        self._look_in_time(entry)

    def _look_in_time(self, entry: _Entry) -> None:
        if entry.known.until < entry.due:
            entry.due = entry.known.until
            heapq.heappush(self._ends, (entry.due, next(self._order), entry))
