"""What is known about the bits that ONNX Runtime's operators compute, by operator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx

from stepwell_server.compile.onnx.rows.values import ROWS, Node, Value

_DOUBLE = onnx.TensorProto.DOUBLE
_SMALL_FLOATS = frozenset(
    kind
    for name, kind in onnx.TensorProto.DataType.items()
    if name != "FLOAT" and name.startswith(("FLOAT", "BFLOAT"))
)
_FLOATS = _SMALL_FLOATS | {onnx.TensorProto.FLOAT, _DOUBLE}
_EXACT_NAMES = (
    "Abs Add Cast Ceil Clip Concat Constant ConstantOfShape Div Equal Expand Flatten Floor Gather GatherElements "
    "Greater GreaterOrEqual Identity IsInf IsNaN Less LessOrEqual Max Min Mul Neg Pad Range Relu Reshape Round "
    "Shape Sign Size Slice Split Sqrt Squeeze Sub Tile Transpose Unsqueeze Where"
)
_EXACT = frozenset(_EXACT_NAMES.split())
"""Operators that move numbers, or round each result correctly: no optimization of a graph changes it."""
UNEVEN = frozenset(
    "Acos Acosh Asin Asinh Atan Atanh Celu Cos Cosh Elu Log Mish Selu Sin Sinh Softplus Swish Tan".split()  # noqa: SIM905 - a list takes a line for each
)
"""Operators that compute whole vectors one way, and the last elements of a tensor, which fill no vector, another way. The
last bit of one value in three to one in 50,000 differs, measured with version 1.32; samples may miss it."""
_SIZED = frozenset(["Einsum", "RNN"])
"""Operators whose matrix products have other bits in small batches, and after the last whole block of rows."""
_SIZED_BY_TYPE = {
    onnx.TensorProto.FLOAT16: frozenset(["LogSoftmax", "Softmax"]),
    _DOUBLE: UNEVEN | frozenset(["Erf", "Exp", "LogSoftmax", "Sigmoid", "Softmax", "Softsign", "Tanh"]),
}
"""Operators that treat some rows differently if the results are of this type, whatever the number of elements."""
_VECTOR = 16
"""Elements of which all vectors have a whole number: a batch of so many rows has no elements left over."""


def is_exact(node: Node, results: Sequence[Value]) -> bool:
    """Whether an operator gives the same result wherever it runs, so that a proof may rely on its value."""
    kinds = {value.dtype for value in (*node.values, *results) if value is not None}
    if not kinds & _FLOATS:
        return True
    return node.kind in _EXACT and not kinds & _SMALL_FLOATS


def is_even(node: Node, results: Sequence[Value]) -> bool:
    """Whether the bits of a row are the same at every place of a batch of any size, as far as is known."""
    if node.kind in _SIZED or any(node.kind in _SIZED_BY_TYPE.get(value.dtype, ()) for value in results):
        return False
    if node.kind not in UNEVEN:
        return True
    sizes = [size for value in results for size in value.sizes or (None,) if size is not ROWS]
    if not all(isinstance(size, int) for size in sizes):
        return False
    return math.prod(size for size in sizes if isinstance(size, int)) % _VECTOR == 0


def may_be_uneven(kind: str) -> bool:
    """Whether `is_even` depends on what is known about the operator's rows."""
    return kind in UNEVEN | _SIZED
