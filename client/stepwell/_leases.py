"""A client says that it is there, so that its sessions which nobody named do not end.

All sync clients of a process share one thread, which is there while one of them has such sessions; an async client has
a task. Each says so a few times in the time that its lease allows, by a call that costs next to nothing.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

from stepwell._flow import Call
from stepwell._log import LOG
from stepwell.errors import ClosedError, StepwellError
from stepwell.v1 import sessions_pb2

SESSION, GROUP = "session", "group"
"""What has a lease: a session, or a group as a whole, whichever of its members are closed before."""
_RENEWALS_PER_LEASE = 3


class Lease:
    """The lease that a client asks for, and which of its sessions have it. Thread-safe."""

    def __init__(self, seconds: float, on_first: Callable[[], None]) -> None:
        """`on_first` is called when there is a session that has it, and there was none."""
        self.seconds = seconds
        self.client_id = secrets.randbits(64) or 1
        self._on_first = on_first
        self._sessions: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    @property
    def is_needed(self) -> bool:
        """A session has it."""
        return bool(self._sessions)

    @property
    def pause_s(self) -> float:
        """Seconds between two calls."""
        return self.seconds / _RENEWALS_PER_LEASE

    def message(self) -> sessions_pb2.Lease:
        """As a request has it."""
        lease = sessions_pb2.Lease(client_id=self.client_id)
        lease.duration.FromMilliseconds(round(self.seconds * 1000))
        return lease

    def call(self) -> Call:
        """One attempt to say that the client is there."""
        request = sessions_pb2.RenewLeaseRequest(client_id=self.client_id)
        return Call("RenewLease", request, self.pause_s)

    def add(self, kind: str, session_id: str) -> None:
        """A session has it, or the group that begins with it."""
        with self._lock:
            is_first = not self._sessions
            self._sessions.add((kind, session_id))
        if is_first:
            self._on_first()

    def discard(self, kind: str, session_id: str) -> None:
        """A session was closed, or the whole group that begins with it."""
        with self._lock:
            self._sessions.discard((kind, session_id))

    def end(self) -> None:
        """Nobody needs it any more."""
        with self._lock:
            self._sessions.clear()


Start = Callable[[Call, Callable[[StepwellError | None], None]], None]
"""Begins a call and returns; what became of it is told later, from any thread. Raises `ClosedError`."""


class Renewal:
    """Renews the lease of a sync client. Thread-safe."""

    def __init__(self, start: Start) -> None:
        self.lease: Lease | None = None
        self.due = 0.0
        self._start = start
        self._is_under_way = False

    def renew(self) -> bool:
        """Begin a call unless one is under way; whether to go on."""
        lease = self.lease
        if lease is None or not lease.is_needed:
            return False
        if not self._is_under_way:
            self._is_under_way = True
            try:
                self._start(lease.call(), self._done)
            except ClosedError:
                return False
            except Exception:
                # gRPC may get no thread just now, say. The thread that is here renews the leases of all clients.
                self._is_under_way = False
                LOG.warning("a lease was not renewed; again in %.1f s", lease.pause_s, exc_info=True)
        return True

    def _done(self, _error: StepwellError | None) -> None:
        # Also after a refusal: a proxy on the way may refuse for a moment, and the sessions still have their lease.
        self._is_under_way = False


class _Renewer:
    """The thread of all sync clients. It does not wait for any server."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._renewals: list[weakref.ref[Renewal]] = []
        self._thread: threading.Thread | None = None

    def add(self, renewal: Renewal) -> None:
        """Renew a lease from now on, until it is not needed or its client is gone."""
        assert renewal.lease is not None
        with self._changed:
            renewal.due = time.monotonic() + renewal.lease.pause_s
            if not any(known() is renewal for known in self._renewals):
                self._renewals.append(weakref.ref(renewal))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="stepwell-leases", daemon=True)
                self._thread.start()
            self._changed.notify()

    def remove(self, renewal: Renewal) -> None:
        """A client is closed."""
        with self._changed:
            self._renewals = [found for found in self._renewals if found() is not renewal]
            self._changed.notify()

    def _work(self) -> None:
        while (pause_s := self._renew_due()) is not None:
            with self._changed:
                self._changed.wait(pause_s)

    def _renew_due(self) -> float | None:
        """Renew what is due; seconds until more is, None if nothing will be.

        Nobody holds a renewal when this has returned: its client may be lost.
        """
        for renewal in self._take_due():
            if not renewal.renew():
                self._remove(renewal)
        with self._changed:
            self._renewals = [found for found in self._renewals if found() is not None]
            dues = [known.due for found in self._renewals if (known := found()) is not None]
            if not dues:
                self._thread = None
                return None
            return max(0.0, min(dues) - time.monotonic())

    def _take_due(self) -> list[Renewal]:
        with self._changed:
            now = time.monotonic()
            known = [renewal for found in self._renewals if (renewal := found()) is not None]
            due = [renewal for renewal in known if renewal.due <= now]
            for renewal in due:
                assert renewal.lease is not None
                renewal.due = now + renewal.lease.pause_s
            return due

    def _remove(self, gone: Renewal) -> None:
        with self._changed:
            if gone.lease is not None and gone.lease.is_needed:
                return  # by now it is
            self._renewals = [found for found in self._renewals if found() is not gone]

    def forget(self) -> None:
        """In a forked child there is no thread, and the clients are the parent's."""
        self.__init__()  # type: ignore[misc]


RENEWER = _Renewer()
os.register_at_fork(after_in_child=RENEWER.forget)


async def renew_while_needed(lease: Lease, invoke: Callable[[Call], Awaitable[Any]]) -> None:
    """Renew the lease of an async client, until it is not needed."""
    while True:
        await asyncio.sleep(lease.pause_s)
        if not lease.is_needed:
            return
        try:
            await invoke(lease.call())
        except ClosedError:
            return
        except StepwellError:
            pass  # whatever it is, the sessions still have their lease: see `Renewal`
