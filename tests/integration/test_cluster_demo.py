"""`make cluster-demo`, run as a stranger runs it, for a shorter time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

pytestmark = [pytest.mark.timeout(300), pytest.mark.plain("it starts its servers by itself")]


@pytest.mark.slow
def test_replicas_are_killed_and_users_see_no_error(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "cluster_demo.py"), "--seconds", "3", "--users", "6"]
    demo = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert len(re.findall(r"replica \d is (?:killed|told to end)", demo.stdout)) == 3
    assert demo.stdout.count("is there again") == 3
    rows = re.findall(r"^(by the SDK|through Envoy).*?(\d+) +(\d+) +\d+ ms", demo.stdout, re.MULTILINE)
    assert [(way, errors) for way, _, errors in rows] == [("by the SDK", "0"), ("through Envoy", "0")]
    assert all(int(steps) > 20 for _, steps, _ in rows)
    assert (tmp_path / "out" / "cluster.png").read_bytes().startswith(PNG_SIGNATURE)
