"""A client in another language, made with grpc-js: its own HTTP/2, its own reading of statuses and details."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tools

import stepwell
from support.servers.both_fronts import needs_native
from support.servers.server_process import FEATURES, serve

_ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(300)  # its packages are installed on first use


def _inputs(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.sin(seed + np.arange(FEATURES)).astype(np.float32)[None]


@pytest.mark.slow
@pytest.mark.parametrize("front", [pytest.param("native", marks=needs_native), "python"])
def test_grpc_js(front: str) -> None:
    try:
        folder = tools.node(_ROOT / "tests" / "node")
    except LookupError as missing:
        pytest.skip(str(missing))
    with serve("--front", front) as server:
        command = ["node", "client.js", server.address, str(_ROOT / "proto"), "forecast", str(FEATURES)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        with stepwell.connect(server.address) as client, client.open_session("forecast") as session:
            wanted = [session.step(_inputs(seed)) for seed in range(4)]
    assert said["opened"] == "forecast"
    assert said["step"]["revision"] == 1
    np.testing.assert_array_equal(np.float32(said["step"]["y"]), wanted[0][0])
    assert [(reply["id"], reply["revisions"]) for reply in said["stream"]] == [(1, [2]), (2, [3]), (3, [4])]
    np.testing.assert_array_equal(
        [np.float32(reply["y"]) for reply in said["stream"]], np.concatenate(wanted[1:])
    )
    for name, code, reason, words in (
        ("missing", "NOT_FOUND", "SESSION_NOT_FOUND", "'nobody'"),
        ("shape", "INVALID_ARGUMENT", "INVALID_INPUT", "must"),
        ("closed", "NOT_FOUND", "SESSION_NOT_FOUND", ""),
    ):
        failed = said[name]
        assert (failed["code"], failed["reason"], failed["domain"]) == (code, reason, "stepwell"), name
        assert words in failed["message"]
    assert said["cancelled"]["code"] == "CANCELLED"
    assert said["late"]["code"] == "DEADLINE_EXCEEDED"
    assert said["headers"]["code"] == "RESOURCE_EXHAUSTED"
    assert said["revisions"] in ([5], [6])  # the step of the late stream may have been late
