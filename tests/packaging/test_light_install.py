"""The wheel without extras in a bare environment, with the newest and with the lowest versions it allows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from stepwell.testing import LocalServer
from support.models import programs

# each environment is installed from the package registry
pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

USE_A_SERVER = """
import sys
import numpy as np
import stepwell

with stepwell.connect(sys.argv[1]) as client, client.open_session("forecast") as session:
    y = session.step(np.ones((1, 3), np.float32))
    session.get_state().save("state.safetensors")
    assert stepwell.State.load("state.safetensors") == session.get_state()
    print(y.shape, session.revision)
"""


@pytest.fixture(scope="module", params=["pinned", "lowest"])
def python(request: pytest.FixtureRequest, wheel: Path, root: Path) -> Path:
    """The interpreter of an environment that has only the wheel and what it needs."""
    kind: str = request.param
    folder = programs.once(f"environment-light-{kind}", lambda folder: make(folder, kind, wheel, root))
    return folder / "venv" / "bin" / "python"


def make(folder: Path, kind: str, wheel: Path, root: Path) -> None:
    """Make the environment: by our own pip, and without the bytecode of what is never imported."""
    environment = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=200)
    constraints = root / "constraints.txt"
    if kind == "lowest":
        constraints = folder / "lowest.txt"
        constraints.write_text("\n".join(lowest_versions(root)))
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    command = [*pip, "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    subprocess.run([*command, "--constraint", str(constraints), str(wheel)], check=True, timeout=240)


def lowest_versions(root: Path) -> list[str]:
    """The lower bound of each dependency, as an exact constraint."""
    dependencies = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    found = [re.match(r"([\w-]+)>=([\d.]+)", line) for line in dependencies]
    assert all(found)
    return [f"{bound[1]}=={bound[2]}" for bound in found if bound]


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), "-I", *arguments], cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )


def test_it_brings_no_framework(python: Path, tmp_path: Path) -> None:
    code = "from importlib.metadata import distributions\nfor d in distributions(): print(f'{d.name}=={d.version}')"
    listed = run(python, tmp_path, "-c", code).stdout.lower()
    assert "stepwell==" in listed
    assert not re.findall(r"^(?:tensorflow|keras|ai-edge-litert|torch|jax)\b.*", listed, re.MULTILINE)


def test_it_steps_a_session_of_a_server(python: Path, server: LocalServer, tmp_path: Path) -> None:
    done = run(python, tmp_path, "-W", "error", "-c", USE_A_SERVER, server.address)
    assert (done.stdout, done.stderr) == ("(1, 1) 1\n", "")


def test_the_command_line_works(python: Path, server: LocalServer, tmp_path: Path) -> None:
    helped = run(python, tmp_path, str(python.parent / "stepwell"), "--help")
    assert helped.returncode == 0, helped.stderr
    assert "serve" in helped.stdout
    envoy = run(python, tmp_path, "-m", "stepwell", "envoy-config", "--replica", "127.0.0.1:50051")
    assert envoy.returncode == 0, envoy.stderr
    assert "grpc_json_transcoder" in envoy.stdout
    models = run(python, tmp_path, "-m", "stepwell", "models", "--json", "--server", server.address)
    assert models.returncode == 0, models.stderr
    assert "forecast" in models.stdout


def test_serving_from_a_notebook_says_what_to_install(python: Path, model_path: Path, tmp_path: Path) -> None:
    done = run(python, tmp_path, "-c", f"import stepwell; stepwell.local({str(model_path)!r})")
    assert done.returncode != 0
    assert "pip install '.[server]' ./server/front" in done.stderr.splitlines()[-1]


def test_serving_says_what_to_install(python: Path, tmp_path: Path) -> None:
    done = run(python, tmp_path, "-m", "stepwell", "serve", "forecast=forecast.keras")
    assert done.returncode != 0
    assert "pip install '.[server]' ./server/front" in done.stderr
    assert "Traceback" not in done.stderr
    assert "--max-batch-rows" in run(python, tmp_path, "-m", "stepwell", "serve", "--help").stdout


def test_doctor_says_what_is_not_installed(python: Path, tmp_path: Path) -> None:
    done = run(python, tmp_path, "-m", "stepwell", "doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["versions"]["tensorflow"] is None
    assert document["versions"]["stepwell"]
    assert document["wrong"] == []
    assert "no server can run here" in document["advice"][0]["what"]
