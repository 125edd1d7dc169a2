"""Prometheus's own checker, `promtool`: `make test` installs it on a Debian as root."""

from __future__ import annotations

import shutil
import subprocess

_TIMEOUT_S = 100.0


def promtool(*arguments: str, text: str = "") -> None:
    """Run it with `text` as its standard input.

    Raises:
        AssertionError: it is not there, or finds something; the message has what it says.
    """
    found = shutil.which("promtool")
    assert found is not None, (
        "promtool is not installed; `make test` installs it on a Debian as root, elsewhere it comes with Prometheus"
    )
    done = subprocess.run(
        [found, *arguments], input=text, text=True, capture_output=True, timeout=_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"promtool {' '.join(arguments)}:\n{done.stdout}{done.stderr}"
