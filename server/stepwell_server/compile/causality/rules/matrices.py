"""Operations on vectors and matrices in the last axes: searches, products, inverses, diagonals, Fourier transforms.

The last axes must be plain. All other axes are stacks of such vectors or matrices, which are computed independently.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepwell_server.compile.causality.axes import Axes, LostAxisError
from stepwell_server.compile.causality.call import Call, Rule, broadcast
from stepwell_server.compile.causality.rules.shapes import require_plain

#: Number of last axes that a transform processes.
_TRANSFORMS = {"FFT": 1, "IFFT": 1, "RFFT": 1, "IRFFT": 1, "FFT2D": 2, "IFFT2D": 2, "RFFT2D": 2, "IRFFT2D": 2}


def _require_plain_last(call: Call, axes: Axes, count: int) -> None:
    for dim in axes[len(axes) - count :]:
        require_plain(dim, f"works ({call.kind}) over")


def _sized_last(call: Call, stack: Axes) -> Axes:
    """Return the axes of a result: those of the stack, then plain ones of any size."""
    return (*stack, *(call.plain(size) for size in call.out()[len(stack) :]))


def _search(call: Call) -> Sequence[Axes]:
    """Find the positions of values, ``(rows, values)``, in sorted sequences, ``(rows, positions)``."""
    table, values = call.axes(0), call.axes(1)
    require_plain(table[1], "searches")
    if table[0] != values[0]:
        raise LostAxisError(
            "values that are searched in one sorted sequence must have one dimension: flatten them"
        )
    return [values]


def _cross(call: Call) -> Sequence[Axes]:
    axes = broadcast(call, range(2))
    _require_plain_last(call, axes, 1)
    return [axes]


def _inverse(call: Call) -> Sequence[Axes]:
    axes = call.data(0).axes
    _require_plain_last(call, axes, 2)
    return [axes]


def _determinant(call: Call) -> Sequence[Axes]:
    axes = call.data(0).axes
    _require_plain_last(call, axes, 2)
    return [axes[:-2]] * len(call.first.outputs)


def _band(call: Call) -> Sequence[Axes]:
    """Set everything except some diagonals to zero."""
    call.integers(1)
    call.integers(2)
    return _inverse(call)


def _diagonal(call: Call) -> Sequence[Axes]:
    axes = call.data(0).axes
    _require_plain_last(call, axes, 2)
    call.integers(1)
    broadcast(call, [2])
    return [_sized_last(call, axes[:-2])]


def _from_diagonal(call: Call) -> Sequence[Axes]:
    axes = call.data(0).axes
    count = 1 if len(set(call.integers(1))) == 1 else 2
    _require_plain_last(call, axes, count)
    broadcast(call, [4])
    return [_sized_last(call, axes[:-count])]


def _transform(call: Call) -> Sequence[Axes]:
    axes, count = call.data(0).axes, _TRANSFORMS[call.kind]
    _require_plain_last(call, axes, count)
    if len(call.inputs) > 1:
        call.integers(1)
    return [_sized_last(call, axes[:-count])]


RULES: dict[str, Rule] = {
    "LowerBound": _search,
    "UpperBound": _search,
    "Cross": _cross,
    "MatrixInverse": _inverse,
    "MatrixDeterminant": _determinant,
    "LogMatrixDeterminant": _determinant,
    "MatrixBandPart": _band,
    "MatrixDiagPartV3": _diagonal,
    "MatrixDiagV3": _from_diagonal,
    **dict.fromkeys(_TRANSFORMS, _transform),
}
