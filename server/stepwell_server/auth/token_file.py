"""Changes of a file of tokens: whole or not at all, one after the other, with the lines of others as they were."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from stepwell_server.auth.tokens import Token, parse, tokens_of

_HEADER = "# Callers of a Stepwell server, one token a line: name, tenant, role, hash. See 'stepwell tokens --help'.\n"


def read(path: Path) -> list[Token]:
    """The tokens of a file, in its order.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file of tokens; the message has the line and the rule.
    """
    text = path.read_text("utf-8")
    parse(text)
    return [token for _, token in tokens_of(text)]


def add(path: Path, token: Token) -> None:
    """Put a token at the end of the file, which is made if it is not there, for its owner alone.

    Raises:
        OSError, ValueError: as `read`; or with this token it would be none.
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
    """Take tokens out of the file; those that were.

    Raises:
        OSError, ValueError: as `read`.
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
    """The text of the file, which nobody else changes meanwhile.

    The lock is on the file itself. Who changes it puts another in its place, so whoever has waited for the lock looks
    whether it is still that of the file.
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
            os.fsync(made)
        os.replace(name, real)
    except BaseException:
        os.unlink(name)
        raise
    folder = os.open(real.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
