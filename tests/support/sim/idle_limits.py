"""Sessions with idle limits of their own, whose ids servers make: their callers use them, and leave them alone now and then."""

from __future__ import annotations

import functools
from typing import Any

from stepwell_server.engine.engine import Engine
from stepwell_server.engine.sessions.directory import IdMaker
from support.checks.history import Call
from support.sim.callers import Callers, opened
from support.sim.client import FOUND
from support.sim.programs import Mix, Own, Owner

#: Sessions end within this time after their limits, in seconds: another server takes the task over from one that has died,
#: and then it looks every half minute.
ENDED_S = 90.0 + 2 * 30.0


class Limits:
    """Which limits sessions have, and when they may end."""

    def __init__(self, longest_s: float) -> None:
        """`longest_s` 0: no session has one."""
        self.longest_s = longest_s
        self.of: dict[str, float] = {}
        """In seconds, by session."""

    def ends_after(self, session: str, used_s: float, _now_s: float) -> float:
        """When a session may end at the earliest that was changed last at `used_s`."""
        return used_s + self.of.get(session, float("inf"))


class Holder:
    """A caller that opens such sessions, uses them, and does nothing for longer than their limits now and then."""

    def __init__(self, callers: Callers, limits: Limits, mix: Mix) -> None:
        self._callers = callers
        self._limits = limits
        self._owner = Owner(callers, mix, [])
        made_by: Any = FOUND
        self._ids = IdMaker(made_by)

    async def run(self, end_s: float) -> None:
        """Work until a moment on the world's clock."""
        world, longest_s = self._callers.world, self._limits.longest_s
        while world.now < end_s:
            there = [own for own in self._owner.sessions if own.is_there]
            if len(there) < 2:
                await self._open()
            if there:
                own = world.random.choice(there)
                await (self._owner.read(own) if world.chance(0.3) else self._owner.any_step(own))
            pause_s = longest_s * (1.2 if world.chance(0.1) else 0.1 * world.random.random())
            await self._callers.sleep(pause_s)

    async def _open(self) -> None:
        callers, request_id = self._callers, self._callers.request_id()
        name = self._ids.make(request_id)
        limit_s = self._limits.longest_s * callers.world.random.choice([0.3, 0.6, 1.0])
        self._limits.of[name] = limit_s
        op = callers.history.call(
            Call(kind="open", session=name, request_id=request_id, must_be_new=True, batch_size=1)
        )
        end = await callers.until_told(
            op, functools.partial(_opened, request_id, round(limit_s * 1000)), opened
        )
        if end.outcome == "acknowledged":
            self._owner.sessions.append(Own(name, is_there=True, revision=end.revision))


async def _opened(request_id: int, max_idle_ms: int, engine: Engine) -> Any:
    return await engine.open_session("plain", request_id=request_id, max_idle_ms=max_idle_ms)
