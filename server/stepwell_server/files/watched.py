"""A configuration file of the operator that is read at the start, and again after a change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from stepwell_server.errors import StartError
from stepwell_server.files import private_files
from stepwell_server.files.stamp import stamp

T = TypeVar("T")
_MAX_BYTES = 64 << 20


class WatchedFile(Generic[T]):
    """The parsed content of a file, as of its last valid change. For one thread at a time.

    Args:
        option: The option of the file, for messages.
        path: The file.
        parse: Parses its text; a `ValueError` names the broken rule.
        is_private: Only its owner may read it. Only its owner may write it in any case.

    Raises:
        StartError: it cannot be used.
    """

    def __init__(
        self, option: str, path: Path, parse: Callable[[str], T], *, is_private: bool = False
    ) -> None:
        self._option = option
        self._path = path
        self._parse = parse
        self._is_private = is_private
        self._used = self._seen = stamp(path)
        self.value = self._read()
        """May be read by any thread."""

    def changed(self, *, at_once: bool = False) -> bool:
        """Check for a new value: the file has changed, and two checks found it equal. Otherwise it may still be written.

        Args:
            at_once: Read it now, because the operator says that it is complete.

        Raises:
            StartError: the changed file cannot be used, and the value stays; raised once per change.
        """
        now, seen = stamp(self._path), self._seen
        self._seen = now
        if not at_once and (now == self._used or now != seen):
            return False
        found: T | StartError
        try:
            found = self._read()
        except StartError as error:
            found = error
        if stamp(self._path) != now:
            return False  # it changed between the check and the read
        self._used = now
        if isinstance(found, StartError):
            raise found
        self.value = found
        return True

    def _read(self) -> T:
        try:
            check = private_files.require_secret if self._is_private else private_files.require_trusted
            check(self._path)
            with open(self._path, "rb") as file:
                raw = file.read(_MAX_BYTES + 1)
        except private_files.NotPrivateError as error:
            raise StartError(f"{self._option}: {error}") from error
        except OSError as error:
            raise self._error(f"must be a file that can be read; {error.strerror}") from error
        if len(raw) > _MAX_BYTES:
            raise self._error(f"must have at most {_MAX_BYTES} bytes")
        try:
            return self._parse(raw.decode())
        except UnicodeDecodeError as error:
            raise self._error("must be text in UTF-8") from error
        except ValueError as error:
            raise self._error(str(error)) from error

    def _error(self, rule: str) -> StartError:
        return StartError(f"{self._option}: {self._path}: {rule}")
