"""Random graphs of operators that may mix rows: whatever is served gives each row its own bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx")

import onnx

from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.onnx.pipeline import compile_step_function
from stepwell_server.engine.executors import load_executor, trial
from stepwell_server.engine.executors.step_function import step_of_executor
from stepwell_server.program import Program, ProofOptions
from support.models.step_functions import FLOAT, HALF, model, node, saved
from support.samples import one_in

TYPES = (FLOAT, FLOAT, FLOAT, HALF, onnx.TensorProto.DOUBLE)
UNARY = (
    "Abs",
    "Atan",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Log",
    "Neg",
    "Sigmoid",
    "Sin",
    "Softplus",
    "Sqrt",
    "Tanh",
)
SEEDS, ROWS = 16, 48
Shape = list[int]


class Graph:
    """Operators between x and y. Rows are where `-1` is in a shape, or elsewhere if the proof is to refuse it."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.kind = TYPES[rng.integers(len(TYPES))]
        self.dtype = onnx.helper.tensor_dtype_to_np_dtype(self.kind)
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}
        self.tensors: list[tuple[str, Shape]] = [("x", [-1, 4]), ("h", [-1, 6])]
        for _ in range(rng.integers(3, 12)):
            name, shape = self.tensors[rng.integers(len(self.tensors))]
            kinds: tuple[Callable[[str, Shape], None], ...] = (
                *(self.unary, self.product, self.pair, self.transpose, self.unsqueeze),
                *(self.reduce, self.reshape, self.along),
            )
            kinds[rng.integers(len(kinds))](name, shape)

    def add(self, kind: str, inputs: str, shape: Shape, **attributes: Any) -> None:
        output = f"t{len(self.nodes)}"
        self.nodes.append(node(kind, inputs, output, **attributes))
        self.tensors.append((output, shape))

    def weight(self, value: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.asarray(value)
        return name

    def one_of(self, *values: Any) -> Any:
        return values[self.rng.integers(len(values))]

    def unary(self, name: str, shape: Shape) -> None:
        self.add(self.one_of(*UNARY), name, shape)

    def product(self, name: str, shape: Shape) -> None:
        width = int(self.rng.integers(1, 8))
        weight = self.rng.standard_normal((abs(shape[-1]), width)).astype(self.dtype)
        self.add("MatMul", f"{name} {self.weight(weight)}", [*shape[:-1], width])

    def pair(self, name: str, shape: Shape) -> None:
        other = self.one_of(*(each for each, like in self.tensors if like == shape))
        self.add(self.one_of("Add", "Mul", "Max"), f"{name} {other}", shape)

    def transpose(self, name: str, shape: Shape) -> None:
        order = [int(axis) for axis in self.rng.permutation(len(shape))]
        self.add("Transpose", name, [shape[axis] for axis in order], perm=order)

    def unsqueeze(self, name: str, shape: Shape) -> None:
        axis = int(self.rng.integers(len(shape) + 1))
        self.add("Unsqueeze", f"{name} {self.weight([axis])}", [*shape[:axis], 1, *shape[axis:]])

    def reduce(self, name: str, shape: Shape) -> None:
        axis = int(self.rng.integers(len(shape)))
        kept = [size if place != axis or size < 0 else 1 for place, size in enumerate(shape)]
        self.add(self.one_of("ReduceMean", "ReduceMax", "ReduceLogSumExp"), name, kept, axes=[axis])

    def reshape(self, name: str, shape: Shape) -> None:
        elements = abs(int(np.prod(shape)))
        part = self.one_of(*(size for size in (1, 2, 3, 4) if elements % size == 0))
        target = self.one_of([-1, part, elements // part], [part, -1, elements // part], [-1, elements])
        self.add("Reshape", f"{name} {self.weight(target)}", target)

    def along(self, name: str, shape: Shape) -> None:
        axis = int(self.rng.integers(len(shape)))
        self.add(self.one_of("Softmax", "LogSoftmax"), name, shape, axis=axis)

    def made(self) -> onnx.ModelProto:
        name, shape = self.tensors[-1]
        first = shape.index(-1) if -1 in shape else 0  # rows that a product summed up
        order = [first, *(axis for axis in range(len(shape)) if axis != first)]
        nodes = [
            *self.nodes,
            node("Transpose", name, "moved", perm=order),
            node("Flatten", "moved", "y"),
            node("MatMul", f"x {self.weight(np.eye(4, 6, dtype=self.dtype))}", "wide"),
            node("Add", "wide h", "sum"),
            node("Tanh", "sum", "hn"),
        ]
        given: Any = {"x": (self.kind, ["rows", 4]), "h": (self.kind, ["rows", 6])}
        made: Any = {"y": (self.kind, None), "hn": (self.kind, ["rows", 6])}
        return model(nodes, given, made, self.weights)


def served(graph: Graph, folder: Path) -> Program | None:
    """The program of a graph; None if it is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "LITERT_SIZES", (1, 2, 3, 17))
        try:
            return compile_step_function(saved(folder, "random", graph.made), ProofOptions())
        except ModelError:
            return None


@pytest.mark.parametrize("seed", one_in(16, range(SEEDS)))
def test_rows_have_their_own_bits(seed: int, tmp_path: Path) -> None:
    found = 0
    for number in range(20):
        rng = np.random.default_rng([seed, number])
        graph = Graph(rng)
        program = served(graph, tmp_path)
        if program is None:
            continue
        found += 1
        step = step_of_executor(load_executor(program))
        scales = rng.choice([1e-3, 1, 1, 20, 1e4], (ROWS, 1))
        x = (rng.standard_normal((ROWS, 4)) * scales).astype(graph.dtype)
        h = rng.standard_normal((ROWS, 6)).astype(graph.dtype)
        outputs, after = step([x], [h])
        whole = [np.array(each) for each in (*outputs, *after)]
        for rows in ([0], [ROWS - 1], [3, 9], list(range(17)), rng.permutation(ROWS)[:31]):
            outputs, after = step([x[rows]], [h[rows]])
            for one, two in zip(whole, (*outputs, *after), strict=True):
                assert one[rows].tobytes() == two.tobytes(), (number, program.proof, program.batch_sizes)
    assert found
