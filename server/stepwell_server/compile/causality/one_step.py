"""Whether the graph of one time step, which is what runs, is the graph that was proven on many.

A layer may do something else for one time step than for more. Both proven graphs are of many, so the one that
is served is held against the first of them: what is done to the data are the same operations, wired alike, with
the same settings and the same constants beside them, or one time step's part of these.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stepwell_server.compile.causality.cut import Cut, Cuts
from stepwell_server.compile.causality.proof import (
    Unadmitted,
    blamed,
    captured,
    needed,
    needed_by,
    side_by_side,
)
from stepwell_server.compile.causality.refusals import Reason
from stepwell_server.compile.causality.values import OF_SHAPES, Const, Evaluator, attributes
from stepwell_server.compile.graph.tensorflow_setup import tf

#: Whole numbers from here on may be sizes and places in a sequence, which are others in a short one.
_OF_LENGTH = 256
_OTHERWISE = "computes something else for one time step than for many"


def require_same(cuts: Cuts, one: Cut) -> None:
    """Compare the graph of one time step with the first of many.

    Raises:
        Unadmitted: they compute different things.
    """
    first = cuts.first
    twins: dict[str, str] = {}
    evaluators = (Evaluator(captured(first)), Evaluator(captured(one)))
    pairs = side_by_side(_on_data(first), _on_data(one), blamed(first, one))
    twins.update(zip(_given(first), _given(one), strict=True))
    try:
        for index, op, other in pairs:
            if attributes(op) != attributes(other):
                raise Unadmitted(Reason.LENGTH, first.owner(index), _OTHERWISE)
            for value, twin in () if op.type in OF_SHAPES else zip(op.inputs, other.inputs, strict=True):
                if not _is_alike(value, twin, twins, evaluators):
                    raise Unadmitted(Reason.LENGTH, first.owner(index), _OTHERWISE)
            if not _call_alike(op, other):
                raise Unadmitted(Reason.LENGTH, first.owner(index), _OTHERWISE)
            twins.update((x.name, y.name) for x, y in zip(op.outputs, other.outputs, strict=True))
    except Unadmitted as found:
        raise Unadmitted(Reason.LENGTH, found.layer, _OTHERWISE) from found
    for name, output in first.outputs.items():
        if not _is_alike(output, one.outputs[name], twins, evaluators):
            raise Unadmitted(Reason.LENGTH, None, _OTHERWISE)


def _given(side: Cut) -> list[str]:
    """Return the names of what data come from: the inputs, and the placeholders that stand for loops."""
    loops = [
        tensor
        for call in (*side.calls, *side.parts)
        for tensor in (*call.now, *call.before, call.outputs, *call.last)
    ]
    return [tensor.name for tensor in (*side.inputs, *loops)]


def _on_data(side: Cut) -> list[tuple[int, Any]]:
    """Return the operations that data go through: constants may be made otherwise for other sizes."""
    data = set(_given(side))
    found: list[tuple[int, Any]] = []
    for index, op in needed(side):
        if op.type not in OF_SHAPES and any(value.name in data for value in op.inputs):
            data |= {output.name for output in op.outputs}
            found.append((index, op))
    return found


def _call_alike(one: Any, other: Any) -> bool:
    """Return whether the functions that two operations call (the body of a loop, say) do the same."""
    called = [
        [
            op.graph._get_function(value.func.name).graph
            for _, value in sorted(op.node_def.attr.items())
            if value.func.name
        ]
        for op in (one, other)
    ]
    return all(_are_same(*graphs) for graphs in zip(*called, strict=True))


def _are_same(first: Any, second: Any) -> bool:
    """Return whether two functions do the same: the same operations, wired alike, on the same constants."""
    twins = {one.name: other.name for one, other in zip(first.inputs, second.inputs, strict=True)}
    evaluators = (Evaluator({}), Evaluator({}))
    pairs = [needed_by(graph.outputs, graph) for graph in (first, second)]
    if len(pairs[0]) != len(pairs[1]):
        return False
    for (_, op), (_, other) in zip(*pairs, strict=True):
        if op.type != other.type or len(op.inputs) != len(other.inputs):
            return False
        if op.type == "Const":
            if not _is_alike(op.outputs[0], other.outputs[0], {}, evaluators):
                return False
        elif op.type != "Placeholder":
            wired = op.type in OF_SHAPES or all(
                twins[x.name] == y.name for x, y in zip(op.inputs, other.inputs, strict=True)
            )
            if attributes(op) != attributes(other) or not wired or not _call_alike(op, other):
                return False
        twins.update((x.name, y.name) for x, y in zip(op.outputs, other.outputs, strict=True))
    return all(twins[x.name] == y.name for x, y in zip(first.outputs, second.outputs, strict=True))


def _is_alike(value: Any, twin: Any, twins: dict[str, str], evaluators: tuple[Evaluator, Evaluator]) -> bool:
    """Return whether two tensors are the same data, or constants of which the second is one time step's part."""
    if value.name in twins:
        return bool(twins[value.name] == twin.name)
    if value.dtype == tf.variant:  # A list. One that is filled in a loop may have items of another size.
        if value.op.type != twin.op.type or attributes(value.op) != attributes(twin.op):
            return False
        made = zip(value.op.inputs, twin.op.inputs, strict=True)
        return value.op.type == "TensorListReserve" or all(
            _is_alike(x, y, twins, evaluators) for x, y in made
        )
    constant = Const(value, twin, evaluators)
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
            return True  # Rows and time steps are one axis: the proof has found it to be even.
    if many.dtype.kind in "iu":
        return bool(np.all((many == one) | (np.abs(many.astype(np.int64)) >= _OF_LENGTH)))
    return bool(np.array_equal(many, one, equal_nan=many.dtype.kind == "f"))
