"""Operations that move elements: reshape, transpose, slice, join, pad, tile, look up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.compile.causality.axes import (
    BATCH,
    TIME,
    Axes,
    Dim,
    LostAxisError,
    Pair,
    Time,
    dim_of,
    elements,
    is_plain,
    normal,
    placed,
    time_of,
)
from stepwell_server.compile.causality.call import Call, Memory, Rule, broadcast
from stepwell_server.compile.causality.constants import Origin, clamped, without_negative
from stepwell_server.compile.causality.refusals import Reason, Refusal
from stepwell_server.compile.causality.rules.copies import is_repeated, same
from stepwell_server.compile.causality.scans import CLAUSE
from stepwell_server.compile.causality.values import Array, Before, Const, Data, Items, equal

#: A slice that ends here has no end.
_MAX_PLACE = 2**31 - 1


def mixed(dim: Dim, clause: str) -> Refusal:
    """Return the refusal of an operation along a followed axis."""
    if time_of([dim]) is not None:
        return Refusal(Reason.TIME, f"{clause} the time axis")
    return Refusal(Reason.ROWS, f"{clause} the rows of the batch")


def require_plain(dim: Dim, clause: str) -> None:
    """Refuse an operation along the batch or time axis."""
    if not is_plain(dim):
        raise mixed(dim, clause)


def stream(dim: Dim) -> Time | None:
    """Return the time axis if a dimension is nothing else, and a time step brings one element."""
    return dim[0] if len(dim) == 1 and isinstance(dim[0], Time) and dim[0].per == 1 else None


def lengthened(call: Call, time: Time, before: int, after: int, i: int = 0) -> Time:
    """Return the time axis of an input after padding, or joining constants, at its ends.

    Elements at the end come after the current time step, and no step ever reaches them, unless the sequence ended
    earlier.
    """
    if after and time.start + time.extra < 0:
        raise Refusal(Reason.LENGTH, "pads the end of a sequence that lags behind")
    if before:
        call.remember(Memory.COUNT, max(time.start, 0), i, per=time.per)
    return Time(time.start - before, time.extra + before + after, time.per)


def axis_of(call: Call, i: int, rank: int) -> int:
    """Return the axis that a constant input names, counted from the front."""
    (axis,) = call.integers(i)
    return axis % rank


def _reshape(call: Call) -> Sequence[Axes]:
    axes, sizes = call.data(0).axes, call.out()
    try:
        return [call.scales.reshape(axes, sizes)]
    except LostAxisError:
        return [_grouped(call, axes, sizes)]


def _grouped(call: Call, axes: Axes, sizes: Sequence[Pair]) -> Axes:
    """Return the axes after a reshape that groups the elements of time steps, after they waited for their groups.

    Group ``g`` ends with the element ``size * (g + 1) - 1``, so it depends on no input after the time step ``(size * (g +
    1) - 1 + start) // per``. If ``size`` divides ``per``, this is that of the element ``g`` of a time axis that begins at
    ``start / size``, rounded up, and has ``per / size`` elements for each time step.

    Raises:
        LostAxisError: no such group fits.
    """
    time = time_of(axes)
    if time is None or time.per == 1:
        raise LostAxisError("a reshape cuts through the batch or the time axis")
    place = next(i for i, dim in enumerate(axes) if time_of([dim]))
    for size in range(time.per, 1, -1):
        if time.per % size or time.extra % size:
            continue
        start = -(-time.start // size)
        groups = Time(start, time.extra // size, time.per // size)
        try:
            found = call.scales.reshape((*axes[:place], (*dim_of(groups), size), *axes[place + 1 :]), sizes)
        except LostAxisError:
            continue
        call.remember(Memory.DELAY, start * size - time.start, per=time.per)
        return found
    raise LostAxisError("a reshape cuts through the elements of time steps")


def _expand_dims(call: Call) -> Sequence[Axes]:
    axes = list(call.data(0).axes)
    axes.insert(axis_of(call, 1, len(axes) + 1), ())
    return [tuple(axes)]


def _transpose(call: Call) -> Sequence[Axes]:
    axes = call.data(0).axes
    return [tuple(axes[i] for i in call.integers(1))]


def _strided_slice(call: Call) -> Sequence[Axes | Data]:
    """Python's ``x[...]``; the masks have one bit per entry of the specification."""
    data = call.data(0)
    begins, ends, strides = call.pairs(1), call.pairs(2), call.integers(3)
    masks = {
        name: call.attr(f"{name}_mask") for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    rest = list(data.axes)
    dims: list[Dim] = []
    is_last = False
    for i, stride in enumerate(strides):
        if masks["ellipsis"] >> i & 1:
            kept = len(rest) - sum(1 for j in range(i + 1, len(strides)) if not masks["new_axis"] >> j & 1)
            dims += rest[:kept]
            del rest[:kept]
        elif masks["new_axis"] >> i & 1:
            dims.append(())
        else:
            dim = rest.pop(0)
            begin = None if masks["begin"] >> i & 1 else begins[i]
            end = None if masks["end"] >> i & 1 else ends[i]
            if masks["shrink_axis"] >> i & 1:
                is_last |= _takes_one(call, dim, begins[i])
            else:
                part, last = _range(call, dim, begin, end, stride)
                is_last |= last
                dims.append(part)
    axes = (*dims, *rest)
    return [Data(_sized(call, axes), ends=True) if is_last else _sized(call, axes)]


def _takes_one(call: Call, dim: Dim, place: Pair) -> bool:
    """Check that one element of a dimension may be taken; return whether it is the last time step."""
    if is_plain(dim):
        call.require_same(place)
        return False
    if _is_last(call, dim, place):
        return True
    if _is_first(call, dim, place):
        return False
    raise mixed(dim, f"takes number {place.first} of")


def _is_first(call: Call, dim: Dim, place: Pair) -> bool:
    """Whether it is the place of the element that is known at the first time step, which a session then keeps.

    An earlier one waits until then.

    Raises:
        Refusal: it is a later one, which no session knows when it begins.
    """
    time = stream(dim)
    if time is None or not place.is_same or place.first < 0:
        return False
    ahead = place.first + time.start
    if ahead > 0:
        steps = f"{ahead} time step{'s'[: ahead > 1]}"
        raise Refusal(
            Reason.AHEAD, f"takes number {place.first} of the time axis at each step, {steps} ahead"
        )
    call.remember(Memory.DELAY, -ahead)
    call.remember(Memory.FIRST, 1)
    call.remember(Memory.COUNT, 1)
    return True


def _is_last(call: Call, dim: Dim, place: Pair) -> bool:
    """Whether it is the place of the last element, and that element belongs to the current time step or an earlier one."""
    time, steps = stream(dim), call.scales.size(dim)
    if time is None or place not in ((-1, -1), (steps.first - 1, steps.second - 1)):
        return False
    if time.extra < 0 or time.start + time.extra > 0:
        return False
    call.remember(Memory.DELAY, -time.start - time.extra)
    return True


def _range(call: Call, dim: Dim, begin: Pair | None, end: Pair | None, stride: int) -> tuple[Dim, bool]:
    """Return the remaining dimension, and whether it is only the last time step."""
    if is_plain(dim):
        call.require_same(*(place for place in (begin, end) if place is not None))
        return (0,), False  # Its size is in the result's shape.
    whole = call.scales.size(dim)
    if stride == 1 and begin in (None, (0, 0)) and end in (None, whole):
        return dim, False
    if stride == 1 and begin is not None and end in (None, whole) and _is_last(call, dim, begin):
        return (), True
    if stride < 0:
        raise mixed(dim, "reverses")
    time, first = elements(dim), begin or Pair(0, 0)
    if stride == 1 and end == (first.first + 1, first.second + 1) and _is_first(call, dim, first):
        return (), False
    if time is not None:
        _refuse_numbered(time, begin, end)
        skipped = _counted(first, whole)
        stop = _counted(end or whole, whole)
        cut = Pair(whole.first - stop.first, whole.second - stop.second)
        if skipped.is_same and cut.is_same:
            call.notes.looks = "takes a part of the time axis"
            shorter = time.extra - skipped.first - cut.first
            left = Time(time.start + skipped.first, shorter, time.per)
            return dim_of(left if stride == 1 else _every(left, stride)), False
    raise mixed(dim, "takes a part of")


def _every(time: Time, stride: int) -> Time:
    """Return the time axis of every ``stride``-th element, from the first on: a window of one element, as in `slid`."""
    if time.per % stride:
        each = "one element" if time.per == 1 else f"{time.per} elements"
        raise Refusal(
            Reason.RATE,
            f"takes one of every {stride} elements of the time axis, but a time step brings {each}",
        )
    return Time(time.start // stride, (time.extra - 1) // stride + 1, time.per // stride)


def _refuse_numbered(time: Time, begin: Pair | None, end: Pair | None) -> None:
    """Refuse the first or the last so many elements. Both traces may be shorter than that, but not every sequence."""
    if begin is not None and begin.is_same and begin.first < 0:
        raise Refusal(Reason.TIME, f"takes the last {-begin.first} elements of the time axis")
    if end is None or not end.is_same or not 0 <= end.first < _MAX_PLACE:
        return
    if begin in (None, (0, 0)) and end.first + time.start > time.per:
        clause = f"takes the first {end.first} elements of the time axis, of which the first step brings {time.per}"
        raise Refusal(Reason.BEGINNING, clause)
    raise Refusal(Reason.TIME, f"takes a part of the time axis that ends at element {end.first}")


def _counted(place: Pair, whole: Pair) -> Pair:
    """Return a bound of a slice, counted from the front, and within the dimension."""
    return Pair(
        *(min(max(at + size if at < 0 else at, 0), size) for at, size in zip(place, whole, strict=True))
    )


def _sized(call: Call, axes: Axes) -> Axes:
    """Take the sizes of plain dimensions from the result's shape."""
    sizes = call.out()
    if len(sizes) != len(axes):
        raise LostAxisError(f"{call.kind} gives another number of dimensions")
    return tuple(call.plain(size) if is_plain(dim) else dim for dim, size in zip(axes, sizes, strict=True))


def _slice(call: Call) -> Sequence[Axes | Data]:
    data = call.data(0)
    dims: list[Dim] = []
    is_last = False
    for dim, begin, size in zip(data.axes, call.pairs(1), call.pairs(2), strict=True):
        if is_plain(dim):
            call.require_same(begin, size)
        end = None if size == (-1, -1) else Pair(begin.first + size.first, begin.second + size.second)
        part, last = _range(call, dim, begin, end, 1)
        dims.append(part)
        is_last |= last
    axes = _sized(call, tuple(dims))
    return [Data(axes, ends=True) if is_last else axes]


def _concat(call: Call) -> Sequence[Axes | Data]:
    """Join along one axis; the other axes of all inputs are equal."""
    count = len(call.inputs) - 1
    rank = call.rank(0)
    axis = axis_of(call, count, rank)
    data = next(value.axes for value in call.inputs[:count] if isinstance(value, Data))
    parts = [_joint(call, i, data, axis) for i in range(count)]
    held = _held_in_front(call, [part[axis] for part in parts], axis)
    joined = _joined(call, [part[axis] for part in parts]) if held is None else held
    dims: list[Dim] = [()] * rank
    for part in parts:
        for i, dim in enumerate(part):
            if i != axis and dim != dims[i]:
                if dims[i] and part is not parts[0]:
                    raise LostAxisError("two values that are joined have their axes in different orders")
                dims[i] = dim
    axes = _sized(call, tuple(joined if i == axis else dim for i, dim in enumerate(dims)))
    return [axes if held is None else Data(axes, before=Before.ROW)]


def _held_in_front(call: Call, parts: Sequence[Dim], axis: int) -> Dim | None:
    """Return the time axis behind copies of one value of each row, such as the first one of the sequence, or None."""
    *front, last = parts
    time = stream(last)
    if not call.holds or time is None or time.start or not all(map(is_plain, front)):
        return None
    values, tensors = call.inputs[: len(front)], call.first.inputs[: len(front)]
    if any(not isinstance(value, Data) or value.ends for value in values):
        return None
    if not all(same(tensor, tensors[0]) and is_repeated(tensor, axis) for tensor in tensors):
        return None
    count = sum(call.scales.size(dim).first for dim in front)
    return dim_of(Time(-count, time.extra + count))


def _joint(call: Call, i: int, data: Axes, axis: int) -> Axes:
    """Return the axes of a part: a constant that does not change over time follows data, wherever that begins."""
    value = call.inputs[i]
    if isinstance(value, Data):
        return value.axes
    dims = zip(value.shape(), data, strict=True)
    own = [
        dim if place != axis and call.scales.size(dim) == size else call.scales.factors(size)
        for place, (size, dim) in enumerate(dims)
    ]
    return call.even(value, tuple(own))


def _joined(call: Call, parts: Sequence[Dim]) -> Dim:
    """Return the dimension along which parts are joined: constants may lengthen the time axis."""
    timed = [i for i, dim in enumerate(parts) if not is_plain(dim)]
    if not timed:
        return (0,)  # Its size is in the result's shape.
    (place, *others), time = timed, elements(parts[timed[0]])
    data = [i for i, value in enumerate(call.inputs[:-1]) if isinstance(value, Data) and i != place]
    first = place == 1 and data == [0] and call.scales.size(parts[0]) == (1, 1)
    if others or time is None or (data and not (first and time.per == 1)):
        raise mixed(parts[place], "joins values along")
    if first:  # It is known from the first time step on, and so is what follows it.
        call.remember(Memory.DELAY, 1 - min(time.start, 1), place)
        time = Time(max(time.start, 1), time.extra)
    elif time.start > 0:
        _require_one_padding(call, parts[:place])
    counts = [call.scales.size(dim).first for dim in parts]
    return dim_of(lengthened(call, time, sum(counts[:place]), sum(counts[place + 1 :]), place))


def _require_one_padding(call: Call, parts: Sequence[Dim]) -> None:
    """Refuse different constants in front of a sequence: they stand in for its first values, like padding."""
    axis = axis_of(call, len(call.inputs) - 1, call.rank(0))
    constants = [value for value in call.inputs[: len(parts)] if isinstance(value, Const)]
    for value in constants:
        array = value.array
        first = np.take(constants[0].array, [0], axis)
        if not equal(array, np.broadcast_to(first, array.shape)):
            raise mixed((TIME,), "joins different values in front of")


def _pack(call: Call) -> Sequence[Axes]:
    dims = list(broadcast(call, range(len(call.inputs))))
    dims.insert(call.attr("axis") % (len(dims) + 1), (len(call.inputs),))
    return [tuple(normal(dim) for dim in dims)]


def _unpack(call: Call) -> Sequence[Axes]:
    axes = list(call.data(0).axes)
    dim = axes.pop(call.attr("axis") % len(axes))
    require_plain(dim, "takes apart")
    return [tuple(axes)] * len(call.first.outputs)


def _split(call: Call) -> Sequence[Axes]:
    place = {"Split": 1, "SplitV": 0}[call.kind]
    axes = call.data(place).axes
    axis = axis_of(call, {"Split": 0, "SplitV": 2}[call.kind], len(axes))
    require_plain(axes[axis], "splits")
    return [
        tuple(call.plain(call.out(i)[axis]) if j == axis else dim for j, dim in enumerate(axes))
        for i in range(len(call.first.outputs))
    ]


def _tile(call: Call) -> Sequence[Axes]:
    dims = [
        normal((*call.scales.factors(times), *dim))
        for dim, times in zip(call.data(0).axes, call.pairs(1), strict=True)
    ]
    return [tuple(dims)]


def _broadcast_to(call: Call) -> Sequence[Axes]:
    axes, sizes = call.data(0).axes, call.out()
    axes = ((),) * (len(sizes) - len(axes)) + axes
    return [tuple(dim or call.scales.factors(size) for dim, size in zip(axes, sizes, strict=True))]


def _pad(call: Call) -> Sequence[Axes | Data]:
    axes, paddings = call.data(0).axes, call.pairs(1)
    held = None
    for i, dim in enumerate(axes):
        before, after = paddings[2 * i : 2 * i + 2]
        if (before, after) != ((0, 0), (0, 0)):
            time = elements(dim)
            is_mirrored = call.kind == "MirrorPad"
            if is_mirrored and call.holds and stream(dim) == Time(0, 0 if time is None else time.extra):
                held = _mirrored(call, dim, before, after)
                axes = (*axes[:i], held, *axes[i + 1 :])
            elif time is None or is_mirrored:
                require_plain(dim, "pads")
            else:
                call.require_same(before, after)
                axes = placed(axes, i, lengthened(call, time, before.first, after.first))
    for i in range(2, len(call.inputs)):
        broadcast(call, [i])
    axes = _sized(call, axes)
    return [axes if held is None else Data(axes, before=Before.ROW)]


def _mirrored(call: Call, dim: Dim, before: Pair, after: Pair) -> Dim:
    """Return the time axis behind one copy of its first element: more copies would be of later ones."""
    if (before, after) != ((1, 1), (0, 0)) or call.attr("mode") != b"SYMMETRIC":
        raise mixed(dim, "pads with later elements of")
    call.remember(Memory.FIRST, 1)
    call.remember(Memory.COUNT, 1)
    (time,) = dim
    assert isinstance(time, Time)
    return dim_of(Time(-1, time.extra + 1))


def _along_axis(call: Call) -> Sequence[Axes | Data]:
    """Cumulative sums, reversals and rolls. Along the time axis only sums and products, which grow step by step."""
    axes = call.data(0).axes
    if call.kind == "Roll" and len(call.integers(2)) == len(call.pairs(1)) == 1:
        place, (steps,) = axis_of(call, 2, len(axes)), call.pairs(1)
        time = stream(axes[place])
        if time is not None and steps.is_same and steps.first > 0 >= time.start:
            later = dim_of(Time(time.start - steps.first, time.extra))
            return [Data((*axes[:place], later, *axes[place + 1 :]), before=Before.UNKNOWN)]
    if call.kind in {"Cumsum", "Cumprod"} and not call.attr("reverse"):
        (axis,) = call.integers(1)
        time = elements(axes[axis % len(axes)])
        if time is not None:
            call.remember(Memory.COUNT, max(time.start, 0), per=time.per)
            call.remember(Memory.TOTAL, 1, per=time.per)
            return [axes]
    place = {"Roll": 2}.get(call.kind, 1)
    what = {"ReverseV2": "reverses", "Roll": "shifts"}.get(call.kind, "accumulates along")
    for axis in call.integers(place):
        require_plain(axes[axis % len(axes)], what)
    if call.kind == "Roll":
        call.integers(1)
    return [axes]


def _gather(call: Call) -> Sequence[Axes | Data]:
    """Look up along an axis of a table; the first ``batch_dims`` axes are shared."""
    shared = call.attr("batch_dims")
    places = call.inputs[1]
    table = call.axes(0)
    axis = axis_of(call, 2, len(table))
    if isinstance(places, Const):
        if not is_plain(table[axis]):
            return _gather_time(call, table, axis, places)
        if not places.is_same:
            raise Refusal(Reason.LENGTH, "looks up by the number of time steps (GatherV2)")
    require_plain(table[axis], "looks up by values along")
    indices = call.axes(1)
    if indices[:shared] != table[:shared]:
        raise LostAxisError("a look-up has its axes in different orders")
    return [(*table[:axis], *indices[shared:], *table[axis + 1 :])]


def _gather_time(call: Call, table: Axes, axis: int, places: Const) -> Sequence[Axes | Data]:
    is_one = all(size.is_same for size in places.shape())
    found = places.pairs() if is_one else []
    kept = tuple(call.scales.factors(size) for size in places.shape()) if is_one else ()
    axes = (*table[:axis], *kept, *table[axis + 1 :])
    if len(found) == 1 and _is_last(call, table[axis], found[0]):
        return [Data(axes, ends=True)]
    if len(found) == 1 and _is_first(call, table[axis], found[0]):
        return [axes]
    if not is_one and (framed := _framed(call, table, axis, places)) is not None:
        return [framed]
    raise mixed(table[axis], "takes elements by their number along")


def _places(places: Const, *, holds: bool) -> Sequence[Array] | None:
    """Return values that determine all places of frames, or None: there are none.

    Those of the first trace determine polynomials, also if numbers below a fixed one become that: `_clamped`. If they are
    below 0, they are no places of frames.
    """
    places = Const(*without_negative(places.first, places.second), places.evaluators)
    if places.origin is Origin.POLYNOMIAL:
        return [places.array]
    limited = clamped(places.first, places.second) if holds else None
    if limited is not None:
        value, number = (Const(*pair, places.evaluators) for pair in limited)
        if value.origin is Origin.POLYNOMIAL and number.is_same:
            return [places.array]
    return None if places.origin.counts else places.arrays()


def _clamped(
    call: Call, table: Axes, axis: int, count: Pair, arrays: Sequence[npt.NDArray[np.int64]]
) -> Data | None:
    """Return the axes after a look-up of frames that begin with copies of the first element: numbers below 0 become 0."""
    time, sizes = stream(table[axis]), arrays[0].shape[1:]
    offsets = arrays[0][-1] - (len(arrays[0]) - 1)
    before = -int(offsets.min())
    if time is None or time.start or before <= 0 or before >= len(arrays[0]):
        return None
    for array in arrays:
        numbers = np.arange(len(array)).reshape(-1, *[1] * (array.ndim - 1))
        if not equal(array, np.maximum(numbers + offsets, 0)):
            return None
    extra = Pair(*(size - scale.steps for size, scale in zip(count, call.scales.both, strict=True)))
    if not extra.is_same:
        return None
    reach = int(offsets.max() - offsets.min())
    call.notes.looks = "takes frames of the time axis"
    call.remember(Memory.WINDOW, reach)
    call.remember(Memory.SINCE, reach)
    call.remember(Memory.FIRST, 1)
    call.remember(Memory.COUNT, 1)
    frames = dim_of(Time(reach - before, extra.first))
    axes = (*table[:axis], frames, *(normal((size,)) for size in sizes), *table[axis + 1 :])
    return Data(axes, before=Before.ROW if reach < before else Before.CONSTANT)


def _framed(call: Call, table: Axes, axis: int, places: Const) -> Axes | Data | None:
    """Return the axes after a look-up of frames: element ``i`` of the result has the elements ``i * stride + offset``.

    The offsets are the same for all ``i``, in both traces, like the values of other constants. So it is a window that ends
    with the largest offset: see `slid`.
    """
    time, sizes = elements(table[axis]), places.shape()
    if time is None or not sizes or not all(size.is_same for size in sizes[1:]):
        return None
    values = _places(places, holds=call.holds)
    if values is None:
        return None
    arrays = [np.asarray(array, np.int64) for array in values]
    if min(map(len, arrays)) < 2 or not all(array.size for array in arrays):
        return None
    if call.holds and (held := _clamped(call, table, axis, sizes[0], arrays)) is not None:
        return held
    offsets, stride = arrays[0][:1], int(np.ravel(arrays[0][1] - arrays[0][0])[0])
    for array in arrays:
        numbers = np.arange(len(array)).reshape(-1, *[1] * (array.ndim - 1))
        if stride < 1 or array.min() < 0 or not equal(array, numbers * stride + offsets):
            return None
    first, reach = int(offsets.min()), int(offsets.max() - offsets.min())
    later = Time(time.start + first, time.extra - first, time.per)
    found = slid(call, later, reach, 0, 0, "takes frames of the time axis", stride)
    extra = Pair(
        *(size - scale.steps * found.per for size, scale in zip(sizes[0], call.scales.both, strict=True))
    )
    if not extra.is_same:
        return None
    frames = dim_of(Time(found.start, extra.first, found.per))
    return (*table[:axis], frames, *(normal((size.first,)) for size in sizes[1:]), *table[axis + 1 :])


def slid(call: Call, time: Time, reach: int, before: int, after: int, clause: str, stride: int = 1) -> Time:
    """Return the time axis after a window of ``reach`` elements and the next one, which moves by ``stride``.

    Window ``j`` ends with the element ``j * stride + reach``, so it depends on no input after the time step ``(j * stride
    + reach + start) // per``. If ``stride`` divides ``per``, this is ``(j + (reach + start) // stride) // (per / stride)``.
    A time step then ends ``per / stride`` windows, the first of which begins ``reach - (reach + start) % stride`` elements
    before those that the time step brings.
    """
    call.notes.looks = clause
    if time.per % stride:
        each = "one element" if time.per == 1 else f"{time.per} elements"
        raise Refusal(Reason.RATE, f"{clause} and moves by {stride}, but a time step brings {each}")
    padded = lengthened(call, time, before, after)
    start, skipped = divmod(padded.start + reach, stride)
    if reach < skipped:
        raise Refusal(Reason.UNPROVEN, f"{clause} and leaves out some at the beginning of time steps")
    call.remember(Memory.WINDOW, reach - skipped, padding=before, per=time.per)
    return Time(start, (padded.extra - reach - 1) // stride + 1, time.per // stride)


def _one_hot(call: Call) -> Sequence[Axes]:
    axes = list(call.data(0).axes)
    (depth,) = call.integers(1)
    broadcast(call, [2, 3])
    axis = call.attr("axis")
    axes.insert(axis if axis >= 0 else len(axes), normal((depth,)))
    return [tuple(axes)]


def _to_batch(call: Call) -> Sequence[Axes]:
    """SpaceToBatchND, a part of dilated convolutions: blocks of plain axes become the outermost rows."""
    axes, blocks, paddings = call.data(0).axes, call.integers(1), call.pairs(2)
    for i, block in enumerate(blocks):
        if block != 1 or paddings[2 * i : 2 * i + 2] != [(0, 0)] * 2:
            require_plain(axes[i + 1], "has a window with gaps over")
    return [_sized(call, (normal((*blocks, *axes[0])), *axes[1:]))]


def _to_space(call: Call) -> Sequence[Axes]:
    axes, blocks = call.data(0).axes, call.integers(1)
    rows: list[int | object] = list(axes[0])
    for block in blocks:
        if block == 1:
            continue
        if not rows or not isinstance(rows[0], int) or rows[0] % block:
            raise LostAxisError("rows are put back into space in another order")
        rows[0] //= block
        rows = list(normal(rows))  # type: ignore[arg-type]
    for i, block in enumerate(blocks):
        if block != 1 or call.pairs(2)[2 * i : 2 * i + 2] != [(0, 0)] * 2:
            require_plain(axes[i + 1], "has a window with gaps over")
    first: Dim = normal(rows)  # type: ignore[arg-type]
    if BATCH not in first:
        raise LostAxisError("rows are put back into space")
    return [_sized(call, (first, *axes[1:]))]


def _items(call: Call, i: int) -> Items:
    value = call.inputs[i]
    if isinstance(value, Items) and not value.is_empty:
        return value
    raise LostAxisError("a list of constants and of data")


def _apart(call: Call) -> Sequence[Data]:
    """Split a tensor along its first axis into a list."""
    first, *rest = call.data(0).axes
    time = stream(first)
    if time is None or time.start > 0 or time.extra:
        require_plain(first, CLAUSE)
        return [Items(tuple(rest), call.data(0).ends)]
    call.remember(Memory.DELAY, -time.start)
    return [Items(tuple(rest), over_time=True)]


def _item(call: Call) -> Sequence[Data]:
    (place,) = call.pairs(1)
    items = _items(call, 0)
    if items.over_time and not _is_first(call, (TIME,), place):
        raise mixed((TIME,), "takes elements by their number along")
    call.require_same(place)
    return [Data(items.axes, items.ends)]


def _with_item(call: Call) -> Sequence[Data]:
    """Put one item into a list; all its items then have the same axes."""
    call.integers(1)
    items, item = call.data(0), call.inputs[2]
    if not isinstance(items, Items) or items.over_time:
        raise LostAxisError("a list of constants and of data")
    if items.is_empty:
        axes = call.axes(2)
    else:
        axes = item.axes if isinstance(item, Data) else call.even(item, items.axes)
        if axes != items.axes:
            raise LostAxisError("two items of a list have their axes in different orders")
    return [Items(axes, items.ends or (isinstance(item, Data) and item.ends))]


def _together(call: Call) -> Sequence[Axes]:
    items = _items(call, 0)
    return [((TIME,) if items.over_time else call.plain(call.out()[0]), *items.axes)]


RULES: dict[str, Rule] = {
    "TensorListFromTensor": _apart,
    "TensorListGetItem": _item,
    "TensorListSetItem": _with_item,
    "TensorListStack": _together,
    "Reshape": _reshape,
    "Squeeze": _reshape,
    "ExpandDims": _expand_dims,
    "Transpose": _transpose,
    "StridedSlice": _strided_slice,
    "Slice": _slice,
    "ConcatV2": _concat,
    "Pack": _pack,
    "Unpack": _unpack,
    "Split": _split,
    "SplitV": _split,
    "Tile": _tile,
    "BroadcastTo": _broadcast_to,
    "Pad": _pad,
    "PadV2": _pad,
    "MirrorPad": _pad,
    "Cumsum": _along_axis,
    "Cumprod": _along_axis,
    "CumulativeLogsumexp": _along_axis,
    "ReverseV2": _along_axis,
    "Roll": _along_axis,
    "GatherV2": _gather,
    "OneHot": _one_hot,
    "SpaceToBatchND": _to_batch,
    "BatchToSpaceND": _to_space,
}
