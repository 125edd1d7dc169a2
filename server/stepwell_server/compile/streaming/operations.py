"""How each kind of operation is created again for one time step.

Most are created as they were. Others have the number of rows or time steps among their inputs or attributes, or look
back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from stepwell_server.compile.causality.axes import Axes, elements, is_plain, time_of
from stepwell_server.compile.causality.call import Memory, Need
from stepwell_server.compile.causality.rules.sums import convolution_padding
from stepwell_server.compile.graph.tensorflow_setup import tf
from stepwell_server.compile.graph.transposed import spread
from stepwell_server.compile.streaming.operation import Operation, in_place, time_place, time_start
from stepwell_server.compile.streaming.replay import again, plain_sizes, step_shape

Maker = Callable[[Operation], "list[Any]"]
_DILATED = ("Conv2D", "Conv3D", "DepthwiseConv2dNative")


class CannotStreamError(Exception):
    """The operation cannot be created for one time step. The message is a clause."""


def make(one: Operation) -> list[Any]:
    """Create an operation for one time step; return its results.

    Raises:
        CannotStreamError: it cannot be created.
    """
    try:
        return _MAKERS.get(one.kind, _as_it_was)(one)
    except (ValueError, TypeError, IndexError, tf.errors.OpError) as error:
        raise CannotStreamError(
            f"uses the operation {one.kind} in a way that cannot be done for one time step"
        ) from error


def gap_of(need: Need, op: Any, axes: Axes) -> int:
    """Return which rows of a window an operation reads: every so many, from the oldest on. ``axes`` are its input's."""
    if need.kind is Memory.DELAY:
        return need.rows
    return int(op.get_attr("dilations")[time_place(axes)]) if op.type in _DILATED else 1


def _as_it_was(one: Operation) -> list[Any]:
    if any(value.func.name for value in one.op.node_def.attr.values()):
        raise CannotStreamError(f"calls a function ({one.kind}) in a model that looks back")
    return again(one.op, one.inputs())


def _reshaped(one: Operation) -> list[Any]:
    return [one.shaped(one.data())]


def _sliced(one: Operation) -> list[Any]:
    """Take elements of plain dimensions, and some of those of a time step: the proof accounts for the others."""
    begins, ends, strides = (one.array(i).tolist() for i in (1, 2, 3))
    masks = {
        name: one.op.get_attr(f"{name}_mask")
        for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    dims, index = list(one.axes()), list[Any]()
    for i, stride in enumerate(strides):
        if masks["ellipsis"] >> i & 1:
            behind = sum(1 for j in range(i + 1, len(strides)) if not masks["new_axis"] >> j & 1)
            del dims[: len(dims) - behind]
            index.append(Ellipsis)
        elif masks["new_axis"] >> i & 1:
            index.append(tf.newaxis)
        elif not is_plain(dims[0]):
            time, size = elements(dims[0]), int(one.op.inputs[0].shape[len(one.axes()) - len(dims)])
            del dims[0]
            begin = 0 if masks["begin"] >> i & 1 else begins[i]
            if stride > 1 and time is not None:
                first = min(max(begin + size if begin < 0 else begin, 0), size)
                index.append(slice((time.start + first) % stride, None, stride))
            else:
                index.append(0 if masks["shrink_axis"] >> i & 1 else slice(None))
        elif masks["shrink_axis"] >> i & 1:
            del dims[0]
            index.append(begins[i])
        else:
            del dims[0]
            begin = None if masks["begin"] >> i & 1 else begins[i]
            index.append(slice(begin, None if masks["end"] >> i & 1 else ends[i], stride))
    return [one.first()[tuple(index)]]


def _part(one: Operation) -> list[Any]:
    begins, counts = one.array(1).tolist(), one.array(2).tolist()
    index = [
        slice(begin, None if count < 0 else begin + count) if is_plain(dim) else slice(None)
        for dim, begin, count in zip(one.axes(), begins, counts, strict=True)
    ]
    return [one.first()[tuple(index)]]


def _padded(one: Operation) -> list[Any]:
    paddings = np.array(one.array(1))
    for i, dim in enumerate(one.axes()):
        if not is_plain(dim):
            paddings[i] = 0
    rest = [one.constant(i) for i in range(2, len(one.op.inputs))]
    value = one.behind(rest[0] if rest else tf.zeros((), one.data().dtype))
    if np.any(paddings):
        (value,) = again(one.op, [value, tf.constant(paddings), *rest])
    return [value]


def _mirrored(one: Operation) -> list[Any]:
    """Pad with copies; along the time axis these are kept for what comes before the first time step."""
    paddings = np.array(one.array(1))
    for i, dim in enumerate(one.axes()):
        if not is_plain(dim):
            paddings[i] = 0
    if one.need(Memory.FIRST) is not None:
        one.first()
    return again(one.op, [one.data(), tf.constant(paddings)]) if np.any(paddings) else [one.data()]


def _shifted(one: Operation) -> list[Any]:
    """Shift plain dimensions: along the time axis the proof accounts for it."""
    axis = int(np.ravel(one.array(2))[0]) % len(one.axes())
    return [one.data()] if time_of([one.axes()[axis]]) is not None else _as_it_was(one)


def _joined(one: Operation) -> list[Any]:
    count = len(one.op.inputs) - 1
    out = one.out()
    axis = int(one.array(count)) % len(out)
    timed = [i for i in range(count) if one.is_data(i) and not is_plain(one.axes(i)[axis])]
    if timed:
        (place,) = timed
        is_late = one.need(Memory.COUNT) is not None
        if not is_late:
            return [one.data(place)]
        first = one.data(0) if one.is_data(0) else tf.gather(one.one_of(0, out), [0], axis=axis)
        return [one.behind(first, place)]
    return [tf.concat([one.filled(i, out) for i in range(count)], axis)]


def _stacked(one: Operation) -> list[Any]:
    axis, dims = one.op.get_attr("axis"), list(one.out())
    del dims[axis]
    return [tf.stack([one.filled(i, tuple(dims)) for i in range(len(one.op.inputs))], axis)]


def _tiled(one: Operation) -> list[Any]:
    """Repeat plain dimensions."""
    before, after = one.axes(), one.out()
    value = one.data()
    if len(after) > len(before):  # BroadcastTo may add dimensions in front.
        before = ((),) * (len(after) - len(before)) + before
        value = tf.reshape(value, step_shape(before))
    counts = [(math.prod(plain_sizes([dim])) for dim in axes) for axes in (before, after)]
    return [tf.tile(value, [new // old for old, new in zip(*counts, strict=True)])]


def _looked_up(one: Operation) -> list[Any]:
    if not one.is_data(0) or one.is_data(1):
        return _as_it_was(one)
    axis = int(one.array(2)) % len(one.axes())
    if is_plain(one.axes()[axis]):
        return _as_it_was(one)
    out, rank = one.out(), len(one.array(1).shape)
    if rank and time_of(out[axis : axis + 1]) is not None:
        return [_frames(one, axis)]
    places = tf.constant(np.zeros_like(one.array(1)))  # The time step is the only one.
    return again(one.op, [one.first(), places, one.constant(2)])


def _frames(one: Operation, axis: int) -> Any:
    """Take the elements of the frames that end in this time step from a window."""
    array, need, axes = one.array(1), one.need(Memory.WINDOW), one.axes()
    time = elements(one.out()[axis])
    places = array[-1:] if one.need(Memory.FIRST) is not None else array[: 1 if time is None else time.per]
    places = places - places.min()
    early = one.first() if one.need(Memory.FIRST) is not None else None  # numbers below 0 became 0
    value = one.data() if need is None else in_place(one.window(need, one.data(), early), axes, axis)
    return one.shaped(tf.gather(value, tf.constant(np.ravel(places)), axis=axis))


def _accumulated(one: Operation) -> list[Any]:
    need = one.need(Memory.TOTAL)
    if need is None:
        return _as_it_was(one)
    if need.per > 1:
        return [_accumulated_within(one, need)]
    sizes, combine = [-1, *plain_sizes(one.out())], tf.add if one.kind == "Cumsum" else tf.multiply
    if one.is_data(0):
        none = tf.zeros if one.kind == "Cumsum" else tf.ones
        row = tf.reshape(one.behind(none((), one.data().dtype)), sizes)
    else:
        row = tf.reshape(one.one_of(0, one.out()), sizes)
    before, after = one.carry(need, row.dtype, lambda total: combine(total, row))
    return [one.shaped(before if one.op.get_attr("exclusive") else after)]


def _accumulated_within(one: Operation, need: Need) -> Any:
    """Accumulate the elements of a time step, one after the other as TensorFlow does, from the total on."""
    axes, is_sum = one.out(), one.kind == "Cumsum"
    place = time_place(axes)
    sizes = plain_sizes(axes[:place]), plain_sizes(axes[place + 1 :])
    at, dtype = 1 + len(sizes[0]), one.op.outputs[0].dtype
    results: list[Any] = []

    def grown(total: Any) -> Any:
        if one.is_data(0):
            value = one.behind((tf.zeros if is_sum else tf.ones)((), dtype))
        else:
            value = one.spread_like(0, axes, total)
        first = tf.reshape(total, [-1, *sizes[0], 1, *sizes[1]])
        joined = tf.concat([first, tf.reshape(value, [-1, *sizes[0], need.per, *sizes[1]])], at)
        if is_sum:
            found = tf.cumsum(joined, at)
        else:  # LiteRT has no Cumprod.
            found = tf.concat([*itertools.accumulate(tf.split(joined, need.per + 1, at), tf.multiply)], at)
        before, last = tf.split(found, [need.per, 1], at)
        results.append(before if one.op.get_attr("exclusive") else tf.split(found, [1, need.per], at)[1])
        return tf.reshape(last, [-1, *sizes[0], *sizes[1]])

    one.carry(need, dtype, grown)
    return one.shaped(results[0])


def _convolved(one: Operation) -> list[Any]:
    """Convolve the rows of a window, without those in gaps (a dilation rate)."""
    axes = one.axes()
    place, need = time_place(axes), one.need(Memory.WINDOW)
    gaps = [int(gap) for gap in one.op.get_attr("dilations")]
    kernel = one.constant(1)
    value = one.behind(tf.zeros((), one.data().dtype))
    is_apart, per = False, 1 if need is None else need.per
    if need is not None:
        rows = one.window(need, value)
        count, channels = int(rows.shape[1]), math.prod(plain_sizes(axes[-1:]))
        *window, per_group, filters = one.op.inputs[1].shape.as_list()
        has_space = plain_sizes(axes[:-1]) or math.prod(window) != count
        if one.kind != "DepthwiseConv2dNative" and not has_space and per_group == channels and need.per == 1:
            # One product of matrices, which LiteRT computes faster than a convolution.
            kernel = tf.reshape(kernel, [count * channels, filters])
            return [one.shaped(tf.matmul(tf.reshape(rows, [-1, count * channels]), kernel))]
        is_apart = per > 1 and gaps[place] > 1 and one.kind != "Conv2D"
        if is_apart:
            rows = _in_rows(rows, per, gaps[place])
        value = in_place(rows, axes, place)
        gaps[place] = 1 if per == 1 or is_apart else gaps[place]
    paddings = [[0, 0] for _ in axes]
    for axis in range(1, len(axes) - 1):
        if axis != place and is_plain(axes[axis]):
            reach = (one.op.inputs[1].shape.as_list()[axis - 1] - 1) * one.op.get_attr("dilations")[axis]
            paddings[axis] = list(convolution_padding(one.op, axis, reach))
    if any(map(any, paddings)):
        value = tf.pad(value, paddings)
    changed: dict[str, Any] = {"padding": b"VALID", "dilations": gaps}
    if one.kind != "Conv3D":
        changed["explicit_paddings"] = []
    (result,) = again(one.op, [value, kernel], **changed)
    if is_apart:
        out = one.out()
        sizes = plain_sizes(out[:place]), plain_sizes(out[place + 1 :])
        result = in_place(tf.reshape(result, [-1, per, *sizes[0], *sizes[1]]), out, place)
    return [result]


def _in_rows(rows: Any, per: int, gap: int) -> Any:
    """Return the windows of the last elements, which have gaps, as rows without any: TensorFlow computes only those."""
    sizes = [int(size) for size in rows.shape[1:]]
    places = np.arange(per)[:, None] + np.arange(0, sizes[0] - per + 1, gap)
    return tf.reshape(tf.gather(rows, tf.constant(places), axis=1), [-1, places.shape[1], *sizes[1:]])


def _pooled(one: Operation) -> list[Any]:
    axes = one.axes()
    need = one.need(Memory.WINDOW)
    if need is None:
        return _as_it_was(one)
    place, rows = time_place(axes), one.window(need, one.data())
    if one.op.get_attr("padding") == b"VALID":
        return again(one.op, [in_place(rows, axes, place)])
    is_absent, is_max = one.is_earlier(need), one.kind.startswith("Max")
    lowest = -np.inf if rows.dtype.is_floating else rows.dtype.min
    if is_absent is not None:
        mask = tf.reshape(is_absent, [-1, int(rows.shape[1]), *[1] * (len(rows.shape) - 2)])
        rows = tf.where(mask, tf.constant(lowest if is_max else 0, rows.dtype), rows)
    value, paddings = in_place(rows, axes, place), [[0, 0] for _ in axes]
    for axis in range(1, len(axes) - 1):
        if axis != place and is_plain(axes[axis]):
            paddings[axis] = list(convolution_padding(one.op, axis, one.op.get_attr("ksize")[axis] - 1))
    if any(map(any, paddings)):
        value = tf.pad(value, paddings, constant_values=lowest)
    (result,) = again(one.op, [value], padding=b"VALID")
    if is_max or is_absent is None:
        return [result]
    shape = [1] * len(axes)
    shape[0], shape[place] = -1, int(rows.shape[1])
    (share,) = again(one.op, [tf.reshape(tf.cast(~is_absent, rows.dtype), shape)], padding=b"VALID")
    return [result / share]


def _transposed_convolution(one: Operation) -> list[Any]:
    """Spread the elements of a window; only results that begin in this time step are whole."""
    axes, shape, need = one.axes(2), step_shape(one.out()), one.need(Memory.WINDOW)
    place, changed = time_place(axes), dict[str, Any]()
    value = one.behind(tf.zeros((), one.data(2).dtype), 2)
    time, kept = elements(axes[place]), 0 if need is None else need.rows
    window, strides = one.op.inputs[1].shape.as_list()[:-2], one.op.get_attr("strides")
    size, stride, count = window[place - 1], strides[place], shape[place]
    if time is not None and place and (size, stride) != (1, 1):
        value = value if need is None else in_place(one.window(need, value), axes, place)
        if math.prod(window) == size and math.prod(strides) == stride:
            return [one.shaped(spread(value, one.constant(1), strides[1:-1]))]
        shape[place] = (kept + time.per - 1) * stride + max(size, stride)
        changed = {"padding": b"VALID"}
    sizes = tf.stack([tf.shape(value)[0] if length < 0 else length for length in shape])
    (result,) = again(one.op, [sizes, one.constant(1), value], **changed)
    if changed:
        first, counts = [0] * len(shape), [-1] * len(shape)
        first[place], counts[place] = kept * stride, count
        result = tf.slice(result, first, counts)
    return [result]


def _item_of_list(one: Operation) -> list[Any]:
    """Take an element of a list over time, of which there is one in a time step, or what a loop carried."""
    if one.data().dtype == tf.variant:
        return _as_it_was(one)
    if int(one.array(1)):
        raise ValueError("a loop carries one value")
    return [one.first()]


def _listed(one: Operation) -> list[Any]:
    """Take the time step from a sequence over which a loop runs."""
    is_over = time_of(one.axes()[:1]) is not None
    return [tf.squeeze(one.data(), 0)] if is_over else _as_it_was(one)


def _stacked_list(one: Operation) -> list[Any]:
    is_over = time_of(one.out()[:1]) is not None
    return [tf.expand_dims(one.data(), 0)] if is_over else _as_it_was(one)


def _summed(one: Operation) -> list[Any]:
    return [tf.add_n([one.filled(i, one.out()) for i in range(len(one.op.inputs))])]


def early(one: Operation, firsts: Mapping[str, Any]) -> Any:
    """Return the value of a result before the first time step, where each row of the batch has its own.

    ``one`` has those of its inputs, without time of others; ``firsts`` are elements that operations keep: see `States`.

    Raises:
        CannotStreamError: it cannot be created.
    """
    out = one.out()
    if one.op.name in firsts:
        return tf.reshape(firsts[one.op.name], step_shape(out))
    is_longer = any(
        one.is_data(i) and (time := time_of(one.axes(i))) is not None and time.start > time_start(out)
        for i in range(len(one.op.inputs))
    )
    if not is_longer:
        return make(one)[0]
    if one.kind != "ConcatV2":
        padding = one.constant(2) if len(one.op.inputs) > 2 else tf.zeros((), one.op.outputs[0].dtype)
        like = next(one.data(i) for i in range(len(one.op.inputs)) if one.is_data(i))
        return tf.zeros([tf.shape(like)[0], *step_shape(out)[1:]], padding.dtype) + padding
    axis = int(one.array(len(one.op.inputs) - 1)) % len(out)
    if one.is_data(0):
        return tf.split(one.data(0), [1, int(one.data(0).shape[axis]) - 1], axis)[0]
    return tf.concat([tf.gather(one.filled(0, out), [0], axis=axis)], axis)


def _passed(one: Operation) -> list[Any]:
    return [one.data()]


def _all_passed(one: Operation) -> list[Any]:
    """Return the data; constants are read where they come from."""
    return [one.data(i) if one.is_data(i) else None for i in range(len(one.op.inputs))]


_BY_MAKER: dict[Maker, tuple[str, ...]] = {
    _reshaped: ("Reshape", "Squeeze", "ExpandDims"),
    _sliced: ("StridedSlice",),
    _part: ("Slice",),
    _padded: ("Pad", "PadV2"),
    _mirrored: ("MirrorPad",),
    _shifted: ("Roll",),
    _joined: ("ConcatV2",),
    _stacked: ("Pack",),
    _tiled: ("Tile", "BroadcastTo"),
    _looked_up: ("GatherV2",),
    _accumulated: ("Cumsum", "Cumprod"),
    _convolved: _DILATED,
    _pooled: ("AvgPool", "AvgPool3D", "MaxPool", "MaxPool3D"),
    _transposed_convolution: ("Conv2DBackpropInput", "Conv3DBackpropInputV2"),
    _summed: ("AddN",),
    _item_of_list: ("TensorListGetItem",),
    _listed: ("TensorListFromTensor",),
    _stacked_list: ("TensorListStack",),
    _passed: ("EnsureShape", "Identity"),
    _all_passed: ("IdentityN",),
}
_MAKERS = {kind: maker for maker, kinds in _BY_MAKER.items() for kind in kinds}
