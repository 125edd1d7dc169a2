"""Small step functions as ONNX models, made here: their weights are drawn from fixed seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF, INT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
Shape = Sequence[int | str | None]
Tensors = Mapping[str, tuple[int, Shape]]
OPSET = 17


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Tensors,
    outputs: Tensors,
    weights: Mapping[str, Any] | None = None,
    opset: int = OPSET,
) -> onnx.ModelProto:
    """A model of these operators."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """An operator; names are separated by blanks."""
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def drawn(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Weights."""
    return (np.random.default_rng(seed).standard_normal(shape) * 0.5).astype(np.float32)


def cell(batch: Any = "batch", kind: int = FLOAT, opset: int = OPSET, units: int = 4) -> onnx.ModelProto:
    """A plain recurrent cell: x of 3 features, h of 4, y of 2."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weights = {"W": drawn(3, units), "U": drawn(units, units, seed=1), "V": drawn(units, 2, seed=2)}
    return model(
        [
            node("MatMul", "x W", "xw"),
            node("MatMul", "h U", "hu"),
            node("Add", "xw hu", "sum"),
            node("Tanh", "sum", "hn"),
            node("MatMul", "hn V", "y"),
        ],
        {"x": (kind, [batch, 3]), "h": (kind, [batch, units])},
        {"y": (kind, [batch, 2]), "hn": (kind, [batch, units])},
        {name: value.astype(dtype) for name, value in weights.items()},
        opset,
    )


def lstm() -> onnx.ModelProto:
    """An LSTM as PyTorch exports it: states (layers, batch, units), a time axis of one step, and a layer behind it."""
    return model(
        [
            node("Transpose", "x", "xt", perm=[1, 0, 2]),
            helper.make_node(
                "LSTM", ["xt", "W", "R", "B", "", "h0", "c0"], ["whole", "hn", "cn"], hidden_size=5
            ),
            node("Squeeze", "whole one", "flat"),
            node("Transpose", "flat", "rows", perm=[1, 0, 2]),
            node("MatMul", "rows V", "y"),
        ],
        {"x": (FLOAT, ["batch", 1, 3]), "h0": (FLOAT, [1, "batch", 5]), "c0": (FLOAT, [1, "batch", 5])},
        {"y": (FLOAT, ["batch", 1, 2]), "hn": (FLOAT, [1, "batch", 5]), "cn": (FLOAT, [1, "batch", 5])},
        {
            "W": drawn(1, 20, 3),
            "R": drawn(1, 20, 5, seed=1),
            "B": drawn(1, 40, seed=2),
            "V": drawn(5, 2, seed=3),
            "one": np.array([1]),
        },
    )


def logarithm(width: int = 5) -> onnx.ModelProto:
    """A model whose bits depend on the batch size in ONNX Runtime: Log of odd width."""
    return model(
        [
            node("Abs", "x", "positive"),
            node("Add", "positive tiny", "more"),
            node("Log", "more", "y"),
            node("Mul", "h half", "less"),
            node("Add", "less y", "hn"),
        ],
        {"x": (FLOAT, ["batch", width]), "h": (FLOAT, ["batch", width])},
        {"y": (FLOAT, ["batch", width]), "hn": (FLOAT, ["batch", width])},
        {"tiny": np.float32(0.125), "half": np.float32(0.5)},
    )


def guarded() -> onnx.ModelProto:
    """A logarithm that only large values meet."""
    return model(
        [
            node("Log", "x", "l"),
            node("Greater", "x large", "is_large"),
            node("Where", "is_large l x", "y"),
            node("Add", "h y", "hn"),
        ],
        {"x": (FLOAT, ["batch", 5]), "h": (FLOAT, ["batch", 5])},
        {"y": (FLOAT, ["batch", 5]), "hn": (FLOAT, ["batch", 5])},
        {"large": np.float32(1e6)},
    )


def quantized() -> onnx.ModelProto:
    """Dynamically quantized: the scale of the inputs is computed over all rows of the batch."""
    return model(
        [
            node("DynamicQuantizeLinear", "x", "xq scale zero"),
            node("MatMulInteger", "xq W zero", "whole"),
            node("Cast", "whole", "real", to=FLOAT),
            node("Mul", "real scale", "scaled"),
            node("Add", "scaled h", "sum"),
            node("Tanh", "sum", "hn"),
            node("Identity", "hn", "y"),
        ],
        {"x": (FLOAT, ["batch", 4]), "h": (FLOAT, ["batch", 4])},
        {"y": (FLOAT, ["batch", 4]), "hn": (FLOAT, ["batch", 4])},
        {"W": np.random.default_rng(4).integers(-3, 4, (4, 4)).astype(np.int8)},
    )


def centered() -> onnx.ModelProto:
    """Subtracts the mean over the rows of the batch: it mixes them."""
    return model(
        [
            node("ReduceMean", "x", "mean", axes=[0], keepdims=1),
            node("Sub", "x mean", "y"),
            node("Add", "h y", "hn"),
        ],
        {"x": (FLOAT, ["batch", 3]), "h": (FLOAT, ["batch", 3])},
        {"y": (FLOAT, ["batch", 3]), "hn": (FLOAT, ["batch", 3])},
    )


def noisy() -> onnx.ModelProto:
    """Draws random numbers."""
    return model(
        [node("RandomNormalLike", "x", "noise"), node("Add", "x noise", "y"), node("Add", "h y", "hn")],
        {"x": (FLOAT, ["batch", 3]), "h": (FLOAT, ["batch", 3])},
        {"y": (FLOAT, ["batch", 3]), "hn": (FLOAT, ["batch", 3])},
    )


def endless() -> onnx.ModelProto:
    """Counts up in a loop until the largest x is reached; it never ends from 1000 on."""
    body = helper.make_graph(
        [
            node("Add", "count one", "more"),
            node("Less", "more most", "is_less"),
            node("Greater", "most limit", "is_endless"),
            node("Or", "is_less is_endless", "again"),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", INT, []),
            helper.make_tensor_value_info("before", TensorProto.BOOL, []),
            helper.make_tensor_value_info("count", FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("more", FLOAT, []),
        ],
    )
    return model(
        [
            node("ReduceMax", "x", "most", keepdims=0),
            helper.make_node("Loop", ["", "true", "zero"], ["counted"], body=body),
            node("Mul", "counted zero", "nothing"),
            node("Add", "x nothing", "y"),
            node("Add", "h y", "hn"),
        ],
        {"x": (FLOAT, ["batch", 2]), "h": (FLOAT, ["batch", 2])},
        {"y": (FLOAT, ["batch", 2]), "hn": (FLOAT, ["batch", 2])},
        {"one": np.float32(1), "zero": np.float32(0), "limit": np.float32(1000), "true": np.array(True)},
    )


def squaring() -> onnx.ModelProto:
    """Adds a tensor to itself as a column, as many times as the largest x says: its size is squared each time."""
    carried: list[tuple[str, int, list[int] | None]] = [
        ("i", INT, []),
        ("was", TensorProto.BOOL, []),
        ("before", FLOAT, None),
    ]
    body = helper.make_graph(
        [
            node("Identity", "was", "again"),
            node("Unsqueeze", "before one", "column"),
            node("Add", "before column", "square"),
            node("Flatten", "square", "after", axis=0),
        ],
        "body",
        [helper.make_tensor_value_info(*each) for each in carried],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", FLOAT, None),
        ],
    )
    return model(
        [
            node("ReduceMax", "x", "most", keepdims=0),
            node("Cast", "most", "count", to=INT),
            helper.make_node("Loop", ["count", "true", "zeros"], ["grown"], body=body),
            node("ReduceSum", "grown", "nothing", keepdims=0),
            node("Add", "x nothing", "y"),
            node("Add", "h y", "hn"),
        ],
        {"x": (FLOAT, ["batch", 2]), "h": (FLOAT, ["batch", 2])},
        {"y": (FLOAT, ["batch", 2]), "hn": (FLOAT, ["batch", 2])},
        {"zeros": np.zeros((1, 2), np.float32), "true": np.array(True), "one": np.array([2])},
    )


def rare_branch() -> onnx.ModelProto:
    """Fills a gigabyte, in a branch that only large x reach."""
    filled = helper.make_graph(
        [node("Expand", "most size", "many"), node("ReduceSum", "many", "sum", keepdims=0)],
        "filled",
        [],
        [helper.make_tensor_value_info("sum", FLOAT, [])],
    )
    other = helper.make_graph(
        [node("Identity", "zero", "none")], "other", [], [helper.make_tensor_value_info("none", FLOAT, [])]
    )
    return model(
        [
            node("ReduceMax", "x", "most", keepdims=0),
            node("Greater", "most limit", "is_large"),
            helper.make_node("If", ["is_large"], ["nothing"], then_branch=filled, else_branch=other),
            node("Add", "x nothing", "y"),
            node("Add", "h y", "hn"),
        ],
        {"x": (FLOAT, ["batch", 2]), "h": (FLOAT, ["batch", 2])},
        {"y": (FLOAT, ["batch", 2]), "hn": (FLOAT, ["batch", 2])},
        {"limit": np.float32(5), "size": np.array([1 << 28]), "zero": np.float32(0)},
    )


def branches() -> onnx.ModelProto:
    """Like Silero's: a rate decides by an If, the state is (2, batch, 3), the input has a context of 2 of 4 elements."""
    add, subtract = (
        helper.make_graph(
            [node(kind, "moved mean", name)],
            name,
            [],
            [helper.make_tensor_value_info(name, FLOAT, ["batch", 3])],
        )
        for kind, name in (("Add", "added"), ("Sub", "subtracted"))
    )
    return model(
        [
            node("Equal", "sr rate", "is_fast"),
            node("MatMul", "input W", "moved"),
            node("ReduceMean", "state", "mean", axes=[0], keepdims=0),
            helper.make_node("If", ["is_fast"], ["output"], then_branch=add, else_branch=subtract),
            node("Unsqueeze", "output zero", "one"),
            node("Mul", "state half", "less"),
            node("Add", "less one", "stateN"),
        ],
        {"input": (FLOAT, ["batch", "samples"]), "state": (FLOAT, [2, "batch", 3]), "sr": (INT, [])},
        {"output": (FLOAT, ["batch", 3]), "stateN": (FLOAT, [None, None, None])},
        {"W": drawn(6, 3), "rate": np.array(16000), "zero": np.array([0]), "half": np.float32(0.5)},
    )


def embedding() -> onnx.ModelProto:
    """A token of a table of 5, and an integer state that counts the steps; an index out of range fails the run."""
    return model(
        [
            node("Gather", "table token", "row"),
            node("Cast", "count", "number", to=FLOAT),
            node("Add", "row number", "y"),
            node("Add", "count one", "count_out"),
        ],
        {"token": (INT, ["batch"]), "count": (INT, ["batch", 1])},
        {"y": (FLOAT, ["batch", 3]), "count_out": (INT, ["batch", 1])},
        {"table": drawn(5, 3), "one": np.array([[1]])},
    )


def two() -> onnx.ModelProto:
    """Two inputs, two outputs and two states."""
    return model(
        [
            node("Add", "a past_a", "present_a"),
            node("Mul", "b half", "less"),
            node("Add", "less past_b", "present_b"),
            node("Add", "present_a present_b", "sum"),
            node("ReduceSum", "sum one", "total", keepdims=1),
        ],
        {name: (FLOAT, ["n", 2]) for name in ("a", "b", "past_a", "past_b")},
        {
            "sum": (FLOAT, ["n", 2]),
            "total": (FLOAT, ["n", 1]),
            "present_a": (FLOAT, ["n", 2]),
            "present_b": (FLOAT, ["n", 2]),
        },
        {"half": np.float32(0.5), "one": np.array([1])},
    )


def saved(folder: Path, name: str, make: Callable[[], onnx.ModelProto]) -> Path:
    """Write a model to a folder."""
    path = folder / f"{name}.onnx"
    path.write_bytes(make().SerializeToString())
    return path
