"""What probes hear while models are loaded, while the server serves, and when it stops."""

from __future__ import annotations

import json
import re
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stepwell.v1 import sessions_pb2 as pb
from stepwell.v1 import sessions_pb2_grpc
from stepwell_server.rpc.triton.inference import service_pb2 as triton_pb
from support.servers.both_fronts import needs_native
from support.servers.held_start import held_start
from support.servers.held_step import held_store
from support.servers.server_process import (
    FEATURES,
    ServerProcess,
    connect,
    forecast,
    random_tensor,
)
from support.telemetry.scrape import Scrape

_TIMEOUT_S = 100.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def probe(address: str, path: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=_TIMEOUT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def _address(line: str) -> str:
    found = re.search(r"address=(\S+)", line)
    assert found is not None
    return found[1]


def _refusal(error: Any) -> tuple[grpc.StatusCode, str, str, float]:
    """Code, message, reason, and the delay in seconds."""
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    return error.code(), error.details(), info.reason, retry.retry_delay.ToTimedelta().total_seconds()


def _triton(channel: grpc.Channel, name: str) -> Any:
    answer_type = getattr(triton_pb, f"{name}Response")
    call: Any = channel.unary_unary(
        f"/inference.GRPCInferenceService/{name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=answer_type.FromString,
    )
    return call(getattr(triton_pb, f"{name}Request")(), timeout=_TIMEOUT_S)


@pytest.mark.parametrize("front", [pytest.param("native", marks=needs_native), "python"])
def test_while_models_are_loaded_it_lives_and_is_not_ready(tmp_path: Path, front: str) -> None:
    options = ("--metrics-listen", "127.0.0.1:0", "--front", front)
    with held_start(tmp_path, *options) as (server, address, held):
        http = _address(next(line for line in server.log if " metrics address=" in line))
        why = "model 2 of 2 is being loaded (bad)"
        assert probe(http, "/livez") == (200, "alive\n")
        code, text = probe(http, "/readyz?verbose")
        assert code == 503
        assert json.loads(text) == {
            "ready": False,
            "problems": {"models": why},
            "warnings": {},
            "models": {"forecast": "loaded", "bad": "loading"},
            "versions": {"forecast@1": "loaded", "bad@1": "loading"},
        }
        assert probe(http, "/readyz") == (503, f"not ready: models: {why}\n")
        assert probe(http, "/ready")[0] == 404
        assert Scrape.of(http).value("stepwell_model_loads_total", "forecast", "cache") == 1
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
            assert next(watch).status == NOT_SERVING
            # loaded it is, but the server waits for the other one
            ours = health_pb2.HealthCheckRequest(service="stepwell.model/forecast")
            model_watch = health.Watch(ours, timeout=_TIMEOUT_S)
            assert next(model_watch).status == NOT_SERVING
            assert (_triton(channel, "ServerLive").live, _triton(channel, "ServerReady").ready) == (
                True,
                False,
            )
            stub: Any = sessions_pb2_grpc.SessionServiceStub(channel)
            x = random_tensor(1, 1, 1, FEATURES)
            step = pb.StepRequest(session_id="a", inputs=[x])
            frame = pb.StepStreamRequest(frame_id=1, step=pb.StepFrame(session_ids=["a"], inputs=[x]))
            for refused in (
                lambda: stub.Step(step, timeout=_TIMEOUT_S),
                lambda: stub.OpenSession(pb.OpenSessionRequest(model="forecast"), timeout=_TIMEOUT_S),
                lambda: list(stub.StepStream(iter([frame]), timeout=_TIMEOUT_S)),
                lambda: _triton(channel, "ServerMetadata"),
            ):
                with pytest.raises(grpc.RpcError) as failed:
                    refused()
                told = f"the server is starting: {why}"
                assert _refusal(failed.value) == (grpc.StatusCode.UNAVAILABLE, told, "STARTING", 1.0)
            held.close()
            assert next(watch).status == next(model_watch).status == SERVING
            for service, status in (("forecast@1", SERVING), ("bad", NOT_SERVING), ("bad@1", NOT_SERVING)):
                asked = health_pb2.HealthCheckRequest(service=f"stepwell.model/{service}")
                assert health.Check(asked, timeout=_TIMEOUT_S).status == status
            assert _triton(channel, "ServerReady").ready
            assert stub.OpenSession(pb.OpenSessionRequest(model="forecast", session_id="a")).session
            assert stub.Step(step, timeout=_TIMEOUT_S).revision == 1
            with pytest.raises(grpc.RpcError, match="model 'bad' is not served: it could not be loaded"):
                stub.OpenSession(pb.OpenSessionRequest(model="bad"))
            server.wait_for_log(" serving front=")
            assert probe(http, "/readyz") == (200, "ready\n")
            failed_model = json.loads(probe(http, "/readyz?verbose")[1])["models"]["bad"]
            assert failed_model.startswith(
                f"failed: version 1 of model 'bad' cannot be loaded: {tmp_path / 'bad.keras'}: the compiling process ended"
            )
            scrape = Scrape.of(http)
            assert scrape.value("stepwell_model_loads_total", "bad", "failed") == 1
            assert scrape.value("stepwell_errors_total", "", "STARTING") == 4
            watch.cancel()
            model_watch.cancel()
        server.signal()
        code, out, err = server.finish()
    assert (code, out.count("listening on")) == (0, 1)
    assert "error a model cannot be loaded model=bad" in err


def test_without_a_model_that_can_be_served_there_is_no_server(tmp_path: Path) -> None:
    bad = tmp_path / "bad.stepwell"
    bad.write_bytes(b"nothing")
    with ServerProcess(
        f"bad={bad}", "--listen", "127.0.0.1:0", "--bad-models", "skip", ready=False
    ) as server:
        code, out, err = server.finish()
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("stepwell: error: no model can be served; model bad: ")


@pytest.mark.slow
def test_probes_systemd_and_the_audit_log_hear_of_a_life(tmp_path: Path) -> None:
    kept, audit = forecast(), tmp_path / "audit.jsonl"
    options = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")
    models = (f"forecast={kept.path}", "--cache-dir", str(kept.cache_dir), "--audit-log", str(audit))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, held_store() as store:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(_TIMEOUT_S)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "60000000"}
        with ServerProcess(*models, *options, *store.options, environment=environment) as server:
            http = _address(server.wait_for_log(" metrics address="))
            told = set[str]()
            while "READY=1" not in told:
                told.update(systemd.recv(4096).decode().splitlines())
            assert {"WATCHDOG=1", "EXTEND_TIMEOUT_USEC=60000000", "STATUS=ready"} <= told
            channel, stub = connect(server)
            with channel:
                stub.OpenSession(pb.OpenSessionRequest(model="forecast", session_id="a"), timeout=_TIMEOUT_S)
                audit.rename(tmp_path / "old")
                server.signal(signal.SIGHUP)
                while "RELOADING=1" not in told:
                    told.update(systemd.recv(4096).decode().splitlines())
                stub.GetState(pb.GetStateRequest(session_id="a"), timeout=_TIMEOUT_S)  # for the new audit log
                held = store.begin_step(stub, "a")
                server.signal()
                server.wait_for_log("stopping")
                while "STOPPING=1" not in told:
                    told.update(systemd.recv(4096).decode().splitlines())
                assert probe(http, "/readyz") == (503, "not ready: stopping: the server stops\n")
                assert probe(http, "/livez")[0] == 200
                assert Scrape.of(http).value("stepwell_audit_events_total", "dropped") == 0
                store.release()
                assert held.result().revision == 1
            assert server.finish()[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "old").read_text().splitlines()]
    assert [(line["action"], line["sessions"]) for line in lines] == [("open", ["a"])]
    later = {json.loads(line)["action"] for line in audit.read_text().splitlines()}
    assert later == {"read_state"}
