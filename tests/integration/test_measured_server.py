"""The life of a server with much switched on, from its start to its end, twice: its process is measured."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import stepwell
from support.servers import measured
from support.servers.server_process import FEATURES, ServerProcess, forecast

pytestmark = pytest.mark.plain("its callers are anybody")


def options(folder: Path, front: str) -> list[str]:
    model = forecast()
    return [
        *(f"forecast={model.path}", "--listen", "127.0.0.1:0", "--cache-dir", str(model.cache_dir)),
        *("--data-dir", str(folder / "sessions"), "--durability", "async"),
        *("--metrics-listen", "127.0.0.1:0", "--audit-log", str(folder / "audit.jsonl")),
        *("--front", front),
    ]


def test_sessions_figures_and_the_audit_log_outlive_a_server(tmp_path: Path) -> None:
    x = np.random.default_rng(6).standard_normal((2, 1, FEATURES)).astype(np.float32)
    for life, front in enumerate(["auto", "python"]):
        with ServerProcess(*options(tmp_path, front), program=measured.program()) as server:
            with stepwell.connect(server.address) as client:
                session = client.open_session("forecast", session_id="kept")
                assert session.resumed == (life == 1)
                y = session.step(x[life])
                assert client.session_info("kept").revision == life + 1
                figures = client.server_info()
                with urllib.request.urlopen(f"http://{figures.metrics_address}/metrics") as answer:
                    assert "stepwell_sessions{" in answer.read().decode()
                with urllib.request.urlopen(f"http://{figures.metrics_address}/readyz") as answer:
                    assert answer.status == 200
                if life == 1:
                    with client.open_session("forecast") as other:
                        other.step(x[0])
                        np.testing.assert_array_equal(other.step(x[1]), y)
            if life == 0:
                bench = (
                    "bench",
                    "forecast",
                    "--server",
                    server.address,
                    "--duration-s",
                    "1",
                    "--warm-up-s",
                    "0",
                    "--json",
                )
                command = [sys.executable, *measured.program("stepwell"), *bench]
                done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True)
                assert json.loads(done.stdout)["errors"] == {}
            server.signal(signal.SIGHUP)
            server.signal(signal.SIGTERM)
            code, _, log = server.finish()
        assert code == 0, log
        assert "stopped" in log.splitlines()[-1]
    events = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert sum("kept" in str(event) for event in events) > 0
