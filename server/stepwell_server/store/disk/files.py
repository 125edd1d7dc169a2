"""Whether the files of a store are still where they were opened, and what an error of their disk means."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

from stepwell_server.errors import StoreGone
from stepwell_server.files import private_files
from stepwell_server.store.base import StoreError

#: A file that is there and cannot be looked at (EACCES, EIO) says nothing: only these say that it is gone.
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP})
#: macOS: there fsync hands data to the drive, which may keep them in a cache of its own.
_FULL_FLUSH: int | None = getattr(fcntl, "F_FULLFSYNC", None)
_ZEROS = bytes(1 << 20)
#: LMDB reports a write of which only a part fitted in as EIO; with less room than this it was the disk that is full.
_FULL_BYTES = 2**20


class OpenFiles:
    """Files and folders that must stay where they are while the server uses them.

    A deleted file can still be written without an error, and its content is lost. So the
    paths are compared with the open descriptors; the descriptors stay open, else a new file could have the same number.
    Safe for threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[Path, int] = {}
        self._reason = ""

    def add(self, path: Path, descriptor: int) -> None:
        """Watch a path that was opened as `descriptor`, which must stay open until `forget`."""
        with self._lock:
            self._files[path] = descriptor

    def forget(self) -> None:
        """Watch nothing any more: the descriptors are about to be closed."""
        with self._lock:
            self._files.clear()

    @property
    def is_gone(self) -> bool:
        """Nothing must be written any more."""
        return bool(self._reason)

    def require(self) -> None:
        """Refuse to continue without a file that `check` found to be gone. This looks at no file.

        Raises:
            StoreGone: the server must end.
        """
        if self._reason:
            raise StoreGone(self._reason)

    def check(self) -> None:
        """Look at each path; some microseconds for each.

        Raises:
            StoreGone: one is not what was opened. It stays so, whatever comes back.
        """
        if not self._reason:
            with self._lock:
                problems = (_problem(path, descriptor) for path, descriptor in self._files.items())
                self._reason = next(filter(None, problems), "")
        self.require()

    def give_up(self, reason: str) -> None:
        """Make `require` refuse from now on."""
        self._reason = self._reason or reason


def is_same(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file; True if that is not known."""
    return not _problem(path, descriptor)


def _problem(path: Path, descriptor: int) -> str:
    rule = f"{path} must stay where it is while a server uses it"
    try:
        found = os.stat(path)
    except OSError as error:
        return f"{rule}; it was removed or renamed ({error.strerror})" if error.errno in _GONE else ""
    opened = os.fstat(descriptor)
    if (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino):
        return ""
    return f"{rule}; something else is in its place"


def free_bytes(folder: Path) -> int:
    """How many bytes of a folder's disk are free for this process; 0 if that is not known."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return 0
    return disk.f_bavail * disk.f_frsize


def explain(error: Exception, folder: Path) -> str:
    """What an error of LMDB or of the system means; a full disk of `folder` is named as such."""
    text, free = str(error), free_bytes(folder)
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and any(
        os.strerror(code) in text for code in (errno.EFBIG, errno.EIO)
    ):
        return f"no room: a file of this process must stay within {limit} bytes, its RLIMIT_FSIZE ({text})"
    if os.strerror(errno.ENOSPC) in text or (free < _FULL_BYTES and os.strerror(errno.EIO) in text):
        return f"no room: the disk of {folder} is full, {free} bytes are free ({text})"
    return text


def flush(path: Path) -> None:
    """Flush the content of a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush_open(descriptor)
    finally:
        os.close(descriptor)


def flush_open(descriptor: int) -> None:
    """As `flush`, of an open file.

    Raises:
        OSError: the disk refused.
    """
    if _FULL_FLUSH is not None:
        with contextlib.suppress(OSError):  # a file system that does not know it
            fcntl.fcntl(descriptor, _FULL_FLUSH)
            return
    os.fsync(descriptor)


def flush_content(descriptor: int) -> None:
    """As `flush_open`, without metadata such as the time of the last change."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        flush_open(descriptor)


def allocate(descriptor: int, start: int, end: int) -> None:
    """Allocate the blocks of a part of a file; its content afterwards does not matter.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, start, end - start)
        return
    write_zeros(descriptor, start, end)


def write_zeros(descriptor: int, start: int, end: int) -> None:
    """Overwrite a part of a file.

    Raises:
        OSError: there is no room.
    """
    while start < end:
        start += os.pwrite(descriptor, _ZEROS[: end - start], start)


def flush_folders(*folders: Path) -> None:
    """A file survives the loss of power only if the folders that name it do."""
    for folder in folders:
        flush(folder)


@contextlib.contextmanager
def start_errors(path: Path, folder: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of some kinds, when the store in `folder` of a data directory is opened, into a `StoreError`."""
    try:
        yield
    except private_files.NotPrivateError as error:
        raise StoreError(str(error)) from error
    except (FileExistsError, NotADirectoryError) as error:
        on_the_way = (*reversed(path.parents), path, folder)
        file = next((at for at in on_the_way if os.path.lexists(at) and not at.is_dir()), path)
        raise StoreError(f"the data directory {path} must be a folder; {file} is none") from error
    except (OSError, *kinds) as error:  # type: ignore[misc]  # mypy does not unpack types
        raise StoreError(
            f"the data directory {path} must hold a store that can be opened: {explain(error, path)}"
        ) from error
