"""What a refusal tells people: which layer, what it does, and the way on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepwell_server.compile.causality.cut import CutError, LoopError
from stepwell_server.compile.causality.direction import Direction, direction
from stepwell_server.compile.causality.proof import Unadmitted
from stepwell_server.compile.causality.refusals import Reason
from stepwell_server.compile.errors import ModelError, NotCausalError, quoted
from stepwell_server.compile.graph.interface import Interface
from stepwell_server.compile.graph.samples import Sampler
from stepwell_server.compile.graph.scopes import named
from stepwell_server.compile.graph.tensorflow_setup import keras
from stepwell_server.compile.graph.untraceable import habit_of
from stepwell_server.compile.graph.watch import all_operations

_STEP_BY_STEP = "model cannot be run step by step: "
_SEVERAL_STEPS = "looks back over several time steps and keeps no state"


def refusal_of(sampler: Sampler, temporal: Sequence[bool], found: Unadmitted) -> ModelError:
    """Return the error for a model that its graph does not admit."""
    model = sampler.interface.model
    layer = _outermost(model, found.layer)
    who, clause, way = named(model, layer), str(found), found.reason.value
    match found.reason:
        case Reason.TIME:
            return _over_time(sampler, temporal, layer, clause)
        case Reason.BACKWARDS:
            return _ahead(model, layer, clause)
        case Reason.END:
            return NotCausalError(f"model is not causal: {who} {clause}; {way}")
        case Reason.POSITION | Reason.LENGTH:
            return NotCausalError(f"{_STEP_BY_STEP}{who} {clause}; {way}")
        case Reason.PYTHON:
            return ModelError(f"the model cannot become a program: {who} {clause}; {way}")
        case Reason.UNPROVEN:
            return ModelError(f"it is not proven that the model may be stepped: {who} {clause}; {way}")
        case Reason.ROWS:
            return ModelError(f"the rows of a batch are not independent of each other: {who} {clause}; {way}")
        case Reason.RANDOM | Reason.WRITES:
            return ModelError(f"two calls of the model differ: {who} {clause}; {way}")
        case Reason.LAYOUT:
            return ModelError(f"an output cannot be told apart by row and time step: {who} {clause}; {way}")
        case Reason.STATE:
            return ModelError(f"the initial state is computed from the model's inputs: {who} {clause}; {way}")


def _over_time(sampler: Sampler, temporal: Sequence[bool], layer: Any, clause: str) -> NotCausalError:
    who = named(sampler.interface.model, layer)
    match direction(sampler, temporal, layer):
        case Direction.AHEAD:
            return _ahead(sampler.interface.model, layer, clause)
        case Direction.BACK:
            return NotCausalError(f"{_STEP_BY_STEP}{who} {_SEVERAL_STEPS}: it {clause}; {Reason.TIME.value}")
        case Direction.UNKNOWN:
            return NotCausalError(f"{_STEP_BY_STEP}{who} mixes time steps: it {clause}; {Reason.TIME.value}")


def _ahead(model: Any, layer: Any, clause: str) -> NotCausalError:
    way = Reason.BACKWARDS.value
    if isinstance(layer, keras.layers.Bidirectional):
        way += "; no weights can be kept, because each layer after it was trained on both directions: train the model anew"
    return NotCausalError(f"model is not causal: {named(model, layer)} looks ahead: it {clause}; {way}")


def loop_problem(interface: Interface, found: LoopError) -> NotCausalError:
    """Return the error for a model that loops over its time steps in Python."""
    who = named(interface.model, found.layer)
    return NotCausalError(
        f"{_STEP_BY_STEP}{who} {found}, whose steps no session could keep apart; write what it does in one step as a "
        "cell, and let keras.layers.RNN run it"
    )


def length_problem(interface: Interface, temporal: Sequence[bool], found: CutError) -> ModelError:
    """Return the error for a model that runs on some lengths only."""
    model = interface.model
    fixed = {
        info.shape[1]
        for info, timed in zip(interface.inputs, temporal, strict=True)
        if timed and info.shape[1] is not None
    }
    who = "it" if found.layer is None else named(model, found.layer)
    habit = habit_of(found.__cause__)
    if habit is not None:
        who = "the model" if found.layer is None else who
        return ModelError(f"the model cannot be traced: {who} {habit.does}; {habit.way}")
    if not fixed:
        return ModelError(
            f"the model does not run on sequences of any length, as what is served must: {who} fails ({found})"
        )
    (steps,) = fixed if len(fixed) == 1 else ("a fixed number of",)
    return ModelError(
        f"the model runs only on sequences of {steps} time steps, and what is served has no end: {who} fails on another "
        f"length ({found}); {_way_on(interface, steps)}"
    )


def one_step_problem(interface: Interface, found: CutError) -> ModelError:
    """Return the error for a model that runs on many time steps and not on one."""
    who = "it" if found.layer is None else named(interface.model, found.layer)
    problem = f"the model does not run on a sequence of one time step, which is what a step is: {who} fails ({found})"
    for layer in all_operations(interface.model):
        if getattr(layer, "output_mode", None) == "one_hot":
            return ModelError(
                f"{problem}; {named(interface.model, layer)} leaves out an axis of length 1, as the time axis of one step "
                "is: encode whole numbers by keras.ops.one_hot(numbers, depth) instead"
            )
    return ModelError(problem)


def _way_on(interface: Interface, steps: Any) -> str:
    """Return the first of the ways that are known to work which the model's layers suggest."""
    layers = [layer for layer in all_operations(interface.model) if isinstance(layer, keras.Layer)]
    kinds = keras.layers
    for layer in layers:
        if isinstance(layer, kinds.Reshape) and steps in layer.target_shape:
            shape = tuple(-1 if size == steps else size for size in layer.target_shape)
            return (
                f"build it with keras.Input((None, ...)) and Reshape({shape}) in place of {quoted(layer.name)}, and load the "
                "weights into it"
            )
    for layer in layers:
        if isinstance(layer, kinds.RepeatVector) and layer.n == steps:
            return (
                f"build it with keras.Input((None, ...)), and in place of {quoted(layer.name)} repeat by "
                "keras.ops.expand_dims(s, 1) * keras.ops.ones_like(x[:, :, :1]), where x is the series"
            )
    for layer in layers:
        if isinstance(layer, kinds.Flatten):
            return f"{quoted(layer.name)} makes features of time steps: let a recurrent layer return its last output instead"
    return (
        "let it take any length, and build the model with keras.Input((None, ...)); what is another value for each time "
        "step must come in as a feature"
    )


def _outermost(model: Any, layer: Any) -> Any:
    """Return the Bidirectional that a layer was made by: it is what the user wrote."""
    for other in all_operations(model):
        if isinstance(other, keras.layers.Bidirectional) and any(
            layer is one for one in (other.forward_layer, other.backward_layer)
        ):
            return other
    return layer
