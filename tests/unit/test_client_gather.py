"""Many tasks step sessions at random, some are cancelled, and frames are answered in any order, in parts, or not at all."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepwell import aio
from stepwell._core.group_core import GroupCore
from stepwell._core.group_tracker import GroupTracker
from stepwell._core.tracker import SessionTracker
from stepwell._state.tensors import pack, to_messages, unpack
from stepwell._transport.retry import RetryPolicy
from stepwell._transport.stream import MakeRequest, Sink
from stepwell.aio_group import AsyncSessionGroup
from stepwell.aio_session import AsyncSession
from stepwell.errors import RevisionConflictError, StepwellError, UnavailableError
from stepwell.v1 import errors_pb2, sessions_pb2
from support.samples import examples
from support.sdk import scripted_model

OVERLOADED = errors_pb2.Error(code=8, reason="OVERLOADED", message="full")
CORRUPT = errors_pb2.Error(code=15, reason="STATE_CORRUPT", message="corrupt")
CONFLICT = errors_pb2.Error(code=10, reason="REVISION_CONFLICT", message="changed")
LIMITS_S = [100.0, 30.0, 20.0, float("inf"), 0.001]
IDS = [f"s{i}" for i in range(6)]


class Server:
    """Answers frames when it likes, by the rules of the protocol. Stands for the stream of a client."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.sessions = {name: scripted_model.Session(name, 1, np.zeros((1, 2), np.float32)) for name in IDS}
        self.applied: dict[str, list[tuple[bytes, bytes]]] = {name: [] for name in IDS}
        """Inputs and outputs of the steps that each session applied."""
        self._waiting: list[tuple[sessions_pb2.StepFrame, Sink]] = []
        self.is_calm = False
        """Whether it answers at once and refuses nothing."""

    def post(self, make: MakeRequest, sink: Sink) -> Callable[[], None]:
        if not self.is_calm and self._chance.random() < 0.05:
            raise UnavailableError("no connection", outcome="not_applied")
        frame = scripted_model.in_full(make(1)).step
        assert len(set(frame.session_ids)) == len(frame.session_ids)
        self._waiting.append((frame, sink))
        asyncio.get_running_loop().call_soon(self.answer_some)
        return lambda: None

    def answer_some(self) -> None:
        """Answers some of the frames that wait."""
        self._chance.shuffle(self._waiting)
        while self._waiting and (self.is_calm or self._chance.random() < 0.7):
            self._answer(*self._waiting.pop())

    def calm_down(self) -> None:
        self.is_calm = True
        self.answer_some()

    def _answer(self, frame: sessions_pb2.StepFrame, sink: Sink) -> None:
        order = self._chance.sample(range(len(frame.session_ids)), len(frame.session_ids))
        breaks = not self.is_calm and self._chance.random() < 0.1
        while order:
            count = self._chance.randint(1, len(order))
            part, order = sorted(order[:count]), order[count:]
            response = self._part(frame, part)
            if breaks:
                sink(UnavailableError("the stream broke", outcome="unknown"))
                return
            response.last = not order
            sink(response)

    def _part(self, frame: sessions_pb2.StepFrame, members: list[int]) -> sessions_pb2.StepStreamResponse:
        response, outputs = sessions_pb2.StepStreamResponse(), []
        x = unpack(frame.inputs[0])
        for i in members:
            session = self.sessions[frame.session_ids[i]]
            error = None if self.is_calm else self._chance.choice([None] * 8 + [OVERLOADED, CORRUPT])
            if error is None:
                error = self._step(session, x[i : i + 1], frame.expected_revisions[i], frame.request_ids[i])
            if error is not None:
                response.errors.add(members=[i], error=error)
                continue
            response.members.append(i)
            response.revisions.append(session.revision)
            response.positions.append(session.position)
            outputs.append(session.remembered)
        if outputs:
            response.outputs.extend(to_messages([pack("y", "y", np.concatenate(outputs))]))
        return response

    def _step(
        self, session: scripted_model.Session, x: Any, expected: int, request_id: int
    ) -> errors_pb2.Error | None:
        if expected == session.revision:
            session.remembered = scripted_model.step(session, x)
            session.revision, session.request_id = expected + 1, request_id
            self.applied[session.session_id].append((x.tobytes(), session.remembered.tobytes()))
        elif (expected + 1, request_id) != (session.revision, session.request_id):
            return CONFLICT
        return None


class Callers:
    """Tasks that step the sessions, and what they must find."""

    def __init__(self, chance: random.Random, server: Server, client: aio.AsyncClient) -> None:
        self._chance, self._server = chance, server
        driver = client._driver
        driver.core.retrier._policy = RetryPolicy(base_s=0.0)
        driver.connections.to(None)._coalescer._link = server
        group = GroupTracker("m", "f", 1, IDS[:3])
        members = AsyncSessionGroup(driver, GroupCore(driver.core, group), owned=False)
        lone = [SessionTracker(sessions_pb2.Session(session_id=i, model="m", batch_size=1)) for i in IDS[3:]]
        # Two handles of each member of the group: they share its lock.
        self.handles = [members[i] for i in (0, 0, 1, 1, 2, 2)]
        # And two of the last session that do not know of each other.
        lone.append(SessionTracker(sessions_pb2.Session(session_id=IDS[-1], model="m", batch_size=1)))
        self.handles += [AsyncSession(driver, tracker, owned=False) for tracker in lone]
        self._unsure = {IDS[-1]}
        """Sessions that may have moved on unnoticed."""

    async def round(self) -> None:
        """Some tasks step sessions, each once or twice, and some of the tasks are cancelled."""
        chosen = self._chance.choices(self.handles, k=self._chance.randint(1, 12))
        tasks = [asyncio.ensure_future(self.step(handle, self._chance.choice(LIMITS_S))) for handle in chosen]
        for _ in range(self._chance.randint(0, 4)):
            if self._chance.random() < 0.3:
                self._chance.choice(tasks).cancel()
            await asyncio.sleep(0)
        if self._chance.random() < 0.5:
            self._server.answer_some()
        await asyncio.sleep(0)
        self._server.calm_down()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, BaseException) and not isinstance(ended, asyncio.CancelledError):
                raise ended
        self._server.is_calm = False

    async def step(self, handle: AsyncSession, limit_s: float) -> None:
        x = np.array([[self._chance.random(), self._chance.random()]], np.float32)
        applied = self._server.applied[handle.id]
        try:
            y: Any = await handle.step(x, timeout_s=limit_s)
        except RevisionConflictError:
            assert handle.id in self._unsure
            self._sure(handle.id)
            session = self._server.sessions[handle.id]
            handle._tracker.refresh(
                sessions_pb2.Session(revision=session.revision, position=session.position)
            )
        except asyncio.CancelledError:
            self._unsure.add(handle.id)
            raise
        except StepwellError as error:
            self._unsure.add(handle.id)
            if getattr(error, "outcome", "") == "not_applied":
                assert x.tobytes() not in [each for each, _ in applied]
        else:
            self._sure(handle.id)
            assert [own for each, own in applied if each == x.tobytes()] == [y.tobytes()]
            assert y.base is None, "it keeps no other member's outputs in memory"

    def _sure(self, name: str) -> None:
        if name != IDS[-1]:
            self._unsure.discard(name)


async def program(seed: int) -> None:
    chance = random.Random(seed)
    server = Server(chance)
    async with aio.connect("127.0.0.1:1") as client:
        callers = Callers(chance, server, client)
        for _ in range(8):
            await callers.round()
        server.is_calm = True
        for handle in callers.handles:
            for _ in range(2):  # the first may find that a cancelled step was applied
                await callers.step(handle, 100.0)
            assert not handle._locks._holders
            assert not handle._locks._held.any()
            assert not handle._locks._queue
            assert handle._tracker.pending is None
            assert handle.revision == len(server.applied[handle.id]) == server.sessions[handle.id].revision
        assert not client._driver.connections.to(None)._coalescer._in_flight


@settings(max_examples=examples(300), suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.integers(0, 2**32))
def test_steps_that_are_awaited_together(seed: int) -> None:
    asyncio.run(program(seed))
