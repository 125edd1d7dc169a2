"""Operators that compute each element from the elements at the same place, with broadcasting."""

from __future__ import annotations

from stepwell_server.compile.onnx.rows.values import LostError, Node, Value, placed

_ONE_INPUT = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish "
    "Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus "
    "Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
)
ONE_INPUT = frozenset(_ONE_INPUT.split())
_BROADCAST = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor CastLike Clip Div Equal Greater GreaterOrEqual Less LessOrEqual Max "
    "Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor"
)
#: Operators with any number of inputs that are broadcast together.
BROADCAST = frozenset(_BROADCAST.split())
#: Quantization with a scale and zero point that are the same for all rows.
SCALED = frozenset(["DequantizeLinear", "QuantizeLinear"])


def one_input(node: Node) -> list[Value]:
    """Rows stay where they are."""
    axis = node.needed(0).axis
    assert axis is not None
    return placed(axis)


def broadcast(node: Node) -> list[Value]:
    """Axes are matched from the last one on, so rows must be at the same place from there."""
    given = [value for value in node.values if value is not None]
    places = {value.from_end for value in given if value.axis is not None}
    if len(places) != 1:
        raise LostError("its inputs have rows on different axes, so one row would meet the others")
    place = places.pop()
    for value in given:
        if (
            value.axis is None
            and value.rank >= place
            and value.sizes is not None
            and value.sizes[-place] != 1
        ):
            raise LostError(
                "an input that is the same for all rows has more than one element along their axis"
            )
    return placed(max(value.rank for value in given) - place)


def scaled(node: Node) -> list[Value]:
    """Scales are shared, and not along the rows."""
    node.shared(1, 2)
    value = node.needed(0)
    assert value.axis is not None
    if node.needed(1).rank > 0 and node.attribute("axis", 1) % value.rank == value.axis:
        raise LostError("it has a scale for each row")
    return placed(value.axis)


def dropout(node: Node) -> list[Value]:
    """It does nothing unless it trains."""
    training = node.value(2)
    if node.opset < 7 or (training is not None and (training.content is None or training.content.any())):
        raise LostError("it may draw random numbers")
    axis = node.needed(0).axis
    assert axis is not None
    return [Value(axis=axis), Value(axis=axis)]
