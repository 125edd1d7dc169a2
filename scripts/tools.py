"""Environments for tools whose dependencies cannot live beside the run-time ones: `.tools/<name>`.

Each is made on first use, and made anew when what it shall hold has changed. What that is stands in a group of
pyproject.toml and, as exact versions, in a file of constraints.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".tools"


def environment(name: str) -> Path:
    """Return the folder of the programs of an environment: group `name`, constraints-`name`.txt."""
    requirements = group(name)
    constraints = ROOT / f"constraints-{name}.txt"
    wanted = hashlib.sha256(repr(requirements).encode() + constraints.read_bytes()).hexdigest()
    folder = TOOLS / name
    programs = folder / "bin"
    stamp = folder / "requirements.sha256"
    with _alone(name):
        if not ((programs / "python").exists() and stamp.exists() and stamp.read_text() == wanted):
            print(f"Making an environment in {folder.relative_to(ROOT)}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
            _install(name, *requirements)
            stamp.write_text(wanted)
    return programs


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Let one process at a time change an environment: tests run in several."""
    TOOLS.mkdir(exist_ok=True)
    with (TOOLS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def group(name: str) -> list[str]:
    """Return the requirements of a group of pyproject.toml."""
    groups: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    return groups[name]


def install(name: str, *requirements: str) -> None:
    """Install into an environment that is there."""
    with _alone(name):
        _install(name, *requirements)


def _install(name: str, *requirements: str) -> None:
    # By the pip that is here, and without the bytecode of what is never imported: half of the time would go there.
    python = str(TOOLS / name / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    command = [*pip, "install", "--quiet", "--no-compile"]
    constraints = ["--constraint", str(ROOT / f"constraints-{name}.txt")]
    subprocess.run([*command, *constraints, *requirements], check=True)


def node(sources: Path) -> Path:
    """Return a folder of Node packages, those of `package.json` in `sources`, beside whose other files they are.

    Raises:
        LookupError: there is no Node here, or no npm, or npm does not reach its packages.
    """
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise LookupError("node and npm are not installed")
    folder = TOOLS / "node"
    wanted = hashlib.sha256((sources / "package.json").read_bytes()).hexdigest()
    stamp = folder / "requirements.sha256"
    with _alone("node"):
        if not (stamp.exists() and stamp.read_text() == wanted):
            print(f"Installing Node packages in {folder.relative_to(ROOT)}", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            shutil.copy(sources / "package.json", folder)
            quiet = ("--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund", "--silent")
            soon = ("--fetch-retries=1", "--fetch-retry-maxtimeout=5000", "--fetch-timeout=30000")
            try:
                subprocess.run(
                    [npm, "install", *quiet, *soon], cwd=folder, check=True, stdout=subprocess.DEVNULL
                )
            except subprocess.CalledProcessError as error:
                raise LookupError(f"npm cannot install the packages ({error})") from error
            stamp.write_text(wanted)
        for source in sources.glob("*.js"):
            shutil.copy(source, folder)
    return folder
