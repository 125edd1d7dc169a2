"""The token that protects metrics: a file of one line, read at the start and again after each change."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Self

from stepwell_server.errors import StartError
from stepwell_server.files import private_files
from stepwell_server.files.stamp import stamp
from stepwell_server.logs import Log

_log = Log("metrics")
_MIN_CHARACTERS, _MAX_BYTES = 16, 4096
_SCHEME = "bearer"


class MetricsToken:
    """Checks the token of a scrape. For any thread."""

    def __init__(self, path: Path, read_at: tuple[int, ...], digest: bytes) -> None:
        self._path = path
        self._known = read_at, digest

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read the file.

        Raises:
            StartError: it cannot be used.
        """
        read_at = stamp(path)
        return cls(path, read_at, _read(path))

    def allows(self, authorization: str) -> bool:
        """Whether a request's Authorization header has the token. The time of the comparison reveals nothing about it."""
        scheme, _, shown = authorization.partition(" ")
        known = self._current()
        # Digests have the same length, whatever was sent.
        fits = hmac.compare_digest(_digest(shown.strip().encode("latin-1", "replace")), known)
        return fits and scheme.lower() == _SCHEME

    def _current(self) -> bytes:
        read_at, digest = self._known
        now = stamp(self._path)
        if now != read_at:
            try:
                digest = _read(self._path)
                _log.info("reloaded the token of metrics")
            except StartError as error:
                _log.warning("the changed token cannot be used, the old one stays valid", reason=str(error))
            self._known = now, digest
        return digest


def _read(path: Path) -> bytes:
    rule = "--metrics-token-file: must hold a token"
    try:
        private_files.require_secret(path)
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except private_files.NotPrivateError as error:
        raise StartError(f"--metrics-token-file: {error}") from error
    except OSError as error:
        raise StartError(f"{rule}; {path}: {error.strerror}") from error
    token = content.strip()
    is_plain = all(33 <= byte <= 126 for byte in token)
    if not is_plain or not _MIN_CHARACTERS <= len(token) <= _MAX_BYTES:
        raise StartError(
            f"{rule}: one line of {_MIN_CHARACTERS} to {_MAX_BYTES} ASCII characters without spaces (for example from "
            f"'openssl rand -hex 32'); {path} contains something else"
        )
    return _digest(token)


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
