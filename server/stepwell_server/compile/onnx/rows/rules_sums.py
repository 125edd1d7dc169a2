"""Sums, softmax and normalizations over axes: the rows must not be one of these."""

from __future__ import annotations

from stepwell_server.compile.onnx.rows.values import LostError, Node, Value, normalized, placed

_REDUCTIONS = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
    "ReduceSumSquare"
)
REDUCTIONS = frozenset(_REDUCTIONS.split())
#: Operators that compute along one axis, by the default of that axis.
ALONG = {"ArgMax": 0, "ArgMin": 0, "Hardmax": -1, "LogSoftmax": -1, "LpNormalization": -1, "Softmax": -1}
_SHRINKING = frozenset(["ArgMax", "ArgMin"])
_SOFTMAX_WITH_AXIS = 13
#: Operators that compute over all axes from one on, which has this default.
FROM_AXIS = {"LayerNormalization": -1, "RMSNormalization": -1, "SimplifiedLayerNormalization": -1}


def _rows(node: Node) -> int:
    axis = node.needed(0).axis
    if axis is None:
        raise LostError("its input 0 has no rows, another one has")
    return axis


def _avoids(axis: int, others: list[int]) -> None:
    if axis in others:
        raise LostError("it computes over the axis of the rows")


def reduction(node: Node) -> list[Value]:
    """Sums and the like over some axes."""
    axis, rank = _rows(node), node.needed(0).rank
    node.shared(1)
    axes = node.axes(rank)
    if not axes:
        if node.attribute("noop_with_empty_axes", 0):
            return placed(axis)
        axes = list(range(rank))
    _avoids(axis, axes)
    return placed(axis if node.attribute("keepdims", 1) else axis - sum(each < axis for each in axes))


def along(node: Node) -> list[Value]:
    """Softmax, ArgMax and the like along one axis."""
    axis, rank = _rows(node), node.needed(0).rank
    default = ALONG[node.kind]
    if node.kind in {"Softmax", "LogSoftmax", "Hardmax"} and node.opset < _SOFTMAX_WITH_AXIS:
        first = normalized(node.attribute("axis", 1), rank)
        _avoids(axis, list(range(first, rank)))
        return placed(axis)
    other = normalized(node.attribute("axis", default), rank)
    _avoids(axis, [other])
    shrinks = node.kind in _SHRINKING and not node.attribute("keepdims", 1)
    return placed(axis - (1 if shrinks and other < axis else 0))


def from_axis(node: Node) -> list[Value]:
    """Normalization over all axes from one on; scale and bias are shared."""
    axis, rank = _rows(node), node.needed(0).rank
    node.shared(1, 2)
    first = normalized(node.attribute("axis", FROM_AXIS[node.kind]), rank)
    _avoids(axis, list(range(first, rank)))
    for place in (1, 2):
        value = node.value(place)
        if value is not None and value.rank > rank - axis - 1:
            raise LostError("its scale has more than one element along the axis of the rows")
    return [Value(axis=axis) for _ in node.proto.output]


def by_channel(node: Node) -> list[Value]:
    """Normalization of each row and channel, with the statistics of the row or constant ones."""
    node.shared(*range(1, len(node.values)))
    if node.attribute("training_mode", 0):
        raise LostError("it computes statistics over all rows")
    if _rows(node) != 0:
        raise LostError("its rows are not on the first axis, so it mixes them")
    return placed(0)


def mean_variance(node: Node) -> list[Value]:
    """MeanVarianceNormalization: over the axes of its attribute, by default 0, 2 and 3."""
    axis, rank = _rows(node), node.needed(0).rank
    _avoids(axis, [normalized(int(each), rank) for each in node.attribute("axes", [0, 2, 3])])
    return placed(axis)


def cumulative(node: Node) -> list[Value]:
    """CumSum along one axis."""
    axis, rank = _rows(node), node.needed(0).rank
    node.shared(1)
    _avoids(axis, [normalized(each, rank) for each in node.needed(1).integers])
    return placed(axis)


def largest(node: Node) -> list[Value]:
    """TopK along one axis."""
    axis, rank = _rows(node), node.needed(0).rank
    node.shared(1)
    _avoids(axis, [normalized(node.attribute("axis", -1), rank)])
    return [Value(axis=axis), Value(axis=axis)]
