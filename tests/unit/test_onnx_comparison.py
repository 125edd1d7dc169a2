"""What `stepwell check` and `--inspect` find in a step function, without a server."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx")

import onnx

from stepwell_server.compile.comparison import Comparison
from stepwell_server.compile.errors import DataError, ModelError
from stepwell_server.compile.onnx import comparison, inspection
from stepwell_server.compile.onnx.description import described
from stepwell_server.compile.onnx.pipeline import compile_step_function
from stepwell_server.engine.executors import trial
from stepwell_server.program import ONNX_MODEL, Declaration, Program, ProofOptions
from support.models import step_functions
from support.models.step_functions import FLOAT, INT, model, node

BRANCHES = Declaration(
    batch_axes={"state": 1}, constants={"sr": 16000}, contexts={"input": 2}, shapes={"input": (4,)}
)
MODELS: dict[str, Declaration] = {
    "branches": BRANCHES,
    "embedding": Declaration(),
    "logarithm": Declaration(),
    "lstm": Declaration(batch_axes={"h0": 1, "c0": 1}),
    "quantized": Declaration(initial={"h": 0.5}),
    "two": Declaration(),
}


def made(name: str, folder: Path, declared: Declaration) -> tuple[Path, Program]:
    file = step_functions.saved(folder, name, getattr(step_functions, name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "LITERT_SIZES", (1, 2))
        return file, compile_step_function(file, ProofOptions(declaration=declared))


def worst(found: Comparison) -> Any:
    assert found.worst is not None
    return found.worst


@pytest.mark.parametrize("name", MODELS)
def test_stepping_equals_a_plain_loop(name: str, tmp_path: Path) -> None:
    declared = MODELS[name]
    file, program = made(name, tmp_path, declared)
    found = comparison.compare(file, program, declared, None)
    assert (found.rows, found.steps) == (8, 64)
    assert [each.output for each in found.outputs] == [spec.name for spec in program.outputs]
    assert worst(found).is_allowed
    assert found.is_conclusive


def test_halves_and_a_batch_of_one(tmp_path: Path) -> None:
    for make in (lambda: step_functions.cell(kind=step_functions.HALF), lambda: step_functions.cell(batch=1)):
        file = step_functions.saved(tmp_path, "cell", make)
        program = compile_step_function(file, ProofOptions())
        assert worst(comparison.compare(file, program, Declaration(), None)).is_allowed


def test_other_weights_are_noticed_with_the_place(tmp_path: Path) -> None:
    file, program = made("cell", tmp_path, Declaration())
    graph = onnx.load_model_from_string(program.files[ONNX_MODEL])
    weight = next(each for each in graph.graph.initializer if each.name == "U")
    changed = onnx.numpy_helper.to_array(weight) * 1.5
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, "U"))
    other = dataclasses.replace(program, files={ONNX_MODEL: graph.SerializeToString()})
    x = np.zeros((3, 4, 3), np.float32)
    x[1, 1] = 1  # the first state that is not zero is read at time step 2
    np.savez(tmp_path / "x.npz", x=x)
    found = worst(comparison.compare(file, other, Declaration(), tmp_path / "x.npz"))
    assert not found.is_allowed
    assert (found.row, found.by_step[:2]) == (1, (0.0, 0.0))
    assert found.time in {2, 3}
    assert "stepping does not compute what ONNX Runtime in a plain loop does" in str(found)


def test_the_initial_state_and_the_context_are_compared(tmp_path: Path) -> None:
    file, program = made("quantized", tmp_path, Declaration(initial={"h": 0.5}))
    assert not worst(comparison.compare(file, program, Declaration(initial={"h": 0.25}), None)).is_allowed
    file, program = made("branches", tmp_path, BRANCHES)
    slower = dataclasses.replace(BRANCHES, constants={"sr": 8000})
    assert not worst(comparison.compare(file, program, slower, None)).is_allowed


def test_data_that_does_not_fit_or_run(tmp_path: Path) -> None:
    file, program = made("embedding", tmp_path, Declaration())
    data = tmp_path / "tokens.npy"
    np.save(data, np.full((2, 3), 99))
    with pytest.raises(
        ModelError, match=r"embedding\.onnx: ONNX Runtime cannot run it on these sequences: .*out of"
    ):
        comparison.compare(file, program, Declaration(), data)
    np.save(data, np.zeros((2, 3, 4)))
    with pytest.raises(DataError, match=r"input 'token' must have the shape \(batch, T\)"):
        comparison.compare(file, program, Declaration(), data)


# ------------------------------------------------------------------------------------------------------------ inspection


def silero() -> onnx.ModelProto:
    """The tensors of Silero VAD."""
    return model(
        [
            node("Identity", "state", "stateN"),
            node("Identity", "input", "output"),
            node("Identity", "sr", "rate"),
        ],
        {
            "input": (FLOAT, [None, None]),
            "state": (FLOAT, [2, None, 128]),
            "sr": (INT, []),
        },
        {"output": (FLOAT, [None, 1]), "stateN": (FLOAT, [None, None, None])},
    )


def inspected(folder: Path, make: Any, declared: Declaration | None = None) -> dict[str, Any]:
    return described(step_functions.saved(folder, "vad", make), declared or Declaration())


def test_tensors_pairs_and_the_command(tmp_path: Path) -> None:
    found = inspected(tmp_path, step_functions.lstm)
    assert found["inputs"][1] == {"name": "h0", "dtype": "float", "shape": [1, None, 5]}
    assert found["states"] == {"h0": "hn", "c0": "cn"}
    assert found["problem"].startswith("input 'h0' must have one batch axis")
    assert found["note"] == ""
    assert inspection.command(Path("lstm.onnx"), found) == (
        "stepwell compile lstm.onnx --state h0:hn --state c0:cn --batch-axis h0=1 --batch-axis c0=1"
    )
    assert inspection.lines(Path("lstm.onnx"), found)[:3] == [
        "inputs:",
        "  x: float[?, 1, 3]",
        "  h0: float[1, ?, 5], the state before a step: hn holds it after the step",
    ]


def test_the_command_is_quoted_for_a_shell() -> None:
    found = {"options": ["--state $(rm h):h out", "--shape x=3"]}
    assert inspection.command(Path("my model.onnx"), found) == (
        "stepwell compile 'my model.onnx' --state '$(rm h):h out' --shape x=3"
    )


def test_the_context_of_silero_is_known(tmp_path: Path) -> None:
    found = inspected(tmp_path, silero)
    assert found["options"] == [
        "--state state:stateN",
        "--shape input=512",
        "--batch-axis state=1",
        "--constant sr=16000",
        "--context input=64",
    ]
    assert found["note"].startswith("it has the tensors of Silero VAD. At 16 kHz that takes 512 samples")
    slower = Declaration(constants={"sr": 8000}, shapes={"input": (256,)}, contexts={"input": 32})
    found = inspected(tmp_path, silero, slower)
    assert {"--constant sr=8000", "--shape input=256", "--context input=32"} < set(found["options"])
    assert found["note"] == ""


def test_a_context_is_suggested_only_where_a_size_is_open(tmp_path: Path) -> None:
    assert inspected(tmp_path, step_functions.branches)["note"] == (
        "a file does not show a context. If the model expects the end of the previous 'input' in front of the next one, add --context "
        "input=N"
    )
    assert inspected(tmp_path, step_functions.branches, Declaration(shapes={"input": (6,)}))["note"] == ""
    assert inspected(tmp_path, step_functions.cell)["note"] == ""


def test_what_is_declared_stays_in_the_command(tmp_path: Path) -> None:
    found = inspected(
        tmp_path, step_functions.branches, dataclasses.replace(BRANCHES, names={"output": "score"})
    )
    assert found["problem"] == ""
    assert found["options"] == [
        "--state state:stateN",
        "--shape input=4",
        "--batch-axis state=1",
        "--constant sr=16000",
        "--context input=2",
        "--name output=score",
    ]


def test_a_file_that_is_refused_cannot_be_inspected(tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    file.write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"a\.onnx: not an ONNX file"):
        described(file, Declaration())
