"""A small file system of its own under a folder, for commands that fill it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

#: Mounts a small file system over a folder, in name spaces of its own, and runs the rest of the command there.
_MOUNT = 'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"'


def small_disk(folder: Path, options: str) -> list[str]:
    """The first words of a command that runs on such a file system. Skips the test where no mount is allowed."""
    unshare = [shutil.which("unshare") or "", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    prefix = [*unshare, "sh", "-c", _MOUNT, "sh", options, os.fspath(folder)]
    if not unshare[0] or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount is allowed here; test_a_limit_on_files fills the disk in the other way")
    return prefix
