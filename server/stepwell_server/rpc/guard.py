"""Who makes the calls, and for how long: what a call shows must hold when it begins, and as long as a stream is open."""

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
"""Between two looks whether all still holds. A change is believed when two looks have seen it."""
MAX_KNOWN = 65_536
"""Credentials that a front is told of."""
_BATCH_SIZE = 256
"""Credentials that are reviewed before others have a turn of the event loop."""
_CLOSE_S = 1.0
"""Ends of what is known that differ by less are the same, computed anew."""


class Authenticator(Protocol):
    """Finds out who calls. Called on the event loop, for each call that the front does not know by itself."""

    asked: asyncio.Event
    """Set by whoever says that something has changed."""

    def identify(self, call: Call) -> KnownCaller:
        """Who makes a call, by its metadata and its certificate.

        Raises:
            Unauthenticated: nobody who is known, or nothing says who.
        """

    def renewed(self, known: KnownCaller) -> KnownCaller | None:
        """What is known now of a caller who was found before, by the same credential; None: it does not hold any more."""

    async def refresh(self, *, at_once: bool = False) -> bool:
        """Find out whether others are known now than before, and whether that has changed since the last time.

        `at_once`: somebody says that something has changed.
        """


class Guarded:
    """A stream, which ends when what its call has shown does not hold any more."""

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
                "what the call has shown does not hold any more: it was revoked, or has changed or expired; show a new one"
            )
            self._task.cancel()

    def instead_of(self, error: BaseException) -> BaseException:
        """How the stream ended: if that is because of `end`, and of nothing else, its own error."""
        if self._error is None or not isinstance(error, asyncio.CancelledError):
            return error
        return error if self._task.uncancel() else self._error


class _Entry:
    """What is known of a credential: by the front, or by open streams."""

    __slots__ = ("due", "is_told", "known", "streams")

    def __init__(self, known: KnownCaller) -> None:
        self.known = known
        self.due = math.inf
        """When it is looked at, at the latest."""
        self.is_told = False
        """The front knows it, or did."""
        self.streams: set[Guarded] = set()


class Guard:
    """Lets calls in. Lives on the event loop; `follow` must run beside it."""

    def __init__(self, authenticator: Authenticator, front: Front, clock: Clock) -> None:
        self._authenticator = authenticator
        self._front = front
        self._clock = clock
        self._entries: collections.OrderedDict[Credential, _Entry] = collections.OrderedDict()
        """The oldest first, of those without streams."""
        self._ends: list[tuple[float, int, _Entry]] = []
        """A heap: when one of them must be looked at; some are gone."""
        self._order = itertools.count()

    def admit(self, call: Call, method: str, access: Access) -> KnownCaller:
        """Find out who makes a call, and in whose tenant, and refuse those who may not.

        Raises:
            Unauthenticated, PermissionDenied, InvalidInput: it is refused.
        """
        known = self._authenticator.identify(call)
        who = known.caller
        try:
            who = acting(known.caller, call.metadata)
            require(access, method, who)
            if who is known.caller:
                entry = self._remember(known)
                entry.is_told = True
                self._front.know(known.credential, known.caller, known.until)
        finally:
            call.who = who  # whoever is refused is named, too
        return known

    def enter(self, known: KnownCaller) -> Guarded:
        """A stream begins, in the running task."""
        stream = Guarded(known.credential)
        self._remember(known).streams.add(stream)
        return stream

    def leave(self, stream: Guarded) -> None:
        """It has ended."""
        entry = self._entries.get(stream.credential)
        if entry is not None:
            entry.streams.discard(stream)
            if not entry.streams and not entry.is_told:
                del self._entries[stream.credential]

    async def follow(self) -> None:
        """Look from time to time, and when it is asked for, whether all still holds; for ever."""
        asked = self._authenticator.asked
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asked.wait(), LOOK_S)
            at_once = asked.is_set()
            asked.clear()
            try:
                await self.look(at_once=at_once)
            except Exception as error:
                _log.defect("the callers could not be looked after", error)

    async def look(self, *, at_once: bool = False) -> None:
        """End the streams of those who are not known any more, and let the front forget them."""
        if await self._authenticator.refresh(at_once=at_once):
            for number, entry in enumerate(list(self._entries.values()), 1):
                if self._entries.get(entry.known.credential) is entry:
                    self._review(entry)
                if number % _BATCH_SIZE == 0:
                    await asyncio.sleep(0)
            _log.info("the callers are those of the changed files")
        while self._ends and self._ends[0][0] <= self._clock.monotonic():
            _, _, entry = heapq.heappop(self._ends)
            if self._entries.get(entry.known.credential) is entry:
                entry.due = math.inf
                self._review(entry)

    def _remember(self, known: KnownCaller) -> _Entry:
        credential = known.credential
        entry = self._entries.get(credential)
        if entry is not None and entry.known.caller != known.caller:  # the files have changed this moment
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
        """Forget the oldest, unless it and those next to it have streams: of those there are no more than connections bear."""
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
        if entry.is_told and known.until != until and not abs(known.until - until) < _CLOSE_S:
            self._front.know(known.credential, known.caller, known.until)
        entry.known = known
        self._look_in_time(entry)

    def _look_in_time(self, entry: _Entry) -> None:
        if entry.known.until < entry.due:
            entry.due = entry.known.until
            heapq.heappush(self._ends, (entry.due, next(self._order), entry))
