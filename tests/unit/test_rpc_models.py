"""Calls that load, choose and unload versions: requests, answers, permissions and audit lines."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepwell.v1 import models_pb2 as pb
from stepwell.v1 import sessions_pb2
from stepwell_server.catalog.files.uploads import Uploads
from stepwell_server.core.callers import Caller, Role
from stepwell_server.errors import PermissionDenied
from stepwell_server.files.audit_log import AuditLog
from stepwell_server.rpc.access import Access, access_of, require
from stepwell_server.rpc.audit import Auditor
from stepwell_server.rpc.fronts.base import CallEnded
from support.clock import ManualClock
from support.engine.fake_executor import PLAIN, RICH
from support.peers.wire import tensors
from support.rpc.calls import Calls, calls
from support.stores.fake_shared_store import RemoteStore

pytestmark = pytest.mark.stores("memory", "async", "fake_shared")
ADMIN_CALLS = ("LoadModel", "UploadModel", "UnloadModel", "SetDefault", "SetLabel")
OPS = Caller("ops", "acme", Role.ADMIN)
USER = Caller("ann", "acme", Role.USER)
X = np.full((1, 2), 0.25, np.float32)
READY, DRAINING = pb.MODEL_STATE_READY, pb.MODEL_STATE_DRAINING


@pytest.fixture
async def at() -> AsyncIterator[Calls]:
    async with calls({"plain": PLAIN}) as found:
        yield found


async def load(at: Calls, **values: Any) -> list[pb.LoadModelResponse]:
    """What a load tells, message by message."""
    request = pb.LoadModelRequest(**{"name": "plain", **values})
    return [pb.LoadModelResponse.FromString(raw) for raw in await at.streamed("LoadModel", request)]


async def refused(at: Calls, name: str, request: Any) -> tuple[str, str]:
    """Status and message of a stream that is refused."""
    with pytest.raises(CallEnded) as ended:
        await at.streamed(name, request)
    return ended.value.status.code.name, ended.value.status.message


async def step(at: Calls, session_id: str, **values: Any) -> sessions_pb2.StepResponse:
    request = sessions_pb2.StepRequest(session_id=session_id, inputs=tensors({"x": X}), **values)
    reply: sessions_pb2.StepResponse = await at.call(request)
    return reply


def told(model: pb.Model) -> list[tuple[int, int, bool, list[str], int]]:
    """What is said of the versions of a model."""
    return [
        (one.version, one.state, one.is_default, list(one.labels), one.sessions) for one in model.versions
    ]


async def test_a_load_reports_its_stages_and_then_the_model(at: Calls, tmp_path: Path) -> None:
    await at.call(sessions_pb2.OpenSessionRequest(model="plain", session_id="a"))
    file = at.loads.file(tmp_path, "new.keras", PLAIN)
    policy = pb.SESSION_POLICY_CARRY
    *stages, last = await load(at, path=file, sessions=policy, labels=["canary"])
    assert [one.stage for one in stages] == ["load", "warm up", "switch"]
    assert not any(one.HasField("model") for one in stages)
    assert (last.stage, last.version, last.moved_sessions) == ("", 2, 1)
    model = last.model
    assert (model.name, model.version, model.fingerprint) == ("plain", 2, "of new.keras")
    assert told(model) == [(1, READY, False, [], 0), (2, READY, True, ["canary"], 1)]
    assert (model.versions[1].path, model.versions[1].fingerprint) == (file, "of new.keras")
    assert model.versions[1].loaded_time.seconds == int(at.at.clock.now())
    assert (await at.call(pb.GetModelRequest(name="plain"))).model == model
    older = (await at.call(pb.GetModelRequest(name="plain@1"))).model
    assert (older.version, older.fingerprint, older.versions) == (1, "f-plain", model.versions)
    assert (await at.call(pb.GetModelRequest(name="plain:canary"))).model == model
    (only,) = (await at.call(pb.ListModelsRequest())).models
    assert only == model
    assert (await step(at, "a")).model_version == 2


async def test_a_new_name_can_be_loaded_while_the_server_runs(at: Calls, tmp_path: Path) -> None:
    file = at.loads.file(tmp_path, "rich.keras", RICH)
    last = (await load(at, name="rich", path=file, version=7))[-1]
    assert (last.version, last.moved_sessions, told(last.model)) == (7, 0, [(7, READY, True, [], 0)])
    reply = await at.call(sessions_pb2.OpenSessionRequest(model="rich"))
    assert (reply.session.model_version, reply.session.model_version_pinned) == (7, False)
    assert [model.name for model in (await at.call(pb.ListModelsRequest())).models] == ["plain", "rich"]


async def test_a_failure_is_returned_and_listed_and_nothing_changes(at: Calls, tmp_path: Path) -> None:
    await at.opened()
    before = await at.everything(), (await at.call(pb.GetModelRequest(name="plain"))).model
    bad = tmp_path / "bad.keras"
    bad.write_bytes(b"x")
    request = pb.LoadModelRequest(name="plain", path=str(bad), version=2)
    code, message = await refused(at, "LoadModel", request)
    assert (code, message) == (
        "FAILED_PRECONDITION",
        "version 2 of model 'plain' cannot be loaded: bad.keras: not a .keras file",
    )
    await refused(at, "LoadModel", pb.LoadModelRequest(name="other", path=str(bad), version=1))
    other, plain = (await at.call(pb.ListModelsRequest())).models
    assert (other.name, other.version, len(other.inputs)) == ("other", 0, 0)
    assert [(one.version, one.state) for one in other.versions] == [(1, pb.MODEL_STATE_FAILED)]
    # One without a number would have got the next one, and leaves nothing.
    request.version = 0
    code, why = await refused(at, "LoadModel", request)
    assert (code, why.partition(":")[0]) == (
        "FAILED_PRECONDITION",
        "a new version of model 'plain' cannot be loaded",
    )
    assert len((await at.call(pb.GetModelRequest(name="plain"))).model.versions) == 2
    failed = plain.versions[1]
    assert (failed.version, failed.state, failed.reason, failed.path) == (
        2,
        pb.MODEL_STATE_FAILED,
        message,
        str(bad),
    )
    del plain.versions[1]
    assert (await at.everything(), plain) == before
    # who is no admin is told of no file
    (_, plain) = (await at.of(USER).call(pb.ListModelsRequest())).models
    (ready, failed) = plain.versions
    assert (failed.reason, failed.path, ready.sessions) == ("the version could not be loaded", "", 0)


async def test_carrying_to_other_specs_is_refused_with_the_differences(at: Calls, tmp_path: Path) -> None:
    await at.opened()
    before = await at.everything()
    file = at.loads.file(tmp_path, "rich.keras", RICH)
    request = pb.LoadModelRequest(name="plain", path=file, sessions=pb.SESSION_POLICY_CARRY)
    code, message = await refused(at, "LoadModel", request)
    assert code == "FAILED_PRECONDITION"
    assert "state 'count' is new; output 'head' is new" in message
    assert await at.everything() == before
    (only,) = (await at.call(pb.ListModelsRequest())).models
    assert [(one.version, one.state) for one in only.versions] == [(1, READY)]


@pytest.mark.parametrize(
    ("values", "code", "words"),
    [
        ({"name": ""}, "INVALID_ARGUMENT", "name must be a name of 1 to 128"),
        ({"path": ""}, "INVALID_ARGUMENT", "path or upload must be given; got neither"),
        ({"sessions": 9}, "INVALID_ARGUMENT", "sessions must be one of stepwell.v1.SessionPolicy; got 9"),
        ({"version": 1}, "ALREADY_EXISTS", "version must be one that model 'plain' does not have; it has 1"),
        ({"path": "", "upload": "u-1"}, "UNIMPLEMENTED", "--allow-model-upload"),
        ({"path": "relative.keras"}, "INVALID_ARGUMENT", "path must be absolute"),
        ({"sessions": pb.SESSION_POLICY_MIGRATE}, "FAILED_PRECONDITION", "--migration"),
    ],
)
async def test_invalid_loads(
    at: Calls, tmp_path: Path, values: dict[str, Any], code: str, words: str
) -> None:
    request = {"name": "plain", "path": at.loads.file(tmp_path, "m.keras", PLAIN), **values}
    found, message = await refused(at, "LoadModel", pb.LoadModelRequest(**request))
    assert (found, words in message) == (code, True), message
    (only,) = (await at.call(pb.ListModelsRequest())).models
    assert [one.version for one in only.versions if one.state == READY] == [1]


async def test_invalid_request_bytes(at: Calls) -> None:
    for name in ("LoadModel", "UploadModel"):
        call = at.new_call()
        call.send(b"\xff")
        call.half_close()
        with pytest.raises(CallEnded) as ended:
            await at.methods[name].serve(call)
        assert ended.value.status.code.name == "INVALID_ARGUMENT"


async def test_a_load_stops_when_its_client_leaves(at: Calls, tmp_path: Path) -> None:
    at.loads.free.clear()
    call = at.new_call()
    call.send(pb.LoadModelRequest(name="plain", path=at.loads.file(tmp_path, "m.keras", PLAIN)))
    call.half_close()
    serving = asyncio.ensure_future(at.methods["LoadModel"].serve(call))
    assert pb.LoadModelResponse.FromString(await call.replies.get()).stage == "load"
    (only,) = (await at.call(pb.ListModelsRequest())).models
    assert [(one.version, one.state, one.reason) for one in only.versions] == [
        (1, READY, ""),
        (2, pb.MODEL_STATE_LOADING, "load"),
    ]
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    async with asyncio.timeout(100):
        while len(at.live.status("plain")) > 1:  # noqa: ASYNC110 (a turn of the loop, no time)
            await asyncio.sleep(0)
    at.loads.free.set()
    assert not at.loads.told


async def test_defaults_labels_and_unloading(at: Calls, tmp_path: Path) -> None:
    await load(at, path=at.loads.file(tmp_path, "2.keras", PLAIN), keep_default=True)
    await at.call(sessions_pb2.OpenSessionRequest(model="plain", session_id="follows"))
    await at.call(sessions_pb2.OpenSessionRequest(model="plain@1", session_id="pinned"))
    reply = await at.call(pb.SetDefaultRequest(name="plain", version=2, sessions=pb.SESSION_POLICY_RESET))
    assert (reply.previous_version, reply.moved_sessions, reply.model.version) == (1, 1, 2)
    for session_id, version, is_pinned in (("follows", 2, False), ("pinned", 1, True)):
        session = (await at.call(sessions_pb2.GetSessionRequest(session_id=session_id))).session
        assert (session.model_version, session.model_version_pinned) == (version, is_pinned)
    labelled = (await at.call(pb.SetLabelRequest(name="plain", label="old", version=1))).model
    assert told(labelled) == [(1, READY, False, ["old"], 1), (2, READY, True, [], 1)]
    by_label = await at.call(sessions_pb2.OpenSessionRequest(model="plain:old"))
    assert (by_label.session.model, by_label.session.model_version) == ("plain", 1)
    assert (await at.refused(pb.UnloadModelRequest(name="plain", version=1))).reason == "MODEL_IN_USE"
    assert (await at.refused(pb.UnloadModelRequest(name="plain", version=2))).reason == "MODEL_IN_USE"
    assert (await at.refused(pb.UnloadModelRequest(name="plain"))).reason == "MODEL_IN_USE"
    for wrong in (
        pb.SetDefaultRequest(name="plain", version=9),
        pb.SetLabelRequest(name="plain", label="x", version=9),
        pb.SetLabelRequest(name="plain", label="x"),
        pb.UnloadModelRequest(name="plain", version=9),
    ):
        (await at.refused(wrong)).expect("NOT_FOUND", "MODEL_VERSION_NOT_FOUND")
    (await at.refused(pb.SetDefaultRequest(name="other", version=1))).expect("NOT_FOUND", "MODEL_NOT_FOUND")
    (await at.refused(pb.SetLabelRequest(name="plain", label="7", version=1))).expect(
        "INVALID_ARGUMENT", "INVALID_INPUT", "label must be 1 to 64", "'7'"
    )
    for session_id in ("pinned", by_label.session.session_id):
        await at.call(sessions_pb2.CloseSessionRequest(session_id=session_id))
    await at.call(pb.UnloadModelRequest(name="plain", version=1))
    (only,) = (await at.call(pb.ListModelsRequest())).models
    assert told(only) == [(2, READY, True, [], 1)]
    gone = await at.refused(sessions_pb2.OpenSessionRequest(model="plain@1"))
    if isinstance(at.at.store, RemoteStore):  # another server may have it
        gone.expect("UNAVAILABLE", "STARTING")
    else:
        gone.expect("NOT_FOUND", "MODEL_VERSION_NOT_FOUND")


async def test_versions_drain_and_are_unloaded(at: Calls, tmp_path: Path) -> None:
    await at.call(sessions_pb2.OpenSessionRequest(model="plain", session_id="a"))
    last = (await load(at, path=at.loads.file(tmp_path, "2.keras", PLAIN)))[-1]
    assert told(last.model) == [(1, DRAINING, False, [], 1), (2, READY, True, [], 0)]
    assert (await step(at, "a")).model_version == 1
    await at.call(sessions_pb2.CloseSessionRequest(session_id="a"))
    assert await at.live.look() == 1
    (only,) = (await at.call(pb.ListModelsRequest())).models
    assert told(only) == [(2, READY, True, [], 0)]


async def test_a_frame_of_several_versions_is_answered_in_parts(at: Calls, tmp_path: Path) -> None:
    ids = [f"s{number}" for number in range(4)]
    await at.call(sessions_pb2.OpenSessionsRequest(model="plain", session_ids=ids[:2]))
    await load(at, path=at.loads.file(tmp_path, "2.keras", PLAIN))
    opened = await at.call(sessions_pb2.OpenSessionsRequest(model="plain", session_ids=ids[2:]))
    assert opened.model_version == 2
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    order = ["s2", "s0", "s3", "s1"]
    frame = sessions_pb2.StepFrame(
        session_ids=order,
        inputs=tensors({"x": rows}),
        expected_revisions=[0] * 4,
        request_ids=[1, 2, 3, 4],
        states=sessions_pb2.STATE_SELECTION_LAST,
        state_members=[1, 2],
        reset_mask=[True, False, False, True],
    )
    answers = await at.exchange(sessions_pb2.StepStreamRequest(frame_id=5, step=frame))
    assert [answer.last for answer in answers] == [False, True]
    by_version = {answer.model_version: answer for answer in answers}
    assert {version: list(one.members) for version, one in by_version.items()} == {1: [1, 3], 2: [0, 2]}
    for answer in answers:
        assert list(answer.revisions) == [1, 1]
        members = list(answer.members)
        initial = np.array([0.5, -0.25], np.float32)
        after = initial * np.float32(0.5) + rows[members]
        (outputs,), (states,) = answer.outputs, answer.states
        np.testing.assert_array_equal(
            np.frombuffer(outputs.data, np.float32).reshape(outputs.shape), after * 2 - initial
        )
        own = [place for place, member in enumerate(members) if member in (1, 2)]
        np.testing.assert_array_equal(
            np.frombuffer(states.data, np.float32).reshape(states.shape), after[own]
        )
    # a retry gets the same answers, each from where it is
    again = await at.exchange(sessions_pb2.StepStreamRequest(frame_id=6, step=frame))
    assert {answer.model_version: list(answer.replayed_members) for answer in again} == {1: [1, 3], 2: [0, 2]}
    reset = sessions_pb2.ResetFrame(session_ids=order, state=tensors({"sum": rows}))
    parts = await at.exchange(sessions_pb2.StepStreamRequest(frame_id=7, reset=reset))
    assert {part.model_version: list(part.members) for part in parts} == {1: [1, 3], 2: [0, 2]}
    for place, session_id in enumerate(order):
        state = await at.at.state(session_id)
        np.testing.assert_array_equal(state["sum"], rows[place : place + 1])


async def test_a_frame_of_several_versions_fails_member_by_member(at: Calls, tmp_path: Path) -> None:
    await at.call(sessions_pb2.OpenSessionsRequest(model="plain", session_ids=["a", "b"]))
    await load(at, path=at.loads.file(tmp_path, "2.keras", PLAIN))
    await at.call(sessions_pb2.OpenSessionsRequest(model="plain", session_ids=["c", "d"]))
    rows = np.ones((5, 2), np.float32)
    rows[3] = np.nan
    frame = sessions_pb2.StepFrame(session_ids=["a", "c", "gone", "d", "b"], inputs=tensors({"x": rows}))
    answers = await at.exchange(sessions_pb2.StepStreamRequest(frame_id=1, step=frame))
    done = {member: one.model_version for one in answers for member in one.members}
    assert done == {0: 1, 4: 1, 1: 2}
    failed = {
        member: error.error.reason for one in answers for error in one.errors for member in error.members
    }
    assert failed == {2: "SESSION_NOT_FOUND", 3: "INVALID_INPUT"}
    assert [answer.last for answer in answers].count(True) == 1
    short = sessions_pb2.StepFrame(session_ids=["a", "c"], inputs=tensors({"x": rows[:1]}))
    (whole,) = await at.exchange(sessions_pb2.StepStreamRequest(frame_id=2, step=short))
    assert "inputs 'x' must have 2 rows, those of the 2 sessions" in whole.errors[0].error.message


async def test_every_reply_has_the_version(at: Calls, tmp_path: Path) -> None:
    await load(at, path=at.loads.file(tmp_path, "2.keras", PLAIN), keep_default=True)
    opened = await at.call(sessions_pb2.OpenSessionRequest(model="plain@2", session_id="a"))
    assert opened.session.model_version == 2
    assert (await step(at, "a", request_id=7, expected_revision=0)).model_version == 2
    replayed = await step(at, "a", request_id=7, expected_revision=0)
    assert (replayed.replayed, replayed.model_version) == (True, 2)
    assert (await at.call(sessions_pb2.ResetStatesRequest(session_id="a"))).model_version == 2
    assert (await at.call(sessions_pb2.GetStateRequest(session_id="a"))).session.model_version == 2
    states = await at.call(sessions_pb2.GetStatesRequest(session_ids=["a"]))
    assert (states.model, states.model_version) == ("plain", 2)
    assert (await at.call(sessions_pb2.ForkSessionRequest(session_id="a"))).session.model_version == 2
    assert (await at.call(sessions_pb2.ForkSessionsRequest(session_ids=["a"]))).model_version == 2
    listed = (await at.call(sessions_pb2.ListSessionsRequest())).sessions
    assert [(one.model_version, one.model_version_pinned) for one in listed] == [(2, True)] * 3
    for ref, version in (("plain", 1), ("plain@2", 2)):
        predicted = await at.call(pb.PredictRequest(model=ref, inputs=tensors({"x": X})))
        assert predicted.model_version == version


# --------------------------------------------------------------------------------------------------- who may, and audit


def test_only_admins_may() -> None:
    for name in ADMIN_CALLS:
        assert access_of(name) is Access.ADMINISTER
        require(access_of(name), name, OPS)
        for role in (Role.USER, Role.VIEWER):
            with pytest.raises(PermissionDenied, match=f"{name} needs the role admin; caller 'acme/ann' has"):
                require(access_of(name), name, Caller("ann", "acme", role))


async def test_a_server_reachable_by_others_must_authenticate_callers() -> None:
    async with calls({"plain": PLAIN}, admin_refusal="it must know its callers") as at:
        for request in (
            pb.UnloadModelRequest(name="plain"),
            pb.SetDefaultRequest(name="plain", version=1),
            pb.SetLabelRequest(name="plain", label="a", version=1),
        ):
            (await at.refused(request)).expect(
                "PERMISSION_DENIED", "PERMISSION_DENIED", "it must know its callers"
            )
        for name, sent in (("LoadModel", pb.LoadModelRequest()), ("UploadModel", pb.UploadModelRequest())):
            assert (await refused(at, name, sent))[0] == "PERMISSION_DENIED"
        assert len((await at.call(pb.ListModelsRequest())).models) == 1


async def test_every_call_has_an_audit_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    async with calls({"plain": PLAIN}, Auditor(log, "drop")) as anybody:
        at = anybody.of(OPS)
        file = at.loads.file(tmp_path, "new.keras", PLAIN)
        await at.call(sessions_pb2.OpenSessionRequest(model="plain", session_id="a"))
        await load(at, path=file, sessions=pb.SESSION_POLICY_CARRY, labels=["canary"])
        await load(at, path=file, keep_default=True)
        await refused(at, "LoadModel", pb.LoadModelRequest(name="plain", version=1, path=file))
        await at.call(pb.SetDefaultRequest(name="plain", version=1))
        await at.call(pb.SetLabelRequest(name="plain", label="old", version=1))
        await at.call(pb.UnloadModelRequest(name="plain", version=2, force=True))
        await refused(at, "UploadModel", pb.UploadModelRequest(filename="m.keras", content=b"secret"))
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert "secret" not in str(lines)
    common = {"time", "who", "tenant", "role", "peer", "method"}
    found = [{key: value for key, value in line.items() if key not in common} for line in lines[1:]]
    loads = {"action": "load_model", "model": "plain", "path": file}
    assert found == [
        {**loads, "outcome": "OK", "policy": "carry", "labels": ["canary"], "version": 2, "count": 1},
        {**loads, "outcome": "OK", "keep_default": True, "version": 3},
        {**loads, "outcome": "MODEL_VERSION_EXISTS", "policy": "keep", "version": 1},
        {"action": "set_default", "outcome": "OK", "model": "plain", "version": 1, "policy": "keep"},
        {"action": "set_label", "outcome": "OK", "model": "plain", "version": 1, "label": "old"},
        {"action": "unload_model", "outcome": "OK", "model": "plain", "version": 2, "force": True},
        {"action": "upload_model", "outcome": "MODEL_UPLOAD_OFF", "filename": "m.keras"},
    ]
    assert {(line["who"], line["tenant"], line["role"]) for line in lines} == {("ops", "acme", "admin")}


# -------------------------------------------------------------------------------------------------------------- uploads


async def test_a_file_is_sent_and_loaded(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", 1000, ManualClock())
    async with calls({"plain": PLAIN}, live_options={"uploads": uploads}) as at:
        at.loads.file(tmp_path, "new.keras", PLAIN)
        pieces = [
            pb.UploadModelRequest(filename="new.keras", content=b"a "),
            pb.UploadModelRequest(content=b"mod"),
            pb.UploadModelRequest(content=b"el"),
        ]
        (raw,) = await at.streamed("UploadModel", *pieces)
        sent = pb.UploadModelResponse.FromString(raw)
        assert sent.sha256 == hashlib.sha256(b"a model").hexdigest()
        last = (await load(at, upload=sent.upload))[-1]
        assert (last.version, last.model.fingerprint) == (2, "of new.keras")
        assert list((tmp_path / "uploads").iterdir()) == []
        for bad, words in (
            ([pb.UploadModelRequest(filename="a.h5", content=b"x")], "filename must be that of a model"),
            ([pieces[0], pieces[0]], "filename must be only in the first message"),
            ([pb.UploadModelRequest(filename="a.keras")], "content must be the bytes of a file; got none"),
            (
                [pb.UploadModelRequest(filename="a.keras", content=b"x" * 1001)],
                "content must be at most 1000",
            ),
        ):
            with pytest.raises(CallEnded) as ended:
                await at.streamed("UploadModel", *bad)
            assert ended.value.status.code.name == "INVALID_ARGUMENT"
            assert words in ended.value.status.message
            assert list((tmp_path / "uploads").iterdir()) == []
