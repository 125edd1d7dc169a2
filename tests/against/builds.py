"""Builds of the server that are compared: the wheels of a commit in an environment of its own, and the tree itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CRATE = Path("server", "front")
KEPT = ROOT / ".tools" / "against"
"""A build is kept under the hash of its commit: the next run takes it from there."""
_NO_FRONT = 3
"""Exit code of `scripts/front.py` where the native front cannot be built."""
_WHERE = "import stepwell, stepwell_server; print(stepwell.__file__); print(stepwell_server.__file__)"


class BuildError(Exception):
    """A commit cannot be built here."""


@dataclasses.dataclass(frozen=True)
class Build:
    """An environment that has a server."""

    name: str
    python: Path
    fronts: tuple[str, ...]
    """Those that it can serve with."""
    cache_dir: Path | None = None
    """For its own compiled models; None: that of the tests, which compile as the tree does."""


def of_tree() -> Build:
    """This environment, in which the tree is installed as it stands."""
    is_native = importlib.util.find_spec("stepwell_front") is not None
    return Build("the tree", Path(sys.executable), _fronts(is_native=is_native))


def of_commit(commit: str, report: Callable[[str], object]) -> Build:
    """The wheels of a commit, built unless an earlier run has.

    Everything else comes from this environment, so TensorFlow is not installed again and its version is the same.

    Raises:
        BuildError: the commit is not there, or its wheels cannot be built.
    """
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise BuildError(
            f"this repository has no commit {commit!r} to compare with; a shallow clone has few commits"
        )
    sha = found.stdout.strip()
    folder, done = KEPT / sha, KEPT / sha / "done"
    environment = f"{sys.version}\n{sysconfig.get_path('platlib')}\n"
    if not done.exists() or done.read_text() != environment:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        report(f"building the wheels of {sha[:8]} (one to six minutes; later runs reuse them)")
        _build(sha, folder)
        done.write_text(environment)
    python = folder / "venv" / "bin" / "python"
    _check_own(python, folder)
    is_native = any((folder / "wheels").glob("stepwell_front-*.whl"))
    return Build(f"commit {sha[:8]}", python, _fronts(is_native=is_native), folder / "cache")


def _fronts(*, is_native: bool) -> tuple[str, ...]:
    return ("native", "python") if is_native else ("python",)


def _build(sha: str, folder: Path) -> None:
    source, wheels, venv = folder / "source", folder / "wheels", folder / "venv"
    source.mkdir()
    wheels.mkdir()
    packed = subprocess.run(["git", "archive", sha], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", source], input=packed.stdout, check=True)
    _run([sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", wheels], source)
    _build_front(source, wheels)
    _run([sys.executable, "-m", "venv", "--without-pip", venv], folder)
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python")]
    _run(
        [
            *pip,
            "--disable-pip-version-check",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            *wheels.glob("*.whl"),
        ],
        folder,
    )
    # The rest comes from here, after the environment's own. No .pth file of that folder is read: nothing is editable.
    packages = Path(sysconfig.get_path("platlib", vars={"base": str(venv), "platbase": str(venv)}))
    (packages / "others.pth").write_text(sysconfig.get_path("platlib") + "\n")


def _build_front(source: Path, wheels: Path) -> None:
    """Build the wheel of the native front with the crates that this tree has compiled already."""
    for name in (".cargo", "Cargo.lock"):
        kept = ROOT / CRATE / name
        if kept.is_dir():
            shutil.copytree(kept, source / CRATE / name)
        elif kept.exists():
            shutil.copy(kept, source / CRATE / name)
    command = [sys.executable, "scripts/front.py", "--wheel", str(wheels)]
    added = {"CARGO_TARGET_DIR": str(ROOT / CRATE / "target")}
    _run(command, source, allowed=_NO_FRONT, environment=added)


def _run(
    command: Sequence[str | Path],
    folder: Path,
    *,
    allowed: int = 0,
    environment: dict[str, str] | None = None,
) -> None:
    ran = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if ran.returncode not in {0, allowed}:
        shown = " ".join(os.fspath(one) for one in command)
        raise BuildError(f"{shown} ended with exit code {ran.returncode}:\n{ran.stdout[-4000:]}")


def _check_own(python: Path, folder: Path) -> None:
    """Whoever imports the packages there must get those of the commit, never the tree's."""
    ran = subprocess.run([python, "-I", "-c", _WHERE], capture_output=True, text=True, check=False)
    paths = [Path(line) for line in ran.stdout.split()]
    if ran.returncode or not all(path.is_relative_to(folder / "venv") for path in paths):
        raise BuildError(f"{python} does not import the packages of its commit: {ran.stdout}{ran.stderr}")
