"""Step functions of each kind on both fronts, over HTTP and on replicas: each answer equals a plain loop over ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx")

import stepwell
from support.models import programs
from support.models.step_function_kinds import KINDS, RNG, equal, saved
from support.peers.json_client import JsonClient, path_of
from support.servers.both_fronts import FRONTS, needs_native
from support.servers.fork_server import ForkedServer
from support.servers.valkey_servers import Valkey
from support.stores.valkey_store import fresh_prefix


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module", params=FRONTS)
def server(request: pytest.FixtureRequest, files: dict[str, Path]) -> Iterator[ForkedServer]:
    options = ["--front", request.param]
    if request.param == "native":
        options += ["--http-listen", "127.0.0.1:0"]
    with ForkedServer(files, cache_dir=programs.cache_dir(), extra_args=options) as found:
        yield found


@needs_native
@pytest.mark.parametrize("name", KINDS)
def test_each_front_answers_as_a_plain_loop(name: str, server: ForkedServer) -> None:
    kind = KINDS[name]
    steps = kind.drawn()
    wanted = kind.loop(steps)
    with stepwell.connect(server.address) as client:
        with client.open_session(name) as session, client.open_sessions(name, 3) as group:
            for given, expected in zip(steps, wanted, strict=True):
                equal(session.step(given), expected)
                rows = group.step({key: np.concatenate([array] * 3) for key, array in given.items()})
                equal(rows, {key: np.concatenate([array] * 3) for key, array in expected.items()})
            with session.fork() as twin:
                equal(twin.step(steps[0]), kind.loop([*steps, steps[0]])[-1])
        with client.open_session(name) as session:
            whole = {key: np.stack([given[key] for given in steps], 1) for key in steps[0]}
            trace = session.trace(whole)
            equal(trace.outputs, {key: np.stack([each[key] for each in wanted], 1) for key in wanted[0]})


@needs_native
@pytest.mark.parametrize("name", KINDS)
def test_json_answers_as_a_plain_loop(name: str, server: ForkedServer) -> None:
    if server.http_address is None:
        pytest.skip("the Python front does not answer over HTTP")
    kind = KINDS[name]
    steps = kind.drawn()
    path = path_of(f"{name}-{RNG.integers(1 << 40)}")
    door = JsonClient(server.http_address)
    assert door.json("POST", path, {"model": name})[0] == 200
    for given, wanted in zip(steps, kind.loop(steps), strict=True):
        inputs = [{"name": key, "values": array.reshape(-1).tolist()} for key, array in given.items()]
        body = {"inputs": inputs, "tensor_format": "TENSOR_FORMAT_VALUES"}
        status, made = door.json("POST", f"{path}:step", body)
        assert status == 200, made
        for found, (_key, array) in zip(made["outputs"], wanted.items(), strict=True):
            np.testing.assert_array_equal(np.array(found["values"], array.dtype).reshape(array.shape), array)


@pytest.mark.parametrize("name", KINDS)
def test_replicas_share_sessions(name: str, replicas: list[ForkedServer]) -> None:
    kind = KINDS[name]
    steps = kind.drawn()
    session_id = f"{name}-{RNG.integers(1 << 40)}"
    for place, (given, expected) in enumerate(zip(steps, kind.loop(steps), strict=True)):
        with stepwell.connect(replicas[place % 2].address) as client:
            equal(client.open_session(name, session_id=session_id).step(given), expected)


@pytest.fixture(scope="module")
def replicas(files: dict[str, Path]) -> Iterator[list[ForkedServer]]:
    with Valkey() as valkey:
        store = valkey.url(f"?prefix={fresh_prefix()}")
        options = ["--store", store]
        with (
            ForkedServer(files, cache_dir=programs.cache_dir(), extra_args=options) as one,
            ForkedServer(files, cache_dir=programs.cache_dir(), extra_args=options) as other,
        ):
            yield [one, other]
