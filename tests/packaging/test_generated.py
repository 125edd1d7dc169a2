"""The generated code is what the protocol says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(300)  # the generator's environment is made on first use
def test_the_generated_code_is_fresh(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, root / "scripts" / "proto.py", "--check"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
