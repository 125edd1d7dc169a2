"""Whether tensors are copies of each other, by how they are computed."""

from __future__ import annotations

from typing import Any

import numpy as np

from stepwell_server.compile.causality.constants import BROADCAST, UNARY
from stepwell_server.compile.causality.values import attributes, equal
from stepwell_server.compile.graph.tensorflow_setup import tf

_KEEPING = {"Const", "Placeholder", "ReadVariableOp", "Identity"}


def same(one: Any, two: Any) -> bool:
    """Whether two tensors of a graph are computed in the same way from the same inputs."""
    if one is two:
        return True
    if one.op.type != two.op.type or len(one.op.inputs) != len(two.op.inputs) or one.shape != two.shape:
        return False
    if one.op.type == "Const":
        return equal(_value(one), _value(two))
    if not one.op.inputs or one.op.op_def.is_stateful or attributes(one.op) != attributes(two.op):
        return False
    return one.value_index == two.value_index and all(map(same, one.op.inputs, two.op.inputs))


def is_repeated(tensor: Any, axis: int) -> bool:
    """Whether all elements of a tensor along an axis are the same."""
    if tensor.shape[axis] == 1:
        return True
    op = tensor.op
    if op.type == "Const":
        value = _value(tensor)
        return equal(value, np.broadcast_to(np.take(value, [0], axis), value.shape))
    if op.type in ("Tile", "BroadcastTo") or op.type in UNARY:
        return _is_input_repeated(op.inputs[0], tensor, axis)
    if op.type in BROADCAST:
        return all(_is_input_repeated(value, tensor, axis) for value in op.inputs)
    if op.type == "ConcatV2":
        parts = op.inputs[:-1]
        is_along = int(_value(op.inputs[-1])) % len(tensor.shape) == axis
        alike = not is_along or all(same(part, parts[0]) for part in parts)
        return alike and all(is_repeated(part, axis) for part in parts)
    if op.type == "Reshape":  # `repeat` puts copies on an axis of their own.
        return _is_merged(op.inputs[0], tensor, axis)
    return False


def _is_input_repeated(value: Any, tensor: Any, axis: int) -> bool:
    """Whether an input is repeated along the axis of a result with which it is aligned."""
    place = axis - len(tensor.shape) + len(value.shape)
    return place < 0 or is_repeated(value, place)


def _is_merged(value: Any, tensor: Any, axis: int) -> bool:
    """Whether a reshape merges an axis of copies with one of one element, or leaves the axis as it is."""
    before, after = value.shape.as_list(), tensor.shape.as_list()
    places = [i for i, size in enumerate(before) if size != 1]
    kept = [i for i, size in enumerate(after) if size != 1]
    if [before[i] for i in places] != [after[i] for i in kept]:
        return False
    return is_repeated(value, places[kept.index(axis)])


def _value(tensor: Any) -> Any:
    return tf.make_ndarray(tensor.op.get_attr("value"))
