"""Where rows go in each operator: what is admitted keeps them apart when ONNX Runtime runs it; the rest is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx")

import onnx

from stepwell_server.compile.onnx.rows.bits import UNEVEN
from stepwell_server.compile.onnx.rows.rules import RULES
from stepwell_server.compile.onnx.rows.values import ROWS, Value
from stepwell_server.compile.onnx.rows.walk import Lost, follow
from stepwell_server.engine.executors.onnx_runtime import plain
from support.models.step_functions import FLOAT, INT, drawn, model, node

N = "n"
BOOL = onnx.TensorProto.BOOL
BYTE, SIGNED = onnx.TensorProto.UINT8, onnx.TensorProto.INT8


@dataclasses.dataclass(frozen=True)
class Case:
    """Operators between inputs with rows and an output `y`."""

    nodes: Sequence[Any]
    inputs: Mapping[str, tuple[int, Sequence[Any]]]
    """Their types and shapes, in which N is the rows."""
    weights: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    opset: int = 17
    outputs: Sequence[str] = ("y",)

    def __str__(self) -> str:
        return "-".join(each.op_type for each in self.nodes) + f"-{self.opset}"

    @property
    def made(self) -> Any:
        outputs: dict[str, tuple[int, Any]] = dict.fromkeys(self.outputs, (FLOAT, None))
        return model(self.nodes, self.inputs, outputs, self.weights, self.opset)

    def followed(self, name: str = "y") -> Value | Lost:
        return follow(self.made, self._given).outputs[name]

    @property
    def _given(self) -> dict[str, Value]:
        return {
            key: Value(
                axis=list(shape).index(N) if N in shape else None,
                sizes=tuple(ROWS if size is N else size for size in shape),
                dtype=kind,
            )
            for key, (kind, shape) in self.inputs.items()
        }

    @property
    def uneven(self) -> str:
        """The operator that gives rows other bits at some places."""
        return follow(self.made, self._given).uneven

    def drawn(self, rows: int) -> dict[str, Any]:
        rng = np.random.default_rng(5)
        found = {}
        for name, (kind, shape) in self.inputs.items():
            whole = [rows if size is N else size for size in shape]
            values = rng.standard_normal(whole)
            whole_numbers = kind != FLOAT
            found[name] = (rng.integers(0, 2, whole) if whole_numbers else np.abs(values) * 0.5).astype(
                onnx.helper.tensor_dtype_to_np_dtype(kind)
            )
        return found

    def axis(self, name: str) -> int | None:
        shape = self.inputs[name][1]
        return list(shape).index(N) if N in shape else None


def one(kind: str, shape: Sequence[Any] = (N, 3), **attributes: Any) -> Case:
    """An operator of one input."""
    return Case([node(kind, "x", "y", **attributes)], {"x": (FLOAT, shape)})


def place_of(shape: Sequence[Any], **attributes: Any) -> Case:
    """ArgMax, as numbers."""
    return Case(
        [node("ArgMax", "x", "place", **attributes), node("Cast", "place", "y", to=FLOAT)],
        {"x": (FLOAT, shape)},
    )


def pair(kind: str, first: Sequence[Any], second: Sequence[Any], **attributes: Any) -> Case:
    """An operator of two inputs, of which those without N are weights."""
    inputs = {name: (FLOAT, shape) for name, shape in (("a", first), ("b", second)) if N in shape}
    weights = {name: drawn(*shape) for name, shape in (("a", first), ("b", second)) if N not in shape}
    return Case([node(kind, "a b", "y", **attributes)], inputs, weights)


def with_weights(
    kind: str, shape: Sequence[Any], weights: Mapping[str, Any], opset: int = 17, **attributes: Any
) -> Case:
    """An operator of one input with rows and weights behind it."""
    return Case(
        [node(kind, " ".join(["x", *weights]), "y", **attributes)], {"x": (FLOAT, shape)}, weights, opset
    )


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


def recurrent(kind: str, gates: int, **attributes: Any) -> Case:
    weights = {"W": drawn(1, gates * 4, 3), "R": drawn(1, gates * 4, 4, seed=1)}
    states = ["h", "c"] if kind == "LSTM" else ["h"]
    return Case(
        [
            onnx.helper.make_node(
                kind, ["x", "W", "R", "", "", *states], ["whole", "y"], hidden_size=4, **attributes
            )
        ],
        {"x": (FLOAT, (2, N, 3)), **dict.fromkeys(states, (FLOAT, (1, N, 4)))},
        weights,
        outputs=("y", "whole"),
    )


ADMITTED: list[tuple[Case, int]] = [
    *[
        (one(kind), 0)
        for kind in ("Abs", "Exp", "Erf", "Identity", "LeakyRelu", "Log", "Sigmoid", "Softplus", "Tanh")
    ],
    (one("Tanh", (2, N, 3)), 1),
    (one("Cast", to=FLOAT), 0),
    (pair("Add", (N, 3), (N, 3)), 0),
    (pair("Add", (N, 3), (3,)), 0),
    (pair("Mul", (2, N, 3), (N, 1)), 1),
    (pair("Sub", (1, 3), (N, 3)), 0),
    (pair("Max", (N, 3), (1, 1)), 0),
    (pair("MatMul", (N, 3), (3, 4)), 0),
    (pair("MatMul", (N, 2, 3), (3, 4)), 0),
    (pair("MatMul", (2, N, 3), (3, 4)), 1),
    (pair("MatMul", (2, 4), (4, N)), 1),
    (pair("MatMul", (N, 2, 3), (N, 3, 4)), 0),
    (pair("MatMul", (N, 2, 3), (1, 3, 4)), 0),
    (pair("MatMul", (N, 3), (3,)), 0),
    (pair("MatMul", (N, 2, 3), (3,)), 0),
    (pair("MatMul", (3,), (3, N)), 0),
    (pair("MatMul", (3,), (N, 3, 4)), 0),
    (pair("MatMul", (N, 3), (2, 3, 4)), 1),
    (with_weights("Gemm", (N, 3), {"W": drawn(3, 4), "b": drawn(4)}), 0),
    (with_weights("Gemm", (3, N), {"W": drawn(3, 4)}, transA=1), 0),
    (with_weights("Gemm", (N, 3), {"W": drawn(4, 3)}, transB=1), 0),
    (pair("Einsum", (N, 3), (3, 4), equation="bi,io->bo"), 0),
    (pair("Einsum", (N, 3), (N, 3), equation="bi,bi->b"), 0),
    (pair("Einsum", (N, 3), (3, 4), equation="bi,io->ob"), 1),
    (with_weights("Conv", (N, 2, 8), {"W": drawn(4, 2, 3)}), 0),
    (with_weights("ConvTranspose", (N, 2, 8), {"W": drawn(2, 4, 3)}), 0),
    (one("MaxPool", (N, 2, 8), kernel_shape=[2]), 0),
    (one("GlobalAveragePool", (N, 2, 8)), 0),
    (recurrent("LSTM", 4), 1),
    (recurrent("GRU", 3), 1),
    (recurrent("RNN", 1), 1),
    (one("Softmax", axis=-1), 0),
    (one("Softmax", (2, N, 3), axis=0), 1),
    (place_of((N, 3), axis=1, keepdims=0), 0),
    (place_of((2, N, 3), axis=0, keepdims=0), 0),
    (one("ReduceMean", axes=[1], keepdims=0), 0),
    (one("ReduceMax", (2, N, 3), axes=[0, 2], keepdims=0), 0),
    (with_weights("ReduceSum", (2, N, 3), {"axes": ints(0)}, keepdims=0), 0),
    (with_weights("ReduceSum", (2, N, 3), {"axes": ints(-1)}), 1),
    (with_weights("LayerNormalization", (N, 3), {"s": drawn(3), "b": drawn(3)}), 0),
    (with_weights("InstanceNormalization", (N, 3, 5), {"s": drawn(3), "b": drawn(3)}), 0),
    (
        with_weights(
            "BatchNormalization",
            (N, 3),
            {"s": drawn(3), "b": drawn(3), "mean": drawn(3), "var": np.abs(drawn(3))},
        ),
        0,
    ),
    (with_weights("CumSum", (N, 3), {"axis": np.array(1)}), 0),
    (one("Transpose", (N, 3), perm=[1, 0]), 1),
    (one("Transpose", (N, 2, 3)), 2),
    (with_weights("Squeeze", (1, N, 3), {"axes": ints(0)}), 0),
    (with_weights("Unsqueeze", (N, 3), {"axes": ints(0)}), 1),
    (with_weights("Unsqueeze", (N, 3), {"axes": ints(0, 3)}), 1),
    (pair("Concat", (N, 3), (N, 2), axis=1), 0),
    (with_weights("Slice", (N, 5), {"a": ints(1), "b": ints(3), "axes": ints(1)}), 0),
    (with_weights("Slice", (N, 5), {"a": ints(0, 1), "b": ints(2**62, 3)}), 0),
    (with_weights("Gather", (N, 5), {"i": ints(1, 3)}, axis=1), 0),
    (with_weights("Gather", (2, N, 5), {"i": np.array(1)}), 0),
    (Case([node("Gather", "table i", "y")], {"i": (INT, (N,))}, {"table": drawn(4, 3)}), 0),
    (Case([node("Gather", "table i", "y", axis=1)], {"i": (INT, (N,))}, {"table": drawn(2, 4)}), 1),
    (with_weights("Pad", (N, 3), {"p": ints(0, 1, 0, 2)}), 0),
    (with_weights("Tile", (N, 3), {"r": ints(1, 2)}), 0),
    (one("Flatten", (N, 2, 3)), 0),
    (with_weights("Reshape", (N, 2, 3), {"s": ints(-1, 6)}), 0),
    (with_weights("Reshape", (N, 6), {"s": ints(0, 2, -1)}), 0),
    (with_weights("Reshape", (1, N, 6), {"s": ints(-1, 3, 2)}), 0),
    (with_weights("Reshape", (N, 6), {"s": ints(1, -1, 6)}), 1),
    (
        Case(
            [
                node("Shape", "x", "sizes"),
                node("Gather", "sizes zero", "n"),
                node("Concat", "n four", "target", axis=0),
                node("ConstantOfShape", "target", "zeros"),
                node("Concat", "x zeros", "y", axis=1),
            ],
            {"x": (FLOAT, (N, 3))},
            {"zero": ints(0), "four": ints(4)},
        ),
        0,
    ),
    (
        Case(
            [
                node("Shape", "x", "n", start=0, end=1),
                node("Concat", "n one", "target", axis=0),
                node("Expand", "row target", "rows"),
                node("Add", "x rows", "y"),
            ],
            {"x": (FLOAT, (N, 3))},
            {"one": ints(3), "row": drawn(1, 3)},
        ),
        0,
    ),
    (Case([node("Where", "x a b", "y")], {"x": (BOOL, (N, 3))}, {"a": drawn(3), "b": drawn(1)}), 0),
    (
        Case(
            [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "y")],
            {"x": (FLOAT, (N, 3))},
            {"s": np.float32(0.1), "z": np.uint8(3)},
        ),
        0,
    ),
    (
        Case(
            [node("MatMulInteger", "x W", "i"), node("Cast", "i", "y", to=FLOAT)],
            {"x": (BYTE, (N, 3))},
            {"W": np.ones((3, 2), np.int8)},
        ),
        0,
    ),
]

REFUSED: list[tuple[Case, str]] = [
    (one("Squeeze", (1, N, 3)), "also that of a single row"),
    (one("ReduceMean", axes=[0]), "it computes over the axis of the rows"),
    (one("ReduceMean"), "it computes over the axis of the rows"),
    (one("Softmax", axis=0), "it computes over the axis of the rows"),
    (one("ArgMax"), "it computes over the axis of the rows"),
    (with_weights("CumSum", (N, 3), {"axis": np.array(0)}), "it computes over the axis of the rows"),
    (one("MeanVarianceNormalization", (N, 3, 4, 4)), "it computes over the axis of the rows"),
    (
        with_weights("LayerNormalization", (N, 3), {"s": drawn(3)}, axis=0),
        "it computes over the axis of the rows",
    ),
    (pair("MatMul", (3, N), (N, 3)), "it multiplies rows with each other"),
    (pair("MatMul", (N, 3), (3, N)), "it multiplies rows with each other"),
    (pair("MatMul", (4, N), (5, 3)), "it sums over the axis of the rows"),
    (pair("MatMul", (N,), (5, 3)), "it sums over the axis of the rows"),
    (with_weights("Gemm", (3, N), {"W": drawn(3, 4)}), "it sums over the axis of the rows"),
    (pair("Einsum", (N, 3), (3, 4), equation="bi,io->o"), "it sums over the axis of the rows"),
    (pair("Einsum", (N, 3), (N, 3), equation="ai,bi->ab"), "its inputs have rows on different axes"),
    (pair("Add", (N, 3), (3, N)), "its inputs have rows on different axes"),
    (pair("Add", (N, 3), (4, 3)), "has more than one element along their axis"),
    (with_weights("Conv", (2, N, 8), {"W": drawn(4, 2, 3)}), "its rows are not on the first axis"),
    (pair("Concat", (N, 3), (N, 3), axis=0), "it joins along the axis of the rows"),
    (pair("Concat", (N, 3), (4, 3), axis=1), "it joins tensors whose rows are on different axes"),
    (with_weights("Slice", (N, 5), {"a": ints(1), "b": ints(3)}), "it cuts the axis of the rows"),
    (
        with_weights("Slice", (N, 5), {"a": ints(-1), "b": ints(-(2**62)), "axes": ints(0), "s": ints(-1)}),
        "it cuts the axis of the rows",
    ),
    (with_weights("Gather", (N, 5), {"i": np.array(0)}), "it picks single rows"),
    (
        Case([node("Gather", "x i", "y", axis=1)], {"x": (FLOAT, (N, 3)), "i": (INT, (N,))}),
        "a row picks from the others",
    ),
    (with_weights("Pad", (N, 3), {"p": ints(1, 0, 0, 0)}), "it pads the axis of the rows"),
    (with_weights("Tile", (N, 3), {"r": ints(2, 1)}), "it repeats rows"),
    (one("Flatten", (2, N, 3), axis=2), "it joins the axis of the rows with another one"),
    (with_weights("Reshape", (N, 2), {"s": ints(-1)}), "it joins or splits the axis of the rows"),
    (with_weights("Reshape", (2, N, 3), {"s": ints(-1, 6)}), "it joins or splits the axis of the rows"),
    (with_weights("Reshape", (N, 2), {"s": ints(2, -1)}), "it joins or splits the axis of the rows"),
    (with_weights("Squeeze", (N, 1), {"axes": ints(0)}), "it removes the axis of the rows"),
    (one("Split", (N, 2), axis=0), "it splits the axis of the rows"),
    (one("RandomNormalLike"), "it draws random numbers"),
    (one("Bernoulli"), "it draws random numbers"),
    (
        Case(
            [node("DynamicQuantizeLinear", "x", "q s z"), node("DequantizeLinear", "q s z", "y")],
            {"x": (FLOAT, (N, 3))},
        ),
        "operator DynamicQuantizeLinear 'q': rows are not followed through this operator",
    ),
    (
        Case(
            [
                node("Shape", "x", "sizes"),
                node("Cast", "sizes", "numbers", to=FLOAT),
                node("ReduceProd", "numbers", "count", keepdims=0),
                node("Mul", "x count", "y"),
            ],
            {"x": (FLOAT, (N, 3))},
        ),
        "its result depends on the number of rows",
    ),
    (
        Case(
            [
                node("Shape", "x", "n", start=0, end=1),
                node("Squeeze", "n", "count"),
                node("Range", "zero count one", "places"),
                node("Cast", "places", "numbers", to=FLOAT),
                node("Unsqueeze", "numbers axis", "column"),
                node("Add", "x column", "y"),
            ],
            {"x": (FLOAT, (N, 3))},
            {"zero": np.array(0), "one": np.array(1), "axis": ints(1)},
        ),
        "its result depends on the number of rows",
    ),
]


@pytest.mark.parametrize(("case", "axis"), ADMITTED, ids=str)
def test_rows_are_followed_and_stay_apart_when_it_runs(case: Case, axis: int) -> None:
    found = case.followed()
    assert isinstance(found, Value), found
    assert found.axis == axis
    run = plain(case.made.SerializeToString())
    whole = case.drawn(6)
    expected: Any = run(whole)["y"]
    assert expected.shape[axis] == 6
    for rows in ([3], [4], [5, 0, 2, 3], [1, 1, 4]):
        part = {
            name: array if case.axis(name) is None else np.take(array, rows, case.axis(name))
            for name, array in whole.items()
        }
        made: Any = run({name: np.ascontiguousarray(array) for name, array in part.items()})["y"]
        np.testing.assert_allclose(made, np.take(expected, rows, axis), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("case", "reason"), REFUSED, ids=str)
def test_what_may_mix_rows_is_refused_with_the_operator(case: Case, reason: str) -> None:
    found = case.followed()
    assert isinstance(found, Lost), found
    assert re.match(r"operator \w+ '\w+': ", found.reason)
    assert reason in found.reason


def test_each_rule_has_a_case_that_runs() -> None:
    tried = {each.op_type for case, _ in ADMITTED for each in case.nodes}
    elementwise = {name for name, rule in RULES.items() if rule.__name__ in {"one_input", "broadcast"}}
    untried = RULES.keys() - tried - elementwise
    assert untried == {
        # the same rule as an operator that is tried
        *(
            "ArgMin",
            "AveragePool",
            "ConvInteger",
            "GlobalMaxPool",
            "GroupNormalization",
            "Hardmax",
            "LogSoftmax",
        ),
        *("LpNormalization", "LpPool", "QLinearConv", "RMSNormalization", "SimplifiedLayerNormalization"),
        *(
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMin",
            "ReduceProd",
            "ReduceSumSquare",
        ),
        # tried below
        *("Dropout", "GatherElements", "MeanVarianceNormalization", "QLinearMatMul", "Split", "TopK"),
    }


def test_operators_with_several_outputs() -> None:
    split = Case([node("Split", "x", "y z", axis=1)], {"x": (FLOAT, (N, 4))}, outputs=("y", "z"), opset=13)
    assert [getattr(split.followed(name), "axis", None) for name in "yz"] == [0, 0]
    top = Case([node("TopK", "x k", "y i")], {"x": (FLOAT, (N, 4))}, {"k": ints(2)})
    assert getattr(top.followed(), "axis", None) == 0
    whole = recurrent("LSTM", 4)
    assert getattr(whole.followed("whole"), "axis", None) == 2


def test_indices_of_the_whole_batch_are_refused() -> None:
    pool = Case([node("MaxPool", "x", "y i", kernel_shape=[2])], {"x": (FLOAT, (N, 2, 8))})
    assert "its second output counts elements from the first row of the batch" in str(pool.followed())


def test_a_dropout_that_may_train_is_refused() -> None:
    off = Case(
        [node("Dropout", "x ratio off", "y")],
        {"x": (FLOAT, (N, 3))},
        {"ratio": np.float32(0.5), "off": np.array(False)},
    )
    assert getattr(off.followed(), "axis", None) == 0
    training = dataclasses.replace(off, weights={**off.weights, "off": np.array(True)})
    assert "it may draw random numbers" in str(training.followed())


def test_operators_of_other_domains_and_old_opsets_are_refused() -> None:
    other = node("Tanh", "x", "y")
    other.domain = "com.microsoft"
    assert "rows are not followed through operators of this domain" in str(
        Case([other], {"x": (FLOAT, (N, 3))}).followed()
    )
    assert "of an opset before 7" in str(
        Case([node("Tanh", "x", "y")], {"x": (FLOAT, (N, 3))}, opset=6).followed()
    )


def chosen(condition: Sequence[Any], weights: Mapping[str, Any]) -> Case:
    """A model that mixes rows only if a condition of constants is false."""
    branches = {
        f"{name}_branch": onnx.helper.make_graph(
            nodes, name, [], [onnx.helper.make_tensor_value_info(f"{name}_y", FLOAT, None)]
        )
        for name, nodes in (
            ("then", [node("Identity", "x", "then_y")]),
            ("else", [node("ReduceMax", "x", "most", axes=[0]), node("Sub", "x most", "else_y")]),
        )
    }
    return Case(
        [*condition, onnx.helper.make_node("If", ["is_so"], ["y"], **branches)],
        {"x": (FLOAT, (N, 3))},
        weights,
    )


def test_only_exact_constants_decide_a_branch() -> None:
    """ONNX Runtime's Exp has other last bits than NumPy's: a proof that relies on either might be of another branch."""
    exact = chosen(
        [node("Mul", "a a", "b"), node("Equal", "b c", "is_so")], {"a": np.float32(3), "c": np.float32(9)}
    )
    assert getattr(exact.followed(), "axis", None) == 0
    rounded = chosen(
        [node("Exp", "a", "b"), node("Equal", "b c", "is_so")],
        {"a": np.float32(1.2345), "c": np.exp(np.float32(1.2345))},
    )
    assert "it computes over the axis of the rows" in str(rounded.followed())
    half = chosen(
        [node("Mul", "a a", "b"), node("Equal", "b c", "is_so")], {"a": np.float16(3), "c": np.float16(9)}
    )
    assert "it computes over the axis of the rows" in str(half.followed())


HALF, DOUBLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE


@pytest.mark.parametrize(
    ("kind", "dtype", "shape", "is_even"),
    [
        ("Log", FLOAT, (N, 5), False),
        ("Log", FLOAT, (N, 16), True),
        ("Log", FLOAT, (2, N, 8), True),
        ("Log", HALF, (N, 5), False),
        ("Log", DOUBLE, (N, 16), False),
        ("Softplus", FLOAT, (N,), False),
        ("Tanh", FLOAT, (N, 5), True),
        ("Tanh", DOUBLE, (N, 5), False),
        ("Softmax", DOUBLE, (N, 5), False),
        ("Softmax", HALF, (N, 16), False),
        ("Softmax", FLOAT, (N, 5), True),
        ("Tanh", HALF, (N, 5), True),
    ],
)
def test_bits_that_depend_on_the_place_are_known(kind: str, dtype: int, shape: Any, is_even: bool) -> None:
    case = Case([node(kind, "x", "y")], {"x": (dtype, shape)})
    assert case.uneven == ("" if is_even else f"operator {kind} 'y'")


def test_products_of_small_batches_have_other_bits() -> None:
    einsum = Case(
        [node("Einsum", "x W", "y", equation="bi,ij->bj")], {"x": (FLOAT, (N, 128))}, {"W": drawn(128, 1)}
    )
    assert einsum.uneven == "operator Einsum 'y'"
    assert recurrent("RNN", 1).uneven == "operator RNN 'whole'"
    assert not recurrent("LSTM", 4).uneven
    run = plain(einsum.made.SerializeToString())
    x = np.random.default_rng(4).standard_normal((256, 128)).astype(np.float32)
    expected = run({"x": x})["y"]
    for size in (16, 32, 64, 128):
        for start in range(0, 256, size):
            part = run({"x": x[start : start + size]})["y"]
            assert part.tobytes() == expected[start : start + size].tobytes()


def test_bits_of_rows_that_are_lost_may_depend_on_the_place() -> None:
    mixed = [node("ReduceMax", "x", "most", axes=[0]), node("Log", "most", "y")]
    assert Case(mixed, {"x": (FLOAT, (N, 3))}).uneven == "operator Log 'y'"
    constant = [node("Log", "three", "log"), node("Mul", "x log", "y")]
    assert not Case(constant, {"x": (FLOAT, (N, 3))}, {"three": np.float32(3)}).uneven


@pytest.mark.parametrize("kind", sorted(UNEVEN))
def test_a_multiple_of_16_rows_gives_the_same_bits_at_each_place(kind: str) -> None:
    opset = {"Swish": 24, "Mish": 18}.get(kind, 17)
    case = Case([node(kind, "x", "y")], {"x": (FLOAT, (N, 5))}, opset=opset)
    rng = np.random.default_rng(3)
    x = (
        rng.uniform(-0.99, 0.99, (256, 5))
        if kind in {"Acos", "Asin", "Atanh"}
        else rng.standard_normal((256, 5)) * 9
    )
    x = (np.abs(x) + (kind == "Acosh") if kind in {"Acosh", "Log"} else x).astype(np.float32)
    run = plain(case.made.SerializeToString())
    expected = run({"x": x})["y"]
    for size in (16, 32, 64, 128):
        order = rng.permutation(256)
        for start in range(0, 256, size):
            rows = order[start : start + size]
            assert run({"x": x[rows]})["y"].tobytes() == expected[rows].tobytes()
