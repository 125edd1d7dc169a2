"""An open or fork whose answer never comes, and whose caller gives up, leaves no session behind."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import pytest

import stepwell
from stepwell import errors
from stepwell._transport.retry import RetryPolicy
from support.peers.proxy import Proxy
from support.sdk.client_kinds import SHELLS, connect
from support.sdk.scripted_server import MODEL, Fault, ScriptedServer
from support.servers.served import Served

GAVE_UP = (errors.UnavailableError, errors.DeadlineExceededError)
LOST = Fault(after_work=True)
"""The work is done, the answer is lost."""

Opens = Callable[..., Awaitable[Any]]
OPENS: dict[str, Opens] = {
    "OpenSession": lambda client, _, timeout_s, model=MODEL: client.open_session(model, timeout_s=timeout_s),
    "OpenSessions": lambda client, _, timeout_s, model=MODEL: client.open_sessions(
        model, 3, timeout_s=timeout_s
    ),
    "ForkSession": lambda _, session, timeout_s, model=MODEL: session.fork(timeout_s=timeout_s),
}
NAMED: dict[str, Opens] = {
    "OpenSession": lambda client, _, timeout_s: client.open_session(
        MODEL, session_id="a", timeout_s=timeout_s
    ),
    "OpenSessions": lambda client, _, timeout_s: client.open_sessions(
        MODEL, 1, session_ids=["a"], timeout_s=timeout_s
    ),
    "ForkSession": lambda _, session, timeout_s: session.fork("a", timeout_s=timeout_s),
}


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call ends with the first failure that the test scripts, so that no time limit decides how it ends."""

    def delay_s(_policy: RetryPolicy, _attempt: int, error: errors.StepwellError) -> float | None:
        return None if "scripted" in error.message else 0.0

    monkeypatch.setattr(RetryPolicy, "delay_s", delay_s)


@pytest.fixture(params=SHELLS)
async def client(request: pytest.FixtureRequest, server: ScriptedServer) -> AsyncIterator[Any]:
    async with connect(request.param, server.address, timeout_s=100.0) as client:
        yield client


async def only_left(server: ScriptedServer, *session_ids: str) -> bool:
    """Waits until these sessions, and no others, are there."""
    return await asyncio.to_thread(server.wait_until, lambda: server.sessions.keys() == set(session_ids))


@pytest.mark.parametrize("method", OPENS)
@pytest.mark.usefixtures("no_patience")
async def test_it_is_closed_by_the_same_request_made_again(
    client: Any, server: ScriptedServer, method: str
) -> None:
    kept = await client.open_session(MODEL, session_id="kept")
    gate, _ = server.hold("CloseSessions")
    server.fail(method, LOST)
    with pytest.raises(errors.UnavailableError) as caught:
        await OPENS[method](client, kept, 60.0)
    assert caught.value.outcome == "unknown"
    assert len(server.sessions) > 1
    gate.set()
    assert await only_left(server, "kept")
    first, second = server.requests(method)[-2:]
    assert first == second


@pytest.mark.parametrize("method", NAMED)
@pytest.mark.usefixtures("no_patience")
async def test_a_named_one_is_its_callers_to_find_again(
    client: Any, server: ScriptedServer, method: str
) -> None:
    kept = await client.open_session(MODEL, session_id="kept")
    before = len(server.requests(method))
    server.fail(method, LOST)
    with pytest.raises(errors.UnavailableError):
        await NAMED[method](client, kept, 60.0)
    await client.close()
    assert (set(server.sessions), len(server.requests(method))) == ({"kept", "a"}, before + 1)
    assert not server.requests("CloseSessions")


@pytest.mark.parametrize("method", OPENS)
async def test_one_that_was_refused_is_not_asked_for_again(
    client: Any, server: ScriptedServer, method: str
) -> None:
    kept = await client.open_session(MODEL, session_id="kept")
    before = len(server.requests(method))
    server.fail(method, Fault(grpc.StatusCode.INVALID_ARGUMENT, "no"))
    with pytest.raises(errors.InvalidInputError):
        await OPENS[method](client, kept, 100.0)
    await client.close()
    assert len(server.requests(method)) == before + 1
    assert not server.requests("CloseSessions")


@pytest.mark.parametrize("method", OPENS)
async def test_a_cancelled_one_is_closed(server: ScriptedServer, method: str) -> None:
    async with stepwell.aio.connect(server.address) as client:
        kept = await client.open_session(MODEL, session_id="kept")
        gate, arrived = server.hold(method)
        opening = asyncio.ensure_future(OPENS[method](client, kept, 100.0))
        assert await asyncio.to_thread(arrived.acquire, timeout=100)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        gate.set()
        assert await asyncio.to_thread(server.wait_until, lambda: bool(server.requests("CloseSessions")))
        assert await only_left(server, "kept")


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.usefixtures("no_patience")
async def test_closing_the_client_at_once_still_lets_it_try(
    server: ScriptedServer, shell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepwell._core.finisher.GRACE_S", 60.0)
    async with connect(shell, server.address) as client:
        server.fail("OpenSession", LOST)
        with pytest.raises(errors.UnavailableError):
            await client.open_session(MODEL)
    assert server.requests("CloseSessions")
    assert not server.sessions


@pytest.mark.parametrize("shell", SHELLS)
async def test_a_client_that_cannot_reach_its_server_is_closed_soon(shell: str) -> None:
    with ScriptedServer() as server:
        client = connect(shell, server.address)
        server.fail("OpenSession", LOST, 10_000)
        with pytest.raises(GAVE_UP):
            await client.open_session(MODEL, timeout_s=0.2)
        async with asyncio.timeout(100):
            await client.close()


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
async def test_nothing_is_left_on_a_real_server(
    served: Served, shell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepwell._core.finisher.GRACE_S", 60.0)
    made = 0
    for limit_s in (2.0, 10.0, 50.0):  # a busy machine gets more time
        with Proxy(served.address, 1) as proxy:
            async with connect("sync", served.address) as watching, connect(shell, proxy.address) as client:
                kept = await client.open_session("seq", session_id="kept")
                before = {info.session_id for info in await watching.sessions()}
                proxy.hold("answers")
                calls = [OPENS[method](client, kept, limit_s, "seq") for method in OPENS]
                gave_up = await asyncio.gather(*calls, return_exceptions=True)
                assert {type(error) for error in gave_up} == {errors.DeadlineExceededError}
                made = len(await watching.sessions()) - len(before)
                proxy.release()
                await client.close()
                assert {info.session_id for info in await watching.sessions()} == before
                await watching.close_session("kept")
        if made == 5:
            break
    assert made == 5


def test_one_that_was_interrupted_is_closed_though_the_channel_is_of_no_use_any_more(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a lock of gRPC's channel leaves it locked."""

    def interrupted(_call: Any) -> NoReturn:
        raise KeyboardInterrupt

    with stepwell.connect(server.address) as client:
        # a signal would have to come in the few instructions that hold that lock
        monkeypatch.setattr(client._driver.connections.to(None).transport, "invoke", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.open_session(MODEL)
        assert server.wait_until(lambda: bool(server.requests("CloseSessions")) and not server.sessions)


INTERRUPTED = """
import signal, sys, threading, stepwell
client = stepwell.connect(sys.argv[1])
client.models()
print("ready", flush=True)
try:
    client.open_session("sum")
except KeyboardInterrupt:
    print("interrupted", flush=True)
sys.stdin.read()
"""


def test_one_that_was_interrupted_is_closed(server: ScriptedServer) -> None:
    gate, arrived = server.hold("OpenSession")
    command = [sys.executable, "-c", INTERRUPTED, server.address]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert arrived.acquire(timeout=200)
        process.send_signal(2)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert process.stdout.readline() == "interrupted\n"
        gate.set()
        assert server.wait_until(lambda: bool(server.requests("CloseSessions")) and not server.sessions)
        _, said = process.communicate(timeout=200)
    assert (process.returncode, said) == (0, "")
