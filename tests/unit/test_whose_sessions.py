"""Whose session it is: for every call of every service, what another tenant's session is to its caller."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import numpy as np
import pytest
from google.protobuf import duration_pb2

from stepwell.v1 import models_pb2, watch_pb2
from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.core import namespaces
from stepwell_server.core.callers import ANYBODY, Caller, Role
from stepwell_server.rpc.access import Access, access_of
from stepwell_server.rpc.triton.inference import service_pb2 as triton
from support.engine.fake_executor import PLAIN
from support.peers.wire import Refusal, of_members, refused_part, tensors
from support.rpc.calls import Calls, calls
from support.triton.triton_requests import request as infer

pytestmark = pytest.mark.stores("memory", "async", "fake_shared")
ANN = Caller("ann", "acme", Role.USER)
BOB = Caller("bob", "zeta", Role.USER)
OPS = Caller("ops", "ops", Role.ADMIN)
NOBODYS = Caller("eve", "", Role.USER)
EVERYBODYS = dataclasses.replace(OPS, tenant="*")
STRANGERS = {
    "of another tenant": BOB,
    "of no tenant": NOBODYS,
    "an admin of another tenant": OPS,
    "of a tenant that has a name which begins alike": Caller("a", "acm", Role.USER),
}
X = np.full((1, 2), 0.25, np.float32)
#: Ids that ann's tenant gave to its sessions.
MINE, ALSO_MINE = "mine", "also mine"


def named(session_id: str) -> dict[str, Any]:
    """A request of each call that names one session, by its id; the call fails if there is none."""
    return {
        "CloseSession": pb.CloseSessionRequest(session_id=session_id),
        "GetSession": pb.GetSessionRequest(session_id=session_id),
        "Step": pb.StepRequest(session_id=session_id, inputs=tensors({"x": X})),
        "ResetStates": pb.ResetStatesRequest(session_id=session_id),
        "GetState": pb.GetStateRequest(session_id=session_id),
        "ForkSession": pb.ForkSessionRequest(session_id=session_id, new_session_id="copy"),
        "ForkSessions": pb.ForkSessionsRequest(session_ids=[session_id]),
    }


async def frames(at: Calls, session_id: str) -> None:
    step = pb.StepFrame(session_ids=[session_id], inputs=tensors({"x": X}))
    reset = pb.ResetFrame(session_ids=[session_id])
    told = [
        pb.StepStreamRequest(frame_id=1, step=step),
        pb.StepStreamRequest(frame_id=2, reset=reset),
    ]
    answers = await at.exchange(*told)
    assert len(answers) == 2
    for answer in answers:
        expect_no_session(of_members([answer], 1)[0], session_id)


async def states(at: Calls, session_id: str) -> None:
    reply = await at.call(pb.GetStatesRequest(session_ids=[session_id]))
    assert not reply.state
    (failed,) = reply.errors
    expect_no_session(refused_part(failed.error), session_id)


async def close_some(at: Calls, session_id: str) -> None:
    reply = await at.call(pb.CloseSessionsRequest(session_ids=[session_id]))
    assert reply.closed == 0


async def close_matching(at: Calls, session_id: str) -> None:
    filters: tuple[dict[str, Any], ...] = (
        {"all": True},
        {"session_id_prefix": session_id},
        {"model": "plain"},
    )
    for wanted in filters:
        assert (await at.call(pb.CloseMatchingSessionsRequest(**wanted))).closed == 0


async def listed(at: Calls, session_id: str) -> None:
    idle = duration_pb2.Duration()
    for wanted in ({}, {"session_id_prefix": session_id}, {"model": "plain"}, {"idle_longer": idle}):
        for size in (0, 1):
            reply = await at.call(pb.ListSessionsRequest(page_size=size, **wanted))
            assert reply == pb.ListSessionsResponse(), wanted


async def exported(at: Calls, session_id: str) -> None:
    filters: tuple[dict[str, Any], ...] = ({}, {"session_id_prefix": session_id}, {"model": "plain"})
    for wanted in filters:
        assert (await at.call(pb.ExportSessionsRequest(**wanted))) == pb.ExportSessionsResponse()
    reply = await at.call(pb.ExportSessionsRequest(session_ids=[session_id]))
    assert not reply.sessions
    (failed,) = reply.errors
    assert (failed.session_id, failed.tenant) == (session_id, "")
    expect_no_session(refused_part(failed.error), session_id)


async def opened(at: Calls, session_id: str) -> None:
    if not session_id.isprintable():
        for bad in (
            pb.OpenSessionRequest(model="plain", session_id=session_id),
            pb.OpenSessionsRequest(model="plain", session_ids=[session_id]),
        ):
            assert (await at.refused(bad)).reason == "INVALID_INPUT"
        return
    reply = await at.call(pb.OpenSessionRequest(model="plain", session_id=session_id, must_be_new=True))
    assert (reply.session.session_id, reply.resumed, reply.session.position) == (session_id, False, 0)
    await at.call(pb.CloseSessionRequest(session_id=session_id))
    many = await at.call(pb.OpenSessionsRequest(model="plain", session_ids=[session_id, "b"]))
    assert list(many.session_ids) == [session_id, "b"]
    assert (await at.call(pb.CloseSessionsRequest(session_ids=[session_id, "b"]))).closed == 2
    again = pb.OpenSessionsRequest(model="plain", session_ids=[session_id, "b"], resume=True)
    assert not (await at.call(again)).resumed
    other = pb.OpenSessionsRequest(model="plain", session_ids=[session_id], resume=True, batch_size=2)
    assert f"; session {session_id!r} (index 0) has model" in (await at.refused(other)).message
    assert (await at.call(pb.CloseSessionsRequest(session_ids=[session_id, "b"]))).closed == 2


async def imported(at: Calls, session_id: str) -> None:
    mine = (await at.of(ANN).call(pb.ExportSessionsRequest(session_ids=[MINE]))).sessions[0]
    assert (mine.session_id, mine.tenant) == (MINE, "acme")
    mine.session_id = session_id
    (bad,) = (await at.call(pb.ImportSessionsRequest(sessions=[mine]))).sessions
    if session_id != MINE:  # the record is another one's
        assert bad.outcome == pb.IMPORT_OUTCOME_FAILED
        return
    assert bad.outcome == pb.IMPORT_OUTCOME_IMPORTED
    replace = pb.ImportSessionsRequest(sessions=[mine], existing=pb.EXISTING_SESSION_REPLACE)
    await at.call(pb.StepRequest(session_id=session_id, inputs=tensors({"x": X})))
    (told,) = (await at.call(replace)).sessions
    assert (told.outcome, told.session_id) == (pb.IMPORT_OUTCOME_REPLACED, session_id)
    await at.call(pb.CloseSessionRequest(session_id=session_id))


async def models(at: Calls, _session_id: str) -> None:
    told = await at.call(models_pb2.ListModelsRequest())
    assert [model.sessions for model in told.models] == [0, 0]
    assert told.server.id
    assert not told.server.HasField("metrics_address"), "for admins"
    assert told.server.role == "user"
    assert (await at.call(models_pb2.GetModelRequest(name="plain"))).model.sessions == 0


async def slow(at: Calls, _session_id: str) -> None:
    at.slow_steps.note("plain", "acme\x1fmine", 1.0, at.at.clock.monotonic())
    assert await at.call(models_pb2.ListSlowSessionsRequest()) == models_pb2.ListSlowSessionsResponse()
    for who, tenant in ((ANN, ""), (EVERYBODYS, "acme")):
        (told,) = (await at.of(who).call(models_pb2.ListSlowSessionsRequest())).sessions
        assert (told.session_id, told.tenant) == (MINE, tenant)


async def statistics(at: Calls, _session_id: str) -> None:
    told = (await at.call(triton.ModelStatisticsRequest())).model_stats
    assert list(told) == [triton.ModelStatistics(name=name, version="1") for name in ("other", "plain")]


async def predicted(at: Calls, _session_id: str) -> None:
    await at.call(models_pb2.PredictRequest(model="plain", inputs=tensors({"x": X})))


async def inferred(at: Calls, _session_id: str) -> None:
    refusal = await at.refused(infer(X, sequence_id=7))
    assert "must specify the START flag" in refusal.message
    assert "acme" not in str(refusal)


async def infer_streamed(at: Calls, _session_id: str) -> None:
    (raw,) = await at.streamed("ModelStreamInfer", infer(X, sequence_id=7))
    assert "must specify the START flag" in triton.ModelStreamInferResponse.FromString(raw).error_message


async def watched(at: Calls, session_id: str) -> None:
    request = watch_pb2.WatchSessionsRequest(session_ids=[session_id], states=True)
    replies = await at.streamed("WatchSessions", request)
    (event,) = [event for raw in replies for event in watch_pb2.WatchSessionsResponse.FromString(raw).events]
    assert event.session_id == session_id
    assert not event.states
    expect_no_session(refused_part(event.error), session_id)


async def server(at: Calls, _session_id: str) -> None:
    call = at.new_call()
    call.send(watch_pb2.WatchServerRequest())
    call.half_close()
    serving = asyncio.ensure_future(at.methods["WatchServer"].serve(call))
    reply = watch_pb2.WatchServerResponse.FromString(await asyncio.wait_for(call.replies.get(), 100))
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    assert [model.name for model in reply.models] == ["other", "plain"]
    assert not any(model.sessions for model in reply.models)
    assert not reply.HasField("server")
    assert not (reply.tenants)
    assert not (reply.slow_sessions)
    assert not (reply.errors)
    assert not (reply.methods)


async def nothing(_at: Calls, _session_id: str) -> None:
    """The call names no session, makes none and tells of none."""


Check = Callable[[Calls, str], Awaitable[None]]
#: Every call of every service that is not in `named`: what a stranger gets. Whoever adds a call says how it is scoped.
OTHERS: Mapping[str, Check] = {
    "WatchSessions": watched,
    "StepStream": frames,
    "GetStates": states,
    "CloseSessions": close_some,
    "CloseMatchingSessions": close_matching,
    "ListSessions": listed,
    "ExportSessions": exported,
    "ImportSessions": imported,
    "OpenSession": opened,
    "OpenSessions": opened,
    "ListModels": models,
    "GetModel": models,
    "ListSlowSessions": slow,
    "WatchServer": server,
    "Predict": predicted,
    "ModelInfer": inferred,
    "ModelStreamInfer": infer_streamed,
    "ModelStatistics": statistics,
    **dict.fromkeys(
        (
            *("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig"),
            *("Check", "List", "Watch", "ServerReflectionInfo"),
            *(
                "LoadModel",
                "UploadModel",
                "UnloadModel",
                "SetDefault",
                "SetLabel",
            ),  # for admins: see test_rpc_models
            *(
                "RepositoryIndex",
                "RepositoryModelLoad",
                "RepositoryModelUnload",
            ),  # see test_triton_repository
            *("SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister"),
            *("CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister"),
            *("TraceSetting", "LogSettings"),
        ),
        nothing,
    ),
}


def expect_no_session(refusal: Refusal, session_id: str) -> None:
    """As it is for a session that never was: the same words, and what they name is what the caller said."""
    refusal.expect("NOT_FOUND", "SESSION_NOT_FOUND")
    assert refusal.message == f"session_id must be that of an open session; got {session_id!r}"
    assert dict(refusal.metadata) in ({}, {"session_id": session_id})


@pytest.fixture
async def at() -> AsyncIterator[Calls]:
    async with calls({"plain": PLAIN, "other": dataclasses.replace(PLAIN, fingerprint="other")}) as found:
        ann = found.of(ANN)
        for session_id in (MINE, ALSO_MINE):
            await ann.call(pb.OpenSessionRequest(model="plain", session_id=session_id))
            await ann.call(pb.StepRequest(session_id=session_id, inputs=tensors({"x": X})))
        await ann.call(infer(X, sequence_id=7, start=True))
        found.at.clock.advance(1)
        yield found


async def test_every_call_is_in_the_table(at: Calls) -> None:
    assert sorted({*named(""), *OTHERS}) == sorted(at.methods)


@pytest.mark.parametrize("stranger", STRANGERS)
async def test_anothers_session_is_one_that_never_was(at: Calls, stranger: str) -> None:
    own = at.of(STRANGERS[stranger])
    before = await at.everything()
    for session_id in (MINE, "acme\x1fmine", "acme\\x1fmine"):
        for request in named(session_id).values():
            expect_no_session(await own.refused(request), session_id)
        for name, check in OTHERS.items():
            if STRANGERS[stranger].role is Role.ADMIN and check in {models, statistics, server}:
                continue  # admins see how much there is of everything
            try:
                await check(own, session_id)
            except AssertionError as error:
                raise AssertionError(f"{name} of {session_id!r}") from error
    assert await at.everything() == before


@pytest.mark.parametrize("session_id", ["acme\x1f", "\x1fmine", "-\x1fmine", "acme\x1f\x1fmine"])
async def test_no_id_that_is_none_reaches_a_namespace(at: Calls, session_id: str) -> None:
    for who in (ANYBODY, ANN, NOBODYS):
        for name, request in named(session_id).items():
            refusal = await at.of(who).refused(request)
            assert (name, refusal.code) == (name, "NOT_FOUND")
            assert repr(session_id) in refusal.message
        refusal = await at.of(who).refused(pb.OpenSessionRequest(model="plain", session_id=session_id))
        refusal.expect("INVALID_ARGUMENT", "INVALID_INPUT", "1 to 256 printable", repr(session_id))


async def test_the_owner_finds_its_sessions_by_its_own_ids(at: Calls) -> None:
    ann = at.of(ANN)
    sequence = "triton/plain/7"
    reply = await ann.call(pb.ListSessionsRequest())
    assert [session.session_id for session in reply.sessions] == [ALSO_MINE, MINE, sequence]
    assert (reply.total, {session.tenant for session in reply.sessions}) == (3, {""})
    info = (await ann.call(pb.GetSessionRequest(session_id=MINE))).session
    assert (info.session_id, info.tenant, info.revision) == (MINE, "", 1)
    assert (await ann.call(pb.GetStateRequest(session_id=MINE))).session.session_id == MINE
    fork = await ann.call(pb.ForkSessionRequest(session_id=MINE))
    assert fork.session.session_id.startswith("s-")
    forks = await ann.call(pb.ForkSessionsRequest(session_ids=[MINE, ALSO_MINE]))
    assert all(made.startswith("s-") for made in forks.session_ids)
    for made in (fork.session.session_id, *forks.session_ids):
        assert (await ann.call(pb.GetSessionRequest(session_id=made))).session.revision == 1
        assert f"acme\x1f{made}" in at.at.internals.loaded()
    closing = pb.CloseMatchingSessionsRequest(session_id_prefix="s-")
    assert (await ann.call(closing)).closed == 3
    assert (await ann.refused(named(made)["GetState"])).metadata == {"session_id": made}
    assert {namespaces.tenant_of(one) for one in at.at.internals.loaded()} == {"acme"}


async def test_ids_are_as_long_in_a_tenant_as_without_one(at: Calls) -> None:
    longest = Caller("ann", "a" * 64, Role.USER)
    ids = ["\U0001d11e" * 256, "\U0001d11e" * 255 + "x"]
    for who in (ANYBODY, longest):
        own = at.of(who)
        await own.call(pb.OpenSessionsRequest(model="plain", session_ids=ids))
        for session_id in ids:
            await own.call(pb.StepRequest(session_id=session_id, inputs=tensors({"x": X})))
        assert {one.session_id for one in (await own.call(pb.ListSessionsRequest())).sessions} == set(ids)
        exported = (await own.call(pb.ExportSessionsRequest(session_ids=ids))).sessions
        replaced = pb.ImportSessionsRequest(sessions=exported, existing=pb.EXISTING_SESSION_REPLACE)
        assert len((await own.call(replaced)).sessions) == 2
        (await own.refused(pb.OpenSessionRequest(model="plain", session_id=ids[0] + "x"))).expect(
            "INVALID_ARGUMENT", "INVALID_INPUT", "1 to 256 printable", "got 257 characters"
        )


async def test_triton_names_a_session_as_its_caller_knows_it(at: Calls) -> None:
    ann = at.of(ANN)
    await ann.call(pb.OpenSessionRequest(model="other", session_id="triton/plain/9"))
    message = "session 'triton/plain/9' must be of model 'plain' to be its sequence 9; it is of 'other'"
    assert (await ann.refused(infer(X, sequence_id=9))).message == message
    (raw,) = await ann.streamed("ModelStreamInfer", infer(X, sequence_id=9))
    assert triton.ModelStreamInferResponse.FromString(raw).error_message == message
    (raw,) = await ann.streamed("ModelStreamInfer", infer(X, sequence_id=7))
    assert (
        triton.ModelStreamInferResponse.FromString(raw)
        .infer_response.parameters["stepwell_revision"]
        .int64_param
        == 2
    )


async def test_pages_go_on_within_the_tenant(at: Calls) -> None:
    bob, ann = at.of(BOB), at.of(ANN)
    await bob.call(pb.OpenSessionsRequest(model="plain", session_ids=[f"b{i}" for i in range(5)]))
    found, token = [], ""
    while True:
        reply = await bob.call(pb.ListSessionsRequest(page_size=2, page_token=token))
        found += [session.session_id for session in reply.sessions]
        assert reply.total == 5
        token = reply.next_page_token
        if not token:
            break
        # of use to nobody else
        other = await ann.call(pb.ListSessionsRequest(page_token=token))
        assert not [one.session_id for one in other.sessions if one.session_id.startswith("b")]
    assert found == [f"b{i}" for i in range(5)]
    page = await bob.call(pb.ExportSessionsRequest(page_bytes=1))
    rest = await bob.call(pb.ExportSessionsRequest(page_token=page.next_page_token))
    assert [each.session_id for each in (*page.sessions, *rest.sessions)] == [f"b{i}" for i in range(5)]
    ids: dict[str, Any] = {"session_ids": ["b3", "b1"]}
    page = await bob.call(pb.ExportSessionsRequest(**ids, page_bytes=1))
    rest = await bob.call(pb.ExportSessionsRequest(**ids, page_token=page.next_page_token))
    assert [each.session_id for each in (*page.sessions, *rest.sessions)] == ["b3", "b1"]
    closed, token = 0, ""
    while True:
        reply = await bob.call(pb.CloseMatchingSessionsRequest(all=True, page_size=2, page_token=token))
        closed, token = closed + reply.closed, reply.next_page_token
        if not token:
            break
    assert closed == 5


async def test_an_admin_lists_exports_and_closes_what_is_everybodys(at: Calls) -> None:
    everybody = at.of(EVERYBODYS)
    await at.call(pb.OpenSessionRequest(model="plain", session_id=MINE))
    await at.of(BOB).call(pb.OpenSessionRequest(model="plain", session_id=MINE))
    own = [("", MINE), ("zeta", MINE), *(("acme", one) for one in (MINE, ALSO_MINE, "triton/plain/7"))]
    reply = await everybody.call(pb.ListSessionsRequest())
    assert sorted((session.tenant, session.session_id) for session in reply.sessions) == sorted(own)
    assert reply.total == 5
    assert [one.session_id for one in (await at.call(pb.ListSessionsRequest())).sessions] == [MINE]
    exported = (await everybody.call(pb.ExportSessionsRequest())).sessions
    assert sorted((one.tenant, one.session_id) for one in exported) == sorted(own)
    for request in (*named(MINE).values(), pb.CloseSessionsRequest(session_ids=[MINE]),
                    pb.OpenSessionRequest(model="plain"), pb.OpenSessionsRequest(model="plain", count=2),
                    pb.GetStatesRequest(session_ids=[MINE]),
                    pb.ExportSessionsRequest(session_ids=[MINE]), infer(X, sequence_id=7)):  # fmt: skip
        (await everybody.refused(request)).expect(
            "INVALID_ARGUMENT", "INVALID_INPUT", "must name one tenant", "'*'"
        )
    (await everybody.refused(pb.ListSessionsRequest(session_id_prefix="m"))).expect(
        "INVALID_ARGUMENT", "INVALID_INPUT", "session_id_prefix must be empty", "'m'"
    )
    before = await at.everything()
    assert (await everybody.call(pb.CloseMatchingSessionsRequest(all=True))).closed == 5
    assert await at.everything() == []
    told = (await everybody.call(pb.ImportSessionsRequest(sessions=exported[:3]))).sessions
    told.extend((await everybody.call(pb.ImportSessionsRequest(sessions=exported[3:]))).sessions)
    assert {one.outcome for one in told} == {pb.IMPORT_OUTCOME_IMPORTED}
    assert await at.everything() == before
    exported[1].tenant = "a b"
    (await everybody.refused(pb.ImportSessionsRequest(sessions=exported[1:2]))).expect(
        "INVALID_ARGUMENT", "INVALID_INPUT", "sessions.tenant must be the name of a tenant", "'a b'"
    )


async def test_sessions_of_no_tenant_move_into_one(at: Calls) -> None:
    """What an operator does who turns on callers."""
    await at.call(pb.OpenSessionRequest(model="plain", session_id="old"))
    await at.call(pb.StepRequest(session_id="old", inputs=tensors({"x": X}), request_id=9))
    before = await at.call(pb.GetStateRequest(session_id="old"))
    exported = (await at.call(pb.ExportSessionsRequest())).sessions
    assert [(one.session_id, one.tenant) for one in exported] == [("old", "")]
    await at.of(BOB).call(pb.ImportSessionsRequest(sessions=exported))
    await at.call(pb.CloseMatchingSessionsRequest(all=True))
    after = await at.of(BOB).call(pb.GetStateRequest(session_id="old"))
    assert (after.state, after.session.revision) == (before.state, 1)
    again = pb.StepRequest(session_id="old", inputs=tensors({"x": X}), request_id=9)
    assert (await at.of(BOB).call(again)).replayed


async def test_the_same_request_id_makes_another_session_for_each_tenant(at: Calls) -> None:
    async def made(own: Calls) -> list[str]:
        one = await own.call(pb.OpenSessionRequest(model="plain", request_id=5))
        many = await own.call(pb.OpenSessionsRequest(model="plain", count=2, request_id=5))
        fork = await own.call(pb.ForkSessionRequest(session_id=one.session.session_id, request_id=6))
        return [one.session.session_id, *many.session_ids, fork.session.session_id]

    by_tenant = [await made(at.of(who)) for who in (ANYBODY, ANN, BOB)]
    assert [await made(at.of(who)) for who in (ANYBODY, ANN, BOB)] == by_tenant, "a retry"
    assert len({one for ids in by_tenant for one in ids}) == 12


def test_who_only_reads_may_make_no_call_that_changes_anything() -> None:
    reads = {name for name in (*named(""), *OTHERS) if access_of(name) is Access.READ}
    assert reads == {
        *(
            "GetSession",
            "GetState",
            "GetStates",
            "ListSessions",
            "ListSlowSessions",
            "ListModels",
            "GetModel",
            "WatchSessions",
            "WatchServer",
        ),
        *("ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics"),
        "RepositoryIndex",
        "ServerReflectionInfo",
    }
    assert {name for name in OTHERS if access_of(name) is Access.ANYONE} == {
        *("Check", "List", "Watch", "ServerLive", "ServerReady"),
    }
