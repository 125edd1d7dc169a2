"""A real server over a folder of models in which versions come and go while clients step."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

import stepwell
from stepwell.v1 import models_pb2, models_pb2_grpc, sessions_pb2, sessions_pb2_grpc
from support.servers.server_process import FEATURES, ServerProcess, forecast, random_tensor, retrained
from support.telemetry.scrape import Scrape

_TIMEOUT_S = 100.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    (folder / "forecast").mkdir(parents=True)
    return folder


def put(root: Path, name: str, *, other_weights: bool = False) -> None:
    """A model's file, put there as an operator would: whole at once."""
    source = retrained() if other_weights else forecast()
    path = root / name
    path.parent.mkdir(exist_ok=True)
    shutil.copy(source.path, path.with_name(f".{path.name}"))
    path.with_name(f".{path.name}").rename(path)


def server_of(root: Path, *options: str, **settings: Any) -> ServerProcess:
    arguments = ["--models", str(root), "--watch-models", "--cache-dir", str(forecast().cache_dir)]
    return ServerProcess(*arguments, "--listen", "127.0.0.1:0", *options, **settings)


def refusal(error: Any) -> tuple[grpc.StatusCode, str, str, float]:
    """Code, message, reason, and the delay in seconds."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    return error.code(), error.details(), info.reason, retry.retry_delay.ToTimedelta().total_seconds()


class Watched:
    """The health of a service, as a client hears of it."""

    def __init__(self, channel: grpc.Channel, service: str) -> None:
        request = health_pb2.HealthCheckRequest(service=service)
        self._watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=_TIMEOUT_S)

    def wait_for(self, status: int) -> None:
        for each in self._watch:
            if each.status == status:
                return
        raise AssertionError("the stream has ended")

    def close(self) -> None:
        self._watch.cancel()


class Stepping:
    """A client that steps all the time."""

    def __init__(self, address: str) -> None:
        self._client = stepwell.connect(address)
        self._session = self._client.open_session("forecast", session_id="busy")
        self._ends = threading.Event()
        self.errors: list[Exception] = []
        self.versions: list[int] = []
        self._thread = threading.Thread(target=self._step)
        self._thread.start()

    def _step(self) -> None:
        x = np.ones((1, FEATURES), np.float32)
        try:
            while not self._ends.is_set():
                self._session.step(x)
                if self.versions[-1:] != [self._session.model_version]:
                    self.versions.append(self._session.model_version)
        except Exception as error:
            self.errors.append(error)

    def end(self) -> int:
        """Its revision."""
        self._ends.set()
        self._thread.join(_TIMEOUT_S)
        revision = self._session.revision
        self._client.close()
        return revision


@contextlib.contextmanager
def health_of(server: ServerProcess, *services: str) -> Iterator[list[Watched]]:
    with grpc.insecure_channel(server.address.partition("//")[2] or server.address) as channel:
        watches = [Watched(channel, f"stepwell.model/{service}") for service in services]
        yield watches
        for each in watches:
            each.close()


def versions(server: ServerProcess) -> dict[int, str]:
    with grpc.insecure_channel(server.address) as channel:
        stub = models_pb2_grpc.ModelServiceStub(channel)
        (model,) = stub.ListModels(models_pb2.ListModelsRequest(), timeout=_TIMEOUT_S).models
    name = models_pb2.ModelState.Name
    return {each.version: name(each.state).removeprefix("MODEL_STATE_") for each in model.versions}


@pytest.mark.slow
def test_a_version_that_is_put_there_takes_over_under_load(root: Path) -> None:
    put(root, "forecast/1.keras")
    with (
        server_of(root, "--sessions", "carry") as server,
        health_of(server, "forecast@1", "forecast@2") as (one, two),
    ):
        one.wait_for(SERVING)
        two.wait_for(UNKNOWN)
        stepping = Stepping(server.address)
        put(root, "forecast/2.keras", other_weights=True)
        two.wait_for(SERVING)
        one.wait_for(UNKNOWN)  # it has no sessions any more
        # and back: the old file is there, and the new one goes
        (root / "forecast/2.keras").unlink()
        one.wait_for(SERVING)
        two.wait_for(UNKNOWN)
        revision = stepping.end()
        assert stepping.errors == []
        assert stepping.versions == [1, 2, 1]
        with stepwell.connect(server.address) as client:
            assert client.session_info("busy").revision == revision
        assert versions(server) == {1: "READY"}


@pytest.mark.slow
def test_a_bad_file_is_told_everywhere_and_changes_nothing(root: Path) -> None:
    put(root, "forecast/1.keras")
    with server_of(root, "--metrics-listen", "127.0.0.1:0", ready=False) as server:
        http = server.wait_for_log(" metrics address=").rpartition("address=")[2].split()[0]
        server.ready_line = server._read_ready_line()
        with health_of(server, "forecast@2", "forecast") as (two, name):
            name.wait_for(SERVING)
            (root / "forecast/2.keras").write_bytes(b"no model")
            two.wait_for(NOT_SERVING)
            server.wait_for_log("error a model cannot be loaded model=forecast version=2")
            assert versions(server) == {1: "READY", 2: "FAILED"}
            with (
                pytest.raises(
                    stepwell.ModelNotFoundError, match=r"not served: it could not be loaded: .*2\.keras"
                ),
                stepwell.connect(server.address) as client,
            ):
                client.open_session("forecast@2")
            assert Scrape.of(http).value("stepwell_model_loads_total", "forecast", "failed") == 1
            with stepwell.connect(server.address) as client, client.open_session("forecast") as session:
                session.step(np.ones((1, FEATURES), np.float32))
                assert session.model_version == 1
            put(root, "forecast/2.keras", other_weights=True)
            two.wait_for(SERVING)
        server.signal()
        code, _, _ = server.finish()
    assert code == 0


@pytest.mark.slow
def test_what_was_put_there_while_no_server_ran_takes_over_at_the_start(root: Path, tmp_path: Path) -> None:
    put(root, "forecast/1.keras")
    store = ("--data-dir", str(tmp_path / "data"), "--sessions", "carry")
    with server_of(root, *store) as server:
        with stepwell.connect(server.address) as client:
            session = client.open_session("forecast", session_id="named")
            session.step(np.ones((1, FEATURES), np.float32))
        put(root, "forecast/2.keras", other_weights=True)
        with health_of(server, "forecast@1") as (one,):
            one.wait_for(UNKNOWN)
        server.signal()
        server.finish()
    put(root, "forecast/3.keras")
    (root / "forecast/2.keras").unlink()  # the state of its session is what it is
    with server_of(root, *store) as server:
        with stepwell.connect(server.address) as client:
            session = client.open_session("forecast", session_id="named")
            session.step(np.ones((1, FEATURES), np.float32))
            assert (session.revision, session.model_version) == (2, 3)
        server.signal()
        server.finish()


#: Has the compiling process wait for the test, and end without an answer.
_WAITING = """
import os, sys
if any("stepwell_server.compile" in one for one in sys.orig_argv):
    with open({fifo!r}) as fifo:
        fifo.read()
    os._exit(3)
"""


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """What compiling waits for, in servers whose PYTHONPATH has its folder."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    (tmp_path / "sitecustomize.py").write_text(_WAITING.format(fifo=str(path)))
    return path


def test_a_model_is_served_while_others_load(tmp_path: Path, fifo: Path) -> None:
    kept, bad = forecast(), tmp_path / "bad.keras"
    bad.write_bytes(kept.path.read_bytes() + b"\0")  # another one, so that the cache has it not
    options = (f"bad={bad}", f"forecast={kept.path}", "--cache-dir", str(kept.cache_dir))
    with (
        ServerProcess(
            *options,
            *("--no-wait-for-models", "--listen", "127.0.0.1:0"),
            environment={"PYTHONPATH": str(tmp_path)},
        ) as server,
        health_of(server, "forecast", "bad", "bad@1") as (good, loading, version),
        contextlib.ExitStack() as stack,
    ):
        loading.wait_for(NOT_SERVING)
        holds = stack.enter_context(fifo.open("w"))  # as soon as the compiling process is there
        with grpc.insecure_channel(server.address) as channel:
            stub = sessions_pb2_grpc.SessionServiceStub(channel)
            for model in ("bad", "bad@1"):
                with pytest.raises(grpc.RpcError) as refused:
                    stub.OpenSession(sessions_pb2.OpenSessionRequest(model=model), timeout=_TIMEOUT_S)
                code, message, *rest = refusal(refused.value)
                assert (code, *rest) == (grpc.StatusCode.UNAVAILABLE, "STARTING", 1.0)
                assert re.fullmatch(r"model 'bad' is being loaded \((waiting|loading: \w+)\)", message)
            holds.close()
            version.wait_for(NOT_SERVING)
            good.wait_for(SERVING)
            with stepwell.connect(server.address) as client, client.open_session("forecast") as session:
                session.step(np.ones((1, FEATURES), np.float32))
            server.wait_for_log("error a model cannot be loaded model=bad version=1")
            for model in ("bad", "bad@1"):
                with pytest.raises(grpc.RpcError, match="not served: it could not be loaded: ") as refused:
                    stub.OpenSession(sessions_pb2.OpenSessionRequest(model=model), timeout=_TIMEOUT_S)
                assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_sessions_of_a_model_that_is_still_loaded_are_told_to_come_back(tmp_path: Path, fifo: Path) -> None:
    kept, store = forecast(), ("--data-dir", str(tmp_path / "data"), "--listen", "127.0.0.1:0")
    with ServerProcess(f"forecast={kept.path}", "--cache-dir", str(kept.cache_dir), *store) as server:
        with stepwell.connect(server.address) as client:
            client.open_session("forecast", session_id="named")
        server.signal()
        server.finish()
    cache = ("--cache-dir", str(tmp_path / "cache"))  # nothing is in it
    with (
        ServerProcess(
            f"forecast={kept.path}",
            *cache,
            *store,
            "--no-wait-for-models",
            environment={"PYTHONPATH": str(tmp_path)},
        ) as server,
        fifo.open("w"),
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = sessions_pb2_grpc.SessionServiceStub(channel)
        x = random_tensor(1, 1, 1, FEATURES)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Step(sessions_pb2.StepRequest(session_id="named", inputs=[x]), timeout=_TIMEOUT_S)
        assert refusal(refused.value)[::2] == (grpc.StatusCode.UNAVAILABLE, "STARTING")
        listed = stub.ListSessions(sessions_pb2.ListSessionsRequest(), timeout=_TIMEOUT_S)
        assert [session.session_id for session in listed.sessions] == ["named"]


def _after_loads(tmp_path: Path, count: int) -> tuple[str, ...]:
    """The arguments of a server whose last default is one of `count` versions that calls loaded; it was killed."""
    kept = forecast()
    options = (
        *(f"forecast={kept.path}", "--cache-dir", str(kept.cache_dir), "--listen", "127.0.0.1:0"),
        *("--data-dir", str(tmp_path / "data"), "--no-wait-for-models"),
    )
    with ServerProcess(*options) as server, stepwell.connect(server.address) as client:
        for _ in range(count):
            client.load_model("forecast", retrained().path, sessions="carry")
        client.open_session(f"forecast@{count}", session_id="pinned")
    return options


def test_nothing_stands_in_for_versions_that_a_start_beside_the_traffic_has_yet_to_load(
    tmp_path: Path,
) -> None:
    """New sessions wait for the default, and sessions for their version: the SDK comes back by itself."""
    count = 6
    options = _after_loads(tmp_path, count)
    x = random_tensor(1, 1, 1, FEATURES)
    with ServerProcess(*options) as server, grpc.insecure_channel(server.address) as channel:
        stub = sessions_pb2_grpc.SessionServiceStub(channel)

        def answer(method: Any, request: Any) -> Any:
            while True:
                try:
                    return method(request, timeout=_TIMEOUT_S)
                except grpc.RpcError as error:
                    if refusal(error)[::2] != (grpc.StatusCode.UNAVAILABLE, "STARTING"):
                        raise

        opened = answer(stub.OpenSession, sessions_pb2.OpenSessionRequest(model="forecast"))
        assert opened.session.model_version == count + 1
        stepped = answer(stub.Step, sessions_pb2.StepRequest(session_id="pinned", inputs=[x]))
        assert stepped.model_version == count


def test_a_default_that_a_call_chooses_beside_the_start_is_kept(tmp_path: Path) -> None:
    """Also if it takes away the one that was the default before."""
    count = 6
    options = _after_loads(tmp_path, count)
    with ServerProcess(*options) as server, stepwell.connect(server.address) as client:
        for _ in range(2):
            client.load_model("forecast", retrained().path, sessions="carry", unload_previous=True)
        server.wait_for_log("a model keeps the default version that was chosen for it")
        (model,) = client.models()
        assert [each.version for each in model.versions if each.is_default] == [count + 3]


def test_a_file_of_the_folder_that_is_no_version_of_it_is_loaded_again_too(
    root: Path, tmp_path: Path
) -> None:
    """Somebody named it in a call: the policy does not know it."""
    put(root, "forecast/1.keras")
    put(root, "nightly/new.keras", other_weights=True)
    data = ("--data-dir", str(tmp_path / "data"))
    with server_of(root, *data) as server, stepwell.connect(server.address) as client:
        session = client.open_session("forecast", session_id="a")
        path = str(root / "nightly" / "new.keras")
        client.load_model("forecast", path, sessions="carry", upload=False)
        session.step(np.ones((1, FEATURES), np.float32))
        assert session.model_version == 2
    with server_of(root, *data) as server, stepwell.connect(server.address) as client:
        session = client.open_session("forecast", session_id="a")
        session.step(np.ones((1, FEATURES), np.float32))
        assert session.model_version == 2


@pytest.mark.slow
def test_a_version_that_is_put_there_is_compared_with_keras_as_the_first_was(
    root: Path, tmp_path: Path
) -> None:
    put(root, "forecast/1.keras")
    data = tmp_path / "x.npy"
    np.save(data, np.random.default_rng(1).standard_normal((2, 7, FEATURES)).astype(np.float32))
    with server_of(root, "--check-with", f"forecast={data}") as server:
        server.wait_for_log("compared with Keras model=forecast")
        put(root, "forecast/2.keras", other_weights=True)
        server.wait_for_log("compared with Keras model=forecast")
        with health_of(server, "forecast@2") as (two,):
            two.wait_for(SERVING)


def test_a_signal_while_a_model_is_loaded_beside_the_traffic_ends_the_server(
    tmp_path: Path, fifo: Path
) -> None:
    options = ("--no-wait-for-models", "--listen", "127.0.0.1:0", "--cache-dir", str(tmp_path / "cache"))
    with (
        ServerProcess(
            f"forecast={forecast().path}", *options, environment={"PYTHONPATH": str(tmp_path)}
        ) as server,
        fifo.open("w"),  # as soon as the compiling process is there
    ):
        server.signal()
        code, _, err = server.finish()
    assert code == 0
    assert "cannot be loaded" not in err
    assert "Traceback" not in err
