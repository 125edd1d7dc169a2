"""A caller that opens and forks many sessions with one call, all or none, and retries it at another replica."""

from __future__ import annotations

from collections.abc import Sequence

from support.checks.history import Call, End
from support.sim.callers import Callers, closed
from support.sim.programs import Mix, Own, Owner


class Together:
    """Opens the same sessions again and again, with others who want some of them too."""

    def __init__(self, callers: Callers, mix: Mix, names: Sequence[str]) -> None:
        self._callers = callers
        self._names = names
        self._owner = Owner(callers, mix, [])
        self._forks = 0

    async def run(self, end_s: float) -> None:
        """Work until a moment on the world's clock."""
        world = self._callers.world
        while world.now < end_s:
            own = await self._open()
            for _ in range(world.random.randint(0, 3)):
                if own:
                    await self._owner.any_step(world.random.choice(own))
            if own and world.chance(0.5):
                own += await self._fork([each for each in own if each.is_there])
            await self._callers.sleep(0.5)
            for each in own:
                while each.is_there:
                    await self._close(each)
            await self._callers.sleep(0.5)

    async def _close(self, own: Own) -> None:
        """The same request, sent again until it is answered: it leaves what others have opened meanwhile."""
        callers, request_id = self._callers, self._callers.request_id()
        op = callers.history.call(Call(kind="close", session=own.name, request_id=request_id))
        end = await callers.until_told(
            op, lambda engine: engine.close_session(own.name, request_id=request_id), closed
        )
        own.is_there = end.outcome not in ("acknowledged", "gone")
        if own.is_there:
            await callers.sleep(callers.way.pause_s)

    async def _open(self) -> list[Own]:
        ends = await self._callers.open_many(self._names, self._callers.request_id())
        return _there(self._names, ends)

    async def _fork(self, parents: Sequence[Own]) -> list[Own]:
        if not parents:
            return []
        self._forks += 1
        request_id = self._callers.request_id()
        names = [f"{parent.name}+{self._forks}.{request_id}" for parent in parents]
        ends = await self._callers.fork_many(
            [parent.name for parent in parents], [1] * len(parents), names, request_id
        )
        return _there(names, ends)


def _there(names: Sequence[str], ends: Sequence[End]) -> list[Own]:
    """The sessions that a call has made."""
    return [
        Own(name, is_there=True, revision=end.revision)
        for name, end in zip(names, ends, strict=True)
        if end.outcome == "acknowledged"
    ]
