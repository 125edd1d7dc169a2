"""Step functions as programs: what a declaration adds, which batch sizes are used, and what the executor runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx")

import onnx

from stepwell_server import program_file
from stepwell_server.compile.onnx import declaration, pairs
from stepwell_server.compile.onnx.pipeline import compile_step_function
from stepwell_server.engine.executors import load_executor, onnx_runtime, trial
from stepwell_server.engine.executors.base import ExecutionError
from stepwell_server.engine.executors.step_function import initial_rows, step_of_executor
from stepwell_server.program import ONNX_MODEL, Declaration, Program, ProofOptions
from support.models import step_functions

DECLARED = {
    "lstm": Declaration(batch_axes={"h0": 1, "c0": 1}),
    "branches": Declaration(
        batch_axes={"state": 1},
        constants={"sr": 16000},
        contexts={"input": 2},
        shapes={"input": (4,)},
        names={"output": "score"},
    ),
}


#: Of the sizes that are tried, for tests of something else.
FEW = (1, 2, 16, 17)
_compiled: dict[str, Program] = {}


def compiled(
    name: str,
    folder: Path,
    declared: Declaration | None = None,
    *,
    trust: bool = False,
    sizes: Sequence[int] = FEW,
) -> Program:
    """Compile a model, once for all tests with the same declaration."""
    options = ProofOptions(trust_rows=trust, declaration=declared or DECLARED.get(name, Declaration()))
    key = f"{name} {sizes} {options}"
    if key not in _compiled:
        file = step_functions.saved(folder, name, getattr(step_functions, name))
        _compiled[key] = compile_few(file, options, sizes)
    return _compiled[key]


def compile_few(file: Path, options: ProofOptions, sizes: Sequence[int] = FEW) -> Program:
    """Compile a file, and try few batch sizes only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "LITERT_SIZES", sizes)
        return compile_step_function(file, options)


def stepped(program: Program, inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Step rows over time; `inputs` are (time, rows, ...). Returns the outputs of all time steps and the last states."""
    step = step_of_executor(load_executor(program))
    states: Sequence[Any] = initial_rows(program.initial, inputs[0].shape[1])
    outputs = []
    for values in zip(*inputs, strict=True):
        made, states = step(values, states)
        outputs.append(made)
    return [np.stack(each) for each in zip(*outputs, strict=True)], list(states)


def test_a_cell_equals_a_plain_loop_to_the_bit(tmp_path: Path) -> None:
    program = compiled("cell", tmp_path)
    assert (str(program.proof), program.batch_sizes) == (
        "a step function, its graph keeps rows apart",
        (),
    )
    x = np.random.default_rng(1).standard_normal((6, 5, 3)).astype(np.float32)
    outputs, states = stepped(program, [x])
    run = onnx_runtime.plain(step_functions.cell().SerializeToString())
    h: Any = np.zeros((5, 4), np.float32)
    for t in range(6):
        made = run({"x": x[t], "h": h})
        h = made["hn"]
        np.testing.assert_array_equal(outputs[0][t], made["y"])
    np.testing.assert_array_equal(states[0], h)


def test_rows_come_first_whatever_the_axis_in_the_file(tmp_path: Path) -> None:
    program = compiled("lstm", tmp_path)
    assert [(spec.name, spec.shape) for spec in program.state] == [("h0", (1, 5)), ("c0", (1, 5))]
    assert program.proof.rows == "proven"
    x = np.random.default_rng(1).standard_normal((4, 3, 1, 3)).astype(np.float32)
    outputs, states = stepped(program, [x])
    run = onnx_runtime.plain(step_functions.lstm().SerializeToString())
    h: Any = np.zeros((1, 3, 5), np.float32)
    c: Any = h
    for t in range(4):
        made = run({"x": x[t], "h0": h, "c0": c})
        h, c = made["hn"], made["cn"]
        np.testing.assert_array_equal(outputs[0][t], made["y"])
    np.testing.assert_array_equal(states[1], c.transpose(1, 0, 2))


def test_constants_and_a_context_are_part_of_the_program(tmp_path: Path) -> None:
    program = compiled("branches", tmp_path)
    assert [(spec.name, spec.shape) for spec in program.inputs] == [("input", (4,))]
    assert [(spec.name, spec.shape) for spec in program.outputs] == [("score", (3,))]
    assert [(spec.name, spec.shape) for spec in program.state] == [
        ("state", (2, 3)),
        ("input/context", (2,)),
    ]
    x = np.random.default_rng(1).standard_normal((5, 3, 4)).astype(np.float32)
    outputs, states = stepped(program, [x])
    run = onnx_runtime.plain(step_functions.branches().SerializeToString())
    state: Any = np.zeros((2, 3, 3), np.float32)
    context: Any = np.zeros((3, 2), np.float32)
    for t in range(5):
        whole = np.concatenate([context, x[t]], axis=1)
        made = run({"input": whole, "state": state, "sr": np.array(16000)})
        state, context = made["stateN"], whole[:, -2:]
        np.testing.assert_array_equal(outputs[0][t], made["output"])
    np.testing.assert_array_equal(states[1], context)
    slow = compiled("branches", tmp_path, dataclasses.replace(DECLARED["branches"], constants={"sr": 8000}))
    assert slow.fingerprint != program.fingerprint
    assert not np.array_equal(stepped(slow, [x])[0][0], outputs[0])


def test_weights_in_operators_and_branches_are_counted(tmp_path: Path) -> None:
    def make() -> Any:
        found = step_functions.branches()
        branch = next(each for each in found.graph.node if each.op_type == "If").attribute[0].g
        weights = np.zeros((7, 3), np.float32)
        constant = step_functions.node("Constant", "", "w", value=onnx.numpy_helper.from_array(weights))
        branch.node.insert(0, constant)
        return found

    file = step_functions.saved(tmp_path, "branches", make)
    program = compile_few(file, ProofOptions(declaration=DECLARED["branches"]), (1,))
    assert program.provenance is not None
    # W, rate, zero and half, and the constants of sr and of the branch
    assert program.provenance.parameters == 6 * 3 + 3 + 1 + 7 * 3


def test_several_inputs_outputs_and_states(tmp_path: Path) -> None:
    program = compiled("two", tmp_path)
    assert program.names.inputs == ("a", "b")
    assert program.names.outputs == ("sum", "total")
    assert program.names.state == ("past_a", "past_b")
    a, b = np.random.default_rng(1).standard_normal((2, 3, 4, 2)).astype(np.float32)
    outputs, states = stepped(program, [a, b])
    np.testing.assert_allclose(states[0], a.sum(0), rtol=1e-6)
    np.testing.assert_allclose(outputs[1][-1], (a.sum(0) + b.sum(0) / 2).sum(1, keepdims=True), rtol=1e-5)


def test_initial_states(tmp_path: Path) -> None:
    declared = Declaration(initial={"h": 0.5})
    assert compiled("cell", tmp_path, declared).initial[0].tolist() == [0.5] * 4
    np.savez(tmp_path / "initial.npz", h=np.arange(4.0), other=np.zeros(2))
    found = declaration.parse("initial", (f"h={tmp_path / 'initial.npz'}",))
    program = compiled("cell", tmp_path, Declaration(initial=found))
    assert program.initial[0].tolist() == [0, 1, 2, 3]
    assert program.initial[0].dtype == np.float32


def test_halves_and_integers(tmp_path: Path) -> None:
    half = compile_few(
        step_functions.saved(tmp_path, "half", lambda: step_functions.cell(kind=step_functions.HALF)),
        ProofOptions(),
    )
    assert {spec.dtype for spec in (*half.inputs, *half.outputs)} == {half.state[0].dtype} == {"float16"}
    tokens = compiled("embedding", tmp_path)
    assert (tokens.inputs[0].dtype, tokens.state[0].dtype) == ("int64", "int64")
    outputs, states = stepped(tokens, [np.array([[1, 2], [3, 4]])])
    assert states[0].tolist() == [[2], [2]]
    assert outputs[0].shape == (2, 2, 3)


def test_a_row_may_be_a_single_number(tmp_path: Path) -> None:
    rows = (step_functions.FLOAT, ["n"])
    file = step_functions.saved(
        tmp_path,
        "sum",
        lambda: step_functions.model(
            [step_functions.node("Add", "x h", "hn"), step_functions.node("Identity", "hn", "y")],
            {"x": rows, "h": rows},
            {"y": rows, "hn": rows},
        ),
    )
    program = compile_few(file, ProofOptions(declaration=Declaration(initial={"h": 0.5})))
    assert (program.inputs[0].shape, program.state[0].shape, program.initial[0].shape) == ((), (), ())
    outputs, states = stepped(program, [np.array([[1, 2], [3, 4]], np.float32)])
    assert states[0].tolist() == outputs[0][-1].tolist() == [4.5, 6.5]


def test_a_cell_that_returns_its_state_only(tmp_path: Path) -> None:
    rows: tuple[int, step_functions.Shape] = (step_functions.FLOAT, ["n", 2])
    file = step_functions.saved(
        tmp_path,
        "cell",
        lambda: step_functions.model(
            [step_functions.node("Add", "x h", "hn")], {"x": rows, "h": rows}, {"hn": rows}
        ),
    )
    program = compile_few(file, ProofOptions())
    assert (program.names.outputs, program.names.state) == (("hn",), ("h",))
    outputs, states = stepped(program, [np.ones((3, 5, 2), np.float32)])
    assert outputs[0].tolist() == [[[step] * 2] * 5 for step in (1, 2, 3)]
    assert states[0].tolist() == [[3, 3]] * 5


def test_a_batch_of_one_in_the_file_runs_row_by_row(tmp_path: Path) -> None:
    file = step_functions.saved(tmp_path, "one", lambda: step_functions.cell(batch=1))
    program = compile_few(file, ProofOptions(trust_rows=True))
    assert (program.proof.rows, program.batch_sizes) == ("alone", (1,))
    assert program.executor_reason == "each row is run alone: the file fixes a batch of one row"
    x = np.random.default_rng(1).standard_normal((3, 4, 3)).astype(np.float32)
    many = compiled("cell", tmp_path)
    np.testing.assert_array_equal(stepped(program, [x])[0][0], stepped(many, [x])[0][0])


def test_an_older_opset_with_a_context(tmp_path: Path) -> None:
    file = step_functions.saved(tmp_path, "old", lambda: step_functions.cell(opset=9))
    program = compile_few(file, ProofOptions(declaration=Declaration(contexts={"x": 1})))
    assert [(spec.name, spec.shape) for spec in program.inputs] == [("x", (2,))]
    assert [(spec.name, spec.shape) for spec in program.state] == [("h", (4,)), ("x/context", (1,))]
    x = np.random.default_rng(1).standard_normal((3, 4, 2)).astype(np.float32)
    np.testing.assert_array_equal(stepped(program, [x])[1][1], x[-1][:, -1:])


def test_tensors_with_the_names_of_keys(tmp_path: Path) -> None:
    made = step_functions.cell()
    for each in made.graph.node:
        each.input[:] = [{"x": "state_0", "h": "in_0"}.get(name, name) for name in each.input]
        each.output[:] = [{"xw": "out_0", "hu": "next_0"}.get(name, name) for name in each.output]
        each.input[:] = [{"xw": "out_0", "hu": "next_0"}.get(name, name) for name in each.input]
    made.graph.input[0].name, made.graph.input[1].name = "state_0", "in_0"
    file = step_functions.saved(tmp_path, "keys", lambda: made)
    program = compile_few(file, ProofOptions(declaration=Declaration(states={"in_0": "hn"})))
    x = np.random.default_rng(1).standard_normal((3, 4, 3)).astype(np.float32)
    np.testing.assert_array_equal(stepped(program, [x])[0][0], stepped(compiled("cell", tmp_path), [x])[0][0])


# --------------------------------------------------------------------------------------------------------------- trials


def test_bits_that_depend_on_the_size_are_padded_to_one(tmp_path: Path) -> None:
    program = compiled("logarithm", tmp_path, sizes=trial.LITERT_SIZES)
    assert program.proof.rows == "proven"
    assert program.batch_sizes == (16, 32, 64, 128, 256)
    assert program.executor_reason == (
        "ONNX Runtime gives a row the same bits at batch sizes that are multiples of 16: batches are padded to 16, 32, 64, 128 or 256 "
        "rows, so one row takes as long as 16"
    )
    x = np.abs(np.random.default_rng(1).standard_normal((2, 40, 5))).astype(np.float32)
    whole, states = stepped(program, [x])
    for rows in ([7], [39, 3], list(range(17)), list(range(39, -1, -1))):
        part, part_states = stepped(program, [x[:, rows]])
        np.testing.assert_array_equal(part[0], whole[0][:, rows])
        np.testing.assert_array_equal(part_states[0], states[0][rows])


def test_a_difference_of_bits_that_samples_miss_is_known_from_the_graph(tmp_path: Path) -> None:
    """Only large values take the logarithm, and the trial has none."""
    file = step_functions.saved(tmp_path, "guarded", step_functions.guarded)
    program = compile_step_function(file, ProofOptions())
    assert program.batch_sizes == (16, 32, 64, 128, 256)
    x = (np.random.default_rng(1).random((1, 256, 5)) * 1e6 + 1e6).astype(np.float32)
    whole, _ = stepped(program, [x])
    for row in range(5):
        np.testing.assert_array_equal(stepped(program, [x[:, [row]]])[0][0][:, 0], whole[0][:, row])


def test_rows_that_change_their_neighbours_run_alone(tmp_path: Path) -> None:
    for name, reason in (
        (
            "quantized",
            "each row is run alone: operator DynamicQuantizeLinear 'xq': rows are not followed through this operator",
        ),
        (
            "centered",
            "each row is run alone: operator ReduceMean 'mean': it computes over the axis of the rows",
        ),
    ):
        program = compiled(name, tmp_path)
        assert (program.proof.rows, program.proof.unproven, program.batch_sizes) == ("alone", "", (1,))
        assert program.executor_reason == reason
        trusted = compiled(name, tmp_path, trust=True)
        # Trusted rows are tried all the same: here they do mix.
        assert (trusted.proof.rows, trusted.batch_sizes) == ("trusted", (1,))
        assert trusted.proof.unproven == reason.removeprefix("each row is run alone: ")
        width = program.inputs[0].shape[0]
        x = np.random.default_rng(1).standard_normal((3, 5, width)).astype(np.float32)
        x[:, 1] *= 1000
        whole, _ = stepped(program, [x])
        for row in range(5):
            np.testing.assert_array_equal(stepped(program, [x[:, [row]]])[0][0][:, 0], whole[0][:, row])


def test_an_extreme_neighbour_in_every_batch_is_noticed() -> None:
    """Shuffles miss what is computed from the largest row if each batch has one; replaced neighbours do not."""
    from support.engine.fake_executor import PLAIN

    program = dataclasses.replace(PLAIN, executor="onnxruntime")
    inputs = (np.ones((64, 2), np.float32),)
    inputs[0][::2] = 100.0
    inputs[0][1::2, 0] = np.arange(32) / 32

    def step(given: Sequence[Any], states: Sequence[Any]) -> tuple[Any, Any]:
        scale = np.float32(1 if len(given[0]) < 8 else min(1.0, 100.0 / np.abs(given[0]).max()))
        return [given[0] * scale if np.abs(given[0]).max() > 50 else given[0] * np.float32(2)], list(states)

    assert trial.agreeing_here(program, inputs, step, (16,)) == (1,)


def test_the_program_survives_its_file(tmp_path: Path) -> None:
    program = compiled("branches", tmp_path)
    program_file.save(program, tmp_path / "a.stepwell")
    loaded = program_file.load(tmp_path / "a.stepwell")
    assert loaded.files == program.files
    assert (loaded.proof, loaded.executor, loaded.state) == (program.proof, program.executor, program.state)
    sizes, agreeing = trial.sizes_here(loaded)
    assert trial.with_sizes(loaded, sizes, agreeing).batch_sizes == program.batch_sizes


# ------------------------------------------------------------------------------------------------------------- executor


def test_a_loop_that_does_not_end_is_terminated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runtime, "RUN_LIMIT_S", 0.1)
    program = compiled("endless", tmp_path)
    assert program.proof.rows == "alone"
    step = step_of_executor(load_executor(program))
    ordinary, endless = np.full((1, 2), 9, np.float32), np.full((1, 2), 2000, np.float32)
    states = initial_rows(program.initial, 1)
    for _ in range(2):
        with pytest.raises(ExecutionError, match=r"a loop did not end within 0\.1 s"):
            step([endless], states)
        np.testing.assert_array_equal(step([ordinary], states)[0][0], ordinary)


def test_a_row_that_fails_leaves_the_executor_usable(tmp_path: Path) -> None:
    program = compiled("embedding", tmp_path)
    executor = load_executor(program)
    step = step_of_executor(executor)
    states = initial_rows(program.initial, 3)
    expected = step([np.array([1, 2, 3])], states)
    with pytest.raises(ExecutionError, match="out of"):
        step([np.array([1, 99, 3])], states)
    for found, before in zip(step([np.array([1, 2, 3])], states), expected, strict=True):
        np.testing.assert_array_equal(found[0], before[0])


def test_executors_of_one_graph_share_it_and_run_at_once(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    program = compiled("lstm", tmp_path)
    executors = [load_executor(program) for _ in range(4)]
    graphs = {id(each._graph) for each in executors if isinstance(each, onnx_runtime.OnnxExecutor)}
    assert len(graphs) == 1
    x = np.random.default_rng(1).standard_normal((4, 50, 7, 1, 3)).astype(np.float32)

    def run(place: int) -> Any:
        step = step_of_executor(executors[place])
        states: Any = initial_rows(program.initial, 7)
        outputs: Any = None
        for values in x[place]:
            outputs, states = step([values], states)
        return outputs[0]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(4)))
    for place in range(4):
        np.testing.assert_array_equal(together[place], run(place))


def test_buffers_of_many_sizes(tmp_path: Path) -> None:
    program = compiled("cell", tmp_path)
    executor = load_executor(program)
    step = step_of_executor(executor)
    x = np.random.default_rng(1).standard_normal((200, 3)).astype(np.float32)
    expected = step([x], initial_rows(program.initial, 200))[0][0]
    for rows in (*range(1, 100), 200, 1):
        np.testing.assert_array_equal(
            step([x[:rows]], initial_rows(program.initial, rows))[0][0], expected[:rows]
        )


def test_a_corrupt_graph_is_a_corrupt_program(tmp_path: Path) -> None:
    program = dataclasses.replace(compiled("cell", tmp_path), files={ONNX_MODEL: b"nothing"})
    with pytest.raises(ValueError, match="ONNX Runtime cannot load the graph"):
        load_executor(program)


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("inputs", "outputs", "found"),
    [
        (["input", "state", "sr"], ["output", "stateN"], {"state": "stateN"}),
        (["x", "h0", "c0"], ["y", "hn", "cn"], {"h0": "hn", "c0": "cn"}),
        (["x", "h_in", "c_in"], ["y", "h_out", "c_out"], {"h_in": "h_out", "c_in": "c_out"}),
        (["x", "h_0"], ["y", "h_n"], {"h_0": "h_n"}),
        (["ids", "past_key"], ["y", "present_key"], {"past_key": "present_key"}),
        (["x", "past_key_values.0"], ["y", "present.0"], {"past_key_values.0": "present.0"}),
        (["x", "hidden"], ["y", "new_hidden"], {"hidden": "new_hidden"}),
        (["x", "hidden_in"], ["y", "hidden_out"], {"hidden_in": "hidden_out"}),
        (["x", "cache"], ["y", "cache_next"], {"cache": "cache_next"}),
        (["X", "initial_h", "initial_c"], ["Y", "Y_h", "Y_c"], {"initial_h": "Y_h", "initial_c": "Y_c"}),
        (["x", "prev_state"], ["y", "next_state"], {"prev_state": "next_state"}),
        (["x", "lstm.h.in"], ["y", "lstm.h.out"], {"lstm.h.in": "lstm.h.out"}),
        (["input"], ["output"], {}),
        (["x"], ["xn"], {}),
        (["a", "b"], ["c", "d"], {}),
    ],
)
def test_pairs_that_names_reveal(inputs: list[str], outputs: list[str], found: dict[str, str]) -> None:
    assert pairs.recognized(inputs, outputs) == found


def test_a_declaration_beside_the_file(tmp_path: Path) -> None:
    model = tmp_path / "vad.onnx"
    assert declaration.of_model(model, Declaration()) == Declaration()
    (tmp_path / "model.toml").write_text("[context]\ninput = 64")
    assert declaration.of_model(model, Declaration()).contexts == {"input": 64}
    (tmp_path / "vad.toml").write_text("[batch-axis]\nstate = 1\n[shape]\ninput = 512\n[initial]\nh = [1, 2]")
    found = declaration.of_model(model, Declaration(batch_axes={"state": 2}, names={"y": "z"}))
    assert found == Declaration(
        batch_axes={"state": 2}, names={"y": "z"}, shapes={"input": (512,)}, initial={"h": [1, 2]}
    )
    assert declaration.from_json(declaration.to_json(found)) == found
