"""Build the native front and put it into this environment, or say why there is none.

    python scripts/front.py              build it if it is not there as it stands in server/front
    python scripts/front.py --check      format, clippy and the crate's own tests; fails if cargo is there and they do
    python scripts/front.py --wheel DIR  build the wheel of stepwell-front into a folder

Cargo does the work, called by maturin where a Python package comes of it. The crates come from cargo's registry; where
that is not reached, from Debian's librust-*-dev packages, which are installed if this is a Debian and we may. Without
cargo nothing is built, and the server uses the front in Python. Exit codes: 0 built or nothing to do, 3 there is no
native front, and 1 if --check finds it at fault, or if REQUIRE_NATIVE_FRONT is set and there is none.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CRATE = ROOT / "server" / "front"
#: Says of which sources the installed module was built.
STAMP = Path(sysconfig.get_path("platlib")) / "stepwell_front.sources"
#: Tells cargo in this folder where the crates are, whoever calls it; there only if they are Debian's.
CARGO_CONFIG = CRATE / ".cargo" / "config.toml"
#: Debian's packages of the crates in Cargo.toml.
CRATES = (
    *("bytes", "flate2", "h2", "http", "libc", "proptest", "pyo3", "ring", "rustls", "tokio"),
    *("tokio-rustls", "x509-parser"),
)
PACKAGES = [f"librust-{name}-dev" for name in CRATES]
DEBIAN_CRATES = Path("/usr/share/cargo/registry")
FROM_DEBIAN = f"""\
# Written by scripts/front.py.
[source.crates-io]
replace-with = "debian"
[source.debian]
directory = "{DEBIAN_CRATES}"
[net]
offline = true
"""
NO_FRONT = 3


class NoFront(Exception):
    """There can be no native front here, and why."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the native front.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="check and test the crate instead")
    what.add_argument("--wheel", metavar="DIR", type=Path, help="build the wheel into this folder instead")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            return check()
        if options.wheel:
            return build_wheel(options.wheel.absolute())
        return build()
    except NoFront as reason:
        print(f"No native front: {reason}. The server uses the front in Python, which is slower.")
        return 1 if "REQUIRE_NATIVE_FRONT" in os.environ else NO_FRONT


def build() -> int:
    """Build and install the module if its sources have changed."""
    sources = digest()
    is_there = importlib.util.find_spec("stepwell_front") is not None
    if is_there and STAMP.exists() and STAMP.read_text() == sources:
        return 0
    print("Building the native front (Rust; the first time takes a minute or two)", flush=True)
    maturin("develop", "--release")
    STAMP.write_text(sources)
    return 0


def build_wheel(folder: Path) -> int:
    """Build the wheel into a folder."""
    print("Building the wheel of the native front (Rust; the first time takes a minute or two)", flush=True)
    maturin("build", "--release", "--out", str(folder))
    return 0


def check() -> int:
    """Format, clippy, tests."""
    steps = [
        ("fmt", "--check"),
        ("clippy", "--release", "--quiet", "--all-targets", "--", "--deny", "warnings"),
        ("test", "--quiet", "--no-default-features"),
    ]
    codes = [cargo(*step) for step in steps]
    return 1 if any(codes) else 0


def digest() -> str:
    """Stands for everything that the module is built of."""
    found = hashlib.sha256()
    fixed = (CRATE / name for name in ("Cargo.toml", "pyproject.toml", "stepwell_front.pyi"))
    for path in [*fixed, *sorted((CRATE / "src").glob("*.rs"))]:
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def maturin(command: str, *arguments: str) -> None:
    """Let maturin do something with the crate; what it says is shown if it fails.

    Raises:
        NoFront: it fails, or there is no cargo, or no crates.
    """
    find_crates(working_cargo())
    # maturin looks for the environment into which it installs, and for pip, by these
    scripts = sysconfig.get_path("scripts")
    inside = {"VIRTUAL_ENV": sys.prefix, "PATH": os.pathsep.join((scripts, os.environ["PATH"]))}
    done = subprocess.run(
        [sys.executable, "-m", "maturin", command, *arguments],
        cwd=CRATE,
        env={**os.environ, **inside},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout, flush=True)
        raise NoFront("it does not build here, see above")


def cargo(command: str, *arguments: str) -> int:
    """Run cargo in the crate; its exit code.

    Raises:
        NoFront: there is no cargo, or it has no crates.
    """
    program = working_cargo()
    if command != "fmt":
        find_crates(program)
    return subprocess.run([program, command, *arguments], cwd=CRATE, check=False).returncode


@functools.cache
def working_cargo() -> str:
    """Where cargo is.

    Raises:
        NoFront: it is not there, or is rustup's stand-in for one that is not installed for this user.
    """
    program = shutil.which("cargo")
    if program is None:
        raise NoFront("cargo is not installed")
    tried = subprocess.run([program, "--version"], cwd=CRATE, capture_output=True, text=True, check=False)
    if tried.returncode:
        first = tried.stderr.strip().splitlines()[:1]
        raise NoFront(f"cargo does not run ({' '.join(first) or 'it says nothing'})")
    return program


@functools.cache
def find_crates(program: str) -> None:
    """Tell cargo where the crates are.

    Raises:
        NoFront: nowhere.
    """
    if has_debian_crates():
        use_debian_crates()
        return
    CARGO_CONFIG.unlink(missing_ok=True)
    # two attempts of ten seconds: who has no way to the registry is to know soon
    patience = {"CARGO_NET_RETRY": "1", "CARGO_HTTP_TIMEOUT": "10"}
    fetched = subprocess.run(
        [program, "fetch", "--quiet"],
        cwd=CRATE,
        env={**os.environ, **patience},
        capture_output=True,
        text=True,
        check=False,
    )
    if fetched.returncode == 0:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        last = fetched.stderr.strip().splitlines()[-1:]
        raise NoFront(f"cargo does not reach its registry ({' '.join(last).strip() or 'no reason given'})")
    print(f"Installing Debian's crates: {' '.join(PACKAGES)}", flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--quiet=2", "--no-install-recommends", *PACKAGES]
    for step in (install, ["apt-get", "update", "--quiet=2"], install):
        if (
            subprocess.run(step, env=quiet, stdout=subprocess.DEVNULL, check=False).returncode == 0
            and has_debian_crates()
        ):
            use_debian_crates()
            return
    raise NoFront("cargo does not reach its registry, and Debian's crates could not be installed")


def use_debian_crates() -> None:
    """Let cargo take Debian's crates instead of its registry's."""
    CARGO_CONFIG.parent.mkdir(exist_ok=True)
    CARGO_CONFIG.write_text(FROM_DEBIAN)


def has_debian_crates() -> bool:
    """Every package is there."""
    return all(any(DEBIAN_CRATES.glob(f"{package[8:-4]}-[0-9]*")) for package in PACKAGES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
