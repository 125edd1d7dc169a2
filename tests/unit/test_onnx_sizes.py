"""Values that callers send must not decide how large a tensor is: a step would take any amount of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx")

import onnx
from onnx import helper

from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.onnx.pipeline import compile_step_function
from stepwell_server.compile.onnx.sizes import require_bounded
from stepwell_server.program import ProofOptions
from support.models import step_functions
from support.models.step_functions import FLOAT, INT, model, node

BOOL = onnx.TensorProto.BOOL
WEIGHTS: dict[str, Any] = {
    "zero": np.array(0),
    "one": np.array(1),
    "ones": np.array([1]),
    "five": np.array([5]),
    "fifty": np.array(50),
    "true": np.array(True),
    "pair": np.array([0.0, 1.0], np.float32),
}


def graph_of(nodes: Sequence[Any]) -> onnx.GraphProto:
    """These operators between a vector `n` and a matrix `x`, which callers send, and an output `y`."""
    outputs: dict[str, tuple[int, Any]] = {"y": (FLOAT, None)}
    return model(nodes, {"n": (INT, [1]), "x": (FLOAT, ["rows", 3])}, outputs, WEIGHTS).graph


def loop(count: str, again: str, body: Sequence[Any], *, gives: str = "sum", collects: str = "") -> Any:
    """A loop that carries a tensor, which is `ones` at first."""
    carried = [("again", BOOL), (gives, INT), *([(collects, INT)] if collects else [])]
    whole = helper.make_graph(
        [node("Identity", again, "again"), *body],
        "body",
        [
            helper.make_tensor_value_info(name, kind, None)
            for name, kind in (("i", INT), ("was", BOOL), ("c", INT))
        ],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in carried],
    )
    outputs = ["z", "collected"] if collects else ["z"]
    return helper.make_node("Loop", [count, "true", "ones"], outputs, body=whole)


def branches(condition: str) -> Any:
    """A branch that squares `x`, and one that does not."""
    graphs = {
        f"{name}_branch": helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info(f"{name}_x", FLOAT, None)]
        )
        for name, nodes in (
            ("then", [node("Mul", "x x", "then_x")]),
            ("else", [node("Identity", "x", "else_x")]),
        )
    }
    return helper.make_node("If", [condition], ["chosen"], **graphs)


FILL = [node("ConstantOfShape", "size", "y")]
REFUSED: dict[str, tuple[Sequence[Any], str]] = {
    "a size": (
        [node("ConstantOfShape", "n", "y")],
        "operator ConstantOfShape 'y': the size of its result must not depend on",
    ),
    "computed": ([node("Mul", "n five", "size"), *FILL], "its input 'size' does"),
    "from a number": (
        [node("ReduceMax", "x", "most", keepdims=0), node("Cast", "most", "size", to=INT), *FILL],
        "its input 'size' does",
    ),
    "a range": ([node("Squeeze", "n", "most"), node("Range", "zero most one", "y")], "operator Range 'y'"),
    "repeated": ([node("Tile", "five n", "y")], "operator Tile 'y'"),
    "expanded": ([node("Expand", "five n", "y")], "operator Expand 'y'"),
    "padded": ([node("Concat", "n n", "pads", axis=0), node("Pad", "five pads", "y")], "operator Pad 'y'"),
    "one in many": ([node("OneHot", "five n pair", "y")], "operator OneHot 'y'"),
    "by the size of a selection": (
        [
            node("NonZero", "x", "places"),
            node("Shape", "places", "sizes"),
            node("Mul", "sizes five", "size"),
            *FILL,
        ],
        "its input 'size' does",
    ),
    "in a branch": (
        [
            helper.make_node(
                "If",
                ["true"],
                ["y"],
                then_branch=helper.make_graph(
                    [node("ConstantOfShape", "n", "inner")],
                    "a",
                    [],
                    [helper.make_tensor_value_info("inner", FLOAT, None)],
                ),
                else_branch=helper.make_graph(
                    [node("Identity", "x", "other")],
                    "b",
                    [],
                    [helper.make_tensor_value_info("other", FLOAT, None)],
                ),
            )
        ],
        "operator ConstantOfShape 'inner'",
    ),
    "of the branch that a value chooses": (
        [node("Less", "n one", "less"), branches("less"), node("Shape", "chosen", "size"), *FILL],
        "its input 'size' does",
    ),
    "in a second pass of a loop": (
        [loop("fifty", "was", [node("ConstantOfShape", "c", "t"), node("Identity", "n", "sum")])],
        "operator ConstantOfShape 't'",
    ),
    "as many as passes": (
        [
            node("Squeeze", "n", "count"),
            loop(
                "count", "was", [node("Identity", "c", "sum"), node("Identity", "i", "got")], collects="got"
            ),
        ],
        (
            "operator Loop 'z': what callers send must not decide how often it runs, by 'count', as each pass takes more memory: it "
            "collects 'got'"
        ),
    ),
    "doubled in each pass": (
        [node("Squeeze", "n", "count"), loop("count", "was", [node("Concat", "c c", "sum", axis=0)])],
        "in it, Concat 'sum' may add to what it carries",
    ),
    "until a condition": (
        [
            node("Squeeze", "n", "most"),
            loop("", "less", [node("Concat", "c c", "d", axis=0), node("Neg", "d", "sum")]),
        ],
        "by 'again', as each pass takes more memory: in it, Concat 'd'",
    ),
}
REFUSED["until a condition"][0][1].attribute[0].g.node.insert(0, node("Less", "i most", "less"))

ADMITTED: dict[str, Sequence[Any]] = {
    "the shape of an input": [node("Shape", "x", "size"), *FILL],
    "the shape of a result": [node("Mul", "x x", "square"), node("Shape", "square", "size"), *FILL],
    "the shape of the branch that a shape chooses": [
        node("Size", "x", "count"),
        node("Less", "count one", "less"),
        branches("less"),
        node("Shape", "chosen", "size"),
        *FILL,
    ],
    "values of a pad": [
        node("Concat", "ones zero_", "pads", axis=0),
        node("Squeeze", "n", "value"),
        node("Pad", "five pads value", "y"),
    ],
    "a cut": [node("Slice", "five zeros n", "y")],
    "a selection": [node("NonZero", "x", "places"), node("ReduceSum", "places", "y")],
    "as many passes as given": [
        loop("fifty", "was", [node("Add", "c n", "sum"), node("Identity", "sum", "got")], collects="got")
    ],
    "doubled some times": [loop("fifty", "was", [node("Concat", "c c", "sum", axis=0)])],
    "counted": [node("Squeeze", "n", "count"), loop("count", "was", [node("Add", "c i", "sum")])],
}
WEIGHTS |= {"zero_": np.array([0]), "zeros": np.array([0])}


@pytest.mark.parametrize("name", REFUSED)
def test_sizes_that_callers_choose_are_refused(name: str) -> None:
    nodes, message = REFUSED[name]
    with pytest.raises(ModelError) as refusal:
        require_bounded(graph_of(nodes), ["n", "x"])
    assert message in str(refusal.value)
    require_bounded(graph_of(nodes), [])  # the same sizes from a constant


def test_operators_that_are_listed_before_what_they_need_are_refused() -> None:
    """ONNX Runtime runs them all the same."""
    with pytest.raises(ModelError, match="its input 'size' does"):
        require_bounded(graph_of([*FILL, node("Mul", "n five", "size")]), ["n"])


@pytest.mark.parametrize("name", ADMITTED)
def test_other_sizes_are_admitted(name: str) -> None:
    require_bounded(graph_of(ADMITTED[name]), ["n", "x"])


def sized_by(kind: int) -> Callable[[], onnx.ModelProto]:
    return lambda: model(
        [
            node("ReduceMax", "x", "most", keepdims=0),
            node("Cast", "most", "number", to=INT),
            node("Reshape", "number ones", "size"),
            node("ConstantOfShape", "size", "filled"),
            node("ReduceSum", "filled", "nothing", keepdims=0),
            node("Add", "x nothing", "y"),
            node("Add", "h y", "hn"),
        ],
        {"x": (kind, ["batch", 2]), "h": (kind, ["batch", 2])},
        {"y": (kind, ["batch", 2]), "hn": (kind, ["batch", 2])},
        WEIGHTS,
    )


def test_a_step_function_whose_memory_a_caller_chooses_is_refused(tmp_path: Path) -> None:
    file = step_functions.saved(tmp_path, "sized", sized_by(FLOAT))
    with pytest.raises(ModelError) as refusal:
        compile_step_function(file, ProofOptions())
    assert str(refusal.value) == (
        f"{file}: operator ConstantOfShape 'filled': the size of its result must not depend on what callers send, else a step "
        "could take any amount of memory; its input 'size' does. Make it constant, or of the shape of an input"
    )
