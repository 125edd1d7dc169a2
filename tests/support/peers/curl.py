"""Runs curl."""

from __future__ import annotations

import shutil
import subprocess

import pytest

LIMIT_S = 60
"""Only a hang reaches it."""


def command(*arguments: str) -> list[str]:
    """A command of curl that shows its errors. The test is skipped where there is no curl."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    return ["curl", "--silent", "--show-error", "--max-time", str(LIMIT_S), *arguments]


def curl(*arguments: str) -> str:
    """What curl prints."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=True).stdout
