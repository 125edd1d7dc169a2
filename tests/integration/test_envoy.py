"""A real Envoy, configured by `stepwell envoy-config`, in front of real servers.

The servers of this module share no store: a call finds a session only on the replica that the others went to.
"""

from __future__ import annotations

import ssl
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import numpy as np
import pytest

import stepwell
from stepwell.v1 import models_pb2, models_pb2_grpc
from stepwell.v1 import sessions_pb2 as pb
from support import secured
from support.peers import wire
from support.peers.http2 import Http2
from support.peers.json_client import X, path_of, step_body
from support.peers.proxy import Proxy
from support.peers.wire import Wire, tensor
from support.processes import until
from support.sdk.client_kinds import connect
from support.secured import Server, host_and_port
from support.servers.envoy import Envoy
from support.servers.replica_servers import started
from support.servers.served import local_server


@pytest.fixture(scope="module")
def replicas() -> Iterator[list[Server]]:
    if secured.is_on():
        pytest.skip("the servers here are without TLS; there is a test with it")
    with started([local_server("seq") for _ in range(3)]) as servers:
        yield servers


@pytest.fixture(scope="module")
def envoy(replicas: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Envoy]:
    folder = tmp_path_factory.mktemp("envoy")
    addresses = [server.address for server in replicas]
    with Envoy(folder, addresses, "--cors-origin", "https://app.example.org") as running:
        yield running


def sessions_of(server: Server) -> set[str]:
    with Wire(server.address) as one:
        listed = one.sessions.ListSessions(pb.ListSessionsRequest(), timeout=wire.TIMEOUT_S)
        return {session.session_id for session in listed.sessions}


def test_a_session_has_one_replica_whoever_calls(envoy: Envoy, replicas: Sequence[Server]) -> None:
    # Where each goes depends on the ports: that one of the replicas has none of them would come about once in 10 ** 10 runs.
    ids = [f"user:{number}/{'x' * number}" for number in range(60)]
    with Wire(envoy.address) as one:
        for session_id in ids:
            assert envoy.json("POST", path_of(session_id), {"model": "seq"})[0] == 200
            assert envoy.json("POST", path_of(session_id) + ":step", step_body())[0] == 200
            header = (("stepwell-session", quote(session_id, safe="")),)
            request = pb.StepRequest(session_id=session_id, inputs=[tensor(np.array([X], np.float32))])
            assert one.sessions.Step(request, timeout=wire.TIMEOUT_S, metadata=header).revision == 2
            body = wire.step_frame(1, [session_id], request.inputs)
            (part,) = one.sessions.StepStream(iter([body]), timeout=wire.TIMEOUT_S, metadata=header)
            assert list(part.revisions) == [3]
            # the header comes before the path
            elsewhere = envoy.json("GET", path_of(session_id), headers={"stepwell-session": "another"})
            assert elsewhere[0] in {200, 404}
    shares = [sessions_of(server) & set(ids) for server in replicas]
    assert sum(map(len, shares)) == len(ids)
    assert all(shares)


@pytest.mark.parametrize("shell", ["sync", "async"])
async def test_the_sdk_finds_its_sessions_again(envoy: Envoy, shell: str) -> None:
    x = np.array([X], np.float32)
    async with connect(shell, envoy.address) as client, await client.open_session("seq") as session:
        first = await session.step(x)
        state = await session.get_state()
        await session.reset_states()
        np.testing.assert_array_equal(await session.step(x), first)
        assert state.revision == 1
        async with await client.open_sessions("seq", 50) as group:
            wanted = np.repeat(first, 50, 0)
            np.testing.assert_allclose(await group.step(np.repeat(x, 50, 0)), wanted, rtol=1e-6)
        assert (await session.fork()).revision == 3


def test_a_page_whose_name_leads_here_may_do_nothing(envoy: Envoy) -> None:
    port = envoy.address.rpartition(":")[2]
    for host in ("localhost", "127.0.0.1", "[::1]"):
        assert envoy.json("GET", "/v1/models", headers={"host": f"{host}:{port}"})[0] == 200
    status, answer = envoy.json("GET", "/v1/models", headers={"host": f"evil.example:{port}"})
    assert (status, answer["code"]) == (403, 7)
    assert "--host" in answer["message"]
    with grpc.insecure_channel(
        envoy.address, options=[("grpc.default_authority", "evil.example")]
    ) as channel:
        refusal = wire.refusal(
            lambda: models_pb2_grpc.ModelServiceStub(channel).ListModels(
                models_pb2.ListModelsRequest(), timeout=wire.TIMEOUT_S
            )
        )
    assert refusal.code == "PERMISSION_DENIED"


def test_grpc_web_is_spoken(envoy: Envoy) -> None:
    message = pb.OpenSessionRequest(model="seq").SerializeToString()
    status, answer, headers = envoy.http(
        "POST",
        "/stepwell.v1.SessionService/OpenSession",
        struct.pack(">BI", 0, len(message)) + message,
        {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"},
    )
    assert (status, headers.get_content_type()) == (200, "application/grpc-web+proto")
    length = struct.unpack(">BI", answer[:5])[1]
    assert pb.OpenSessionResponse.FromString(answer[5 : 5 + length]).session.model == "seq"
    assert b"grpc-status:0" in answer[5 + length :]


@pytest.mark.slow
def test_replicas_that_stop_or_die_are_left_out_and_come_back(tmp_path: Path) -> None:
    if secured.is_on():
        pytest.skip("the servers here are without TLS; there is a test with it")
    failed: list[Any] = []
    stop = threading.Event()
    with started([local_server("seq") for _ in range(3)]) as servers:
        addresses = [server.address for server in servers]
        with Envoy(tmp_path, addresses) as envoy, Wire(envoy.address) as one:

            def read(in_json: bool) -> None:
                number = 0
                while not stop.is_set():
                    number += 1
                    if in_json:
                        found: Any = envoy.json("GET", "/v1/models")
                        if found[0] != 200:
                            failed.append(found)
                        continue
                    request = pb.GetSessionRequest(session_id="nobody")
                    refusal = wire.refusal(
                        lambda request=request, number=number: one.sessions.GetSession(  # type: ignore[misc]
                            request, timeout=wire.TIMEOUT_S, metadata=(("stepwell-session", str(number)),)
                        )
                    )
                    if refusal.code != "NOT_FOUND":
                        failed.append(refusal)

            with ThreadPoolExecutor(2) as pool:
                reading = [pool.submit(read, in_json) for in_json in (True, False)]
                try:
                    assert servers[0].stop() == 0
                    servers[1].kill()
                    until(lambda: envoy.healthy() == {addresses[2]})
                    assert envoy.http("GET", "/healthz")[0] == 200
                    for number in range(20):
                        assert envoy.json("POST", path_of(f"s{number}"), {"model": "seq"})[0] == 200
                    servers[0].restart()
                    until(lambda: envoy.healthy() == {addresses[0], addresses[2]})
                finally:
                    stop.set()
                for done in reading:
                    done.result()
            assert failed == []
            servers[0].kill()
            servers[2].kill()
            until(lambda: envoy.healthy() == set())
            assert envoy.http("GET", "/healthz")[0] == 503
            status, answer = envoy.json("GET", "/v1/models")
            assert (status, answer["code"]) == (503, 14)
            with pytest.raises(grpc.RpcError) as caught:
                one.models.ListModels(models_pb2.ListModelsRequest(), timeout=wire.TIMEOUT_S)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "{" not in str(caught.value.details())


def test_a_change_is_sent_once_and_a_read_again(tmp_path: Path, replicas: list[Server]) -> None:
    """The answer is kept back until the connection is cut: the change is applied by then, and nobody knows."""
    with (
        Wire(replicas[0].address) as direct,
        Proxy(replicas[0].address, seed=1) as proxy,
        Envoy(tmp_path, [proxy.address]) as envoy,
        ThreadPoolExecutor(1) as pool,
    ):
        path = path_of("sent once")
        assert envoy.json("POST", path, {"model": "seq"})[0] == 200

        def seen() -> tuple[int, int]:
            session = direct.session("sent once")
            return session.revision, session.last_used_time.ToNanoseconds()

        def cut_off(*call: Any, revision: int) -> tuple[int, Any]:
            before = seen()
            proxy.hold("answers")
            answered = pool.submit(envoy.json, *call)
            until(lambda: seen() > before and seen()[0] == revision)
            proxy.be("clean")
            proxy.release()
            return answered.result()

        status, answer = cut_off("POST", f"{path}:step", step_body(), revision=1)
        assert (status, answer["code"]) == (503, 14)
        status, answer = cut_off("GET", f"{path}/state", revision=1)
        assert (status, answer["session"]["revision"]) == (200, "1")
        direct.close("sent once")


def test_replicas_are_found_by_name(tmp_path: Path, replicas: list[Server]) -> None:
    """`localhost` may stand for an address on which nobody listens: that is left out."""
    port = replicas[0].address.rpartition(":")[2]
    with Envoy(tmp_path, [], "--dns", f"localhost:{port}") as envoy:
        for _ in range(10):
            assert envoy.json("GET", "/v1/models")[0] == 200
        assert envoy.healthy() == {replicas[0].address}


def test_a_watch_outlives_the_time_limit_of_other_calls(tmp_path: Path, replicas: list[Server]) -> None:
    """It ends with its session, in JSON as one list, after more figures of the server than the time limit allows."""
    with Envoy(tmp_path, [replicas[0].address], "--json-timeout-s", "0.5") as envoy:
        assert envoy.json("POST", path_of("watched"), {"model": "seq"})[0] == 200
        with ThreadPoolExecutor(1) as pool, stepwell.connect(replicas[0].address) as direct:
            body = {"session_ids": ["watched"]}
            watched = pool.submit(envoy.json, "POST", "/v1/sessions:watch", body)
            with direct.watch_server(interval_s=0.4) as figures:
                for _ in range(4):
                    next(figures)
            assert not watched.done()
            direct.close_session("watched")
            status, answer = watched.result()
        assert status == 200
        kinds = [event["kind"] for part in answer for event in part["events"]]
        assert kinds == ["SESSION_EVENT_KIND_PRESENT", "SESSION_EVENT_KIND_ENDED"]


def test_tls_and_tokens_go_through(tmp_path: Path) -> None:
    with secured.switched_on():
        made = secured._material()
        with local_server("seq") as server:
            ca, pair = str(made.authority), made.pair
            options = (
                *("--tls-cert", str(pair.cert), "--tls-key", str(pair.key)),
                *("--replica-tls-ca", ca, "--replica-tls-name", "localhost"),
            )
            context = ssl.create_default_context(cafile=ca)
            with Envoy(tmp_path, [host_and_port(server.address)], *options, tls=context) as envoy:
                status, answer = envoy.json("GET", "/v1/models")
                assert (status, answer["code"]) == (401, 16)
                bearer = {"authorization": f"Bearer {made.token}"}
                assert envoy.json("POST", path_of("a"), {"model": "seq"}, bearer)[0] == 200
                assert envoy.json("POST", path_of("a") + ":step", step_body(), bearer)[1]["revision"] == "1"
                with stepwell.connect(secured.SCHEME + envoy.address) as client:
                    assert client.session_info("a").revision == 1


def test_nobody_passes_by_a_proxy_with_a_second_header(envoy: Envoy) -> None:
    """Two of `stepwell-tenant` reach the replica; those of `authorization` Envoy joins to one that is no token."""
    raw = pb.ListSessionsRequest().SerializeToString()
    path = f"/{wire.SERVICE}/ListSessions"
    with Http2(envoy.address) as peer:
        twice = [("stepwell-tenant", "acme"), ("stepwell-tenant", "beta")]
        end = peer.outcome(peer.call(path, raw, extra=twice))
        assert (end["grpc-status"], end["grpc-message"]) == (
            "3",
            "stepwell-tenant must be sent at most once; got 2",
        )
