"""Both clients against a server whose faults are scripted: what is sent again, and what comes of it."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest

from stepwell import errors
from stepwell._core.aio_driver import AsyncDriver
from stepwell._transport.retry import RetryPolicy
from support.peers.proxy import Proxy
from support.sdk.client_kinds import SHELLS, connect
from support.sdk.scripted_model import in_full
from support.sdk.scripted_server import MODEL, Fault, ScriptedServer

# The last of many attempts may be cut short by the time limit.
GAVE_UP = (errors.UnavailableError, errors.DeadlineExceededError)
WAIT_S = 100.0
LIMITS_S = (0.2, 2.0, 20.0)
"""A busy machine gets more time."""
X = np.ones((1, 2), np.float32)
Code = grpc.StatusCode
LOST = Fault(after_work=True)
"""The work is done, the answer is lost."""


@pytest.fixture(params=SHELLS)
async def client(request: pytest.FixtureRequest, server: ScriptedServer) -> AsyncIterator[Any]:
    async with connect(request.param, server.address, timeout_s=20.0) as client:
        yield client


@pytest.fixture
async def session(client: Any) -> Any:
    return await client.open_session(MODEL)


async def give_up(call: Callable[..., Any], happened: Callable[[errors.StepwellError], bool]) -> Any:
    """Make a call that cannot succeed, until it has come to what the test is about; returns how it ended then."""
    ended: Any = None
    for limit_s in LIMITS_S:
        with pytest.raises(GAVE_UP) as caught:
            await call(timeout_s=limit_s)
        ended = caught.value
        if happened(ended):
            break
    return ended


def is_unknown(error: errors.StepwellError) -> bool:
    """Whether a call was under way when its time limit passed."""
    return isinstance(error, errors.DeadlineExceededError) and error.outcome == "unknown"


def step_method(session_or_client: Any) -> str:
    """Where the steps of a session go: the async client sends them as frames."""
    driver = session_or_client._driver
    is_shared = isinstance(driver, AsyncDriver) and driver.connections._coalesce
    return "StepStream" if is_shared else "Step"


def changes(server: ScriptedServer, method: str) -> list[tuple[list[int], list[int]]]:
    """Expected revisions and request ids of what came."""
    if method == "Step":
        return [([r.expected_revision], [r.request_id]) for r in server.requests(method)]
    full = [in_full(request) for request in server.requests(method)]
    frames = [r.step if r.HasField("step") else r.reset for r in full]
    return [(list(f.expected_revisions), list(f.request_ids)) for f in frames]


async def test_a_used_up_quota_of_sessions_is_one_attempt(client: Any, server: ScriptedServer) -> None:
    """Waiting does not help until somebody closes a session, so a handler of a web server must not hang for 30 s."""
    metadata = (("quota", "sessions"),)
    used_up = Fault(Code.RESOURCE_EXHAUSTED, "scripted", "QUOTA_EXCEEDED", metadata, retry_after_s=0.1)
    session, group = await client.open_session(MODEL), await client.open_sessions(MODEL, 2)
    for method, call in {
        "OpenSession": lambda: client.open_session(MODEL),
        "OpenSessions": lambda: client.open_sessions(MODEL, 2),
        "ForkSession": session.fork,
        "ForkSessions": group.fork,
    }.items():
        before = len(server.requests(method))
        server.fail(method, used_up, times=5)
        with pytest.raises(errors.OverloadedError, match="scripted") as caught:
            await call()
        assert caught.value.quota == "sessions"
        assert len(server.requests(method)) == before + 1
        server.fail_no_more()


@pytest.mark.parametrize("code", [c for c in Code if c is not Code.OK], ids=lambda code: code.name)
@pytest.mark.parametrize("shell", SHELLS)
async def test_every_status_becomes_an_error_of_ours(
    shell: str, code: grpc.StatusCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def final_if_scripted(_policy: RetryPolicy, _attempt: int, error: errors.StepwellError) -> float | None:
        """Tries again only what gRPC makes up, such as a stream that broke while a frame was being sent."""
        return None if "scripted" in error.message else 0.0

    monkeypatch.setattr(RetryPolicy, "delay_s", final_if_scripted)
    with ScriptedServer() as server:
        async with connect(shell, server.address, timeout_s=60.0) as client:
            session = await client.open_session(MODEL)
            for method in ("ListModels", step_method(client)):
                server.fail(method, Fault(code, "scripted"), 1000)
            with pytest.raises(errors.StepwellError) as listing:
                await client.models()
            with pytest.raises(errors.StepwellError) as stepping:
                await session.step(X)
    for caught in (listing, stepping):
        assert type(caught.value).__module__ == "stepwell.errors"
        assert "scripted" in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize("fault", [LOST, Fault()], ids=["its answer is lost", "it never arrives"])
async def test_a_step_is_sent_again_the_same_and_applied_once(
    session: Any, server: ScriptedServer, fault: Fault
) -> None:
    method = step_method(session)
    server.fail(method, fault, 2)
    assert (await session.step(X)).tolist() == [[1.0, 1.0]]
    assert (server.applied, session.revision, session.position) == (1, 1, 1)
    first, second, third = changes(server, method)
    assert first == second == third
    assert first[1] != [0]


@pytest.mark.parametrize(
    "method", ["ListModels", "OpenSession", "CloseSession", "GetState", "ForkSession", "Predict"]
)
async def test_other_calls_are_sent_again_too(client: Any, server: ScriptedServer, method: str) -> None:
    server.fail(method, Fault(), 2)
    await client.models()
    session = await client.open_session(MODEL, session_id="s")
    await session.get_state()
    await session.fork("t")
    await client.predict(MODEL, X)
    await session.close()
    first, second, third = server.requests(method)
    assert first == second == third


async def test_overload_is_waited_for(client: Any, session: Any, server: ScriptedServer) -> None:
    method = step_method(client)
    fault = Fault(Code.RESOURCE_EXHAUSTED, "full", "OVERLOADED", retry_after_s=0.2)
    server.fail(method, fault)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await session.step(X)
    assert loop.time() - began_s >= 0.2


async def test_overload_beyond_the_limit(client: Any, session: Any, server: ScriptedServer) -> None:
    server.fail(step_method(client), Fault(Code.RESOURCE_EXHAUSTED, "full", "OVERLOADED", retry_after_s=60))
    with pytest.raises(errors.OverloadedError) as caught:
        await session.step(X)
    assert caught.value.retry_after_s == 60


async def test_unknown_outcome_is_settled_by_the_same_call(
    client: Any, session: Any, server: ScriptedServer
) -> None:
    server.fail(step_method(client), LOST, 1000)
    ended = await give_up(functools.partial(session.step, X), lambda _: server.applied == 1)
    assert ended.outcome == "unknown"
    assert session.revision == 0
    server.fail_no_more()
    assert (await session.step(X)).tolist() == [[1.0, 1.0]]
    assert (server.applied, session.revision) == (1, 1)


async def test_unknown_outcome_and_another_call_is_a_conflict(
    client: Any, session: Any, server: ScriptedServer
) -> None:
    server.fail(step_method(client), LOST, 1000)
    await give_up(functools.partial(session.step, X), lambda _: server.applied == 1)
    server.fail_no_more()
    with pytest.raises(
        errors.RevisionConflictError, match=r"earlier change of this handle.*refresh\(\)"
    ) as caught:
        await session.step(2 * X)
    if step_method(client) == "Step":
        assert (caught.value.expected, caught.value.actual) == (0, 1)
    await session.refresh()
    assert (session.revision, session.position) == (1, 1)
    assert (await session.step(2 * X)).tolist() == [[3.0, 3.0]]


async def test_refusal_is_settled(client: Any, session: Any, server: ScriptedServer) -> None:
    server.fail(step_method(client), Fault(reason="UNAVAILABLE", message="stopping"), 1000)
    ended = await give_up(functools.partial(session.step, X), lambda error: "stopping" in error.message)
    assert "stopping" in str(ended)
    cut_short = isinstance(ended, errors.DeadlineExceededError)
    assert ended.outcome == ("unknown" if cut_short else "not_applied")


async def test_time_limit_is_kept_and_its_outcome_unknown(
    client: Any, session: Any, server: ScriptedServer
) -> None:
    gate, _ = server.hold(step_method(client))
    loop = asyncio.get_running_loop()

    async def step(timeout_s: float) -> None:
        began_s = loop.time()
        try:
            await session.step(X, timeout_s=timeout_s)
        finally:
            assert loop.time() - began_s >= 0.8 * timeout_s

    ended = await give_up(step, is_unknown)
    assert isinstance(ended, errors.DeadlineExceededError)
    assert ended.outcome == "unknown"
    gate.set()
    assert (await session.step(X)).tolist() == [[1.0, 1.0]]
    assert server.applied == 1


async def test_waiting_for_ones_turn_counts(client: Any, session: Any, server: ScriptedServer) -> None:
    gate, arrived = server.hold(step_method(client))
    first = asyncio.ensure_future(session.step(X))
    assert await asyncio.to_thread(arrived.acquire, timeout=WAIT_S)
    with pytest.raises(errors.DeadlineExceededError, match="another change") as caught:
        await session.step(X, timeout_s=0.2)
    assert caught.value.outcome == "not_applied"
    gate.set()
    await first
    assert server.applied == 1


async def test_one_change_of_a_session_at_a_time_many_sessions_at_once(
    client: Any, server: ScriptedServer
) -> None:
    sessions = [await client.open_session(MODEL) for _ in range(4)]
    both = [session.step(X) for session in sessions for _ in range(5)]
    results = await asyncio.gather(*both)
    assert sorted(float(y[0, 0]) for y in results) == sorted([1.0, 2.0, 3.0, 4.0, 5.0] * 4)
    assert [session.revision for session in sessions] == [5] * 4


async def test_group_is_one_frame(client: Any, server: ScriptedServer) -> None:
    async with await client.open_sessions(MODEL, 3) as group:
        x = np.arange(6, dtype=np.float32).reshape(3, 2)
        assert np.array_equal(await group.step(x), x)
        assert len(server.requests("StepStream")) == 1
        assert group.revisions.tolist() == group.positions.tolist() == [1, 1, 1]
        await group.reset_states(rows=[1])
        assert (group.revisions.tolist(), group.positions.tolist()) == ([1, 2, 1], [1, 0, 1])
        await group.reset_states(rows=[])
        assert len(server.requests("StepStream")) == 2
        state = await group.get_state()
        assert np.array_equal(state["sum"], x * [[1], [0], [1]])
        assert len(group) == len(group.ids) == 3
    assert server.sessions == {}


async def test_group_with_batch_size_and_parts(client: Any, server: ScriptedServer) -> None:
    server.parts = 3
    group = await client.open_sessions(MODEL, 5, batch_size=2, session_ids=list("abcde"))
    x = np.random.default_rng(1).random((10, 2), np.float32)
    assert np.array_equal(await group.step(x), x)
    assert (await group.step(np.stack([x, x], 1), outputs="none")) is None
    await group.close()
    assert server.sessions == {}


async def test_group_whose_members_fail(client: Any, server: ScriptedServer) -> None:
    group = await client.open_sessions(MODEL, 3)
    x = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    server.fail("StepStream", Fault(Code.DATA_LOSS, "damaged", "STATE_CORRUPT", member=1))
    with pytest.raises(errors.StateCorruptError, match="1 of 3 sessions failed, first: damaged") as caught:
        await group.step(x)
    assert {i: type(e) for i, e in caught.value.failures.items()} == {1: errors.StateCorruptError}
    assert caught.value.failures[1].message == "damaged"
    assert str(caught.value).endswith(f"(session {group.ids[1]!r}, index 1)")
    assert np.asarray(caught.value.outputs).tolist() == (x * [[1], [0], [1]]).tolist()
    assert group.revisions.tolist() == [1, 0, 1]
    # The same call finishes the change: nobody is stepped twice.
    assert np.array_equal(await group.step(x), x)
    assert group.revisions.tolist() == [1, 1, 1]
    assert server.applied == 3


async def test_group_time_limit(client: Any, server: ScriptedServer) -> None:
    group = await client.open_sessions(MODEL, 3)
    gate, _ = server.hold("StepStream")
    x = np.ones((3, 2), np.float32)
    ended = await give_up(functools.partial(group.step, x), is_unknown)
    assert isinstance(ended, errors.DeadlineExceededError)
    assert (ended.outcome, sorted(ended.failures)) == ("unknown", [0, 1, 2])
    gate.set()
    assert np.array_equal(await group.step(x), x)
    assert server.applied == 3


async def test_another_change_of_a_group_after_an_unknown_outcome(
    client: Any, server: ScriptedServer
) -> None:
    group = await client.open_sessions(MODEL, 3)
    x = np.ones((3, 2), np.float32)
    server.fail("StepStream", LOST, 1000)
    await give_up(functools.partial(group.step, x), lambda _: server.applied == 3)
    server.fail_no_more()
    with pytest.raises(errors.RevisionConflictError, match=r"earlier change of this handle.*refresh\(\)"):
        await group.step(2 * x)
    await group.refresh()
    assert (await group.step(2 * x)).tolist() == (3 * x).tolist()


async def test_with_blocks_close_what_has_no_name(client: Any, server: ScriptedServer) -> None:
    async with await client.open_session(MODEL) as session:
        async with await session.fork() as twin:
            assert set(server.sessions) == {session.id, twin.id}
        assert set(server.sessions) == {session.id}
    assert server.sessions == {}
    async with await client.open_session(MODEL, session_id="user-42"):
        pass
    assert set(server.sessions) == {"user-42"}


async def test_closing_does_not_hide_the_error_of_the_block(session: Any, server: ScriptedServer) -> None:
    server.fail("CloseSession", Fault(Code.DATA_LOSS, "scripted"))
    with pytest.raises(ZeroDivisionError) as caught:
        async with session:
            raise ZeroDivisionError
    assert "scripted" in caught.value.__notes__[0]


async def test_closing_a_session_that_is_gone(client: Any, session: Any, server: ScriptedServer) -> None:
    server.sessions.clear()
    await session.close()
    await session.close()
    assert len(server.requests("CloseSession")) == 1
    for kind, call in (
        (errors.ClosedError, session.step(X)),
        (errors.ClosedError, session.get_state()),
        (errors.SessionNotFoundError, client.close_session("gone")),
    ):
        with pytest.raises(kind):
            await call


async def test_closed_client(client: Any, session: Any, server: ScriptedServer) -> None:
    group = await client.open_sessions(MODEL, 2)
    await group.step(np.ones((2, 2)))
    await client.close()
    for use in (client.models, session.close, lambda: session.step(X), lambda: group.step(np.ones((2, 2)))):
        with pytest.raises(errors.ClosedError):
            await use()
    await client.close()


@pytest.mark.parametrize("who", ["session", "group", "call", "pause"])
async def test_closing_the_client_ends_its_calls(
    client: Any, session: Any, server: ScriptedServer, who: str
) -> None:
    group = await client.open_sessions(MODEL, 2)
    if who == "pause":
        full = Fault(Code.RESOURCE_EXHAUSTED, "full", "OVERLOADED", retry_after_s=15.0)
        server.fail("GetModel", full, 1000)
        under_way = asyncio.ensure_future(client.model(MODEL))
        while not server.requests("GetModel"):
            await asyncio.to_thread(lambda: None)
    else:
        method, use = {
            "session": (step_method(client), lambda: session.step(X)),
            "group": ("StepStream", lambda: group.step(np.ones((2, 2)))),
            "call": ("ListModels", client.models),
        }[who]
        _, arrived = server.hold(method)
        under_way = asyncio.ensure_future(use())
        assert await asyncio.to_thread(arrived.acquire, timeout=WAIT_S)
    await client.close()
    with pytest.raises(errors.ClosedError):
        await asyncio.wait_for(under_way, WAIT_S)


async def test_states_are_checked_by_what_the_server_says_now(client: Any, server: ScriptedServer) -> None:
    await client.model(MODEL)
    state = await (await client.open_session(MODEL)).get_state()
    server.fingerprint = "beef"
    session = await client.open_session(MODEL)
    with pytest.raises(errors.ModelMismatchError, match="beef"):
        await session.reset_states(state)
    fresh = await session.get_state()
    await session.reset_states(fresh)
    with pytest.raises(errors.InvalidInputError, match="missing"):
        await session.reset_states({"sum": X})
    with pytest.raises(errors.ModelMismatchError):
        await client.open_session(MODEL, state=state)


async def test_pages_are_hidden(client: Any, server: ScriptedServer) -> None:
    for name in ("a1", "a2", "b1"):
        await client.open_session(MODEL, session_id=name)
    assert [info.session_id for info in await client.sessions()] == ["a1", "a2", "b1"]
    assert [info.session_id for info in await client.sessions(prefix="a")] == ["a1", "a2"]
    assert len(server.requests("ListSessions")) == 5


async def test_message_over_the_limit(server: ScriptedServer) -> None:
    for shell in SHELLS:
        async with connect(shell, server.address, max_message_bytes=4096) as client:
            session = await client.open_session(MODEL)
            with pytest.raises(errors.InvalidInputError, match="max_message_bytes"):
                await session.step(np.ones((1, 1000, 2), np.float64))
            assert (await session.step(X)).shape == (1, 2)
            group = await client.open_sessions(MODEL, 2)
            with pytest.raises(errors.InvalidInputError, match="max_message_bytes"):
                await group.step(np.ones((2, 1000, 2), np.float64))


async def test_no_limit(client: Any) -> None:
    async with await client.open_session(MODEL, timeout_s=math.inf) as session:
        assert (await session.step(X, timeout_s=math.inf)).shape == (1, 2)
    async with await client.open_sessions(MODEL, 2) as group:
        assert (await group.step(np.ones((2, 2)), timeout_s=math.inf)).shape == (2, 2)


async def test_a_reply_over_the_limit_may_have_been_applied(server: ScriptedServer) -> None:
    x = np.ones((1, 900, 2), np.float16)  # comes back as float32, twice as large
    for shell in SHELLS:
        async with connect(shell, server.address, max_message_bytes=4096) as client:
            session = await client.open_session(MODEL, session_id=shell)
            with pytest.raises(
                errors.ReplyTooLargeError, match=r"max_message_bytes.*may have applied"
            ) as caught:
                await session.step(x)
            assert caught.value.outcome == "unknown"
            with pytest.raises(errors.RevisionConflictError, match="earlier change of this handle"):
                await session.step(X)
            await session.refresh()
            assert np.array_equal(await session.step(X), 901 * X)


async def test_connections_that_break_while_frames_are_written(server: ScriptedServer) -> None:
    with Proxy(server.address, 1) as proxy:
        async with connect("async", proxy.address, timeout_s=WAIT_S) as client:
            sessions = [await client.open_session(MODEL) for _ in range(16)]
            stepped, over = asyncio.Event(), False

            async def go(session: Any) -> None:
                while not over:
                    await session.step(X)
                    stepped.set()

            async with asyncio.TaskGroup() as tasks:
                for session in sessions:
                    tasks.create_task(go(session))
                # about every eighth time grpc.aio finds a write failed before it is told that the stream is
                for _ in range(60):
                    stepped.clear()
                    await stepped.wait()
                    await asyncio.to_thread(proxy.be, "clean")
                over = True
    assert server.applied == sum(session.revision for session in sessions)
