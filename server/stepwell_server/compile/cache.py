"""Where compiled programs are kept: files of `program_file`, named by the content that made them."""

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

#: Raise it when the compiler makes something else of the same model.
COMPILE_VERSION = 5
#: Its entries, what is unfinished, the key.
HOLDS = (f"*{program_file.SUFFIX}", ".*")
_KEY, _KEY_BYTES = ".key", 32
_log = Log("compile")
_PACKAGES = ("tensorflow", "keras", "ai-edge-litert", "numpy")


def key_of(content: bytes, imports: Sequence[str], options: ProofOptions | None = None) -> str:
    """Hash all that a program is made from: the file (by its SHA-256), the versions, the imported modules' source, the options.

    The processor is part of it: kernels are chosen by what it can do, and which batch sizes give the same
    bits was found out on it.

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
    """Return the file of a program in the cache, whether it is there or not."""
    return cache_dir / f"{key}{program_file.SUFFIX}"


def make(folder: Path) -> None:
    """Have a folder for the cache that only this user can use: who can write it decides what runs.

    Raises:
        OSError: others can, or it cannot be made.
    """
    private_files.make_folder(folder, HOLDS)


def load(file: Path) -> Program | None:
    """Return the program in an entry of the cache, or None if there is none, it is damaged, or not of this cache's making.

    What a program's fingerprint says of its weights nobody can see from the program. So an entry counts only with the
    seal that `publish` gave it: another entry under its name, or one that was changed together with its digests, is none.
    """
    try:
        with archive_rules.open_archive(file) as archive:
            sealed = archive.comment, _seal(file, archive.read(program_file.MANIFEST))
        if not hmac.compare_digest(*sealed):
            _log.warning(
                "an entry of the cache was not made here, or was changed: it is made anew", entry=str(file)
            )
            return None
        return program_file.load(file, sys.maxsize, is_own=True)
    except (OSError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile):
        return None  # Whatever is wrong with it, it is compiled again.


def _seal(entry: Path, manifest: bytes) -> bytes:
    """What only who can read the cache's key can say of an entry. The manifest has the digests of all else that is in it.

    Raises:
        OSError: there is no key.
    """
    key = entry.with_name(_KEY).read_bytes()
    return hmac.digest(key, entry.name.encode() + b"\0" + manifest, "sha256").hex().encode()


def _require_key(folder: Path) -> None:
    """Have a key in the cache's folder. Of several processes that make one, all use the first one's."""
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
    """Give the name of a file in an empty folder beside an entry of the cache, and remove what is left of both."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:12]}-", dir=target.parent))
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(file: Path, target: Path) -> Program:
    """Make a finished ``file`` the entry ``target``, in one go. If another process was faster, its entry is as good.

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
    """Return the source files of a module, a package's all. Nothing is imported: it may load TensorFlow.

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
