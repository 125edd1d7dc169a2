"""Type checkers accept what users write, and refuse what would fail: pyright (Pylance) and mypy, as users run them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USER = Path(__file__).with_name("typed_user.py")
WRONG = """

def wrong(client: stepwell.Client) -> None:
    client.open_session("policy", "user-42")
    client.open_session("policy", batch_size="2")
    client.open_sessions("policy")
    session = client.open_session("policy")
    session.step(np.ones((1, 3)), time="first")
    session.get_state().items().nothing
    stepwell.connect(event_hooks={"reply": [slow]})
    stepwell.connect(event_hooks={"retry": [slow]})
    stepwell.connect(metadata={"a": 5})
"""
FIRST_WRONG = len(USER.read_text().splitlines()) + 4
"""Line of the first call that is wrong, in the file with all of them; each line after it is wrong too, but one."""
RIGHT_AMONG_THEM = FIRST_WRONG + 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What users write: a file without and one with errors, and the examples."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "right.py").write_text(USER.read_text())
    (folder / "wrong.py").write_text(USER.read_text() + WRONG)
    shutil.copytree(ROOT / "examples", folder / "examples")
    # What Keras says of itself is not ours to check: to pyright its parameters have the types of their defaults.
    for name in ("keras", "tensorflow"):
        stub = folder / "typings" / name / "__init__.pyi"
        stub.parent.mkdir(parents=True)
        stub.write_text("from typing import Any\ndef __getattr__(name: str) -> Any: ...\n")
    return folder


def lines_that_are_wrong() -> set[int]:
    return set(range(FIRST_WRONG, FIRST_WRONG + len(WRONG.splitlines()) - 3)) - {RIGHT_AMONG_THEM}


@pytest.mark.slow
def test_pyright(folder: Path) -> None:
    pytest.importorskip("pyright")
    config = {
        "include": ["right.py", "wrong.py", "examples"],
        "typeCheckingMode": "standard",
        "pythonVersion": "3.11",
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        "-m",
        "pyright",
        "--outputjson",
        "--pythonpath",
        sys.executable,
        "-p",
        str(folder),
    ]
    # Node comes from a wheel, and so does pyright itself: nothing is fetched.
    env = os.environ | {"PYRIGHT_PYTHON_GLOBAL_NODE": "0", "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=env)
    found = json.loads(done.stdout)["generalDiagnostics"]
    wrong = {one["range"]["start"]["line"] + 1 for one in found if one["file"].endswith("wrong.py")}
    assert [one for one in found if not one["file"].endswith("wrong.py")] == []
    assert wrong == lines_that_are_wrong()


@pytest.mark.slow
def test_mypy(folder: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "right.py", "wrong.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=folder)
    found = re.findall(r"^(\w+\.py):(\d+): error", done.stdout, re.MULTILINE)
    assert {name for name, _ in found} == {"wrong.py"}, done.stdout
    assert {int(line) for _, line in found} == lines_that_are_wrong()
