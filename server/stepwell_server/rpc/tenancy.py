"""Translates session ids between callers and the engine: the one place where the tenant of a request matters.

Every id in a request passes through here on its way in, and every id in a response on its way out. An external id is the
one that a caller uses. An internal id is the engine's: it has the tenant as a prefix, so a caller cannot name a session of
another tenant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stepwell_server.core import namespaces
from stepwell_server.core.callers import Caller, is_name
from stepwell_server.errors import InvalidInput
from stepwell_server.rpc.access import ALL_TENANTS, TENANT_KEY

#: Keys that decide the caller and the tenant. If one came twice, a proxy could read another value than the server.
_DECISIVE_KEYS = ("authorization", TENANT_KEY)


def require_once(keys: Sequence[str]) -> None:
    """Check that the metadata of a call has each key that decides the caller or the tenant at most once.

    Args:
        keys: All keys of the metadata, with repetitions.

    Raises:
        InvalidInput: a key is repeated.
    """
    for key in _DECISIVE_KEYS:
        count = keys.count(key)
        if count > 1:
            raise InvalidInput(f"{key} must be sent at most once; got {count}")


def require_no_tenant(metadata: Mapping[str, str | bytes]) -> None:
    """Check that a call to a server without authentication selects no tenant.

    Raises:
        InvalidInput: it does.
    """
    if TENANT_KEY in metadata:
        raise InvalidInput(
            f"{TENANT_KEY} must not be sent to a server that does not authenticate callers: it has no tenants;"
            f" got {metadata[TENANT_KEY]!r}"
        )


def namespace_of(who: Caller) -> str:
    """Return the prefix of the internal ids of sessions that a call opens.

    Raises:
        InvalidInput: the call is for all tenants.
    """
    _require_one(who)
    return namespaces.prefix_of(who.tenant)


def single_tenant(who: Caller) -> str:
    """Return the tenant of a call; empty: no tenant.

    Raises:
        InvalidInput: the call is for all tenants.
    """
    _require_one(who)
    return who.tenant


def internal_id(who: Caller, session_id: str) -> str:
    """Return the internal id of a session. An empty id stays empty.

    Raises:
        InvalidInput: the call is for all tenants.
    """
    if not who.tenant and namespaces.SEPARATOR not in session_id:
        return session_id
    _require_one(who)
    return namespaces.inner(who.tenant, session_id)


def internal_ids(who: Caller, session_ids: Sequence[str]) -> list[str]:
    """Return the internal ids of several sessions: see `internal_id`."""
    _require_one(who)
    return namespaces.inner_all(who.tenant, session_ids)


def tenant_filter(who: Caller, prefix: str) -> str | None:
    """Return the tenant whose sessions a call lists, as `SessionFilter.tenant`; None: all tenants.

    Args:
        who: The caller.
        prefix: The prefix of ids that the call asks for.

    Raises:
        InvalidInput: a prefix is given for all tenants, whose ids are not sorted by it.
    """
    if who.tenant != ALL_TENANTS:
        return who.tenant
    if prefix:
        raise InvalidInput(
            f"session_id_prefix must be empty with {TENANT_KEY} {ALL_TENANTS!r}: it selects ids within one tenant;"
            f" got {prefix!r}"
        )
    return None


def internal_page_end(who: Caller, session_id: str) -> str:
    """Return the internal id of the session that ended a page. For all tenants, page tokens contain internal ids."""
    return session_id if who.tenant == ALL_TENANTS else namespaces.inner(who.tenant, session_id)


def external_page_end(who: Caller, session_id: str) -> str:
    """Return the id for a page token: the inverse of `internal_page_end`."""
    return session_id if who.tenant == ALL_TENANTS else namespaces.own(session_id)


def imported_id(who: Caller, tenant: str, session_id: str) -> str:
    """Return the internal id of a session to import. Only a call for all tenants keeps the `tenant` it was exported from."""
    if who.tenant != ALL_TENANTS:
        return namespaces.inner(who.tenant, session_id)
    if tenant and not is_name(tenant):
        raise InvalidInput(f"sessions.tenant must be the name of a tenant, or empty; got {tenant!r}")
    return namespaces.inner(tenant, session_id)


def recorded_id(tenant: str, session_id: str) -> str:
    """Return the internal id that a session had when its record was written."""
    return namespaces.prefix_of(tenant) + session_id


def tenant_of(session_id: str) -> str:
    """Return the tenant of an internal id; empty: no tenant."""
    return namespaces.tenant_of(session_id)


def external_id(session_id: str) -> str:
    """Return the external id of a session."""
    return namespaces.own(session_id)


def external_ids(session_ids: Sequence[str]) -> Sequence[str]:
    """Return the external ids of sessions of one tenant."""
    if not session_ids or not (tenant := namespaces.tenant_of(session_ids[0])):
        return session_ids
    start = len(namespaces.prefix_of(tenant))
    return [session_id[start:] for session_id in session_ids]


def shown_tenant(who: Caller, session_id: str) -> str:
    """Return the tenant of a session if the call is for all tenants, else an empty string."""
    return namespaces.tenant_of(session_id) if who.tenant == ALL_TENANTS else ""


def _require_one(who: Caller) -> None:
    if who.tenant == ALL_TENANTS:
        raise InvalidInput(
            f"{TENANT_KEY} must name one tenant for this call; got {ALL_TENANTS!r}, which is only for listing, exporting,"
            " importing and closing sessions by a filter"
        )
