"""The keys of a store: a file of one key a line, of which the first encrypts and all decrypt.

    # the key of the year
    2027 = 9o6ZpyQm...   32 bytes, as base64 or as 64 hex digits
    2026 = 0a1b2c...

An id names a key for ever: what was encrypted says by which key. So no id is used for two keys.

`none` in a line of its own before all keys: they decrypt, and nothing is encrypted. So servers that share a store can all
know a key before the first of them uses it.
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
    """Keys by id; `first` is the id of the one that encrypts, or empty if none does."""

    def __init__(self, keys: Mapping[str, bytes], *, encrypts: bool = True) -> None:
        """With `encrypts` false all of them decrypt, and what is written stays plain."""
        self.first = next(iter(keys)) if encrypts else ""
        self.keys = {key_id: Key(key) for key_id, key in keys.items()}
        self.checks = {
            key_id: hmac.digest(key, b"stepwell: which key this is", "sha256")[:_CHECK_BYTES]
            for key_id, key in keys.items()
        }
        """What a store remembers of each key, to tell it from another of the same id. It says nothing of the key."""

    @property
    def first_check(self) -> dict[str, bytes]:
        """Of `checks` that of the key that encrypts, if one does."""
        return {self.first: self.checks[self.first]} if self.first else {}

    def require(self, used: Mapping[str, bytes]) -> None:
        """See that all keys are there that a store has used; `used` are their `checks`.

        Raises:
            KeyFileError: one is missing, or is another.
        """
        missing = sorted(used.keys() - self.checks.keys())
        if missing:
            raise KeyFileError(
                f"the key file must have all keys that the store was encrypted with; it lacks {', '.join(missing)}"
            )
        for key_id, check in used.items():
            if not hmac.compare_digest(check, self.checks[key_id]):
                raise KeyFileError(
                    f"key {key_id} must be the one that the store was encrypted with; the key file has another of that id"
                )


def read_keys(path: Path) -> Keyring:
    """Read a key file.

    Raises:
        KeyFileError: it cannot be read, is not private, or says something else than keys.
    """
    text = _text(path)
    return Keyring(_parse(path, text), encrypts=not _begins_with_none(text))


def add_key(path: Path, key_id: str, *, is_last: bool = False) -> None:
    """Put a new key before those of a key file, which is made if it is not there.

    With `is_last` it is put behind them: it decrypts, and encrypts nothing until it is moved. A file that is made so begins
    with `none`.

    Raises:
        KeyFileError: the file cannot be used, or has a key of that id.
    """
    if not _ID.fullmatch(key_id):
        raise KeyFileError(f"{path}: {_id_rule()}; got {key_id!r}")
    there = _text(path) if path.exists() else ""
    if there and key_id in _parse(path, there):
        raise KeyFileError(f"{path} has a key {key_id} already: what is encrypted names its key by that")
    if not is_last and _begins_with_none(there):
        raise KeyFileError(
            f"{path} must not begin with none for a key to be put first: take that line away, or put the key last"
        )
    line = f"{key_id} = {base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()}\n"
    before = there if not there or there.endswith("\n") else f"{there}\n"
    content = f"{before or f'{_NONE}{chr(10)}'}{line}" if is_last else line + there
    try:
        private_files.replace(path, content.encode())
    except OSError as error:
        raise KeyFileError(f"the key file {path} must be writable: {error.strerror}") from error


def unused_id(path: Path, wanted: str) -> str:
    """An id that no key of a file has, which need not be there: the one that is wanted, or one that begins so.

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
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise KeyFileError(f"the key file {path} must be readable: {reason}") from error


def _begins_with_none(text: str) -> bool:
    return next((said for _, said in _said(text)), "") == _NONE


def _said(text: str) -> Iterator[tuple[int, str]]:
    """The lines that say something, with their numbers."""
    for number, line in enumerate(text.splitlines(), 1):
        said = line.strip()
        if said and not said.startswith("#"):
            yield number, said


def _parse(path: Path, text: str) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    lines = list(_said(text))
    for number, said in lines[1:] if _begins_with_none(text) else lines:
        where = f"{path}, line {number}"
        key_id, separator, value = (part.strip() for part in said.partition("="))
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
            raise KeyFileError(f"{where}: there must be one key of an id; {key_id} comes again")
        keys[key_id] = key
    if not keys:
        raise KeyFileError(f"the key file {path} must have at least one key; stepwell store new-key adds one")
    if len({hashlib.sha256(key).digest() for key in keys.values()}) < len(keys):
        raise KeyFileError(f"the keys in {path} must differ; two are the same")
    return keys


def _bytes_of(value: str) -> bytes | None:
    """The key that a line says; None if it says none. The text never goes into a message."""
    try:
        key = bytes.fromhex(value) if len(value) == 2 * KEY_BYTES else base64.b64decode(value, validate=True)
    except (ValueError, binascii.Error):
        return None
    return key if len(key) == KEY_BYTES else None


def _id_rule() -> str:
    return f"an id must be 1 to {MAX_ID_BYTES} letters, digits, '.', '_' or '-', the first a letter or digit"
