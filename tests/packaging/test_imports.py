"""The import budget: what each part may bring into its process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import stepwell
from stepwell.testing import LocalServer
from support.servers.both_fronts import needs_native

FRAMEWORKS = {"tensorflow", "keras", "torch", "jax"}
SERVER_ONLY = {
    "ai_edge_litert",
    "h5py",
    "isal",
    "lmdb",
    "prometheus_client",
    "stepwell_server",
    "uvloop",
}
IMPORTED_LATER = {"click", "matplotlib", "pandas", "rich", "safetensors", "xarray"}


def modules_after(statement: str, folder: Path) -> set[str]:
    """The top-level modules of a fresh interpreter that has run a statement."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=200, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "module", ["stepwell", "stepwell.aio", "stepwell.testing", "stepwell.errors", "stepwell.v1"]
)
def test_the_sdk_is_light(module: str, tmp_path: Path) -> None:
    loaded = modules_after(f"import {module}", tmp_path)
    assert loaded & (FRAMEWORKS | SERVER_ONLY | IMPORTED_LATER) == set()


def test_the_command_line_is_light(tmp_path: Path) -> None:
    loaded = modules_after("import stepwell.cli", tmp_path)
    assert loaded & (FRAMEWORKS | SERVER_ONLY) == set()


@needs_native
def test_the_native_front_needs_no_grpc(tmp_path: Path) -> None:
    server = "import stepwell_server.app, stepwell_server.rpc.server"
    assert "grpc" not in modules_after(f"{server}, stepwell_server.rpc.fronts.native", tmp_path)
    assert "grpc" in modules_after(f"{server}, stepwell_server.rpc.fronts.python", tmp_path)


@pytest.mark.parametrize("command", ["serve", "check", "compile", "described", "doctor"])
def test_help_of_the_servers_commands_needs_none_of_its_packages(command: str, tmp_path: Path) -> None:
    loaded = modules_after(f"import stepwell_server.cli.{command}", tmp_path)
    assert loaded & (FRAMEWORKS | SERVER_ONLY - {"stepwell_server"}) == set()


@pytest.mark.parametrize(
    "module", ["app", "settings", "compile.host.compiler", "engine.engine", "rpc.server"]
)
def test_the_server_is_imported_without_tensorflow(module: str, tmp_path: Path) -> None:
    loaded = modules_after(f"import stepwell_server.{module}", tmp_path)
    assert loaded & (FRAMEWORKS | IMPORTED_LATER | {"h5py"}) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which libraries a process has loaded")
def test_a_server_that_runs_on_litert_never_loads_tensorflow(server: LocalServer) -> None:
    with stepwell.connect(server.address) as client, client.open_session("forecast") as session:
        assert client.model("forecast").executor == "litert"
        session.step(np.zeros((1, 3), np.float32))
    maps = Path(f"/proc/{server.pid}/maps").read_text()
    assert "ai_edge_litert" in maps
    assert "tensorflow/python" not in maps
    assert "libtensorflow" not in maps
