"""Bearer tokens, and the file with their hashes, one per line.

    # name   tenant  role  hash             more, as KEY=VALUE
    trainer  acme    user  sha256:9f86d...  created=2026-11-26T12:00:00Z expires=2027-02-24T12:00:00Z
    ops      -       admin sha256:60303...

A caller may have several tokens, so that you can hand out a new one before you revoke the old one. `-` means no tenant.

Why SHA-256 and not a slow, salted hash: those protect passwords, which people choose and attackers guess. A token is 256
random bits, which nobody can guess however fast the hash, and the server hashes one for every call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import re
import secrets
import string
from collections.abc import Iterator, Mapping

from stepwell_server.core.callers import Caller, Role, is_name

PREFIX = "stw_"
"""Prefix by which secret scanners recognise a token in files and logs."""
NO_TENANT = "-"
_ALPHABET = string.ascii_letters + string.digits
_LENGTH = 43  # of 62 characters: 256 bits
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_FIELDS = ("created", "expires")
_RULE = "must be NAME TENANT ROLE sha256:HASH, and then created=TIME and expires=TIME if known"
ID_LENGTH = 12
"""Length of the prefix of a hash that identifies a token for people."""


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """A token's entry in the file, with its hash."""

    caller: Caller
    digest: bytes
    created: dt.datetime | None = None
    expires: dt.datetime | None = None

    @property
    def id(self) -> str:
        """Its identifier for people: the beginning of its hash."""
        return self.digest.hex()[:ID_LENGTH]

    @property
    def line(self) -> str:
        """Its line in the file."""
        words = [self.caller.name, self.caller.tenant or NO_TENANT, self.caller.role.value]
        words.append(f"sha256:{self.digest.hex()}")
        times = {"created": self.created, "expires": self.expires}
        words += [f"{key}={time_text(time)}" for key, time in times.items() if time is not None]
        return " ".join(words)

    def has_expired(self, now: float) -> bool:
        """Whether it has expired at this time, in seconds since the epoch."""
        return self.expires is not None and now >= self.expires.timestamp()


def new_token() -> str:
    """Return a new random token."""
    return PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))


def digest_of(token: str) -> bytes:
    """Return the hash by which the server looks up a token."""
    return hashlib.sha256(token.encode()).digest()


def time_text(time: dt.datetime) -> str:
    """Return a time as the file contains it."""
    return time.astimezone(dt.UTC).isoformat(timespec="seconds").removesuffix("+00:00") + "Z"


def parse(text: str) -> dict[bytes, Token]:
    """Return the tokens in a file, by their digests.

    Raises:
        ValueError: the file is invalid. The message names the line and shows nothing that may be secret.
    """
    known: dict[bytes, Token] = {}
    roles: dict[tuple[str, str], tuple[Role, int]] = {}
    for number, token in tokens_of(text):
        if token.digest in known:
            raise ValueError(
                f"line {number}: must have a different hash; an earlier line has that of token {token.id}"
            )
        key = (token.caller.tenant, token.caller.name)
        role, before = roles.setdefault(key, (token.caller.role, number))
        if role is not token.caller.role:
            raise ValueError(
                f"line {number}: the role of {str(token.caller)!r} must be that in line {before}, {role.value}; got "
                f"{token.caller.role.value}"
            )
        known[token.digest] = token
    return known


def tokens_of(text: str) -> Iterator[tuple[int, Token]]:
    """Return the tokens in a file, with their line numbers.

    Raises:
        ValueError: see `parse`.
    """
    for number, line in enumerate(text.split("\n"), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            yield number, _token(words)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None


def _token(words: list[str]) -> Token:
    if len(words) < 4:
        raise ValueError(f"{_RULE}; it has {len(words)} words")
    name, tenant, role, hashed, *more = words
    digest = _HASH.fullmatch(hashed)
    if digest is None:
        what = (
            "a token itself, which must be revoked now" if PREFIX in hashed else f"{len(hashed)} characters"
        )
        raise ValueError(
            f"HASH must be sha256: and 64 digits, as 'stepwell tokens add' writes it; got {what}"
        )
    times = _times(more)
    caller = caller_of(name, "" if tenant == NO_TENANT else tenant, role)
    return Token(caller, bytes.fromhex(digest[1]), times.get("created"), times.get("expires"))


def caller_of(name: str, tenant: str, role: str) -> Caller:
    """Return the caller with these names and this role.

    Raises:
        ValueError: one of them is invalid. The message contains the rule.
    """
    for what, text in (("NAME", name), ("TENANT", tenant)):
        if not is_name(text) and (text or what == "NAME"):
            raise ValueError(
                f"{what} must be 1 to 64 letters, digits or any of '._@-', a letter or digit first; got {text!r}"
            )
    try:
        return Caller(name, tenant, Role(role))
    except ValueError:
        roles = ", ".join(each.value for each in Role)
        raise ValueError(f"ROLE must be one of {roles}; got {role!r}") from None


def _times(words: list[str]) -> Mapping[str, dt.datetime]:
    times: dict[str, dt.datetime] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in _FIELDS or key in times:
            raise ValueError(f"{_RULE}; got {word!r}")
        times[key] = _time(key, value)
    return times


def _time(key: str, text: str) -> dt.datetime:
    with contextlib.suppress(ValueError):
        time = dt.datetime.fromisoformat(text)
        if time.tzinfo is not None:
            return time
    raise ValueError(f"{key} must be a time such as 2026-11-26T12:00:00Z; got {text!r}")
