"""The token that a client sends: whence it comes, where it may go, and when another one is asked for."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from typing import Any

import grpc
import pytest

import stepwell
from stepwell import aio, errors
from stepwell._base.addresses import is_on_this_machine
from stepwell._core.retrier import Retrier
from stepwell._transport import channel
from stepwell._transport.retry import Deadline, RetryPolicy
from stepwell._transport.tokens import Tokens
from stepwell.config import ClientConfig
from stepwell.errors import InvalidInputError, UnauthenticatedError, UnavailableError
from stepwell.v1 import models_pb2, models_pb2_grpc, sessions_pb2
from support.sdk.scripted_calls import ScriptedCalls


def sent(tokens: Tokens) -> str:
    metadata = tokens.metadata()
    assert metadata is not None
    return str(dict(metadata)["authorization"])


def web_token(expires: float, mark: str = "") -> str:
    claims = (
        base64.urlsafe_b64encode(json.dumps({"exp": expires, "mark": mark}).encode()).decode().rstrip("=")
    )
    return f"h.{claims}.s"


@pytest.mark.parametrize(
    ("address", "stays_here"),
    [
        *(
            (one, True)
            for one in ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/x", "dns:///127.8.9.1:1")
        ),
        *(
            (one, False)
            for one in ("10.0.0.1:1", "stepwell.example:1", "[::2]:1", "localhost.evil:1", "0.0.0.0:1")
        ),
    ],
)
def test_a_token_stays_on_this_machine_by_default(address: str, stays_here: bool) -> None:
    assert is_on_this_machine(address) is stays_here
    if stays_here:
        ClientConfig(address, token="stw_x")
    else:
        with pytest.raises(
            InvalidInputError, match="must not be sent to another machine without TLS"
        ) as raised:
            ClientConfig(address, token="stw_x")
        assert "stw_x" not in raised.value.message
        ClientConfig(address, token="stw_x", tls=stepwell.TlsConfig())
        ClientConfig(address, token="stw_x", allow_insecure_token=True)


async def test_no_proxy_gets_what_is_meant_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        proxy.setblocking(False)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        config = ClientConfig(target, token="stw_x")
        with channel.open_channel(config) as opened, pytest.raises(grpc.RpcError, match="refused"):
            models_pb2_grpc.ModelServiceStub(opened).ListModels(models_pb2.ListModelsRequest(), timeout=100)
        async with channel.open_async_channel(config) as other:
            with pytest.raises(grpc.RpcError, match="refused"):
                await models_pb2_grpc.ModelServiceStub(other).ListModels(
                    models_pb2.ListModelsRequest(), timeout=100
                )
        with pytest.raises(BlockingIOError):
            proxy.accept()


@pytest.mark.parametrize("token", ["", "two words", "new\nline", "ümlaut", 7, b"bytes"])
def test_what_is_no_token_is_refused_and_not_shown(token: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match=r"^token must be a string of printable ASCII") as raised:
        stepwell.connect(token=token)
    assert str(token) == "" or str(token) not in raised.value.message
    with pytest.raises(UnauthenticatedError, match="the token function must return a string"):
        Tokens(lambda: token).metadata()
    if isinstance(token, str) and token:
        monkeypatch.setenv("STEPWELL_TOKEN", token)
        with pytest.raises(InvalidInputError, match=r"^STEPWELL_TOKEN must be a string"):
            stepwell.connect()


def test_where_a_token_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWELL_TOKEN", "stw_variable")
    with stepwell.connect() as client, stepwell.connect(token="stw_given", tenant="acme") as other:
        assert client._config.token == "stw_variable"
        assert other._config.token == "stw_given"
        assert "stw_" not in repr(client._config) + repr(client) + client._repr_html_()
        metadata = other._driver.connections.to(None).transport._tokens.metadata()
    assert metadata is not None
    affinity = dict(metadata)["stepwell-session"]
    assert len(affinity) == 16
    assert metadata == (
        ("authorization", "Bearer stw_given"),
        ("stepwell-session", affinity),
        ("stepwell-tenant", "acme"),
    )
    with pytest.raises(InvalidInputError, match="must be None if metadata has the key 'authorization'"):
        stepwell.connect(token="stw_x", metadata={"Authorization": "Bearer y"})
    with pytest.raises(InvalidInputError, match="tenant must be 1 to 64 letters"):
        stepwell.connect(tenant="a b")

    async def token() -> str:
        return "stw_x"

    with pytest.raises(InvalidInputError, match="must not be a coroutine function"):
        stepwell.connect(token=token)  # type: ignore[arg-type]  # that is the point


def test_a_function_is_called_when_its_token_is_needed() -> None:
    now = [1000.0]
    given = [web_token(1600)]
    calls: list[str] = []

    def function() -> str:
        calls.append(given[-1])
        return given[-1]

    tokens = Tokens(function, now=lambda: now[0])
    assert [sent(tokens) for _ in range(3)] == [f"Bearer {given[0]}"] * 3
    assert len(calls) == 1
    now[0] = 1575.0  # half a minute before its end
    assert (sent(tokens), len(calls)) == (f"Bearer {given[0]}", 2)
    assert (sent(tokens), len(calls)) == (
        f"Bearer {given[0]}",
        2,
    )  # it is still the same, and used to its end
    now[0] = 1600.0
    given.append(web_token(2200))
    assert (sent(tokens), len(calls)) == (f"Bearer {given[1]}", 3)
    old = tokens.metadata()
    tokens.refused(old)
    given.append("stw_opaque")
    assert (sent(tokens), len(calls)) == ("Bearer stw_opaque", 4)
    tokens.refused(old)  # one that was under way meanwhile
    now[0] = 1e12
    assert (sent(tokens), len(calls)) == ("Bearer stw_opaque", 4)


def test_many_threads_wait_for_one_call_of_the_function() -> None:
    release, calls = threading.Event(), []

    def function() -> str:
        calls.append(1)
        assert release.wait(100)
        return "stw_x"

    tokens = Tokens(function)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(sent(tokens))) for _ in range(8)]
    for thread in threads:
        thread.start()
    release.set()
    for thread in threads:
        thread.join(100)
    assert (found, len(calls)) == (["Bearer stw_x"] * 8, 1)


async def test_a_coroutine_function_is_awaited_once_for_all() -> None:
    calls: list[int] = []

    async def function() -> str:
        calls.append(1)
        await asyncio.sleep(0)
        return "stw_x"

    tokens = Tokens(function)
    found = await asyncio.gather(*(tokens.metadata_async() for _ in range(8)))
    assert (set(found), len(calls)) == ({(("authorization", "Bearer stw_x"),)}, 1)


def test_a_function_that_fails_is_said_and_is_the_cause() -> None:
    def function() -> str:
        raise ConnectionError("secret detail")

    with (
        stepwell.connect(token=function) as client,
        pytest.raises(UnauthenticatedError, match="the token function raised ConnectionError") as raised,
    ):
        client.models()
    assert isinstance(raised.value.__cause__, ConnectionError) or raised.value.__context__ is not None
    assert "secret" not in raised.value.message


async def test_a_function_that_fails_fails_calls_of_async_clients() -> None:
    async def function() -> str:
        raise ConnectionError

    async with aio.connect(token=function) as client:
        with pytest.raises(UnauthenticatedError, match="raised ConnectionError"):
            await client.models()


@pytest.mark.parametrize(
    ("script", "attempts", "outcome"),
    [
        ([UnauthenticatedError("no"), None], 2, None),
        ([UnauthenticatedError("no"), UnauthenticatedError("no")], 2, "not_applied"),
        ([UnauthenticatedError("ended", outcome="unknown"), UnauthenticatedError("no")], 2, "unknown"),
        ([UnavailableError("broke"), UnauthenticatedError("no"), UnauthenticatedError("no")], 3, "unknown"),
        ([UnauthenticatedError("no"), errors.PermissionDeniedError("no")], 2, "not_applied"),
    ],
)
def test_a_refused_token_is_renewed_once(script: list[Any], attempts: int, outcome: str | None) -> None:
    retrier = Retrier(RetryPolicy(), 1 << 20, renews_tokens=True)
    calls, ended = ScriptedCalls(script), None
    try:
        calls.run(retrier.call("Step", sessions_pb2.StepRequest(), Deadline(100.0), changes=True))
    except errors.StepwellError as error:
        ended = getattr(error, "outcome", "not_applied")
    assert (ended, calls.attempts) == (outcome, attempts)


def test_a_token_that_is_no_function_is_not_tried_again() -> None:
    flow = Retrier(RetryPolicy(), 1 << 20).call("Step", sessions_pb2.StepRequest(), Deadline(100.0))
    next(flow)
    with pytest.raises(UnauthenticatedError):
        flow.throw(UnauthenticatedError("no"))
