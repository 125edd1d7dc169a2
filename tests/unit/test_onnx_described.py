"""What `--inspect` shows of a step function, and the comparison of its program with the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx")

from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.onnx.comparison import REFERENCE, compare
from stepwell_server.compile.onnx.description import described
from stepwell_server.compile.onnx.pipeline import compile_step_function
from stepwell_server.engine.executors import trial
from stepwell_server.program import Declaration, Program, ProofOptions
from support.models import step_functions

NOTHING = Declaration()
BRANCHES = Declaration(
    batch_axes={"state": 1},
    constants={"sr": 16000},
    contexts={"input": 2},
    shapes={"input": (4,)},
    names={"output": "score"},
)


def saved(name: str, folder: Path) -> Path:
    return step_functions.saved(folder, name, getattr(step_functions, name))


def compiled(file: Path, declared: Declaration, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setattr(trial, "LITERT_SIZES", (1, 2))
    return compile_step_function(file, ProofOptions(declaration=declared))


def test_tensors_states_and_options_are_shown(tmp_path: Path) -> None:
    assert described(saved("cell", tmp_path), NOTHING) == {
        "inputs": [
            {"name": "x", "dtype": "float", "shape": [None, 3]},
            {"name": "h", "dtype": "float", "shape": [None, 4]},
        ],
        "outputs": [
            {"name": "y", "dtype": "float", "shape": [None, 2]},
            {"name": "hn", "dtype": "float", "shape": [None, 4]},
        ],
        "states": {"h": "hn"},
        "options": ["--state h:hn"],
        "problem": "",
        "note": "",
    }


def test_declared_initial_values_are_among_the_options(tmp_path: Path) -> None:
    file = saved("cell", tmp_path)
    shown = [
        described(file, Declaration(initial=initial))["options"]
        for initial in ({"h": -0.5}, {"h": [1.0, 2.0, 3.0, 4.0]}, {"other": 1})
    ]
    assert shown == [
        ["--state h:hn", "--initial h=-0.5"],
        ["--state h:hn", "--initial h=FILE.npz"],
        ["--state h:hn"],
    ]


def test_what_must_be_declared_is_among_the_options(tmp_path: Path) -> None:
    found = described(saved("lstm", tmp_path), NOTHING)
    assert found["options"][-2:] == ["--batch-axis h0=1", "--batch-axis c0=1"]
    found = described(saved("branches", tmp_path), NOTHING)
    assert "--constant sr=VALUE" in found["options"]
    assert found["problem"].startswith("input 'input' must have a known shape")


def test_what_is_declared_is_shown_as_it_is(tmp_path: Path) -> None:
    found = described(saved("branches", tmp_path), BRANCHES)
    assert found["options"][1:] == [
        "--shape input=4",
        "--batch-axis state=1",
        "--constant sr=16000",
        "--context input=2",
        "--name output=score",
    ]
    assert found["problem"] == ""


def test_another_file_is_refused_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "other.onnx"
    file.write_bytes(np.random.default_rng(3).bytes(100))
    with pytest.raises(ModelError, match=r"other\.onnx: "):
        described(file, NOTHING)


@pytest.mark.parametrize(("name", "declared"), [("cell", NOTHING), ("branches", BRANCHES)])
def test_a_program_equals_its_file(
    name: str, declared: Declaration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(name, tmp_path)
    found = compare(file, compiled(file, declared, monkeypatch), declared, None)
    assert (found.rows, found.steps) == (8, 64)
    assert {each.reference for each in found.outputs} == {REFERENCE}
    assert all(each.is_allowed for each in found.outputs)


def test_ones_own_data_show_where_another_program_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved("cell", tmp_path)
    other = step_functions.cell()
    weights = next(each for each in other.graph.initializer if each.name == "V")
    changed = np.frombuffer(weights.raw_data, np.float32).copy()
    changed[0] += 1
    weights.raw_data = changed.tobytes()
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(other.SerializeToString())
    data = tmp_path / "own.npy"
    x = np.random.default_rng(4).standard_normal((3, 5, 3)).astype(np.float32)
    np.save(data, x)

    found = compare(file, compiled(wrong, NOTHING, monkeypatch), NOTHING, data)

    (only,) = found.outputs
    assert (found.rows, found.steps, only.output) == (3, 5, "y")
    # the hidden states are the same; y differs by the first of them
    assert not only.is_allowed
    assert len(only.by_step) == 5
    assert only.absolute == pytest.approx(max(only.by_step))
    assert only.by_step[only.time] == only.absolute
