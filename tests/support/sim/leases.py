"""Clients with leases: they open sessions whose ids servers make, say that they are there, and fall silent now and then."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from stepwell_server.engine.engine import Engine
from stepwell_server.engine.sessions.ids import IdMaker
from stepwell_server.engine.sessions.overdue import LATE_S
from stepwell_server.engine.sessions.using import SHARE
from stepwell_server.errors import ServerError
from support.history import Call
from support.sim.callers import Callers, Lost, opened
from support.sim.client import FOUND
from support.sim.programs import Mix, Own, Owner

#: So long the longest part of it takes that sessions end whose client is gone, beside the lease: another server takes the
#: task over from one that has died, and then it looks every half minute.
ENDED_S = 90.0 + 2 * 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class Renewal:
    """That a client was told that it is known to be there."""

    client: int
    called_s: float
    told_s: float


class Leases:
    """What was told about clients, and when their sessions may end."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self.client_of: dict[str, int] = {}
        """By session."""
        self._renewals: list[Renewal] = []
        self._unheard: Sequence[tuple[int, float, float]] = ()

    def renewed(self, client: int, called_s: float, told_s: float) -> None:
        """A client was told so."""
        self._renewals.append(Renewal(client, called_s, told_s))

    def forget(self, unheard: Iterable[tuple[int, float, float]]) -> None:
        """A store that failed over does not know of clients what it had heard between two times."""
        self._unheard = list(unheard)

    def ends_after(self, session: str, used_s: float, now_s: float) -> float:
        """When a session may end, from now on: nobody used it, and nobody heard of its client, for as long as the lease.

        That was judged by a moment a little before.
        """
        client = self.client_of.get(session)
        if client is None:
            return float("inf")
        at_s = max(used_s + self.lease_s, now_s - LATE_S)
        for each in sorted(self._renewals, key=lambda renewal: renewal.told_s):
            # the store is told of clients at most every tenth of the lease
            until_s = each.called_s + (1 - SHARE) * self.lease_s
            if each.client == client and each.told_s <= at_s < until_s and not self._is_lost(each):
                at_s = until_s
        return at_s

    def _is_lost(self, renewal: Renewal) -> bool:
        heard_s = renewal.called_s - SHARE * self.lease_s
        return any(
            client == renewal.client and since_s <= renewal.told_s and heard_s <= until_s
            for client, since_s, until_s in self._unheard
        )


class Holder:
    """One client."""

    def __init__(self, callers: Callers, leases: Leases, mix: Mix) -> None:
        self._callers = callers
        self._leases = leases
        self._owner = Owner(callers, mix, [])
        self._client = callers.request_id()
        made_by: Any = FOUND
        self._ids = IdMaker(made_by)

    async def run(self, end_s: float) -> None:
        """Work until a moment on the world's clock, then be gone."""
        world, lease_s = self._callers.world, self._leases.lease_s
        while world.now < end_s:
            there = [own for own in self._owner.sessions if own.is_there]
            if len(there) < 2:
                await self._open()
            await self._renew()
            if there:
                own = world.random.choice(there)
                await (self._owner.read(own) if world.chance(0.3) else self._owner.any_step(own))
            if world.chance(0.1):
                await self._callers.sleep(lease_s * 1.5)
            for _ in range(world.random.randint(1, 12)):  # it is there, and does nothing
                await self._callers.sleep(lease_s / 5)
                await self._renew()

    async def _renew(self) -> None:
        callers = self._callers
        called_s, client = callers.world.now, self._client

        async def work(engine: Engine) -> None:
            await engine.renew_lease(client)

        try:
            await callers.ask(callers.some_replica(), work)
        except (ServerError, Lost):
            return
        self._leases.renewed(client, called_s, callers.world.now)
        callers.world.note("renewed", client)

    async def _open(self) -> None:
        callers, request_id = self._callers, self._callers.request_id()
        name = self._ids.make(request_id)
        self._leases.client_of[name] = self._client
        op = callers.history.call(
            Call(kind="open", session=name, request_id=request_id, must_be_new=True, batch_size=1)
        )
        end = await callers.until_told(op, functools.partial(self._opened, request_id), opened)
        if end.outcome == "acknowledged":
            self._owner.sessions.append(Own(name, is_there=True, revision=end.revision))

    async def _opened(self, request_id: int, engine: Engine) -> Any:
        lease = (self._client, int(self._leases.lease_s * 1000))
        return await engine.open_session("plain", request_id=request_id, lease=lease)
