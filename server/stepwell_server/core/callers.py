"""Who calls: a name, the tenant that it belongs to, and what it may do."""

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
    """Read: sessions, states, lists, models. Nothing that it does changes anything."""
    USER = "user"
    """Everything with the sessions of its tenant."""
    ADMIN = "admin"
    """That with the sessions of all tenants, and with the models."""


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as far as the server asks."""

    name: str
    """Of the caller; "" where nobody is asked. Printable and without spaces; `is_name` unless others give the names."""
    tenant: str
    """Whose sessions it sees; "" where there are no tenants."""
    role: Role
    own_tenant: str | None = None
    """To which it belongs, where it acts in another one: with its name that says who it is. None: `tenant`."""

    @property
    def may_step(self) -> bool:
        """Its role allows it to change sessions."""
        return self.role is not Role.VIEWER

    def __str__(self) -> str:
        tenant = self.tenant if self.own_tenant is None else self.own_tenant
        return f"{tenant}/{self.name}" if tenant else self.name


class Credential(NamedTuple):
    """What a call shows of who makes it. It is no secret: a token is known by its digest."""

    kind: Literal["token", "names"]
    """By which a caller is found: the bearer token that it sends, which counts first, or its certificate."""
    digest: bytes = b""
    """SHA-256 of the bytes of the token."""
    names: tuple[str, ...] = ()
    """Of the certificate, in its order."""


class KnownCaller(NamedTuple):
    """A caller that was found by what a call shows."""

    caller: Caller
    credential: Credential
    until: float = math.inf
    """On the clock's monotonic time: then it does not hold any more."""
    signer: str = ""
    """The key that has signed it, if one has: it holds as long as that is trusted."""


ANYBODY = Caller("", "", Role.ADMIN)
"""Who calls a server that does not ask."""


MAX_SUBJECT_LENGTH = 256


def is_subject(text: str) -> bool:
    """Whether it may be the name that others give a caller, an identity provider say: printable ASCII without spaces."""
    return 0 < len(text) <= MAX_SUBJECT_LENGTH and text.isascii() and all("!" <= each <= "~" for each in text)


def is_name(text: str) -> bool:
    """Whether it may be the name of a caller or of a tenant: letters, digits and `._@-`, at most 64."""
    return _NAME.fullmatch(text) is not None
