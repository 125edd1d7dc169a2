"""The keys of a store: a file with one key per line. The first key encrypts, and all keys decrypt.

    # the key of the year
    2027 = 9o6ZpyQm...   32 bytes, as base64 or as 64 hex digits
    2026 = 0a1b2c...

Encrypted records name their key by its id. So an id must never be used for another key.

With a line `none` before all keys, the keys only decrypt. So all servers that share a store can learn a key before the
first of them uses it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import itertools
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from stepwell_server.files import private_files
from stepwell_server.store.base import KeyFileError
from stepwell_server.store.encryption.xaes import KEY_BYTES, Key

MAX_ID_BYTES = 32
_ID = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_ID_BYTES - 1}}}")
_CHECK_BYTES = 16
_NONE = "none"


class Keyring:
    """Keys by id; `first` is the id of the key that encrypts, or empty if none does."""

    def __init__(self, keys: Mapping[str, bytes], *, encrypts: bool = True) -> None:
        """If `encrypts` is false the keys only decrypt, and new records are not encrypted."""
        self.first = next(iter(keys)) if encrypts else ""
        self.keys = {key_id: Key(key) for key_id, key in keys.items()}
        self.checks = {
            key_id: hmac.digest(key, b"stepwell: which key this is", "sha256")[:_CHECK_BYTES]
            for key_id, key in keys.items()
        }
        """A digest of each key, which a store keeps to recognize the key. It does not reveal the key."""

    @property
    def first_check(self) -> dict[str, bytes]:
        """The check of the key that encrypts, if any."""
        return {self.first: self.checks[self.first]} if self.first else {}

    def require(self, used: Mapping[str, bytes]) -> None:
        """Require all keys that a store has used; `used` has their checks.

        Raises:
            KeyFileError: a key is missing or different.
        """
        missing = sorted(used.keys() - self.checks.keys())
        if missing:
            raise KeyFileError(
                f"the key file must have all keys that encrypt the store; it lacks {', '.join(missing)}"
            )
        for key_id, check in used.items():
            if not hmac.compare_digest(check, self.checks[key_id]):
                raise KeyFileError(
                    f"key {key_id} must be the key that encrypts the store; the key file has a different key with this id"
                )


def read_keys(path: Path) -> Keyring:
    """Read a key file.

    Raises:
        KeyFileError: it cannot be read, is not private, or is malformed.
    """
    text = _text(path)
    return Keyring(_parse(path, text), encrypts=not _begins_with_none(text))


def add_key(path: Path, key_id: str, *, is_last: bool = False) -> None:
    """Add a new key at the beginning of a key file, which is created if missing.

    With `is_last` the key is added at the end: it only decrypts until it is moved. A new file then begins with `none`.

    Raises:
        KeyFileError: the file cannot be used, or already has this id.
    """
    if not _ID.fullmatch(key_id):
        raise KeyFileError(f"{path}: {_id_rule()}; got {key_id!r}")
    there = _text(path) if path.exists() else ""
    if there and key_id in _parse(path, there):
        raise KeyFileError(f"{path} already has a key {key_id}: encrypted records name their key by this id")
    if not is_last and _begins_with_none(there):
        raise KeyFileError(
            f"{path} must not begin with none if a key is added first: delete that line, or add the key last"
        )
    line = f"{key_id} = {base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()}\n"
    before = there if not there or there.endswith("\n") else f"{there}\n"
    content = f"{before or f'{_NONE}{chr(10)}'}{line}" if is_last else line + there
    try:
        private_files.replace(path, content.encode())
    except OSError as error:
        raise KeyFileError(f"the key file {path} must be writable: {error.strerror}") from error


def unused_id(path: Path, wanted: str) -> str:
    """Return an id that is unused in a key file, which may be missing: `wanted`, or `wanted` with a number.

    Raises:
        KeyFileError: the file cannot be used.
    """
    there = _parse(path, _text(path)) if path.exists() else {}
    names = itertools.chain((wanted,), (f"{wanted}.{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in there)


def _text(path: Path) -> str:
    try:
        private_files.require_secret(path)
        return path.read_text()
    except private_files.NotPrivateError as error:
        raise KeyFileError(f"the key file {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise KeyFileError(f"the key file {path} must be readable: {reason}") from error


def _begins_with_none(text: str) -> bool:
    return next((line for _, line in _lines(text)), "") == _NONE


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Return the lines that are neither empty nor comments, with their numbers."""
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            yield number, stripped


def _parse(path: Path, text: str) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    lines = list(_lines(text))
    for number, line in lines[1:] if _begins_with_none(text) else lines:
        where = f"{path}, line {number}"
        key_id, separator, value = (part.strip() for part in line.partition("="))
        if not separator or not _ID.fullmatch(key_id):
            raise KeyFileError(
                f"{where}: a line must be ID = KEY (or none, before all keys), and {_id_rule()}"
            )
        key = _bytes_of(value)
        if key is None:
            raise KeyFileError(
                f"{where}: key {key_id} must be {KEY_BYTES} bytes, as base64 or as {2 * KEY_BYTES} hex digits"
            )
        if key_id in keys:
            raise KeyFileError(f"{where}: ids of keys must be unique; {key_id} is repeated")
        keys[key_id] = key
    if not keys:
        raise KeyFileError(f"the key file {path} must have at least one key; stepwell store new-key adds one")
    if len({hashlib.sha256(key).digest() for key in keys.values()}) < len(keys):
        raise KeyFileError(f"the keys in {path} must differ; two are the same")
    return keys


def _bytes_of(value: str) -> bytes | None:
    """Decode a key; None if it is malformed. The text never appears in a message."""
    try:
        key = bytes.fromhex(value) if len(value) == 2 * KEY_BYTES else base64.b64decode(value, validate=True)
    except (ValueError, binascii.Error):
        return None
    return key if len(key) == KEY_BYTES else None


def _id_rule() -> str:
    return f"an id must be 1 to {MAX_ID_BYTES} letters, digits, '.', '_' or '-', the first a letter or digit"
