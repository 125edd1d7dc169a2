"""The role that each method requires."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from stepwell_server.core.callers import Caller, Role, is_name
from stepwell_server.errors import InvalidInput, PermissionDenied

TENANT_KEY = "stepwell-tenant"
"""Metadata key with which an admin selects the tenant of a call."""
ALL_TENANTS = "*"


class Access(enum.Enum):
    """Kind of access that a method requires."""

    ANYONE = "anyone"
    """No authentication: for health checkers."""
    READ = "read"
    USE = "use"
    ADMINISTER = "administer"
    """Affects all tenants: for admins only."""


#: Methods that only read. Methods that are neither here nor below need `Access.USE`.
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
            "WatchSessions",
            "WatchServer",
        ),
        *("ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics"),
        "RepositoryIndex",
        "ServerReflectionInfo",
    }
)
_FOR_ANYONE = frozenset({"Check", "List", "Watch", "ServerLive", "ServerReady"})
#: Methods that change which models are served.
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
    """Return the access that a method requires, by its name without the service."""
    if method in _FOR_ANYONE:
        return Access.ANYONE
    if method in _FOR_ADMINS:
        return Access.ADMINISTER
    return Access.READ if method in _READS else Access.USE


def require(access: Access, method: str, caller: Caller) -> None:
    """Check that the caller's role allows a call.

    Raises:
        PermissionDenied: it does not.
    """
    if access is Access.ANYONE or caller.role in _ROLES[access]:
        return
    allowed = " or ".join(sorted(role.value for role in _ROLES[access]))
    raise PermissionDenied(
        f"{method} needs the role {allowed}; caller {str(caller)!r} has the role {caller.role.value}",
        role=caller.role.value,
    )


def acting(caller: Caller, metadata: Mapping[str, str | bytes]) -> Caller:
    """Return the caller in the tenant that the call selects: its own or, for admins, another one or all of them.

    Raises:
        PermissionDenied: the call selects another tenant, and the caller is not an admin.
        InvalidInput: the tenant's name is invalid.
    """
    tenant = metadata.get(TENANT_KEY)
    if tenant is None or (tenant and tenant == caller.tenant):
        return caller
    if caller.role is not Role.ADMIN:
        raise PermissionDenied(
            f"{TENANT_KEY} must be the caller's own tenant, {caller.tenant!r}, unless its role is admin; got {tenant!r} from "
            f"caller {str(caller)!r} with the role {caller.role.value}",
            role=caller.role.value,
        )
    if not isinstance(tenant, str) or not (tenant == ALL_TENANTS or is_name(tenant)):
        raise InvalidInput(
            f"{TENANT_KEY} must be the name of a tenant, or {ALL_TENANTS} for all; got {tenant!r}"
        )
    return dataclasses.replace(caller, tenant=tenant, own_tenant=caller.tenant)
