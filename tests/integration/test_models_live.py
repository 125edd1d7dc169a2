"""Models that change while a real server serves: loads by calls, on both fronts, over restarts, for whom they are."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import pytest
from click.testing import CliRunner

from stepwell.cli import main
from stepwell.v1 import models_pb2 as pb
from stepwell.v1 import models_pb2_grpc, sessions_pb2, sessions_pb2_grpc
from support.models.programs import Saved
from support.servers.both_fronts import needs_native
from support.servers.server_process import FEATURES, ServerProcess, array, random_tensor, retrained, serve
from support.telemetry.scrape import Scrape

pytestmark = pytest.mark.plain("it starts servers with callers of its own")
LIMIT_S = 100.0
CARRY = pb.SESSION_POLICY_CARRY


class Caller:
    """Calls a server, perhaps with a token."""

    def __init__(self, server: ServerProcess, token: str = "") -> None:
        self.channel = grpc.insecure_channel(server.address)
        self.models = models_pb2_grpc.ModelServiceStub(self.channel)
        self.admin = models_pb2_grpc.ModelAdminServiceStub(self.channel)
        self.sessions = sessions_pb2_grpc.SessionServiceStub(self.channel)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def load(self, path: Path | str = "", **values: Any) -> list[pb.LoadModelResponse]:
        request = pb.LoadModelRequest(**{"name": "forecast", "path": str(path), **values})
        return list(self.admin.LoadModel(request, timeout=LIMIT_S, metadata=self._metadata))

    def call(self, stub: Any, request: Any) -> Any:
        return stub(request, timeout=LIMIT_S, metadata=self._metadata)

    def open(self, session_id: str, model: str = "forecast") -> sessions_pb2.Session:
        request = sessions_pb2.OpenSessionRequest(model=model, session_id=session_id)
        session: sessions_pb2.Session = self.call(self.sessions.OpenSession, request).session
        return session

    def step(self, session_id: str, seed: int, **values: Any) -> sessions_pb2.StepResponse:
        request = sessions_pb2.StepRequest(
            session_id=session_id, inputs=[random_tensor(seed, 1, 1, FEATURES)], **values
        )
        reply: sessions_pb2.StepResponse = self.call(self.sessions.Step, request)
        return reply

    def state(self, session_id: str) -> list[np.ndarray[Any, Any]]:
        read = self.call(self.sessions.GetState, sessions_pb2.GetStateRequest(session_id=session_id))
        return [array(tensor) for tensor in read.state]

    def upload(self, file: Path, piece: int = 10_000) -> pb.UploadModelResponse:
        content = file.read_bytes()
        pieces = [content[start : start + piece] for start in range(0, len(content), piece)]
        sent = [
            pb.UploadModelRequest(filename=file.name if not n else "", content=c)
            for n, c in enumerate(pieces)
        ]
        reply: pb.UploadModelResponse = self.admin.UploadModel(
            iter(sent), timeout=LIMIT_S, metadata=self._metadata
        )
        return reply


@contextlib.contextmanager
def refused(code: str, *words: str) -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as raised:
        yield
    error: Any = raised.value
    assert error.code().name == code, error.details()
    assert all(word in error.details() for word in words), error.details()


@pytest.fixture(scope="module", params=[pytest.param("native", marks=needs_native), "python"])
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    retrained()
    with serve("--front", request.param, "--metrics-listen", "127.0.0.1:0", "--log-format", "json") as found:
        yield found


def expected(saved: Saved, inputs: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """What Keras computes of inputs one after the other."""
    from stepwell_server.compile.graph.tensorflow_setup import keras

    model = keras.models.load_model(saved.path)
    return np.asarray(model(np.concatenate(inputs, axis=1)))


def test_sessions_are_carried_under_traffic(server: ServerProcess) -> None:
    address = json.loads(server.wait_for_log('"metrics"'))["address"]
    with Caller(server) as caller:
        caller.open("steps")
        other = caller.open("rests")
        assert (other.model_version, other.model_version_pinned) == (1, False)
        caller.step("rests", 1)
        before = caller.state("rests")
        replies: queue.Queue[sessions_pb2.StepResponse | Exception] = queue.Queue()
        stop = threading.Event()

        def go_on() -> None:
            revision = 0
            while not stop.is_set():
                try:
                    replies.put(
                        caller.step("steps", revision, expected_revision=revision, request_id=revision + 1)
                    )
                except Exception as error:
                    replies.put(error)
                    return
                revision += 1

        stepping = threading.Thread(target=go_on)
        stepping.start()
        stages = caller.load(retrained().path, sessions=CARRY, labels=["new"])
        after = [replies.get(timeout=LIMIT_S)]
        while after[-1].model_version == 1:  # type: ignore[union-attr]
            after.append(replies.get(timeout=LIMIT_S))
        stop.set()
        stepping.join()
        assert [stage.stage for stage in stages][-3:] == ["warm up", "switch", ""]
        assert (stages[-1].version, stages[-1].moved_sessions) == (2, 2)
        versions = [reply.model_version for reply in after]  # type: ignore[union-attr]
        assert versions == sorted(versions)
        for own, carried in zip(before, caller.state("rests"), strict=True):
            np.testing.assert_array_equal(own, carried)
        carried_step = caller.step("rests", 2)
        assert (carried_step.model_version, carried_step.revision) == (2, 2)
        # what was applied before is answered as it was, and applied once
        last = caller.call(
            caller.sessions.GetSession, sessions_pb2.GetSessionRequest(session_id="steps")
        ).session
        again = caller.step(
            "steps", last.revision - 1, expected_revision=last.revision - 1, request_id=last.revision
        )
        assert (again.replayed, again.revision) == (True, last.revision)
        # the new weights are those of the file
        caller.open("fresh", "forecast:new")
        inputs = [random_tensor(seed, 1, 1, FEATURES) for seed in (5, 6)]
        outputs = [array(caller.step("fresh", seed).outputs[0]) for seed in (5, 6)]
        keras = expected(retrained(), [array(one) for one in inputs])
        np.testing.assert_allclose(
            outputs[-1].reshape(-1).astype(np.float32), keras.reshape(-1, keras.shape[-1])[-1], atol=1e-5
        )
        back = caller.call(
            caller.admin.SetDefault, pb.SetDefaultRequest(name="forecast", version=1, sessions=CARRY)
        )
        assert (back.previous_version, caller.step("rests", 3).model_version) == (2, 1)
        value = Scrape.of(address).value
        assert value("stepwell_model_versions", "forecast", "ready") == 2
        assert value("stepwell_model_default_version", "forecast") == 1
        assert value("stepwell_moved_sessions_total", "forecast", "carry") >= 4
        assert value("stepwell_model_loads_total", "forecast", "cache") == 2
        caller.call(caller.admin.UnloadModel, pb.UnloadModelRequest(name="forecast", version=2, force=True))
        with refused("NOT_FOUND"):  # in memory nothing keeps them
            caller.step("fresh", 7)


@pytest.mark.slow
def test_versions_and_default_survive_a_kill(tmp_path: Path) -> None:
    options = ("--data-dir", str(tmp_path / "data"), "--allow-model-upload")
    own = tmp_path / "own.keras"
    own.write_bytes(retrained().path.read_bytes())
    with serve(*options) as server, Caller(server) as caller:
        caller.open("a")
        caller.step("a", 1, expected_revision=0, request_id=5)
        first = caller.load(upload=caller.upload(own).upload, sessions=CARRY)[-1]
        assert (first.version, len(list((tmp_path / "data" / "models").iterdir()))) == (2, 1)
        assert list((tmp_path / "data" / "uploads").iterdir()) == []
        second = caller.load(own, keep_default=True, labels=["canary"])[-1]
        assert second.version == 3
        caller.open("pinned", "forecast:canary")
        state = caller.state("a")
        server.signal(signal.SIGKILL)
        server.process.wait()
    own.write_bytes(b"gone wrong")
    with serve(*options) as server, Caller(server) as caller:
        model = caller.call(caller.models.GetModel, pb.GetModelRequest(name="forecast")).model
        told = {one.version: (one.state, one.is_default) for one in model.versions}
        ready, failed = pb.MODEL_STATE_READY, pb.MODEL_STATE_FAILED
        assert told == {1: (ready, False), 2: (ready, True), 3: (failed, False)}
        assert "not a .keras file" in model.versions[2].reason
        for was, now in zip(state, caller.state("a"), strict=True):
            np.testing.assert_array_equal(was, now)
        assert caller.step("a", 1, expected_revision=0, request_id=5).replayed
        assert caller.step("a", 2).model_version == 2
        with refused("NOT_FOUND", "version 3"):
            caller.step("pinned", 1)
        own.write_bytes(retrained().path.read_bytes())
        caller.load(own, version=3, keep_default=True)
        assert caller.step("pinned", 1).model_version == 3
        caller.call(caller.admin.SetDefault, pb.SetDefaultRequest(name="forecast", version=1, sessions=CARRY))
        caller.call(caller.admin.UnloadModel, pb.UnloadModelRequest(name="forecast", version=2))
        assert list((tmp_path / "data" / "models").iterdir()) == []


def test_a_default_that_cannot_be_loaded_again_stops_the_start_unless_others_will_do(tmp_path: Path) -> None:
    options = ("--data-dir", str(tmp_path / "data"))
    own = tmp_path / "own.keras"
    own.write_bytes(retrained().path.read_bytes())
    with serve(*options) as server, Caller(server) as caller:
        caller.load(own)
    own.unlink()
    with serve(*options, ready=False) as server:
        code, _, err = server.finish()
        assert code == 2
        assert "version 2 of model 'forecast' cannot be loaded again" in err
        assert "--bad-models skip" in err
    with serve(*options, "--bad-models", "skip") as server, Caller(server) as caller:
        assert caller.open("a").model_version == 1


@pytest.mark.parametrize("front", [pytest.param("native", marks=needs_native), "python"])
def test_who_may_load_and_what_is_written_of_it(tmp_path: Path, front: str) -> None:
    tokens, audit = tmp_path / "tokens", tmp_path / "audit.jsonl"
    given = {}
    for role in ("user", "admin"):
        line = ["tokens", "add", role, "--tenant", "acme", "--role", role, "--file", str(tokens)]
        given[role] = CliRunner().invoke(main, line).output.split()[-1]
    quotas = tmp_path / "quotas.toml"
    quotas.write_text("[default]\nmodels = 1\n")
    quotas.chmod(0o600)
    options = ("--auth-tokens", str(tokens), "--audit-log", str(audit), "--quotas", str(quotas))
    with serve("--front", front, *options) as server:
        with Caller(server, given["user"]) as user:
            with refused("PERMISSION_DENIED", "LoadModel needs the role admin"):
                user.load(retrained().path)
            with refused("PERMISSION_DENIED", "SetLabel needs the role admin"):
                user.call(user.admin.SetLabel, pb.SetLabelRequest(name="forecast", label="a", version=1))
        with Caller(server) as stranger, refused("UNAUTHENTICATED"):
            stranger.load(retrained().path)
        with Caller(server, given["admin"]) as admin:
            admin.load(retrained().path, sessions=CARRY)
            with refused("RESOURCE_EXHAUSTED", "models of tenant 'acme' must stay within 1"):
                admin.load(retrained().path)
            admin.load(retrained().path, sessions=CARRY, unload_previous=True)
        server.signal()
        assert server.finish()[0] == 0
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    found = [(line["action"], line["who"], line["outcome"], line.get("version")) for line in lines]
    assert found == [
        ("refused", "user", "PERMISSION_DENIED", None),
        ("refused", "user", "PERMISSION_DENIED", None),
        ("refused", "", "UNAUTHENTICATED", None),
        ("load_model", "admin", "OK", 2),
        ("refused", "admin", "QUOTA_EXCEEDED", None),
        ("load_model", "admin", "OK", 3),
    ]
    assert (lines[3]["path"], lines[3]["policy"]) == (str(retrained().path), "carry")
