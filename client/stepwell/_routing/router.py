"""Chooses the replicas of calls, knows which replicas there are, and schedules checks. No I/O.

A replica is *down* if a connection to it failed or its health check reported so. Its sessions then go to the next
replica in their order (`_routing.ranking`). If an attempt clearly failed because of a replica, the call goes to the
next one immediately. An unclear failure (a broken stream, "unavailable") makes the replica *suspect*, and its health
is checked. Replicas that are down are checked repeatedly, with a growing delay and jitter. A replica that is up again
gets its sessions back in parts: see `RETURN_S`.

The replicas share their store, so routing is only about speed: whichever replica gets a change, it is applied once.
"""

from __future__ import annotations

import collections
import math
import random
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stepwell._base import addresses
from stepwell._base.flow import Flow, Notify
from stepwell._base.log import LOG
from stepwell._routing.lookup import Lookup
from stepwell._routing.ranking import Keys, weight, weights
from stepwell._routing.replica import Replica
from stepwell._transport.call import Endpoint
from stepwell._transport.connecting import ConnectError
from stepwell._transport.retry import Clock, RepliesTooLargeError
from stepwell.errors import DeadlineExceededError, StepwellError, UnavailableError
from stepwell.events import EventHooks, ReplicaEvent

#: First and longest delay before a replica that is down is checked again, in seconds.
PROBE_S, MAX_PROBE_S = 0.1, 2.0
#: Time limit of a health check, in seconds.
PROBE_TIMEOUT_S = 2.0
#: Shortest time between two checks of a suspect replica, in seconds.
_SUSPECT_S = 0.2
#: The time in seconds, and the number of parts, in which a replica that is up again gets its sessions back.
RETURN_S, _PARTS = 2.0, 8
#: Time between lookups of a name in seconds, and the shortest time if one of its replicas is down.
LOOKUP_S, LOOKUP_RETRY_S = 30.0, 1.0
#: gRPC's text for a connection whose peer has not answered a ping.
_HUNG = "ping timeout"
#: Ranks of replicas for a session: up, up but without the session so far,
#: down.
_UP, _RETURNING, _DOWN = 2, 1, 0


Indexes = npt.NDArray[np.intp]


def are_several(targets: Sequence[str]) -> bool:
    """Whether a client of these addresses has a choice: several addresses, or a name that may have several."""
    return len(targets) > 1 or addresses.is_name(targets[0])


class Watcher(Protocol):
    """Looks after the replicas of a router."""

    def wake(self) -> None:
        """Something may be due: see `Router.due`."""

    def drop(self, replica: Replica, /) -> None:
        """Closes the connections to an address that is no longer a replica."""


class Name:
    """A name of which every address is a replica."""

    __slots__ = ("due_s", "found", "host", "is_asked", "looked_up_s", "port", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.host, self.port = addresses.host_and_port(text)
        self.found: tuple[str, ...] = ()
        self.looked_up_s = -math.inf
        self.due_s = -math.inf
        self.is_asked = False


class Router:
    """Chooses replicas. Thread-safe."""

    def __init__(
        self,
        targets: Sequence[str],
        clock: Clock,
        *,
        watch: Callable[[Router], Watcher] | None = None,
        hooks: EventHooks | None = None,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """The router of a client.

        Args:
            targets: Addresses as gRPC takes them, and names with dns:///.
            clock: Monotonic, in seconds.
            watch: Creates the watcher of the replicas; None: there is none.
            hooks: The client's event hooks.
            draw: Draws from an interval.
        """
        self._clock = clock
        self._draw = draw
        self._hooks = (hooks or {}).get("replica", ())
        self._events: collections.deque[ReplicaEvent] = collections.deque()
        self._lock = threading.RLock()
        self._fixed = tuple([Replica(each) for each in targets if not addresses.is_name(each)])
        self._names = tuple([Name(each) for each in targets if addresses.is_name(each)])
        self._replicas = self._fixed
        self._returning = False
        self._lookup_s = -math.inf if self._names else math.inf
        self._gone: list[Replica] = []
        self.home = random.getrandbits(64)
        """The key of calls without a session, different in each client, so that clients spread over the replicas."""
        self.epoch = 0
        """Changes whenever sessions may have another replica than before."""
        self._watcher = None if watch is None else watch(self)

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """The known replicas."""
        return self._replicas

    # Choosing.

    def ready(self) -> Flow[None]:
        """Looks up names if no replica is known yet.

        Raises:
            ConnectError: No name could be looked up.
        """
        if self._replicas:
            return
        last: StepwellError | None = None
        for name in self._names:
            try:
                addresses = yield Lookup(name.host, name.port)
            except ConnectError as error:
                last = error
            else:
                self.found(name, addresses)
        if not self._replicas:
            assert last is not None
            raise last

    def choose(self, key: int, tried: Collection[Replica] = ()) -> Replica:
        """The replica for a call: the first in the order of its key that was not tried."""
        self.look()
        best, most = None, -1
        for replica in self._replicas:
            if tried and replica in tried:
                continue
            own = weight(key, replica.seed)
            own = (self._rank(replica, own & 7) << 62) | (own >> 2)
            if own > most:
                best, most = replica, own
        return best or self.choose(key)

    def choose_all(self, keys: Keys, tried: Collection[Replica] = ()) -> tuple[tuple[Replica, ...], Indexes]:
        """The same for many keys: the replicas, and the index of each key's replica, (n,)."""
        self.look()
        replicas = tuple([each for each in self._replicas if each not in tried]) or self._replicas
        table = np.empty((len(replicas), len(keys)), np.uint64)
        for i, replica in enumerate(replicas):
            drawn = weights(keys, replica.seed)
            ranks = np.array([self._rank(replica, part) << 62 for part in range(_PARTS)], np.uint64)
            table[i] = ranks[(drawn & np.uint64(7)).astype(np.intp)] | (drawn >> np.uint64(2))
        return replicas, np.argmax(table, axis=0)

    def split(self, keys: Keys, tried: Collection[Replica] = ()) -> list[tuple[Replica, Indexes]]:
        """The same by replica: each replica of some keys, and the indexes of its keys."""
        replicas, of = self.choose_all(keys, tried)
        return [(to, own) for i, to in enumerate(replicas) if len(own := np.flatnonzero(of == i))]

    def _rank(self, replica: Replica, part: int) -> int:
        if replica.is_down:
            return _DOWN
        return _UP if part < replica.parts else _RETURNING

    def look(self) -> None:
        """Does what has become due."""
        if not self._returning and self._lookup_s == math.inf:
            return
        now_s = self._clock()
        if self._returning:
            self._give_back(now_s)
        if now_s >= self._lookup_s:
            self._wake()

    def _wake(self) -> None:
        if self._watcher is not None:
            self._watcher.wake()

    def _give_back(self, now_s: float) -> None:
        """Gives returning replicas more of their sessions."""
        with self._lock:
            self._returning = False
            for replica in self._replicas:
                if replica.parts < _PARTS:
                    parts = min(_PARTS, 1 + int(_PARTS * (now_s - replica.back_s) / RETURN_S))
                    if parts != replica.parts:
                        replica.parts = parts
                        self.epoch += 1
                    self._returning |= parts < _PARTS

    def is_another_up(self, tried: Collection[Replica]) -> bool:
        """Whether another replica is up."""
        return any(not each.is_down and each not in tried for each in self._replicas)

    # Results of attempts and checks.

    def failed(self, replica: Replica, generation: int, error: StepwellError) -> bool:
        """An attempt has failed. Returns whether because of the replica, so that the call should go to another one."""
        if isinstance(error, RepliesTooLargeError):
            return False
        if isinstance(error, ConnectError) or (_HUNG in error.message and not error.reason):
            if replica.generation == generation:
                self._down(replica, error)
            return True
        if isinstance(error, UnavailableError | DeadlineExceededError):
            self._suspect(replica)
        return isinstance(error, UnavailableError)

    def _suspect(self, replica: Replica) -> None:
        with self._lock:
            if replica.is_down or replica.is_checked:
                return
            replica.due_s = min(replica.due_s, max(self._clock(), replica.checked_s + _SUSPECT_S))
        self._wake()

    def _down(self, replica: Replica, error: StepwellError) -> None:
        with self._lock:
            replica.error = error
            if replica.is_down:
                return
            replica.is_down = True
            replica.generation += 1
            replica.failures = 0
            replica.due_s = self._clock() + self._delay_s(replica)
            self.epoch += 1
            for name in self._names:
                if replica.address in name.found:
                    name.due_s = min(name.due_s, name.looked_up_s + LOOKUP_RETRY_S)
            self._set_lookup()
            self._notify(replica)
        LOG.info("replica %s is down: %s", replica.address, error.message)
        self._wake()

    def up(self, replica: Replica) -> None:
        """Records that a replica is up."""
        with self._lock:
            if not replica.is_down:
                return
            replica.is_down = False
            replica.generation += 1
            replica.error = None
            replica.due_s = math.inf
            self._begin(replica)
            self._notify(replica)
        LOG.info("replica %s is up again and takes back its sessions", replica.address)

    def _begin(self, replica: Replica) -> None:
        # clients start at different times, each when its own check succeeds
        replica.back_s = self._clock()
        replica.parts = 1
        self._returning = True
        self.epoch += 1

    def _notify(self, replica: Replica) -> None:
        if self._hooks:
            self._events.append(ReplicaEvent(replica.address, not replica.is_down, replica.error))

    def notifications(self) -> Flow[None]:
        """Calls the hooks of new events."""
        while self._events:
            try:
                event = self._events.popleft()
            except IndexError:  # another thread was faster
                return
            yield Notify(self._hooks, event)

    def reasons(self) -> str:
        """Why replicas are down, each with its address; empty unless several are."""
        down = [(each.address, each.error.message) for each in self._replicas if each.error is not None]
        if len(down) < 2:
            return ""
        return "; ".join([f"{address}: {message}" for address, message in down])

    # Checks and lookups that are due.

    def due(self) -> tuple[list[Replica], list[Name]]:
        """Replicas to check and names to look up now; report the results to `checked`, `found` or `not_found`."""
        now_s = self._clock()
        with self._lock:
            replicas = [each for each in self._replicas if each.due_s <= now_s and not each.is_checked]
            names = [each for each in self._names if each.due_s <= now_s and not each.is_asked]
            for replica in replicas:
                replica.is_checked = True
            for name in names:
                name.is_asked = True
            self._set_lookup()
            return replicas, names

    def wait_s(self) -> float:
        """Seconds until something is due; infinity if nothing is scheduled."""
        now_s = self._clock()
        with self._lock:
            dues = [each.due_s for each in self._replicas if not each.is_checked]
            # a name alone wakes no thread: choosing a replica checks whether the name is due
            dues += [each.due_s for each in self._names if not each.is_asked and each.due_s <= now_s]
        return max(0.0, min(dues, default=math.inf) - now_s)

    def checked(self, replica: Replica, error: StepwellError | None) -> None:
        """Records the result of a check; the error tells why the replica is down."""
        with self._lock:
            replica.is_checked = False
            replica.checked_s = self._clock()
            replica.due_s = math.inf
            if error is not None and replica.is_down:
                replica.failures += 1
                replica.error = error
                replica.due_s = self._clock() + self._delay_s(replica)
                return
        if error is None:
            self.up(replica)
        else:
            self._down(replica, error)

    def _delay_s(self, replica: Replica) -> float:
        longest = min(MAX_PROBE_S, PROBE_S * 2 ** min(replica.failures, 10))
        return self._draw(longest / 2, longest)

    def found(self, name: Name, addresses: Iterable[str]) -> None:
        """Records the addresses of a name."""
        with self._lock:
            self._looked_up(name)
            name.found = tuple(addresses)
            # its connections stayed open until now, for active calls
            dropped, self._gone = self._gone, []
            self._set()
        if self._watcher is not None:
            for replica in dropped:
                self._watcher.drop(replica)

    def not_found(self, name: Name) -> None:
        """Records a failed lookup: the known addresses stay."""
        with self._lock:
            self._looked_up(name)

    def _looked_up(self, name: Name) -> None:
        name.is_asked = False
        name.looked_up_s = self._clock()
        name.due_s = name.looked_up_s + self._draw(LOOKUP_S / 2, LOOKUP_S)
        if any(each.is_down and each.address in name.found for each in self._replicas):
            name.due_s = name.looked_up_s + self._draw(LOOKUP_RETRY_S, 2 * LOOKUP_RETRY_S)
        self._set_lookup()

    def _set_lookup(self) -> None:
        self._lookup_s = min([each.due_s for each in self._names if not each.is_asked], default=math.inf)

    def _set(self) -> None:
        """Makes the replicas those that were given and those that were found."""
        known = {each.address: each for each in self._replicas}
        wanted = {each.address: each for each in self._fixed}
        for name in self._names:
            for address in name.found:
                if address not in wanted:
                    wanted[address] = known.get(address) or Replica(address, name.host, name.text)
        if wanted.keys() == known.keys():
            return
        self.epoch += 1
        for address, replica in wanted.items():
            if known and address not in known:
                self._begin(replica)
        self._gone += [known[address] for address in known.keys() - wanted.keys()]
        LOG.info("the replicas are now %s", ", ".join(sorted(wanted)))
        self._replicas = tuple(wanted.values())


class Route:
    """The targets of the attempts of one call."""

    __slots__ = ("_generation", "_key", "_only", "_router", "_tried", "_was_down", "to")

    def __init__(self, router: Router, key: int, only: Endpoint | None = None) -> None:
        """The route of the call with this key; `only`: the only replica to ask."""
        self._router = router
        self._key = key
        self._only = only
        self._tried: tuple[Replica, ...] = ()
        self._was_down = False
        self._generation = 0
        self.to: Replica | None = None
        """Target of the last attempt."""

    def next(self) -> Flow[Replica]:
        """The replica for the next attempt.

        Raises:
            ConnectError: No replica is known.
        """
        router = self._router
        if not router.replicas:
            yield from router.ready()
        if self._only is None:
            to = router.choose(self._key, self._tried)
        else:
            assert isinstance(self._only, Replica)
            to = self._only
        self.to = to
        self._generation, self._was_down = to.generation, to.is_down
        yield from router.notifications()
        return to

    def answered(self) -> None:
        """Records that the attempt was answered."""
        if self._was_down and self.to is not None:
            self._router.up(self.to)

    def failed(self, error: StepwellError) -> Flow[bool]:
        """Records that the attempt has failed. Returns whether to ask another replica immediately.

        Raises:
            ConnectError: The only replica to ask cannot be reached; the call does not wait for it.
        """
        if self.to is None or not self._router.failed(self.to, self._generation, error):
            return False
        if self._only is not None:
            if isinstance(error, ConnectError):
                raise error
            return False
        yield from self._router.notifications()
        self._tried = (*self._tried, self.to)
        if self._router.is_another_up(self._tried):
            return True
        if all(each in self._tried for each in self._router.replicas):
            self._tried = ()
        return False
