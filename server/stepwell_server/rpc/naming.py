"""Between the ids that callers say and those that the engine knows: the one place where a request's tenant counts.

Whatever in a message names sessions goes through here on its way in, and ids on their way out. So a
caller cannot name a session of another tenant: what it says is in its own namespace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stepwell_server.core import namespaces
from stepwell_server.core.callers import Caller, is_name
from stepwell_server.errors import InvalidInput
from stepwell_server.rpc.access import ALL_TENANTS, TENANT_KEY

#: What says who calls and for which tenant. Whoever reads another one of two than this server does would be deceived.
_DECIDING = ("authorization", TENANT_KEY)


def require_once(keys: Sequence[str]) -> None:
    """Refuse a call whose metadata says more than once who calls, or for which tenant.

    Args:
        keys: those of its metadata, as often as they came.

    Raises:
        InvalidInput: it does.
    """
    for key in _DECIDING:
        count = keys.count(key)
        if count > 1:
            raise InvalidInput(f"{key} must be sent at most once; got {count}")


def require_no_tenant(metadata: Mapping[str, str | bytes]) -> None:
    """Refuse a call that names a tenant where no caller is known.

    Raises:
        InvalidInput: it does.
    """
    if TENANT_KEY in metadata:
        raise InvalidInput(
            f"{TENANT_KEY} must not be sent to a server that does not ask who calls: it has no tenants;"
            f" got {metadata[TENANT_KEY]!r}"
        )


def namespace_of(who: Caller) -> str:
    """What the ids of sessions begin with that a call makes.

    Raises:
        InvalidInput: the call is about everybody's sessions.
    """
    _require_one(who)
    return namespaces.prefix_of(who.tenant)


def one_tenant(who: Caller) -> str:
    """In which tenant a call acts; empty: in none.

    Raises:
        InvalidInput: it acts for all of them.
    """
    _require_one(who)
    return who.tenant


def inner(who: Caller, session_id: str) -> str:
    """The engine's id of a session that a caller names. An empty one stays empty.

    Raises:
        InvalidInput: the call is about everybody's sessions.
    """
    if not who.tenant and namespaces.SEPARATOR not in session_id:
        return session_id
    _require_one(who)
    return namespaces.inner(who.tenant, session_id)


def inner_all(who: Caller, session_ids: Sequence[str]) -> list[str]:
    """As `inner`, of many."""
    _require_one(who)
    return namespaces.inner_all(who.tenant, session_ids)


def listed(who: Caller, prefix: str) -> str | None:
    """Whose sessions a call lists, as `SessionFilter.tenant`; `prefix` is that of the ids that it wants.

    Raises:
        InvalidInput: everybody's ids do not lie together by how they begin.
    """
    if who.tenant != ALL_TENANTS:
        return who.tenant
    if prefix:
        raise InvalidInput(
            f"session_id_prefix must be empty where {TENANT_KEY} is {ALL_TENANTS!r}: ids begin so within a tenant;"
            f" got {prefix!r}"
        )
    return None


def inner_place(who: Caller, session_id: str) -> str:
    """The engine's id of the session at which a page of a list ended: of everybody's it says whose it is."""
    return session_id if who.tenant == ALL_TENANTS else namespaces.inner(who.tenant, session_id)


def own_place(who: Caller, session_id: str) -> str:
    """The other way round."""
    return session_id if who.tenant == ALL_TENANTS else namespaces.own(session_id)


def imported(who: Caller, tenant: str, session_id: str) -> str:
    """The engine's id of a session that is imported, which was `tenant`'s: only who acts for everybody says so."""
    if who.tenant != ALL_TENANTS:
        return namespaces.inner(who.tenant, session_id)
    if tenant and not is_name(tenant):
        raise InvalidInput(f"sessions.tenant must be the name of a tenant, or empty; got {tenant!r}")
    return namespaces.inner(tenant, session_id)


def recorded(tenant: str, session_id: str) -> str:
    """The engine's id of a session where its record was made."""
    return namespaces.prefix_of(tenant) + session_id


def tenant_of(session_id: str) -> str:
    """Whose session it is; empty if it is no tenant's."""
    return namespaces.tenant_of(session_id)


def own(session_id: str) -> str:
    """What a session's callers call it."""
    return namespaces.own(session_id)


def own_all(session_ids: Sequence[str]) -> Sequence[str]:
    """As `own`, of sessions of one tenant."""
    if not session_ids or not (tenant := namespaces.tenant_of(session_ids[0])):
        return session_ids
    start = len(namespaces.prefix_of(tenant))
    return [session_id[start:] for session_id in session_ids]


def tenant_told(who: Caller, session_id: str) -> str:
    """The tenant of a session, for those who asked for everybody's."""
    return namespaces.tenant_of(session_id) if who.tenant == ALL_TENANTS else ""


def _require_one(who: Caller) -> None:
    if who.tenant == ALL_TENANTS:
        raise InvalidInput(
            f"{TENANT_KEY} must be one tenant where sessions are named or made, and models loaded; got {ALL_TENANTS!r}, which is for"
            " listing, exporting and closing those that fit a filter"
        )
