"""Names of callers, and session ids in the namespaces of tenants."""

from __future__ import annotations

import pytest

from stepwell_server.core import namespaces
from stepwell_server.core.callers import Caller, Role, is_name
from stepwell_server.errors import PermissionDenied
from stepwell_server.rpc.access import access_of, require


@pytest.mark.parametrize("text", ["acme", "a", "robot-7@lab.example", "A" * 64])
def test_names(text: str) -> None:
    assert is_name(text)


@pytest.mark.parametrize("text", ["", "-a", "a b", "a\x1fb", "a/b", "A" * 65, "acme\n", "ä"])
def test_no_names(text: str) -> None:
    assert not is_name(text)


@pytest.mark.parametrize("session_id", ["user", "\\x1f", "a\x1fb", ""])
def test_ids_go_into_a_namespace_and_come_back(session_id: str) -> None:
    inner = namespaces.prefix_of("acme") + session_id
    assert (namespaces.tenant_of(inner), namespaces.own(inner)) == ("acme", session_id)


def test_without_tenants_ids_stay_as_they_are() -> None:
    assert (namespaces.prefix_of(""), namespaces.tenant_of("user"), namespaces.own("user")) == (
        "",
        "",
        "user",
    )


def test_messages_show_the_ids_that_callers_know() -> None:
    inner = "acme\x1fit's \\x1f"
    told = namespaces.without_tenants(f"session {inner!r} is open, and so is {inner}")
    assert told == f"session {namespaces.own(inner)!r} is open, and so is {namespaces.own(inner)}"


@pytest.mark.parametrize(
    ("method", "allowed"),
    [
        ("Check", {Role.VIEWER, Role.USER, Role.ADMIN}),
        ("GetState", {Role.VIEWER, Role.USER, Role.ADMIN}),
        ("Step", {Role.USER, Role.ADMIN}),
        ("ModelStreamInfer", {Role.USER, Role.ADMIN}),
        ("AMethodThatNobodyThoughtOf", {Role.USER, Role.ADMIN}),
    ],
)
def test_roles(method: str, allowed: set[Role]) -> None:
    for role in Role:
        caller = Caller("ann", "acme", role)
        if role in allowed:
            require(access_of(method), method, caller)
            continue
        with pytest.raises(PermissionDenied) as raised:
            require(access_of(method), method, caller)
        assert (
            str(raised.value) == f"{method} needs the role admin or user; caller 'acme/ann' has {role.value}"
        )
