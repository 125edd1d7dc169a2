"""Files of exported sessions, as `sessions.proto` describes them: written and read one session at a time."""

from __future__ import annotations

import datetime as dt
import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from google.protobuf.message import DecodeError

from stepwell.errors import InvalidInputError
from stepwell.v1 import sessions_pb2

_NAME, _FORMAT = b"STPWLS", 1
_MAGIC = _NAME + b"%d\n" % _FORMAT
_HEAD = struct.Struct("<II")
#: A message of protobuf has less than this.
_MOST_BYTES = 2**31


class Writer:
    """Writes a file beside the one that it is to be, which it replaces when all of it is there. A context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Begin a file.

        Raises:
            OSError: It cannot be written; names the path.
        """
        self._path = Path(path)
        self._sessions = 0
        with _names(self._path):
            descriptor, self._temporary = tempfile.mkstemp(dir=self._path.parent, prefix=".stepwell-")
        self._file: IO[bytes] = os.fdopen(descriptor, "wb")

    def __enter__(self) -> Self:
        try:
            self._file.write(_MAGIC)
            start = sessions_pb2.ExportFileStart(release=metadata.version("stepwell"))
            start.created_time.FromDatetime(dt.datetime.now(dt.UTC))
            self._add(sessions_pb2.ExportFileEntry(start=start))
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with _names(self._path):
                    end = sessions_pb2.ExportFileEnd(sessions=self._sessions)
                    self._add(sessions_pb2.ExportFileEntry(end=end))
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._file.close()
                    os.replace(self._temporary, self._path)
        finally:
            self._file.close()
            Path(self._temporary).unlink(missing_ok=True)

    def add(self, sessions: Iterable[sessions_pb2.ExportedSession]) -> None:
        """Write sessions.

        Raises:
            OSError: They cannot be written; names the path.
        """
        with _names(self._path):
            for session in sessions:
                self._add(sessions_pb2.ExportFileEntry(session=session))
                self._sessions += 1

    def _add(self, entry: sessions_pb2.ExportFileEntry) -> None:
        message = entry.SerializeToString()
        self._file.write(_HEAD.pack(len(message), zlib.crc32(message)) + message)


def read(path: str | os.PathLike[str]) -> Iterator[sessions_pb2.ExportedSession]:
    """The sessions of a file, which is looked through to its end before the first one comes.

    Raises:
        InvalidInputError: It is no file of sessions, or it is not as it was written.
        OSError: It cannot be read; names the path.
    """
    with Path(path).open("rb") as file:
        count = sum(1 for _ in _sessions(file, path))
        file.seek(0)
        yield from _sessions(file, path)
    del count


def _sessions(file: IO[bytes], path: str | os.PathLike[str]) -> Iterator[sessions_pb2.ExportedSession]:
    _require_format(file.read(len(_MAGIC)), path)
    count = 0
    for number, entry in enumerate(_entries(file, path)):
        kind = entry.WhichOneof("entry")
        if (kind == "start") is not (number == 0):
            raise _damaged(path, file.tell(), f"entry {number} must not be {kind or 'of another kind'}")
        if kind == "session":
            count += 1
            yield entry.session
        elif kind == "end":
            if entry.end.sessions != count or file.read(1):
                raise _damaged(
                    path, file.tell(), f"it must end after {entry.end.sessions} sessions; it has others"
                )
            return
        elif kind is None:
            raise _damaged(path, file.tell(), "a later release wrote it")
    raise _damaged(path, file.tell(), "its end is missing: it was cut off")


def _require_format(start: bytes, path: str | os.PathLike[str]) -> None:
    if start == _MAGIC:
        return
    version = start.removeprefix(_NAME).removesuffix(b"\n")
    if start.startswith(_NAME) and version.isdigit():
        raise InvalidInputError(
            f"{os.fspath(path)} must be a file of exported sessions of format {_FORMAT}; it is of {int(version)}, which another"
            " release wrote"
        )
    raise InvalidInputError(f"{os.fspath(path)} must be a file of exported sessions; it begins otherwise")


def _entries(file: IO[bytes], path: str | os.PathLike[str]) -> Iterator[sessions_pb2.ExportFileEntry]:
    while head := file.read(_HEAD.size):
        at = file.tell() - len(head)
        if len(head) < _HEAD.size:
            raise _damaged(path, at, "it was cut off")
        length, checksum = _HEAD.unpack(head)
        message = file.read(length) if length < _MOST_BYTES else b""
        if len(message) < length:
            raise _damaged(path, at, f"an entry must have {length} bytes; {len(message)} are left")
        if zlib.crc32(message) != checksum:
            raise _damaged(path, at, "the checksum of an entry is wrong")
        try:
            yield sessions_pb2.ExportFileEntry.FromString(message)
        except DecodeError:
            raise _damaged(path, at, "an entry is no message") from None


def _damaged(path: str | os.PathLike[str], at: int, problem: str) -> InvalidInputError:
    return InvalidInputError(
        f"{os.fspath(path)} must be a file of exported sessions as it was written; at byte {at}: {problem}"
    )


class _names:  # noqa: N801
    """Lets an `OSError` name the file that the caller knows, not the temporary one. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(self._path)) from None
