"""The files of the repository, for the scripts that read all of them."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE_AT_RUN_TIME = {".venv", ".tools", "out", "dist", "build"}


@cache
def tracked_files() -> list[str]:
    """Return the tracked files, relative to the root; in an unpacked sdist, all files."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        names = [name for name in done.stdout.split("\0") if name]
    else:
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
        names = [name for name in names if name.split("/")[0] not in MADE_AT_RUN_TIME]
    return sorted(name for name in names if (ROOT / name).is_file())


@cache
def text_of(name: str) -> str:
    """Return the text of a file, empty for a binary one."""
    content = (ROOT / name).read_bytes()
    return "" if b"\0" in content else content.decode("utf-8", errors="replace")


def documents() -> list[str]:
    """Return the Markdown files."""
    return [name for name in tracked_files() if name.endswith(".md")]
