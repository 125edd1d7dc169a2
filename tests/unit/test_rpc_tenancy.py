"""Conversion between callers' session ids and the engine's."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.core import namespaces
from stepwell_server.core.callers import ANYBODY, Caller, Role
from stepwell_server.errors import InvalidInput, SessionNotFound
from stepwell_server.rpc import tenancy
from stepwell_server.rpc.boundary import Boundary
from stepwell_server.rpc.fronts.base import CallEnded
from stepwell_server.rpc.status import to_proto, to_status
from support.rpc.fake_call import FakeCall, Requests

ANN, BOB = (Caller(name, tenant, Role.USER) for name, tenant in (("ann", "acme"), ("bob", "zeta")))
OF_ALL = Caller("ops", "*", Role.ADMIN)
TEXT = st.text(st.sampled_from("az-_.\x1f\\x1f 'é\"")) | st.sampled_from(["", "acme\x1fx", "-\x1fx", "\x1f"])
CALLERS = st.sampled_from([ANYBODY, ANN, BOB])


@given(CALLERS, TEXT, CALLERS, TEXT)
def test_tenants_share_no_sessions_and_each_gets_its_own_ids_back(
    one: Caller, said: str, other: Caller, also_said: str
) -> None:
    inner = tenancy.internal_id(one, said)
    assert tenancy.external_id(inner) == said
    if said:
        is_same = inner == tenancy.internal_id(other, also_said)
        assert is_same is ((one.tenant, said) == (other.tenant, also_said))
        assert "\x1f" not in said or one.tenant or namespaces.tenant_of(inner) == "-"
    assert tenancy.internal_ids(one, [said, also_said]) == [inner, tenancy.internal_id(one, also_said)]


# What has the separator in it is no id of a session: of such words more may be left out.
@given(st.sampled_from([ANN, BOB]), TEXT.filter(lambda said: "\x1f" not in said) | st.just("acme\x1fx"))
def test_messages_contain_the_callers_session_ids(who: Caller, said: str) -> None:
    inner = tenancy.internal_id(who, said)
    error = SessionNotFound(inner, f"session {inner!r} is not there, nor {[inner]}")
    told = to_proto(error)
    assert told.message == f"session {said!r} is not there, nor {[said]}"[:2048]
    assert dict(told.metadata) == {"session_id": said}
    assert to_status(error).message == told.message


def test_lists_of_a_tenant_contain_its_own_ids() -> None:
    assert tenancy.external_ids([]) == []
    assert tenancy.external_ids(["a", "b"]) == ["a", "b"]
    assert tenancy.external_ids(tenancy.internal_ids(ANN, ["a", "b"])) == ["a", "b"]


def test_callers_for_all_tenants_name_no_session() -> None:
    for call in (
        lambda: tenancy.internal_id(OF_ALL, "a"),
        lambda: tenancy.internal_ids(OF_ALL, ["a"]),
        lambda: tenancy.namespace_of(OF_ALL),
    ):
        with pytest.raises(
            InvalidInput, match=re.escape("stepwell-tenant must name one tenant for this call")
        ):
            call()


async def test_a_tenant_is_refused_without_authentication() -> None:
    boundary = Boundary(Requests(), 1024)

    async def answer(_request: object, _call: object) -> pb.GetSessionResponse:
        raise SessionNotFound("s", "it was served")

    for method, told in (
        ("GetSession", "must not be sent to a server that does not authenticate"),
        ("Check", "served"),
    ):
        call = FakeCall()
        call.metadata = {"stepwell-tenant": "acme"}
        with pytest.raises(CallEnded, match=told):
            await boundary.unary(method, answer, pb.GetSessionRequest)(call)
