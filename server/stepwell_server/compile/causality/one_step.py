"""Checks that the graph of one time step, which is served, matches the proven graphs of many time steps.

A layer may behave differently for one time step. Both proven graphs have many, so the served graph is compared
with the first of them: the same operations must process the data, with the same connections and attributes, and
with the same constants or one time step's part of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from stepwell_server.compile.causality.cut import Cut, Cuts
from stepwell_server.compile.causality.proof import (
    ACCUMULATING,
    NotAdmitted,
    blamed,
    captured,
    needed,
    side_by_side,
)
from stepwell_server.compile.causality.refusals import Reason
from stepwell_server.compile.causality.values import OF_SHAPES, Const, Evaluator, attributes, equal, needed_by
from stepwell_server.compile.graph.tensorflow_setup import tf

#: Integers from here on may be sizes or indices in a sequence: they differ in a short one, and between the two long ones.
_OF_LENGTH = 256
_Three = tuple[Evaluator, Evaluator, Evaluator]
"""Of the first graph of many time steps, of that of one, and of the second of many."""
_OTHERWISE = "computes something different for one time step than for many"


def require_same(cuts: Cuts, one: Cut, numbers: Mapping[str, Collection[int]]) -> None:
    """Compare the graph of one time step with the first graph of many.

    Inputs that the number of the time step determines, ``numbers``, have that of the first one.

    Raises:
        NotAdmitted: they compute different things.
    """
    first = cuts.first
    twins: dict[str, str] = {}
    evaluators = (Evaluator(captured(first)), Evaluator(captured(one)), Evaluator(captured(cuts.second)))
    pairs = side_by_side(_on_data(first), _on_data(one), blamed(first, one))
    seconds = side_by_side(_on_data(first), _on_data(cuts.second), blamed(first, cuts.second))
    twins.update(zip(_given(first), _given(one), strict=True))
    try:
        for (index, op, other), (_, _, second) in zip(pairs, seconds, strict=True):
            if attributes(op) != attributes(other):
                raise NotAdmitted(Reason.LENGTH, first.owner(index), _OTHERWISE)
            inputs = () if op.type in OF_SHAPES else zip(op.inputs, other.inputs, second.inputs, strict=True)
            for i, (value, twin, longer) in enumerate(inputs):
                may_be_number = i in numbers.get(op.name, ()) or (op.type, i) == ("GatherV2", 1)
                if not _is_alike(value, twin, longer, twins, evaluators) and not (
                    may_be_number and _is_first(value, twin, evaluators)
                ):
                    raise NotAdmitted(Reason.LENGTH, first.owner(index), _OTHERWISE)
            if not _call_alike(op, other, second):
                raise NotAdmitted(Reason.LENGTH, first.owner(index), _OTHERWISE)
            twins.update((x.name, y.name) for x, y in zip(op.outputs, other.outputs, strict=True))
    except NotAdmitted as found:
        raise NotAdmitted(Reason.LENGTH, found.layer, _OTHERWISE) from found
    for name, output in first.outputs.items():
        if not _is_alike(output, one.outputs[name], cuts.second.outputs[name], twins, evaluators):
            raise NotAdmitted(Reason.LENGTH, None, _OTHERWISE)


def _given(side: Cut) -> list[str]:
    """Return the names of the sources of data: the inputs, and the placeholders of loops."""
    loops = [
        tensor
        for call in (*side.calls, *side.parts)
        for tensor in (*call.now, *call.before, call.outputs, *call.last)
    ]
    return [tensor.name for tensor in (*side.inputs, *loops)]


def _on_data(side: Cut) -> list[tuple[int, Any]]:
    """Return the operations that process data; constants may be computed differently for other sizes.

    A sum over constants is data too, if it numbers the time steps.
    """
    data = set(_given(side))
    found: list[tuple[int, Any]] = []
    for index, op in needed(side):
        is_data = op.type in ACCUMULATING or any(value.name in data for value in op.inputs)
        if op.type not in OF_SHAPES and is_data:
            data |= {output.name for output in op.outputs}
            found.append((index, op))
    return found


def _call_alike(*ops: Any) -> bool:
    """Whether the functions called by three operations, such as loop bodies, are equivalent. See `_are_same`."""
    called = [
        [
            op.graph._get_function(value.func.name).graph
            for _, value in sorted(op.node_def.attr.items())
            if value.func.name
        ]
        for op in ops
    ]
    return all(_are_same(*graphs) for graphs in zip(*called, strict=True))


def _are_same(first: Any, second: Any, longer: Any) -> bool:
    """Whether two functions have the same operations and connections, on the same constants.

    The third one is the first for longer sequences.
    """
    twins = {one.name: other.name for one, other in zip(first.inputs, second.inputs, strict=True)}
    evaluators = (Evaluator({}), Evaluator({}), Evaluator({}))
    ops = [needed_by(graph.outputs, graph) for graph in (first, second, longer)]
    if len({len(each) for each in ops}) > 1:
        return False
    for (_, op), (_, other), (_, third) in zip(*ops, strict=True):
        if len({op.type, other.type, third.type}) > 1 or len(op.inputs) != len(other.inputs):
            return False
        if op.type == "Const":
            if not _is_alike(op.outputs[0], other.outputs[0], third.outputs[0], {}, evaluators):
                return False
        elif op.type != "Placeholder":
            wired = op.type in OF_SHAPES or all(
                twins[x.name] == y.name for x, y in zip(op.inputs, other.inputs, strict=True)
            )
            if attributes(op) != attributes(other) or not wired or not _call_alike(op, other, third):
                return False
        twins.update((x.name, y.name) for x, y in zip(op.outputs, other.outputs, strict=True))
    return all(twins[x.name] == y.name for x, y in zip(first.outputs, second.outputs, strict=True))


def _is_first(value: Any, twin: Any, evaluators: _Three) -> bool:
    """Whether a constant of one time step is what that of many begins with."""
    try:
        many, one = Const(value, twin, evaluators[:2]).arrays()
    except ValueError:
        return False
    return many.ndim == one.ndim and equal(many[tuple(map(slice, one.shape))], one)


def _is_alike(value: Any, twin: Any, longer: Any, twins: dict[str, str], evaluators: _Three) -> bool:
    """Whether two tensors are the same data, or constants of which the second is one time step's part.

    ``longer`` is the first one for longer sequences.
    """
    if value.name in twins:
        return bool(twins[value.name] == twin.name)
    if value.dtype == tf.variant:  # A list, which may have items of another size if a loop fills it.
        if value.op.type != twin.op.type or attributes(value.op) != attributes(twin.op):
            return False
        made = zip(value.op.inputs, twin.op.inputs, longer.op.inputs, strict=True)
        return value.op.type == "TensorListReserve" or all(
            _is_alike(x, y, z, twins, evaluators) for x, y, z in made
        )
    constant = Const(value, twin, evaluators[:2])
    try:
        if constant.is_same:
            return True
        many, one = constant.arrays()
    except ValueError:
        return False
    if many.dtype != one.dtype:
        return False
    if many.shape != one.shape:
        try:
            one = np.broadcast_to(one, many.shape)
        except ValueError:
            return True  # Rows and time steps share one axis, which the proof found to be uniform.
    if many.dtype.kind in "iu":
        of_length = np.abs(many.astype(np.int64)) >= _OF_LENGTH
        try:
            more = evaluators[2].array(longer)
        except ValueError:
            return False
        if more.shape == many.shape:  # Such as min(T, 400), which both long sequences exceed.
            of_length &= more != many
        return bool(np.all((many == one) | of_length))
    return bool(np.array_equal(many, one, equal_nan=many.dtype.kind == "f"))
