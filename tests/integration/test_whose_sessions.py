"""Whose session it is, over the wire: two tenants and an admin on one server, by the SDK and by the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import stepwell
from stepwell.cli import main
from stepwell.v1 import sessions_pb2
from stepwell_server.rpc.triton.inference import service_pb2
from support.peers.wire import of_members, refusal, step_frame
from support.servers.both_fronts import needs_native
from support.servers.server_process import FEATURES, ServerProcess, connect, serve, tensor
from support.triton.triton_requests import request

X = np.random.default_rng(5).standard_normal((3, 1, FEATURES)).astype(np.float32)
CALLERS = {"ann": ("acme", "user"), "bob": ("zeta", "user"), "eve": ("acme", "viewer"), "ops": ("", "admin")}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "python"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerProcess]:
    """A server that has a session of no tenant, `old` at revision 1, maybe from before it asked who calls."""
    tokens = tmp_path / "callers.tokens"
    for name, (tenant, role) in CALLERS.items():
        token = run(
            "tokens", "add", name, "--tenant", tenant or "-", "--role", role, "--file", str(tokens)
        ).split()[-1]
        (tmp_path / name).write_text(token)
    options = "--front", request.param, "--data-dir", str(tmp_path / "data")
    if request.param == "python":  # once is enough
        with serve(*options) as before, stepwell.connect(before.address) as client:
            client.open_session("forecast", session_id="old").step(X[0])
    with serve(*options, "--auth-tokens", str(tokens)) as found:
        if request.param != "python":
            with stepwell.connect(found.address, token=(tmp_path / "ops").read_text()) as client:
                client.open_session("forecast", session_id="old").step(X[0])
        yield found


def test_tenants_share_a_server_and_no_sessions(server: ServerProcess, tmp_path: Path) -> None:
    def client(name: str, **options: Any) -> stepwell.Client:
        return stepwell.connect(server.address, token=(tmp_path / name).read_text(), **options)

    with client("ann") as ann, client("bob") as bob, client("eve") as eve, client("ops") as ops:
        mine, his = (one.open_session("forecast", session_id="same") for one in (ann, bob))
        outputs = [mine.step(x) for x in X]
        assert his.revision == 0
        np.testing.assert_array_equal(his.step(X[0]), outputs[0])
        group, other = (one.open_sessions("forecast", 3) for one in (ann, bob))
        for _ in range(3):  # by ids, and then by the number of a set
            np.testing.assert_array_equal(
                group.step(np.repeat(X[0], 3, 0)), other.step(np.repeat(X[0], 3, 0))
            )
        only_mine = ann.open_session("forecast", session_id="only mine")
        for stranger in (bob, ops):
            with pytest.raises(stepwell.SessionNotFoundError, match=r"open session; got 'only mine'$"):
                stranger.session_info("only mine")
        _nothing_is_reached_by_inner_ids(server, tmp_path)
        _sequences_of_one_number_are_two(server, tmp_path, ann.models()[0].inputs[0].name)
        assert [one.session_id for one in ops.sessions()] == ["old"]
        assert {one.session_id for one in bob.sessions()} == {"same", *other.ids}
        assert [one.session_id for one in eve.sessions(prefix="only")] == ["only mine"]
        assert (eve.count_sessions(), bob.count_sessions(), ops.count_sessions()) == (5, 4, 1)
        assert bob.models()[0].sessions == 0
        assert ops.models()[0].sessions == 10
        assert eve.session_info("only mine").revision == 0
        for changing in (lambda: eve.open_session("forecast"), lambda: eve.close_session("only mine")):
            with pytest.raises(stepwell.PermissionDeniedError, match="needs the role admin or user"):
                changing()
        assert bob.close_sessions(everything=True) == 4
        with client("ops", tenant="*") as everybody:
            all_of_them = tmp_path / "all.sessions"
            assert everybody.export_sessions(all_of_them).exported == 6
            only_mine.step(X[0])
            report = everybody.import_sessions(all_of_them)
            assert (report.imported, list(report.failures)) == (5, ["acme/only mine"])
            assert {(one.tenant, one.session_id) for one in everybody.sessions()} >= {
                ("acme", "same"),
                ("", "old"),
            }

    shown = "--server", server.address, "--token-file", str(tmp_path / "ops")
    listed = [
        json.loads(line) for line in run("sessions", "list", "--tenant", "*", "--json", *shown).splitlines()
    ]
    assert [
        (one["tenant"], one["session_id"]) for one in listed if not one["session_id"].startswith("s-")
    ] == [
        ("acme", "only mine"),
        ("acme", "same"),
        (None, "old"),
    ]
    table = run("sessions", "list", "--tenant", "*", *shown).splitlines()
    assert table[0].split()[:2] == ["TENANT", "SESSION"]
    assert table[-1].split()[:2] == ["-", "old"]
    assert run("sessions", "list", *shown).split()[0] == "SESSION"

    # what is said in docs/operate/secure.md of sessions from before there were callers
    file = str(tmp_path / "old.sessions")
    run("sessions", "export", "-o", file, *shown)
    run("sessions", "import", file, "--tenant", "acme", *shown)
    run("sessions", "close", "--all", "--yes", *shown)
    with client("ann") as ann, client("ops") as ops:
        moved = ann.open_session("forecast", session_id="old")
        assert moved.revision == 1
        np.testing.assert_array_equal(moved.step(X[1]), outputs[1])
        assert ops.count_sessions() == 0
    assert server.wait_for_log(r"session opened .*tenant=acme session=.only mine")


def _sequences_of_one_number_are_two(server: ServerProcess, tmp_path: Path, name: str) -> None:
    """Triton's requests: those that go on are read by the native front."""
    channel, _ = connect(server)
    infer: Any = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelInferResponse.FromString,
    )
    said = []
    for at, x in enumerate(X):
        asked = request((name, x), model="forecast", sequence_id=7, start=at == 0, end=at == len(X) - 1)
        for who in ("ann", "bob"):
            reply = infer(asked, metadata=(("authorization", f"Bearer {(tmp_path / who).read_text()}"),))
            assert reply.parameters["stepwell_revision"].int64_param == at + 1
            said.append(list(reply.raw_output_contents))
    assert said[::2] == said[1::2]
    channel.close()


def _nothing_is_reached_by_inner_ids(server: ServerProcess, tmp_path: Path) -> None:
    """What the SDK would not send: by a call that the native front reads by itself, and by a stream."""
    said = "acme\x1fonly mine"
    step = sessions_pb2.StepRequest(session_id=said, inputs=[tensor(X[0])])
    frame = step_frame(1, [said], [tensor(X[0])])
    channel, stub = connect(server)
    for name in ("bob", "ops"):
        metadata = (("authorization", f"Bearer {(tmp_path / name).read_text()}"),)
        refused = refusal(partial(stub.Step, step, metadata=metadata))
        assert (refused.code, refused.message) == (
            "NOT_FOUND",
            f"session_id must be that of an open session; got {said!r}",
        )
        (answer,) = stub.StepStream(iter([frame]), metadata=metadata)
        assert of_members([answer], 1)[0] == refused
    channel.close()
