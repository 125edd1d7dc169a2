"""The wheels that `make wheels` has put into dist/, in an environment that has nothing else of this repository."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

# CI runs this with the lowest priority, beside all tests: it may get a tenth of a core.
_LIMIT_S = 1500
pytestmark = pytest.mark.timeout(2 * _LIMIT_S)
STEP_A_SESSION = """
import json, sys
import numpy as np
import stepwell, stepwell_front, stepwell_server
from stepwell.testing import LocalServer

model, cache = sys.argv[1:]
with LocalServer(models={"forecast": model}, cache_dir=cache, start_timeout_s=1000, extra_args=["--front", "native"]) as server:
    with stepwell.connect(server.address, timeout_s=300) as client, client.open_session("forecast") as session:
        y = session.step(np.ones((1, 3), np.float32))
        front = client.server_info().front
modules = [module.__file__ for module in (stepwell, stepwell_front, stepwell_server)]
print(json.dumps({"shape": y.shape, "front": front, "version": stepwell_front.__version__, "modules": modules}))
"""


@pytest.fixture(scope="module")
def wheels(root: Path) -> dict[str, Path]:
    """Wheel by distribution."""
    return {path.name.split("-")[0]: path for path in (root / "dist").glob("*.whl")}


def test_there_are_two_and_the_native_one_is_for_every_python(wheels: dict[str, Path]) -> None:
    assert set(wheels) == {"stepwell", "stepwell_front"}
    assert wheels["stepwell"].name.endswith("-py3-none-any.whl")
    _, version, python, abi, platform = wheels["stepwell_front"].stem.split("-")
    assert version == wheels["stepwell"].name.split("-")[1]
    assert (python, abi) == ("cp311", "abi3")
    assert platform.startswith(("manylinux", "linux", "musllinux"))


def test_a_session_is_stepped_through_the_native_front(
    wheels: dict[str, Path], model_path: Path, compiled: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=_LIMIT_S)
    python = environment / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install"]
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*command, *options, *wheels.values()], check=True, timeout=_LIMIT_S)
    # TensorFlow and the rest from here, after its own; no .pth file of that folder is read, so nothing is editable
    packages = Path(sysconfig.get_path("platlib", vars={"base": environment, "platbase": environment}))
    (packages / "others.pth").write_text(sysconfig.get_path("platlib") + "\n")

    ran = subprocess.run(
        [python, "-I", "-c", STEP_A_SESSION, model_path, compiled],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    said: dict[str, Any] = json.loads(ran.stdout)
    assert (said["shape"], said["front"]) == ([1, 1], "native")
    assert wheels["stepwell_front"].name.split("-")[1] == said["version"]
    assert all(Path(module).is_relative_to(environment) for module in said["modules"]), said["modules"]
