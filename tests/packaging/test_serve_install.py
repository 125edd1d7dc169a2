"""The wheel with the extra `serve` in a bare environment: it serves a compiled model, and there is no TensorFlow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from stepwell.cli import main
from stepwell_server import program_file
from stepwell_server.engine.executors import load_executor
from stepwell_server.engine.executors.step_function import initial_rows, step_of_executor
from support.models import programs

# the environment is installed from the package registry
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

X = np.random.default_rng(3).standard_normal((1, 4, 3)).astype(np.float32)
SERVE_AND_STEP = """
import importlib.util, json, re, sys, urllib.request
import grpc
import numpy as np
import stepwell
from stepwell.testing import LocalServer
from stepwell_server.rpc.triton.inference import service_pb2

program, folder = sys.argv[1:]
absent = [name for name in ("tensorflow", "keras", "h5py") if importlib.util.find_spec(name) is None]
options = ["--metrics-listen", "127.0.0.1:0"]
with LocalServer(models={"forecast": program}, extra_args=options, cache_dir=folder) as server:
    metrics = re.search(r"metrics address=(\\S+)", server.logs())[1]
    with stepwell.connect(server.address) as client, client.open_session("forecast") as session:
        y = [session.step(x).tolist() for x in np.load("x.npy")[0][:, None]]
        info = client.model("forecast")
    with grpc.insecure_channel(server.address) as channel:
        describe = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelMetadata",
            service_pb2.ModelMetadataRequest.SerializeToString,
            service_pb2.ModelMetadataResponse.FromString,
        )
        described = describe(service_pb2.ModelMetadataRequest(name="forecast"))
    counted = urllib.request.urlopen(f"http://{metrics}/metrics").read().decode()
    loaded = "keras" in open(f"/proc/{server.pid}/maps").read() if sys.platform == "linux" else False
print(json.dumps({
    "absent": absent, "y": y, "fingerprint": info.fingerprint, "source": info.provenance.source, "keras": loaded,
    "triton": [item.name for item in described.inputs], "metrics": counted.count("stepwell_"),
}))
"""


@pytest.fixture(scope="module")
def program(model_path: Path, compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the examples as `stepwell compile` makes it."""
    file = tmp_path_factory.mktemp("compiled") / "forecast.stepwell"
    arguments = ["compile", str(model_path), "-o", str(file), "--cache-dir", str(compiled)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    return file


@pytest.fixture(scope="module")
def python(wheel: Path, root: Path) -> Path:
    """The interpreter of an environment that has the wheel and what its extra `serve` names."""

    def make(environment: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=200)
        pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
        command = [*pip, "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
        constraints = str(root / "constraints.txt")
        subprocess.run([*command, "--constraint", constraints, f"{wheel}[serve]"], check=True, timeout=500)

    return programs.once("environment-serve", make) / "bin" / "python"


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-I", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_a_compiled_model_is_served_and_stepped_without_tensorflow(
    python: Path, program: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", X)
    done = run(python, tmp_path, "-c", SERVE_AND_STEP, str(program), str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)

    assert said["absent"] == ["tensorflow", "keras", "h5py"]
    assert not said["keras"]
    here = program_file.load(program)
    assert (said["fingerprint"], said["source"]) == (here.fingerprint, "forecast.keras")
    step, states, expected = step_of_executor(load_executor(here)), initial_rows(here.initial, 1), []
    for x in X[0]:
        outputs, states = step([x[None]], states)  # type: ignore[assignment]
        expected.append(outputs[0].tolist())
    assert (said["y"], said["triton"]) == (expected, [here.inputs[0].name])
    assert said["metrics"] > 20
    assert not (tmp_path / "cache").exists()  # nothing was compiled


def test_its_size_is_what_the_documents_say(python: Path) -> None:
    size = sum(
        file.stat().st_size
        for file in python.parents[1].rglob("*")
        if file.is_file() and not file.is_symlink()
    )
    print(f"installed: {size / 1e6:.0f} MB")
    assert size < 250e6


def test_what_needs_keras_says_how_to_go_on(
    python: Path, program: Path, model_path: Path, tmp_path: Path
) -> None:
    done = run(python, tmp_path, "-m", "stepwell", "serve", f"forecast={model_path}", "--store", "memory")
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith(
        f"stepwell: error: model forecast: {model_path}: must be compiled, but the required packages are"
    )
    assert (
        "not installed (tensorflow, keras, h5py): pip install '.[server]' ./server/front "
        "(in a clone of Stepwell); or compile it where they are" in line
    )

    done = run(python, tmp_path, "-m", "stepwell", "compile", str(model_path))
    assert done.returncode == 2
    assert (
        "must be compiled, but the required packages are not installed (tensorflow, keras, h5py): pip install"
        in done.stderr
    )

    shown = run(python, tmp_path, "-m", "stepwell", "models", "show", str(program), "--json")
    assert json.loads(shown.stdout)["fingerprint"] == program_file.load(program).fingerprint
    checked = run(python, tmp_path, "-m", "stepwell", "check", str(program), "--json")
    assert json.loads(checked.stdout)["verdict"] == "same"
