"""One server per data directory."""

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
"""Of the file: what is written last covers what was there before."""


class DirectoryLock:
    """The exclusive use of a data directory, until `release` or until the process ends, however it ends.

    The kernel holds the lock (flock), so there is no stale one: what the file contains is only for people. The
    file stays when the lock is released; deleting it would let two servers hold two files of that name. Where others
    replace the folder while it is locked that would be so all the same: on Linux a second lock is therefore on the
    name, as an abstract socket, which nobody can delete.
    Not for use by several threads. A forked child shares the lock; a new process does not.
    """

    def __init__(self, directory: Path, *, clock: Clock) -> None:
        """Lock a directory that exists.

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
        """The folder and the file, as long as they are locked."""
        return [(self._directory, self._folder), (self._directory / LOCK_FILE, self._file)]

    def set_listen(self, listen: str) -> None:
        """Say at which address this server listens, once that is known."""
        self._holder = dataclasses.replace(self._holder, listen=listen)
        self._describe()

    def release(self) -> None:
        """Let others have the directory. May be called again."""
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
            os.close(file)  # it was replaced before it was locked

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
            f" {holder or 'another process'} has it",
            holder,
        )

    def _describe(self) -> None:
        # a full disk must not keep a server from starting: the text is a courtesy
        try:
            text = json.dumps(dataclasses.asdict(self._holder)).encode()
            os.pwrite(self._file, text.ljust(_BYTES), 0)
        except OSError:
            return


@contextlib.contextmanager
def read_lock(directory: Path) -> Iterator[None]:
    """Hold the files of a store in their places while they are read beside its server."""
    with _readers(directory) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def try_write_lock(directory: Path) -> Iterator[bool]:
    """Permission to replace the store's files; False while a process reads them."""
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
    """The process that uses a directory, found without touching the lock, so that no start is disturbed.

    None: there is none, or the system does not list locks, as Linux does.
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
    # The device is not compared: some file systems have another one there than files have.
    pids = [int(fields[4]) for fields in locks if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}")]
    if not pids:
        return None
    return holder if holder is not None and holder.pid in pids else Holder(pids[0], socket.gethostname(), 0.0)


def _claim(directory: Path) -> socket.socket | None:
    """Hold the name of a folder, whatever is there under that name; None where the system cannot.

    Raises:
        StoreBusy: a server has it that began with another folder of that name.
    """
    if sys.platform != "linux":
        return None
    path = directory.resolve()
    if _is_mount_point(path):
        # Nobody can remove it; and where services have mounts of their own its name may mean another folder to each.
        return None
    parent = path.parent.stat()
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]
    # The parent by its number: a path may mean different folders in different containers.
    address = f"\0stepwell/{parent.st_dev:x}/{parent.st_ino:x}/{name}"
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(address)
        claim.listen()  # so that others can ask for its owner
    except OSError as error:
        claim.close()
        if error.errno != errno.EADDRINUSE:
            return None
    else:
        return claim
    pid, user = _owner(address)
    if user not in (-1, 0, os.geteuid()):
        _log.warning(
            "process %d of user %d holds the name of %s; it cannot be a server's", pid, user, directory
        )
        return None
    raise StoreBusy(
        f"data directory {directory} must be used by one server at a time; process {pid if pid > 0 else '?'} began"
        " with a folder of this name, which was removed or replaced meanwhile, and still runs",
        None,
    )


def _is_mount_point(path: Path) -> bool:
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return path.is_mount()  # which does not know mounts of a folder of the same disk
    escaped = (
        os.fspath(path)
        .replace("\\", "\\134")
        .replace(" ", "\\040")
        .replace("\t", "\\011")
        .replace("\n", "\\012")
    )
    return any(mount.split(" ")[4] == escaped for mount in mounts)


def _owner(address: str) -> tuple[int, int]:
    """Process and user that hold a socket's address; -1 where the system does not say."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_S)
        probe.connect(address)
        found = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, user, _ = _CREDENTIALS.unpack(found)
        return pid, user
    return -1, -1


def _read(file: int) -> Holder | None:
    """What the holder wrote; None if it has not yet, or if it makes no sense."""
    try:
        found = json.loads(os.pread(file, _BYTES, 0))
        return Holder(int(found["pid"]), str(found["host"]), float(found["since"]), str(found["listen"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
