"""What a caller must be to make a call."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from stepwell_server.core.callers import Caller, Role, is_name
from stepwell_server.errors import InvalidInput, PermissionDenied

TENANT_KEY = "stepwell-tenant"
"""Of the metadata by which an admin says in which tenant it acts."""
ALL_TENANTS = "*"


class Access(enum.Enum):
    """Who may make a call."""

    ANYONE = "anyone"
    """Also who is not known: health checkers."""
    READ = "read"
    USE = "use"
    ADMINISTER = "administer"
    """For all tenants: admins only."""


#: Calls that change nothing and show what is there. What is not named here or below needs `Access.USE`.
_READS = frozenset(
    {
        *(
            "ListModels",
            "GetModel",
            "ListSlowSessions",
            "GetSession",
            "ListSessions",
            "GetState",
            "GetStates",
        ),
        *("ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics"),
        "RepositoryIndex",
        "ServerReflectionInfo",
    }
)
_FOR_ANYONE = frozenset({"Check", "List", "Watch", "ServerLive", "ServerReady"})
#: Calls that change what everybody is served.
_FOR_ADMINS = frozenset(
    {
        "LoadModel",
        "UploadModel",
        "UnloadModel",
        "SetDefault",
        "SetLabel",
        "RepositoryModelLoad",
        "RepositoryModelUnload",
    }
)
_ROLES = {
    Access.READ: frozenset(Role),
    Access.USE: frozenset({Role.USER, Role.ADMIN}),
    Access.ADMINISTER: frozenset({Role.ADMIN}),
}


def access_of(method: str) -> Access:
    """What a method needs, by its name without the service."""
    if method in _FOR_ANYONE:
        return Access.ANYONE
    if method in _FOR_ADMINS:
        return Access.ADMINISTER
    return Access.READ if method in _READS else Access.USE


def require(access: Access, method: str, caller: Caller) -> None:
    """Refuse a call that its caller's role does not allow.

    Raises:
        PermissionDenied: it does not.
    """
    if access is Access.ANYONE or caller.role in _ROLES[access]:
        return
    allowed = " or ".join(sorted(role.value for role in _ROLES[access]))
    raise PermissionDenied(
        f"{method} needs the role {allowed}; caller {str(caller)!r} has {caller.role.value}",
        role=caller.role.value,
    )


def acting(caller: Caller, metadata: Mapping[str, str | bytes]) -> Caller:
    """A caller in the tenant in which its call says that it acts: its own, or for admins another, or all of them.

    Raises:
        PermissionDenied: it is not its own, and the caller no admin.
        InvalidInput: it is the name of none.
    """
    tenant = metadata.get(TENANT_KEY)
    if tenant is None or (tenant and tenant == caller.tenant):
        return caller
    if caller.role is not Role.ADMIN:
        raise PermissionDenied(
            f"{TENANT_KEY} must be the caller's own tenant, {caller.tenant!r}, unless its role is admin; caller "
            f"{str(caller)!r} has {caller.role.value}, and got {tenant!r}",
            role=caller.role.value,
        )
    if not isinstance(tenant, str) or not (tenant == ALL_TENANTS or is_name(tenant)):
        raise InvalidInput(
            f"{TENANT_KEY} must be the name of a tenant, or {ALL_TENANTS} for all; got {tenant!r}"
        )
    return dataclasses.replace(caller, tenant=tenant, own_tenant=caller.tenant)
