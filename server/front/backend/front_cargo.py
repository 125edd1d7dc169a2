"""Finds what builds the native front: cargo, and the crates it needs, in cargo's registry or in Debian's packages.

    python3 server/front/backend/front_cargo.py     print Debian's packages of the crates

The build backend beside this module and `scripts/front.py` use it. It installs nothing and downloads no Rust.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path

#: The crates in Cargo.toml, which Debian has as librust-*-dev packages.
CRATES = (
    *("bytes", "flate2", "h2", "http", "hyper", "hyper-util", "libc", "proptest", "pyo3", "ring", "rustls"),
    *("serde", "serde_json", "tokio", "tokio-rustls", "x509-parser"),
)
PACKAGES = [f"librust-{name.replace('_', '-')}-dev" for name in CRATES]
DEBIAN_CRATES = Path("/usr/share/cargo/registry")
FROM_DEBIAN = f"""\
# Written by the build of stepwell-front.
[source.crates-io]
replace-with = "debian"
[source.debian]
directory = "{DEBIAN_CRATES}"
[net]
offline = true
"""
Report = Callable[[int, int], None]
"""Called with the crates compiled so far and the number of all."""


class CannotBuild(Exception):
    """The native front cannot be built here; the message is the reason, without a full stop."""


class NoCrates(CannotBuild):
    """There is a cargo, but neither its registry nor Debian's packages have the crates."""


def working_cargo(crate: Path) -> str:
    """The path of cargo.

    Raises:
        CannotBuild: it is missing, too old, or rustup's stand-in without a toolchain for this user.
    """
    program = shutil.which("cargo")
    if program is None:
        raise CannotBuild("cargo is not installed")
    tried = subprocess.run([program, "--version"], cwd=crate, capture_output=True, text=True, check=False)
    if tried.returncode:
        first = tried.stderr.strip().splitlines()[:1]
        raise CannotBuild(f"cargo does not run ({' '.join(first) or 'no error message'})")
    found = re.search(r"\d+\.\d+(\.\d+)?", tried.stdout)
    needed = str(tomllib.loads((crate / "Cargo.toml").read_text())["package"]["rust-version"])
    if found and _numbers(found[0]) < _numbers(needed):
        raise CannotBuild(f"cargo must be {needed} or newer; {found[0]} is installed")
    return program


def find_crates(program: str, crate: Path) -> None:
    """Make sure that cargo, when it runs in the folder `crate`, finds every crate.

    Cargo's registry is tried first. If Debian's packages serve instead, `.cargo/config.toml` in that folder says so,
    and stays in force there for as long as they are installed.

    Raises:
        NoCrates: neither has them.
    """
    config = crate / ".cargo" / "config.toml"
    if config.exists() and has_debian_crates():
        return
    config.unlink(missing_ok=True)
    problem = _fetch(program, crate)
    if not problem:
        return
    if not has_debian_crates():
        raise NoCrates(
            f"cargo does not reach its registry ({problem}), and Debian's packages of the crates are not all installed"
        )
    config.parent.mkdir(exist_ok=True)
    config.write_text(FROM_DEBIAN)
    (crate / "Cargo.lock").unlink(missing_ok=True)  # versions of the registry, which Debian may not have
    if problem := _fetch(program, crate):
        config.unlink()
        raise NoCrates(f"Debian's packages of the crates do not fit ({problem})")


def _fetch(program: str, crate: Path) -> str:
    """Have cargo fetch the crates; the reason if it cannot."""
    # Two attempts of ten seconds: a machine without the registry is to notice soon.
    limits = {"CARGO_NET_RETRY": "1", "CARGO_HTTP_TIMEOUT": "10"}
    done = subprocess.run(
        [program, "fetch", "--quiet"],
        cwd=crate,
        env={**limits, **os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return ""
    last = done.stderr.strip().splitlines()[-1:]
    return " ".join(last).strip() or "no error message"


def has_debian_crates() -> bool:
    """Every package is installed."""
    return all(any(DEBIAN_CRATES.glob(f"{name}-[0-9]*")) for name in CRATES)


def maturin(command: str, *arguments: str, crate: Path, report: Report | None = None) -> None:
    """Run a command of maturin in the crate; its output is printed if it fails.

    Raises:
        CannotBuild: maturin is missing, or fails.
    """
    # maturin finds by these the environment into which it installs, and pip
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    program = shutil.which("maturin", path=path)
    if program is None:
        raise CannotBuild("maturin is not installed")
    count = _count_crates(crate) if report else 0
    with subprocess.Popen(
        [program, command, "--verbose", *arguments],
        cwd=crate,
        env={**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as running:
        assert running.stdout is not None
        lines, compiled = [], set()
        for line in running.stdout:
            if re.match(r"\s+Running `", line):  # rustc's command lines, of thousands of characters
                continue
            lines.append(line)
            if report and (crate_line := re.match(r"\s+(?:Compiling|Fresh) (\S+ v\S+)", line)):
                compiled.add(crate_line[1])
                # a line appears when the work on a crate begins
                report(max(0, len(compiled) - 1), max(count, len(compiled)))
    if running.returncode:
        print("".join(lines), flush=True)
        errors = [line.strip() for line in lines if line.lstrip().startswith(("error", "💥"))]
        raise CannotBuild(f"it does not compile here ({errors[0] if errors else 'no error message'})")


def _count_crates(crate: Path) -> int:
    """The number of crates that a build compiles, the front itself included; 0 if cargo cannot list them."""
    listed = subprocess.run(
        ["cargo", "tree", "--edges", "normal,build", "--prefix", "none", "--format", "{p}"],
        cwd=crate,
        capture_output=True,
        text=True,
        check=False,
    )
    return len({" ".join(line.split()[:2]) for line in listed.stdout.splitlines() if line.strip()})


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


if __name__ == "__main__":
    print(" ".join(PACKAGES))
