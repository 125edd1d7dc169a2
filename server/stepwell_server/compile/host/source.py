"""A user's file, of which a worker gets a copy to compile; the worker reads nothing else.

So the compiled content is that whose hash was looked up in the cache, even if the file changes meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.keras_file import configuration, origin
from stepwell_server.files import archive_rules

_PIECE_BYTES = 1 << 20
_CONFIGURATION = "config.json"
_MEMBERS = [_CONFIGURATION, "metadata.json", "model.weights.h5"]
_UNREADABLE = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, struct.error)
_KINDS = {
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Source:
    """An open user file. For one thread at a time."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._sha256: bytes | None = None

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return os.fstat(self._descriptor).st_size

    def sha256(self) -> bytes:
        """Read it and return its SHA-256.

        Raises:
            ModelError: it was changed meanwhile, or cannot be read.
        """
        if self._sha256 is None:
            self._sha256 = self._read(None)
        return self._sha256

    def configuration(self) -> bytes | None:
        """Return its ``config.json``, if the file contains exactly the members that Keras writes.

        Otherwise None: the worker reports the problem.
        """
        try:
            with (
                os.fdopen(os.dup(self._descriptor), "rb") as file,
                archive_rules.open_archive_in(file) as archive,
            ):
                archive_rules.check_members(archive)
                if sorted(archive.namelist()) != _MEMBERS:
                    return None
                member = archive.getinfo(_CONFIGURATION)
                # Not compressed, so that its declared size is correct.
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > configuration.MAX_BYTES:
                    return None
                return archive.read(member)
        except _UNREADABLE:
            return None

    def copy(self, target: Path) -> None:
        """Copy the content whose digest `sha256` returned.

        Raises:
            ModelError: it was changed since, cannot be read, or cannot be copied.
        """
        wanted = self.sha256()
        try:
            with target.open("xb") as file:
                found = self._read(file.fileno())
        except OSError as error:
            raise ModelError(
                f"{self.path}: cannot be copied to {target.parent} for the compiler: {error.strerror}"
            ) from error
        if found != wanted:
            raise self._changed()

    def _read(self, target: int | None) -> bytes:
        """Read the whole file, and write it to ``target`` if that is given."""
        before = self._state()
        digest, place = hashlib.sha256(), 0
        while place < before[0] and (piece := self._piece(place)):  # It may grow faster than it is read.
            digest.update(piece)
            place += len(piece)
            while target is not None and piece:
                piece = piece[os.write(target, piece) :]
        if self._state() != before:
            raise self._changed()
        return digest.digest()

    def _piece(self, place: int) -> bytes:
        try:
            return os.pread(self._descriptor, _PIECE_BYTES, place)
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read: {error.strerror}") from error

    def _state(self) -> tuple[int, int, int]:
        now = os.fstat(self._descriptor)
        return now.st_size, now.st_mtime_ns, now.st_ctime_ns

    def _changed(self) -> ModelError:
        return ModelError(
            f"{self.path}: the file changed while it was read; write a model under another name in the same folder, and "
            "rename it when it is complete"
        )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Source]:
    """Open a user's file, without blocking on a pipe or device.

    Raises:
        ModelError: it does not exist, is not a regular file, or cannot be read.
    """
    try:
        # Opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"{path}: {_open_problem(path, error)}") from error
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind == stat.S_IFDIR:
            raise ModelError(f"{path}: {origin.folder_problem(path)}")
        if kind != stat.S_IFREG:
            raise ModelError(f"{path}: must be a file; it is {_KINDS.get(kind, 'something else')}")
        yield Source(path, descriptor)
    finally:
        os.close(descriptor)


def _open_problem(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOENT and path.is_symlink():
        return f"is a symbolic link to {os.readlink(path)}, and there is no such file"
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return "there is no such file"
    if error.errno == errno.ELOOP:
        return "is a symbolic link that leads back to itself"
    if error.errno == errno.ENXIO:  # from opening a socket
        return f"must be a file; it is {_KINDS[stat.S_IFSOCK]}"
    return f"cannot be read: {error.strerror}"
