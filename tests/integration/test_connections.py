"""How clients are connected, on both fronts: TLS and its certificates, Unix sockets, connections that grow old."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import shutil
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc

import stepwell
from stepwell import aio
from stepwell.cli import main
from stepwell.v1 import sessions_pb2
from support.certificates import Authority, Pair
from support.peers.proxy import Proxy
from support.peers.wire import Conversation, Wire, step_frame, tensor
from support.servers.both_fronts import needs_native
from support.servers.server_process import FEATURES, ServerProcess, serve

NATIVE = pytest.param(
    "native",
    marks=needs_native,
)
X = np.random.default_rng(11).standard_normal((8, 1, FEATURES)).astype(np.float32)


@pytest.fixture(params=[NATIVE, "python"])
def front(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def _serve(front: str, *arguments: object) -> ServerProcess:
    return serve("--front", front, *map(str, arguments))


def _put(source: Path, target: Path) -> None:
    """Replace a file as tools do."""
    fresh = target.with_suffix(".fresh")
    shutil.copyfile(source, fresh)
    fresh.replace(target)


def _cli(server: ServerProcess, *arguments: object) -> tuple[int, str]:
    """Exit code, and what was written."""
    line = [str(argument) for argument in (*arguments, "--server", server.address)]
    result = CliRunner().invoke(main, line)
    return result.exit_code, result.output


def _why_not(address: str, tls: stepwell.TlsConfig | None, **options: Any) -> str:
    """Why no client of this kind gets through."""
    with (
        stepwell.connect(address, timeout_s=100, tls=tls, **options) as client,
        pytest.raises(stepwell.UnavailableError) as failed,
    ):
        client.models()
    return failed.value.message


async def test_everything_goes_over_tls(
    front: str, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.cert))  # what the system trusts
    own = authority.issue()
    tls = stepwell.TlsConfig(ca=authority.cert)
    with _serve(front, "--tls-cert", own.cert, "--tls-key", own.key) as server:
        server.wait_for_log(f"serving front={front} .* tls=on")
        with (
            stepwell.connect(server.address, tls=tls) as client,
            client.open_session("forecast") as session,
            client.open_sessions("forecast", 8) as group,
        ):
            outputs = group.step(X[:, 0])
            np.testing.assert_array_equal(session.step(X[0])[0], outputs[0])
        async with (
            aio.connect(server.address, tls=True) as client_aio,
            client_aio.open_session("forecast") as session_aio,
        ):
            np.testing.assert_array_equal((await session_aio.step(X[0]))[0], outputs[0])
        credentials = grpc.ssl_channel_credentials(authority.cert.read_bytes())
        with grpc.secure_channel(server.address, credentials) as channel:
            checked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=100)
        assert checked.status == health_pb2.HealthCheckResponse.SERVING
        code, out = _cli(server, "models", "--json", "--tls-ca", authority.cert)
        assert code == 0, out
        assert json.loads(out)["models"][0]["name"] == "forecast"


@pytest.mark.slow
def test_bench_goes_over_tls(authority: Authority) -> None:
    own = authority.issue()
    with _serve("auto", "--tls-cert", own.cert, "--tls-key", own.key) as server:
        size = ("--sessions", 2, "--duration-s", 0.1, "--warm-up-s", 0, "--processes", 1)
        code, out = _cli(server, "bench", "forecast", *size, "--json", "--tls-ca", authority.cert)
        assert code == 0, out
        assert json.loads(out)["errors"] == {}


def test_what_is_wrong_with_a_connection_is_said(front: str, authority: Authority, tmp_path: Path) -> None:
    """At once where no further attempt could succeed: the time limit is far away."""
    other = Authority(tmp_path)
    own, stranger = authority.issue(), other.issue("stranger", ())
    with (
        _serve(
            front, "--tls-cert", own.cert, "--tls-key", own.key, "--tls-client-ca", authority.cert
        ) as server,
        _serve(front) as plain,
    ):
        unknown = _why_not(server.address, stepwell.TlsConfig(ca=other.cert))
        assert "TlsConfig.ca must contain the CA that signed it" in unknown
        misnamed = _why_not(server.address, stepwell.TlsConfig(ca=authority.cert, server_name="else.where"))
        assert "certificate is for another name" in misnamed
        assert "TlsConfig.server_name" in misnamed
        assert "client uses TLS, but the server does not" in _why_not(
            plain.address, stepwell.TlsConfig(ca=authority.cert)
        )
        mixed = stepwell.TlsConfig(authority.cert, own.cert, stranger.key)
        assert "the key must belong to the certificate" in _why_not(server.address, mixed)
        closed = (
            None,
            stepwell.TlsConfig(authority.cert),
            stepwell.TlsConfig(authority.cert, *stranger),
        )
        for tls in closed:
            why = _why_not(server.address, tls, connect_timeout_s=0.001)  # It would try again.
            assert "if the server uses TLS, pass a TlsConfig" in why
            assert "TlsConfig.key to one that its CA has signed" in why
        code, out = _cli(server, "models", "--tls-ca", other.cert)
        assert code == 1
        assert "(--server) cannot be reached: the server's certificate is not trusted: --tls-ca must" in out
        # nobody was harmed
        trusted = stepwell.TlsConfig(authority.cert, *authority.issue("me", ()))
        with stepwell.connect(server.address, tls=trusted) as client:
            assert client.models()
        with stepwell.connect(plain.address) as client:
            assert client.models()
        server.signal()
        code, _, err = server.finish()
    assert code == 0
    # a peer's mistake is no line of the server's; gRPC's core says something of some by itself
    own_line = r"\d{4}-\d\d-\d\dT" if front == "native" else r"\d{4}-\d\d-\d\dT|[EIW]\d{4} .*security"
    assert [line for line in err.splitlines() if not re.match(own_line, line)] == []


def test_the_names_of_a_callers_certificate_reach_its_calls(front: str, authority: Authority) -> None:
    own = authority.issue()
    alternatives = (
        x509.DNSName("agent.example"),
        x509.UniformResourceIdentifier("spiffe://example/agent/7"),
        x509.RFC822Name("agent@example.org"),
        x509.IPAddress(ipaddress.ip_address("10.1.2.3")),
        x509.IPAddress(ipaddress.ip_address("fe80::1")),
        x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),
    )
    named = "agent.example,spiffe://example/agent/7,agent@example.org,10.1.2.3,fe80::1"
    # neither of its alternative names is a name
    nameless = (x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),)
    options = ("--tls-cert", own.cert, "--tls-key", own.key, "--tls-client-ca", authority.cert)
    with _serve(front, *options, "--log-level", "debug") as server:
        server.wait_for_log("serving .* tls=mutual")
        for shown, names in (
            (authority.issue("unused", alternatives), named),
            (authority.issue("agent 7", ()), '"agent 7"'),
            (authority.issue("agent-8", nameless), "agent-8"),
        ):
            tls = stepwell.TlsConfig(authority.cert, *shown)
            with (
                stepwell.connect(server.address, tls=tls) as client,
                client.open_session("forecast") as session,
            ):
                session.step(X[0])
            for method in ("OpenSession", "Step"):
                line = server.wait_for_log(f"request method={method} ")
                assert f" certificate={names} " in line


@pytest.mark.slow
def test_changed_certificates_are_for_new_connections(
    front: str, authority: Authority, tmp_path: Path
) -> None:
    """And broken ones for none."""
    used = Pair(tmp_path / "server.crt", tmp_path / "server.key")
    successor = Authority(tmp_path)
    for source, target in zip(authority.issue(), used, strict=True):
        shutil.copyfile(source, target)
    old, new = (stepwell.TlsConfig(ca=one.cert) for one in (authority, successor))
    with (
        _serve(front, "--tls-cert", used.cert, "--tls-key", used.key) as server,
        stepwell.connect(server.address, tls=old) as client,
        client.open_sessions("forecast", 8) as group,
    ):
        group.step(X[:, 0])
        for source, target in zip(successor.issue(), used, strict=True):
            _put(source, target)
        server.wait_for_log("new connections get the changed certificates")
        with stepwell.connect(server.address, tls=new) as late:
            assert late.models()
        assert "TlsConfig.ca must contain the CA" in _why_not(server.address, old)
        group.step(X[:, 0])  # on its old connection
        used.key.write_text("junk")
        warned = server.wait_for_log("the changed certificates cannot be used")
        assert "--tls-key: must be a private key in PEM" in warned
        with stepwell.connect(server.address, tls=new) as late:
            assert late.models()
        group.step(X[:, 0])
        assert [one.position for one in client.sessions()] == [3] * 8


@pytest.mark.parametrize("front", [NATIVE, "auto"])
def test_files_of_tls_that_cannot_be_used_stop_the_start(front: str, authority: Authority) -> None:
    # the first is in order, and yet of a kind that the native front does not know
    unknown, own = authority.issue(curve=ec.SECP521R1), authority.issue()
    certificate, key, message = {
        "native": (*unknown, f"must be supported by this server; {unknown.key}: "),
        "auto": (
            own.cert,
            own.cert,
            f"must be a private key in PEM that is not encrypted; {own.cert} is not such a key",
        ),
    }[front]
    files = ("--tls-cert", str(certificate), "--tls-key", str(key))
    with serve("--front", front, *files, "--log-level", "error", ready=False) as server:
        code, out, err = server.finish()
    assert (code, out) == (2, "")
    assert err.startswith(f"stepwell: error: --tls-key: {message}")
    assert err.count("\n") == 1


def test_silent_handshakes_hold_nobody_up(front: str, authority: Authority) -> None:
    own = authority.issue()
    with (
        _serve(front, "--tls-cert", own.cert, "--tls-key", own.key) as server,
        contextlib.ExitStack() as stack,
    ):
        host, port = server.address.split(":")
        # the beginning of a record of TLS, of which the rest never comes; a little of that; nothing at all
        for begun in (b"\x16\x03\x01\x02\x00\x01", b"\x16", b"") * 30:
            silent = stack.enter_context(socket.create_connection((host, int(port))))
            silent.sendall(begun)
        with stepwell.connect(server.address, tls=stepwell.TlsConfig(ca=authority.cert)) as client:
            assert client.models()
        server.signal()
        assert server.finish()[0] == 0


@contextlib.contextmanager
def _on_socket(front: str, path: Path, *arguments: str) -> Iterator[ServerProcess]:
    with _serve(front, "--listen", f"unix:{path}", *arguments) as server:
        assert server.address == f"unix:{path}"
        yield server


def test_a_unix_socket_is_an_address_like_any_other(front: str, tmp_path: Path) -> None:
    path = tmp_path / "stepwell.sock"
    with _on_socket(front, path, "--log-level", "debug") as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for address in (server.address, f"unix://{path}"):
            with stepwell.connect(address) as client, client.open_sessions("forecast", 8) as group:
                group.step(X[:, 0])
        peers = [server.wait_for_log(r"frame part peer=\S+").split("peer=")[1].split()[0] for _ in range(2)]
        assert all(peer.startswith("unix:") for peer in peers)
        # grpc.aio does not tell connections of a Unix socket apart
        assert len(set(peers)) == (2 if front == "native" else 1)
        assert _cli(server, "models", "--json")[0] == 0
        with serve("--front", front, "--listen", server.address, ready=False) as second:
            code, _, err = second.finish()
        assert code == 2
        assert (
            err
            == f"stepwell: error: --listen: cannot listen on {server.address}: it is in use: a server listens on it\n"
        )
        server.signal(signal.SIGKILL)
        server.finish()
    assert path.exists()
    with _on_socket(front, path) as server, stepwell.connect(server.address) as client:
        assert client.models()
        server.signal()
        assert server.finish()[0] == 0
    assert not path.exists()


@pytest.mark.slow
def test_old_connections_are_replaced_and_no_step_is_lost_or_done_twice(front: str) -> None:
    """Streams that do not end are cut off, and the SDK goes on with new ones."""
    rng = np.random.default_rng(3)
    with (
        _serve(front, "--max-connection-age-s", 0.2, "--max-connection-age-grace-s", 0.05) as server,
        Proxy(server.address, seed=0) as proxy,
        stepwell.connect(proxy.address, timeout_s=100) as client,
        client.open_session("forecast") as session,
        client.open_sessions("forecast", 8) as group,
    ):
        steps = 0
        seen = []
        while proxy.seen["clean"] < 6:
            x = rng.standard_normal((8, 1, FEATURES)).astype(np.float32)
            seen.append(x)
            np.testing.assert_array_equal(session.step(x[0]), group.step(x)[0])
            steps += 1
        assert {(info.revision, info.position) for info in client.sessions()} == {(steps, steps)}
        _, expected = client.predict("forecast", np.concatenate(seen, axis=1))
        group_state, session_state = group.get_state(), session.get_state()
        for name, array in expected.items():
            np.testing.assert_array_equal(group_state[name], array)
            np.testing.assert_array_equal(session_state[name], array[:1])


def test_calls_of_an_old_connection_may_end(front: str) -> None:
    with (
        _serve(front, "--max-connection-age-s", 0.2, "--max-connection-age-grace-s", 1000) as server,
        Proxy(server.address, seed=0) as proxy,
        Wire(proxy.address) as wire,
    ):
        session_id = wire.open("forecast")
        with Conversation(wire) as conversation:
            conversation.send(step_frame(1, [session_id], [tensor(X[:1, 0])]))
            assert list(conversation.receive().revisions) == [1]
            request = sessions_pb2.GetSessionRequest(session_id=session_id)
            while proxy.seen["clean"] < 3:
                with contextlib.suppress(grpc.RpcError):  # the connection was about to be given up
                    wire.sessions.GetSession(request, timeout=100)
            conversation.send(step_frame(2, [session_id], [tensor(X[:1, 0])]))
            assert list(conversation.receive().revisions) == [2]
