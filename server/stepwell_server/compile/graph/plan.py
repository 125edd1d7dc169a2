"""Plans a program: which tensors of a model have a time axis, and which state it carries.

This is derived from two calls of the whole model on sequences of different lengths: an axis that is as long as the
sequence in both is the time axis.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.compile.errors import ModelError, quoted
from stepwell_server.compile.graph.interface import Input, Interface
from stepwell_server.compile.graph.samples import plain_dtype
from stepwell_server.compile.graph.tensorflow_setup import keras
from stepwell_server.compile.graph.watch import Observation, RecurrentCall, recurrent_layers
from stepwell_server.program import StateSpec, TensorSpec

Array = npt.NDArray[np.generic]


@dataclasses.dataclass(frozen=True)
class CarriedState:
    """A call of a recurrent layer that processes the sequence, so that its state is carried from step to step."""

    first: int
    """Position of its first tensor in the program's state."""
    dtypes: tuple[str, ...]
    """Keras's types of its state and, if the call is masked, of its previous output."""
    keeps_output: bool
    """Its last state tensor is its previous output, which Keras repeats at masked time steps."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """All information for tracing one time step."""

    interface: Interface
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[StateSpec, ...]
    initial: tuple[Array, ...]
    carried: Mapping[tuple[int, int], CarriedState]
    """By `id` of the layer and number of the call."""
    has_memory: bool = False
    """Its last states belong to operations that look back, which `graph.trace` does not know."""

    @property
    def temporal(self) -> tuple[bool, ...]:
        """Which inputs have a time axis."""
        return tuple(spec.temporal for spec in self.inputs)


def assignments(interface: Interface) -> Iterator[tuple[bool, ...]]:
    """Yield the possible sets of inputs with a time axis, the likeliest first.

    An input with a variable second axis has one. An input with a fixed second axis may have one, if the model was saved
    with a fixed number of time steps, or may be a feature vector. The latter is likelier if another input has a
    variable axis, or if the model has no recurrent layers. Inputs of different fixed lengths cannot share a time axis.

    Raises:
        ModelError: the fixed lengths of the inputs of recurrent layers differ.
    """
    inputs = interface.inputs
    some_open = any(len(x.shape) > 1 and x.shape[1] is None for x in inputs)
    is_recurrent = bool(recurrent_layers(interface.model)) or not interface.is_functional
    found = False
    for temporal in itertools.islice(
        itertools.product(*(_choices(info, some_open, is_recurrent) for info in inputs)), 64
    ):
        lengths = {x.shape[1] for x, timed in zip(inputs, temporal, strict=True) if timed} - {None}
        if len(lengths) < 2:
            found = True
            yield temporal
    assert found  # Either "no input has a time axis" is a choice, or all are variable.


def fixed_lengths(interface: Interface) -> dict[str, int]:
    """Return the lengths of inputs that are, or may be, sequences of a fixed length."""
    return {
        info.name: info.shape[1]
        for info in interface.inputs
        if len(info.shape) > 2 and info.shape[1] is not None
    }


def _choices(info: Input, some_open: bool, is_recurrent: bool) -> tuple[bool, ...]:
    if len(info.shape) < 2:
        return (False,)
    if info.shape[1] is None:
        return (True,)
    if not is_recurrent:
        return (False,)
    return (False, True) if some_open else (True, False)


def make_plan(
    interface: Interface,
    temporal: Sequence[bool],
    short: Observation,
    long: Observation,
    *,
    looks_back: bool = False,
) -> Plan:
    """Create the plan from two observations with the same ``temporal`` inputs.

    If the model ``looks_back`` by other operations, its recurrent layers may all run inside one time step.

    Raises:
        ModelError: the model cannot be stepped.
    """
    followed = [pair for pair in _pairs(short, long) if pair[0].steps == short.steps]
    _refuse_two_clocks(interface, temporal, short)
    if short.calls and not followed and not looks_back:
        raise ModelError("no recurrent layer of the model processes its input sequence")
    state: list[StateSpec] = []
    initial: list[Array] = []
    carried: dict[tuple[int, int], CarriedState] = {}
    for first, second in followed:
        keeps = first.masked and not first.layer.zero_output_for_mask
        dtypes = first.state_dtypes + ((first.output_dtype,) if keeps else ())
        carried[id(first.layer), first.number] = CarriedState(len(state), dtypes, keeps)
        values = list(_initial(first, second, looks_back=looks_back))
        if keeps:
            values.append(np.zeros(first.output_shape, plain_dtype(first.output_dtype)))
        names = _state_names(first, keeps, state)
        for own in interface.states:
            if own.layer is first.layer and own.number == _number_of(first, followed):
                names[own.part] = own.info.name
        for name, value in zip(names, values, strict=True):
            state.append(StateSpec(name, value.shape, value.dtype.name))
            initial.append(value)
    inputs = tuple(_input_spec(info, timed) for info, timed in zip(interface.inputs, temporal, strict=True))
    outputs = tuple(_output_spec(name, short, long) for name in short.outputs)
    return Plan(interface, inputs, outputs, tuple(state), tuple(initial), carried)


def _refuse_two_clocks(interface: Interface, temporal: Sequence[bool], seen: Observation) -> None:
    """Refuse sequences of different fixed lengths: a session has one time axis."""
    fixed = fixed_lengths(interface)
    timed = {info.name for info, is_timed in zip(interface.inputs, temporal, strict=True) if is_timed}
    others = {name: steps for name, steps in fixed.items() if name not in timed}
    if not timed & set(fixed) or not others:
        return
    for name, steps in others.items():
        if any(call.steps == steps != seen.steps for call in seen.calls):
            known = ", ".join(f"{other!r} of {length}" for other, length in fixed.items())
            raise ModelError(
                f"the inputs are sequences of different lengths ({known} time steps), but all sequences of a "
                f"session advance together. Give {quoted(name)} the length of the others, or serve its part of the model "
                "as a separate model"
            )


def _pairs(short: Observation, long: Observation) -> list[tuple[RecurrentCall, RecurrentCall]]:
    """Match the calls that process the sequence; the others run inside one time step and carry no state."""
    by_key = {(id(call.layer), call.number): call for call in long.calls}
    pairs = []
    for call in short.calls:
        other = by_key.get((id(call.layer), call.number))
        if other is None or (call.steps, other.steps) != (short.steps, long.steps):
            continue
        pairs.append((call, other))
    for layer in {id(call.layer): call for call, _ in pairs}.values():
        counts = [sum(call.layer is layer.layer for call in seen.calls) for seen in (short, long)]
        if counts[0] != counts[1]:
            raise ModelError(
                f"layer {quoted(layer.path)} is called {counts[0]} times for {short.steps} time steps "
                f"and {counts[1]} times for {long.steps}: a loop over time outside a recurrent layer cannot be stepped"
            )
    return pairs


def _number_of(call: RecurrentCall, followed: Sequence[tuple[RecurrentCall, RecurrentCall]]) -> int:
    """Return the number of a call among those of its layer that process the sequence."""
    return sum(other.layer is call.layer and other.number < call.number for other, _ in followed)


def _initial(first: RecurrentCall, second: RecurrentCall, *, looks_back: bool) -> Iterator[Array]:
    """Yield the values with which a loop begins; zeros where the first time step determines them."""
    for value, other in zip(first.initial, second.initial, strict=True):
        rows = np.concatenate([value, other])
        is_constant = np.array_equal(rows, np.broadcast_to(rows[0], rows.shape))
        if not is_constant and not looks_back:
            raise ModelError(
                f"the initial state of layer {quoted(first.path)} is computed from the model's inputs "
                "(initial_state=...): such a model cannot be stepped from a session's state"
            )
        yield np.array(rows[0]) if is_constant else np.zeros_like(rows[0])


def _state_names(call: RecurrentCall, keeps: bool, taken: Sequence[StateSpec]) -> list[str]:
    used = {spec.name for spec in taken}
    parts = _cell_parts(call.layer.cell, len(call.initial)) + (["output"] if keeps else [])
    number, prefix = 1, call.path
    while any(f"{prefix}/{part}" in used for part in parts):
        number += 1
        prefix = f"{call.path}#{number}"
    return [f"{prefix}/{part}" for part in parts]


def _cell_parts(cell: Any, count: int) -> list[str]:
    layers = keras.layers
    if isinstance(cell, layers.StackedRNNCells):
        counts = [len(keras.tree.flatten(inner.state_size)) for inner in cell.cells]
        if sum(counts) == count:
            return [
                f"{i}/{part}" for i, inner in enumerate(cell.cells) for part in _cell_parts(inner, counts[i])
            ]
    if count == 2 and (isinstance(cell, layers.LSTMCell) or type(cell).__name__ == "ConvLSTMCell"):
        return ["h", "c"]
    if count == 1 and isinstance(cell, (layers.GRUCell, layers.SimpleRNNCell)):
        return ["h"]
    return ["state"] if count == 1 else [f"state_{i}" for i in range(count)]


def _input_spec(info: Input, timed: bool) -> TensorSpec:
    shape = info.shape[2:] if timed else info.shape[1:]
    if None in shape:
        raise ModelError(
            f"input {quoted(info.name)} must have fixed dimensions after batch and time; it has {info.shape}"
        )
    return TensorSpec(info.name, tuple(int(size or 0) for size in shape), plain_dtype(info.dtype), timed)


def _output_spec(name: str, short: Observation, long: Observation) -> TensorSpec:
    one, two = short.outputs[name], long.outputs[name]
    if one.shape == two.shape:
        return TensorSpec(name, one.shape[1:], one.dtype.name, temporal=False)
    if (one.shape[1], two.shape[1]) == (short.steps, long.steps) and one.shape[2:] == two.shape[2:]:
        return TensorSpec(name, one.shape[2:], one.dtype.name, temporal=True)
    raise ModelError(
        f"output {quoted(name)} has the shape {one.shape} for {short.steps} time steps and {two.shape} for {long.steps}: "
        "it must have one value for each time step, or one for the sequence"
    )
