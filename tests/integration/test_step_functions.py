"""Step functions from ONNX files on a real server: everything that sessions of Keras models do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("onnxruntime", reason="the extra onnx")

import onnx

import stepwell
from stepwell.cli import main
from stepwell_server import program_file
from stepwell_server.engine.executors.onnx_runtime import plain
from stepwell_server.program import ONNX_MODEL
from support.models import programs, step_functions
from support.servers.fork_server import ForkedServer

CACHE = {"STEPWELL_CACHE_DIR": str(programs.cache_dir())}
DECLARED = """
[batch-axis]
state = 1
[constant]
sr = 16000
[context]
input = 2
[shape]
input = 4
[name]
output = "score"
"""
NAMES = ("branches", "cell", "embedding", "endless", "logarithm", "two", "quantized")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step-functions")
    for name in NAMES:
        step_functions.saved(folder, name, getattr(step_functions, name))
    (folder / "branches.toml").write_text(DECLARED)
    return folder


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[ForkedServer]:
    models = {name: files / f"{name}.onnx" for name in NAMES if name != "two"}
    with ForkedServer(models, cache_dir=programs.cache_dir()) as found:
        yield found


@pytest.fixture
def client(server: ForkedServer) -> Iterator[stepwell.Client]:
    with stepwell.connect(server.address) as found:
        yield found


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, env=CACHE)


def drawn(*shape: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Loop:
    """`branches` in a plain loop over ONNX Runtime: one call for each row and time step."""

    def __init__(self, rows: int = 1) -> None:
        self._run = plain(step_functions.branches().SerializeToString())
        self.state: Any = np.zeros((2, rows, 3), np.float32)
        self.context: Any = np.zeros((rows, 2), np.float32)

    def step(self, x: Any) -> Any:
        whole = np.concatenate([self.context, x], axis=1)
        made = self._run({"input": whole, "state": self.state, "sr": np.array(16000)})
        self.state, self.context = made["stateN"], whole[:, -2:]
        return made["output"]


def test_one_step_and_many_equal_a_plain_loop(client: stepwell.Client) -> None:
    loop, x = Loop(2), drawn(2, 7, 4)
    with client.open_session("branches", batch_size=2) as session:
        np.testing.assert_array_equal(session.step(x[:, 0]), loop.step(x[:, 0]))
        expected = np.stack([loop.step(x[:, t]) for t in range(1, 7)], axis=1)
        np.testing.assert_array_equal(session.step(x[:, 1:]), expected)
        state = session.get_state()
        np.testing.assert_array_equal(state["state"], loop.state.transpose(1, 0, 2))
        np.testing.assert_array_equal(state["input/context"], loop.context)
        assert (session.position, session.revision) == (7, 2)


def test_states_are_values(client: stepwell.Client, tmp_path: Path) -> None:
    x = drawn(3, 4)
    with client.open_session("branches") as session:
        first = session.step(x[:1])
        kept = session.get_state()
        kept.save(tmp_path / "state.npz")
        with session.fork() as twin:
            np.testing.assert_array_equal(twin.step(x[1:2]), session.step(x[1:2]))
        session.reset_states(stepwell.State.load(tmp_path / "state.npz"))
        later = session.step(x[1:2])
        session.reset_states()
        np.testing.assert_array_equal(session.step(x[:1]), first)
        session.reset_states([kept["state"], kept["input/context"]])
        np.testing.assert_array_equal(session.step(x[1:2]), later)
        with pytest.raises(stepwell.InvalidInputError, match="finite"):
            session.reset_states([np.full((1, 2, 3), np.nan, np.float32), kept["input/context"]])


def test_traces_groups_and_predictions(client: stepwell.Client) -> None:
    x = drawn(40, 5, 4)
    with client.open_sessions("branches", 40) as group:
        together = np.stack([group.step(x[:, t]) for t in range(5)], axis=1)
    y, _ = client.predict("branches", x)
    np.testing.assert_array_equal(y, together)
    with client.open_session("branches") as session:
        trace = session.trace(x[:1])
        np.testing.assert_array_equal(trace.outputs, together[:1])
        loop = Loop()
        for t in range(5):
            loop.step(x[:1, t])
            np.testing.assert_array_equal(trace.states["state"][0, t], loop.state[:, 0])


def test_bits_that_depend_on_the_batch_are_the_same_in_every_one(client: stepwell.Client) -> None:
    for name, width in (("logarithm", 5), ("quantized", 4)):
        x = drawn(20, 3, width)
        x[3] *= 1000
        with client.open_sessions(name, 20) as group:
            together = np.stack([group.step(x[:, t]) for t in range(3)], axis=1)
        for row in (0, 3, 19):
            with client.open_session(name) as session:
                np.testing.assert_array_equal(session.step(x[[row]]), together[[row]])


def test_models_say_why_rows_never_mix(client: stepwell.Client, server: ForkedServer) -> None:
    found = {model.name: model for model in client.models()}
    assert {name: model.proof.rows for name, model in found.items()} == {
        "branches": "proven",
        "cell": "proven",
        "embedding": "proven",
        "endless": "alone",
        "logarithm": "proven",
        "quantized": "alone",
    }
    assert str(found["cell"].proof) == "a step function; its graph keeps rows apart"
    assert not found["quantized"].proof.is_trusted
    assert found["quantized"].batch_sizes == (1,)
    shown = run("models", "show", "quantized", "--server", server.address).stdout
    assert "a step function; each row run alone" in shown
    assert "operator DynamicQuantizeLinear 'xq': rows are not followed through this operator" in shown
    document = json.loads(run("models", "--server", server.address, "--json").stdout)
    assert {model["proof"]["rows"] for model in document["models"]} == {"proven", "alone"}


def test_a_row_that_fails_fails_alone(client: stepwell.Client) -> None:
    with client.open_sessions("embedding", 8) as group:
        tokens = np.arange(8) % 5
        first = group.step(tokens)
        bad = tokens.copy()
        bad[6] = 99
        with pytest.raises(stepwell.StepwellError) as refusal:
            group.step(bad)
        assert "6" in str(refusal.value)
        states = group.get_states()
        assert sorted(np.asarray(states["count"]).reshape(-1).tolist()) == [1] + [2] * 7
        assert first.shape == (8, 3)


def test_an_endless_loop_fails_its_own_rows(client: stepwell.Client) -> None:
    ordinary, endless = np.full((1, 2), 3, np.float32), np.full((1, 2), 5000, np.float32)
    with client.open_session("endless") as one, client.open_session("endless") as other:
        one.step(ordinary)
        with pytest.raises(stepwell.InvalidInputError, match=r"a loop did not end within 0.5 s"):
            other.step(endless)
        np.testing.assert_array_equal(one.step(ordinary), ordinary)
        np.testing.assert_array_equal(other.step(ordinary), ordinary)


def test_sessions_survive_a_kill(files: Path, tmp_path: Path) -> None:
    loop, x = Loop(), drawn(4, 1, 4)
    models = {"branches": files / "branches.onnx"}
    with ForkedServer(models, tmp_path / "data", cache_dir=programs.cache_dir()) as server:
        with stepwell.connect(server.address) as client:
            session = client.open_session("branches", session_id="mic-1")
            for t in range(2):
                np.testing.assert_array_equal(session.step(x[t]), loop.step(x[t]))
        server.kill()
        server.restart()
        with stepwell.connect(server.address) as client:
            session = client.open_session("branches", session_id="mic-1")
            for t in range(2, 4):
                np.testing.assert_array_equal(session.step(x[t]), loop.step(x[t]))


def test_versions_are_loaded_from_files_folders_and_uploads(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (folder / "vad").mkdir(parents=True)
    (folder / "vad" / "model.toml").write_text(DECLARED)
    (folder / "vad" / "1.onnx").write_bytes((files / "branches.onnx").read_bytes())
    options = ["--models", str(folder), "--allow-model-upload"]
    with (
        ForkedServer({}, cache_dir=programs.cache_dir(), extra_args=options) as server,
        stepwell.connect(server.address) as client,
    ):
        loop, x = Loop(), drawn(3, 1, 4)
        session = client.open_session("vad")
        np.testing.assert_array_equal(session.step(x[0]), loop.step(x[0]))
        (folder / "vad" / "2.onnx").write_bytes((files / "branches.onnx").read_bytes())
        loaded = client.load_model("vad", folder / "vad" / "2.onnx", sessions="carry", upload=False)
        assert (loaded.version, loaded.moved_sessions) == (2, 1)
        np.testing.assert_array_equal(session.step(x[1]), loop.step(x[1]))
        # Its names reveal the states, so that it needs no declaration.
        client.load_model("two", files / "two.onnx", upload=True)
        with client.open_session("two") as other:
            one = np.ones((1, 2), np.float32)
            assert other.step({"a": one, "b": one})["total"].tolist() == [[3.0]]
        done = run("compile", str(files / "branches.onnx"), "-o", str(tmp_path / "vad.stepwell"))
        assert done.exit_code == 0, done.stderr
        client.load_model("compiled", tmp_path / "vad.stepwell", upload=True)
        assert client.model("compiled").fingerprint == client.model("vad").fingerprint
        with pytest.raises(stepwell.StepwellError, match="input 'input' must have a known shape"):
            client.load_model("bare", files / "branches.onnx", upload=True)


def test_rows_are_batched_by_trust(files: Path) -> None:
    options = ["--trust-rows", "quantized"]
    models = {"quantized": files / "quantized.onnx"}
    with (
        ForkedServer(models, cache_dir=programs.cache_dir(), extra_args=options) as server,
        stepwell.connect(server.address) as client,
    ):
        proof = client.model("quantized").proof
        assert (proof.rows, proof.is_trusted) == ("trusted", True)
        assert "DynamicQuantizeLinear" in proof.unproven
        assert "as --trust-rows asks" in server.logs()


def test_the_commands(files: Path, tmp_path: Path) -> None:
    model = str(files / "branches.onnx")
    bare = step_functions.saved(tmp_path, "bare", step_functions.branches)
    done = run("compile", str(bare), "--inspect")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines() == [
        "inputs:",
        "  input: float[?, ?]",
        "  state: float[2, ?, 3], the state before a step: stateN holds it after the step",
        "  sr: int64[]",
        "outputs:",
        "  output: float[?, 3]",
        "  stateN: float[?, ?, ?], the state 'state' after a step",
        "",
        "not ready: input 'input' must have a known shape; the file leaves [?] of a row open. Give it, --shape input=SIZES",
        "",
        "note: a file does not show a context. If the model expects the end of the previous 'input' in front of the next one, add --context input=N",
        "",
        "compile it:",
        f"  stepwell compile {bare} --state state:stateN --shape input=SIZE --batch-axis state=1 --constant sr=VALUE",
    ]
    document = json.loads(run("compile", model, "--inspect", "--json").stdout)
    assert (document["problem"], document["states"]) == ("", {"state": "stateN"})
    target = str(tmp_path / "a.stepwell")
    options = [
        "--state",
        "state:stateN",
        "--batch-axis",
        "state=1",
        "--constant",
        "sr=16000",
        "--shape",
        "input=4",
        "--context",
        "input=2",
    ]
    done = run("compile", str(bare), "-o", target, *options, "--name", "output=score")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[:3] == [
        "proof: a step function, its graph keeps rows apart",
        "executor: onnxruntime (ONNX Runtime gives a row the same bits at every batch size)",
        "bits: the same for a row at every batch size (23 sizes up to 256 compared)",
    ]
    np.savez(tmp_path / "x.npz", input=drawn(3, 20, 4))
    done = run("check", model, "--data", str(tmp_path / "x.npz"))
    assert done.exit_code == 0, done.stderr
    assert f"compared with ONNX Runtime on {tmp_path / 'x.npz'}: 3 rows of 20 time steps" in done.stdout
    assert done.stdout.splitlines()[-1] == (
        "verdict: equal: stepping the model gives what ONNX Runtime computes on these sequences"
    )
    assert run("check", model).exit_code == 0
    assert run("check", target).stdout.splitlines()[-1].endswith("in a plain loop, give the .onnx file")
    assert json.loads(run("check", target, "--json").stdout)["verdict"] == "same"
    assert "a step function; its graph keeps rows apart" in run("models", "show", target).stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("compile", "branches.onnx", "--probe-steps", "9"),
            "--probe-steps and --trust-causality are for Keras models",
        ),
        (("compile", "a.keras", "--trust-rows"), "--trust-rows: is for a step function (.onnx); got a.keras"),
        (("compile", "branches.onnx", "--state", "a"), "--state: must be INPUT:OUTPUT"),
        (
            ("compile", "cell.onnx", "--context", "x=9"),
            "refused: cell.onnx: --context: must be shorter than the last axis of 'x'",
        ),
        (
            ("check", "cell.onnx", "--data", "nothing.npy"),
            "not checked: --data: nothing.npy: there is no such file",
        ),
    ],
)
def test_wrong_options_are_refused(
    arguments: tuple[str, ...], says: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    done = run(*arguments)
    assert done.exit_code == 2
    assert says in done.stderr


def huge() -> onnx.ModelProto:
    """Fills a gibibyte, and sums it up."""
    found = step_functions.cell()
    found.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1 << 28]), "size"))
    nodes = [
        step_functions.node("ConstantOfShape", "size", "filled"),
        step_functions.node("ReduceSum", "filled", "nothing", keepdims=0),
        *found.graph.node[:-1],
        step_functions.node("MatMul", "hn V", "product"),
        step_functions.node("Add", "product nothing", "y"),
    ]
    del found.graph.node[:]
    found.graph.node.extend(nodes)
    return found


def test_a_graph_that_takes_too_much_memory_is_ended_in_the_sandbox(tmp_path: Path) -> None:
    file = step_functions.saved(tmp_path, "huge", huge)
    done = run(
        "compile", str(file), "-o", str(tmp_path / "a.stepwell"), "--max-compile-memory-bytes", "512MiB"
    )
    assert done.exit_code == 2
    assert "compiling it must take at most 536870912 bytes of memory" in done.stderr
    assert not (tmp_path / "a.stepwell").exists()


def test_a_graph_that_reads_other_files_is_refused_in_a_compiled_file(files: Path, tmp_path: Path) -> None:
    """A .stepwell file from elsewhere is checked as if it were compiled here."""
    target = tmp_path / "cell.stepwell"
    assert run("compile", str(files / "cell.onnx"), "-o", str(target)).exit_code == 0
    program = program_file.load(target)
    graph = onnx.load_model_from_string(program.files[ONNX_MODEL])
    tensor = graph.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")
    program_file.save(dataclasses.replace(program, files={ONNX_MODEL: graph.SerializeToString()}), target)
    done = run("check", str(target))
    assert done.exit_code == 2
    assert "must be in the file; it is in another file (external data)" in done.stderr
