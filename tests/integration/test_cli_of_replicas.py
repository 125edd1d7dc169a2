"""`stepwell top` and `stepwell bench` over servers that share a real Valkey."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import stepwell
from support import secured
from support.load.driver import MODEL
from support.servers.replica_processes import Replicas
from support.servers.server_process import FEATURES
from support.servers.valkey_servers import Valkey

pytestmark = pytest.mark.skipif(secured.is_on(), reason="options of TLS are tried elsewhere")
_TIMEOUT_S = 100.0
#: Where a session goes depends on the ports: of so many each replica has some.
_SESSIONS = 60


class _Cluster:
    """Three replicas, and where their metrics are."""

    def __init__(self, replicas: Replicas) -> None:
        self.replicas = replicas

    @property
    def metrics(self) -> list[str]:
        """Of each, as it has said in its log."""
        return [
            next(
                json.loads(line)["address"]
                for line in one.logs().splitlines()
                if line.startswith("{") and json.loads(line)["event"] == "metrics"
            )
            for one in self.replicas
        ]

    def command(self, *arguments: str, server: str = "") -> list[str]:
        program = str(Path(sys.executable).with_name("stepwell"))
        return [program, *arguments, "--server", server or self.replicas.address]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command(*arguments), stdout=subprocess.PIPE, text=True)

    def run(self, *arguments: str, server: str = "") -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments, server=server)
        environment = os.environ | {"STEPWELL_CONNECT_TIMEOUT_S": "1"}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=environment
        )


@pytest.fixture(scope="module")
def cluster() -> Iterator[_Cluster]:
    options = ["--durability", "async", "--metrics-listen", "127.0.0.1:0"]
    options += ["--log-format", "json", "--log-level", "info"]
    with Valkey() as valkey, Replicas(valkey.url(), 3, *options) as replicas:
        yield _Cluster(replicas)


@pytest.mark.slow
def test_top_shows_the_sum_and_counts_sessions_once(cluster: _Cluster) -> None:
    with stepwell.connect(cluster.replicas.address) as client:
        group = client.open_sessions(MODEL, _SESSIONS)
        metrics = ",".join(f"http://{each}" for each in cluster.metrics)
        # all the time while it looks, on each of the replicas
        size = ("--sessions", str(_SESSIONS), "--duration-s", "300")
        steps = cluster.start("bench", MODEL, "--mode", "group", *size)
        try:
            while len(client.sessions(prefix="bench-")) < _SESSIONS:
                group.step(np.zeros((_SESSIONS, FEATURES), np.float32))
            found = cluster.run("top", "--metrics", metrics, "--interval", "6s", "--json")
            shown = cluster.run("top", "--interval", "300ms", "--once")  # each says where its metrics are
            alone = [
                json.loads(cluster.run("top", "--metrics", f"http://{each}", "--json").stdout)
                for each in cluster.metrics
            ]
        finally:
            steps.terminate()
            steps.communicate(timeout=_TIMEOUT_S)
        assert found.returncode == shown.returncode == 0, found.stderr + shown.stderr
        picture = json.loads(found.stdout)
        assert [row["metrics"] for row in picture["servers"]] == cluster.metrics
        (model,) = picture["models"]
        assert model["sessions"] == 2 * _SESSIONS  # each of them says so
        assert picture["server"]["row_steps_per_s"] == pytest.approx(model["row_steps_per_s"])
        assert min(one["server"]["row_steps_per_s"] for one in alone) > 0
        assert picture["server"]["resident_rows"] == model["resident_rows"]
        assert picture["server"]["memory_bytes"] > max(one["server"]["memory_bytes"] for one in alone)
        assert model["p50_s"] <= model["p99_s"]
        assert 0 < model["busy"] < 20  # a share, but of a time that is not quite the one it was counted in
        lines = shown.stdout.splitlines()
        assert max(map(len, lines)) <= 80
        assert lines[0].startswith("3 servers, stepwell ")
        assert "NO ANSWER" not in shown.stdout
        group.close()


@pytest.mark.slow
def test_top_continues_without_a_replica_that_is_gone(cluster: _Cluster) -> None:
    metrics = cluster.metrics
    gone = "127.0.0.1:1"
    shown = cluster.run(
        *("top", "--once", "--interval", "200ms", "--metrics", f"http://{metrics[0]},http://{gone}"),
        server=f"{cluster.replicas.addresses[0]},{gone}",
    )
    assert shown.returncode == 0, shown.stderr
    assert f"NO ANSWER: {gone}" in shown.stdout.splitlines()
    assert f"NO ANSWER: {metrics[0]}" not in shown.stdout
    refused = cluster.run("top", "--once", server=f"dns:///{cluster.replicas.addresses[0]}")
    assert refused.returncode == 2
    assert "--metrics must list the metrics of every server" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["unary", "frames", "group"])
def test_bench_steps_on_all_of_them(cluster: _Cluster, mode: str) -> None:
    before = _changes(cluster)
    done = cluster.run(
        *("bench", MODEL, "--mode", mode, "--sessions", str(_SESSIONS), "--processes", "2", "--json"),
        *("--duration-s", "0.6", "--warm-up-s", "0.2", "--timeout-s", "20"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["errors"] == {}, result["first_error"]
    assert result["steps"] > 0
    assert result["server"] == cluster.replicas.address
    assert result["server_pid"] is None
    assert result["server_cpu_s"] > 0
    after = _changes(cluster)
    assert all(then < now for then, now in zip(before, after, strict=True))
    with stepwell.connect(cluster.replicas.address) as client:
        assert not client.sessions(prefix="bench-")


@pytest.mark.slow
def test_bench_continues_where_a_replica_dies(cluster: _Cluster) -> None:
    """Calls that it makes without the SDK go to another replica, as the SDK's would."""
    arguments = ("--mode", "unary", "--sessions", "12", "--warm-up-s", "0", "--json")
    victim = cluster.replicas[2]
    with stepwell.connect(cluster.replicas.addresses[0]) as client:
        bench = _under_way(cluster, client, "bench", MODEL, *arguments)
        try:
            victim.kill()
            output, _ = bench.communicate(timeout=_TIMEOUT_S)
            assert bench.returncode == 0, output
            # what failed came once for each session at most; all of them were stepped on
            assert set(json.loads(output)["errors"]) <= {"UnavailableError", "ConnectError"}
            assert not client.sessions(prefix="bench-")
        finally:
            bench.kill()
            bench.wait()
            victim.start()


def _under_way(cluster: _Cluster, client: stepwell.Client, *bench: str) -> subprocess.Popen[str]:
    """A `stepwell bench` some of whose sessions have been stepped, and which is not over."""
    for duration_s in (3, 20, 60):  # a busy machine gets more time
        started = cluster.start(*bench, "--duration-s", str(duration_s))
        while started.poll() is None:
            if any(one.revision > 5 for one in client.sessions(prefix="bench-")):
                return started
        started.communicate()
    raise AssertionError("it is always over before it is seen")


def _changes(cluster: _Cluster) -> list[float]:
    """How many changes each replica has made."""
    from support.telemetry.scrape import Scrape

    return [Scrape.of(each).value("stepwell_changes_total", MODEL, "step") for each in cluster.metrics]
