"""The page about other languages: its commands make stubs, and its client in Python runs with them, without our SDK."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tools

from stepwell.testing import LocalServer


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "guides" / "other-languages.md").read_text()


@pytest.mark.slow
def test_a_client_of_stubs_steps_repeats_and_reads_reasons(
    page: str, root: Path, server: LocalServer, tmp_path: Path
) -> None:
    (command,) = re.findall(r"^(python -m grpc_tools\.protoc .*)$", page, re.MULTILINE)
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    generator = tools.environment("gen") / "python"
    made = command.replace("python -m", f"{shlex.quote(str(generator))} -m").replace("=stubs", f"={stubs}")
    subprocess.run(["bash", "-euc", made], cwd=root, check=True, timeout=100)
    # The first answer of each change is lost: what arrives is the answer to the change that is sent again.
    losing = "def once_more(method, request, **options):\n    method(request, **options)\n    return method(request, **options)\n"
    code = code.replace("return method(request,", "return once_more(method, request,")
    program = tmp_path / "client.py"
    # Other pages leave sessions `user-N` on the server that their tests share.
    program.write_text(
        losing + code.replace("127.0.0.1:50051", server.address).replace("user-42", "by-stubs")
    )

    ran = subprocess.run(
        [tools.environment("triton") / "python", program],  # has gRPC and numpy, and no Stepwell
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(stubs)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["1", "True"], ["2", "True"], ["3", "True"]]
    assert lines[3:] == ["NOT_FOUND SESSION_NOT_FOUND"]
