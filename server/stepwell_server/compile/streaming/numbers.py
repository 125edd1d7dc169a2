"""Constants that the number of the time step determines, at one time step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepwell_server.compile.causality.axes import BATCH, Axes, time_of
from stepwell_server.compile.causality.call import Memory, Need
from stepwell_server.compile.causality.numbers import Numbered
from stepwell_server.compile.causality.values import Const, Data, needed_by
from stepwell_server.compile.graph.tensorflow_setup import tf
from stepwell_server.compile.streaming.operation import Operation, States
from stepwell_server.compile.streaming.operations import make
from stepwell_server.compile.streaming.replay import Constants


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
        inner[name] = Data(tuple((BATCH,) if time_of([dim]) else dim for dim in data.axes))
    made: dict[str, Any] = {}
    for _, op in needed_by([tensor], tensor.graph):
        names = [output.name for output in op.outputs]
        if not any(name in numbered.values for name in names):
            continue
        if op.type == "Range":
            first, _, growth = (constants.make(value) for value in op.inputs)
            made[names[0]] = first + growth * tf.cast(number - numbered.lag, first.dtype)
        else:
            made |= zip(names, make(Operation(op, inner, made, constants, States({}), ())), strict=False)
    return _moved(made[tensor.name], numbered.axes, out)


def _moved(value: Any, axes: Axes, out: Axes) -> Any:
    """Return a value with its rows where those of the result are, instead of where the time axis is."""
    missing = len(out) - len(axes)
    place = missing + next(i for i, dim in enumerate(axes) if time_of([dim]))
    rows = next(i for i, dim in enumerate(out) if BATCH in dim)
    order = list(range(len(out)))
    order[place], order[rows] = rows, place
    for _ in range(missing):
        value = tf.expand_dims(value, 0)
    return value if place == rows else tf.transpose(value, order)
