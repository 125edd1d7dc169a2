"""The file of a Unix socket: checks that it can be created, creates it privately, and removes it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator


def clear(path: str) -> None:
    """Remove the file of a socket on which nobody listens any more.

    Raises:
        OSError: a socket cannot be created; `strerror` has the reason.
    """
    if is_left_behind(path):
        os.unlink(path)


def is_left_behind(path: str) -> bool:
    """Whether there is the file of a socket on which nobody listens any more.

    Raises:
        OSError: a socket cannot be created; `strerror` has the reason.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        if not os.access(os.path.dirname(path), os.W_OK | os.X_OK):
            raise OSError(errno.ENOENT, "its folder does not exist or is not writable") from None
        return False
    if not stat.S_ISSOCK(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "file that is not a socket"
        raise OSError(errno.EADDRINUSE, f"there is a {kind} of that name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except FileNotFoundError:  # its server has just removed it
            return False
        except BlockingIOError:  # its server's queue of connections is full
            raise _in_use() from None
        else:
            raise _in_use()


def _in_use() -> OSError:
    return OSError(errno.EADDRINUSE, "it is in use: a server listens on it")


@contextlib.contextmanager
def private() -> Iterator[None]:
    """Give sockets that are bound in this block the mode 0600."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def bind(path: str, backlog: int) -> socket.socket:
    """Return a non-blocking socket that listens at a path.

    Raises:
        OSError: it cannot be created; `strerror` has the reason.
    """
    clear(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with private():
            listener.bind(path)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


class SocketFile:
    """The file that binding a socket created."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._made = self._identity()

    def _identity(self) -> tuple[int, int, int]:
        found = os.lstat(self._path)
        # a new file may get the inode number of a removed one
        return found.st_dev, found.st_ino, found.st_mtime_ns

    def remove(self) -> None:
        """Remove the file, unless another server has replaced it."""
        with contextlib.suppress(FileNotFoundError):
            if self._identity() == self._made:
                os.unlink(self._path)
