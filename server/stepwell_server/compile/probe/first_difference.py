"""Finds the first layer whose outputs differ when the model is stepped, and an undefined cast that causes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepwell_server.compile.causality.axes import BATCH, is_plain, time_of
from stepwell_server.compile.causality.cut import Cut, cut
from stepwell_server.compile.causality.proof import NotAdmitted, Proof, follow, prove
from stepwell_server.compile.causality.values import Const, Data
from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.graph.interface import Interface, describe
from stepwell_server.compile.graph.plan import Plan, make_plan
from stepwell_server.compile.graph.samples import Sampler
from stepwell_server.compile.graph.scopes import layer_of, named
from stepwell_server.compile.graph.tensorflow_setup import keras, tf
from stepwell_server.compile.graph.trace import trace
from stepwell_server.compile.graph.watch import watch
from stepwell_server.compile.probe import evidence
from stepwell_server.compile.probe.sequences import Array, run, step_of_function, tolerance
from stepwell_server.compile.streaming.memory import StreamingMemory

_LENGTHS = (5, 7)
#: Integer types too small for ordinary floats.
_SMALL = (tf.int8, tf.uint8, tf.int16, tf.uint16)


@dataclasses.dataclass(frozen=True)
class First:
    """The first layer that differs, if it can be found."""

    layer: Any = None
    clause: str = ""
    """How it differs, ending with a semicolon; empty if not found."""


def first_to_differ(plan: Plan, sampler: Sampler, inputs: Sequence[Array], steps: int) -> First:
    """Return the first layer that differs on a sequence.

    Only functional models are supported, because the outputs of their layers can be outputs of another model.
    """
    if not plan.interface.is_functional or (plan.has_memory and plan.interface.states):
        return First()
    model, rng = plan.interface.model, np.random.default_rng(31)
    parts = _parts(getattr(model, "_functional", None) or model)
    try:
        inner, proof, side = _inner(plan, model, parts)
        least = 0 if proof is None else proof.steps
        lengths = [least + length for length in _LENGTHS]
        seen = [watch(inner, sampler.draw(rng, plan.temporal, length), length) for length in lengths]
        inner_plan = make_plan(inner, plan.temporal, seen[0], seen[1], looks_back=plan.has_memory)
        if proof is None or side is None:
            function = trace(inner_plan)
        else:
            memory = StreamingMemory(side, proof, [spec.name for spec in inner_plan.state])
            inner_plan = memory.added_to(inner_plan)
            function = memory.trace(inner_plan)
        stepped = run(inner_plan, step_of_function(inner_plan, function), inputs, steps)
        whole = evidence.observe(inner_plan, inner, inputs, steps, sampler.whole, sampler.exact)
    except (ModelError, NotAdmitted):
        return First()  # Intermediate outputs need not be steppable.
    found = evidence.compare(inner_plan, whole, stepped, tolerance(model))
    by_name = {difference.output: difference for difference in found.outputs}
    for i, (layer, _) in enumerate(parts):
        difference = by_name.get(str(i))
        if difference is not None and not difference.is_allowed:
            where = f"time step {difference.time} of row {difference.row}"
            clause = f"{named(model, layer)} differs first, by {difference.absolute:.2g} at {where}; "
            return First(layer, clause)
    return First()


def _inner(
    plan: Plan, model: Any, parts: Sequence[tuple[Any, Any]]
) -> tuple[Interface, Proof | None, Cut | None]:
    """Return the model whose outputs are those of the layers; if it looks back, of those with one element a time step."""
    outputs = {str(i): output for i, (_, output) in enumerate(parts)}
    inner = describe(keras.Model(model.inputs, outputs))
    if not plan.has_memory:
        return inner, None, None
    cuts = cut(inner, plan.temporal)
    values, _ = follow(cuts)
    tensors = cuts.first.outputs
    kept = {name: output for name, output in outputs.items() if _is_punctual(values[tensors[name].name])}
    inner = describe(keras.Model(model.inputs, kept))
    cuts = cut(inner, plan.temporal)
    return inner, prove(cuts), cuts.first


def _is_punctual(value: Data | Const) -> bool:
    if not isinstance(value, Data) or value.axes[:1] != ((BATCH,),) or value.ends:
        return False
    time = time_of(value.axes[1:2])
    is_alone = time is not None and value.axes[1] == (time,) and all(map(is_plain, value.axes[2:]))
    return is_alone and time is not None and time.per == 1 and not time.extra and time.start <= 0


def undefined_cast(model: Any, function: Any, first: First, difference: str) -> ModelError | None:
    """Return the error for a model that differs because a cast of floats to small integers is undefined.

    Out of range, the result of such a cast depends on the position in the tensor, so Keras's own call differs for
    another number of time steps. None: the first layer that differs, or the whole model if that is unknown, has no such
    cast.

    Args:
        model: the Keras model.
        function: one time step of it, traced.
        first: the first layer to differ.
        difference: what differs, as a clause.
    """
    for op in function.graph.get_operations():
        if op.type != "Cast" or not op.get_attr("SrcT").is_floating or op.get_attr("DstT") not in _SMALL:
            continue
        layer = layer_of(model, op.name)
        if not _may_be(layer, first.layer):
            continue
        limits = np.iinfo(op.get_attr("DstT").as_numpy_dtype)
        return ModelError(
            f"{named(model, first.layer or layer)} casts floats to {limits.dtype}, which is undefined for numbers below "
            f"{limits.min} or above {limits.max}: Keras itself gives other results for another number of time steps; clip them "
            f"before the cast, with keras.ops.clip(x, {limits.min}, {limits.max}) ({difference})"
        )
    return None


def _may_be(layer: Any, first: Any) -> bool:
    """Whether an operation of ``layer`` may belong to ``first``; None as ``layer`` means that it is in no layer."""
    if first is None:
        return True
    return layer in first._flatten_layers() if isinstance(first, keras.Layer) else layer is None


def _parts(graph: Any) -> list[tuple[Any, Any]]:
    """Return the layers in call order, each with its first output."""
    return [
        (node.operation, node.outputs[0])
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
        if not node.is_input and len(node.outputs) == 1
    ]
