"""Servers that are killed in the midst of anything: what they answered has happened, once; the rest may have, once."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell_server.errors import ServerError, Unavailable
from stepwell_server.store.record import Header
from support.checks.action_player import IDLE_S, Asked, Play, Sent
from support.checks.actions import (
    NAMES,
    Action,
    Open,
    Shape,
    Simple,
    changes,
    forks,
    many_forks,
    names,
    opens,
    reads,
    simple,
)
from support.engine.fake_executor import WAIT_S
from support.engine.harness import STORES, Answer, Answers
from support.run_folder import memory_folder
from support.samples import examples
from support.stores.durable import Disk
from support.stores.records import scan_local

SETTINGS = settings(max_examples=examples(80))
AWAY = Unavailable("the test says no")

troubles = st.builds(
    Simple, st.sampled_from(["kill", "kill", "stall", "stall behind", "fail"]), names, st.integers(1, 3)
)
programs = st.lists(
    st.one_of(changes, changes, changes, changes, simple, simple, opens, forks, reads, many_forks, troubles),
    min_size=25,
    max_size=80,
)
shapes = st.builds(
    Shape, st.just(64), st.sampled_from([3, 8, 64]), st.booleans(), st.sampled_from([1, 3]), st.booleans()
)
crowded = st.builds(
    Shape,
    st.sampled_from([4, 7]),
    st.sampled_from([3, 8]),
    st.booleans(),
    st.sampled_from([1, 3]),
    st.booleans(),
)


class Killing(Play):
    """Plays with servers on one data directory, one after the other."""

    def __init__(self, disk: Disk, shape: Shape, stack: AsyncExitStack, *, settled: bool) -> None:
        self.disk = disk
        self.stack = stack
        self.settled = settled
        """Servers are killed only when nothing is under way: then what is refused for want of rows may be, too."""
        self.options: dict[str, Any] = {
            "resident_rows": shape.resident_rows,
            "max_batch_rows": shape.max_batch_rows,
            "threads": shape.threads,
            "steps": shape.steps,
            "max_session_idle_s": IDLE_S if shape.idle else 0,
        }
        self.failed = False
        self.may_fail = (
            not shape.idle
        )  # a session that expired and was not deleted is there again after a crash

    async def begin(self, shape: Shape) -> None:
        super().__init__(await self.server(), shape)

    async def server(self) -> Any:
        return await self.stack.enter_async_context(self.disk.engine(**self.options))

    async def simple(self, action: Simple) -> None:
        if action.kind == "kill":
            await self.kill()
        elif action.kind == "fail":
            if self.may_fail:
                self.failed = True
                self.disk.store.fail(AWAY, action.number)
        elif action.kind in {"stall", "stall behind"}:
            if self.log:
                self.disk.store.stall(kept=action.kind == "stall behind")
        else:
            await super().simple(action)
            if action.kind == "tick":
                await self.expire()  # else a session that is idle for too long is there again after a kill

    async def open(self, action: Open) -> None:
        self.disk.store.release()
        try:
            await super().open(action)
        except Unavailable:
            assert self.failed

    def cancel(self, number: int) -> None:
        if self.settled:  # else it would be anybody's guess what a kill left undone
            super().cancel(number)

    async def settle(self) -> None:
        self.disk.store.release()
        for entry in self.log:
            if isinstance(entry, Asked):
                entry.check = self.unless_unavailable(entry.check)
        await super().settle()

    def unless_unavailable(self, check: Any) -> Any:
        return lambda result: (
            self.failed if isinstance(result, Unavailable) and self.failed else check(result)
        )

    def may_be_unavailable(self) -> bool:
        return self.failed

    def hold_against(self, answer: Answer | ServerError, outcome: Any, *, cancelled: bool) -> None:
        if isinstance(answer, Unavailable) and self.failed:
            return
        super().hold_against(answer, outcome, cancelled=cancelled)

    async def kill(self) -> None:
        if self.settled:
            await self.settle()
        log, told = self.log, [_told(entry) for entry in self.log]
        self.disk.kill()
        self.at.hooks.open_gate()
        self.at.store.fail_no_more()
        self.at.store.release()
        results = [await _answers(entry) for entry in log]
        await self.stack.aclose()
        there = {
            name: header for name, header in scan_local(self.disk.store, limit=100) if header is not None
        }
        for entry, known, result in zip(log, told, results, strict=True):
            self.settle_with(entry, known, result, there)
        assert there.keys() == self.model.sessions.keys()
        for name, session in self.model.sessions.items():
            header = there[name]
            assert (header.revision, header.position) == (session.revision, session.position)
            assert header.request_id == session.request
        self.failed = False
        self.at = await self.server()
        for session in self.model.sessions.values():
            session.used = self.now
        self.begin_anew()

    def settle_with(
        self, entry: Sent | Asked, told: set[int], result: Sequence[Any], there: dict[str, Header]
    ) -> None:
        if isinstance(entry, Asked):
            if told:
                self.unless_unavailable(entry.check)(result[0])
            else:
                entry.lost(there)
            return
        for member, (name, outcome) in enumerate(zip(entry.names, entry.outcomes, strict=True)):
            if member in told:
                self.hold_against(result[member], outcome, cancelled=entry.cancelled)
            else:
                self.settle_lost(name, outcome, there)

    def settle_lost(self, name: str, outcome: Any, there: dict[str, Header]) -> None:
        """Changes happen in their order: this one has if the store knows of more, or if the session was closed."""
        session = self.model.sessions.get(name)
        if name not in there or session is None or session.revision < there[name].revision:
            outcome()

    async def finish(self) -> None:
        await self.settle()
        self.disk.store.fail_no_more()
        await self.expire()
        await super().finish()

    async def expire(self) -> None:
        await self.at.expire()


def _told(entry: Sent | Asked) -> set[int]:
    """Members that have their answer now."""
    if isinstance(entry, Asked):
        return {0} if entry.task.done() else set()
    answers = entry.answers
    everybody = set(range(len(entry.outcomes)))
    if isinstance(answers, list):
        return everybody
    return set(answers.by_member)


async def _answers(entry: Sent | Asked) -> Sequence[Any]:
    if isinstance(entry, Asked):
        return [await asyncio.wait_for(entry.task, WAIT_S)]
    if isinstance(entry.answers, Answers):
        return await entry.answers.all()
    return entry.answers


@pytest.fixture(params=[pytest.param("async", marks=pytest.mark.slow), "sync"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    kind: str = request.param
    yield kind
    STORES.kind = "memory"


async def play(kind: str, shape: Shape, program: Sequence[Action], *, settled: bool) -> None:
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        STORES.kind, STORES.folder = kind, Path(folder)
        disk = Disk()
        async with AsyncExitStack() as stack:
            play = Killing(disk, shape, stack, settled=settled)
            await play.begin(shape)
            for i, name in enumerate(NAMES[:6]):
                await play.do(Open(name, 1 + i % 3, with_state=False))
            for action in program:
                await play.do(action)
            await play.finish()
        disk.close()


@SETTINGS
@given(shape=shapes, program=programs)
def test_killed_at_any_moment(kind: str, shape: Shape, program: list[Action]) -> None:
    asyncio.run(play(kind, shape, program, settled=False))


@pytest.mark.slow
@SETTINGS
@given(shape=crowded, program=programs)
def test_killed_in_peace_with_more_sessions_than_rows(kind: str, shape: Shape, program: list[Action]) -> None:
    asyncio.run(play(kind, shape, program, settled=True))
