"""Callers: their names, tenants, roles and credentials."""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from typing import Literal, NamedTuple

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class Role(enum.Enum):
    """What a caller may do."""

    VIEWER = "viewer"
    """Reads sessions, states, lists and models. Cannot change anything."""
    USER = "user"
    """Does everything with the sessions of its tenant."""
    ADMIN = "admin"
    """Does everything with the sessions of all tenants, and with the models."""


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request, as far as the server checks callers."""

    name: str
    """Empty where the server does not check callers. Printable, without spaces; passes `is_name` unless an identity
    provider chose it."""
    tenant: str
    """The tenant whose sessions it sees; empty where there are no tenants."""
    role: Role
    own_tenant: str | None = None
    """The tenant it belongs to, if it acts in another one; together with `name` it identifies the caller. None:
    `tenant`."""

    @property
    def may_step(self) -> bool:
        """Whether its role allows it to change sessions."""
        return self.role is not Role.VIEWER

    def __str__(self) -> str:
        tenant = self.tenant if self.own_tenant is None else self.own_tenant
        return f"{tenant}/{self.name}" if tenant else self.name


class Credential(NamedTuple):
    """What identifies the caller of a request. It holds no secret: a token is stored as its digest."""

    kind: Literal["token", "names"]
    """How the caller is found: by the bearer token, which takes precedence, or by the names in its certificate."""
    digest: bytes = b""
    """SHA-256 of the token's bytes."""
    names: tuple[str, ...] = ()
    """The names in the certificate, in its order."""


class KnownCaller(NamedTuple):
    """A caller found by its credential."""

    caller: Caller
    credential: Credential
    until: float = math.inf
    """On the clock's monotonic time: when the credential stops being valid."""
    signer: str = ""
    """The key that signed the credential, if any: the credential is valid while that key is trusted."""


ANYBODY = Caller("", "", Role.ADMIN)
"""Every caller of a server that does not check callers."""


MAX_SUBJECT_LENGTH = 256


def is_subject(text: str) -> bool:
    """Whether a text can be a name given by others, such as an identity provider: printable ASCII without spaces."""
    return 0 < len(text) <= MAX_SUBJECT_LENGTH and text.isascii() and all("!" <= each <= "~" for each in text)


def is_name(text: str) -> bool:
    """Whether a text can name a caller or a tenant: letters, digits and `._@-`, at most 64."""
    return _NAME.fullmatch(text) is not None
