"""Metrics as Prometheus scrapes them, and the log beside them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from stepwell.v1 import sessions_pb2 as pb
from support.server_process import FEATURES, ServerProcess, connect, random_tensor, serve

_TIMEOUT_S = 100.0


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    arguments = ("--metrics-listen", "127.0.0.1:0", "--log-format", "json", "--log-level", "debug")
    with serve(*arguments) as server:
        yield server


def _scrape(address: str) -> dict[tuple[str, frozenset[str]], float]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=_TIMEOUT_S) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {
            (sample.name, frozenset(sample.labels.values())): sample.value
            for family in families
            for sample in family.samples
        }


def _do_something(stub: Any) -> None:
    opened = stub.OpenSession(
        pb.OpenSessionRequest(model="forecast", session_id="user 42"), timeout=_TIMEOUT_S
    )
    assert opened.session.session_id == "user 42"
    stub.OpenSessions(pb.OpenSessionsRequest(model="forecast", count=3), timeout=_TIMEOUT_S)
    for number in range(3):
        x = random_tensor(number, 1, 4, FEATURES)
        stub.Step(pb.StepRequest(session_id="user 42", inputs=[x]), timeout=_TIMEOUT_S)
    stale = pb.StepRequest(
        session_id="user 42", expected_revision=9, inputs=[random_tensor(9, 1, 4, FEATURES)]
    )
    with pytest.raises(grpc.RpcError):
        stub.Step(stale, timeout=_TIMEOUT_S)
    stub.ResetStates(pb.ResetStatesRequest(session_id="user 42"), timeout=_TIMEOUT_S)
    stub.CloseSession(pb.CloseSessionRequest(session_id="user 42"), timeout=_TIMEOUT_S)


def test_what_happened_is_counted_and_logged(server: ServerProcess) -> None:
    address = json.loads(server.wait_for_log('"metrics"'))["address"]
    channel, stub = connect(server)
    with channel:
        _do_something(stub)
    values = _scrape(address)

    def value(name: str, *labels: str) -> float:
        return values[name, frozenset(labels)]

    assert value("stepwell_sessions", "forecast") == 3
    assert value("stepwell_session_events_total", "forecast", "opened") == 4
    assert value("stepwell_session_events_total", "forecast", "closed") == 1
    assert value("stepwell_changes_total", "forecast", "step") == 3
    assert value("stepwell_changes_total", "forecast", "reset") == 1
    assert value("stepwell_row_steps_total", "forecast", "step") == 12
    assert value("stepwell_errors_total", "REVISION_CONFLICT") == 1
    assert value("stepwell_pass_rows_count", "forecast") >= 3
    assert value("stepwell_stage_seconds_count", "forecast", "total") >= 3
    assert value("stepwell_requests_total", "Step", "OK") == 3
    assert value("stepwell_requests_total", "Step", "ABORTED") == 1
    assert value("stepwell_request_seconds_count", "Step") == 4
    assert value("stepwell_queued_changes", "forecast") == 0
    assert value("stepwell_queued_bytes") == 0
    assert value("process_resident_memory_bytes") > 1e6
    server.signal()
    code, _, err = server.finish()
    assert code == 0
    _check_log([json.loads(line) for line in err.splitlines() if line.startswith("{")])


def _check_log(lines: list[dict[str, Any]]) -> None:
    events = [(line["level"], line["event"], line.get("session")) for line in lines]
    assert ("info", "session opened", "user 42") in events
    assert ("info", "session closed", "user 42") in events
    assert [line["count"] for line in lines if line["event"] == "sessions opened"] == [3]
    requests = [line for line in lines if line["event"] == "request"]
    assert {line["level"] for line in requests} == {"debug"}
    steps = [
        (line["method"], line["session_id"], line["status"]) for line in requests if line["method"] == "Step"
    ]
    assert steps == [("Step", "user 42", "OK")] * 3 + [("Step", "user 42", "ABORTED")]
    assert all(line["duration_ms"] > 0 for line in requests)


@pytest.mark.parametrize("durability", ["sync", "async"])
def test_commits_are_timed_where_sessions_are_kept_on_disk(tmp_path: Path, durability: str) -> None:
    arguments = ("--metrics-listen", "127.0.0.1:0", "--log-format", "json", "--durability", durability)
    with serve(*arguments, "--data-dir", str(tmp_path / "data")) as server:
        address = json.loads(server.wait_for_log('"metrics"'))["address"]
        channel, stub = connect(server)
        with channel:
            _do_something(stub)
        values = _scrape(address)
    # of three steps and a reset
    assert values["stepwell_stage_seconds_count", frozenset({"forecast", "commit"})] == 4
    assert values["stepwell_sessions", frozenset({"forecast"})] == 3
    assert values["stepwell_uncommitted", frozenset()] == 0
