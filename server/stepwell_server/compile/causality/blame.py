"""The messages of refusals: which layer, what it does, and the fix."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from stepwell_server.compile.causality.cut import FAR, SCALES, CutError, LoopError
from stepwell_server.compile.causality.direction import Direction, direction
from stepwell_server.compile.causality.proof import NotAdmitted
from stepwell_server.compile.causality.refusals import Reason
from stepwell_server.compile.errors import ModelError, NotCausalError, quoted
from stepwell_server.compile.graph.interface import Interface
from stepwell_server.compile.graph.samples import Sampler
from stepwell_server.compile.graph.scopes import named
from stepwell_server.compile.graph.tensorflow_setup import keras
from stepwell_server.compile.graph.untraceable import pattern_of
from stepwell_server.compile.graph.watch import all_operations

_STEP_BY_STEP = "model cannot be run step by step: "
#: Those of the proof's traces.
_LENGTHS = {scale.steps for scale in (*FAR, *(one for pair in SCALES for one in pair.both))}
_SEVERAL_STEPS = "looks back over several time steps and keeps no state"


def refusal_of(sampler: Sampler, temporal: Sequence[bool], found: NotAdmitted) -> ModelError:
    """Return the error for a model whose graph does not admit it."""
    model = sampler.interface.model
    layer = _outermost(model, found.layer)
    who, clause, fix = named(model, layer), str(found), found.reason.value
    match found.reason:
        case Reason.TIME | Reason.PAIRS | Reason.MATRIX:
            return _over_time(sampler, temporal, layer, clause, fix)
        case Reason.BACKWARDS | Reason.AHEAD | Reason.BEGINNING:
            return _ahead(model, layer, clause, fix)
        case Reason.END:
            return NotCausalError(f"model is not causal: {who} {clause}; {fix}")
        case Reason.POSITION | Reason.LENGTH | Reason.RATE | Reason.PADDING | Reason.TABLE:
            fault = misplaced_bias(model, [layer], _LENGTHS) if found.reason is Reason.LENGTH else None
            return fault or NotCausalError(f"{_STEP_BY_STEP}{who} {clause}; {fix}")
        case Reason.PYTHON:
            return ModelError(f"the model cannot become a program: {who} {clause}; {fix}")
        case Reason.UNPROVEN:
            return ModelError(f"the model is not proven to be steppable: {who} {clause}; {fix}")
        case Reason.ROWS:
            return ModelError(f"the rows of a batch are not independent of each other: {who} {clause}; {fix}")
        case Reason.RANDOM | Reason.WRITES:
            return ModelError(f"two calls of the model differ: {who} {clause}; {fix}")
        case Reason.LAYOUT:
            return ModelError(
                f"the rows and time steps of an output cannot be identified: {who} {clause}; {fix}"
            )
        case Reason.STATE:
            return ModelError(f"the initial state is computed from the model's inputs: {who} {clause}; {fix}")


def _over_time(
    sampler: Sampler, temporal: Sequence[bool], layer: Any, clause: str, fix: str
) -> NotCausalError:
    who, is_of_pairs = named(sampler.interface.model, layer), fix == Reason.PAIRS.value
    match direction(sampler, temporal, layer):
        case Direction.AHEAD:
            ways = f"{Reason.BACKWARDS.value}, so {fix}" if is_of_pairs else Reason.BACKWARDS.value
            return _ahead(sampler.interface.model, layer, clause, ways)
        case Direction.BACK if is_of_pairs:
            clause = f"{clause}, as attention with a causal mask does, so its state would grow with each step"
            return NotCausalError(
                f"{_STEP_BY_STEP}{who} depends on the whole sequence so far: it {clause}; {fix}"
            )
        case Direction.BACK:
            return NotCausalError(f"{_STEP_BY_STEP}{who} {_SEVERAL_STEPS}: it {clause}; {fix}")
        case Direction.UNKNOWN:
            return NotCausalError(f"{_STEP_BY_STEP}{who} mixes time steps: it {clause}; {fix}")


def misplaced_bias(model: Any, layers: Iterable[Any], lengths: Collection[int]) -> NotCausalError | None:
    """Return the error for the first layer whose bias Keras adds to the wrong axis at one of some lengths.

    `keras.ops.add` takes the last axis for that of the channels if it has as many elements as the bias.
    """
    for layer in layers:
        bias = getattr(layer, "bias", None)
        is_first = getattr(layer, "data_format", None) == "channels_first"
        if is_first and bias is not None and bias.shape[0] in lengths:
            return NotCausalError(
                f"{_STEP_BY_STEP}{named(model, layer)} has its channels first, and a fault of Keras adds its bias to the time "
                f"steps instead, in sequences of as many time steps as it has filters, {bias.shape[0]}; use "
                "use_bias=False, data_format='channels_last', or another number of filters"
            )
    return None


def _ahead(model: Any, layer: Any, clause: str, fix: str) -> NotCausalError:
    if isinstance(layer, keras.layers.Bidirectional):
        fix += "; train the model again: its weights cannot be reused, because each later layer was trained on both directions"
    return NotCausalError(f"model is not causal: {named(model, layer)} looks ahead: it {clause}; {fix}")


def loop_problem(interface: Interface, found: LoopError) -> NotCausalError:
    """Return the error for a model with a Python loop over its time steps."""
    who = named(interface.model, found.layer)
    return NotCausalError(
        f"{_STEP_BY_STEP}{who} {found}, which no session can split into steps; write one step as a "
        "cell, and run it with keras.layers.RNN"
    )


def length_problem(interface: Interface, temporal: Sequence[bool], found: CutError) -> ModelError:
    """Return the error for a model that accepts only some lengths."""
    model = interface.model
    fixed = {
        info.shape[1]
        for info, timed in zip(interface.inputs, temporal, strict=True)
        if timed and info.shape[1] is not None
    }
    who = "it" if found.layer is None else named(model, found.layer)
    pattern = pattern_of(found.__cause__)
    if pattern is not None:
        who = "the model" if found.layer is None else who
        return ModelError(f"the model cannot be traced: {who} {pattern.does}; {pattern.fix}")
    if not fixed:
        return ModelError(f"the model must run on sequences of any length: {who} fails ({found})")
    (steps,) = fixed if len(fixed) == 1 else ("a fixed number of",)
    return ModelError(
        f"the model accepts only sequences of {steps} time steps, but a served sequence has no end: {who} fails on another "
        f"length ({found}); {_fix_for_length(interface, steps)}"
    )


def one_step_problem(interface: Interface, found: CutError) -> ModelError:
    """Return the error for a model that runs on many time steps but not on one."""
    who = "it" if found.layer is None else named(interface.model, found.layer)
    problem = f"the model must run on a sequence of one time step: {who} fails ({found})"
    for layer in all_operations(interface.model):
        if getattr(layer, "output_mode", None) == "one_hot":
            return ModelError(
                f"{problem}; {named(interface.model, layer)} drops axes of length 1, such as the time axis of one "
                "step: encode integers with keras.ops.one_hot(numbers, depth) instead"
            )
    return ModelError(problem)


def _fix_for_length(interface: Interface, steps: Any) -> str:
    """Return the first known fix that applies to a layer of the model."""
    layers = [layer for layer in all_operations(interface.model) if isinstance(layer, keras.Layer)]
    kinds = keras.layers
    for layer in layers:
        if isinstance(layer, kinds.Reshape) and steps in layer.target_shape:
            shape = tuple(-1 if size == steps else size for size in layer.target_shape)
            return (
                f"build it with keras.Input((None, ...)) and Reshape({shape}) instead of {quoted(layer.name)}, and load the "
                "weights into it"
            )
    for layer in layers:
        if isinstance(layer, kinds.RepeatVector) and layer.n == steps:
            return (
                f"build it with keras.Input((None, ...)), and instead of {quoted(layer.name)} repeat with "
                "keras.ops.expand_dims(s, 1) * keras.ops.ones_like(x[:, :, :1]), where x is the series"
            )
    for layer in layers:
        if isinstance(layer, kinds.Flatten):
            return f"{quoted(layer.name)} turns time steps into features: use the last output of a recurrent layer instead"
    return "make it accept any length, and build the model with keras.Input((None, ...)); pass values that differ per time step as features"


def _outermost(model: Any, layer: Any) -> Any:
    """Return the Bidirectional that created a layer, because that is what the user wrote; else the layer."""
    for other in all_operations(model):
        if isinstance(other, keras.layers.Bidirectional) and any(
            layer is one for one in (other.forward_layer, other.backward_layer)
        ):
            return other
    return layer
