"""Servers that share a Valkey: each continues the sessions of the others, and says clearly what is not right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import stepwell
from stepwell.v1 import sessions_pb2
from support.servers.server_process import FEATURES, ServerProcess, connect, serve, tensor
from support.servers.valkey_servers import Valkey, paused

X = np.random.default_rng(3).standard_normal((1, FEATURES)).astype(np.float32)


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey(append="always") as server:
        yield server


def shares(valkey: Valkey, prefix: str, *arguments: str) -> ServerProcess:
    return serve("--store", valkey.url(f"?prefix={prefix}:"), *arguments)


@pytest.mark.parametrize("durability", ["sync", "async"])
def test_any_server_continues_any_session(valkey: Valkey, durability: str) -> None:
    options = ("--durability", durability)
    with (
        shares(valkey, durability, *options) as one,
        shares(valkey, durability, *options) as other,
        stepwell.connect(one.address) as a,
        stepwell.connect(other.address) as b,
    ):
        alone = a.open_session("forecast", session_id="alone")
        wanted = [alone.step(X) for _ in range(6)]
        here = a.open_session("forecast", session_id="both")
        there = b.open_session("forecast", session_id="both")
        found = []
        for turn in range(6):
            session = (here, there)[turn % 2]
            session.refresh()
            found.append(session.step(X))
        np.testing.assert_array_equal(found, wanted)
        assert a.session_info("both").revision == b.session_info("both").revision == 6
        one.process.kill()
        one.process.wait()
        there.refresh()
        np.testing.assert_array_equal(there.step(X), b.open_session("forecast", session_id="alone").step(X))
        b.close_session("both")
        assert [info.session_id for info in b.sessions()] == ["alone"]


def test_a_server_says_what_is_wrong_with_its_store(valkey: Valkey, tmp_path: Path) -> None:
    url = valkey.url("?prefix=wrong:")
    cases = [
        (
            (url, "--data-dir", str(tmp_path)),
            "'--data-dir': cannot be used with '--store' valkey://.*, which keeps nothing on disk",
        ),
        ((valkey.url("?partitions=x"),), "'--store': partitions must be a number from 1 to 4096; got 'x'"),
        ((valkey.url("?replicas=1").replace("/0?", "/99?"),), "--store: .* refuses the connection: .*index"),
    ]
    for arguments, message in cases:
        with serve("--store", *arguments, ready=False) as server:
            code, _, log = server.finish()
            assert code != 0
            assert re.search(message, log), log


@pytest.mark.slow
def test_sync_needs_a_server_that_writes(tmp_path: Path) -> None:
    with Valkey(append="") as volatile, Valkey(append="everysec") as lazy:
        for server, message in [
            (volatile, "--store: .*: durability sync needs appendonly yes; it is no"),
            (lazy, "--store: .*: durability sync needs appendfsync always; it is everysec"),
        ]:
            with serve("--store", server.url(), ready=False) as refused:
                code, _, log = refused.finish()
                assert (code, bool(re.search(message, log))) == (2, True), log
        with serve("--store", volatile.url(), "--durability", "async") as served:
            served.signal()
            _, _, log = served.finish()
            assert "keeps nothing on disk (appendonly no): when it ends, all sessions are lost" in log


@pytest.mark.slow
def test_it_waits_for_a_store_that_is_away_at_the_start() -> None:
    with Valkey(append="always") as valkey:
        valkey.kill()
        with serve("--store", valkey.url(), ready=False) as server:
            server.wait_for_log("the store does not answer yet .*cannot be connected to: Connection refused")
            valkey.start()
            server.wait_for_log("serving")
        valkey.kill()
        with serve("--store", valkey.url(), ready=False) as stopped:
            stopped.wait_for_log("the store does not answer yet")
            stopped.signal()
            code, _, log = stopped.finish()
            assert code == 1, log
            assert "stopped before it was ready" in log


@pytest.mark.slow
def test_it_goes_on_when_the_store_is_back() -> None:
    with Valkey(append="always") as valkey, serve("--store", valkey.url("?timeout_ms=200")) as server:
        channel, stub = connect(server)
        with channel, stepwell.connect(server.address) as patient:
            session = patient.open_session("forecast", session_id="s")
            session.step(X)
            request = sessions_pb2.StepRequest(session_id="s", inputs=[tensor(X)])
            valkey.kill()
            refused(stub, request)
            valkey.start()
            session.step(X)
            with paused(valkey):
                refused(stub, request)
            session.refresh()  # it was asked for, and is made when the store goes on
            session.step(X)
            assert session.revision == patient.session_info("s").revision >= 3


@pytest.mark.slow
def test_what_the_store_has_lost_is_said_to_callers_and_to_those_who_run_it(valkey: Valkey) -> None:
    with shares(valkey, "lost") as server, stepwell.connect(server.address) as client:
        session = client.open_session("forecast", session_id="s")
        session.step(X)
        (key,) = (name for name in valkey.ask("KEYS", "lost:*") if name.endswith(b"s:s"))
        valkey.ask("DEL", key)
        for call in (
            lambda: session.step(X),
            session.get_state,
            lambda: client.open_session("forecast", session_id="s"),
        ):
            with pytest.raises(stepwell.SessionLostError, match="session 's' was lost by the store"):
                call()
        server.wait_for_log("sessions are lost: their keys were deleted from the store or evicted")
        server.wait_for_log("the store has a problem.*1 sessions were lost")
        client.close_session("s")
        assert client.open_session("forecast", session_id="s").revision > 0
        for name in valkey.ask("KEYS", "lost:{*}*"):
            if b"{meta}" not in name:
                valkey.ask("DEL", name)
        with pytest.raises(stepwell.StateCorruptError, match="so it is not opened again"):
            client.open_session("forecast", session_id="another")
        server.wait_for_log("was emptied: the sessions that it had are lost")


def refused(stub: Any, request: sessions_pb2.StepRequest) -> None:
    """A step is not answered, and soon."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.Step(request, timeout=60.0)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
