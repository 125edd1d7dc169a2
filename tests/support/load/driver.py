"""A process that steps many sessions through the SDK and records its calls and their answers.

It plays single steps, chunks, frames, resets to zeros, to given states and of single rows, forks, reads and closings,
drawn from a seed, over every kind of client. A call that fails is made again, or given up for another, as the SDK says
one may. It prints a dot for each acknowledged change, and when its standard input ends it finishes what is under
way, reads every session once more and exits 0. `driver_process.DriverProcess` starts it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import os
import random
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import stepwell
from support.checks import history
from support.checks.history import Call, End, Floats, Log
from support.sdk.client_kinds import connect

MODEL, FEATURES, UNITS = "forecast", 3, 8
STATES = ("lstm/h", "lstm/c")
PATIENCE_S = 100.0
"""Time limit of the calls that shall get through, over any number of restarts."""
_SHORT_S = (0.005, 0.3)
_MAX_HANDLES = 3
_MAX_RESUMED = 16


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What becomes of an error of the SDK in a history."""

    end: End
    may_try_again: bool


def outcome_of(error: BaseException) -> Outcome:
    """Judge the error of a call; anything that is not listed is a defect."""
    text = f"{type(error).__name__}: {error}"
    match error:
        case stepwell.UnavailableError() | stepwell.DeadlineExceededError():
            return Outcome(End(outcome=error.outcome, error=text), may_try_again=True)
        case stepwell.OverloadedError():
            return Outcome(End(outcome="not_applied", error=text), may_try_again=True)
        case stepwell.RevisionConflictError():
            return Outcome(End(outcome="not_applied", revision=error.actual, error=text), may_try_again=False)
        case TimeoutError():  # ours: the call was cancelled
            return Outcome(End(outcome="unknown", error=text), may_try_again=True)
        case stepwell.SessionGoneError():
            return Outcome(End(outcome="gone", error=text), may_try_again=False)
        case _:
            return Outcome(End(outcome="error", error=text), may_try_again=False)


class Defect(Exception):
    """A call failed in a way that nothing can cause: its player stops, and the checker reports it."""


class SessionLost(Defect):
    """A session is gone, or no server was reached in time for it: its player continues with a new one.

    The checker reports those that are gone.
    """


def broken(end: End) -> Defect:
    """The exception that ends the play of a session whose call ended in this way."""
    return Defect() if end.outcome == "error" else SessionLost()


@dataclasses.dataclass
class Table:
    """What all players share."""

    log: Log
    chance: random.Random
    numbers: np.random.Generator
    stop: asyncio.Event
    pause_s: float
    hurry: bool
    """Some calls get short time limits, and some are cancelled."""
    forks: int = 0

    @property
    def prefix(self) -> str:
        return f"life{self.log.life}"

    def draw(self, *shape: int) -> Floats:
        """Random numbers."""
        return self.numbers.standard_normal(shape).astype(np.float32)

    def draw_states(self, rows: int) -> dict[str, Floats]:
        """A random state."""
        return {name: np.tanh(self.draw(rows, UNITS)) for name in STATES}

    def draw_step(self, rows: int) -> tuple[Floats, str]:
        """Inputs, one time step or several, and which outputs to ask for."""
        steps = self.chance.choice([0, 0, 0, 0, 1, 2, 3, 7])
        x = self.draw(rows, steps, FEATURES) if steps else self.draw(rows, FEATURES)
        return x, self.chance.choice(["all", "all", "all", "last", "none"])

    async def rest(self) -> None:
        """Think for a while."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), self.chance.expovariate(1 / self.pause_s))

    def limit_s(self) -> float:
        """A time limit."""
        return self.chance.uniform(*_SHORT_S) if self.hurry and self.chance.random() < 0.15 else PATIENCE_S

    def ended(self, number: str, end: End, *, counts: bool = True) -> None:
        """Write an end; tell whoever started us of a change that is acknowledged."""
        self.log.end(number, end)
        if counts and end.outcome == "acknowledged":
            os.write(1, b".")


async def play_on(table: Table, name: str, play: Callable[[str], Awaitable[None]]) -> None:
    """Play one session after the other until it is time to stop.

    A server that loses sessions, or starts slowly, must not run out of players: whoever waits for more changes would wait
    for ever.
    """
    played = 0
    while not table.stop.is_set():
        try:
            await play(f"{name}.after{played}" if played else name)
        except SessionLost:
            played += 1
            await table.rest()
        except Defect:
            return


class SessionPlayer:
    """Plays one session, and a few forks of it, one call at a time."""

    def __init__(self, table: Table, client: Any, *, can_cancel: bool) -> None:
        self._table = table
        self._client = client
        self._can_cancel = can_cancel
        self._handles: list[Any] = []

    async def play(
        self, name: str, batch_size: int, states: dict[str, Floats] | None = None, *, resume: bool = False
    ) -> None:
        """Open, or resume the session that is there, and go on until it is time to stop."""
        await play_on(
            self._table, name, lambda one: self._play(one, batch_size, states, resume and one == name)
        )

    async def _play(self, name: str, batch_size: int, states: dict[str, Floats] | None, resume: bool) -> None:
        table = self._table
        call = Call(kind="open", session=name, batch_size=batch_size, states=states)
        self._handles = [await self._opened(call, name, batch_size, states, resume=resume)]
        while not table.stop.is_set() and self._handles:
            await self._turn(table.chance.choice(self._handles))
            await table.rest()

    async def audit(self, name: str, batch_size: int) -> None:
        """Read all sessions."""
        with contextlib.suppress(Defect):
            call = Call(kind="open", session=name, batch_size=batch_size)
            await self._read(await self._opened(call, name, batch_size, resume=True))

    async def _opened(
        self, call: Call, name: str, batch_size: int, states: Any = None, *, resume: bool = False
    ) -> Any:
        # a limit that no run comes to: it is in the records all the same
        begin = functools.partial(
            self._client.open_session,
            MODEL,
            batch_size=batch_size,
            session_id=name,
            state=states,
            max_idle_s=self._table.chance.choice([None, 0, 86_400.0]),
        )
        return await self._begun(call, begin, resume=resume)

    async def _begun(
        self, call: Call, begin: Callable[..., Awaitable[Any]], *arguments: Any, resume: bool = False
    ) -> Any:
        number = self._table.log.call(call)
        try:
            handle = await begin(*arguments, timeout_s=PATIENCE_S)
        except stepwell.StepwellError as error:
            end = outcome_of(error).end
            self._table.log.end(number, end)
            raise broken(end) from error
        if resume and not handle.resumed:
            # A new session under the old id is no answer about the old one, whatever state it has.
            end = End(outcome="gone", error="the opening made a new session where an old one was expected")
            self._table.log.end(number, end)
            raise broken(end)
        self._table.log.end(number, _at(handle))
        return handle

    async def _turn(self, handle: Any) -> None:
        dice = self._table.chance.random()
        if dice < 0.78:
            x, outputs = self._table.draw_step(handle.batch_size)
            call = Call(kind="step", session=handle.id, expected=handle.revision, x=x, outputs=outputs)
            await self._change(handle, call, lambda **limits: handle.step(x, outputs, **limits))
        elif dice < 0.88:
            await self._reset(handle)
        elif dice < 0.93:
            await self._read(handle)
        elif dice < 0.95:
            await self._look(handle)
        elif len(self._handles) < _MAX_HANDLES:
            await self._fork(handle)
        else:
            await self._close(handle)

    async def _reset(self, handle: Any) -> None:
        table, rows = self._table, None
        count = handle.batch_size
        if table.chance.random() < 0.4:
            rows = tuple(sorted(table.chance.sample(range(count), table.chance.randint(1, count))))
            count = len(rows)
        states = table.draw_states(count) if table.chance.random() < 0.5 else None
        call = Call(kind="reset", session=handle.id, expected=handle.revision, states=states, rows=rows)
        await self._change(handle, call, lambda **limits: handle.reset_states(states, rows, **limits))

    async def _change(self, handle: Any, call: Call, make: Callable[..., Awaitable[Any]]) -> None:
        """Make a change until it is answered, or give it up and look where the session is."""
        table, number = self._table, self._table.log.call(call)
        unknown, limit_s = False, table.limit_s()
        while True:
            try:
                y = await self._limited(make, limit_s)
            except (stepwell.StepwellError, TimeoutError) as error:
                verdict = outcome_of(error)
            else:
                table.ended(number, dataclasses.replace(_at(handle), y=y))
                return
            unknown |= verdict.end.outcome == "unknown"
            if verdict.may_try_again and table.chance.random() < 0.6:
                limit_s = table.limit_s()
                continue
            # Of a conflict it is settled that this change, under whatever attempt, is not among those applied.
            conflict = verdict.end.outcome == "not_applied" and not verdict.may_try_again
            settled = not unknown or conflict or verdict.end.outcome in ("gone", "error")
            table.ended(number, verdict.end if settled else End(outcome="unknown", error=verdict.end.error))
            if verdict.end.outcome in ("gone", "error"):
                raise broken(verdict.end)
            await self._look(handle)
            return

    async def _limited(self, make: Callable[..., Awaitable[Any]], limit_s: float) -> Any:
        """Make a call within a limit: by its own, or by cancelling it."""
        if self._can_cancel and limit_s < PATIENCE_S and self._table.chance.random() < 0.5:
            return await asyncio.wait_for(make(timeout_s=PATIENCE_S), limit_s / 10)
        return await make(timeout_s=limit_s)

    async def _look(self, handle: Any) -> None:
        await self._asked(handle, Call(kind="look", session=handle.id), handle.refresh, lambda _: _at(handle))

    async def _read(self, handle: Any) -> None:
        def read(state: Any) -> End:
            return End(
                outcome="acknowledged",
                revision=state.revision,
                position=state.position,
                states=dict(state),
            )

        await self._asked(handle, Call(kind="read", session=handle.id), handle.get_state, read)

    async def _asked(
        self, handle: Any, call: Call, ask: Callable[..., Awaitable[Any]], end: Callable[[Any], End]
    ) -> None:
        number = self._table.log.call(call)
        try:
            answer = await ask(timeout_s=PATIENCE_S)
        except stepwell.StepwellError as error:
            failed = outcome_of(error).end
            self._table.log.end(number, failed)
            raise broken(failed) from error
        self._table.ended(number, end(answer), counts=False)

    async def _fork(self, handle: Any) -> None:
        self._table.forks += 1
        name = f"{handle.id.split('/')[0]}/{self._table.prefix}-{self._table.forks}"
        call = Call(kind="fork", session=name, parent=handle.id, batch_size=handle.batch_size)
        self._handles.append(await self._begun(call, handle.fork, name))

    async def _close(self, handle: Any) -> None:
        self._handles.remove(handle)
        close = Call(kind="close", session=handle.id)
        await self._asked(handle, close, handle.close, lambda _: End(outcome="acknowledged"))


class GroupPlayer:
    """Plays a group: each call of it is a frame, written down as a call of each member."""

    def __init__(self, table: Table, client: Any) -> None:
        self._table = table
        self._client = client

    async def play(self, name: str, size: int) -> None:
        """As `SessionPlayer.play`."""
        await play_on(self._table, name, lambda one: self._play(one, size))

    async def _play(self, name: str, size: int) -> None:
        table = self._table
        names = [f"{name}.{i}" for i in range(size)]
        numbers = [table.log.call(Call(kind="open", session=one, batch_size=1)) for one in names]
        try:
            group = await self._client.open_sessions(MODEL, size, session_ids=names, timeout_s=PATIENCE_S)
        except stepwell.StepwellError as error:
            end = outcome_of(error).end
            for number in numbers:
                table.log.end(number, end)
            raise broken(end) from error
        for number in numbers:
            table.log.end(number, End(outcome="acknowledged", revision=0, position=0))
        while not table.stop.is_set():
            await self._turn(group)
            await table.rest()

    async def _turn(self, group: Any) -> None:
        table, size = self._table, len(group)
        if table.chance.random() < 0.85:
            x, outputs = table.draw_step(size)
            step = lambda **limits: group.step(x, outputs, **limits)  # noqa: E731
            calls = [
                Call(kind="step", session=one, expected=int(revision), x=x[i : i + 1], outputs=outputs)
                for i, (one, revision) in enumerate(zip(group.ids, group.revisions, strict=True))
            ]
            await self._change(group, dict(enumerate(calls)), step)
            return
        members = sorted(table.chance.sample(range(size), table.chance.randint(1, size)))
        states = table.draw_states(len(members)) if table.chance.random() < 0.5 else None
        revisions = group.revisions
        resets = {
            member: Call(
                kind="reset",
                session=group.ids[member],
                expected=int(revisions[member]),
                states=None if states is None else {name: states[name][i : i + 1] for name in states},
            )
            for i, member in enumerate(members)
        }
        await self._change(group, resets, lambda **limits: group.reset_states(states, members, **limits))

    async def _change(self, group: Any, calls: dict[int, Call], make: Callable[..., Awaitable[Any]]) -> None:
        """Make a frame until each member has answered, or give it up for those that have not."""
        table = self._table
        numbers = {member: table.log.call(call) for member, call in calls.items()}
        unknown: set[int] = set()
        while True:
            failures: Mapping[int, stepwell.StepwellError] = {}
            try:
                y = await make(timeout_s=table.limit_s())
            except stepwell.StepwellError as error:
                y, failures = error.outputs, error.failures or dict.fromkeys(calls, error)
            for place, member in enumerate(calls):
                if member not in failures:
                    part = None if y is None else np.asarray(y)[place : place + 1]
                    table.ended(numbers[member], dataclasses.replace(_of(group, member), y=part))
                    unknown.discard(member)
            verdicts = {member: outcome_of(error) for member, error in failures.items()}
            unknown |= {member for member, one in verdicts.items() if one.end.outcome == "unknown"}
            again = bool(verdicts) and all(one.may_try_again for one in verdicts.values())
            if not (again and table.chance.random() < 0.6):
                break
        await self._settle(group, numbers, verdicts, unknown)

    async def _settle(
        self, group: Any, numbers: dict[int, str], verdicts: dict[int, Outcome], unknown: set[int]
    ) -> None:
        """Record the members that failed, and read where the members are."""
        for member, verdict in verdicts.items():
            may = member in unknown and verdict.may_try_again
            end = End(outcome="unknown", error=verdict.end.error) if may else verdict.end
            self._table.ended(numbers[member], end)
        for outcome in ("error", "gone"):
            for one in verdicts.values():
                if one.end.outcome == outcome:
                    raise broken(one.end)
        if verdicts:
            await self._look(group)

    async def _look(self, group: Any) -> None:
        numbers = [self._table.log.call(Call(kind="look", session=one)) for one in group.ids]
        try:
            await group.refresh(timeout_s=PATIENCE_S)
        except stepwell.StepwellError as error:
            end = outcome_of(error).end
            for number in numbers:
                self._table.log.end(number, end)
            raise broken(end) from error
        for member, number in enumerate(numbers):
            self._table.log.end(number, _of(group, member))


def _at(handle: Any) -> End:
    return End(outcome="acknowledged", revision=handle.revision, position=handle.position)


def _of(group: Any, member: int) -> End:
    revision, position = group.revisions[member], group.positions[member]
    return End(outcome="acknowledged", revision=int(revision), position=int(position))


@dataclasses.dataclass(frozen=True)
class PlayerCounts:
    """How many of each player there are."""

    frames: int = 6
    """Sessions of the async client; its steps share frames."""
    calls: int = 2
    """Sessions of the async client with a call for each step."""
    threads: int = 2
    """Sessions of the sync client."""
    groups: int = 2
    """Groups, every other one of the sync client."""
    group_size: int = 4


async def play(table: Table, address: str, mix: PlayerCounts, resume: dict[str, int]) -> None:
    """Let all players play until it is time to stop."""
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as players:
        shells = ("async", "async without frames", "sync")
        clients = {shell: await stack.enter_async_context(connect(shell, address)) for shell in shells}
        counts = dict(zip(shells, (mix.frames, mix.calls, mix.threads), strict=True))
        chance, prefix = table.chance, table.prefix
        for shell, client in clients.items():
            for i in range(counts[shell]):
                batch_size = chance.choice([1, 1, 2, 3])
                states = table.draw_states(batch_size) if chance.random() < 0.3 else None
                player = SessionPlayer(table, client, can_cancel=table.hurry and shell != "sync")
                name = f"{prefix}.{shell.replace(' ', '-')}.{i}"
                players.create_task(player.play(name, batch_size, states))
        for i in range(mix.groups):
            group = GroupPlayer(table, clients[shells[i % 2 * 2]])
            players.create_task(group.play(f"{prefix}.group.{i}", mix.group_size))
        known = list(resume.items())  # the others lie idle, which a session must survive as well
        for name, batch_size in chance.sample(known, min(len(known), _MAX_RESUMED)):
            player = SessionPlayer(table, clients["async"], can_cancel=False)
            players.create_task(player.play(name, batch_size, resume=True))


async def audit(table: Table, address: str, sessions: dict[str, int]) -> None:
    """Read every session that must be there."""
    async with connect("async", address) as client, asyncio.TaskGroup() as auditors:
        for name, batch_size in sessions.items():
            auditors.create_task(SessionPlayer(table, client, can_cancel=False).audit(name, batch_size))


def begin(arguments: argparse.Namespace, chance: random.Random) -> Table:
    """What players share. They stop when standard input ends."""
    log, numbers = Log(arguments.history, arguments.seed), np.random.default_rng(chance.getrandbits(32))
    table = Table(log, chance, numbers, asyncio.Event(), arguments.pause_s, arguments.hurry)
    loop = asyncio.get_running_loop()
    threading.Thread(target=_stop_at_end_of_input, args=(loop, table.stop), daemon=True).start()
    return table


def _stop_at_end_of_input(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    while os.read(0, 4096):
        pass
    loop.call_soon_threadsafe(stop.set)


def counts_of(kind: Any, arguments: argparse.Namespace) -> Any:
    """How many of each player the arguments ask for."""
    return kind(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)})


def start(run: Callable[[argparse.Namespace], Coroutine[Any, Any, None]], counts: Any) -> None:
    """Read the arguments and run; `counts` has how many of each player there may be."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True, help="with commas where there are several")
    parser.add_argument("--history", required=True, type=Path)
    parser.add_argument("--seed", required=True, type=int)
    parser.add_argument("--pause-s", default=0.02, type=float)
    parser.add_argument("--hurry", action="store_true")
    for field in dataclasses.fields(counts):
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, type=int)
    asyncio.run(run(parser.parse_args()))


async def run(arguments: argparse.Namespace) -> None:
    """Play until standard input ends, then read everything."""
    path = arguments.history
    before = history.live(history.load([path])) if path.exists() else {}
    table = begin(arguments, random.Random(f"{arguments.seed}/{len(before)}"))
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32))
    await play(table, arguments.address, counts_of(PlayerCounts, arguments), before)
    await table.stop.wait()  # all players may have broken off
    await audit(table, arguments.address, history.live(history.load([path])))
    table.log.close()


if __name__ == "__main__":
    start(run, PlayerCounts)
