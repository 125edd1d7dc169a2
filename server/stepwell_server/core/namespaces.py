"""Session ids of tenants: the caller's form, and the internal form in the table, the store and lists.

Below `rpc` a session's id is `TENANT<US>ID`, or just `ID` where there is no tenant. US is 0x1F, which no id of a
new session may contain. So no caller can name another tenant's session, and the ids of a tenant are adjacent in the
store.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SEPARATOR = "\x1f"
"""Separates the tenant from the caller's id."""
#: Replaces the tenant of an id that contains the separator but has no tenant. No tenant has this name.
_NO_TENANT = "-"
#: The tenant and separator before an id. Messages contain ids as they are, or as their `repr`.
_PREFIX = re.compile(r"(?<![A-Za-z0-9._@\x1f\\-])(?<!\\x1f)[A-Za-z0-9._@-]+(?:\x1f|\\x1f)")


def prefix_of(tenant: str) -> str:
    """The prefix of all ids of a tenant; empty without a tenant."""
    return f"{tenant}{SEPARATOR}" if tenant else ""


def inner(tenant: str, session_id: str) -> str:
    """The internal form of a caller's id; an empty id stays empty. `own` is the reverse.

    The result is always in the caller's own namespace. Without a tenant, an id that contains the separator is put
    into a namespace that no tenant has.
    """
    if not session_id or not (tenant or SEPARATOR in session_id):
        return session_id
    return f"{tenant or _NO_TENANT}{SEPARATOR}{session_id}"


def inner_all(tenant: str, session_ids: Sequence[str]) -> list[str]:
    """`inner` for many ids."""
    if not tenant and SEPARATOR not in "".join(session_ids):
        return list(session_ids)
    if not tenant:
        return [inner(tenant, session_id) for session_id in session_ids]
    prefix = prefix_of(tenant)
    return [prefix + session_id if session_id else "" for session_id in session_ids]


def tenant_of(session_id: str) -> str:
    """The tenant that owns a session; empty if there is none."""
    tenant, separator, _ = session_id.partition(SEPARATOR)
    return tenant if separator else ""


def own(session_id: str) -> str:
    """The caller's form of an internal id."""
    _, separator, name = session_id.partition(SEPARATOR)
    return name if separator else session_id


def without_tenants(message: str) -> str:
    """A message for callers, with ids in the callers' form."""
    return _PREFIX.sub("", message) if "\x1f" in message or "\\x1f" in message else message
