"""Reports this server to the others that share its store, and reads their reports."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stepwell_server.errors import ServerError
from stepwell_server.logs import Log
from stepwell_server.process.replicas import Replica, ReplicaState, StoredReplica, decode, encode

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.process.readiness import Readiness, Report
    from stepwell_server.store.base import Store

_log = Log("app")
REPORT_S = 2.0
"""The time between reports, in seconds."""
MISSING_S = 10.0
"""A server is missing if it has not reported for this many seconds. A report may wait for a slow store."""
_LEAVE_S = 1.0
_SHOWN = 3
"""Missing servers that a warning names."""
_MAX_REFUSED = 64
"""Ids of unreadable reports that are remembered, so that each is logged once."""


class ReplicaReports:
    """The servers of the store. Used on the event loop; `run` is its background task."""

    def __init__(self, store: Store, readiness: Readiness, clock: Clock, own: Callable[[], Replica]) -> None:
        """`own` describes this server, without its state."""
        self._store = store
        self._readiness = readiness
        self._clock = clock
        self._describe = own
        self._own: Replica | None = None
        """This server at its last report."""
        self._others: Sequence[Replica] = ()
        self._reported_since: float | None = None
        """Since then every report succeeded, none late (monotonic)."""
        self._reported = 0.0
        """When the latest report succeeded (monotonic)."""
        self._state = ReplicaState.NOT_READY
        self._changed = asyncio.Event()
        self._exchange = asyncio.Lock()
        self._has_left = False
        self._refused: list[str] = []
        readiness.listen(self._note)

    def _note(self, report: Report) -> None:
        before = self._state
        if "stopping" in report.problems:
            self._state = ReplicaState.STOPPING
        else:
            self._state = ReplicaState.READY if report.is_ready else ReplicaState.NOT_READY
        if self._state is not before:
            self._changed.set()

    @property
    def known(self) -> Sequence[Replica]:
        """All servers of the store, this one included, the oldest first. Those of a store that is away are the last known."""
        if self._own is None:
            self._own = self._describe()
        own = dataclasses.replace(self._own, state=self._state, seen=self._clock.now())
        return sorted((own, *self._others), key=lambda one: (one.started, one.id))

    async def run(self) -> None:
        """Report periodically, and at once when the state of this server changes."""
        while True:
            self._changed.clear()
            try:
                await self.report()
            except Exception as error:
                _log.defect("the server could not be reported to the store", error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), REPORT_S)

    async def report(self) -> None:
        """Report this server, and read what the others reported."""
        async with self._exchange:
            if self._has_left:
                return
            self._own = own = dataclasses.replace(self._describe(), state=self._state)
            try:
                found = await self._store.replicas(own.id, encode(own))
            except ServerError as error:
                # the store's monitor reports that it is away
                self._reported_since = None
                _log.debug("the server could not be reported to the store", reason=error.message)
                return
        now = self._clock.monotonic()
        if self._reported_since is None or now - self._reported > MISSING_S:
            self._reported_since = now
        self._reported = now
        self._others = _without_replaced(own, [one for one in self._read(found) if one.id != own.id])
        problems = self._problems(own, is_listed=any(one.replica_id == own.id for one in found))
        self._warn("; ".join(problems))

    def _read(self, found: Sequence[StoredReplica]) -> list[Replica]:
        readable, now = list[Replica](), self._clock.now()
        for stored in found:
            try:
                if stored.age_s < 0:
                    raise ValueError("no server of this release wrote it")
                replica = decode(stored, now)
            except ValueError as error:
                if stored.replica_id not in self._refused:
                    self._refused = [*self._refused[1 - _MAX_REFUSED :], stored.replica_id]
                    _log.warning(
                        "a server's report in the store is ignored", id=stored.replica_id, reason=str(error)
                    )
                continue
            if stored.age_s >= MISSING_S:
                replica = dataclasses.replace(replica, state=ReplicaState.MISSING)
            readable.append(replica)
        return readable

    def _problems(self, own: Replica, *, is_listed: bool) -> list[str]:
        """What an operator should know, in words that stay the same while it does."""
        problems = []
        if not is_listed:
            problems.append(
                "the store's list of servers must have room for this one; it is full, or its key has another type"
            )
        present = [one.version for one in (own, *self._others) if one.state is not ReplicaState.MISSING]
        if versions := sorted(set(present) - {own.version}):
            which = ", ".join(f"{each} ({present.count(each)})" for each in sorted([own.version, *versions]))
            problems.append(f"the servers of the store run different versions: {which}")
        missing = [one for one in self._others if one.state is ReplicaState.MISSING]
        assert self._reported_since is not None
        # after an outage of the store, or a pause of all servers, the others seem to be missing until they have reported
        if missing and self._clock.monotonic() - self._reported_since >= MISSING_S:
            names = [f"{one.id} on {one.host} at {one.address}" for one in missing[:_SHOWN]]
            names += [f"{len(missing) - _SHOWN} more"] if len(missing) > _SHOWN else []
            problems.append(f"servers disappeared without stopping: {', '.join(names)}")
        return problems

    def _warn(self, warning: str) -> None:
        before = self._readiness.report.warnings.get("replicas", "")
        if warning and warning != before:
            _log.warning("the servers of the store need attention", reason=warning)
        elif before and not warning:
            _log.info("the servers of the store need no attention any more")
        self._readiness.warning("replicas", warning)

    async def leave(self) -> None:
        """Remove this server from the store's list."""
        self._has_left = True
        try:
            async with asyncio.timeout(_LEAVE_S), self._exchange:
                await self._store.replicas(self._describe().id, b"")
        except (ServerError, TimeoutError) as error:
            reason = str(error) or f"the store must answer within {_LEAVE_S:g} s; it did not"
            _log.info("the server could not be removed from the store's list of servers", reason=reason)


def _without_replaced(own: Replica, others: Sequence[Replica]) -> list[Replica]:
    """Leave out missing servers in whose place another one was started."""
    places: dict[tuple[str, str], float] = {}
    for one in (own, *others):
        if one.state is not ReplicaState.MISSING:
            place = one.host, one.address
            places[place] = max(one.started, places.get(place, 0.0))
    return [
        one
        for one in others
        if one.state is not ReplicaState.MISSING or places.get((one.host, one.address), 0.0) < one.seen
    ]
