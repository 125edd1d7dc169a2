"""What is built, and what it says of itself."""

from __future__ import annotations

import re
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    pyproject = tomllib.loads((root / "pyproject.toml").read_text())
    table: dict[str, Any] = pyproject["project"]
    return table


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: Path, project: dict[str, Any]) -> None:
    names = contents(wheel)
    top = {name.split("/", maxsplit=1)[0] for name in names}
    assert top == {"stepwell", "stepwell_server", f"stepwell-{project['version']}.dist-info"}
    assert not [name for name in names if "/test_" in name or name.endswith((".pyc", ".proto", ".keras"))]


def test_the_wheel_is_typed_and_has_the_generated_code_and_the_licence(wheel: Path) -> None:
    names = contents(wheel)
    assert {"stepwell/py.typed", "stepwell_server/py.typed"} <= names
    assert {
        "stepwell/v1/__init__.py",
        "stepwell/v1/sessions_pb2.py",
        "stepwell/v1/sessions_pb2_grpc.pyi",
    } <= names
    assert [name for name in names if name.endswith("/licenses/LICENSE")]


def test_pytest_finds_the_plugin(wheel: Path, project: dict[str, Any]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"stepwell-{project['version']}.dist-info/entry_points.txt").decode()
    assert "[pytest11]\nstepwell = stepwell.pytest_plugin\n" in text
    assert "stepwell/pytest_plugin.py" in contents(wheel)


def test_every_package_of_the_tree_is_in_the_wheel(wheel: Path, root: Path) -> None:
    sources = {
        path.relative_to(root / folder).as_posix()
        for folder, package in (("client", "stepwell"), ("server", "stepwell_server"))
        for path in (root / folder / package).rglob("*.py")
    }
    assert sources - contents(wheel) == set()


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(
    build: Callable[[str, Path], Path], wheel: Path, root: Path, tmp_path: Path
) -> None:
    with tarfile.open(build("sdist", root)) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert contents(build("wheel", unpacked)) == contents(wheel)
    assert (unpacked / "proto" / "stepwell" / "v1" / "sessions.proto").is_file()


def test_the_version_is_the_same_everywhere(root: Path, project: dict[str, Any]) -> None:
    newest = re.search(r"^## \[(\d[^\]]*)\]", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == project["version"] == metadata.version("stepwell")


def test_the_client_needs_no_machine_learning_framework(project: dict[str, Any]) -> None:
    names = {re.split(r"[^A-Za-z0-9-]", line, maxsplit=1)[0] for line in project["dependencies"]}
    assert names == {
        "click",
        "googleapis-common-protos",
        "grpcio",
        "numpy",
        "protobuf",
        "psutil",
        "rich",
        "safetensors",
    }
