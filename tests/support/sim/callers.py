"""Callers that switch replicas, retry, and record their calls and the answers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from stepwell_server.core.exactly_once import ANY_REVISION
from stepwell_server.engine.api import OpenManyResult, OpenResult, SessionInfo, StateResult, StatesResult
from stepwell_server.engine.change import Change
from stepwell_server.engine.engine import Engine
from stepwell_server.errors import (
    DeadlineExceeded,
    InvalidInput,
    OutcomeUnknown,
    Overloaded,
    RevisionConflict,
    ServerError,
    SessionExists,
    SessionGone,
    Unavailable,
)
from support.checks.history import Call, End, Floats, Op
from support.engine.harness import Answer, Answers
from support.sim.network import Network, answer_on
from support.sim.replica import Replica
from support.sim.world import NodeLoop, World

Work = Callable[[Engine], Awaitable[Any]]


class Lost(Exception):
    """No answer came in time."""


@dataclasses.dataclass
class History:
    """The calls of all callers and their answers."""

    world: World
    ops: list[Op] = dataclasses.field(default_factory=list)

    def call(self, call: Call) -> Op:
        """Before it is sent for the first time."""
        op = Op(str(len(self.ops)), self.world.moment(), call)
        self.ops.append(op)
        self.world.note("call", op.number, call.kind, call.session, call.expected, call.parent)
        return op

    def end(self, op: Op, end: End) -> End:
        """After an answer came, or none."""
        op.ends.append((self.world.moment(), end))
        self.world.note(
            "told", op.number, op.call.kind, op.call.session, end.outcome, end.revision, end.error
        )
        return end


@dataclasses.dataclass
class Way:
    """How long callers wait, and how they go on: seconds."""

    timeout_s: float = 3.0
    pause_s: float = 0.1
    attempts: int = 6
    is_calm: bool = False
    """Nothing bad happens any more: whoever asks is answered."""


class Callers:
    """All callers' machine."""

    def __init__(self, world: World, network: Network, replicas: Sequence[Replica]) -> None:
        self.world = world
        self.network = network
        self.replicas = replicas
        self.loop = NodeLoop(world, "callers")
        self.history = History(world)
        self.way = Way()
        self.request_ids = 0
        self.reused: list[Op] = []
        """Changes that were applied though their caller had used their request id for its session's last change."""

    def request_id(self) -> int:
        """A number that no other caller uses."""
        self.request_ids += 1
        return self.request_ids

    def some_replica(self, but: Replica | None = None) -> Replica:
        """One of them, mostly one that is there."""
        random = self.world.random
        there = [each for each in self.replicas if each.is_ready and not each.is_paused] or list(
            self.replicas
        )
        if random.random() < 0.2:
            there = list(self.replicas)
        others = [each for each in there if each is not but] or there
        return random.choice(others)

    async def sleep(self, seconds: float) -> None:
        """Wait about this long."""
        await asyncio.sleep(seconds * (0.5 + self.world.random.random()))

    async def ask(self, replica: Replica, work: Work) -> Any:
        """Have something done on a replica.

        Raises:
            ServerError: what the replica raised.
            Lost: nobody answered.
        """
        answer: asyncio.Future[Any] = self.loop.create_future()
        running: list[tuple[NodeLoop, asyncio.Task[None]]] = []
        gone = False

        def arrive() -> None:
            loop, engine = replica.loop, replica.engine
            if loop is None or engine is None:
                self.network.send(
                    replica.name, "callers", answer_on, self.loop, answer, Unavailable("nobody is there")
                )
                return

            def begin() -> None:
                # the end of the call has come too where the replica was paused
                if not gone:
                    running.append((loop, loop.create_task(do(engine))))

            loop.call_soon(begin)

        async def do(engine: Engine) -> None:
            try:
                result: Any = await work(engine)
            except ServerError as error:
                result = error
            self.network.send(replica.name, "callers", answer_on, self.loop, answer, result)

        def cancel() -> None:
            for loop, task in running:
                loop.call_soon(task.cancel)

        self.network.send("callers", replica.name, arrive)
        try:
            return await asyncio.wait_for(answer, self.way.timeout_s)
        except TimeoutError:
            gone = True
            self.network.send("callers", replica.name, cancel)
            raise Lost from None

    async def until_told(self, op: Op, work: Work, told: Callable[[Any], End], *, again: bool = True) -> End:
        """Send a call to one replica after the other until somebody says what became of it, or long enough."""
        replica, attempt = self.some_replica(), 0
        while True:
            attempt += 1
            try:
                end = told(await self.ask(replica, work))
            except Exception as error:
                end = end_of(error)
            self.history.end(op, end)
            if not is_open(end) or not again or (attempt >= self.way.attempts and not self.way.is_calm):
                return end
            await self.sleep(self.way.pause_s)
            replica = self.some_replica(replica)

    async def open_many(self, names: Sequence[str], request_id: int) -> list[End]:
        """Open new sessions by one call."""
        calls = [
            Call(
                kind="open",
                session=name,
                request_id=request_id,
                must_be_new=True,
                batch_size=1,
                is_together=True,
            )
            for name in names
        ]
        return await self._until_all_told(
            calls, lambda engine: engine.open_sessions("plain", session_ids=names, request_id=request_id)
        )

    async def resume_many(self, names: Sequence[str], request_id: int) -> list[End]:
        """Resume those sessions that are there, and open the others, by one call."""
        calls = [
            Call(kind="open", session=name, request_id=request_id, batch_size=1, is_together=True)
            for name in names
        ]
        return await self._until_all_told(
            calls,
            lambda engine: engine.open_sessions(
                "plain", session_ids=names, request_id=request_id, resume=True
            ),
            is_found=True,
        )

    async def fork_many(
        self, parents: Sequence[str], sizes: Sequence[int], names: Sequence[str], request_id: int
    ) -> list[End]:
        """Make sessions of such batch sizes of their parents by one call."""
        calls = [
            Call(
                kind="fork",
                session=name,
                parent=parent,
                request_id=request_id,
                batch_size=size,
                is_together=True,
            )
            for parent, size, name in zip(parents, sizes, names, strict=True)
        ]
        return await self._until_all_told(
            calls,
            lambda engine: engine.fork_sessions(parents, new_session_ids=names, request_id=request_id),
        )

    async def _until_all_told(
        self, calls: Sequence[Call], work: Work, *, is_found: bool = False
    ) -> list[End]:
        """As `until_told`, of a call that makes many sessions.

        `is_found`: others may have changed what this very call has made before it was answered.
        """
        ops = [self.history.call(call) for call in calls]
        replica, attempt = self.some_replica(), 0
        while True:
            attempt += 1
            try:
                ends = opened_many(await self.ask(replica, work), is_found=is_found)
            except Exception as error:
                ends = [end_of_one(op.call.session, error) for op in ops]
            for op, end in zip(ops, ends, strict=True):
                self.history.end(op, end)
            if not is_open(ends[0]) or (attempt >= self.way.attempts and not self.way.is_calm):
                return ends
            await self.sleep(self.way.pause_s)
            replica = self.some_replica(replica)


@dataclasses.dataclass
class Member:
    """A change of one session within a frame."""

    session: str
    op: Op
    x: Floats | None
    expected: int | None
    request_id: int
    rows: int


async def submitted(engine: Engine, members: Sequence[Member]) -> list[Answer | ServerError]:
    """Ask for the changes of members, all steps or all resets, as one frame."""
    answers = Answers([member.rows for member in members])
    change = Change([member.session for member in members], answers)
    if members[0].x is None:
        change.reset = True
    else:
        change.inputs = {"": np.concatenate([member.x for member in members if member.x is not None])}
    if any(member.expected is not None for member in members):
        expected = [ANY_REVISION if member.expected is None else member.expected for member in members]
        change.expected = np.array(expected, np.uint64)
    if any(member.request_id for member in members):
        change.request_ids = np.array([member.request_id for member in members], np.uint64)
    engine.submit(change)
    ended = asyncio.get_running_loop().create_future()
    answers.on_end(lambda: None if ended.done() else ended.set_result(None))
    try:
        await ended
    except asyncio.CancelledError:
        answers.is_cancelled = True
        raise
    return [answers.by_member[place] for place in range(len(members))]


_RULES = "request_id must be new", "session_ids must be sessions of one version"
"""Callers break them: some with intent, some because versions move."""
_AGAIN = ("Overloaded", "DeadlineExceeded", "Unavailable", "StoreAway", "VersionElsewhere")


def is_open(end: End) -> bool:
    """Whether a call should be sent again."""
    return end.outcome == "unknown" or end.error.startswith(_AGAIN)


def end_of(error: Exception) -> End:
    """The outcome that an error reports."""
    name, text = type(error).__name__, f"{type(error).__name__}: {error}"
    match error:
        case Lost() | OutcomeUnknown():
            return End(outcome="unknown", error=text)
        case RevisionConflict():
            return End(outcome="not_applied", revision=error.actual, error=text)
        case SessionGone():
            return End(outcome="gone", error=text)
        case InvalidInput() if error.message.startswith(_RULES):
            return End(outcome="not_applied", error=text)
        case SessionExists() | Overloaded() | DeadlineExceeded() | Unavailable():
            return End(outcome="not_applied", error=text)
        case ServerError():
            return End(outcome="error", error=text)
    raise AssertionError(name) from error


def end_of_one(session: str, error: Exception) -> End:
    """The outcome that an error of a call for many sessions reports for one of them."""
    end = end_of(error)
    if isinstance(error, ServerError) and error.metadata.get("session_id", session) != session:
        return End(outcome="not_applied", error=f"another one: {end.error}")
    return end


def changed(answer: Answer | ServerError) -> End:
    """The answer to a change."""
    if isinstance(answer, ServerError):
        return end_of(answer)
    return End(
        outcome="acknowledged",
        revision=answer.revision,
        position=answer.position,
        y=answer.outputs.get("y"),
        found=answer.replayed,
    )


def opened(result: OpenResult) -> End:
    """What an opening or a fork was answered."""
    info = result.session
    return End(
        outcome="acknowledged",
        revision=info.revision,
        position=info.position,
        found=result.resumed or result.replayed,
    )


def opened_many(result: OpenManyResult, *, is_found: bool = False) -> list[End]:
    """What the opening, or the forks, of many sessions were answered; `is_found`: they may have been there before."""
    found = is_found or result.replayed
    return [
        End(outcome="acknowledged", revision=revision, position=position, found=found)
        for revision, position in zip(result.revisions.tolist(), result.positions.tolist(), strict=True)
    ]


def read(result: StateResult) -> End:
    """The answer to a reader."""
    info = result.session
    states = {name: np.array(array, np.float32) for name, array in result.state.items()}
    return End(outcome="acknowledged", revision=info.revision, position=info.position, states=states)


def read_each(result: StatesResult, count: int) -> list[End]:
    """The answer to a reader for each of many sessions."""
    ends: dict[int, End] = {}
    row = 0
    for place, member in enumerate(result.members.tolist()):
        rows = slice(row, row + int(result.sizes[place]))
        row = rows.stop
        ends[member] = End(
            outcome="acknowledged",
            revision=int(result.revisions[place]),
            position=int(result.positions[place]),
            states={name: np.array(array[rows], np.float32) for name, array in result.state.items()},
        )
    for members, error in result.errors:
        ends.update(dict.fromkeys(members.tolist(), end_of(error)))
    return [ends[member] for member in range(count)]


def looked(info: SessionInfo) -> End:
    """The answer to a call that only reads."""
    return End(outcome="acknowledged", revision=info.revision, position=info.position)


def closed(_before: bool) -> End:
    """The answer to a closing."""
    return End(outcome="acknowledged")
