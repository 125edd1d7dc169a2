"""Operators that move, cut and join axes, and those that compute sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from stepwell_server.compile.onnx.rows.values import (
    ROWS,
    LostError,
    Node,
    Size,
    Sizes,
    Value,
    normalized,
    placed,
)


def _rows(node: Node, place: int = 0) -> int:
    axis = node.needed(place).axis
    if axis is None:
        raise LostError(f"its input {place} has no rows, another one has")
    return axis


def transpose(node: Node) -> list[Value]:
    """Rows are where their axis goes."""
    axis, rank = _rows(node), node.needed(0).rank
    order = node.attribute("perm") or list(range(rank))[::-1]
    return placed(list(order).index(axis))


def squeeze(node: Node) -> list[Value]:
    """Removes axes of one element: never that of the rows, which there may be any number of."""
    axis, rank = _rows(node), node.needed(0).rank
    axes = node.axes(rank)
    if axes is None:
        raise LostError("it removes all axes of one element, also that of a single row")
    if axis in axes:
        raise LostError("it removes the axis of the rows")
    return placed(axis - sum(each < axis for each in axes))


def unsqueeze(node: Node) -> list[Value]:
    """Adds axes; they are counted in the result."""
    axis, rank = _rows(node), node.needed(0).rank
    given = node.attribute("axes")
    found = [int(each) for each in given] if given is not None else node.needed(1).integers
    whole = rank + len(found)
    new = {normalized(each, whole) for each in found}
    left = [place for place in range(whole) if place not in new]
    return placed(left[axis])


def concat(node: Node) -> list[Value]:
    """Joins along another axis than the rows. What has no rows must not be joined: its number of rows is fixed."""
    rank, axis = node.needed(0).rank, _rows(node)
    joined = normalized(node.attribute("axis"), rank)
    if any(value is None or value.axis != axis for value in node.values):
        raise LostError("it joins tensors whose rows are on different axes, or that have none")
    if joined == axis:
        raise LostError("it joins along the axis of the rows")
    return placed(axis)


def split(node: Node) -> list[Value]:
    """Splits another axis than the rows."""
    axis, rank = _rows(node), node.needed(0).rank
    node.shared(1)
    if normalized(node.attribute("axis", 0), rank) == axis:
        raise LostError("it splits the axis of the rows")
    return [Value(axis=axis) for _ in node.proto.output]


def slices(node: Node) -> list[Value]:
    """Cuts other axes than the rows, or takes all rows."""
    axis, rank = _rows(node), node.needed(0).rank
    node.shared(1, 2, 3, 4)
    given = node.value(3)
    starts = node.attribute("starts") if node.opset < 10 else node.needed(1).integers
    named = node.attribute("axes") if node.opset < 10 else None if given is None else given.integers
    axes = list(range(len(starts))) if named is None else [normalized(each, rank) for each in named]
    if axis in axes:
        place = axes.index(axis)
        ends = node.attribute("ends") if node.opset < 10 else node.needed(2).integers
        steps = None if node.opset < 10 or node.value(4) is None else node.needed(4).integers
        takes_all = starts[place] == 0 and ends[place] >= np.iinfo(np.int32).max
        if not takes_all or (steps is not None and steps[place] != 1):
            raise LostError("it cuts the axis of the rows")
    return placed(axis)


def gather(node: Node) -> list[Value]:
    """Picks along another axis, by shared indices; or each row picks from what is shared, as an embedding does."""
    data, indices = node.needed(0), node.needed(1)
    picked = normalized(node.attribute("axis", 0), data.rank)
    if data.axis is None:
        assert indices.axis is not None
        return placed(picked + indices.axis)
    if indices.axis is not None:
        raise LostError("a row picks from the others")
    if picked == data.axis:
        raise LostError("it picks single rows")
    return placed(data.axis if data.axis < picked else data.axis - 1 + indices.rank)


def gather_elements(node: Node) -> list[Value]:
    """Each row picks from itself, along another axis."""
    data, indices = node.needed(0), node.needed(1)
    picked = normalized(node.attribute("axis", 0), data.rank)
    if data.axis is None or data.axis != indices.axis or picked == data.axis:
        raise LostError("a row picks from the others")
    return placed(data.axis)


def pad(node: Node) -> list[Value]:
    """Pads other axes than the rows."""
    axis, rank = _rows(node), node.needed(0).rank
    node.shared(1, 2, 3)
    pads = node.attribute("pads") or node.needed(1).integers
    given = node.value(3)
    axes = list(range(rank)) if given is None else [normalized(each, rank) for each in given.integers]
    half = len(pads) // 2
    if axis in axes and (pads[axes.index(axis)] or pads[half + axes.index(axis)]):
        raise LostError("it pads the axis of the rows")
    return placed(axis)


def tile(node: Node) -> list[Value]:
    """Repeats along other axes than the rows."""
    axis = _rows(node)
    node.shared(1)
    if node.needed(1).integers[axis] != 1:
        raise LostError("it repeats rows")
    return placed(axis)


def flatten(node: Node) -> list[Value]:
    """Joins axes before and from one on: rows must be alone on their side."""
    value = node.needed(0)
    axis, rank = _rows(node), value.rank
    middle = node.attribute("axis", 1)
    middle = middle + rank if middle < 0 else middle
    assert value.sizes is not None
    before, after = value.sizes[:middle], value.sizes[middle:]
    side = before if axis < middle else after
    if any(size is not ROWS and size != 1 for size in side):
        raise LostError("it joins the axis of the rows with another one")
    return placed(0 if axis < middle else 1)


def reshape(node: Node) -> list[Value]:
    """Rows keep an axis of their own: as many elements lie before it, and after it, as did before."""
    value, target = node.needed(0), node.needed(1)
    axis = _rows(node)
    if value.sizes is None or target.content is None:
        raise LostError("its sizes are not known before it runs")
    keeps_zero = bool(node.attribute("allowzero", 0))
    wanted = _listed(target.content)
    sizes: list[Size] = [
        value.sizes[place] if not keeps_zero and size == 0 and place < len(value.sizes) else size
        for place, size in enumerate(wanted)
    ]
    before, after = _product(value.sizes[:axis]), _product(value.sizes[axis + 1 :])
    for place, size in enumerate(sizes):
        if size is not ROWS and size != -1:
            continue
        left, right = sizes[:place], sizes[place + 1 :]
        if ROWS in left or ROWS in right:
            continue
        # One of the others may be -1: then it is what remains of the elements of a row.
        if _fits(left, before) and _fits(right, after) and (left + right).count(-1) <= 1:
            found = [*_filled(left, before), ROWS, *_filled(right, after)]
            return [Value(axis=place, sizes=tuple(found))]
    raise LostError("it joins or splits the axis of the rows")


def _listed(content: np.ndarray[Any, Any]) -> list[Any]:
    """The sizes in a tensor, of which one may be the number of rows."""
    return [item if item is ROWS else int(item) for item in content.reshape(-1)]


def _product(sizes: Sequence[Size]) -> int:
    result = 1
    for size in sizes:
        if not isinstance(size, int) or size < 0:
            raise LostError("its sizes are not known before it runs")
        result *= size
    return result


def _fits(sizes: Sequence[Size], whole: int) -> bool:
    known = [size for size in sizes if size != -1]
    if not all(isinstance(size, int) and size > 0 for size in known):
        return False
    product = _product(known)
    return whole % product == 0 if -1 in sizes else whole == product


def _filled(sizes: Sequence[Size], whole: int) -> list[Size]:
    product = _product([size for size in sizes if size != -1])
    return [whole // product if size == -1 else size for size in sizes]


def expand(node: Node) -> list[Value]:
    """Repeats along axes of one element; a shared tensor that is repeated for each row has rows."""
    value, target = node.needed(0), node.needed(1)
    if target.content is None:
        raise LostError("its sizes are not known before it runs")
    sizes = _listed(target.content)
    rank = max(value.rank, len(sizes))
    padded_target: list[Any] = [1] * (rank - len(sizes)) + sizes
    padded_sizes: list[Size] = [*[1] * (rank - value.rank), *(value.sizes or ())]
    found: list[Size] = [
        old if new == 1 or new == old else new if old == 1 else None
        for old, new in zip(padded_sizes, padded_target, strict=True)
    ]
    places = [place for place, size in enumerate(found) if size is ROWS]
    if (
        len(places) != 1
        or None in found
        or (value.axis is not None and value.axis + rank - value.rank != places[0])
    ):
        raise LostError("it repeats rows, or for each row something of another size")
    return [Value(axis=places[0], sizes=tuple(found))]


def constant_of_shape(node: Node) -> list[Value]:
    """A tensor of equal elements with an axis of rows: a row of it is the same for all."""
    content = node.needed(0).content
    sizes = () if content is None else tuple(_listed(content))
    places = [place for place, size in enumerate(sizes) if size is ROWS]
    if len(places) != 1:
        raise LostError("the number of rows decides its shape in an unknown way")
    return [Value(axis=places[0], sizes=sizes)]


# --------------------------------------------------------------------------------------------------------------- sizes


def shape(node: Node) -> list[Value]:
    """The sizes of a tensor, of which one may be the number of rows."""
    value = node.needed(0)
    rank = value.rank
    first, last = node.attribute("start", 0), node.attribute("end", rank)
    sizes: Sizes = (value.sizes or ())[slice(first, last)]
    if any(size is None for size in sizes):
        return [Value(sizes=(len(sizes),), is_sized=True)]
    return [_sized(np.array(sizes, dtype=object if ROWS in sizes else np.int64).reshape(len(sizes)))]


def size(node: Node) -> list[Value]:
    """The number of elements of a tensor."""
    sizes = node.needed(0).sizes
    if sizes is None or any(each is ROWS or each is None for each in sizes):
        return [Value(sizes=(), is_sized=True, dtype=onnx.TensorProto.INT64)]
    return [_sized(np.array(_product(sizes)))]


def _sized(content: np.ndarray[Any, Any]) -> Value:
    """A value with these elements, which depends on the number of rows if they include that."""
    if content.dtype == object and not any(item is ROWS for item in content.reshape(-1)):
        content = content.astype(np.int64)
    return Value(
        sizes=content.shape, content=content, is_sized=content.dtype == object, dtype=onnx.TensorProto.INT64
    )


def size_arithmetic(node: Node) -> list[Value] | None:
    """Compute operators that only move elements on sizes that include the number of rows; None: not possible."""
    values = [value for value in node.values if value is not None]
    first = values[0].content
    if first is None or any(value.content is None for value in values):
        return None
    match node.kind:
        case "Identity" | "Cast":
            return [_sized(first)]
        case "Gather":
            indices = values[1].content
            assert indices is not None
            return [
                _sized(
                    np.asarray(np.take(first, indices.astype(np.int64), node.attribute("axis", 0)), object)
                )
            ]
        case "Concat":
            parts = [np.asarray(value.content, object) for value in values]
            return [_sized(np.concatenate(parts, node.attribute("axis")))]
        case "Unsqueeze" | "Squeeze" | "Reshape":
            return [_sized(_reshaped(node, first))]
        case "Slice" if first.ndim == 1 and node.opset >= 10:
            starts, ends = values[1].integers, values[2].integers
            step = values[4].integers[0] if len(values) > 4 else 1
            return [_sized(first[starts[0] : ends[0] : step])]
    return None


def _reshaped(node: Node, content: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if node.kind == "Reshape":
        return content.reshape(node.needed(1).integers)
    if node.kind == "Squeeze":
        axes = node.axes(content.ndim)
        return content.squeeze() if axes is None else content.squeeze(tuple(axes))
    given = node.attribute("axes")
    found = [int(each) for each in given] if given is not None else node.needed(1).integers
    return np.expand_dims(content, tuple(found))
