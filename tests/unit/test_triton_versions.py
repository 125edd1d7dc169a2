"""Triton's requests that name versions, and sequences on versions, on a real engine with a fake executor."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from stepwell_server.catalog.known_files import KnownFiles
from stepwell_server.core.callers import Caller, Role
from stepwell_server.engine.api import SessionPolicy
from stepwell_server.errors import InvalidInput, ModelNotFound, ServerError
from stepwell_server.rpc.steps.stream import StreamLimits
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.repository import Repository
from stepwell_server.rpc.triton.servicer import TritonServicer
from stepwell_server.rpc.triton.versions import InferModels, read_version
from support.engine.catalog_on_engine import FakeLoads, live_models
from support.engine.fake_executor import PLAIN
from support.engine.harness import Harness
from support.engine.versions import WIDE, after, serving, weights
from support.rpc.fake_call import FakeCall, Requests
from support.triton.triton_requests import Array, Client, NoPasses, outputs_of, request

INITIAL = np.array([[0.5, -0.25]], np.float32)
X = np.array([[1, 2]], np.float32)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with serving() as at:
        yield Client(at)


async def send(client: Client, *arrays: Any, version: str = "", **fields: Any) -> pb.ModelInferResponse:
    message = request(*arrays, **fields)
    message.model_version = version
    return await client.send(message)


async def refused(client: Client, kind: type[ServerError], **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        await send(client, X, **fields)
    return caught.value.message


def y(response: pb.ModelInferResponse) -> tuple[Array, str]:
    return outputs_of(response)["y"], response.model_version


def right(version: int, count: int) -> Array:
    """The last output of a sequence of a version."""
    return after(version, weights(version).initial[0][None], [X] * count)[0]


def test_valid_and_invalid_versions() -> None:
    assert [read_version(text) for text in ("", "1", "007", "0", str(2**63 - 1))] == [
        None,
        1,
        7,
        0,
        2**63 - 1,
    ]
    for text in ("x", "-1", "1.0", "2x", " 1", "²", str(2**63), "1" * 200):
        with pytest.raises(InvalidInput, match=r"specified version string '.{1,160}' .*> 0$"):
            read_version(text)


async def test_requests_are_answered_by_the_version_that_they_name(client: Client) -> None:
    await client.harness.engine.load_version("plain", 2, weights(2))
    for version, ran in (("", 1), ("1", 1), ("2", 2)):
        np.testing.assert_array_equal(y(await send(client, X, version=version))[0], right(ran, 1))
        for count in (1, 2):
            said = await send(client, X, version=version, sequence_id=f"v{version}", start=count == 1)
            np.testing.assert_array_equal(y(said)[0], right(ran, count))
            assert said.model_version == str(ran)
    on = {
        name: await client.harness.engine.session_info(f'triton/plain/"{name}"') for name in ("v", "v1", "v2")
    }
    assert {name: (info.version, info.is_pinned) for name, info in on.items()} == {
        "v": (1, False),
        "v1": (1, True),
        "v2": (2, True),
    }
    assert await refused(client, ModelNotFound, version="3") == (
        "Request for unknown model: 'plain' version 3 is not found"
    )
    assert await refused(client, ModelNotFound, version="3", sequence_id=1, start=True) == (
        "Request for unknown model: 'plain' version 3 is not found"
    )
    assert "version should be an integral value > 0" in await refused(client, InvalidInput, version="x")
    message = request(X)
    message.model_name = "plain@2"
    with pytest.raises(ModelNotFound, match="Request for unknown model: 'plain@2' is not found"):
        await client.send(message)


async def test_a_sequence_continues_on_its_version(client: Client) -> None:
    await client.harness.engine.load_version("plain", 2, weights(2))
    await send(client, X, version="2", sequence_id=5, start=True)
    for count, version in ((2, ""), (3, "2")):
        answer, ran = y(await send(client, X, version=version, sequence_id=5))
        assert ran == "2"
        np.testing.assert_array_equal(answer, right(2, count))
    said = await refused(client, InvalidInput, version="1", sequence_id=5)
    assert said == (
        "inference request for sequence 5 to model 'plain' must specify the START flag on the first request of the"
        " sequence; the sequence is on version 2 of the model, and the request asks for version 1"
    )
    np.testing.assert_array_equal(y(await send(client, X, sequence_id=5))[0], right(2, 4))


async def test_start_begins_on_the_version_that_it_names(client: Client) -> None:
    await client.harness.engine.load_version("plain", 2, weights(2))
    ran = []
    for version in ("", "2", "2", "1", ""):
        await send(client, X, sequence_id=5, version=version, start=True)
        answer, number = y(await send(client, X, sequence_id=5))
        np.testing.assert_array_equal(answer, right(int(number), 2))
        info = await client.harness.engine.session_info("triton/plain/5")
        ran.append((number, info.is_pinned))
    assert ran == [("1", False), ("2", True), ("2", True), ("1", True), ("1", False)]
    await client.harness.engine.set_default("plain", 2, SessionPolicy.KEEP)
    assert y(await send(client, X, sequence_id=5))[1] == "1"  # it stays
    assert y(await send(client, X, sequence_id=5, start=True))[1] == "2"


async def test_a_carry_in_the_middle_of_a_sequence(client: Client) -> None:
    for one, version in ((1, ""), (2, "1")):
        await send(client, X, sequence_id=one, start=True, version=version)
    await client.harness.engine.load_version("plain", 2, weights(2))
    await client.harness.engine.set_default("plain", 2, SessionPolicy.CARRY)
    state = after(1, INITIAL, [X])[1]
    answer, ran = y(await send(client, X, sequence_id=1))
    assert ran == "2"
    np.testing.assert_array_equal(answer, after(2, state, [X])[0])
    assert y(await send(client, X, sequence_id=2))[1] == "1"  # it was begun with its version
    assert "is on version 2 of the model, and the request asks for version 1" in await refused(
        client, InvalidInput, sequence_id=1, version="1"
    )


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("policy", [SessionPolicy.CARRY, SessionPolicy.KEEP])
async def test_a_request_repeated_across_a_move_counts_once(
    client: Client, policy: SessionPolicy, start: bool
) -> None:
    first: dict[str, Any] = {"sequence_id": 1, "start": True, "stepwell_request_id": 6}
    said = await send(client, X, **first)
    again = first
    if not start:
        again = {"sequence_id": 1, "stepwell_request_id": 7, "stepwell_revision": 1, "version": "1"}
        said = await send(client, X, **again)
    await client.harness.engine.load_version("plain", 2, weights(2))
    await client.harness.engine.set_default("plain", 2, policy)
    answer = await send(client, X, **again)
    assert answer.raw_output_contents == said.raw_output_contents
    assert answer.parameters["stepwell_replayed"].bool_param
    info = await client.harness.engine.session_info("triton/plain/1")
    assert (info.revision, info.position) == ((1, 1) if start else (2, 2))
    # another one is not taken for it
    if policy is SessionPolicy.CARRY and not start:
        later = {**again, "stepwell_request_id": 8, "stepwell_revision": 2}
        assert "asks for version 1" in await refused(client, InvalidInput, **later)


async def test_a_repeated_end_is_answered_after_its_version_was_unloaded(client: Client) -> None:
    await send(client, X, sequence_id=1, start=True)
    last: dict[str, Any] = {
        "sequence_id": 1,
        "end": True,
        "stepwell_request_id": 7,
        "stepwell_revision": 1,
    }
    said = await send(client, X, **last)
    await client.harness.engine.load_version("plain", 2, weights(2))
    await client.harness.engine.set_default("plain", 2, SessionPolicy.CARRY)
    await client.harness.engine.unload_version("plain", 1)
    answer = await send(client, X, **last)
    assert (answer.model_version, answer.raw_output_contents) == ("1", said.raw_output_contents)
    await client.harness.engine.load_version("plain", 3, WIDE)
    await client.harness.engine.set_default("plain", 3, SessionPolicy.RESET)
    await client.harness.engine.unload_version("plain", 2)
    assert await refused(client, ModelNotFound, **last) == (
        "Request for unknown model: 'plain' version 1 is not found"
    )


async def test_a_version_with_other_tensors_has_its_own(client: Client) -> None:
    await client.harness.engine.load_version("plain", 2, WIDE)
    await send(client, X, sequence_id=1, start=True)
    await client.harness.engine.set_default("plain", 2, SessionPolicy.KEEP)
    assert list(outputs_of(await send(client, X, sequence_id=1))) == ["y"]
    assert list(outputs_of(await send(client, X, sequence_id=2, start=True))) == ["z"]
    bad = np.ones((1, 3), np.float32)
    with pytest.raises(InvalidInput, match="unexpected shape for input 'x'"):
        await send(client, bad, sequence_id=1)
    with pytest.raises(
        InvalidInput, match="unexpected shape for input 'x'"
    ):  # as by Triton, before the START
        await send(client, bad, sequence_id=3)


async def test_a_start_replaces_a_sequence_whose_version_was_unloaded(client: Client) -> None:
    await client.harness.engine.load_version("plain", 2, weights(2))
    await send(client, X, sequence_id=1, version="2", start=True)
    await client.harness.engine.unload_version("plain", 2, force=True)
    with pytest.raises(ServerError):
        await send(client, X, sequence_id=1)
    assert y(await send(client, X, sequence_id=1, start=True))[1] == "1"


class Served:
    """A servicer of an engine."""

    def __init__(self, at: Harness) -> None:
        self.observer = Requests()
        self.servicer = TritonServicer(
            at.engine,
            at.clock,
            4096,
            StreamLimits(8, 4096),
            self.observer,
            NoPasses(),
            Repository(live_models(at.engine, at.clock, FakeLoads()), KnownFiles(at.engine, {}, None)),
            lambda: True,
        )
        self.call = FakeCall()
        self.call.who = Caller("ann", "", Role.ADMIN)


async def test_metadata_of_versions() -> None:
    async with serving({"other": PLAIN, "plain": PLAIN}) as at:
        await at.engine.load_version("plain", 7, WIDE)
        served = Served(at)
        asked, call = served.servicer, served.call

        async def ready(version: str, name: str = "plain") -> bool:
            return (await asked.model_ready(pb.ModelReadyRequest(name=name, version=version), call)).ready

        assert [await ready(version) for version in ("", "1", "7", "2", "0")] == [
            True,
            True,
            True,
            False,
            False,
        ]
        assert not await ready("", "plain@7")
        with pytest.raises(InvalidInput, match="failed to get model version"):
            await ready("seven")
        for version, versions, output in (("", ["1", "7"], "y"), ("1", ["1"], "y"), ("7", ["7"], "z")):
            metadata = await asked.model_metadata(
                pb.ModelMetadataRequest(name="plain", version=version), call
            )
            assert (list(metadata.versions), metadata.outputs[0].name) == (versions, output)
            config = (
                await asked.model_config(pb.ModelConfigRequest(name="plain", version=version), call)
            ).config
            assert list(config.version_policy.specific.versions) == [1, 7]
            assert config.output[0].name == output
        with pytest.raises(ModelNotFound, match="'plain' version 2 is not found"):
            await asked.model_metadata(pb.ModelMetadataRequest(name="plain", version="2"), call)
        message = request(X)
        message.model_version = "7"
        await asked.model_infer(message, call)

        async def counts(name: str = "", version: str = "") -> dict[tuple[str, str], int]:
            given = pb.ModelStatisticsRequest(name=name, version=version)
            said = (await asked.model_statistics(given, call)).model_stats
            return {(one.name, one.version): one.inference_count for one in said}

        assert await counts() == {("other", "1"): 0, ("plain", "1"): 0, ("plain", "7"): 1}
        assert await counts("plain") == {("plain", "1"): 0, ("plain", "7"): 1}
        assert await counts("plain", "7") == {("plain", "7"): 1}


async def test_programs_of_versions_that_are_unloaded_are_not_kept() -> None:
    async with serving() as at:
        models = InferModels(at.engine, NoPasses())
        seen = []
        for version in range(2, 12):
            await at.engine.load_version("plain", version, weights(version))
            seen.append(models.find("plain", str(version)))
            assert models.find("plain", str(version)) is seen[-1]
            await at.engine.unload_version("plain", version)
        gc.collect()
        assert all(model.is_of(None) for model in seen)
        with pytest.raises(ModelNotFound):
            _ = seen[0].program
        models.find("plain", "")
        assert len(models._known) == 1
