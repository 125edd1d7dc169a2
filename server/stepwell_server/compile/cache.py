"""Where compiled programs are kept: by the content that made them, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from stepwell_server.compile.errors import ModelError
from stepwell_server.program import FORMAT, Program, ProofOptions

#: Raise it when the compiler makes something else of the same model.
COMPILE_VERSION = 4
_PACKAGES = ("tensorflow", "keras", "ai-edge-litert", "numpy")
_DIGESTS = "digests.json"


def cache_key(model: Path, imports: Sequence[str], options: ProofOptions | None = None) -> str:
    """Hash all that a program is made from: the file, the versions, the imported modules' source, the options.

    The processor is part of it: kernels are chosen by what it can do, and which batch sizes give the same
    bits was found out on it.

    Raises:
        ModelError: the file cannot be read, or there is no such module.
    """
    digest = hashlib.sha256(f"{FORMAT} {COMPILE_VERSION}\n".encode())
    for package in _PACKAGES:
        digest.update(f"{package} {_version(package)}\n".encode())
    digest.update(_processor().encode())
    for module in imports:
        for file in module_files(module):
            digest.update(f"{module} {file.name}\n".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    digest.update(f"{options or ProofOptions()}\n".encode())
    digest.update(_file_digest(model))
    return digest.hexdigest()


def load(folder: Path) -> Program | None:
    """Return the program in ``folder``, or None if there is none or it is damaged."""
    try:
        expected: dict[str, str] = json.loads((folder / _DIGESTS).read_text())
        if any(_file_digest(folder / name).hex() != value for name, value in expected.items()):
            return None
        return Program.load(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # Whatever is wrong with it, it is compiled again.


@contextlib.contextmanager
def workspace(cache_dir: Path, key: str) -> Iterator[Path]:
    """Give an empty folder beside the cache's entries, and remove what is left of it."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{key[:12]}-", dir=cache_dir))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path) -> Program:
    """Move a finished ``folder`` to ``target`` in one go; if another process was faster, take its entry.

    Raises:
        OSError: the cache cannot be written.
    """
    files = (file for file in folder.rglob("*") if file.is_file())
    digests = {str(file.relative_to(folder)): _file_digest(file).hex() for file in files}
    (folder / _DIGESTS).write_text(json.dumps(digests, indent=1))
    for _ in range(10):
        with contextlib.suppress(OSError):  # Taken: by a whole entry, or by a damaged one.
            os.rename(folder, target)
        program = load(target)
        if program is not None:
            return program
        _remove(target)
    raise OSError(f"{target}: cannot be written")


def module_files(module: str) -> list[Path]:
    """Return the source files of a module, a package's all. Nothing is imported: it may load TensorFlow.

    Raises:
        ModelError: there is no such module.
    """
    path: Sequence[str] | None = [os.getcwd(), *sys.path]
    spec = None
    for end in range(1, len(module.split(".")) + 1):
        name = ".".join(module.split(".")[:end])
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None:
            raise ModelError(f"--import {module}: there is no module {name!r} here or on the Python path")
        path = spec.submodule_search_locations
    if spec is not None and spec.submodule_search_locations:
        return sorted(
            file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.py")
        )
    return [Path(spec.origin)] if spec is not None and spec.origin else []


def _remove(target: Path) -> None:
    # Renamed first: another process must never see it half removed.
    doomed = tempfile.mkdtemp(prefix=".damaged-", dir=target.parent)
    with contextlib.suppress(OSError):  # Another process did it.
        os.rename(target, Path(doomed) / "entry")
    shutil.rmtree(doomed, ignore_errors=True)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # Not Linux.
        return f"{platform.machine()} {platform.processor()}\n"
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {features}\n"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _file_digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
