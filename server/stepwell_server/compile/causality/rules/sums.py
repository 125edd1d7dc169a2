"""Operations that sum, compare or convolve, but not over the batch or time axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepwell_server.compile.causality.axes import (
    Axes,
    Dim,
    LostAxisError,
    Pair,
    Time,
    elements,
    is_plain,
    placed,
)
from stepwell_server.compile.causality.call import Call, Memory, Rule
from stepwell_server.compile.causality.refusals import Reason, Refusal
from stepwell_server.compile.causality.rules.shapes import mixed, require_plain, slid
from stepwell_server.compile.causality.values import Data

_REDUCTIONS = ("All", "Any", "EuclideanNorm", "Max", "Mean", "Min", "Prod", "Sum")


def _reduction(call: Call) -> Sequence[Axes]:
    axes = call.data(0).axes
    over = {axis % len(axes) for axis in call.integers(1)} if axes else set()
    for axis in over:
        require_plain(axes[axis], f"takes the {call.kind.lower()} over")
    if call.attr("keep_dims"):
        return [tuple(() if i in over else dim for i, dim in enumerate(axes))]
    return [tuple(dim for i, dim in enumerate(axes) if i not in over)]


def _arg(call: Call) -> Sequence[Axes]:
    axes = list(call.data(0).axes)
    (axis,) = call.integers(1)
    require_plain(axes.pop(axis % len(axes)), "looks for the largest over")
    return [tuple(axes)]


def _last_axis(call: Call) -> Sequence[Axes]:
    axes = call.data(0).axes
    require_plain(axes[-1], f"works ({call.kind}) over")
    return [axes]


def _top(call: Call) -> Sequence[Axes]:
    axes = call.data(0).axes
    require_plain(axes[-1], "sorts")
    call.integers(1)
    return [(*axes[:-1], call.plain(call.out(i)[-1])) for i in range(2)]


def _matmul(call: Call) -> Sequence[Axes]:
    """Products of two matrices, or of stacks of matrices."""
    one, two = list(call.axes(0)), list(call.axes(1))
    names = ("transpose_a", "transpose_b") if call.kind == "MatMul" else ("adj_x", "adj_y")
    if call.attr(names[0]):
        one[-2:] = one[:-3:-1]
    if call.attr(names[1]):
        two[-2:] = two[:-3:-1]
    for dim in (one[-1], two[-2]):
        require_plain(dim, "multiplies a matrix with")
    stacked: list[Dim] = []
    depth = max(len(one), len(two)) - 2
    for first, second in zip(_deepened(one[:-2], depth), _deepened(two[:-2], depth), strict=True):
        if first and second and first != second:
            raise LostAxisError("two stacks of matrices have their axes in different orders")
        stacked.append(first or second)
    return [(*stacked, one[-2], two[-1])]


def _deepened(dims: Sequence[Dim], depth: int) -> list[Dim]:
    return [()] * (depth - len(dims)) + list(dims)


def _einsum(call: Call) -> Sequence[Axes]:
    inputs, output = call.attr("equation").decode().replace(" ", "").split("->")
    terms = inputs.split(",")
    found: dict[str, Dim] = {}
    for i, term in enumerate(terms):
        letters = _letters(term, call.rank(i))
        for letter, dim in zip(letters, call.axes(i), strict=True):
            if len(letters) != len(set(letters)):
                raise Refusal(Reason.UNPROVEN, "takes a diagonal (Einsum)")
            known = found.get(letter, ())
            if known and dim and known != dim:
                raise LostAxisError("two factors have their axes in different orders")
            found[letter] = known or dim
    kept = _letters(output, len(call.out()))
    for letter, dim in found.items():
        if letter not in kept:
            require_plain(dim, "sums products over")
    return [tuple(found[letter] for letter in kept)]


def _letters(term: str, rank: int) -> list[str]:
    """Return one name for each dimension; those in ``...`` are numbered from the last."""
    if "..." not in term:
        return list(term)
    before, after = term.split("...")
    count = rank - len(before) - len(after)
    return [*before, *(f"...{i}" for i in range(count, 0, -1)), *after]


def _convolution(call: Call) -> Sequence[Axes]:
    """Convolutions with channels last. A window over the time axis moves by one time step."""
    axes, kernel = call.data(0).axes, _weights(call, 1)
    spatial = _spatial(call, len(axes))
    for place, axis in enumerate(spatial):
        if is_plain(axes[axis]):
            continue
        size, stride = kernel[place], call.attr("strides")[axis]
        time, clause = elements(axes[axis]), f"has a window of {size} over"
        if time is None:
            if size != 1 or stride != 1 or call.attr("padding") == b"EXPLICIT":
                raise mixed(axes[axis], clause)
            continue
        reach = (size - 1) * call.attr("dilations")[axis]
        before, after = _padding(call, time, axis, reach)
        axes = placed(axes, axis, slid(call, time, reach, before, after, f"{clause} the time axis", stride))
    return [_windowed(call, axes, spatial)]


def convolution_padding(op: Any, axis: int, reach: int) -> tuple[int, int]:
    """Return the padding that a convolution or pooling itself adds at the ends of an axis."""
    match op.get_attr("padding"):
        case b"EXPLICIT":
            before, after = op.get_attr("explicit_paddings")[2 * axis : 2 * axis + 2]
            return int(before), int(after)
        case b"SAME":
            size, stride = int(op.inputs[0].shape[axis]), op.get_attr("strides")[axis]
            missing = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
            return missing // 2, missing - missing // 2
    return 0, 0


def _padding(call: Call, time: Time, axis: int, reach: int) -> tuple[int, int]:
    """Return the same of a time axis. If its strides divide the elements of a time step, it is the same for any length."""
    found = convolution_padding(call.first, axis, reach)
    if not time.per % call.attr("strides")[axis]:
        call.require_same(Pair(found[0], convolution_padding(call.second, axis, reach)[0]))
    return found


def _transposed_convolution(call: Call) -> Sequence[Axes]:
    """Transposed convolutions with channels last."""
    axes, kernel = call.data(2).axes, _weights(call, 1)
    spatial = _spatial(call, len(axes))
    for place, axis in enumerate(spatial):
        size, stride = kernel[place], call.attr("strides")[axis]
        if not is_plain(axes[axis]) and (size, stride) != (1, 1):
            time, clause = elements(axes[axis]), f"has a window of {size} over"
            if time is None:
                raise mixed(axes[axis], clause)
            axes = placed(axes, axis, _spread(call, time, axis, size, f"{clause} the time axis"))
    return [_windowed(call, axes, spatial)]


def _spread(call: Call, time: Time, axis: int, size: int, clause: str) -> Time:
    """Return the time axis after a transposed convolution.

    Element ``i`` adds to the results from ``stride * i - left`` on, ``size`` of them, where ``left`` are those that
    padding="same" leaves out. So the result ``j`` depends on no input after the time step of the element ``(j + left) //
    stride``, which is ``(j + left + stride * start) // (stride * per)``. The results that a time step ends need
    ``(size - 1) // stride`` elements before those that it brings.
    """
    call.notes.looks = clause
    stride, is_same = call.attr("strides")[axis], call.attr("padding") == b"SAME"
    space = [place for place in _spatial(call, len(call.first.outputs[0].shape)) if place != axis]
    sizes = _weights(call, 1)
    if is_same and any((sizes[place - 1], call.attr("strides")[place]) != (1, 1) for place in space):
        raise Refusal(Reason.UNPROVEN, f"{clause} and over space, with padding by their sizes")
    if call.attr("padding") == b"EXPLICIT" or call.attr("dilations")[axis] != 1:
        raise Refusal(Reason.UNPROVEN, f"{clause} in a way that the proof does not follow")
    if size > stride and time.start + time.extra < 0:
        raise Refusal(Reason.LENGTH, "spreads the end of a sequence that lags behind")
    left = max(size - stride, 0) // 2 if is_same else 0
    extra = stride * time.extra if is_same else stride * (time.extra - 1) + max(size, stride)
    call.remember(Memory.COUNT, max(time.start, 0), 2, per=time.per)
    call.remember(Memory.WINDOW, (size - 1) // stride, 2, per=time.per)
    return Time(stride * time.start + left, extra, stride * time.per)


def _pooling(call: Call) -> Sequence[Axes]:
    axes = call.data(0).axes
    spatial = _spatial(call, len(axes))
    for axis in spatial:
        size, stride, time = call.attr("ksize")[axis], call.attr("strides")[axis], elements(axes[axis])
        if is_plain(axes[axis]) or (size, stride) == (1, 1):
            continue
        clause = f"pools {size} elements of"
        if time is None:
            raise mixed(axes[axis], clause)
        axes = placed(axes, axis, _pooled(call, time, axis, f"{clause} the time axis"))
    return [_windowed(call, axes, spatial)]


def _pooled(call: Call, time: Time, axis: int, clause: str) -> Time:
    """Return the time axis after pooling. What padding="same" adds at its ends is left out of each window.

    So the elements in front of the first one must be known for as long as windows overlap them.
    """
    reach, stride = call.attr("ksize")[axis] - 1, call.attr("strides")[axis]
    before, after = _padding(call, time, axis, reach)
    if after and time.start + time.extra < 0:
        raise Refusal(Reason.LENGTH, f"{clause} after the end of a sequence that lags behind")
    padded = Time(time.start - before, time.extra + before + after, time.per)
    found = slid(call, padded, reach, 0, 0, clause, stride)
    if not before:
        return found
    space = (place for place in _spatial(call, call.rank(0)) if place != axis)
    if call.kind.startswith("Avg") and any(
        (call.attr("ksize")[place], call.attr("strides")[place]) != (1, 1) for place in space
    ):
        raise Refusal(Reason.UNPROVEN, f"{clause} and space, with padding='same'")
    kept = next((need.rows for need in call.notes.needs if need.kind is Memory.WINDOW), 0)
    if not kept:
        raise Refusal(Reason.UNPROVEN, f"{clause} with padding='same' in windows of whole time steps")
    call.remember(Memory.COUNT, max(kept + time.start, 0), per=time.per)
    return found


def _resize(call: Call) -> Sequence[Axes]:
    axes = call.data(0).axes
    for axis in (1, 2):
        require_plain(axes[axis], "resizes")
    return [_windowed(call, axes, (1, 2))]


def _weights(call: Call, i: int) -> list[int]:
    value = call.inputs[i]
    if isinstance(value, Data) or not value.is_same:
        raise Refusal(Reason.UNPROVEN, f"computes the weights of a convolution from data ({call.kind})")
    return [size.first for size in value.shape()]


def _spatial(call: Call, rank: int) -> tuple[int, ...]:
    if call.attr("data_format") not in (b"NHWC", b"NDHWC"):
        raise Refusal(Reason.UNPROVEN, f"has its channels before the other axes ({call.kind})")
    return tuple(range(1, rank - 1))


def _windowed(call: Call, axes: Axes, spatial: Sequence[int]) -> Axes:
    """Return the axes of a result, with new sizes for plain spatial axes and for the channels."""
    channels = len(axes) - 1
    require_plain(axes[channels], "sums over")
    return tuple(
        call.plain(size) if i == channels or (i in spatial and is_plain(axes[i])) else axes[i]
        for i, size in enumerate(call.out())
    )


_BY_RULE: dict[Rule, tuple[str, ...]] = {
    _reduction: _REDUCTIONS,
    _arg: ("ArgMax", "ArgMin"),
    _last_axis: ("Softmax", "LogSoftmax"),
    _matmul: ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"),
    _convolution: ("Conv2D", "Conv3D", "DepthwiseConv2dNative"),
    _transposed_convolution: ("Conv2DBackpropInput", "Conv3DBackpropInputV2"),
    _pooling: ("MaxPool", "AvgPool", "MaxPool3D", "AvgPool3D"),
    _resize: ("ResizeBilinear", "ResizeNearestNeighbor", "ResizeBicubic"),
    _top: ("TopKV2",),
    _einsum: ("Einsum",),
}
RULES: dict[str, Rule] = {kind: rule for rule, kinds in _BY_RULE.items() for kind in kinds}
