"""The smallest whole number by -1: ONNX Runtime ends the process there, a step function must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx")

import onnx

from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.onnx.divisions import guarded
from stepwell_server.compile.onnx.pipeline import compile_step_function
from stepwell_server.engine.executors import load_executor, trial
from stepwell_server.engine.executors.onnx_runtime import plain
from stepwell_server.engine.executors.step_function import step_of_executor
from stepwell_server.program import ProofOptions
from support.models import step_functions
from support.models.step_functions import FLOAT, INT, model, node

INT32 = onnx.TensorProto.INT32


def quotients(kind: int = INT, opset: int = 17, divisor: str = "by") -> onnx.ModelProto:
    """The state divided by what a caller sends, unless that is 0."""
    rows: tuple[int, step_functions.Shape] = (kind, ["n", 1])
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    return model(
        [
            node("Equal", "x zero", "is"),
            node("Where", "is one x", "by"),
            node("Identity", "h", "held"),  # its type must be inferred
            node("Div", f"held {divisor}", "hn"),
            node("Identity", "hn", "y"),
        ],
        {"x": rows, "h": rows},
        {"y": rows, "hn": rows},
        {"zero": np.array(0, dtype), "one": np.array(1, dtype), "minus": np.array([-1], dtype)},
        opset,
    )


@pytest.mark.parametrize(("kind", "divisor"), [(INT, "by"), (INT32, "by"), (INT, "minus")])
def test_quotients_are_those_of_the_processor(
    kind: int, divisor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "LITERT_SIZES", (1, 2, 16))
    file = step_functions.saved(tmp_path, "quotients", lambda: quotients(kind, divisor=divisor))
    program = compile_step_function(file, ProofOptions())
    assert program.proof.rows == "proven"
    smallest = np.iinfo(program.inputs[0].dtype).min
    h = np.array([[smallest], [smallest], [smallest], [7], [-7], [-7], [5]], program.inputs[0].dtype)
    x = np.array([[-1], [2], [smallest], [-1], [2], [-2], [0]], h.dtype)
    outputs, states = step_of_executor(load_executor(program))([x], [h])
    assert outputs[0].tolist() == states[0].tolist()
    if divisor == "by":
        assert states[0].ravel().tolist() == [smallest, smallest // 2, 1, -7, -3, 3, 5]
    else:
        assert states[0].ravel().tolist() == [smallest, smallest, smallest, -7, 7, 7, -5]


def test_divisions_in_branches() -> None:
    branch = onnx.helper.make_graph(
        [node("Div", "h x", "q")], "branch", [], [onnx.helper.make_tensor_value_info("q", INT, ["n", 1])]
    )
    rows: tuple[int, step_functions.Shape] = (INT, ["n", 1])
    made = model(
        [node("If", "on", "y", then_branch=branch, else_branch=branch)],
        {"x": rows, "h": rows},
        {"y": rows},
        {"on": np.array(True)},
    )
    given: dict[str, Any] = {"x": np.array([[-1]]), "h": np.array([[np.iinfo(np.int64).min]])}
    assert plain(guarded(made).SerializeToString())(given)["y"].tolist() == given["h"].tolist()


def test_other_divisions_stay_as_they_are() -> None:
    for made in (quotients(divisor="one"), step_functions.cell()):
        assert guarded(made) == made
    rows: tuple[int, step_functions.Shape] = (FLOAT, ["n", 1])
    floats = model([node("Div", "x h", "y")], {"x": rows, "h": rows}, {"y": rows})
    assert guarded(floats) == floats


def test_an_old_opset_is_refused() -> None:
    with pytest.raises(ModelError, match=r"operator Div 'hn': whole numbers .* its opset is 8"):
        guarded(quotients(opset=8))
