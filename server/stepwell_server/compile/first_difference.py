"""Which layer of a model is the first whose outputs differ when it is stepped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepwell_server.compile import evidence
from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.interface import describe
from stepwell_server.compile.plan import Plan, make_plan
from stepwell_server.compile.samples import Sampler
from stepwell_server.compile.scopes import named
from stepwell_server.compile.sequences import Array, run, step_of_function, tolerance
from stepwell_server.compile.tensorflow_setup import keras
from stepwell_server.compile.trace import trace
from stepwell_server.compile.watch import watch

_LENGTHS = (5, 7)


def first_to_differ(plan: Plan, sampler: Sampler, inputs: Sequence[Array], steps: int) -> str:
    """Return the first layer to differ on a sequence, as a clause with a semicolon; "" where it cannot be found.

    It can be in a functional model, whose layers' outputs can be made outputs of another one.
    """
    if not plan.interface.is_functional:
        return ""
    model, rng = plan.interface.model, np.random.default_rng(31)
    parts = _parts(getattr(model, "_functional", None) or model)
    try:
        inner = describe(keras.Model(model.inputs, {str(i): output for i, (_, output) in enumerate(parts)}))
        seen = [watch(inner, sampler.draw(rng, plan.temporal, length), length) for length in _LENGTHS]
        inner_plan = make_plan(inner, plan.temporal, seen[0], seen[1])
        stepped = run(inner_plan, step_of_function(inner_plan, trace(inner_plan)), inputs, steps)
        whole = evidence.observe(inner_plan, inner, inputs, steps, sampler.whole, sampler.exact)
    except ModelError:
        return ""  # What is between the layers need not be something that can be stepped by itself.
    found = evidence.compare(inner_plan, whole, stepped, tolerance(model))
    by_name = {difference.output: difference for difference in found.outputs}
    for i, (layer, _) in enumerate(parts):
        difference = by_name[str(i)]
        if not difference.is_allowed:
            return f"{named(model, layer)} differs first, by {difference.absolute:.2g} at time step {difference.time} of row {difference.row}; "
    return ""


def _parts(graph: Any) -> list[tuple[Any, Any]]:
    """Return the layers in the order in which they are called, each with its first output."""
    return [
        (node.operation, node.outputs[0])
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
        if not node.is_input and len(node.outputs) == 1
    ]
