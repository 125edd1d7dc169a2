"""What a caller must be to make a call."""

from __future__ import annotations

import enum

from stepwell_server.core.callers import Caller, Role
from stepwell_server.errors import PermissionDenied


class Access(enum.Enum):
    """Who may make a call."""

    ANYONE = "anyone"
    """Also who is not known: health checkers."""
    READ = "read"
    USE = "use"


#: Calls that change nothing and show what is there. What is not named here or below needs `Access.USE`.
_READS = frozenset(
    {
        *("ListModels", "GetModel", "GetSession", "ListSessions", "GetState", "GetStates"),
        *("ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics"),
        "ServerReflectionInfo",
    }
)
_FOR_ANYONE = frozenset({"Check", "Watch", "ServerLive", "ServerReady"})
_ROLES = {Access.READ: frozenset(Role), Access.USE: frozenset({Role.USER, Role.ADMIN})}


def access_of(method: str) -> Access:
    """What a method needs, by its name without the service."""
    if method in _FOR_ANYONE:
        return Access.ANYONE
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
