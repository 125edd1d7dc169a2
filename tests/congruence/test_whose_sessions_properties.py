"""Random calls of three tenants that give their sessions the same names: each sees what it would see alone."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from google.protobuf import duration_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.core.callers import ANYBODY, Caller, Role
from stepwell_server.rpc.fronts.base import CallEnded
from support.checks.model_of_sessions import Array, ModelOfSessions, ModelSession, Refused, Reply
from support.engine.fake_executor import PLAIN
from support.peers.wire import Refusal, arrays, of_members, step_frame, tensors
from support.rpc.calls import Calls, calls
from support.samples import examples

TENANTS = {"": ANYBODY, "acme": Caller("ann", "acme", Role.USER), "acm": Caller("a", "acm", Role.ADMIN)}
NAMES = "a", "b", "acme"
REASONS = {
    "SESSION_NOT_FOUND": "SessionNotFound",
    "SESSION_EXISTS": "SessionExists",
    "REVISION_CONFLICT": "RevisionConflict",
    "INVALID_INPUT": "InvalidInput",
}


@dataclasses.dataclass(frozen=True)
class Action:
    """What a tenant does with its session of a name."""

    tenant: str
    kind: Literal["open", "step", "frame", "reset", "close", "fork", "move", "close all", "close some"]
    name: str
    other: str
    value: float
    expected: int | None
    request_id: int


ACTIONS = st.builds(
    Action,
    tenant=st.sampled_from(list(TENANTS)),
    kind=st.sampled_from(
        ["open", "open", "step", "step", "frame", "reset", "close", "fork", "move", "close some"]
    )
    | st.just("close all"),
    name=st.sampled_from(NAMES),
    other=st.sampled_from(NAMES),
    value=st.sampled_from([0.25, 0.5, 1.0]),
    expected=st.none() | st.integers(0, 3),
    request_id=st.integers(0, 3),
)


class Tenant:
    """A tenant's calls, held against a model of its own."""

    def __init__(self, at: Calls) -> None:
        self.at = at
        self.model = ModelOfSessions(0)

    @property
    def now(self) -> float:
        return self.at.at.clock.monotonic()

    async def does(self, action: Action) -> None:
        request: Any
        match action.kind:
            case "open":
                resumed = self.model.open(action.name, 1, None, self.now) == "resumed"
                reply = await self.at.call(pb.OpenSessionRequest(model="plain", session_id=action.name))
                assert reply.resumed is resumed
            case "step":
                await self._step(action)
            case "frame":
                await self._frame(action)
            case "reset":
                outcome = self.model.reset(
                    action.name, None, None, action.expected, action.request_id, self.now
                )
                request = pb.ResetStatesRequest(session_id=action.name, **_once(action))
                check(outcome, await self._answer(request))
            case "close":
                closed = self.model.close(action.name)
                check(closed, await self._answer(pb.CloseSessionRequest(session_id=action.name)))
            case "fork":
                made = self.model.fork(action.name, action.other, self.now)
                request = pb.ForkSessionRequest(session_id=action.name, new_session_id=action.other)
                check(made, await self._answer(request))
            case "close some":
                count = sum(
                    not isinstance(self.model.close(name), Refused) for name in {action.name, action.other}
                )
                request = pb.CloseSessionsRequest(session_ids=[action.name, action.other])
                assert (await self.at.call(request)).closed == count
            case "close all":
                for name in list(self.model.sessions):
                    self.model.close(name)
                await self.at.call(pb.CloseMatchingSessionsRequest(all=True))
            case "move":  # out and in again: nothing changes
                exported = (await self.at.call(pb.ExportSessionsRequest())).sessions
                assert [each.session_id for each in exported] == sorted(self.model.sessions)
                request = pb.ImportSessionsRequest(sessions=exported)
                told = (await self.at.call(request)).sessions
                assert all(each.outcome == pb.IMPORT_OUTCOME_IMPORTED for each in told)

    async def _step(self, action: Action) -> None:
        x = np.full((1, 2), action.value, np.float32)
        outcome = self.model.step(action.name, x, "ALL", action.expected, action.request_id, self.now)
        request = pb.StepRequest(session_id=action.name, inputs=tensors({"x": x}), **_once(action))
        answer = await self._answer(request)
        check(outcome, answer)
        if isinstance(outcome, Reply):
            assert_same(outcome.outputs, answer.outputs)

    async def _frame(self, action: Action) -> None:
        names = list(dict.fromkeys([action.name, action.other]))
        x = np.full((len(names), 2), action.value, np.float32)
        outcomes = [
            self.model.step(name, x[at : at + 1], "ALL", None, 0, self.now) for at, name in enumerate(names)
        ]
        frame = step_frame(1, names, tensors({"x": x}))
        answers = await self.at.exchange(frame)
        failed = of_members(answers, len(names))
        assert {names[at] for at in failed} == {
            n for n, o in zip(names, outcomes, strict=True) if isinstance(o, Refused)
        }
        revisions = [revision for answer in answers for revision in answer.revisions]
        assert sorted(revisions) == sorted(one.revision for one in outcomes if isinstance(one, Reply))

    async def _answer(self, request: Any) -> Any:
        """The reply, or how it is refused."""
        try:
            return await self.at.call(request)
        except CallEnded:
            return await self.at.refused(request)  # nothing changed: it is refused again

    async def check(self) -> None:
        """All that it can see is its own."""
        listed = await self.at.call(pb.ListSessionsRequest(idle_longer=duration_pb2.Duration()))
        page = await self.at.call(pb.ListSessionsRequest())
        assert page.total == len(page.sessions) == len(self.model.sessions) >= listed.total
        assert {(s.session_id, s.revision, s.position) for s in page.sessions} == {
            (name, session.revision, session.position) for name, session in self.model.sessions.items()
        }
        for name, session in self.model.sessions.items():
            state = (await self.at.call(pb.GetStateRequest(session_id=name))).state
            assert_same({"sum": session.state}, state)


def _once(action: Action) -> dict[str, Any]:
    expected = {} if action.expected is None else {"expected_revision": action.expected}
    return {"request_id": action.request_id, **expected}


def assert_same(model: Any, told: Sequence[Any]) -> None:
    found: dict[str, Array] = arrays(told)
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in model.items()
    }


def check(outcome: Reply | ModelSession | Refused | bool, answer: Any) -> None:
    if isinstance(outcome, Refused):
        assert isinstance(answer, Refusal), answer
        assert REASONS[answer.reason] == outcome.why
    else:
        assert not isinstance(answer, Refusal), answer
    if isinstance(outcome, Reply):
        assert (answer.revision, answer.position, answer.replayed) == (
            *(outcome.revision, outcome.position, outcome.replayed),
        )


async def play(actions: Sequence[Action]) -> None:
    async with calls({"plain": PLAIN}, resident_rows=4) as at:
        tenants = {name: Tenant(at.of(who)) for name, who in TENANTS.items()}
        for action in actions:
            at.at.clock.advance(1)
            await tenants[action.tenant].does(action)
        for tenant in tenants.values():
            await tenant.check()


@settings(max_examples=examples(400))
@given(st.lists(ACTIONS, min_size=5, max_size=30))
def test_each_of_three_tenants_sees_what_it_would_see_alone(actions: list[Action]) -> None:
    asyncio.run(play(actions))
