"""Locks that allow one server per data directory."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from stepwell_server.clock import Clock
from stepwell_server.files import private_files
from stepwell_server.store.base import Holder, StoreBusy, StoreError
from stepwell_server.store.disk.files import is_same

LOCK_FILE = "server.lock"
READERS_FILE = "readers.lock"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_CONNECT_S = 1.0
_log = logging.getLogger(__name__)

_BYTES = 1024
"""Size of the file. Each description fills it, so that it covers the previous one."""


class DirectoryLock:
    """Exclusive use of a data directory, until `release` or the end of the process, however it ends.

    The kernel holds the lock (flock), so there are no stale locks; the content of the file is only for people. The
    file stays after the release: deleting it would allow two servers to lock two files of that name. The same could
    happen if somebody
    replaced the folder while it is locked. So on Linux a second lock is on the name, as an abstract socket, which
    nobody can delete.
    For one thread. A forked child shares the lock; a new process does not.
    """

    def __init__(self, directory: Path, *, clock: Clock) -> None:
        """Lock an existing directory.

        Raises:
            StoreBusy: another server has it.
            StoreError: it cannot be locked at all.
        """
        self._directory = directory
        self._holder = Holder(os.getpid(), socket.gethostname(), clock.now())
        self._folder = self._file = -1
        self._name: socket.socket | None = None
        try:
            self._file = self._locked()
            self._folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._name = _claim(directory)
        except BaseException:
            self.release()
            raise
        self._describe()

    def descriptors(self) -> list[tuple[Path, int]]:
        """The paths of folder and file with their open descriptors."""
        return [(self._directory, self._folder), (self._directory / LOCK_FILE, self._file)]

    def set_listen(self, listen: str) -> None:
        """Add this server's address to the file."""
        self._holder = dataclasses.replace(self._holder, listen=listen)
        self._describe()

    def release(self) -> None:
        """Release the directory. May be called again."""
        for descriptor in (self._folder, self._file):
            if descriptor >= 0:
                os.close(descriptor)
        self._folder = self._file = -1
        if self._name is not None:
            self._name.close()
            self._name = None

    def _locked(self) -> int:
        path = self._directory / LOCK_FILE
        while True:
            file = self._lock(path)
            if is_same(path, file):
                return file
            os.close(file)  # somebody replaced it before it was locked

    def _lock(self, path: Path) -> int:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(f"the data directory must be writable; {path}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            refused = self._refused(file, error)
            os.close(file)
            raise refused from error
        return file

    def _refused(self, file: int, error: OSError) -> StoreError:
        if not isinstance(error, BlockingIOError):
            return StoreError(f"the file system of {self._directory} must allow locks; {error.strerror}")
        holder = _read(file)
        return StoreBusy(
            f"data directory {self._directory} must be used by one server at a time;"
            f" it is used by {holder or 'another process'}",
            holder,
        )

    def _describe(self) -> None:
        # the text is informative only: a full disk must not keep a server from starting
        try:
            text = json.dumps(dataclasses.asdict(self._holder)).encode()
            os.pwrite(self._file, text.ljust(_BYTES), 0)
        except OSError:
            return


@contextlib.contextmanager
def read_lock(directory: Path) -> Iterator[None]:
    """Keep the files of a store in their places while another process than its server reads them."""
    with _readers(directory) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def try_write_lock(directory: Path) -> Iterator[bool]:
    """Try to get permission to replace the store's files; yields False while a process reads them."""
    with _readers(directory) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def _readers(directory: Path) -> Iterator[int]:
    private_files.ensure_file(directory / READERS_FILE)
    file = os.open(directory / READERS_FILE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


def holder_of(directory: Path) -> Holder | None:
    """Return the process that uses a directory. Does not touch the lock, so that no start is disturbed.

    None: there is none, or the system does not list locks as Linux does.
    """
    try:
        inode = (directory / LOCK_FILE).stat().st_ino
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        file = os.open(directory / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        holder = _read(file)
    finally:
        os.close(file)
    # The device is not compared: some file systems show another one there.
    pids = [int(fields[4]) for fields in locks if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}")]
    if not pids:
        return None
    return holder if holder is not None and holder.pid in pids else Holder(pids[0], socket.gethostname(), 0.0)


def _claim(directory: Path) -> socket.socket | None:
    """Lock the name of a folder, whatever folder has this name; None if the system cannot.

    Raises:
        StoreBusy: a server that started with another folder of this name holds it.
    """
    if sys.platform != "linux":
        return None
    path = directory.resolve()
    if _is_mount_point(path):
        # Nobody can remove a mount point, and with private mounts its name may mean a different folder for each
        # service.
        return None
    parent = path.parent.stat()
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]
    # The parent by its inode number: a path may mean different folders in different containers.
    address = f"\0stepwell/{parent.st_dev:x}/{parent.st_ino:x}/{name}"
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(address)
        claim.listen()  # so that others can query its owner
    except OSError as error:
        claim.close()
        if error.errno != errno.EADDRINUSE:
            return None
    else:
        return claim
    pid, user = _owner(address)
    if user not in (-1, 0, os.geteuid()):
        _log.warning(
            "process %d of user %d holds the lock name of data directory %s, but is not a server",
            pid,
            user,
            directory,
        )
        return None
    raise StoreBusy(
        f"data directory {directory} must be used by one server at a time; process {pid if pid > 0 else '?'}"
        " still runs with a folder of this name that was removed or replaced",
        None,
    )


def _is_mount_point(path: Path) -> bool:
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return path.is_mount()  # which does not recognize bind mounts on the same disk
    escaped = (
        os.fspath(path)
        .replace("\\", "\\134")
        .replace(" ", "\\040")
        .replace("\t", "\\011")
        .replace("\n", "\\012")
    )
    return any(mount.split(" ")[4] == escaped for mount in mounts)


def _owner(address: str) -> tuple[int, int]:
    """Return the process and user that hold a socket's address; -1 if unknown."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_S)
        probe.connect(address)
        found = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, user, _ = _CREDENTIALS.unpack(found)
        return pid, user
    return -1, -1


def _read(file: int) -> Holder | None:
    """Read the holder's description; None if it is missing or unreadable."""
    try:
        found = json.loads(os.pread(file, _BYTES, 0))
        return Holder(int(found["pid"]), str(found["host"]), float(found["since"]), str(found["listen"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
