"""Constants that the number of the time step determines, at one time step."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from stepwell_server.compile.causality.axes import BATCH, Axes, Dim, elements, normal, time_of
from stepwell_server.compile.causality.call import Memory, Need
from stepwell_server.compile.causality.numbers import MAX_NUMBER, Numbered
from stepwell_server.compile.causality.values import Const, Data, needed_by
from stepwell_server.compile.graph.tensorflow_setup import tf
from stepwell_server.compile.streaming.operation import Operation, States
from stepwell_server.compile.streaming.operations import make
from stepwell_server.compile.streaming.replay import Constants, plain_sizes


def counted(op: Any, needs: tuple[Need, ...], states: States) -> Any:
    """Return the number of this time step for an operation, ``(rows,)``, which it counts up."""
    need = next(need for need in needs if need.kind is Memory.COUNT)
    before = states.before(op.name, need, tf.int32)
    states.after[op.name, need] = tf.minimum(before, need.rows - 1) + 1
    return before


def constant_of(
    numbered: Numbered,
    tensor: Any,
    number: Any,
    out: Axes,
    values: Mapping[str, Data | Const],
    constants: Constants,
) -> Any:
    """Return a constant at one time step, whose ``number`` is given, for a result with the axes ``out``.

    It is created from the number by the same operations. On the way the rows are where the time axis was.

    Raises:
        CannotStreamError: an operation cannot be created.
    """
    inner: dict[str, Data | Const] = dict(values)
    for name, data in numbered.values.items():
        inner[name] = Data(tuple(map(_of_rows, data.axes)))
    made: dict[str, Any] = {}
    for _, op in needed_by([tensor], tensor.graph):
        names = [output.name for output in op.outputs]
        if not any(name in numbered.values for name in names):
            continue
        if op.type == "Range":
            first, _, growth = (constants.make(value) for value in op.inputs)
            per = prod(plain_sizes(numbered.values[names[0]].axes))
            made[names[0]] = first + growth * tf.cast(_elements(number - numbered.lag, per), first.dtype)
        else:
            made |= zip(names, make(Operation(op, inner, made, constants, States({}), ())), strict=False)
    return _moved(made[tensor.name], numbered.axes, out)


def _of_rows(dim: Dim) -> Dim:
    """Return a dimension with the rows instead of the time axis, each with all elements of the time step."""
    time = elements(dim)
    if time is None:
        return dim if time_of([dim]) is None else (BATCH,)
    return normal((BATCH, time.per))


def _elements(number: Any, per: int) -> Any:
    """Return the numbers of the elements that a time step brings, ``(rows * per,)``; none is beyond the largest."""
    if per == 1:
        return number
    steps = tf.minimum(number, (MAX_NUMBER + 1) // per - 1)
    return tf.reshape(tf.expand_dims(steps * per, 1) + tf.range(per), [-1])


def _moved(value: Any, axes: Axes, out: Axes) -> Any:
    """Return a value with its rows where those of the result are, instead of where the time axis is."""
    missing = len(out) - len(axes)
    place = missing + next(i for i, dim in enumerate(axes) if time_of([dim]))
    rows = next(i for i, dim in enumerate(out) if BATCH in dim)
    time = elements(axes[place - missing])
    for _ in range(missing):
        value = tf.expand_dims(value, 0)
    if time is not None and time.per > 1:
        sizes = [*[1] * missing, *(prod(plain_sizes([dim])) for dim in axes)]
        apart = tf.reshape(
            value, [*sizes[:place], -1, *sizes[place:]]
        )  # The rows, then the elements of each.
        order = [i for i in range(len(sizes) + 1) if i != place]
        order.insert(rows, place)
        return tf.reshape(tf.transpose(apart, order), [*sizes[:rows], -1, *sizes[rows + 1 :]])
    order = list(range(len(out)))
    order[place], order[rows] = rows, place
    return value if place == rows else tf.transpose(value, order)
