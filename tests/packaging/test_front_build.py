"""The build backend of stepwell-front: what it builds where cargo, or its crates, are missing. With cargo: test_production_page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

HOOK = "import json, sys, front_backend; print('\\n' + json.dumps(getattr(front_backend, sys.argv[1])(*sys.argv[2:])))"
#: What each of these programs does in the place of cargo, and the reason that the build gives.
CARGOS = {
    "": "cargo is not installed",
    "echo 'error: rustup could not choose a version of cargo to run' >&2; exit 1": (
        "cargo does not run (error: rustup could not choose a version of cargo to run)"
    ),
    "echo 'cargo 1.63.0 (fd9c4297c 2022-07-01)'": "cargo must be 1.82 or newer; 1.63.0 is installed",
}
NO_CRATES = """case "$1" in --version) echo 'cargo 1.95.0';; *) echo '[6] Could not resolve hostname' >&2; exit 101;; esac"""


def environment(folder: Path, cargo: str) -> dict[str, str]:
    """An environment whose PATH has this cargo at most."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    if cargo:
        (programs / "cargo").write_text(f"#!/bin/sh\n{cargo}\n")
        (programs / "cargo").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name != "REQUIRE_NATIVE_FRONT"}
    return {**kept, "PATH": str(programs), "PYTHONDONTWRITEBYTECODE": "1"}


def hook(
    sources: Path, name: str, *arguments: object, within: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HOOK, name, *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=sources,
        env={**within, "PYTHONPATH": str(sources / "backend")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def result(done: subprocess.CompletedProcess[str]) -> object:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def sources(root: Path) -> Path:
    return root / "server" / "front"


@pytest.mark.parametrize("cargo", CARGOS)
def test_without_a_working_cargo_there_is_a_wheel_that_says_why(
    sources: Path, tmp_path: Path, cargo: str
) -> None:
    within = environment(tmp_path, cargo)
    assert result(hook(sources, "get_requires_for_build_wheel", within=within)) == []
    name = result(hook(sources, "build_wheel", tmp_path, within=within))
    assert name == "stepwell_front-0.1.0-py3-none-any.whl"
    imported = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            f"import sys; sys.path[:0] = [{str(tmp_path / name)!r}]; import stepwell_front",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert imported.stderr.splitlines()[-1] == (
        f"ImportError: the installed stepwell-front has no native module: {CARGOS[cargo]}"
    )


def test_without_its_crates_too(sources: Path, tmp_path: Path) -> None:
    # a Debian without the packages
    fake = tmp_path / "sources"
    pack(sources, fake)
    module = fake / "backend" / "front_cargo.py"
    module.write_text(module.read_text().replace("/usr/share/cargo/registry", str(tmp_path / "none")))
    done = hook(fake, "build_wheel", tmp_path, within=environment(tmp_path, NO_CRATES))
    assert result(done) == "stepwell_front-0.1.0-py3-none-any.whl"
    assert (
        "cargo does not reach its registry ([6] Could not resolve hostname), and Debian's packages of the crates are not"
        " all installed"
    ) in done.stderr


def pack(sources: Path, target: Path) -> None:
    """Unpack the archive of the sources into a folder that is not there yet."""
    packed = target.with_name("packed")
    packed.mkdir()
    within = environment(packed, "")
    name = result(hook(sources, "build_sdist", packed, within=within))
    with tarfile.open(packed / str(name)) as archive:
        archive.extractall(packed, filter="data")
    (packed / "stepwell_front-0.1.0").rename(target)


def test_it_fails_where_the_native_front_is_required(sources: Path, tmp_path: Path) -> None:
    within = {**environment(tmp_path, ""), "REQUIRE_NATIVE_FRONT": "1"}
    for name, *arguments in (["get_requires_for_build_wheel"], ["build_wheel", tmp_path]):
        done = hook(sources, str(name), *arguments, within=within)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].endswith(
            "REQUIRE_NATIVE_FRONT is set, and the native front cannot be built: cargo is not installed"
        )
    assert not list(tmp_path.glob("*.whl"))


def test_the_archive_of_the_sources_has_what_builds_them(sources: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    pack(sources, unpacked)
    assert {path.name for path in unpacked.iterdir()} == {
        *(
            "Cargo.toml",
            "LICENSE",
            "PKG-INFO",
            "README.md",
            "backend",
            "pyproject.toml",
            "rustfmt.toml",
            "src",
        ),
        "stepwell_front.pyi",
    }
    assert not (unpacked / "LICENSE").is_symlink()
    assert {path.name for path in (unpacked / "src").iterdir()} == {
        path.name for path in (sources / "src").iterdir()
    }
    before = sorted(unpacked.rglob("*"))
    name = result(hook(unpacked, "build_wheel", tmp_path, within=environment(tmp_path, "")))
    assert sorted(unpacked.rglob("*")) == before  # a build writes nothing among the sources
    with zipfile.ZipFile(tmp_path / str(name)) as wheel:
        metadata = wheel.read("stepwell_front-0.1.0.dist-info/METADATA").decode()
    assert metadata == (unpacked / "PKG-INFO").read_text()
    assert "Name: stepwell-front\nVersion: 0.1.0\n" in metadata


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "editable"])
def test_pip_installs_it_without_cargo_and_without_a_network(
    sources: Path, tmp_path: Path, kind: str
) -> None:
    """Pip needs nothing to build it: maturin is asked for only where it can be used."""
    target = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", target], check=True, timeout=200)
    pip = [sys.executable, "-m", "pip", "--python", str(target / "bin" / "python"), "install", "--no-index"]
    command = [*pip, *(["--editable"] if kind == "editable" else []), str(sources)]
    within = environment(tmp_path, "")
    done = subprocess.run(command, env=within, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    imported = subprocess.run(
        [target / "bin" / "python", "-c", "import stepwell_front"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert imported.stderr.splitlines()[-1].endswith("has no native module: cargo is not installed")


def test_make_front_says_what_the_server_does_without_cargo_and_where_it_comes_from(
    root: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(root / "scripts" / "front.py"), "--check"],
        env=environment(tmp_path, ""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stdout == (
        "No native front: cargo is not installed. The server uses the front in Python, which is slower and serves this"
        " machine only. Cargo comes with https://rustup.rs, or on Debian as root: apt-get install cargo; then: make front\n"
    )


def test_make_crates_compiles_what_the_front_uses_without_an_environment(
    root: Path, sources: Path, tmp_path: Path
) -> None:
    noted = tmp_path / "noted"
    done = subprocess.run(
        [sys.executable, "-S", str(root / "scripts" / "front.py"), "--crates"],
        env=environment(tmp_path, f"echo \"$*\" >> '{noted}'; echo 'cargo 1.95.0'"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    command, *packages = noted.read_text().splitlines()[-1].split(" --package=")
    assert command == "build --quiet --release"
    uses = tomllib.loads((sources / "Cargo.toml").read_text())["dependencies"]
    assert sorted([*packages, "pyo3"]) == sorted(uses)
