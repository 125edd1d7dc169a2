"""Checks replicas that are down, and looks up names again, while the client's calls continue: see `Router.due`.

A sync client has a thread for it, an async one a task; both exist only while there is something to do.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import weakref
from collections.abc import Awaitable, Callable

from stepwell._routing.lookup import Lookup, look_up, look_up_async
from stepwell._routing.replica import Replica
from stepwell._routing.router import PROBE_TIMEOUT_S, Name, Router
from stepwell._transport.connecting import ConnectError
from stepwell.errors import StepwellError

#: Time limit of a name lookup in the background, in seconds.
_LOOKUP_TIMEOUT_S = 10.0
#: Longest sleep of the thread in seconds, so that it ends soon after its client was collected.
_LONGEST_S = 60.0
_probers: weakref.WeakSet[Prober] = weakref.WeakSet()


class Prober:
    """Checks the replicas of a sync client. Thread-safe.

    Each check has a thread of its own, so that one that hangs does not delay the others.
    """

    def __init__(
        self,
        router: Router,
        check: Callable[[Replica, float], StepwellError | None],
        drop: Callable[[Replica], None],
        connect_timeout_s: float,
    ) -> None:
        self._router = router
        self._check = check
        self.drop = drop
        """Closes the connections to an endpoint that is no longer a replica."""
        self._timeout_s = max(PROBE_TIMEOUT_S, min(connect_timeout_s, 20.0))
        self._woken = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        _probers.add(self)

    def wake(self) -> None:
        """There is something to do."""
        self._woken.set()
        with self._lock:
            if self._thread is None and not self._is_closed:
                work = (weakref.ref(self), self._woken)
                self._thread = threading.Thread(
                    target=_work, args=work, name="stepwell-replicas", daemon=True
                )
                self._thread.start()

    def look(self) -> float | None:
        """Starts what is due. Called by the thread.

        Returns:
            Seconds until the next is due; None if nothing is scheduled.
        """
        self._woken.clear()
        replicas, names = self._router.due()
        for replica in replicas:
            self._begin(self._probe, replica)
        for name in names:
            self._begin(self._look_up, name)
        wait_s = self._router.wait_s()
        with self._lock:
            if self._is_closed or (math.isinf(wait_s) and not self._woken.is_set()):
                self._thread = None
                return None
        return min(wait_s, _LONGEST_S)

    @staticmethod
    def _begin(work: Callable[..., None], about: Replica | Name) -> None:
        threading.Thread(target=work, args=(about,), name="stepwell-replica", daemon=True).start()

    def _probe(self, replica: Replica) -> None:
        try:
            error = self._check(replica, self._timeout_s)
        except StepwellError as closed:
            error = closed
        if not self._is_closed:
            self._router.checked(replica, error)
            self.wake()

    def _look_up(self, name: Name) -> None:
        try:
            addresses = look_up(Lookup(name.host, name.port), _LOOKUP_TIMEOUT_S)
        except ConnectError:
            self._router.not_found(name)
        else:
            self._router.found(name, addresses)

    def close(self) -> None:
        """Ends the thread; running checks end with the connections."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        self._woken.set()
        if thread is not None:
            thread.join()

    def forget(self) -> None:
        """In a forked child there is no thread."""
        self._lock = threading.Lock()
        self._thread = None


def _forget() -> None:
    for prober in list(_probers):
        prober.forget()


os.register_at_fork(after_in_child=_forget)


def _work(prober: weakref.ref[Prober], woken: threading.Event) -> None:
    # nothing refers to the client while the thread sleeps, so that an unclosed client can be collected
    while (wait_s := _look(prober)) is not None:
        woken.wait(wait_s)


def _look(prober: weakref.ref[Prober]) -> float | None:
    alive = prober()
    return None if alive is None else alive.look()


class AsyncProber:
    """Checks the replicas of an async client. Belongs to one event loop."""

    def __init__(
        self,
        router: Router,
        check: Callable[[Replica, float], Awaitable[StepwellError | None]],
        drop: Callable[[Replica], Awaitable[None]],
        connect_timeout_s: float,
    ) -> None:
        self._router = router
        self._check = check
        self._drop_one = drop
        self._timeout_s = max(PROBE_TIMEOUT_S, min(connect_timeout_s, 20.0))
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def wake(self) -> None:
        """There is something to do."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._is_closed:
            return
        replicas, names = self._router.due()
        for replica in replicas:
            self._begin(self._probe(replica))
        for name in names:
            self._begin(self._look_up(name))
        wait_s = self._router.wait_s()
        if wait_s < math.inf:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self.wake)

    def _begin(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _probe(self, replica: Replica) -> None:
        try:
            error = await self._check(replica, self._timeout_s)
        except StepwellError as closed:
            error = closed
        if not self._is_closed:
            self._router.checked(replica, error)
            self.wake()

    async def _look_up(self, name: Name) -> None:
        try:
            addresses = await look_up_async(Lookup(name.host, name.port), _LOOKUP_TIMEOUT_S)
        except ConnectError:
            self._router.not_found(name)
        else:
            self._router.found(name, addresses)

    def drop(self, replica: Replica) -> None:
        """Closes the connection to an address that is no longer a replica."""
        self._begin(self._drop_one(replica))

    async def close(self) -> None:
        """Ends running checks."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
