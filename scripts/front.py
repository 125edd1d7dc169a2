"""Build the native front and put it into this environment, or say why there is none.

    python scripts/front.py              build it if it is not there as it stands in server/front
    python scripts/front.py --crates     compile the crates that it uses; needs nothing but Python and cargo
    python scripts/front.py --check      format, clippy and the crate's own tests; fails if cargo is there and they do
    python scripts/front.py --wheel DIR  build the wheel of stepwell-front into a folder

Cargo does the work, called by maturin where a Python package comes of it. The crates come from cargo's registry; where
that is not reached, from Debian's librust-*-dev packages. On a Debian and as root this script installs them, unless
STEPWELL_NO_APT is set. Without cargo nothing is built, and the server uses the front in Python. Exit codes: 0 built or
nothing to do, 3 there is no native front, and 1 if --check finds it at fault, or if REQUIRE_NATIVE_FRONT is set and
there is none.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import apt_get

ROOT = Path(__file__).resolve().parent.parent
CRATE = ROOT / "server" / "front"
sys.path.insert(0, str(CRATE / "backend"))
import front_cargo  # noqa: E402  the build backend of the crate has it
from front_cargo import CannotBuild  # noqa: E402

#: Says of which sources the installed module was built.
STAMP = Path(sysconfig.get_path("platlib")) / "stepwell_front.sources"
NO_FRONT = 3
HOW = "Cargo comes with https://rustup.rs, or on Debian as root: apt-get install cargo; then: make front"
_REPORT_INTERVAL_S = 10.0


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the native front.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="check and test the crate instead")
    what.add_argument("--crates", action="store_true", help="compile only the crates that it uses")
    what.add_argument("--wheel", metavar="DIR", type=Path, help="build the wheel into this folder instead")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            return check()
        if options.crates:
            return cargo("build", "--quiet", "--release", *crates())
        if options.wheel:
            return build_wheel(options.wheel.absolute())
        return build()
    except CannotBuild as reason:
        print(
            f"No native front: {reason}. The server uses the front in Python, which is slower and serves this machine"
            f" only. {HOW}"
        )
        return 1 if "REQUIRE_NATIVE_FRONT" in os.environ else NO_FRONT


def build() -> int:
    """Build and install the module if its sources have changed."""
    sources = digest()
    is_there = importlib.util.find_spec("stepwell_front") is not None
    if is_there and STAMP.exists() and STAMP.read_text() == sources:
        return 0
    print("Building the native front (Rust; the first time takes one to six minutes)", flush=True)
    maturin("develop", "--release")
    STAMP.write_text(sources)
    return 0


def build_wheel(folder: Path) -> int:
    """Build the wheel into a folder."""
    print(
        "Building the wheel of the native front (Rust; the first time takes one to six minutes)", flush=True
    )
    maturin("build", "--release", "--out", str(folder))
    return 0


def crates() -> list[str]:
    """Arguments for cargo: the crates that the front uses, but pyo3, which maturin compiles for the Python that it finds."""
    uses = tomllib.loads((CRATE / "Cargo.toml").read_text())["dependencies"]
    return [f"--package={name}" for name in uses if name != "pyo3"]


def check() -> int:
    """Format, clippy, tests."""
    steps = [
        ("fmt", "--check"),
        # Not with --release: maturin sets PYO3_PYTHON, so the next wheel would compile pyo3 and the front again.
        ("clippy", "--quiet", "--all-targets", "--", "--deny", "warnings"),
        ("test", "--quiet", "--no-default-features"),
    ]
    codes = [cargo(*step) for step in steps]
    return 1 if any(codes) else 0


def digest() -> str:
    """Stands for everything that the module is built of."""
    found = hashlib.sha256()
    fixed = (CRATE / name for name in ("Cargo.toml", "README.md", "pyproject.toml", "stepwell_front.pyi"))
    for path in [*fixed, *sorted((CRATE / "src").rglob("*.rs"))]:
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def maturin(command: str, *arguments: str) -> None:
    """Run a command of maturin in the crate, and show how far it is; its output is shown if it fails.

    Raises:
        CannotBuild: it fails, or there is no cargo, or no crates.
    """
    find_crates(working_cargo())
    front_cargo.maturin(command, *arguments, crate=CRATE, report=Progress())


class Progress:
    """Prints how many crates are compiled: on a terminal in one line, elsewhere a line each ten seconds."""

    def __init__(self) -> None:
        self._printed = time.monotonic()

    def __call__(self, compiled: int, total: int) -> None:
        """Print the numbers, unless it was done just now."""
        is_last = compiled == total - 1
        text = f"  {compiled} of {total} crates are compiled" + (
            ", the front itself is next" if is_last else ""
        )
        if sys.stdout.isatty():
            print(f"\r{text}", end="\n" if is_last else "", flush=True)
        elif is_last or time.monotonic() > self._printed + _REPORT_INTERVAL_S:
            self._printed = time.monotonic()
            print(text, flush=True)


def cargo(command: str, *arguments: str) -> int:
    """Run cargo in the crate; its exit code.

    Raises:
        CannotBuild: there is no cargo, or it has no crates.
    """
    program = working_cargo()
    if command != "fmt":
        find_crates(program)
    return subprocess.run([program, command, *arguments], cwd=CRATE, check=False).returncode


@functools.cache
def working_cargo() -> str:
    """Where cargo is.

    Raises:
        CannotBuild: it is not there, or does not run.
    """
    return front_cargo.working_cargo(CRATE)


@functools.cache
def find_crates(program: str) -> None:
    """Make sure that cargo finds the crates; on a Debian, install them if that is allowed.

    Raises:
        CannotBuild: they are nowhere.
    """
    try:
        front_cargo.find_crates(program, CRATE)
    except front_cargo.NoCrates as reason:
        if front_cargo.has_debian_crates():
            raise
        if problem := apt_get.refusal():
            packages = " ".join(front_cargo.PACKAGES)
            raise CannotBuild(f"{reason}: {problem}; as root: apt-get install {packages}") from None
        apt_get.install(front_cargo.PACKAGES, what="Debian's crates")
        front_cargo.find_crates(program, CRATE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
