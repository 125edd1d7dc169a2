"""The build backend of stepwell-front (PEP 517, PEP 660): maturin where cargo works, else a wheel without the module.

Without the module the server uses its front in Python, so a missing cargo does not fail the installation. The wheel is
pure then, and importing `stepwell_front` raises an ImportError with the reason, which the server shows. With
REQUIRE_NATIVE_FRONT set, the build fails instead.

The native module is built in a copy of the sources: nothing is written into them, so they may be read-only.
CARGO_TARGET_DIR keeps what was compiled for the next build, as always with cargo.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

from front_cargo import CannotBuild, find_crates, maturin, working_cargo

#: Hooks run in the folder of pyproject.toml, which is this one's parent.
SOURCES = Path(__file__).resolve().parent.parent
MATURIN = "maturin>=1.9,<2"
Settings = Mapping[str, object] | None
_FILES = ("Cargo.toml", "LICENSE", "README.md", "pyproject.toml", "rustfmt.toml", "stepwell_front.pyi")
#: The date of every file in the wheel without the module, so that the same sources give the same bytes.
_DATE = (1980, 1, 1, 0, 0, 0)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What a build needs: maturin, unless the module cannot be built anyway."""
    try:
        with tempfile.TemporaryDirectory(prefix="stepwell-front-") as folder:
            crate = _copy(Path(folder))
            find_crates(working_cargo(crate), crate)
    except CannotBuild as reason:
        _fall_back(reason)
        return []
    return [MATURIN]


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    """Nothing: an archive of the sources is made without maturin."""
    return []


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    """Write the folder of metadata; its name."""
    folder = Path(metadata_directory) / f"{_stem()}.dist-info"
    (folder / "licenses").mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(_metadata())
    (folder / "licenses" / "LICENSE").write_bytes((SOURCES / "LICENSE").read_bytes())
    return folder.name


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Build the wheel into a folder, with the native module if that can be; its file name.

    Raises:
        CannotBuild: the module cannot be built, and REQUIRE_NATIVE_FRONT is set.
    """
    try:
        return _build_native(Path(wheel_directory))
    except CannotBuild as reason:
        _fall_back(reason)
        return _build_without(Path(wheel_directory), str(reason))


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Pack the sources; the file name of the archive."""
    with tempfile.TemporaryDirectory(prefix="stepwell-front-") as folder:
        crate = _copy(Path(folder))
        shutil.copytree(SOURCES / "backend", crate / "backend", ignore=shutil.ignore_patterns("__pycache__"))
        (crate / "PKG-INFO").write_text(_metadata())
        path = Path(sdist_directory) / f"{_stem()}.tar.gz"
        with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
            archive.add(crate, _stem())
    return path.name


# An installation from a clone is no different from any other: a change of the Rust sources needs a build either way.
get_requires_for_build_editable = get_requires_for_build_wheel
prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel
build_editable = build_wheel


def _build_native(target: Path) -> str:
    """Build the wheel with the module; its file name.

    Raises:
        CannotBuild: there is no cargo, no crates, no maturin, or it does not compile.
    """
    with tempfile.TemporaryDirectory(prefix="stepwell-front-") as folder:
        crate, out = _copy(Path(folder)), Path(folder) / "out"
        find_crates(working_cargo(crate), crate)
        # for the machine that builds it: no policy about older C libraries applies
        options = ("--release", "--compatibility", "linux", "--interpreter", sys.executable)
        maturin("build", *options, "--out", str(out), crate=crate)
        (wheel,) = out.glob("*.whl")
        shutil.move(wheel, target / wheel.name)
        return wheel.name


def _build_without(target: Path, reason: str) -> str:
    """Write the wheel without the module; its file name."""
    name = f"{_stem()}-py3-none-any.whl"
    text = f"the installed stepwell-front has no native module: {reason}"
    module = f'"""Stands in for the native front, which was not built."""\n\nraise ImportError({text!r}, name=__name__)\n'
    info = f"{_stem()}.dist-info"
    tags = "Wheel-Version: 1.0\nGenerator: front_backend\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {
        "stepwell_front/__init__.py": module.encode(),
        f"{info}/METADATA": _metadata().encode(),
        f"{info}/WHEEL": tags.encode(),
        f"{info}/licenses/LICENSE": (SOURCES / "LICENSE").read_bytes(),
    }
    record = io.StringIO()
    for path, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.write(f"{path},sha256={digest},{len(data)}\n")
    record.write(f"{info}/RECORD,,\n")
    files[f"{info}/RECORD"] = record.getvalue().encode()
    with zipfile.ZipFile(target / name, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, data in files.items():
            entry = zipfile.ZipInfo(path, _DATE)
            entry.external_attr = 0o100644 << 16
            wheel.writestr(entry, data)
    return name


def _copy(folder: Path) -> Path:
    """A copy of the crate, without what was compiled, in a new folder of that folder."""
    crate = folder / "crate"
    crate.mkdir()
    for name in _FILES:
        shutil.copyfile(SOURCES / name, crate / name)  # LICENSE may be a link to that of the clone
    shutil.copytree(SOURCES / "src", crate / "src")
    return crate


def _fall_back(reason: CannotBuild) -> None:
    """Say that there will be no module; installers show it with --verbose.

    Raises:
        CannotBuild: this is not allowed.
    """
    if os.environ.get("REQUIRE_NATIVE_FRONT"):
        raise CannotBuild(f"REQUIRE_NATIVE_FRONT is set, and the native front cannot be built: {reason}")
    print(f"stepwell-front is built without its native module: {reason}", file=sys.stderr, flush=True)


def _stem() -> str:
    return f"stepwell_front-{_version()}"


def _version() -> str:
    return str(tomllib.loads((SOURCES / "Cargo.toml").read_text())["package"]["version"])


def _metadata() -> str:
    project = tomllib.loads((SOURCES / "pyproject.toml").read_text())["project"]
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {_version()}",
        f"Summary: {project['description']}",
        *(f"Author: {author['name']}" for author in project["authors"]),
        f"License-Expression: {project['license']}",
        *(f"License-File: {name}" for name in project["license-files"]),
        *(f"Classifier: {classifier}" for classifier in project["classifiers"]),
        f"Requires-Python: {project['requires-python']}",
        "Description-Content-Type: text/markdown",
        "",
        (SOURCES / project["readme"]).read_text(),
    ]
    return "\n".join(lines)
