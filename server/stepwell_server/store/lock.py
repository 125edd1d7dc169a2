"""One server per data directory."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from stepwell_server.clock import Clock
from stepwell_server.store.base import StoreBusy, StoreError

LOCK_FILE = "server.lock"
_BYTES = 1024
"""Of the file: what is written last covers what was there before."""


@dataclasses.dataclass(frozen=True, slots=True)
class Holder:
    """Who uses a data directory."""

    pid: int
    host: str
    since: float
    """Seconds since the epoch."""
    listen: str = ""
    """The address it serves at, if it is known."""

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).isoformat(timespec="seconds")
        where = f", listening at {self.listen}" if self.listen else ""
        return f"process {self.pid} on {self.host}, since {since}{where}"


class DirectoryLock:
    """The exclusive use of a data directory, until `release` or until the process ends, however it ends.

    The kernel holds the lock (flock), so there is no stale one: what the file says is only for people. The
    file stays when the lock is released; deleting it would let two servers hold two files of that name.
    Not for use by several threads. A forked child shares the lock; a process that is started anew does not.
    """

    def __init__(self, directory: Path, *, clock: Clock, listen: str = "") -> None:
        """Lock a directory that exists.

        Raises:
            StoreBusy: another server has it.
            StoreError: it cannot be locked at all.
        """
        self._directory = directory
        self._holder = Holder(os.getpid(), socket.gethostname(), clock.now(), listen)
        self._file = self._locked()
        self._describe()

    def set_listen(self, listen: str) -> None:
        """Say at which address this server listens, once that is known."""
        self._holder = dataclasses.replace(self._holder, listen=listen)
        self._describe()

    def release(self) -> None:
        """Let others have the directory. May be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _locked(self) -> int:
        path = self._directory / LOCK_FILE
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


def _read(file: int) -> Holder | None:
    """What the holder wrote; None if it has not yet, or if it makes no sense."""
    try:
        found = json.loads(os.pread(file, _BYTES, 0))
        return Holder(int(found["pid"]), str(found["host"]), float(found["since"]), str(found["listen"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
