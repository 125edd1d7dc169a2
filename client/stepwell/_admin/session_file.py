"""Files of exported sessions: files of records (`_admin.record_file`) that contain only sessions.

START has the time and the release of the SDK that wrote the file. The name of a session is its id; with a tenant it
is the tenant, 0x1F and the id. The record is opaque here.
"""

from __future__ import annotations

import datetime as dt
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from stepwell._admin import record_file
from stepwell._admin.record_file import Format, Kind, RecordFileError
from stepwell.errors import InvalidInputError
from stepwell.v1 import sessions_pb2

FORMAT = Format("sessions", 2, "a file of exported sessions")
_SEPARATOR = "\x1f"


class Writer:
    """Writes a temporary file that replaces the target once it is complete. A context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Begins a file.

        Raises:
            OSError: It cannot be written; the error names the path.
        """
        self._path = Path(path)
        with _names(self._path):
            descriptor, self._temporary = tempfile.mkstemp(dir=self._path.parent, prefix=".stepwell-")
        self._file: IO[bytes] = os.fdopen(descriptor, "wb")

    def __enter__(self) -> Self:
        from importlib import metadata  # imports twenty modules

        try:
            start = {"release": metadata.version("stepwell"), "created": dt.datetime.now(dt.UTC).isoformat()}
            self._entries = record_file.Writer(self._file, FORMAT, start)
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
                    self._entries.end()
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._file.close()
                    os.replace(self._temporary, self._path)
        finally:
            self._file.close()
            Path(self._temporary).unlink(missing_ok=True)

    def add(self, sessions: Iterable[sessions_pb2.ExportedSession]) -> None:
        """Writes sessions.

        Raises:
            OSError: They cannot be written; the error names the path.
        """
        with _names(self._path):
            for session in sessions:
                tenant = f"{session.tenant}{_SEPARATOR}" if session.tenant else ""
                self._entries.put(Kind.SESSION, f"{tenant}{session.session_id}".encode(), session.record)


def read(path: str | os.PathLike[str]) -> Iterator[sessions_pb2.ExportedSession]:
    """The sessions of a file, which is checked completely before the first one is returned.

    Raises:
        InvalidInputError: It is not a file of sessions only, or is corrupt.
        OSError: It cannot be read; the error names the path.
    """
    with Path(path).open("rb") as file:
        try:
            for _ in _sessions(file):
                pass
            file.seek(0)
            yield from _sessions(file)
        except RecordFileError as error:
            raise InvalidInputError(f"{os.fspath(path)} {error}") from None


def _sessions(file: IO[bytes]) -> Iterator[sessions_pb2.ExportedSession]:
    for entry in record_file.read(file, FORMAT):
        if entry.kind is Kind.SESSION:
            tenant, _, session_id = entry.name.decode(errors="replace").rpartition(_SEPARATOR)
            yield sessions_pb2.ExportedSession(session_id=session_id, record=entry.record, tenant=tenant)
        elif entry.kind is not Kind.START:
            raise FORMAT.damaged(f"it must have sessions alone; it has a {entry.kind.name.lower()}", entry.at)


class _names:  # noqa: N801
    """Makes an `OSError` name the file that the caller knows, not the temporary one. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(self._path)) from None
