"""Triton's model repository: listing, loading and unloading, permissions and audit lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from stepwell.v1 import sessions_pb2
from stepwell_server.catalog.files.uploads import Uploads
from stepwell_server.core.callers import Caller, Role
from stepwell_server.errors import PermissionDenied, QuotaExceeded
from stepwell_server.files.audit_log import AuditLog
from stepwell_server.rpc.access import Access, access_of, require
from stepwell_server.rpc.audit import Auditor
from stepwell_server.rpc.fronts.base import CallEnded
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from support.clock import ManualClock
from support.engine.fake_executor import PLAIN
from support.rpc.calls import Calls, calls

Index = list[tuple[str, str, str]]


async def index(at: Calls, **values: Any) -> Index:
    response = await at.call(pb.RepositoryIndexRequest(**values))
    return [(one.name, one.version, one.state) for one in response.models]


def loading(
    name: str = "plain", config: object = None, files: Mapping[str, bytes] | None = None
) -> pb.RepositoryModelLoadRequest:
    request = pb.RepositoryModelLoadRequest(model_name=name)
    if config is not None:
        request.parameters["config"].string_param = config if isinstance(config, str) else json.dumps(config)
    for key, content in (files or {}).items():
        request.parameters[key].bytes_param = content
    return request


def specific(*versions: int | str) -> dict[str, Any]:
    return {"version_policy": {"specific": {"versions": list(versions)}}}


async def refused(at: Calls, request: Any) -> tuple[str, str]:
    with pytest.raises(CallEnded) as ended:
        await at.call(request)
    return ended.value.status.code.name, ended.value.status.message


def folder(root: Path, *versions: int) -> Path:
    """A folder of models, to be served as `--models`."""
    for version in versions:
        path = root / "plain" / f"{version}.keras"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"a model")
    return root


def known(at: Calls, *names: str) -> None:
    for name in names:
        at.loads.programs[name] = dataclasses.replace(PLAIN, fingerprint=f"of {name}")


async def test_load_without_parameters_loads_the_highest_version_in_the_folder(tmp_path: Path) -> None:
    root = folder(tmp_path, 2, 3)
    async with calls({"plain": PLAIN}, live_options={"root": root}) as at:
        known(at, "2.keras", "3.keras")
        await at.call(sessions_pb2.OpenSessionRequest(model="plain", session_id="a"))
        assert await index(at) == [("plain", "1", "READY")]
        await at.call(loading())
        # the session goes on on its version, which is unloaded when it ends
        response = await at.call(pb.RepositoryIndexRequest())
        assert [(one.version, one.state, one.reason) for one in response.models] == [
            ("1", "READY", "it is unloaded when its last session has ended"),
            ("3", "READY", ""),
        ]
        assert at.at.engine.version("plain") == 3
        await at.call(loading())  # it is loaded already
        await at.call(loading(config={"name": "plain", **specific("2"), "max_batch_size": 8}))
        assert await index(at, ready=True) == [("plain", str(v), "READY") for v in (1, 2, 3)]
        assert at.at.engine.version("plain") == 3  # an older one does not become the default


async def test_several_versions_are_loaded_and_the_highest_is_the_default(tmp_path: Path) -> None:
    async with calls({"other": PLAIN}, live_options={"root": folder(tmp_path, 1, 2, 5)}) as at:
        known(at, "1.keras", "2.keras", "5.keras")
        await at.call(loading(config={"version_policy": {"latest": {"num_versions": 2}}}))
        assert await index(at) == [("other", "1", "READY"), ("plain", "2", "READY"), ("plain", "5", "READY")]
        assert at.at.engine.version("plain") == 5
        await at.call(loading(config={"version_policy": {"all": {}}}))
        assert [version for _, version, _ in await index(at)] == ["1", "1", "2", "5"]


async def test_an_unloaded_version_can_be_loaded_again(tmp_path: Path) -> None:
    first = tmp_path / "first.keras"
    first.write_bytes(b"a model")
    async with calls({"plain": PLAIN}, files={"plain": {1: first}}) as at:
        known(at, "first.keras")
        await at.call(sessions_pb2.OpenSessionRequest(model="plain", session_id="a"))
        request = pb.RepositoryModelUnloadRequest(model_name="plain")
        request.parameters["unload_dependents"].bool_param = False
        code, message = await refused(at, request)
        assert (code, "must have no sessions to be unloaded" in message) == ("FAILED_PRECONDITION", True)
        request.parameters["stepwell_force"].bool_param = True
        await at.call(request)
        assert await index(at) == []
        await at.call(loading())
        assert await index(at) == [("plain", "1", "READY")]


async def test_a_version_that_cannot_be_loaded_is_listed(tmp_path: Path) -> None:
    async with calls({"plain": PLAIN}, live_options={"root": folder(tmp_path, 4)}) as at:
        code, message = await refused(at, loading())
        assert (code, message) == (
            "FAILED_PRECONDITION",
            "version 4 of model 'plain' cannot be loaded: 4.keras: not a .keras file",
        )
        assert await index(at) == [("plain", "1", "READY"), ("plain", "4", "UNAVAILABLE")]
        assert await index(at, ready=True) == [("plain", "1", "READY")]


async def test_a_file_is_accepted_if_uploads_are_allowed(tmp_path: Path) -> None:
    async with calls({"plain": PLAIN}) as at:
        file = {"file:2/model.keras": b"a model"}
        code, message = await refused(at, loading(config={}, files=file))
        assert (code, "--allow-model-upload" in message) == ("UNIMPLEMENTED", True)
    uploads = Uploads(tmp_path / "uploads", 100, ManualClock())
    async with calls({"plain": PLAIN}, live_options={"uploads": uploads}) as at:
        at.loads.programs |= {"model.keras": PLAIN}
        for files, said in (
            (
                {"file:x/model.keras": b""},
                "the file must be named 'file:VERSION/NAME'; got 'file:x/model.keras'",
            ),
            ({"file:model.keras": b""}, "the file must be named"),
            (
                {"file:1/a.keras": b"", "file:2/b.keras": b""},
                "files must be one .keras, .onnx or .stepwell file",
            ),
        ):
            code, message = await refused(at, loading(config={}, files=files))
            assert (code, said in message) == ("INVALID_ARGUMENT", True), message
        assert await index(at) == [("plain", "1", "READY")]
        await at.call(loading(config={}, files={"file:4/model.keras": b"a model"}))
        assert await index(at) == [("plain", "4", "READY")]
        assert not list((tmp_path / "uploads").glob("*"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "config must be a model configuration as JSON; got '{'"),
        ("[" * 100_000, "config must be a model configuration as JSON"),
        ("[1]", "config must be a JSON object; got '[1]'"),
        (" " * (1 << 20) + " ", "config must have at most 1048576 characters; got 1048577"),
        ({"name": "other"}, "name in config must be that of the model, 'plain'; got 'other'"),
        (specific(), "version_policy in config must be"),
        (specific(0), "version_policy in config must be"),
        (specific(True), "version_policy in config must be"),
        ({"version_policy": {"latest": {"num_versions": -1}}}, "version_policy in config must be"),
        ({"version_policy": {"latest": {}, "all": {}}}, "version_policy in config must be"),
        ({"version_policy": 3}, "version_policy in config must be"),
    ],
)
async def test_invalid_configurations(config: object, said: str, tmp_path: Path) -> None:
    async with calls({"plain": PLAIN}, live_options={"root": folder(tmp_path, 2)}) as at:
        code, message = await refused(at, loading(config=config))
        assert (code, said in message) == ("INVALID_ARGUMENT", True), message
        assert await index(at) == [("plain", "1", "READY")]


async def test_the_requested_model_and_version_must_exist(tmp_path: Path) -> None:
    async with calls({"plain": PLAIN}, live_options={"root": folder(tmp_path, 2)}) as at:
        poll = "failed to load 'nothing', failed to poll from model repository: no file of it is"
        code, message = await refused(at, loading("nothing"))
        assert (code, message.startswith(poll)) == ("NOT_FOUND", True), message
        code, message = await refused(at, loading(config=specific(2, 9)))
        assert (code, "no file is known of version 9; there are [2]" in message) == ("NOT_FOUND", True), (
            message
        )
        assert (await refused(at, pb.RepositoryModelUnloadRequest(model_name="nothing")))[0] == "NOT_FOUND"
        odd = loading()
        odd.parameters["q"].bool_param = True
        assert await refused(at, odd) == (
            "INVALID_ARGUMENT",
            "parameters must be config and file:VERSION/NAME; got 'q'",
        )
        odd = loading()
        odd.parameters["config"].bool_param = True
        assert (await refused(at, odd))[0] == "INVALID_ARGUMENT"
        unload = pb.RepositoryModelUnloadRequest(model_name="plain")
        unload.parameters["q"].bool_param = True
        assert (await refused(at, unload))[0] == "INVALID_ARGUMENT"
        for request in (
            pb.RepositoryIndexRequest(repository_name="r"),
            pb.RepositoryModelLoadRequest(repository_name="r", model_name="plain"),
            pb.RepositoryModelUnloadRequest(repository_name="r", model_name="plain"),
        ):
            assert await refused(at, request) == (
                "UNIMPLEMENTED",
                "'repository_name' specification is not supported",
            )


async def test_only_admins_load_and_unload() -> None:
    for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
        assert access_of(method) is Access.ADMINISTER
        with pytest.raises(PermissionDenied):
            require(access_of(method), method, Caller("ann", "acme", Role.USER))
    assert access_of("RepositoryIndex") is Access.READ
    async with calls({"plain": PLAIN}, admin_refusal="nobody may") as at:
        for request, method in (
            (loading(), "RepositoryModelLoad"),
            (pb.RepositoryModelUnloadRequest(model_name="plain"), "RepositoryModelUnload"),
        ):
            assert await refused(at, request) == ("PERMISSION_DENIED", f"{method}: nobody may")
        assert await index(at) == [("plain", "1", "READY")]


async def test_loads_and_unloads_have_audit_lines(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.log")
    root = tmp_path / "models"
    root.mkdir()
    async with calls(
        {"plain": PLAIN}, auditor=Auditor(log, "drop"), live_options={"root": folder(root, 2)}
    ) as at:
        known(at, "2.keras")
        await at.call(loading())
        await at.call(pb.RepositoryModelUnloadRequest(model_name="plain"))
        await refused(at, loading("nothing"))
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "audit.log").read_text().splitlines()]
    assert [(one["action"], one["method"], one["outcome"], one["model"]) for one in lines] == [
        ("load_model", "RepositoryModelLoad", "OK", "plain"),
        ("unload_model", "RepositoryModelUnload", "OK", "plain"),
        ("load_model", "RepositoryModelLoad", "MODEL_NOT_FOUND", "nothing"),
    ]


class NoModels:
    """Quotas of a tenant that may load nothing."""

    def require_model(self, tenant: str, has: int) -> None:
        """See `live.faces.Quotas`."""
        raise QuotaExceeded(
            f"tenant {tenant!r} may have 0 models; it has {has}", 1.0, quota="models", limit="0"
        )


async def test_loads_are_charged(tmp_path: Path) -> None:
    options = {"root": folder(tmp_path, 2), "quotas": NoModels()}
    async with calls({"plain": PLAIN}, live_options=options) as at:
        known(at, "2.keras")
        assert (await refused(at, loading()))[0] == "RESOURCE_EXHAUSTED"
        assert await index(at) == [("plain", "1", "READY")]
