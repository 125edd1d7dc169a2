"""One iteration of a loop over time, such as `keras.ops.scan`, as a part of one time step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepwell_server.compile.causality.axes import BATCH, Axes
from stepwell_server.compile.causality.call import Memory, Need
from stepwell_server.compile.causality.scans import Scan
from stepwell_server.compile.causality.values import Const, Data, needed_by
from stepwell_server.compile.graph.tensorflow_setup import tf
from stepwell_server.compile.streaming.operation import Operation, States, spread
from stepwell_server.compile.streaming.operations import make
from stepwell_server.compile.streaming.replay import Constants, plain_sizes, reduced, step_shape


def iterated(
    op: Any,
    scan: Scan,
    made: Mapping[str, Any],
    constants: Constants,
    states: States,
    needs: tuple[Need, ...],
) -> list[Any]:
    """Return the variables of a loop after one iteration: of a list over time, the element of this time step.

    Raises:
        CannotStreamError: an operation of its body cannot be created.
    """
    body, values, params = scan.body, scan.values, scan.body.graph.inputs
    pairs = [(param.name, value) for param, value in zip(params, op.inputs, strict=True)]
    given = {name: constants.make(value) for name, value in pairs if isinstance(values.get(name), Const)}
    inner = {name: found for name, value in pairs if (found := made.get(value.name)) is not None}
    inner |= {name: made[op.inputs[place].name] for name, place in body.read.items()}
    carries = {need.input: need for need in needs if need.kind is Memory.CARRY}
    count = next((need for need in needs if need.kind is Memory.COUNT), None)
    is_first = None
    if count is not None:
        passed = states.before(op.name, count, tf.int32)
        states.after[op.name, count] = tf.ones_like(passed)
        is_first = passed < 1
    before: dict[int, Any] = {}
    for place, need in carries.items():
        axes, first = scan.axes[place], scan.first[place]
        before[place] = tf.reshape(states.before(op.name, need, first.dtype), step_shape(axes))
        if (begun := made.get(first.name)) is not None:
            before[place] = _at_first(is_first, begun, before[place], axes)
    inner |= {name: before[place] for name, place in body.before.items()}
    own = constants.of_function(given)
    for _, each in needed_by(body.results, body.graph):
        names = [output.name for output in each.outputs]
        if names[0] not in inner and any(isinstance(values.get(name), Data) for name in names):
            found = make(Operation(each, values, inner, own, States({}), ()))
            inner.update(zip(names, found, strict=False))
    results = [made.get(value.name) for value in op.inputs]
    like = next(iter(made.values()))  # An input of the model, whose first dimension is the rows.
    for place, tensor in (*body.written.items(), *body.carried.items()):
        value = values[tensor.name]
        axes = scan.axes[place]
        result = (
            inner[tensor.name]
            if isinstance(value, Data)
            else spread(reduced(value, axes), tensor.dtype, axes, like)
        )
        if body.start:  # The first time step is in front of the first iteration.
            first = before[place] if place in before else made[scan.first[place].name]
            result = _at_first(is_first, first, result, axes)
        results[place] = result
    for place, need in carries.items():
        states.after[op.name, need] = tf.reshape(results[place], [-1, *plain_sizes(scan.axes[place])])
    return results


def _at_first(is_first: Any, first: Any, other: Any, axes: Axes) -> Any:
    """Return one value at the first time step of each row, and another one later."""
    return tf.where(tf.reshape(is_first, [-1 if BATCH in dim else 1 for dim in axes]), first, other)
