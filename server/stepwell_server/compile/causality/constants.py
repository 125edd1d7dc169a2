"""What the operations that compute a constant show of it, whatever the length of the sequence.

The values of a constant are compared over some lengths only. A constant that repeats fixed values, such as ones for each
time step, can change at no other length. One that counts, such as ``arange(T) > 70000``, may change beyond any.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stepwell_server.compile.graph.tensorflow_setup import tf

#: One input, one result.
UNARY = frozenset(
    {
        "Abs",
        "Acos",
        "Acosh",
        "Angle",
        "AsString",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "BesselI0",
        "BesselI0e",
        "BesselI1",
        "BesselI1e",
        "Bitcast",
        "Bucketize",
        "Cast",
        "Ceil",
        "ComplexAbs",
        "Cos",
        "Cosh",
        "Digamma",
        "Elu",
        "EnsureShape",
        "Erf",
        "Erfc",
        "Erfinv",
        "Exp",
        "Expm1",
        "Floor",
        "Identity",
        "Imag",
        "Inv",
        "Invert",
        "IsFinite",
        "IsInf",
        "IsNan",
        "LeakyRelu",
        "Lgamma",
        "Log",
        "Log1p",
        "LogicalNot",
        "Ndtri",
        "Neg",
        "OnesLike",
        "PreventGradient",
        "Real",
        "Reciprocal",
        "Relu",
        "Relu6",
        "Rint",
        "Round",
        "Rsqrt",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Snapshot",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Square",
        "StopGradient",
        "StringToHashBucketFast",
        "StringToHashBucketStrong",
        "Tan",
        "Tanh",
        "ZerosLike",
    }
)
#: Several inputs, broadcast to one result.
BROADCAST = frozenset(
    {
        "Add",
        "AddV2",
        "AddN",
        "Atan2",
        "BiasAdd",
        "Betainc",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "ClipByValue",
        "Complex",
        "Div",
        "DivNoNan",
        "Equal",
        "FloorDiv",
        "FloorMod",
        "Greater",
        "GreaterEqual",
        "Igamma",
        "Igammac",
        "LeftShift",
        "Less",
        "LessEqual",
        "LogicalAnd",
        "LogicalOr",
        "Maximum",
        "Minimum",
        "Mod",
        "Mul",
        "MulNoNan",
        "NextAfter",
        "NotEqual",
        "Polygamma",
        "Pow",
        "RealDiv",
        "RightShift",
        "SelectV2",
        "SquaredDifference",
        "Sub",
        "TruncateDiv",
        "TruncateMod",
        "Xdivy",
        "Xlog1py",
        "Xlogy",
        "Zeta",
    }
)
#: They repeat the values of their first input, or arrange them otherwise; the second input is a shape.
_SHAPING = frozenset({"BroadcastTo", "Reshape", "Tile"})
#: They arrange values otherwise.
_MOVING = frozenset({"ExpandDims", "Squeeze", "Transpose"})
_COUNTING = frozenset({"CumulativeLogsumexp", "Cumprod", "Cumsum", "LinSpace", "Range"})
#: Of whole numbers, they make polynomials of polynomials.
_POLYNOMIAL = frozenset({"Add", "AddV2", "Cast", "Identity", "Mul", "Neg", "Sub"})
#: They read as much of a table as there are time steps or rows.
_READING = frozenset({"Slice", "StridedSlice"})


class Origin(enum.Enum):
    """How a constant is computed."""

    REPEATED = "it repeats fixed values: if it does not change over short sequences, it never does"
    POLYNOMIAL = "it has polynomials of numbers that count: a few values determine all others"
    COUNTED = "it counts along an axis, or reads a table as far as that: it may change beyond any length"
    OTHER = "only its values show whether it changes"

    @property
    def counts(self) -> bool:
        """Whether it may have another value at each place, even if it has not over short sequences."""
        return self in (Origin.POLYNOMIAL, Origin.COUNTED)


def origin(
    one: Any,
    two: Any,
    known: Mapping[str, Origin],
    is_same: Callable[[Any, Any], bool],
) -> Origin:
    """Return the origin of the results of an operation in two traces; ``known`` has those of its inputs, by operation.

    ``is_same`` compares two constants whose size depends on neither rows nor time steps.
    """
    inputs = list(zip(one.inputs, two.inputs, strict=True))
    is_fixed = all(map(_is_of_one_size, one.outputs, two.outputs))
    if one.type == "Range" and not is_fixed:
        is_whole = one.outputs[0].dtype.is_integer and is_same(*inputs[0]) and is_same(*inputs[2])
        return Origin.POLYNOMIAL if is_whole else Origin.COUNTED
    values = _values(one, inputs)
    found = {
        (Origin.REPEATED if is_same(*pair) else Origin.OTHER)
        if _is_of_one_size(*pair)
        else known.get(pair[0].op.name, Origin.OTHER)
        for pair in values
    }
    if any(known.get(value.op.name, Origin.OTHER).counts for value, _ in inputs):
        is_polynomial = (
            not is_fixed
            and one.type in _POLYNOMIAL | _SHAPING | _MOVING | {"StridedSlice"}
            and one.outputs[0].dtype.is_integer
            and found <= {Origin.POLYNOMIAL, Origin.REPEATED}
        )
        return Origin.POLYNOMIAL if is_polynomial else Origin.COUNTED
    if is_fixed:
        return Origin.REPEATED
    if one.type in _COUNTING or (one.type in _READING and _is_of_one_size(*inputs[0])):
        return Origin.COUNTED
    return Origin.REPEATED if found == {Origin.REPEATED} else Origin.OTHER


def _values(op: Any, inputs: Sequence[tuple[Any, Any]]) -> Sequence[tuple[Any, Any]]:
    """Return the inputs of an operation from which the values of its result come; none if it may do more with them."""
    if op.type == "Fill":
        return inputs[1:]
    if op.type in _SHAPING:
        return inputs[:1]
    if op.type == "StridedSlice":
        return inputs if _is_forwards(op) else ()
    return inputs if op.type in UNARY | BROADCAST | _MOVING else ()


def _is_forwards(op: Any) -> bool:
    """Whether a slice begins at a fixed place from the front, and takes later elements in order."""
    if any(value.op.type != "Const" for value in op.inputs[1:]):
        return False
    begins, _, strides = (tf.make_ndarray(value.op.get_attr("value")) for value in op.inputs[1:])
    return bool(begins.min() >= 0 and strides.min() > 0)


def without_negative(one: Any, two: Any) -> tuple[Any, Any]:
    """Return the numbers that `keras.ops.take` looks up: from those below 0 it counts from the end."""
    for tensor in (one, two):
        if tensor.op.type != "SelectV2":
            return one, two
        condition, _, number = tensor.op.inputs
        if condition.op.type != "Less" or condition.op.inputs[0] is not number:
            return one, two
    return one.op.inputs[2], two.op.inputs[2]


def clamped(one: Any, two: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]] | None:
    """Return the tensors of both traces if a constant is the maximum of one that has their size and a fixed number.

    Returns:
        that constant and the number, or None.
    """
    while one.op.type in _SHAPING | _MOVING and one.op.type == two.op.type:
        one, two = one.op.inputs[0], two.op.inputs[0]
    if one.op.type != "Maximum" or two.op.type != "Maximum":
        return None
    pairs = list(zip(one.op.inputs, two.op.inputs, strict=True))
    fixed = [_is_of_one_size(*pair) for pair in pairs]
    number = fixed.index(True) if sum(fixed) == 1 else -1
    return (pairs[1 - number], pairs[number]) if number >= 0 else None


def _is_of_one_size(one: Any, two: Any) -> bool:
    return bool(one.shape.is_fully_defined() and one.shape == two.shape)
