"""Observes one call of the whole model on a sequence: its outputs and the calls of its recurrent layers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.compile.graph.interface import Interface
from stepwell_server.compile.graph.patch import attribute, relaxed
from stepwell_server.compile.graph.tensorflow_setup import keras, tf

Array = npt.NDArray[np.generic]
#: Keras layers that run foreign code.
_FOREIGN = (keras.layers.Lambda, keras.layers.TFSMLayer, keras.layers.JaxLayer, keras.layers.FlaxLayer)


@dataclasses.dataclass(frozen=True)
class RecurrentCall:
    """One call of a recurrent layer."""

    layer: Any
    path: str
    number: int
    """Number of the call of this layer, from 0."""
    steps: int
    """Length of its input sequence."""
    initial: tuple[Array, ...]
    """Its initial state, flattened, ``(batch, ...)`` each."""
    state_dtypes: tuple[str, ...]
    masked: bool
    output_shape: tuple[int, ...]
    """Shape of the output of one row at one time step."""
    output_dtype: str


@dataclasses.dataclass(frozen=True)
class Observation:
    """The result of observing one call of the model."""

    steps: int
    inputs: tuple[Array, ...]
    outputs: dict[str, Array]
    dtypes: dict[str, str]
    """Keras's name of each output's type; ``outputs`` holds bfloat16 as float32."""
    calls: tuple[RecurrentCall, ...]
    """In the order in which they ended."""


def watch(interface: Interface, inputs: Sequence[Array], steps: int) -> Observation:
    """Call the model on ``inputs``, of which temporal ones have ``steps`` time steps."""
    calls: list[RecurrentCall] = []
    with relaxed(interface.model), _recording(interface.model, calls):
        tensors = [tf.cast(value, info.dtype) for value, info in zip(inputs, interface.inputs, strict=True)]
        results = interface.call(tensors)
    outputs = {name: plain(value) for name, value in results.items()}
    dtypes = {name: keras.backend.standardize_dtype(value.dtype) for name, value in results.items()}
    return Observation(steps, tuple(inputs), outputs, dtypes, tuple(calls))


def plain(tensor: Any) -> Array:
    """Return a tensor as an array of a NumPy type: bfloat16 becomes float32, exactly."""
    array = np.asarray(tensor)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def recurrent_layers(model: Any) -> dict[str, Any]:
    """Return every recurrent layer by its path: the names of the enclosing layers and its own."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def walk(layer: Any, prefix: str) -> None:
        for child in layer._layers:
            if id(child) in seen:
                continue
            seen.add(id(child))
            path = f"{prefix}{child.name}"
            if isinstance(child, keras.layers.RNN):
                found[_free(path, found)] = child
            else:
                walk(child, f"{path}/")

    walk(model, "")
    return found


def all_operations(model: Any) -> list[Any]:
    """Return all parts of a model that have a ``call``, each once, without the model itself."""
    found: dict[int, Any] = {}

    def walk(layer: Any) -> None:
        graph = getattr(layer, "_functional", None) or layer
        for child in (*(getattr(graph, "_operations", None) or ()), *layer._layers):
            if id(child) not in found and child is not layer:
                found[id(child)] = child
                if isinstance(child, keras.Layer):
                    walk(child)

    walk(model)
    return [item for item in found.values() if not isinstance(item, keras.layers.InputLayer)]


def is_of_keras_only(model: Any) -> bool:
    """Whether a model consists only of Keras's own layers and operations, and none of them runs foreign code."""
    return all(
        type(operation).__module__.startswith("keras.src.") and not isinstance(operation, _FOREIGN)
        for operation in (model, *all_operations(model))
    )


def _free(path: str, taken: dict[str, Any]) -> str:
    number, candidate = 1, path
    while candidate in taken:
        number += 1
        candidate = f"{path}#{number}"
    return candidate


@contextlib.contextmanager
def _recording(model: Any, calls: list[RecurrentCall]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for path, layer in recurrent_layers(model).items():
            stack.enter_context(attribute(layer, "inner_loop", _recorder(path, layer, calls)))
        yield


def _recorder(path: str, layer: Any, calls: list[RecurrentCall]) -> Any:
    original = layer.inner_loop

    def inner_loop(sequences: Any, initial_state: Any, mask: Any = None, training: Any = False) -> Any:
        last, outputs, states = original(
            sequences=sequences, initial_state=initial_state, mask=mask, training=training
        )
        flat = keras.tree.flatten(initial_state)
        calls.append(
            RecurrentCall(
                layer=layer,
                path=path,
                number=sum(call.layer is layer for call in calls),
                steps=int(keras.tree.flatten(sequences)[0].shape[1]),
                initial=tuple(plain(state) for state in flat),
                state_dtypes=tuple(keras.backend.standardize_dtype(state.dtype) for state in flat),
                masked=keras.tree.flatten(mask)[0] is not None,
                output_shape=tuple(last.shape[1:]),
                output_dtype=keras.backend.standardize_dtype(last.dtype),
            )
        )
        return last, outputs, states

    return inner_loop
