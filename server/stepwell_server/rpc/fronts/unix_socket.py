"""The file of a Unix socket: whether it can be had, whose it is, and its end."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator


def clear(path: str) -> None:
    """Make room for a socket: a file that a server has left behind, and on which nobody listens, is removed.

    Raises:
        OSError: there can be none; `strerror` says why.
    """
    if is_left_behind(path):
        os.unlink(path)


def is_left_behind(path: str) -> bool:
    """Whether there is a file on which nobody listens any more.

    Raises:
        OSError: there can be no socket; `strerror` says why.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        if not os.access(os.path.dirname(path), os.W_OK | os.X_OK):
            raise OSError(errno.ENOENT, "its folder does not exist or cannot be written") from None
        return False
    if not stat.S_ISSOCK(mode):
        what = "folder" if stat.S_ISDIR(mode) else "file that is no socket"
        raise OSError(errno.EADDRINUSE, f"there is a {what}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except FileNotFoundError:  # its server has removed it this moment
            return False
        except BlockingIOError:  # so many wait for its server that there is no room for one more
            raise _in_use() from None
        else:
            raise _in_use()


def _in_use() -> OSError:
    return OSError(errno.EADDRINUSE, "it is in use: a server listens there")


@contextlib.contextmanager
def private() -> Iterator[None]:
    """Sockets that are bound in here are the user's own: mode 0600."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def bind(path: str, backlog: int) -> socket.socket:
    """Listen there; without blocking.

    Raises:
        OSError: it cannot be; `strerror` says why.
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
    """The file that was made by binding a socket."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._made = self._identity()

    def _identity(self) -> tuple[int, int, int]:
        found = os.lstat(self._path)
        # a file that is removed leaves its number to the next one
        return found.st_dev, found.st_ino, found.st_mtime_ns

    def remove(self) -> None:
        """Remove it, unless another server has put its own there."""
        with contextlib.suppress(FileNotFoundError):
            if self._identity() == self._made:
                os.unlink(self._path)
