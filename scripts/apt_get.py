"""Install Debian's packages for make's targets, where that is allowed: on a Debian, as root, and not forbidden."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

FORBIDDEN_BY = "STEPWELL_NO_APT"
"""With this variable set, no target installs a package of the system."""


def refusal() -> str:
    """The reason that no package may be installed; empty if one may."""
    if shutil.which("apt-get") is None:
        return "there is no apt-get"
    if os.environ.get(FORBIDDEN_BY):
        return f"{FORBIDDEN_BY} is set"
    return "" if os.geteuid() == 0 else "apt-get needs root"


def install(packages: Sequence[str], *, what: str) -> bool:
    """Install packages, and say so beforehand; whether apt-get succeeded. Its error messages are shown."""
    print(
        f"Installing {what} ({FORBIDDEN_BY}=1 forbids it): apt-get install {' '.join(packages)}", flush=True
    )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    wanted = ["install", "--yes", "--quiet=2", "--no-install-recommends", *packages]
    output = ""
    for arguments in (wanted, ["update", "--quiet=2"], wanted):
        # debconf writes to stderr that it delays the configuration, even where all is well: shown after a failure only
        done = subprocess.run(
            ["apt-get", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        output += done.stdout
        if done.returncode == 0 and arguments is wanted:
            return True
    print(output, flush=True)
    return False
