"""Who calls: tokens, certificates and JWTs, on a real server of each front that asks for all of them."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime as dt
import hmac
import json
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import jwt
import numpy as np
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import stepwell
from stepwell import aio
from stepwell.cli import main
from stepwell.v1 import (
    models_pb2,
    models_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    watch_pb2,
    watch_pb2_grpc,
)
from stepwell_server.rpc.triton.inference import service_pb2
from support.certificates import Authority
from support.peers.wire import Refusal, refusal
from support.servers.both_fronts import needs_native
from support.servers.server_process import FEATURES, ServerProcess, serve
from support.triton import triton_clients

X = np.random.default_rng(5).standard_normal((8, 1, FEATURES)).astype(np.float32)
_PATIENCE_S = 100.0
KEY = ec.generate_private_key(ec.SECP256R1())
PUBLIC = KEY.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)


def signed(key: Any = KEY, algorithm: str | None = "ES256", kid: str = "k1", **changes: Any) -> str:
    """A JWT that the servers take, but for the changes; None takes a claim out."""
    claims = {
        "iss": "https://issuer.example",
        "aud": "stepwell",
        "sub": "auth0|web",
        "tenant": "acme",
        "role": "user",
        "exp": dt.datetime.now(dt.UTC) + dt.timedelta(hours=1),
    } | changes
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, key, algorithm, headers={"kid": kid})


@dataclasses.dataclass
class Asking:
    """A server that asks who calls, and what one needs to call it."""

    server: ServerProcess
    front: str
    folder: Path
    authority: Authority
    tokens: Path
    given: Mapping[str, str]
    """Tokens by what the test calls them."""
    secrets: list[str] = dataclasses.field(default_factory=list)
    """All tokens that were sent; none may be in the log."""

    def tls(self, *alternatives: x509.GeneralName) -> stepwell.TlsConfig:
        names = alternatives or (x509.DNSName("stranger.example"),)
        return stepwell.TlsConfig(self.authority.cert, *self.authority.issue("client", names))

    def connect(self, token: Any = None, **options: Any) -> stepwell.Client:
        return stepwell.connect(self.server.address, tls=self.tls(), token=token, **options)

    @contextlib.contextmanager
    def channel(self, *alternatives: x509.GeneralName) -> Iterator[grpc.Channel]:
        ca, cert, key = self.tls(*alternatives).contents()
        with grpc.secure_channel(self.server.address, grpc.ssl_channel_credentials(ca, key, cert)) as channel:
            yield channel


def add_token(file: Path, name: str, tenant: str, *options: str) -> str:
    line = ["tokens", "add", name, "--tenant", tenant, "--file", str(file), *options]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 0, result.output
    return result.output.split()[-1]


def revoke(file: Path, *arguments: str) -> None:
    result = CliRunner().invoke(main, ["tokens", "revoke", *arguments, "--file", str(file)])
    assert result.exit_code == 0, result.output


@pytest.fixture(
    scope="module",
    params=[pytest.param("native", marks=needs_native), pytest.param("python", marks=pytest.mark.slow)],
)
def asking(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asking]:
    tmp_path = tmp_path_factory.mktemp("callers")
    authority = Authority(tmp_path)
    own = authority.issue()
    tokens, certificates, jwks = (tmp_path / name for name in ("callers.tokens", "callers.toml", "jwks.json"))
    given = {
        name: add_token(
            tokens, name.rstrip("2"), "acme", "--role", name if name in {"viewer", "admin"} else "user"
        )
        for name in (
            "trainer",
            "viewer",
            "user",
            "admin",
            "rotating",
            "rotating2",
            "stays",
            "async",
            "async2",
        )
    }
    certificates.write_text(
        '[[caller]]\nsan = "spiffe://acme/robot"\nname = "robot"\ntenant = "acme"\nrole = "user"\n'
        '[[caller]]\nsan = "*.workers.acme.example"\nname = "worker"\ntenant = "acme"\nrole = "viewer"\n'
    )
    key = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(KEY.public_key()))
    jwks.write_text(json.dumps({"keys": [key | {"kid": "k1", "use": "sig"}]}))
    options = [
        *("--front", request.param, "--auth-tokens", tokens, "--auth-certificates", certificates),
        *(
            "--tls-cert",
            own.cert,
            "--tls-key",
            own.key,
            "--tls-client-ca",
            authority.cert,
            "--auth-jwks",
            jwks,
        ),
        *("--auth-jwt-audience", "stepwell", "--auth-jwt-issuer", "https://issuer.example"),
        # at debug the native front hands on every message, and it is not to do so here
        *(("--log-level", "debug") if request.param == "python" else ()),
    ]
    with serve(*map(str, options)) as server:
        yield Asking(server, request.param, tmp_path, authority, tokens, given, [*given.values()])


def bearer(token: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {token}"),)


def infer_stream(channel: grpc.Channel) -> Any:
    return channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
    )


def forged() -> str:
    """A JWT signed with the public key, as if that were a secret that both sides share. PyJWT would not make one."""
    parts = [part.split(".") for part in (jwt.encode({}, "x" * 40, "HS256", headers={"kid": "k1"}), signed())]
    said = f"{parts[0][0]}.{parts[1][1]}"
    signature = hmac.digest(PUBLIC, said.encode(), "sha256")
    return f"{said}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


async def test_tokens_that_are_awaited(asking: Asking) -> None:
    given = [asking.given["async"]]

    async def token() -> str:
        return given[-1]

    async with (
        aio.connect(asking.server.address, tls=asking.tls(), token=token) as client,
        client.open_sessions("forecast", 8) as group,
        client.open_session("forecast") as session,
    ):
        y = await group.step(X[:, 0])
        np.testing.assert_array_equal((await session.step(X[0]))[0], y[0])
        old = given[-1]
        given.append(asking.given["async2"])
        revoke(asking.tokens, "async", "--id", _id_of(old))
        with asking.channel() as channel:
            _until_refused(channel, old)
        y = await group.step(X[:, 0])
        np.testing.assert_array_equal((await session.step(X[0]))[0], y[0])
        assert set(group.positions.tolist()) == {session.position} == {2}


def test_callers(asking: Asking) -> None:
    """One server for all of it, as it takes seconds to start; it is stopped in the end, so this comes last."""
    _those_who_are_not_known_are_refused(asking)
    _those_who_are_known_are_served(asking)
    _roles_and_tenants(asking)
    _a_revoked_token_ends_streams(asking)
    _broken_files_change_nothing(asking)
    asking.server.signal()
    code, _, log = asking.server.finish()
    assert code == 0, log
    assert "serving" in log
    parts = {part for secret in asking.secrets for part in secret.replace(".", " ").split() if len(part) > 20}
    assert len(parts) > 30
    assert not [part for part in parts if part in log]


def _those_who_are_not_known_are_refused(asking: Asking) -> None:
    good = asking.given["user"]
    own_key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.UTC)
    deep = base64.urlsafe_b64encode(b"[" * 3000).decode().rstrip("=")
    wrong = {
        "none": (None, "callers must send a token in the metadata"),
        "unknown": (bearer("stw_" + "a" * 43), "must be known to this server"),
        "cut off": (bearer(good[:-1]), "must be known to this server"),
        "another scheme": ((("authorization", "Basic YTpi"),), "got another kind of authorization"),
        "nothing": ((("authorization", "Bearer "),), "got another kind of authorization"),
        "expired": (bearer(signed(exp=now - dt.timedelta(minutes=1))), "the JWT has expired"),
        "for ever": (bearer(signed(exp=None)), "it has no claim exp"),
        "not yet": (bearer(signed(nbf=now + dt.timedelta(minutes=1))), "is not valid yet"),
        "another audience": (bearer(signed(aud="others")), "its audience (aud) is another server"),
        "another issuer": (bearer(signed(iss="https://evil.example")), "its issuer (iss) is not trusted"),
        "another key": (bearer(signed(own_key)), "its signature is wrong"),
        "unknown key": (bearer(signed(kid="k2")), "its key (kid) is not trusted"),
        "no signature": (bearer(signed("", "none")), "its algorithm (alg) does not fit its key"),
        "shared secret": (bearer(forged()), "its algorithm (alg) does not fit its key"),
        "no tenant": (bearer(signed(tenant=None)), "the claim tenant must name the tenant"),
        "separator": (bearer(signed(tenant="a\x1fb")), "the claim tenant must name the tenant"),
        "no role": (bearer(signed(role="root")), "the claim role must be or contain one of"),
        "no json": (bearer("a.b.c"), "it is not a JWT"),
        "deep": (bearer(f"{deep}.{deep}.x"), "it is not a JWT"),
    }
    listing = models_pb2.ListModelsRequest()
    with (
        asking.channel() as channel,
        asking.channel(x509.UniformResourceIdentifier("spiffe://acme/robot")) as robot,
    ):
        for what, (metadata, words) in wrong.items():
            asking.secrets += [value for _, value in metadata or () if len(value) > 30]
            # a wrong token is wrong where the certificate would do, too
            for one in (channel, *([robot] if metadata else [])):
                models = models_pb2_grpc.ModelServiceStub(one)
                found = refusal(partial(models.ListModels, listing, metadata=metadata, timeout=_PATIENCE_S))
                assert (found.code, found.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED"), (what, found)
                assert words in found.message, (what, found)
        sessions = sessions_pb2_grpc.SessionServiceStub(channel)
        for rpc in ("Step", "OpenSession", "GetState", "CloseSessions"):
            request = getattr(sessions_pb2, f"{rpc}Request")()
            found = refusal(partial(getattr(sessions, rpc), request, timeout=_PATIENCE_S))
            assert found.code == "UNAUTHENTICATED", (rpc, found)
        for stream in (
            sessions.StepStream(iter([]), timeout=_PATIENCE_S),
            infer_stream(channel)(iter([]), timeout=_PATIENCE_S),
            reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([]), timeout=_PATIENCE_S
            ),
        ):
            assert refusal(partial(list, stream)).code == "UNAUTHENTICATED"
        checked = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=_PATIENCE_S
        )
        assert checked.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(stepwell.UnauthenticatedError, match="must be known to this server") as failed:
        asking.connect("stw_nonsense").models()
    assert failed.value.outcome == "not_applied"


def _those_who_are_known_are_served(asking: Asking) -> None:
    token = asking.given["trainer"]
    web = signed(role=["offline_access", "user"])
    asking.secrets.append(web)
    with (
        asking.connect(token) as client,
        asking.connect(web) as other,
        client.open_session("forecast") as session,
    ):
        y = session.step(X[0])
        assert [other.models()[0].name, other.session_info(session.id).position] == ["forecast", 1]
        for row in range(1, 5):  # by now the front knows the token, and takes what is plain
            session.step(X[row])
        assert other.session_info(session.id).position == 5
        assert token not in repr(client) + repr(client._config)
        with (
            stepwell.connect(
                asking.server.address, tls=asking.tls(x509.UniformResourceIdentifier("spiffe://acme/robot"))
            ) as robot,
            robot.open_session("forecast") as twin,
        ):
            np.testing.assert_array_equal(twin.step(X[0]), y)
    given = asking.tls()
    ca, cert, key = (str(path) for path in (asking.authority.cert, *asking.authority.issue("client")))
    assert given.cert is not None
    file = asking.folder / "token"
    file.write_text(f"{token}\n")
    line = ["models", "--server", asking.server.address, "--tls-ca", ca, "--tls-cert", cert, "--tls-key", key]
    listed = CliRunner().invoke(main, [*line, "--token-file", str(file)])
    assert (listed.exit_code, "forecast" in listed.output) == (0, True), listed.output
    unknown = CliRunner().invoke(main, line, env={"STEPWELL_TOKEN": "stw_nonsense"})
    assert (unknown.exit_code, "must be known to this server" in unknown.output) == (1, True)
    assert triton_clients.run_scenario("with_token", asking.server.address, token, ca, cert, key) == [
        "UNAUTHENTICATED",
        "UNAUTHENTICATED",
    ]


def _roles_and_tenants(asking: Asking) -> None:
    viewer, user, admin = (asking.given[role] for role in ("viewer", "user", "admin"))
    with asking.connect(viewer) as client:
        client.models()
        with pytest.raises(stepwell.PermissionDeniedError, match="OpenSession needs the role admin or user"):
            client.open_session("forecast")
    with stepwell.connect(
        asking.server.address, tls=asking.tls(x509.DNSName("w7.workers.acme.example"))
    ) as worker:
        worker.models()
        with pytest.raises(stepwell.PermissionDeniedError, match="caller 'acme/worker' has the role viewer"):
            worker.open_session("forecast")
    for tenant in ("beta", "*"):
        with (
            asking.connect(user, tenant=tenant) as client,
            pytest.raises(stepwell.PermissionDeniedError, match="stepwell-tenant must be the caller's own"),
        ):
            client.models()
    for token, tenant in ((user, "acme"), (admin, "beta"), (admin, "*")):
        with asking.connect(token, tenant=tenant) as client:
            client.models()


def _a_revoked_token_ends_streams(asking: Asking) -> None:
    """Also those that an SDK keeps open, whose frames are then sent again, and applied once."""
    old, stays = asking.given["rotating"], asking.given["stays"]
    given = [old]
    asked: list[str] = []

    def token() -> str:
        asked.append(given[-1])
        return given[-1]

    with (
        asking.channel() as channel,
        asking.connect(token) as client,
        client.open_sessions("forecast", 8) as group,
        asking.connect(stays) as other,
        other.open_sessions("forecast", 8) as others,
    ):
        sessions = sessions_pb2_grpc.SessionServiceStub(channel)
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel)
        ended = threading.Event()

        def nothing(first: Any) -> Iterator[Any]:
            yield first
            ended.wait(_PATIENCE_S)

        streams: list[Any] = [
            sessions.StepStream(nothing(sessions_pb2.StepStreamRequest(frame_id=1)), metadata=bearer(old)),
            infer_stream(channel)(
                nothing(service_pb2.ModelInferRequest(model_name="nothing")), metadata=bearer(old)
            ),
            reflect.ServerReflectionInfo(
                nothing(reflection_pb2.ServerReflectionRequest(list_services="")), metadata=bearer(old)
            ),
        ]
        watches = watch_pb2_grpc.WatchServiceStub(channel)
        watched = watch_pb2.WatchSessionsRequest(session_ids=group.ids, states=True)
        streams += [
            watches.WatchSessions(watched, metadata=bearer(old)),
            watches.WatchServer(watch_pb2.WatchServerRequest(), metadata=bearer(old)),
        ]
        seen: Any = watches.WatchSessions(watched, metadata=bearer(asking.given["viewer"]))
        watch: Any = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), metadata=bearer(old)
        )
        assert {event.session_id for event in next(seen).events} <= set(group.ids)
        for stream in (*streams, watch):
            next(stream)  # it is open
        for run in (group, others):
            run.step(X[:, 0])
        assert asked == [old]
        given.append(asking.given["rotating2"])
        revoke(asking.tokens, "rotating", "--id", _id_of(old))
        try:
            for stream in streams:
                found = refusal(partial(list, stream))
                assert (found.code, found.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
                assert "is no longer valid" in found.message
        finally:
            ended.set()
        assert not watch.done()
        watch.cancel()
        assert not seen.done()
        seen.cancel()
        np.testing.assert_array_equal(group.step(X[:, 0]), others.step(X[:, 0]))
        assert asked == given
        assert set(group.positions.tolist()) == {2}
        found = refusal(
            lambda: models_pb2_grpc.ModelServiceStub(channel).ListModels(
                models_pb2.ListModelsRequest(), metadata=bearer(old), timeout=_PATIENCE_S
            )
        )
        assert found.code == "UNAUTHENTICATED"
    with asking.connect(old) as client, pytest.raises(stepwell.UnauthenticatedError):
        client.models()


def _id_of(token: str) -> str:
    from stepwell_server.auth.tokens import Token, caller_of, digest_of

    return Token(caller_of("x", "", "user"), digest_of(token)).id


def _broken_files_change_nothing(asking: Asking) -> None:
    before = asking.tokens.read_text()
    with asking.connect(asking.given["stays"]) as client:
        client.models()
        with open(asking.tokens, "a") as file:
            file.write("a broken line\n")
        number = asking.tokens.read_text().count("\n")
        line = asking.server.wait_for_log("the changed callers cannot be used")
        assert f"line {number}: must be NAME TENANT ROLE sha256:HASH" in line
        client.models()
    assert before in asking.tokens.read_text()


def test_a_server_does_not_start_with_callers_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "callers.tokens"
    broken.write_text("# callers\nann acme user stw_secretsecret\n")
    broken.chmod(0o600)
    with serve("--auth-tokens", str(broken), ready=False) as server:
        code, _, log = server.finish()
    assert (code, "secret" in log) == (2, False)
    assert f"--auth-tokens: {broken}: line 2: HASH must be sha256:" in log


def _until_refused(channel: grpc.Channel, token: str) -> Refusal:
    """A stream of a token, until that is revoked."""
    ended = threading.Event()

    def nothing() -> Iterator[Any]:
        ended.wait(_PATIENCE_S)
        yield from ()

    try:
        stream = sessions_pb2_grpc.SessionServiceStub(channel).StepStream(nothing(), metadata=bearer(token))
        return refusal(partial(list, stream))
    finally:
        ended.set()
