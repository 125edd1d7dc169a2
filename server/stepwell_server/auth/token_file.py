"""Atomic changes to a file of tokens, one at a time. All other lines stay unchanged."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from stepwell_server.auth.tokens import Token, parse, tokens_of
from stepwell_server.files.flush import flush_folders, flush_open

_HEADER = "# Callers of a Stepwell server, one token a line: name, tenant, role, hash. See 'stepwell tokens --help'.\n"


def read(path: Path) -> list[Token]:
    """Return the tokens in a file, in order.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is invalid. The message contains the line and the rule.
    """
    text = path.read_text("utf-8")
    parse(text)
    return [token for _, token in tokens_of(text)]


def add(path: Path, token: Token) -> None:
    """Append a token to the file. A new file is readable by its owner only.

    Raises:
        OSError, ValueError: see `read`; also if the file would become invalid.
    """
    with _locked(path, create=True) as text:

        def put() -> str:
            whole = text or _HEADER
            whole += "\n" if not whole.endswith("\n") else ""
            whole += f"{token.line}\n"
            parse(whole)
            return whole

        _replace(path, put())


def remove(path: Path, is_meant: Callable[[Token], bool]) -> list[Token]:
    """Remove tokens from the file, and return them.

    Raises:
        OSError, ValueError: see `read`.
    """
    with _locked(path, create=False) as text:
        parse(text)
        meant = {number: token for number, token in tokens_of(text) if is_meant(token)}
        if meant:
            lines = text.split("\n")
            _replace(path, "\n".join(line for number, line in enumerate(lines, 1) if number not in meant))
    return list(meant.values())


@contextlib.contextmanager
def _locked(path: Path, *, create: bool) -> Iterator[str]:
    """Lock the file against other changes, and return its text.

    The lock is on the file itself. A change replaces the file, so after waiting for the lock, check that it is still the
    lock of the current file.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    while True:
        with open(os.open(path, flags, 0o600), encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            held = os.fstat(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(held, os.stat(path)):
                    yield file.read()
                    return


def _replace(path: Path, text: str) -> None:
    real = Path(os.path.realpath(path))  # a link stays one
    before = os.stat(real)
    made, name = tempfile.mkstemp(prefix=f".{real.name}.", dir=real.parent)  # 0600
    try:
        with open(made, "w", encoding="utf-8") as file:
            # root changes it for the account of the server, or for a group of it
            if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(made, before.st_uid, before.st_gid)
            os.fchmod(made, stat.S_IMODE(before.st_mode) & 0o640 | 0o600)
            file.write(text)
            file.flush()
            flush_open(made)
        os.replace(name, real)
    except BaseException:
        os.unlink(name)
        raise
    flush_folders(real.parent)
