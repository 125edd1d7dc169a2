"""Metrics as Prometheus scrapes them, and the log beside them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import queue
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server import app
from stepwell_server.addresses import Address
from stepwell_server.metrics.gauges import of_engine
from stepwell_server.metrics.token import MetricsToken
from stepwell_server.process.readiness import Readiness
from stepwell_server.settings import DEFAULT_METRICS, Settings
from support.certificates import Authority
from support.engine.harness import running
from support.servers.server_process import FEATURES, ServerProcess, connect, random_tensor, serve
from support.telemetry.promql import labels, missing
from support.telemetry.promtool import promtool
from support.telemetry.scrape import Scrape

_TIMEOUT_S = 100.0
_ROOT = Path(__file__).parents[2]
_DEPLOY = _ROOT / "deploy"


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    arguments = ("--metrics-listen", "127.0.0.1:0", "--log-format", "json", "--log-level", "debug")
    with serve(*arguments) as server:
        yield server


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
    value = Scrape.of(address).value
    assert value("stepwell_sessions", "forecast") == 3
    assert value("stepwell_session_events_total", "forecast", "opened") == 4
    assert value("stepwell_session_events_total", "forecast", "closed") == 1
    assert value("stepwell_changes_total", "forecast", "step") == 3
    assert value("stepwell_changes_total", "forecast", "reset") == 1
    assert value("stepwell_row_steps_total", "forecast", "step") == 12
    assert value("stepwell_errors_total", "forecast", "REVISION_CONFLICT") == 1
    assert value("stepwell_pass_rows_count", "forecast") >= 3
    assert value("stepwell_stage_seconds_count", "forecast", "total") >= 3
    assert value("stepwell_requests_total", "Step", "OK") == 3
    assert value("stepwell_requests_total", "Step", "ABORTED") == 1
    assert value("stepwell_request_seconds_count", "Step") == 4
    assert value("stepwell_queued_rows", "forecast") == 0
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


@contextlib.contextmanager
def _on_disk(folder: Path, *arguments: str, ca: bytes | None = None) -> Iterator[tuple[Any, str]]:
    """A server that keeps sessions on disk: its stub, and where its metrics are; `ca` has signed its certificate."""
    options = ("--metrics-listen", "127.0.0.1:0", "--log-format", "json", "--data-dir", str(folder))
    with serve(*options, *arguments) as server:
        address = json.loads(server.wait_for_log('"metrics"'))["address"]
        channel, stub = connect(server, ca)
        with channel:
            yield stub, address


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scrape]:
    """What a server says that was asked for all sorts of things, and has a stream open."""
    folder = tmp_path_factory.mktemp("metrics")
    authority = Authority(tmp_path_factory.mktemp("authority"))
    pair = authority.issue()
    options = (
        "--durability",
        "sync",
        "--resident-rows",
        "3",
        "--tls-cert",
        str(pair.cert),
        "--tls-key",
        str(pair.key),
    )
    with _on_disk(folder, *options, ca=authority.cert.read_bytes()) as (stub, address):
        _do_something(stub)
        ids = list(stub.OpenSessions(pb.OpenSessionsRequest(model="forecast", count=3)).session_ids)
        again = pb.StepRequest(
            session_id=ids[0], expected_revision=0, request_id=7, inputs=[random_tensor(1, 1, FEATURES)]
        )
        assert [stub.Step(again).replayed for _ in range(2)] == [False, True]
        for wrong in (
            pb.StepRequest(session_id=ids[0], inputs=[random_tensor(1, 1, FEATURES + 1)]),
            pb.StepRequest(session_id="nobody", inputs=[random_tensor(1, 1, FEATURES)]),
        ):
            with pytest.raises(grpc.RpcError):
                stub.Step(wrong)
        with pytest.raises(grpc.RpcError):
            stub.OpenSession(pb.OpenSessionRequest(model="a name that a caller made up"))
        frames: queue.SimpleQueue[pb.StepStreamRequest | None] = queue.SimpleQueue()
        replies = stub.StepStream(iter(frames.get, None))
        for number in (1, 2):
            step = pb.StepFrame(session_ids=ids, inputs=[random_tensor(number, 3, FEATURES)])
            frames.put(pb.StepStreamRequest(frame_id=number, step=step))
            while not next(replies).last:
                pass
        yield Scrape.of(address)
        frames.put(None)
        assert not list(replies)


def test_a_stream_is_timed_frame_by_frame(scraped: Scrape) -> None:
    assert scraped.value("stepwell_open_streams", "StepStream") == 1
    assert scraped.value("stepwell_request_seconds_count", "StepStream") == 2
    assert scraped.value("stepwell_request_seconds_sum", "StepStream") > 0
    assert scraped.value("stepwell_requests_total", "StepStream", "OK") == 0


def test_errors_and_retries_are_told_by_model(scraped: Scrape) -> None:
    value = scraped.value
    assert value("stepwell_replays_total", "forecast", "step") == 1
    assert value("stepwell_errors_total", "forecast", "INVALID_INPUT") == 1
    assert value("stepwell_errors_total", "forecast", "REVISION_CONFLICT") == 1
    assert value("stepwell_errors_total", "", "SESSION_NOT_FOUND") == 1
    assert value("stepwell_errors_total", "", "MODEL_NOT_FOUND") == 1
    assert not [each for each in scraped.series("stepwell_errors_total") if "made up" in each["model"]]


def test_the_server_its_store_and_its_pager_are_shown(scraped: Scrape) -> None:
    value = scraped.value
    build = {"version": metadata.version("stepwell"), "store": "disk", "durability": "sync"}
    assert build.items() < dict(scraped.series("stepwell_build_info")[0]).items()
    assert scraped.series("stepwell_store_info")[0]["shared"] == "false"
    assert value("stepwell_model_loads_total", "forecast", "cache") == 1
    assert value("stepwell_model_loads_total", "forecast", "compiled") == 0
    assert value("stepwell_model_load_seconds", "forecast") > 0
    # three of six sessions fit, and of those that were stepped two had to come back
    assert value("stepwell_max_resident_rows", "forecast") == value("stepwell_resident_rows", "forecast") == 3
    assert value("stepwell_paged_sessions_total", "forecast", "in") >= 2
    assert value("stepwell_paged_sessions_total", "forecast", "out") >= 2
    assert value("stepwell_store_write_seconds_count", "log") >= 7
    assert value("stepwell_store_write_seconds_count", "data") >= 3
    assert value("stepwell_store_log_records_total") >= value("stepwell_store_write_seconds_count", "log")
    size = value("stepwell_store_disk_size_bytes")
    assert 0 < value("stepwell_store_disk_free_bytes") < size


def test_names_keep_to_the_rules_of_prometheus(scraped: Scrape) -> None:
    assert not scraped.faults()
    promtool("check", "metrics", text=scraped.text)


def test_each_question_in_the_manual_can_be_asked(scraped: Scrape) -> None:
    text = (_ROOT / "docs" / "operate" / "when-it-breaks.md").read_text()
    blocks = re.findall(r"```promql\n(.*?)```", text, re.DOTALL)
    expressions = [line for block in blocks for line in block.splitlines() if not line.startswith("#")]
    assert len(expressions) > 20
    lacking = {expression: found for expression in expressions if (found := missing(expression, scraped))}
    # the front in Python cannot tell what it has to do
    if {"front": "native"}.items() <= dict(scraped.series("stepwell_build_info")[0]).items():
        assert not lacking
    assert all("stepwell_front_" in expression for expression in lacking)
    # each metric in the text is one; those of tenants are there with quotas, and test_quotas asks for them
    for name in set(re.findall(r"`(stepwell_\w+)[`{]", text)):
        parts = [name, f"{name}_count"]
        is_elsewhere = "_front_" in name or "_tenant_" in name  # the front in Rust; servers with quotas
        assert any(scraped.series(part) for part in parts) or is_elsewhere, name


def test_dashboard_and_rules_ask_for_what_is_there(scraped: Scrape) -> None:
    rules = [_rules("recording.yml"), _rules("alerts.yml")]
    recorded = {rule["record"]: rule["expr"] for rule in rules[0]}
    assert len(recorded) == len(rules[0])
    alerts = {rule["alert"]: rule for rule in rules[1]}
    asked = {expr: missing(expr, scraped) for expr in recorded.values()}
    asked |= {rule["expr"]: missing(rule["expr"], scraped, recorded) for rule in alerts.values()}
    dashboard = json.loads((_DEPLOY / "grafana" / "stepwell.json").read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(panels) > 40
    for expr in panels:
        plain = expr.replace("$__rate_interval", "5m")
        asked[expr] = missing(re.sub(r"\$(job|instance|model)", ".*", plain), scraped, recorded)
    is_native = {"front": "native"}.items() <= dict(scraped.series("stepwell_build_info")[0]).items()
    # what only servers with quotas or with an audit log have
    lacking = {
        expr: found
        for expr, found in asked.items()
        if found and "stepwell_tenant_" not in expr and "stepwell_audit_" not in expr
    }
    assert not {expr: found for expr, found in lacking.items() if is_native or "_front_" not in expr}
    for name, alert in alerts.items():
        assert alert["labels"]["severity"] in {"page", "ticket"}
        assert (
            alert["annotations"]["runbook_url"]
            == f"https://runbooks.example/stepwell/when-it-breaks.md#{name.lower()}"
        )
        said = set(re.findall(r"\$labels\.(\w+)", " ".join(alert["annotations"].values())))
        assert said <= labels(alert["expr"], scraped, recorded), name


def test_an_expression_that_asks_for_what_is_not_there_is_found(scraped: Scrape) -> None:
    """What the test above relies on."""
    for expression, fault in (
        ("rate(stepwell_sessions[5m])", "used as another type"),
        ("stepwell_requests_total", "used as another type"),
        ("stepwell_gone == 0", "no series stepwell_gone"),
        ('rate(stepwell_errors_total{reason=~"INTERNAL|TYPO"}[5m])', "no reason=TYPO"),
        ("sum by (tennant) (stepwell_sessions)", "no label tennant"),
        ("histogram_quantile(0.9, sum by (model) (rate(stepwell_pass_seconds_bucket[5m])))", "without le"),
        ("histogram_quantile(0.9, sum by (le) (rate(stepwell_pass_seconds_sum[5m])))", "no buckets"),
    ):
        assert any(fault in found for found in missing(expression, scraped)), expression


def _rules(name: str) -> list[dict[str, Any]]:
    text = (_DEPLOY / "prometheus" / name).read_text()
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def test_certificates_say_how_long_they_are_valid(scraped: Scrape) -> None:
    assert time.time() < scraped.value("stepwell_certificate_expiry_timestamp_seconds", "tls-cert")
    assert scraped.value("stepwell_certificate_failures_total") == 0
    assert 0 < scraped.value("process_resident_memory_bytes") < scraped.value("stepwell_max_memory_bytes")


def test_commits_made_in_place_are_timed(tmp_path: Path) -> None:
    with _on_disk(tmp_path / "data", "--durability", "async") as (stub, address):
        _do_something(stub)
        scrape = Scrape.of(address)
    # of three steps and a reset
    assert scrape.value("stepwell_stage_seconds_count", "forecast", "commit") == 4
    assert scrape.value("stepwell_store_write_seconds_count", "log") == 4
    assert scrape.value("stepwell_sessions", "forecast") == 3
    assert scrape.value("stepwell_uncommitted_sessions") == 0


def test_a_server_starts_without_metrics_where_their_default_port_is_in_use() -> None:
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # somebody else has it, which does as well
            other.bind(DEFAULT_METRICS)
            other.listen()
        with serve(environment={"STEPWELL_METRICS_LISTEN": None}) as server:
            line = server.wait_for_log("metrics are not served")
            assert "warning" in line
            assert str(DEFAULT_METRICS) in line


async def test_metrics_are_served_by_default_unless_they_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell_server.app.DEFAULT_METRICS", Address("127.0.0.1", 0))
    async with running() as at:
        sources = [lambda: of_engine(at.engine.stats())]
        metrics = app._serve_metrics(Settings(), sources, Readiness())
        assert metrics is not None
        off = Settings(metrics_listen="off")
        try:
            scrape = await asyncio.to_thread(Scrape.of, f"127.0.0.1:{metrics.address.port}")
        finally:
            await asyncio.to_thread(metrics.close)
        assert scrape.series("stepwell_max_pass_rows")
        assert app._serve_metrics(off, sources, Readiness()) is None


async def test_a_scrape_may_ask_for_some_metrics_by_name() -> None:
    settings = Settings(metrics_listen=Address("127.0.0.1", 0))

    def ask(port: int, query: str) -> set[str]:
        address = f"http://127.0.0.1:{port}/metrics?{query}"
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as response:
            lines = response.read().decode().splitlines()
        return {line.partition("{")[0].partition(" ")[0] for line in lines if not line.startswith("#")}

    async with running() as at:
        metrics = app._serve_metrics(settings, [lambda: of_engine(at.engine.stats())], Readiness())
        assert metrics is not None
        try:
            for names in (
                {"stepwell_max_pass_rows"},
                {"stepwell_max_pass_rows", "process_resident_memory_bytes"},
            ):
                query = "&".join(f"name[]={name}" for name in names)
                assert await asyncio.to_thread(ask, metrics.address.port, query) == names
            assert await asyncio.to_thread(ask, metrics.address.port, "name%5B%5D=stepwell_unknown") == set()
        finally:
            await asyncio.to_thread(metrics.close)


async def test_head_has_the_headers_of_get_and_the_connection_stays_usable() -> None:
    def ask(port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
        with contextlib.closing(connection):
            for path, status in (("/livez", 200), ("/readyz", 503), ("/metrics", 200), ("/other", 404)):
                found = []
                for method in ("HEAD", "GET", "HEAD"):
                    connection.request(method, path)
                    answer = connection.getresponse()
                    assert answer.status == status
                    found.append(
                        (answer.getheader("Content-Type"), answer.getheader("Content-Length"), answer.read())
                    )
                assert found[0] == found[2] or path == "/metrics", "its numbers change"
                assert [each[2] for each in found] == [b"", found[1][2], b""]
                assert found[0][0] == found[1][0]
                assert path == "/metrics" or int(found[0][1] or -1) == len(found[1][2]) > 0

    async with running() as at:
        sources = [lambda: of_engine(at.engine.stats())]
        metrics = app._serve_metrics(Settings(metrics_listen=Address("127.0.0.1", 0)), sources, Readiness())
        assert metrics is not None
        try:
            await asyncio.to_thread(ask, metrics.address.port)
        finally:
            await asyncio.to_thread(metrics.close)


async def test_with_a_token_only_who_shows_it_gets_metrics(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text("b1946ac92492d2347c6235b4d2611184\n")

    def ask(port: int, path: str = "/metrics", **headers: str) -> tuple[int, str, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheader("WWW-Authenticate", ""), answer.read().decode()

    settings = Settings(metrics_listen=Address("127.0.0.1", 0))
    async with running() as at:
        sources = [lambda: of_engine(at.engine.stats())]
        metrics = app._serve_metrics(settings, sources, Readiness(), MetricsToken.of(file))
        assert metrics is not None
        try:
            for shown in ("", "Bearer wrong", "Basic b1946ac92492d2347c6235b4d2611184"):
                status, challenge, text = await asyncio.to_thread(
                    ask, metrics.address.port, Authorization=shown
                )
                assert (status, challenge) == (401, 'Bearer realm="metrics"')
                assert text == "metrics need the token of --metrics-token-file\n"
            shown = "Bearer b1946ac92492d2347c6235b4d2611184"
            status, _, text = await asyncio.to_thread(ask, metrics.address.port, Authorization=shown)
            assert status == 200
            assert "stepwell_max_pass_rows" in text
            # probes cannot show one, and are not told why then
            assert await asyncio.to_thread(ask, metrics.address.port, "/readyz") == (503, "", "not ready\n")
            verbose = await asyncio.to_thread(ask, metrics.address.port, "/readyz?verbose")
            assert verbose == (503, "", '{"ready": false}\n')
            _, _, text = await asyncio.to_thread(ask, metrics.address.port, "/readyz", Authorization=shown)
            assert text == "not ready: models: the models are being loaded\n"
            assert await asyncio.to_thread(ask, metrics.address.port, "/livez") == (200, "", "alive\n")
        finally:
            await asyncio.to_thread(metrics.close)
