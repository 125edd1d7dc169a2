"""What callers do with sessions: owners open, change, fork, close and open them again; guests change and read them too."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from stepwell_server.engine.api import StateResult
from stepwell_server.engine.engine import Engine
from stepwell_server.errors import ServerError
from support.checks.history import ANY, Call, End, Floats, Kind
from support.engine.harness import Answer
from support.sim.callers import (
    Callers,
    Member,
    changed,
    closed,
    end_of,
    is_open,
    looked,
    opened,
    read,
    read_each,
    submitted,
)


@dataclasses.dataclass
class Mix:
    """How often callers do what: weights."""

    step: float = 6
    steps: float = 1
    reset: float = 1
    any_step: float = 2
    read: float = 2
    read_many: float = 1
    look: float = 1
    frame: float = 3
    line: float = 1
    fork: float = 0.3
    close: float = 0.5
    resume: float = 0.7
    rest: float = 0.0
    fork_many: float = 0.0
    resume_many: float = 0.0
    reuse: float = 0.0
    think_s: float = 0.2


@dataclasses.dataclass
class Own:
    """A session as its owner knows it."""

    name: str
    rows: int = 1
    is_there: bool = False
    revision: int | None = None
    """None: it must ask."""
    last: tuple[int, Member] | None = None
    """Its last change that was answered, and the revision that it made."""


class Owner:
    """Opens sessions and works with them; nobody else closes them, or opens them anew."""

    def __init__(
        self,
        callers: Callers,
        mix: Mix,
        names: Sequence[str],
        *,
        must_be_new: bool = False,
        together: bool = False,
    ) -> None:
        """`together`: those that are not there are opened by one call."""
        self._together = together
        self.callers = callers
        self.world = callers.world
        self.mix = mix
        self.sessions = [Own(name) for name in names]
        self._must_be_new = must_be_new
        self._forks = 0

    async def run(self, end_s: float) -> None:
        """Work until a moment on the world's clock."""
        mix, random = self.mix, self.world.random
        fields = [f.name for f in dataclasses.fields(mix) if f.name != "think_s"]
        weights = [getattr(mix, name) for name in fields]
        while self.world.now < end_s:
            own = random.choice(self.sessions)
            if not own.is_there:
                if not await self._begin(own):
                    await self.callers.sleep(self.mix.think_s)
                continue
            if own.revision is None:
                await self.look(own)
                if own.revision is None:
                    await self.callers.sleep(self.mix.think_s)
                    continue
            await getattr(self, random.choices(fields, weights)[0])(own)
            await self.callers.sleep(self.mix.think_s)

    # --------------------------------------------------------------------------------------------- begin and end

    async def _begin(self, own: Own) -> bool:
        if not self._together:
            return await self.open(own)
        if self.mix.resume_many and self.world.chance(0.5):
            await self.resume_many(own)
            return own.is_there
        return await self.open_many()

    async def resume_many(self, _own: Own) -> None:
        """Resume all sessions that are there, and open those that are not, by one call."""
        callers = self.callers
        owns = [own for own in self.sessions if own.rows == 1]
        ends = await callers.resume_many([own.name for own in owns], callers.request_id())
        for own, end in zip(owns, ends, strict=True):
            self.learn(own, end)
            if end.outcome == "acknowledged":
                own.is_there = True

    async def open(self, own: Own) -> bool:
        """Open a session, or find it; whether it is there."""
        callers, random = self.callers, self.world.random
        states = {"sum": floats(self, own.rows)} if random.random() < 0.3 else None
        must_be_new, request_id = self._must_be_new or random.random() < 0.5, callers.request_id()
        op = callers.history.call(
            Call(
                kind="open",
                session=own.name,
                request_id=request_id,
                must_be_new=must_be_new,
                batch_size=own.rows,
                states=states,
            )
        )
        end = await callers.until_told(
            op,
            lambda engine: engine.open_session(
                "plain",
                session_id=own.name,
                batch_size=own.rows,
                state=states,
                must_be_new=must_be_new,
                request_id=request_id,
            ),
            opened,
        )
        own.is_there = end.outcome == "acknowledged" or end.error.startswith("SessionExists")
        own.revision = end.revision
        return own.is_there

    async def open_many(self) -> bool:
        """Open all sessions that are not there by one call; whether they are there."""
        callers, request_id = self.callers, self.callers.request_id()
        owns = [own for own in self.sessions if not own.is_there and own.rows == 1]
        ends = await callers.open_many([own.name for own in owns], request_id)
        for own, end in zip(owns, ends, strict=True):
            own.is_there = end.outcome == "acknowledged" or end.error.startswith("SessionExists")
            own.revision = None if end.found else end.revision
        return all(own.is_there for own in owns)

    async def fork_many(self, _own: Own) -> None:
        """Make sessions of all sessions that are there, by one call."""
        callers, request_id = self.callers, self.callers.request_id()
        owns = [each for each in self.sessions if each.is_there]
        self._forks += 1
        names = [f"{own.name}.{self._forks}" for own in owns]
        ends = await callers.fork_many(
            [own.name for own in owns], [own.rows for own in owns], names, request_id
        )
        for own, name, end in zip(owns, names, ends, strict=True):
            if end.outcome == "acknowledged":
                revision = None if end.found else end.revision
                self.sessions.append(Own(name, own.rows, is_there=True, revision=revision))

    async def open_once(self, name: str) -> None:
        """Open a session that others want to open too, and change it if it is there."""
        own = Own(name)
        if await self.open(own):
            for _ in range(3):
                await self.any_step(own)

    async def resume(self, own: Own) -> None:
        """Open a session that is there."""
        callers = self.callers
        op = callers.history.call(Call(kind="open", session=own.name, batch_size=own.rows))
        end = await callers.until_told(
            op,
            lambda engine: engine.open_session("plain", session_id=own.name, batch_size=own.rows),
            opened,
            again=False,
        )
        self.learn(own, end)

    async def close(self, own: Own) -> None:
        """End a session."""
        callers, request_id = self.callers, self.callers.request_id()
        op = callers.history.call(Call(kind="close", session=own.name, request_id=request_id))
        end = await callers.until_told(
            op, lambda engine: engine.close_session(own.name, request_id=request_id), closed
        )
        own.is_there = end.outcome not in ("acknowledged", "gone")
        own.revision = None

    async def fork(self, own: Own) -> None:
        """Make a session of a session."""
        callers, request_id = self.callers, self.callers.request_id()
        self._forks += 1
        name = f"{own.name}.{self._forks}"
        op = callers.history.call(
            Call(kind="fork", session=name, parent=own.name, request_id=request_id, batch_size=own.rows)
        )
        end = await callers.until_told(
            op,
            lambda engine: engine.fork(own.name, new_session_id=name, request_id=request_id),
            opened,
        )
        if end.outcome == "acknowledged":
            self.sessions.append(
                Own(name, own.rows, is_there=True, revision=None if end.found else end.revision)
            )

    # ------------------------------------------------------------------------------------------------------ changes

    async def step(self, own: Own) -> None:
        """One step, which expects the session's current revision."""
        await self._change([own], [])

    async def steps(self, own: Own) -> None:
        """Several time steps."""
        await self._change([own], [self.world.random.randint(1, 4)])

    async def reset(self, own: Own) -> None:
        """Start the session again."""
        await self._change([own], None)

    async def frame(self, _own: Own) -> None:
        """A step of all sessions that are there."""
        await self._change(
            [each for each in self.sessions if each.is_there and each.revision is not None], []
        )

    async def any_step(self, own: Own) -> None:
        """A step that expects nothing: it is not sent again, as somebody else's may come between."""
        member = self._member(own, [], expected=None)
        await self._send([member], {own.name: own}, again=False)

    async def reuse(self, own: Own) -> None:
        """Another step with the request id of the last change, at the revision that the session is at: it is refused."""
        if own.last is None or own.last[0] != own.revision:
            return
        member = dataclasses.replace(self._member(own, [], own.revision), request_id=own.last[1].request_id)
        await self._send([member], {own.name: own})
        if member.op.acknowledged is not None:
            self.callers.reused.append(member.op)

    async def line(self, own: Own) -> None:
        """Several steps of a session in a row, none of which waits for the one before."""
        callers, revision = self.callers, own.revision
        assert revision is not None
        members = [
            self._member(own, [], expected=revision + n) for n in range(self.world.random.randint(2, 3))
        ]

        async def work(engine: Engine) -> list[End]:
            async def one(member: Member) -> End:
                try:
                    return changed((await submitted(engine, [member]))[0])
                except Exception as error:
                    return end_of(error)

            return await asyncio.gather(*map(one, members))

        try:
            ends = await callers.ask(callers.some_replica(), work)
        except Exception as error:
            ends = [end_of(error)] * len(members)
        left = []
        for member, end in zip(members, ends, strict=True):
            self.learn(own, callers.history.end(member.op, end))
            if is_open(end):
                left.append(member)
        for member in left:
            await self._send([member], {own.name: own})

    def _member(self, own: Own, times: Sequence[int] | None, expected: int | None) -> Member:
        callers = self.callers
        x = None if times is None else floats(self, own.rows, *times)
        kind: Kind = "reset" if x is None else "step"
        request_id = callers.request_id()
        op = callers.history.call(
            Call(kind=kind, session=own.name, expected=ANY if expected is None else expected, x=x)
        )
        return Member(own.name, op, x, expected, request_id, own.rows)

    async def _change(self, sessions: Sequence[Own], times: Sequence[int] | None) -> None:
        members = [self._member(own, times, own.revision) for own in sessions]
        if members:
            await self._send(members, {own.name: own for own in sessions})

    async def _send(self, members: list[Member], own: dict[str, Own], *, again: bool = True) -> None:
        """Send a frame, and what of it is not told again, to one replica after the other."""
        callers, way = self.callers, self.callers.way
        replica, attempt = callers.some_replica(), 0
        while members:
            attempt += 1
            sent = list(members)
            try:
                answers = await callers.ask(replica, functools.partial(_submitted, sent))
                ends = [changed(answer) for answer in answers]
            except Exception as error:
                ends = [end_of(error)] * len(sent)
            members = []
            for member, end in zip(sent, ends, strict=True):
                self.learn(own[member.session], callers.history.end(member.op, end))
                if end.outcome == "acknowledged" and end.revision is not None:
                    own[member.session].last = end.revision, member
                if is_open(end):
                    members.append(member)
            if not again or (attempt >= way.attempts and not way.is_calm):
                return
            if members:
                await callers.sleep(way.pause_s)
                replica = callers.some_replica(replica)

    # ------------------------------------------------------------------------------------------------------ readers

    async def read(self, own: Own) -> None:
        """Read the state."""
        self.learn(own, await read_once(self.callers, own.name))

    async def read_many(self, _own: Own) -> None:
        """Read the states of all sessions that are there, by one call."""
        callers = self.callers
        own = {each.name: each for each in self.sessions if each.is_there}
        ops = [callers.history.call(Call(kind="read", session=name)) for name in own]

        async def work(engine: Engine) -> list[End]:
            return read_each(await engine.get_states(list(own)), len(own))

        try:
            ends = await callers.ask(callers.some_replica(), work)
        except Exception as error:
            ends = [end_of(error)] * len(ops)
        for op, end in zip(ops, ends, strict=True):
            self.learn(own[op.call.session], callers.history.end(op, end))

    async def look(self, own: Own) -> None:
        """Ask for the revision."""
        self.learn(own, await look_once(self.callers, own.name))

    async def rest(self, _own: Own) -> None:
        """Do nothing for long."""
        await self.callers.sleep(self.mix.rest)

    def learn(self, own: Own, end: End) -> None:
        """Remember the answer about a session."""
        if end.outcome == "gone":
            own.is_there, own.revision = False, None
        elif end.outcome in ("unknown", "error"):
            own.revision = None
        elif end.revision is not None:
            own.revision = end.revision


async def guest(callers: Callers, names: Sequence[str], end_s: float, think_s: float) -> None:
    """Change and read sessions of others, until a moment on the world's clock."""
    world, seen = callers.world, dict.fromkeys(names, 0)
    while world.now < end_s:
        name, kind = world.random.choice(list(names)), world.random.random()
        if kind < 0.3:
            end = await read_once(callers, name)
        elif kind < 0.4:
            end = await look_once(callers, name)
        else:
            expected = seen[name] if kind < 0.7 else None
            x = np.array([[world.random.uniform(-1, 1) for _ in range(2)]], np.float32)
            op = callers.history.call(
                Call(kind="step", session=name, expected=ANY if expected is None else expected, x=x)
            )
            member = Member(name, op, x, expected, callers.request_id(), 1)

            async def work(engine: Engine, member: Member = member) -> End:
                return changed((await submitted(engine, [member]))[0])

            end = await callers.until_told(op, work, lambda end: end, again=expected is not None)
        if end.revision is not None:
            seen[name] = end.revision
        await callers.sleep(think_s)


async def read_once(callers: Callers, name: str) -> End:
    """Read a state, from any replica."""
    op = callers.history.call(Call(kind="read", session=name))
    return await callers.until_told(
        op, lambda engine: engine.get_state(name), read, again=callers.way.is_calm
    )


async def look_once(callers: Callers, name: str) -> End:
    """Look at a session, through any replica."""
    op = callers.history.call(Call(kind="look", session=name))
    return await callers.until_told(
        op, lambda engine: engine.session_info(name), looked, again=callers.way.is_calm
    )


async def read_everywhere(callers: Callers, names: Sequence[str]) -> None:
    """Read all sessions from every replica, when nothing bad happens any more."""
    for name in names:
        for replica in callers.replicas:
            while True:
                op = callers.history.call(Call(kind="read", session=name))
                try:
                    end = read(await callers.ask(replica, functools.partial(_read, name)))
                except Exception as error:
                    end = end_of(error)
                callers.history.end(op, end)
                if not is_open(end):
                    break
                await callers.sleep(callers.way.pause_s)


async def _submitted(members: Sequence[Member], engine: Engine) -> list[Answer | ServerError]:
    return await submitted(engine, members)


async def _read(name: str, engine: Engine) -> StateResult:
    return await engine.get_state(name)


def floats(owner: Owner, rows: int, *times: int) -> Floats:
    """Random values with this number of rows and, if given, of time steps."""
    random, count = owner.world.random, rows * int(np.prod(times, dtype=int)) * 2
    values = np.array([random.uniform(-1, 1) for _ in range(count)], np.float32)
    return values.reshape(rows, *times, 2)
