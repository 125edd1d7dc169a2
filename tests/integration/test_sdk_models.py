"""Models that are loaded, unloaded and chosen by either client, against a server whose faults are scripted."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import stat
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import stepwell
from stepwell import errors
from stepwell._base import addresses
from stepwell.v1 import models_pb2
from support.sdk.client_kinds import connect
from support.sdk.scripted_admin import STAGES, ScriptedModels
from support.sdk.scripted_server import FINGERPRINT, MODEL, Fault

SHELLS = ("sync", "async")
X = np.ones((1, 2), np.float32)
LOST = Fault(after_work=True)
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def server() -> Iterator[ScriptedModels]:
    with ScriptedModels() as server:
        yield server


@pytest.fixture(params=SHELLS)
async def client(request: pytest.FixtureRequest, server: ScriptedModels) -> AsyncIterator[Any]:
    async with connect(request.param, server.address, timeout_s=60.0) as client:
        yield client


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "next.keras"
    path.write_text("2")
    return path


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is on another machine, as far as its address says."""
    monkeypatch.setattr(addresses, "is_on_this_machine", lambda _: False)


class Model:
    """Looks like a model of Keras to who asks for no more than its class and `save`."""

    __module__ = "keras.models"

    def __init__(self, width: int) -> None:
        self._width = width
        self.saved: list[str] = []

    def save(self, path: str) -> None:
        self.saved.append(path)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("width", str(self._width))


def is_gone(path: str) -> bool:
    return not os.path.exists(os.path.dirname(path))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


async def test_a_version_is_loaded_and_live(client: Any, server: ScriptedModels, file: Path) -> None:
    session = await client.open_session(MODEL)
    stages: list[str] = []
    loaded = await client.load_model(
        MODEL, file, sessions="carry", labels=["canary", "b"], unload_previous=True, progress=stages.append
    )
    assert isinstance(loaded, stepwell.LoadedModel)
    assert (loaded.name, loaded.version, loaded.moved_sessions) == (MODEL, 2, 1)
    assert loaded.fingerprint == f"{FINGERPRINT}-2"
    assert stages == list(STAGES)
    (request,) = server.requests("LoadModel")
    assert request == models_pb2.LoadModelRequest(
        name=MODEL,
        path=str(file),
        sessions=models_pb2.SESSION_POLICY_CARRY,
        labels=["canary", "b"],
        unload_previous=True,
    )
    await session.step(X)
    assert session.model_version == 2
    versions = (await client.model(MODEL)).versions
    assert [(one.version, one.is_default, one.labels) for one in versions] == [
        (1, False, ()),
        (2, True, ("b", "canary")),
    ]
    assert {one.state for one in versions} == {"ready"}


async def test_one_beside_the_default_is_described_as_itself(
    client: Any, server: ScriptedModels, file: Path
) -> None:
    loaded = await client.load_model(MODEL, str(file), version=7, default=False)
    assert (loaded.version, loaded.fingerprint) == (7, f"{FINGERPRINT}-7")
    assert (await client.model(MODEL)).version == 1
    (request,) = server.requests("LoadModel")
    assert (request.version, request.keep_default) == (7, True)


async def test_an_update_is_the_next_version_and_takes_the_sessions_with_it(
    client: Any, server: ScriptedModels, file: Path
) -> None:
    assert (await client.update_model(MODEL, file)).version == 2
    (request,) = server.requests("LoadModel")
    assert request.sessions == models_pb2.SESSION_POLICY_CARRY
    assert request.unload_previous
    assert not request.version


async def test_a_keras_model_is_saved_for_the_server_to_read(client: Any, server: ScriptedModels) -> None:
    model = Model(2)
    server.fail("LoadModel", Fault(grpc.StatusCode.FAILED_PRECONDITION, "no", "MODEL_LOAD_FAILED"))
    with pytest.raises(errors.ModelLoadError):
        await client.update_model(MODEL, model)
    (path,) = [request.path for request in server.requests("LoadModel")]
    assert os.path.isabs(path)
    assert path.endswith(f"/{MODEL}.keras")
    assert server.requests("LoadModel")[0].is_temporary, "so that the server keeps what it makes of it"
    assert is_gone(path), "whatever becomes of it"


@pytest.mark.usefixtures("elsewhere")
async def test_a_file_is_sent_to_another_machine_in_pieces(
    client: Any, server: ScriptedModels, file: Path
) -> None:
    content = b" " * 600_000 + b"2"
    write(file, content)
    stages: list[str] = []
    assert (await client.load_model(MODEL, file, progress=stages.append)).version == 2
    assert stages == ["upload of 0.6 MB", *STAGES]
    (received,) = server.requests("UploadModel")
    assert [len(one.content) for one in received] == [262_144, 262_144, 75_713]
    assert server.loaded == [content]
    assert not server.requests("LoadModel")[0].path


@pytest.mark.usefixtures("elsewhere")
async def test_a_path_of_the_servers_own_disk_is_named(
    client: Any, server: ScriptedModels, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    await client.load_model(MODEL, "next.keras", upload=False)
    assert server.requests("LoadModel")[0].path == "next.keras"
    with pytest.raises(FileNotFoundError):
        await client.load_model(MODEL, "nowhere.keras")
    assert len(server.calls) == 1


async def test_a_file_may_be_sent_on_the_same_machine_too(
    client: Any, server: ScriptedModels, file: Path
) -> None:
    write(file, b"")
    with pytest.raises(errors.ModelLoadError, match="no model"):
        await client.load_model(MODEL, file, upload=True)
    assert server.loaded == [b""], "nothing is sent too"
    model = Model(2)
    with pytest.raises(errors.ModelLoadError, match="no model"):
        await client.load_model(MODEL, model, upload=True)
    assert server.loaded[1].startswith(b"PK")


@pytest.mark.parametrize(
    ("method", "first", "second"),
    [
        ("UploadModel", Fault(), Fault()),
        ("LoadModel", Fault(reason="STARTING"), Fault(FULL, "busy", "OVERLOADED")),
    ],
)
async def test_an_upload_and_a_load_that_was_refused_for_now_are_tried_again(
    client: Any, server: ScriptedModels, file: Path, method: str, first: Fault, second: Fault
) -> None:
    server.fail(method, first)
    server.fail(method, second)
    assert (await client.load_model(MODEL, file, upload=method == "UploadModel")).version == 2
    assert len(server.requests(method)) == 3


async def test_a_load_whose_answer_is_lost_is_made_once(
    client: Any, server: ScriptedModels, file: Path
) -> None:
    server.fail("LoadModel", LOST, 10)
    with pytest.raises(errors.UnavailableError, match="scripted") as raised:
        await client.load_model(MODEL, file)
    assert raised.value.outcome == "unknown"
    note = "it is not known whether the model was loaded: see client.model('sum').versions"
    assert raised.value.__notes__ == [note]
    assert sorted(server.widths) == [1, 2]
    with pytest.raises(errors.UnavailableError) as raised:
        await client.load_model(MODEL, file, version=9)
    assert raised.value.__notes__ == [f"{note}; you may repeat the call, which fails if version 9 exists"]
    server.fail_no_more()
    with pytest.raises(errors.ModelVersionExistsError):
        await client.load_model(MODEL, file, version=9)
    assert (sorted(server.widths), len(server.requests("LoadModel"))) == ([1, 2, 9], 3)


async def test_the_default_goes_forward_and_back(client: Any, server: ScriptedModels, file: Path) -> None:
    await client.load_model(MODEL, file)
    session = await client.open_session(MODEL)
    back = await client.set_default(MODEL, 1, sessions="migrate", migration="old")
    assert (back.version, back.previous_version, back.moved_sessions) == (1, 2, 1)
    (request,) = server.requests("SetDefault")
    assert (request.sessions, request.migration) == (models_pb2.SESSION_POLICY_MIGRATE, "old")
    await session.step(X)
    assert session.model_version == 1
    write(file, b"5")
    await client.load_model(MODEL, file, default=False)
    with pytest.raises(errors.ModelMismatchError, match="output y differs"):
        await client.set_default(MODEL, 3, sessions="carry")


@pytest.mark.parametrize(
    ("method", "call", "arguments"),
    [
        ("SetDefault", "set_default", (2,)),
        ("SetLabel", "set_label", ("canary", 2)),
        ("UnloadModel", "unload_model", (2,)),
    ],
)
async def test_what_may_be_repeated_is_tried_again(
    client: Any, server: ScriptedModels, file: Path, method: str, call: str, arguments: tuple[Any, ...]
) -> None:
    await client.load_model(MODEL, file, default=False)
    server.fail(method, Fault(), 2)
    await getattr(client, call)(MODEL, *arguments)
    assert len(server.requests(method)) == 3


async def test_labels_are_given_and_taken(client: Any, server: ScriptedModels, file: Path) -> None:
    await client.load_model(MODEL, file, default=False)
    assert (await client.set_label(MODEL, "canary", 2)).version == 2
    assert (await client.model(f"{MODEL}:canary")).version == 2
    assert await client.remove_label(MODEL, "canary") is None
    assert not server.labels
    with pytest.raises(errors.ModelNotFoundError):
        await client.set_label(MODEL, "canary", 3)


async def test_a_version_in_use_stays(client: Any, server: ScriptedModels, file: Path) -> None:
    with pytest.raises(errors.ModelInUseError, match="default"):
        await client.unload_model(MODEL, 1)
    with pytest.raises(errors.ModelNotFoundError):
        await client.unload_model(MODEL, 2)
    await client.unload_model(MODEL, 1, force=True)
    assert not server.widths


async def test_what_progress_raises_ends_the_call(client: Any, server: ScriptedModels, file: Path) -> None:
    def progress(stage: str) -> None:
        raise LookupError(stage)

    with pytest.raises(LookupError, match="waiting"):
        await client.load_model(MODEL, file, progress=progress)
    assert (await client.model(MODEL)).name == MODEL, "the client goes on"


async def test_a_load_ends_by_its_time_limit(client: Any, server: ScriptedModels, file: Path) -> None:
    gate, arrived = server.hold("LoadModel")
    outcome = ""
    for limit_s in (0.2, 2.0, 20.0):  # a busy machine gets more time
        with pytest.raises(errors.DeadlineExceededError) as raised:
            await client.load_model(MODEL, file, timeout_s=limit_s)
        outcome = raised.value.outcome
        if arrived.acquire(timeout=0):
            break
    assert outcome == "unknown"
    gate.set()


async def test_an_async_load_can_be_cancelled(server: ScriptedModels) -> None:
    gate, arrived = server.hold("LoadModel")
    model = Model(2)
    async with stepwell.aio.connect(server.address) as client:
        task = asyncio.create_task(client.update_model(MODEL, model))
        assert await asyncio.to_thread(arrived.acquire, timeout=100)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
    assert is_gone(model.saved[0])


NAME = "name must be 1 to 128 letters, digits, _, - or .; got"
POLICY = "sessions must be one of ['keep', 'carry', 'migrate', 'reset']; got"
VERSION = "version must be a whole number from 1 to 9223372036854775807; got"
LABEL = "must be 1 to 64 letters, digits, _, - or ., not digits alone; got"
MIGRATION = "migration must be"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a@2"}, f"{NAME} 'a@2'"),
        ({"name": 5}, f"{NAME} 5"),
        ({"model": 5}, "model must be the path of a model's file or a keras.Model; got 5"),
        ({"version": 0}, f"{VERSION} 0"),
        ({"version": 2**63}, f"{VERSION} {2**63}"),
        ({"version": "2"}, f"{VERSION} '2'"),
        ({"version": True}, f"{VERSION} True"),
        ({"sessions": "drop"}, f"{POLICY} 'drop'"),
        ({"sessions": None}, f"{POLICY} None"),
        ({"sessions": "migrate", "migration": ""}, f"{MIGRATION} the name of a function; got ''"),
        (
            {"sessions": "carry", "migration": "f"},
            f"{MIGRATION} None unless sessions is 'migrate'; got 'f' with sessions='carry'",
        ),
        ({"progress": 3}, "progress must be a function that takes a text, or None; got 3"),
        ({"labels": "canary"}, "labels must be a list of labels; got 'canary'"),
        ({"labels": ["2"]}, f"a label {LABEL} '2'"),
        ({"labels": [""]}, f"a label {LABEL} ''"),
        ({"upload": "yes"}, "upload must be True, False or None; got 'yes'"),
        (
            {"default": False, "sessions": "carry"},
            "sessions must be 'keep' and unload_previous False with default=False, because the default does not move; got",
        ),
        ({"timeout_s": 0}, "timeout_s must be"),
    ],
)
async def test_a_wrong_argument_costs_no_call(
    client: Any, server: ScriptedModels, file: Path, change: dict[str, Any], message: str
) -> None:
    arguments = {"name": MODEL, "model": file} | change
    with pytest.raises(errors.InvalidInputError) as raised:
        await client.load_model(**arguments)
    assert str(raised.value).startswith(message)
    assert not server.calls


async def test_wrong_arguments_of_the_others(client: Any, server: ScriptedModels) -> None:
    for call, message in (
        (client.unload_model("a b", 2), NAME),
        (client.unload_model(MODEL, -1), VERSION),
        (client.set_default(MODEL, None), VERSION),
        (client.set_default(MODEL, 2, sessions="all"), POLICY),
        (client.set_label(MODEL, "1", 2), f"label {LABEL}"),
        (client.set_label(MODEL, "x", 0), VERSION),
        (client.remove_label(MODEL, "a b"), f"label {LABEL}"),
    ):
        with pytest.raises(errors.InvalidInputError) as raised:
            await call
        assert str(raised.value).startswith(message)
    assert not server.calls


async def test_a_file_that_cannot_be_sent_is_named(
    client: Any, server: ScriptedModels, tmp_path: Path
) -> None:
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        await client.load_model(MODEL, tmp_path, upload=True)
    assert not server.calls


def test_a_saved_model_is_its_users_alone(server: ScriptedModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are not for everybody on the machine."""
    modes: list[int] = []
    enter = server.enter

    def entered(method: str, request: Any) -> Any:
        if method == "LoadModel":
            modes.append(stat.S_IMODE(os.stat(os.path.dirname(request.path)).st_mode))
        return enter(method, request)

    monkeypatch.setattr(server, "enter", entered)
    with stepwell.connect(server.address) as client, pytest.raises(errors.ModelLoadError):
        client.update_model(MODEL, Model(2))
    assert modes == [0o700]


def test_what_was_loaded_shows_itself(server: ScriptedModels, file: Path) -> None:
    with stepwell.connect(server.address) as client:
        loaded = client.load_model(MODEL, file)
    assert repr(loaded).startswith("LoadedModel('sum', version=2, inputs=[")
    assert dataclasses.replace(loaded, moved_sessions=3).moved_sessions == 3
