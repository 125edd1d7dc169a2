"""A process that plays sessions over several replicas at once and writes down requests and answers.

It speaks the protocol itself, to decide which replica gets which attempt. A change that failed, was cut off or waits for
too long is sent again to another replica with the same request id. Some changes are sent to two replicas at once. Streams
are cut in the middle of a frame, and another replica gets the frame. Rivals change the same session through different
replicas. Stale readers read anybody's sessions at any replica and ask for closed ones.

It prints a dot for each acknowledged change. At the end of its standard input it finishes what is under way, reads every
session at every replica and exits with 0. `driver_process.ReplicaDriverProcess` starts it; `checker` judges the history.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

import stepwell
from stepwell._transport import status
from stepwell.v1 import sessions_pb2, sessions_pb2_grpc
from support import secured
from support.checks import history
from support.checks.history import Call, End, Floats
from support.load.driver import (
    MODEL,
    PATIENCE_S,
    Defect,
    Outcome,
    Table,
    begin,
    broken,
    counts_of,
    outcome_of,
    play_on,
    start,
)
from support.peers.wire import arrays, step_frame, tensor, tensors

_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 200),
)
_ATTEMPT_S = 1.0
"""How long an attempt waits before another replica is asked: a paused one does not answer."""
_HURRIED_S = (0.002, 0.1)
_PATIENT_S = 30.0
"""Some attempts wait until a paused replica goes on: its answer must be right then, too."""
_LONGEST_PAUSE_S = 0.1
_MAX_KNOWN = 200
_WRITTEN_TOO_LATE = "Internal error from Core"
"""What gRPC itself says of a message for a stream whose connection has just ended."""
_SELECTIONS = {
    "all": sessions_pb2.OUTPUT_SELECTION_ALL,
    "last": sessions_pb2.OUTPUT_SELECTION_LAST,
    "none": sessions_pb2.OUTPUT_SELECTION_NONE,
}


class Replica:
    """One server, as a client of the protocol sees it."""

    def __init__(self, address: str) -> None:
        self._channel = secured.channel_aio(address, _OPTIONS)
        self.stub = sessions_pb2_grpc.SessionServiceStub(self._channel)

    async def ask(self, rpc: str, request: Any, limit_s: float) -> Any:
        """A unary call.

        Raises:
            StepwellError: it fails, as the SDK would say it.
        """
        try:
            return await getattr(self.stub, rpc)(request, timeout=limit_s)
        except grpc.aio.AioRpcError as error:
            raise _error(error) from error

    async def close(self) -> None:
        """End all that is under way."""
        await self._channel.close()


def _error(error: grpc.aio.AioRpcError) -> stepwell.StepwellError:
    if error.details() == _WRITTEN_TOO_LATE:
        return stepwell.UnavailableError(_WRITTEN_TOO_LATE, outcome="unknown")
    return status.from_rpc(error.code(), error.details(), tuple(error.trailing_metadata() or ()))


@dataclasses.dataclass
class LastSeen:
    """A session as one player last saw it."""

    name: str
    rows: int
    revision: int = 0


Attempt = Callable[[Replica, float], Awaitable[End]]


class ReplicaRouter:
    """The replicas, and how calls find their way to an answer over them."""

    def __init__(self, table: Table, replicas: Sequence[Replica]) -> None:
        self.table = table
        self.replicas = replicas
        self.living: list[LastSeen] = []
        """Sessions that stale readers may ask for; some of them may be closed."""
        self.ids = random.Random(table.chance.getrandbits(64))

    def pick(self) -> Replica:
        """Any replica."""
        return self.table.chance.choice(self.replicas)

    def id(self) -> int:
        """A request id."""
        return self.ids.getrandbits(64) | 1

    def limit_s(self) -> float:
        """How long an attempt may take."""
        dice = self.table.chance.random()
        if dice < 0.1:
            return self.table.chance.uniform(*_HURRIED_S)
        return _PATIENT_S if dice < 0.2 else _ATTEMPT_S

    async def change(self, call: Call, attempt: Attempt) -> End:
        """Attempt a change here and there until it is answered, or give it up. What became of it, and where it is."""
        table, number = self.table, self.table.log.call(call)
        unknown, until_s = False, time.monotonic() + PATIENCE_S
        while True:
            targets = [self.pick() for _ in range(2 if table.chance.random() < 0.1 else 1)]
            ends = await asyncio.gather(*(self._tried(attempt, at) for at in targets))
            kept = [one.end for one in ends if one.end.outcome == "acknowledged"]
            self.note_unknown(number, ends)
            if kept:
                # Beside an answer, a refusal by the other replica is one that the checker shall see.
                for one in ends:
                    if one.end.outcome != "unknown" and one.end.outcome != "not_applied":
                        table.ended(number, one.end)
                    elif one.end.revision is not None:
                        table.log.end(number, one.end)
                return kept[0]
            unknown |= any(one.end.outcome == "unknown" for one in ends)
            final = next((one.end for one in ends if not one.may_try_again), None)
            late = time.monotonic() > until_s
            if final is None and not late and table.chance.random() < 0.9:
                await self._breathe()
                continue
            return self._given_up(number, call, final or ends[0].end, unknown=unknown, late=late)

    def _given_up(self, number: str, call: Call, end: End, *, unknown: bool, late: bool) -> End:
        if late:
            end = End(
                outcome="error", error=f"no replica has answered in {PATIENCE_S:g} s; last: {end.error}"
            )
        elif end.outcome == "not_applied" and end.revision is not None:
            # One revision further on and not replayed: others made it. Further on nobody remembers who did.
            if unknown and end.revision > call.expected + 1:
                end = dataclasses.replace(end, outcome="unknown")
        elif unknown and end.outcome not in ("gone", "error"):
            end = End(outcome="unknown", error=end.error)
        self.table.log.end(number, end)
        return end

    def note_unknown(self, number: str, ends: Sequence[Outcome]) -> None:
        """Write down attempts that may still take effect, maybe again after a fail-over has lost their change."""
        for one in ends:
            if one.end.outcome == "unknown":
                self.table.log.end(number, one.end)

    async def asked(self, call: Call, attempt: Attempt) -> End:
        """The same for what changes nothing, or does not matter twice: it is asked until it is answered."""
        number, until_s = self.table.log.call(call), time.monotonic() + PATIENCE_S
        while True:
            one = await self._tried(attempt, self.pick())
            self.note_unknown(number, [one])
            if not one.may_try_again or time.monotonic() > until_s:
                self.table.log.end(number, one.end)
                return one.end
            await self._breathe()

    async def _tried(self, attempt: Attempt, at: Replica) -> Outcome:
        try:
            return Outcome(await attempt(at, self.limit_s()), may_try_again=False)
        except stepwell.StepwellError as error:
            return outcome_of(error)

    async def _breathe(self) -> None:
        await asyncio.sleep(self.table.chance.uniform(0, _LONGEST_PAUSE_S))

    # ------------------------------------------------------------------------------------------- what is asked

    async def open(self, name: str, rows: int, states: dict[str, Floats] | None = None) -> LastSeen:
        """Open a session, or resume it."""
        request = sessions_pb2.OpenSessionRequest(
            model=MODEL, session_id=name, batch_size=rows, state=tensors(states or {}), request_id=self.id()
        )

        async def attempt(at: Replica, limit_s: float) -> End:
            answer = await at.ask("OpenSession", request, limit_s)
            return dataclasses.replace(_seen(answer.session), found=answer.resumed or answer.replayed)

        end = await self.asked(Call(kind="open", session=name, batch_size=rows, states=states), attempt)
        return self._known(name, rows, end)

    async def fork(self, parent: LastSeen, name: str) -> LastSeen:
        """A new session that begins where another one is."""
        request = sessions_pb2.ForkSessionRequest(
            session_id=parent.name, new_session_id=name, request_id=self.id()
        )

        async def attempt(at: Replica, limit_s: float) -> End:
            return _seen((await at.ask("ForkSession", request, limit_s)).session)

        call = Call(kind="fork", session=name, parent=parent.name, batch_size=parent.rows)
        return self._known(name, parent.rows, await self.asked(call, attempt))

    async def close(self, session: LastSeen) -> None:
        """Close it; then it must be gone, whoever is asked."""
        request = sessions_pb2.CloseSessionRequest(session_id=session.name, request_id=self.id())

        async def attempt(at: Replica, limit_s: float) -> End:
            await at.ask("CloseSession", request, limit_s)
            return End(outcome="acknowledged")

        await self.asked(Call(kind="close", session=session.name), attempt)
        await self.read(session)

    async def read(self, session: LastSeen, at: Replica | None = None) -> End:
        """Its state, at a replica or at any."""
        request = sessions_pb2.GetStateRequest(session_id=session.name)

        async def attempt(drawn: Replica, limit_s: float) -> End:
            answer = await (at or drawn).ask("GetState", request, limit_s)
            return dataclasses.replace(_seen(answer.session), states=arrays(answer.state))

        return await self.asked(Call(kind="read", session=session.name), attempt)

    async def look(self, session: LastSeen) -> End:
        """Its revision and position."""
        request = sessions_pb2.GetSessionRequest(session_id=session.name)

        async def attempt(at: Replica, limit_s: float) -> End:
            return _seen((await at.ask("GetSession", request, limit_s)).session)

        return await self.asked(Call(kind="look", session=session.name), attempt)

    def _known(self, name: str, rows: int, end: End) -> LastSeen:
        if end.outcome != "acknowledged" or end.revision is None:
            raise broken(end)
        found = LastSeen(name, rows, end.revision)
        self.living.append(dataclasses.replace(found))
        del self.living[:-_MAX_KNOWN]
        return found


def _seen(session: sessions_pb2.Session) -> End:
    return End(outcome="acknowledged", revision=session.revision, position=session.position)


class Player:
    """Changes sessions one call at a time. Rivals have the same session."""

    def __init__(self, router: ReplicaRouter) -> None:
        self._router = router
        self._table = router.table
        self._sessions: list[LastSeen] = []

    async def play(self, name: str, rows: int, states: dict[str, Floats] | None, *, alone: bool) -> None:
        """Open, or find what a rival has opened, and go on until it is time to stop."""
        await play_on(self._table, name, lambda one: self._play(one, rows, states, alone=alone))

    async def _play(self, name: str, rows: int, states: dict[str, Floats] | None, *, alone: bool) -> None:
        table = self._table
        self._sessions = [await self._router.open(name, rows, states)]
        while not table.stop.is_set():
            await self._turn(table.chance.choice(self._sessions), alone=alone)
            await table.rest()

    async def _turn(self, session: LastSeen, *, alone: bool) -> None:
        dice = self._table.chance.random()
        if dice < 0.8:
            await self._step(session)
        elif dice < 0.88:
            await self._reset(session)
        elif dice < 0.94 or not alone:
            self._note(session, await self._router.read(session))
        elif len(self._sessions) < 3:
            self._table.forks += 1
            name = f"{session.name.split('/')[0]}/{self._table.prefix}-{self._table.forks}"
            self._sessions.append(await self._router.fork(session, name))
        else:
            self._sessions.remove(session)
            await self._router.close(session)
            if not self._sessions:
                raise Defect

    async def _step(self, session: LastSeen) -> None:
        x, outputs = self._table.draw_step(session.rows)
        request = sessions_pb2.StepRequest(
            session_id=session.name,
            inputs=[tensor(x)],
            expected_revision=session.revision,
            request_id=self._router.id(),
            outputs=_SELECTIONS[outputs],
        )

        async def attempt(at: Replica, limit_s: float) -> End:
            answer = await at.ask("Step", request, limit_s)
            found = next(iter(arrays(answer.outputs).values()), None)
            return End(outcome="acknowledged", revision=answer.revision, position=answer.position, y=found)

        call = Call(kind="step", session=session.name, expected=session.revision, x=x, outputs=outputs)
        await self._changed(session, await self._router.change(call, attempt))

    async def _reset(self, session: LastSeen) -> None:
        states = self._table.draw_states(session.rows) if self._table.chance.random() < 0.5 else None
        request = sessions_pb2.ResetStatesRequest(
            session_id=session.name,
            state=tensors(states or {}),
            expected_revision=session.revision,
            request_id=self._router.id(),
        )

        async def attempt(at: Replica, limit_s: float) -> End:
            answer = await at.ask("ResetStates", request, limit_s)
            return End(outcome="acknowledged", revision=answer.revision, position=answer.position)

        call = Call(kind="reset", session=session.name, expected=session.revision, states=states)
        await self._changed(session, await self._router.change(call, attempt))

    async def _changed(self, session: LastSeen, end: End) -> None:
        if end.revision is None and end.outcome in ("unknown", "not_applied"):
            end = await self._router.look(session)
        self._note(session, end)

    def _note(self, session: LastSeen, end: End) -> None:
        if end.revision is None:
            raise broken(end)
        session.revision = end.revision


class GroupPlayer:
    """Plays a group by frames on streams, which it cuts now and then."""

    def __init__(self, router: ReplicaRouter) -> None:
        self._router = router
        self._table = router.table

    async def play(self, name: str, size: int) -> None:
        """As `Player.play`."""
        await play_on(self._table, name, lambda one: self._play(one, size))

    async def _play(self, name: str, size: int) -> None:
        members = [await self._router.open(f"{name}.{i}", 1) for i in range(size)]
        while not self._table.stop.is_set():
            await self._frame(members)
            await self._table.rest()

    async def _frame(self, members: list[LastSeen]) -> None:
        """One step of all, wherever each gets its answer."""
        table = self._table
        x, outputs = table.draw_step(len(members))
        ids = [self._router.id() for _ in members]
        calls = [
            Call(kind="step", session=one.name, expected=one.revision, x=x[i : i + 1], outputs=outputs)
            for i, one in enumerate(members)
        ]
        numbers = [table.log.call(call) for call in calls]
        waiting, unknown = list(range(len(members))), set[int]()
        until_s = time.monotonic() + PATIENCE_S
        while waiting:
            frame = step_frame(
                1,
                [members[i].name for i in waiting],
                [tensor(x[waiting])],
                expected_revisions=[calls[i].expected for i in waiting],
                request_ids=[ids[i] for i in waiting],
                outputs=_SELECTIONS[outputs],
            )
            found = await self._sent(frame, len(waiting))
            left = []
            for place, i in enumerate(waiting):
                one = found[place]
                self._router.note_unknown(numbers[i], [one])
                if one.may_try_again and time.monotonic() < until_s:
                    left.append(i)
                    unknown |= {i} if one.end.outcome == "unknown" else set()
                    continue
                end = one.end
                if one.may_try_again:
                    end = End(outcome="error", error=f"no replica has answered; last: {end.error}")
                elif (
                    end.outcome == "not_applied"
                    and i in unknown
                    and (end.revision or 0) > calls[i].expected + 1
                ):
                    end = dataclasses.replace(end, outcome="unknown")
                table.ended(numbers[i], end)
                if end.revision is None:
                    raise broken(end)
                members[i].revision = end.revision
            waiting = left

    async def _sent(self, frame: sessions_pb2.StepStreamRequest, count: int) -> list[Outcome]:
        """What a replica says of each member; of those it does not speak of, that it is unknown."""
        chance = self._table.chance
        cut = chance.random() < 0.2
        limit_s = chance.uniform(0.0, 0.02) if cut else _ATTEMPT_S
        silence: stepwell.StepwellError | TimeoutError = TimeoutError("cut off in the middle of a frame")
        found: dict[int, Outcome] = {}
        stream = self._router.pick().stub.StepStream()
        try:
            async with asyncio.timeout(limit_s):
                await stream.write(frame)
                answer: Any = None
                while answer is None or not (answer is grpc.aio.EOF or answer.last):
                    answer = await stream.read()
                    if answer is not grpc.aio.EOF:
                        _take(answer, count, found)
        except grpc.aio.AioRpcError as error:
            silence = _error(error)
        except (
            TimeoutError,
            asyncio.InvalidStateError,
        ) as error:  # the latter: written to a stream that has ended
            silence = TimeoutError(str(error) or "cut off in the middle of a frame")
        finally:
            stream.cancel()
        if len(found) < count:
            await self._router._breathe()
        return [found.get(place) or outcome_of(silence) for place in range(count)]


def _take(answer: sessions_pb2.StepStreamResponse, count: int, found: dict[int, Outcome]) -> None:
    members = list(range(count)) if answer.all_members else list(answer.members)
    outputs = next(iter(arrays(answer.outputs).values()), None)
    for place, member in enumerate(members):
        end = End(
            outcome="acknowledged",
            revision=answer.revisions[place],
            position=answer.positions[place],
            y=None if outputs is None else outputs[place : place + 1],
        )
        found[member] = Outcome(end, may_try_again=False)
    for entry in answer.errors:
        for member in entry.members or range(count):
            found[member] = outcome_of(status.from_message(entry.error))


class StaleReader:
    """Reads sessions of everybody, to find a replica that does not know what another one has said."""

    def __init__(self, router: ReplicaRouter) -> None:
        self._router = router

    async def play(self) -> None:
        """Until it is time to stop."""
        router, chance = self._router, self._router.table.chance
        while not router.table.stop.is_set():
            if router.living:
                session = chance.choice(router.living)
                await (router.read(session) if chance.random() < 0.6 else router.look(session))
            await router.table.rest()


@dataclasses.dataclass(frozen=True)
class ReplicaPlayerCounts:
    """How many of each player there are."""

    alone: int = 6
    rivals: int = 4
    """Sessions with two players each."""
    groups: int = 2
    group_size: int = 6
    stale_readers: int = 4


async def play(router: ReplicaRouter, counts: ReplicaPlayerCounts) -> None:
    """Let all players play until it is time to stop."""
    table, prefix = router.table, router.table.prefix
    async with asyncio.TaskGroup() as players:
        for i in range(counts.alone + counts.rivals):
            alone, rows = i < counts.alone, table.chance.choice([1, 1, 2, 3])
            states = table.draw_states(rows) if alone and table.chance.random() < 0.3 else None
            for _ in range(1 if alone else 2):
                player = Player(router)
                players.create_task(player.play(f"{prefix}.session.{i}", rows, states, alone=alone))
        for i in range(counts.groups):
            players.create_task(GroupPlayer(router).play(f"{prefix}.group.{i}", counts.group_size))
        for _ in range(counts.stale_readers):
            players.create_task(StaleReader(router).play())


async def audit(router: ReplicaRouter, sessions: dict[str, int]) -> None:
    """Read every session that must be there, at every replica."""
    async with asyncio.TaskGroup() as auditors:
        for name, rows in sessions.items():
            for replica in router.replicas:
                auditors.create_task(router.read(LastSeen(name, rows), replica))


async def run(arguments: argparse.Namespace) -> None:
    """Play until standard input ends, then read everything."""
    table = begin(arguments, random.Random(arguments.seed))
    replicas = [Replica(address) for address in arguments.address.split(",")]
    router = ReplicaRouter(table, replicas)
    await play(router, counts_of(ReplicaPlayerCounts, arguments))
    await table.stop.wait()  # all players may have broken off
    await audit(router, history.live(history.load([arguments.history])))
    table.log.close()
    for replica in replicas:
        await replica.close()


if __name__ == "__main__":
    start(run, ReplicaPlayerCounts)
