"""Session ids of tenants: what callers say, and what table, store and lists have.

Below `rpc` a session's id is `TENANT<US>ID` (US is 0x1F, which stands in no id that can be opened), and just `ID` where
there is no tenant. So another tenant's session is one that nobody can name, and the ids of a tenant are neighbours in
the store.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SEPARATOR = "\x1f"
"""Between the tenant and what it calls a session."""
#: In place of a tenant before what is no id but has the separator in it: no tenant has this name.
_NO_TENANT = "-"
#: What stands before the first separator of an id. In messages ids stand as they are or as `repr` has them.
_PREFIX = re.compile(r"(?<![A-Za-z0-9._@\x1f\\-])(?<!\\x1f)[A-Za-z0-9._@-]+(?:\x1f|\\x1f)")


def prefix_of(tenant: str) -> str:
    """What the ids of a tenant begin with; empty if there is none."""
    return f"{tenant}{SEPARATOR}" if tenant else ""


def inner(tenant: str, session_id: str) -> str:
    """What a session is called below `rpc`; empty where nothing is said. `own` is the other way round.

    Whatever a caller says, it is in its own namespace: without a tenant, a text with the separator is in one that
    nobody has.
    """
    if not session_id or not (tenant or SEPARATOR in session_id):
        return session_id
    return f"{tenant or _NO_TENANT}{SEPARATOR}{session_id}"


def inner_all(tenant: str, session_ids: Sequence[str]) -> list[str]:
    """As `inner`, of many."""
    if not tenant and SEPARATOR not in "".join(session_ids):
        return list(session_ids)
    if not tenant:
        return [inner(tenant, session_id) for session_id in session_ids]
    prefix = prefix_of(tenant)
    return [prefix + session_id if session_id else "" for session_id in session_ids]


def tenant_of(session_id: str) -> str:
    """Whose session it is; empty if it is no tenant's."""
    tenant, separator, _ = session_id.partition(SEPARATOR)
    return tenant if separator else ""


def own(session_id: str) -> str:
    """What its tenant calls a session."""
    _, separator, name = session_id.partition(SEPARATOR)
    return name if separator else session_id


def without_tenants(message: str) -> str:
    """A message for callers: with the ids that they know."""
    return _PREFIX.sub("", message) if "\x1f" in message or "\\x1f" in message else message
