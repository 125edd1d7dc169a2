"""The interface of a Keras model: its inputs and outputs by name, and how to call it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.compile.errors import ModelError, quoted
from stepwell_server.compile.graph.tensorflow_setup import keras, tf

Array = npt.NDArray[np.generic]


@dataclasses.dataclass(frozen=True)
class Input:
    """One input as the model declares it."""

    name: str
    shape: tuple[int | None, ...]
    """Including batch and, if present, time; None: any size."""
    dtype: str


@dataclasses.dataclass(frozen=True)
class StateInput:
    """An input of the model that is the initial state of a recurrent layer, and the output that is its state at the end."""

    place: int
    """Its position among the inputs that the model declares."""
    info: Input
    output: str
    layer: Any
    number: int
    """Number of the call of this layer, among those that process the sequence."""
    part: int
    """Position of this tensor in the state of the call."""
    initial: Array
    """The value of one row at the beginning of a session."""


@dataclasses.dataclass(frozen=True)
class Interface:
    """How to call a model with a flat list of tensors."""

    model: Any
    inputs: tuple[Input, ...]
    _pack: Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]]
    _output_names: tuple[str, ...] | None
    """None: known only after a call (subclassed models)."""
    states: tuple[StateInput, ...] = ()
    """Inputs and outputs that sessions keep: they are in neither ``inputs`` nor the result of `call`."""

    @property
    def is_functional(self) -> bool:
        """The model declares its inputs; for a subclassed model only the inputs of its first call are known."""
        return hasattr(getattr(self.model, "_functional", None) or self.model, "_inputs_struct")

    def call(self, tensors: Sequence[Any], *, training: bool | None = False) -> dict[str, Any]:
        """Call the model for inference; return its outputs by name, in its order."""
        args, kwargs = self._pack(self._with_states(tensors))
        result = self.model(*args, training=training, **kwargs)
        flat = keras.tree.flatten(result)
        found = dict(zip(self._output_names or _names_of(result), flat, strict=True))
        kept = {state.output for state in self.states}
        # A decoder may return nothing but its state: users see that.
        return {name: value for name, value in found.items() if name not in kept} or found

    def keeping(self, states: Sequence[StateInput]) -> Interface:
        """Return the interface without these inputs and outputs; they begin with their initial values in each call."""
        places = {state.place for state in states}
        inputs = tuple(info for place, info in enumerate(self.inputs) if place not in places)
        return dataclasses.replace(self, inputs=inputs, states=tuple(states))

    def _with_states(self, tensors: Sequence[Any]) -> list[Any]:
        """Return all inputs that the model declares."""
        found = list(tensors)
        rows = tf.shape(tensors[0])[0] if tensors[0].shape[0] is None else tensors[0].shape[0]
        for state in sorted(self.states, key=lambda state: state.place):
            one = tf.constant(state.initial, state.info.dtype)
            found.insert(state.place, tf.broadcast_to(one, [rows, *one.shape]))
        return found


def describe(model: Any) -> Interface:
    """Return the interface of ``model``.

    Raises:
        ModelError: the model does not know its input shapes, or an input has an unsupported type.
    """
    graph = getattr(model, "_functional", None) or model
    interface = _of_graph(model, graph) if hasattr(graph, "_inputs_struct") else _of_subclass(model)
    for item in interface.inputs:
        if item.dtype == "string":
            raise ModelError(
                f"input {quoted(item.name)} must have a numeric type; it has string. Remove the layer that reads text "
                "(StringLookup, TextVectorization, Hashing) from the model, run it in the client, and send its "
                "result"
            )
        if any(size is None for size in item.shape[2:]):
            raise ModelError(
                f"input {quoted(item.name)} must have fixed dimensions after batch and time; it has the shape {item.shape}: build "
                "the model with their sizes"
            )
    return interface


def _of_graph(model: Any, graph: Any) -> Interface:
    inputs = tuple(
        Input(x.name, tuple(x.shape), keras.backend.standardize_dtype(x.dtype)) for x in graph.inputs
    )
    structure = graph._inputs_struct

    def pack(tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (keras.tree.pack_sequence_as(structure, list(tensors)),), {}

    named = isinstance(graph._outputs_struct, dict)
    names = _names_of(graph._outputs_struct) if named else _unique(graph.output_names)
    return Interface(model, inputs, pack, names)


def _of_subclass(model: Any) -> Interface:
    shapes = getattr(model, "_build_shapes_dict", None)
    if not shapes or not model.built:
        raise ModelError("the model has no known input shape: call it once on data before you save it")
    if len(shapes) > 1:
        return _of_arguments(model, {key.removesuffix("_shape"): value for key, value in shapes.items()})
    (structure,) = shapes.values()
    if isinstance(structure, dict):
        names = tuple(str(key) for key in structure)
        keys = list(structure)
        inputs = tuple(_guessed(name, structure[key]) for name, key in zip(names, keys, strict=True))
        return Interface(model, inputs, lambda x: ((dict(zip(keys, x, strict=True)),), {}), None)
    if _is_shape(structure):
        return Interface(model, (_guessed("input_0", structure),), lambda x: ((x[0],), {}), None)
    inputs = tuple(_guessed(f"input_{i}", shape) for i, shape in enumerate(structure))
    return Interface(model, inputs, lambda x: ((type(structure)(x),), {}), None)


def _of_arguments(model: Any, shapes: dict[str, Any]) -> Interface:
    inputs = tuple(_guessed(name, shape) for name, shape in shapes.items())
    return Interface(model, inputs, lambda x: ((), dict(zip(shapes, x, strict=True))), None)


def _guessed(name: str, shape: Any) -> Input:
    # The file of a subclassed model has no input types. Inputs of an Embedding are found later.
    return Input(name, tuple(shape), "float32")


def _is_shape(value: Any) -> bool:
    return all(size is None or isinstance(size, int) for size in value)


def _names_of(result: Any) -> tuple[str, ...]:
    paths = keras.tree.flatten_with_path(result)
    if isinstance(result, dict):
        return _unique(["/".join(str(part) for part in path) for path, _ in paths])
    return tuple(f"output_{i}" for i in range(len(paths)))


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """Number repeated names: a layer that returns its state appears once per tensor."""
    taken: list[str] = []
    for name in names:
        candidate, count = name, 0
        while candidate in taken or (count and candidate in names):
            count += 1
            candidate = f"{name}_{count}"
        taken.append(candidate)
    return tuple(taken)
