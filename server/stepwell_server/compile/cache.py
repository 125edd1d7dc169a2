"""The cache of compiled programs: files of `program_file`, named by a hash of their inputs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import importlib.machinery
import os
import platform
import secrets
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from stepwell_server import program_file
from stepwell_server.compile.errors import ModelError
from stepwell_server.files import archive_rules, private_files
from stepwell_server.logs import Log
from stepwell_server.program import Program, ProofOptions

#: Raise it when the compiler produces a different program from the same model.
COMPILE_VERSION = 18
#: Name patterns of its entries, unfinished files, and the key.
HOLDS = (f"*{program_file.SUFFIX}", ".*")
_KEY, _KEY_BYTES = ".key", 32
_log = Log("compile")
_PACKAGES = ("tensorflow", "keras", "ai-edge-litert", "onnx", "onnxruntime", "numpy")


def key_of(content: bytes, imports: Sequence[str], options: ProofOptions | None = None) -> str:
    """Hash all inputs of a program: the file (its SHA-256), the versions, the sources of imported modules, the options.

    The processor is included: its features determine the kernels, and the batch sizes with identical bits were
    measured on it.

    Raises:
        ModelError: there is no such module.
    """
    digest = hashlib.sha256(f"{program_file.VERSION} {COMPILE_VERSION}\n".encode())
    for package in _PACKAGES:
        digest.update(f"{package} {version_of(package)}\n".encode())
    digest.update(_processor().encode())
    digest.update(sources_of(imports))
    digest.update(f"{options or ProofOptions()}\n".encode())
    digest.update(content)
    return digest.hexdigest()


def sources_of(imports: Sequence[str]) -> bytes:
    """Return digests of the imported modules' source.

    Raises:
        ModelError: there is no such module.
    """
    return b"".join(
        f"{module} {file.name}\n".encode() + hashlib.sha256(file.read_bytes()).digest()
        for module in imports
        for file in module_files(module)
    )


def entry(cache_dir: Path, key: str) -> Path:
    """Return the path of a program in the cache, whether or not it exists."""
    return cache_dir / f"{key}{program_file.SUFFIX}"


def make(folder: Path) -> None:
    """Create the folder of the cache, private to this user: anybody who can write there decides what runs.

    Raises:
        OSError: other users can access it, or it cannot be created.
    """
    private_files.make_folder(folder, HOLDS)


def load(file: Path) -> Program | None:
    """Return the program of a cache entry; None if it is missing, corrupt, or was not written by this cache.

    A program does not prove that its fingerprint belongs to its weights. So an entry is valid only with the seal from
    `publish`, which detects a renamed entry, and one that was changed together with its digests.
    """
    try:
        with archive_rules.open_archive(file) as archive:
            sealed = archive.comment, _seal(file, archive.read(program_file.MANIFEST))
        if not hmac.compare_digest(*sealed):
            _log.warning(
                "an entry of the compile cache was changed or comes from elsewhere; the model is compiled again",
                entry=str(file),
            )
            return None
        return program_file.load(file, sys.maxsize, is_own=True)
    except (OSError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile):
        return None  # Whatever the reason, the model is compiled again.


def _seal(entry: Path, manifest: bytes) -> bytes:
    """Return the seal of an entry, which requires the cache's key. The manifest has the digests of all other members.

    Raises:
        OSError: there is no key.
    """
    key = entry.with_name(_KEY).read_bytes()
    return hmac.digest(key, entry.name.encode() + b"\0" + manifest, "sha256").hex().encode()


def _require_key(folder: Path) -> None:
    """Create the cache's key if it is missing. If several processes do so, all use the first key."""
    if (folder / _KEY).exists():
        return
    fresh = folder / f"{_KEY}-{secrets.token_hex(8)}"
    private_files.replace(fresh, secrets.token_bytes(_KEY_BYTES))
    try:
        with contextlib.suppress(FileExistsError):
            os.link(fresh, folder / _KEY)
    finally:
        fresh.unlink()


@contextlib.contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """Yield the path of a file in a temporary folder next to a cache entry, and remove the folder afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:12]}-", dir=target.parent))
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(file: Path, target: Path) -> Program:
    """Move a finished ``file`` to the entry ``target`` atomically. If another process was faster, both entries are equal.

    Raises:
        OSError: the cache cannot be written.
    """
    try:
        program = program_file.load(file, sys.maxsize, is_own=True)
    except program_file.ProgramFileError as error:
        raise OSError(f"{file}: {error}") from error
    _require_key(target.parent)
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = _seal(target, archive.read(program_file.MANIFEST))
    os.chmod(file, private_files.FILE_MODE)
    os.replace(file, target)
    return program


def module_files(module: str) -> list[Path]:
    """Return the source files of a module or package. Imports nothing, because that may load TensorFlow.

    Raises:
        ModelError: there is no such module.
    """
    path = [os.getcwd(), *sys.path]
    spec = None
    parts = module.split(".")
    for end, part in enumerate(parts, 1):
        # `part` alone: with a full name, a folder without __init__.py wants its parent to be imported
        spec = importlib.machinery.PathFinder.find_spec(part, path)
        if spec is None:
            name = ".".join(parts[:end])
            raise ModelError(f"--import {module}: there is no module {name!r} here or on the Python path")
        path = list(spec.submodule_search_locations or ())
    if spec is not None and spec.submodule_search_locations:
        return sorted(
            file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.py")
        )
    return [Path(spec.origin)] if spec is not None and spec.origin else []


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # Not Linux.
        return f"{platform.machine()} {platform.processor()}\n"
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {features}\n"


@functools.cache
def version_of(package: str) -> str:
    """Return the version of an installed distribution, or "none"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
