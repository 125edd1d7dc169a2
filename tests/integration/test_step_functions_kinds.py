"""Step functions of each kind on both fronts, over HTTP and on replicas: each answer equals a plain loop over ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx")

import onnx

import stepwell
from stepwell.testing import LocalServer
from stepwell_server.engine.executors.onnx_runtime import plain
from support.models import programs, step_functions
from support.peers.json_client import JsonClient, path_of
from support.servers.both_fronts import FRONTS, needs_native
from support.servers.valkey_servers import Valkey
from support.stores.valkey_store import fresh_prefix

RNG = np.random.default_rng()
STEPS = 5


def reals(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A step function."""

    make: Callable[[], onnx.ModelProto]
    inputs: Mapping[str, Callable[[], Any]]
    """What draws an input of one row and one time step."""
    states: Mapping[str, str]
    initial: Mapping[str, Any]

    def loop(self, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The outputs of a plain loop over ONNX Runtime."""
        run, states, found = plain(self.make().SerializeToString()), dict(self.initial), []
        for given in steps:
            made = run({**given, **states})
            states = {name: made[after] for name, after in self.states.items()}
            found.append({name: made[name] for name in made if name not in self.states.values()})
        return found

    def drawn(self) -> list[dict[str, Any]]:
        return [{name: draw() for name, draw in self.inputs.items()} for _ in range(STEPS)]


H = np.zeros((1, 4), np.float32)
KINDS = {
    "plain": Kind(step_functions.cell, {"x": lambda: reals(1, 3)}, {"h": "hn"}, {"h": H}),
    "half": Kind(
        lambda: step_functions.cell(kind=step_functions.HALF),
        {"x": lambda: reals(1, 3).astype(np.float16)},
        {"h": "hn"},
        {"h": H.astype(np.float16)},
    ),
    "single": Kind(lambda: step_functions.cell(batch=1), {"x": lambda: reals(1, 3)}, {"h": "hn"}, {"h": H}),
    "tokens": Kind(
        step_functions.embedding,
        {"token": lambda: RNG.integers(0, 5, 1)},
        {"count": "count_out"},
        {"count": np.zeros((1, 1), np.int64)},
    ),
    "two": Kind(
        step_functions.two,
        {"a": lambda: reals(1, 2), "b": lambda: reals(1, 2)},
        {"past_a": "present_a", "past_b": "present_b"},
        {"past_a": np.zeros((1, 2), np.float32), "past_b": np.zeros((1, 2), np.float32)},
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    return {name: step_functions.saved(folder, name, kind.make) for name, kind in KINDS.items()}


@pytest.fixture(scope="module", params=FRONTS)
def server(request: pytest.FixtureRequest, files: dict[str, Path]) -> Iterator[LocalServer]:
    options = ["--front", request.param]
    if request.param == "native":
        options += ["--http-listen", "127.0.0.1:0"]
    with LocalServer(files, cache_dir=programs.cache_dir(), extra_args=options) as found:
        yield found


def answer(made: Any) -> dict[str, Any]:
    """The outputs of a step, by name."""
    return dict(made) if isinstance(made, Mapping) else {"y": made}


def equal(found: Any, wanted: dict[str, Any]) -> None:
    found = answer(found)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@needs_native
@pytest.mark.parametrize("name", KINDS)
def test_each_front_answers_as_a_plain_loop(name: str, server: LocalServer) -> None:
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
def test_json_answers_as_a_plain_loop(name: str, server: LocalServer) -> None:
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
def test_replicas_share_sessions(name: str, replicas: list[LocalServer]) -> None:
    kind = KINDS[name]
    steps = kind.drawn()
    session_id = f"{name}-{RNG.integers(1 << 40)}"
    for place, (given, expected) in enumerate(zip(steps, kind.loop(steps), strict=True)):
        with stepwell.connect(replicas[place % 2].address) as client:
            equal(client.open_session(name, session_id=session_id).step(given), expected)


@pytest.fixture(scope="module")
def replicas(files: dict[str, Path]) -> Iterator[list[LocalServer]]:
    with Valkey() as valkey:
        store = valkey.url(f"?prefix={fresh_prefix()}")
        options = ["--store", store]
        with (
            LocalServer(files, cache_dir=programs.cache_dir(), extra_args=options) as one,
            LocalServer(files, cache_dir=programs.cache_dir(), extra_args=options) as other,
        ):
            yield [one, other]
