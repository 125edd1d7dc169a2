"""Both clients where there is no server, what they send and tell besides, and what of it a traceback shows."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import logging
import socket
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import stepwell
from stepwell import errors
from stepwell.events import RequestEvent, ResponseEvent, RetryEvent
from support.sdk.client_kinds import SHELLS, connect
from support.sdk.scripted_server import MODEL, Fault, ScriptedServer
from support.secured import SCHEME, host_and_port

X = np.ones((1, 2), np.float32)
LONG_S = 1000.0
"""Far above the time limit of a test: what takes that long fails."""
SDK = Path(stepwell.__file__).parent


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Where there is no server.


@contextlib.contextmanager
def nobody() -> Iterator[str]:
    """A port that is taken and refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@contextlib.contextmanager
def silence() -> Iterator[str]:
    """What accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@contextlib.contextmanager
def web_server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"127.0.0.1:{web.server_port}"
        web.shutdown()
        thread.join()


@contextlib.contextmanager
def without_tls() -> Iterator[str]:
    with ScriptedServer() as server:
        if server.address.startswith(SCHEME):
            pytest.skip("plain: it is about a server without TLS")
        yield f"grpcs://{server.address}"


@contextlib.contextmanager
def no_file() -> Iterator[str]:
    yield "unix:nowhere/stepwell.sock"


RUNS = "is `stepwell serve` running there"
UNREACHABLE = {
    "nobody": (
        nobody,
        0.5,
        rf"no server was reached at ADDRESS within 0\.5 s \(connect_timeout_s\): .*refused; {RUNS}",
    ),
    "no file": (no_file, 0.5, rf"no server was reached at ADDRESS within 0\.5 s .*: No such file.*; {RUNS}"),
    "silence": (
        silence,
        0.03,
        rf"no server was reached at ADDRESS within 0\.3 s \(10 times .*something listens.*{RUNS}",
    ),
    "a web server": (
        web_server,
        60.0,
        r"reached at ADDRESS: .*not speak HTTP/2.*a web server.*attempts: 1\b",
    ),
    "no TLS": (
        without_tls,
        60.0,
        r"the server at ADDRESS cannot be reached: .*client uses TLS.*attempts: 1\b",
    ),
}


@pytest.mark.parametrize("name", UNREACHABLE)
@pytest.mark.parametrize("shell", ["sync", "async"])
async def test_a_server_that_is_not_there(shell: str, name: str) -> None:
    unreachable, limit_s, words = UNREACHABLE[name]
    with unreachable() as address:
        async with connect(shell, address, timeout_s=LONG_S, connect_timeout_s=limit_s) as client:
            told = words.replace("ADDRESS", client.address if shell == "async" else client._target.address)
            for call in (client.models, lambda: client.open_session(MODEL)):  # the second tries anew
                with pytest.raises(errors.UnavailableError, match=told) as caught:
                    await call()
                assert caught.value.outcome == "not_applied"


async def test_after_the_first_contact_the_server_is_waited_for(shell: str, server: ScriptedServer) -> None:
    async with connect(shell, server.address, timeout_s=LONG_S) as client:
        session = await client.open_session(MODEL)
        method = "StepStream" if shell == "async" else "Step"
        server.fail(method, Fault(), 3)
        assert (await session.step(X)).tolist() == [[1.0, 1.0]]
        assert len(server.requests(method)) == 4


# What is sent and told besides.


async def test_metadata_goes_with_every_call(shell: str, server: ScriptedServer) -> None:
    pairs = {"x-team": "a", "trace-bin": b"\0\1"}
    async with connect(shell, server.address, metadata=pairs) as client:
        group = await client.open_sessions(MODEL, 2)
        await group.step(np.ones((2, 2)))
    for method in ("OpenSessions", "StepStream"):
        assert pairs.items() <= server.metadata[method].items()


def _told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the SDK logged: gRPC's event loops of other tests have their say, too."""
    return [each.getMessage() for each in caplog.records if each.name.startswith("stepwell")]


async def test_what_is_logged(shell: str, server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "stepwell")
    async with connect(shell, server.address, timeout_s=LONG_S) as client:
        group = await client.open_sessions(MODEL, 2)
        await group.step(np.ones((2, 2)))
        assert _told(caplog) == [f"connected to {host_and_port(server.address)}"]
        caplog.clear()
        server.fail("StepStream", Fault())
        await group.step(np.ones((2, 2)))
        retried, anew = _told(caplog)
        assert retried.startswith(
            f"StepStream at {host_and_port(server.address)}: attempt 1 failed, retrying in 0."
        )
        assert anew == f"reopening the stream to {host_and_port(server.address)}, which broke: scripted"
        caplog.clear()
        for _ in range(20):
            await group.step(np.ones((2, 2)))
    assert _told(caplog) == []


async def test_what_is_closed_in_the_background_is_logged(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "stepwell")
    closed = asyncio.Event()

    def note(record: logging.LogRecord) -> bool:
        if record.getMessage() == "closed 2 sessions that OpenSessions had opened":
            closed.set()
        return True

    caplog.handler.addFilter(note)
    async with stepwell.aio.connect(server.address, timeout_s=LONG_S) as client:
        await client.models()
        server.fail("OpenSessions", Fault(after_work=True))
        server.fail("OpenSessions", Fault(grpc.StatusCode.DEADLINE_EXCEEDED))
        with pytest.raises(errors.DeadlineExceededError):
            await client.open_sessions(MODEL, 2)
        await closed.wait()
    caplog.handler.removeFilter(note)
    assert "OpenSessions ended without an answer; closing any sessions" in caplog.text
    assert server.sessions == {}


def collector(shell: str, seen: list[Any]) -> Callable[[Any], Any]:
    """A hook that notes its events; for the async client a coroutine function."""

    async def note(event: Any) -> None:
        seen.append(event)

    return seen.append if shell.startswith("sync") else note


async def test_event_hooks(shell: str, server: ScriptedServer) -> None:
    seen: list[Any] = []
    hooks = {event: [collector(shell, seen)] for event in ("request", "response", "retry")}
    async with connect(shell, server.address, timeout_s=LONG_S, event_hooks=hooks) as client:
        session = await client.open_session(MODEL)
        group = await client.open_sessions(MODEL, 2)
        seen.clear()
        server.fail("StepStream" if shell == "async" else "Step", Fault())
        await session.step(X)
        await group.step(np.ones((2, 2)))
    step, again, together = (event for event in seen if isinstance(event, RequestEvent))
    assert step == RequestEvent(host_and_port(server.address), "Step", 1, 1)
    assert again == RequestEvent(host_and_port(server.address), "Step", 2, 1)
    assert together == RequestEvent(host_and_port(server.address), "StepStream", 1, 2)
    assert [type(event) for event in seen] == [
        *(RequestEvent, ResponseEvent, RetryEvent),
        *(RequestEvent, ResponseEvent) * 2,
    ]
    assert isinstance(seen[2].error, errors.UnavailableError)
    assert [event.request for event in seen if isinstance(event, ResponseEvent)] == [step, again, together]


async def test_what_a_hook_raises_goes_to_the_caller(shell: str, server: ScriptedServer) -> None:
    """Whether it is an error of the SDK or not; the same call again finishes the change."""
    raised = [errors.UnavailableError("mine"), KeyError("mine")]

    def hook(event: ResponseEvent) -> None:
        if event.request.rpc == "Step" and raised:
            raise raised.pop()

    async with connect(shell, server.address, timeout_s=LONG_S, event_hooks={"response": [hook]}) as client:
        session = await client.open_session(MODEL)
        for kind in (KeyError, errors.UnavailableError):
            with pytest.raises(kind, match="mine") as caught:
                await session.step(X)
            names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
            assert names[-1] == "hook"
        assert (await session.step(X)).tolist() == [[1.0, 1.0]]
        assert (server.applied, session.revision) == (1, 1)


async def test_a_hook_cannot_change_the_session_whose_change_it_is_called_for(
    shell: str, server: ScriptedServer
) -> None:
    inner: list[Any] = []

    def hook(event: RequestEvent) -> Any:
        if event.rpc == "Step":
            return inner[0]()
        return None

    async with connect(shell, server.address, timeout_s=LONG_S, event_hooks={"request": [hook]}) as client:
        session = await client.open_session(MODEL)
        own = session._target if shell.startswith("sync") else session
        inner.append(functools.partial(own.step, X))
        with pytest.raises(errors.InvalidInputError, match="an event hook must not change the session"):
            await session.step(X)


# What a traceback shows.


def own_frames(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.name for frame in frames if Path(frame.filename).is_relative_to(SDK)]


async def errors_of_the_sdk(shell: str, address: str) -> AsyncIterator[BaseException]:
    """One of each kind, as it reaches a caller: of an argument, of the server, of a session, of no server at all."""
    sync = shell.startswith("sync")
    client: Any
    with contextlib.ExitStack() as stack:
        if sync:
            client = stack.enter_context(stepwell.connect(address))
        else:
            client = stepwell.aio.connect(address)

        async def result(call: Callable[[], Any]) -> Any:
            return call() if sync else await call()

        session = await result(lambda: client.open_session(MODEL))
        calls: list[Callable[[], Any]] = [
            lambda: session.step(np.ones((2, 2))),
            lambda: session.reset_states(rows=[7]),
            lambda: client.open_session("another"),
            lambda: client.session_info("nobody"),
            lambda: client.predict(MODEL, X, [X]),
        ]
        for call in calls:
            try:
                await result(call)
            except errors.StepwellError as error:
                yield error
        await result(session.close)
        try:
            await result(lambda: session.step(X))
        except errors.ClosedError as error:
            yield error
        await result(client.close)
        try:
            await result(client.models)
        except errors.ClosedError as error:
            yield error
    try:
        (stepwell.connect if sync else stepwell.aio.connect)("http://h:1")
    except errors.InvalidInputError as error:
        yield error


@pytest.mark.parametrize("shell", ["sync", "async"])
async def test_tracebacks_end_at_the_callers_line(
    shell: str, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [error async for error in errors_of_the_sdk(shell, server.address)]
    assert len(seen) == 8
    for error in seen:
        assert own_frames(error) == [], error
        assert error.__suppress_context__ or error.__context__ is None
    monkeypatch.setenv("STEPWELL_FULL_TRACEBACKS", "1")
    kept = [own_frames(error) async for error in errors_of_the_sdk(shell, server.address)]
    assert min(map(len, kept)) > 1
