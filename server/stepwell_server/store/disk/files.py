"""Checks that the files of a store are still where they were opened, and explains errors of their disk."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

from stepwell_server.errors import StoreGone
from stepwell_server.files import private_files
from stepwell_server.store.base import StoreError

#: Errors that mean that a file was removed. Others (EACCES, EIO) can also come from an existing file.
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP})
_ZEROS = bytes(1 << 20)
#: LMDB reports a partial write as EIO. If less than this is free, the reason is a full disk.
_FULL_BYTES = 2**20


class OpenFiles:
    """Files and folders that must stay where they are while the server uses them.

    A deleted file can still be written without an error, and its content is lost. So paths are compared with open
    descriptors. The descriptors stay open, or a new file could get the same inode number.
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
        """Stop watching, because the descriptors are about to be closed."""
        with self._lock:
            self._files.clear()

    @property
    def is_gone(self) -> bool:
        """A file was removed or replaced: nothing may be written any more."""
        return bool(self._reason)

    def require(self) -> None:
        """Raise if `check` found a file removed or replaced. Does not access the disk.

        Raises:
            StoreGone: the server must end.
        """
        if self._reason:
            raise StoreGone(self._reason)

    def check(self) -> None:
        """Check each path, in a few microseconds.

        Raises:
            StoreGone: a path no longer leads to the opened file. This is final, even if the file comes back.
        """
        if not self._reason:
            with self._lock:
                problems = (_problem(path, descriptor) for path, descriptor in self._files.items())
                self._reason = next(filter(None, problems), "")
        self.require()

    def give_up(self, reason: str) -> None:
        """Make `require` raise from now on."""
        self._reason = self._reason or reason


def is_same(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file; True if unknown."""
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
    return f"{rule}; it was replaced by something else"


def free_bytes(folder: Path) -> int:
    """Return how many bytes this process can still use on a folder's disk; 0 if unknown."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return 0
    return disk.f_bavail * disk.f_frsize


def explain(error: Exception, folder: Path) -> str:
    """Explain an error of LMDB or the system, in particular a full disk of `folder`."""
    text, free = str(error), free_bytes(folder)
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and any(
        os.strerror(code) in text for code in (errno.EFBIG, errno.EIO)
    ):
        return f"no room: a file of this process must stay within {limit} bytes, its RLIMIT_FSIZE ({text})"
    if os.strerror(errno.ENOSPC) in text or (free < _FULL_BYTES and os.strerror(errno.EIO) in text):
        return f"no room: the disk of {folder} is full, {free} bytes are free ({text})"
    return text


def allocate(descriptor: int, start: int, end: int) -> None:
    """Allocate the blocks of a range of a file. The content afterwards is undefined.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, start, end - start)
        return
    write_zeros(descriptor, start, end)


def write_zeros(descriptor: int, start: int, end: int) -> None:
    """Overwrite a range of a file with zeros.

    Raises:
        OSError: there is no room.
    """
    while start < end:
        start += os.pwrite(descriptor, _ZEROS[: end - start], start)


@contextlib.contextmanager
def start_errors(path: Path, folder: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Convert errors while opening the store in `folder` of a data directory into a `StoreError`."""
    try:
        yield
    except private_files.NotPrivateError as error:
        raise StoreError(str(error)) from error
    except (FileExistsError, NotADirectoryError) as error:
        on_the_way = (*reversed(path.parents), path, folder)
        file = next((at for at in on_the_way if os.path.lexists(at) and not at.is_dir()), path)
        raise StoreError(f"the data directory {path} must be a folder; {file} is not") from error
    except (OSError, *kinds) as error:  # type: ignore[misc]  # mypy does not unpack types
        raise StoreError(
            f"the data directory {path} must hold a store that can be opened: {explain(error, path)}"
        ) from error
