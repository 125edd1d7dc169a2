"""What else works for step functions as for Keras models: Triton's protocol, metrics, files of sessions, moves between versions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx")

from onnx import numpy_helper

import stepwell
from stepwell_server.rpc.triton.inference import service_pb2
from support.models import programs, step_functions
from support.models.step_function_kinds import KINDS, RNG, Kind, equal, saved
from support.peers.wire import Wire
from support.servers.both_fronts import FRONTS, called, needs_native
from support.servers.server_process import ServerProcess
from support.telemetry.scrape import Scrape
from support.triton.triton_requests import request

TRITON = "inference.GRPCInferenceService"
#: A module of the operator: a state of 4 elements becomes one of 6.
MIGRATION = """
import numpy as np

def widen(states):
    h = states["h"]
    return {"h": np.concatenate([h, h[:, :2] + 1], axis=1)}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved(tmp_path_factory.mktemp("kinds"))


def serve(files: dict[str, Path], *arguments: str, **options: Any) -> ServerProcess:
    models = [f"{name}={path}" for name, path in files.items()]
    found = ("--cache-dir", str(programs.cache_dir()), "--listen", "127.0.0.1:0", "--store", "memory")
    return ServerProcess(*models, *found, *arguments, **options)


@pytest.fixture(scope="module", params=FRONTS)
def server(request: pytest.FixtureRequest, files: dict[str, Path]) -> Iterator[ServerProcess]:
    options = ("--front", request.param, "--metrics-listen", "127.0.0.1:0", "--log-format", "json")
    with serve(files, *options) as found:
        yield found


def inferred(wire: Wire, name: str, given: dict[str, Any], **sequence: Any) -> dict[str, Any]:
    """The answer to a request of Triton's, in which one number a row has an axis of its own."""
    arrays = {key: array.reshape(len(array), -1) for key, array in given.items()}
    message = request(*arrays.items(), model=name, **sequence)
    code, *raw = called(wire, "ModelInfer", message.SerializeToString(), service=TRITON)
    assert code == "OK", raw
    reply = service_pb2.ModelInferResponse.FromString(raw[0])
    dtypes = {"FP32": np.float32, "FP16": np.float16, "INT64": np.int64}
    return {
        each.name: np.frombuffer(content, dtypes[each.datatype]).reshape(list(each.shape))
        for each, content in zip(reply.outputs, reply.raw_output_contents, strict=True)
    }


@needs_native
@pytest.mark.parametrize("name", KINDS)
def test_sequences_of_triton_equal_a_plain_loop(name: str, server: ServerProcess) -> None:
    kind = KINDS[name]
    sequences = {int(number): kind.drawn() for number in RNG.integers(1, 1 << 40, 3)}
    wanted = {number: kind.loop(steps) for number, steps in sequences.items()}
    with Wire(server.address) as wire:
        for t in range(len(next(iter(sequences.values())))):
            for number, steps in sequences.items():
                ends = t == len(steps) - 1
                made = inferred(wire, name, steps[t], sequence_id=number, start=t == 0, end=ends)
                for key, array in wanted[number][t].items():
                    np.testing.assert_array_equal(made[key].reshape(array.shape), array)
        raw = service_pb2.ModelConfigRequest(name=name).SerializeToString()
        config = service_pb2.ModelConfigResponse.FromString(
            called(wire, "ModelConfig", raw, service=TRITON)[1]
        )
        states = config.config.sequence_batching.state
        assert [each.input_name for each in states] == list(kind.initial)
        assert [list(each.dims) for each in states] == [
            list(array.shape[1:]) for array in kind.initial.values()
        ]


@needs_native
def test_steps_are_counted(server: ServerProcess) -> None:
    metrics = json.loads(server.wait_for_log('"metrics"'))["address"]
    kind = KINDS["two"]

    def counted(name: str) -> float:
        return Scrape.of(metrics).value(name, "two")

    before = counted("stepwell_pass_time_steps_total"), counted("stepwell_pass_rows_sum")
    with stepwell.connect(server.address) as client, client.open_sessions("two", 3) as group:
        for _ in range(4):
            group.step({key: np.concatenate([draw() for _ in range(3)]) for key, draw in kind.inputs.items()})
    assert counted("stepwell_pass_rows_sum") == before[1] + 12
    assert counted("stepwell_pass_time_steps_total") > before[0]


@needs_native
@pytest.mark.parametrize("name", KINDS)
def test_sessions_move_in_files(
    name: str, server: ServerProcess, files: dict[str, Path], tmp_path: Path
) -> None:
    """As the file of a state, and as an exported session on a server of another front."""
    kind = KINDS[name]
    steps = kind.drawn()
    wanted = kind.loop(steps)
    session_id = f"{name}-{RNG.integers(1 << 40)}"
    with stepwell.connect(server.address) as client:
        session = client.open_session(name, session_id=session_id)
        for given, expected in zip(steps[:2], wanted, strict=False):
            equal(session.step(given), expected)
        session.get_state().save(tmp_path / "state.npz")
        assert client.export_sessions(tmp_path / "all.sessions", [session_id]).exported == 1
        client.close_session(session_id)
        assert client.import_sessions(tmp_path / "all.sessions").imported == 1
        session = client.open_session(name, session_id=session_id)
        assert session.position == 2
        equal(session.step(steps[2]), wanted[2])
        with client.open_session(name) as other:
            other.reset_states(stepwell.State.load(tmp_path / "state.npz"))
            for given, expected in zip(steps[2:], wanted[2:], strict=True):
                equal(other.step(given), expected)
        x = {key: np.stack([given[key] for given in steps], 1) for key in steps[0]}
        made, _ = client.predict(name, x)
        equal(made, {key: np.stack([each[key] for each in wanted], 1) for key in wanted[0]})


# ------------------------------------------------------------------------------------------------------------- versions


def other_weights() -> Any:
    found = step_functions.cell()
    for tensor in found.graph.initializer:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(array * np.float32(0.5), tensor.name))
    return found


def wider() -> Any:
    return step_functions.cell(units=6)


PLAIN = KINDS["plain"]
RETRAINED = Kind(other_weights, PLAIN.inputs, PLAIN.states, PLAIN.initial)
WIDER = Kind(wider, PLAIN.inputs, PLAIN.states, {"h": np.zeros((1, 6), np.float32)})


@pytest.fixture(scope="module")
def movable(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("moves")
    (folder / "own_moves.py").write_text(MIGRATION)
    arguments = ("--migration", "widen=own_moves:widen")
    models = {f"{name}": files["plain"] for name in ("carried", "widened", "begun")}
    with serve(models, *arguments, environment={"PYTHONPATH": str(folder)}) as found:
        yield found


def test_sessions_are_carried_to_other_weights(movable: ServerProcess, tmp_path: Path) -> None:
    steps, states = PLAIN.drawn(), dict(PLAIN.initial)
    with stepwell.connect(movable.address) as client, client.open_session("carried") as session:
        for given, expected in zip(steps, PLAIN.loop(steps, states), strict=True):
            equal(session.step(given), expected)
        file = step_functions.saved(tmp_path, "retrained", other_weights)
        assert client.load_model("carried", file, sessions="carry").moved_sessions == 1
        for given, expected in zip(steps, RETRAINED.loop(steps, states), strict=True):
            equal(session.step(given), expected)


def test_a_function_gives_sessions_the_states_of_another_version(
    movable: ServerProcess, tmp_path: Path
) -> None:
    steps, states = PLAIN.drawn(), dict(PLAIN.initial)
    file = step_functions.saved(tmp_path, "wider", wider)
    with stepwell.connect(movable.address) as client, client.open_session("widened") as session:
        for given, expected in zip(steps, PLAIN.loop(steps, states), strict=True):
            equal(session.step(given), expected)
        with pytest.raises(stepwell.StepwellError, match=r"state 'h'"):
            client.load_model("widened", file, sessions="carry")
        loaded = client.load_model("widened", file, sessions="migrate", migration="widen")
        assert loaded.moved_sessions == 1
        h = states["h"]
        states = {"h": np.concatenate([h, h[:, :2] + 1], axis=1)}
        np.testing.assert_array_equal(session.get_state()["h"], states["h"])
        for given, expected in zip(steps, WIDER.loop(steps, states), strict=True):
            equal(session.step(given), expected)


def test_sessions_begin_anew_with_another_version(movable: ServerProcess, tmp_path: Path) -> None:
    steps = PLAIN.drawn()
    with stepwell.connect(movable.address) as client, client.open_session("begun") as session:
        session.step(steps[0])
        client.load_model("begun", step_functions.saved(tmp_path, "wider", wider), sessions="reset")
        for given, expected in zip(steps, WIDER.loop(steps), strict=True):
            equal(session.step(given), expected)


@pytest.mark.slow
def test_a_start_checks_with_ones_own_data(files: dict[str, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.concatenate([each["x"] for each in PLAIN.drawn()])[np.newaxis])
    with serve({"plain": files["plain"]}, "--check-with", f"plain={tmp_path}/x.npz") as server:
        server.signal()
        _, _, err = server.finish()
    assert "compared with ONNX Runtime in a plain loop model=plain" in err
    np.savez(tmp_path / "x.npz", z=np.zeros((1, 4, 3)))
    with serve({"plain": files["plain"]}, "--check-with", f"plain={tmp_path}/x.npz", ready=False) as server:
        code, _, err = server.finish()
    assert code == 2
    assert err.splitlines()[-1] == (
        f"stepwell: error: model plain: --check-with: {tmp_path}/x.npz: must hold the inputs 'x'; got 'z'"
    )


def test_a_server_refuses_a_step_function_with_advice_for_servers(tmp_path: Path) -> None:
    file = step_functions.saved(tmp_path, "mic", step_functions.branches)
    with serve({"mic": file}, ready=False) as server:
        code, _, err = server.finish()
    assert code == 2
    assert err.splitlines()[-1] == (
        f"stepwell: error: model mic: {file}: input 'input' must have a known shape; the file leaves [?] of a row open. Give it, "
        "--shape input=SIZES. Here the option is a table of a file model.toml next to the model; 'stepwell compile --inspect' shows "
        "which it needs"
    )
