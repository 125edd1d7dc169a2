"""Whether a layer that mixes time steps looks ahead or back, found by disturbing its input at one time step."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stepwell_server.compile.graph.patch import attribute, relaxed
from stepwell_server.compile.graph.samples import Sampler
from stepwell_server.compile.graph.tensorflow_setup import keras, tf
from stepwell_server.compile.graph.watch import all_operations, recurrent_layers

#: A length that hardly any feature axis has, and the disturbed time steps. They reveal reaches of some hundreds of
#: steps on both sides, also of layers that use the first step or reverse the sequence.
STEPS, _PLACES = 523, (350, 200, 0)
_Call = Callable[[int | None], Any]
"""Calls the layer again on its recorded input, disturbed at a time step or not; returns the first result."""


class Direction(enum.Enum):
    """Which time steps a layer mixes into another one."""

    AHEAD = "later time steps"
    BACK = "earlier time steps"
    UNKNOWN = "unknown: its results have no time axis, or it cannot be called again"


def direction(sampler: Sampler, temporal: Sequence[bool], layer: Any) -> Direction:
    """Return the direction in which a layer of the model looks."""
    interface = sampler.interface
    operation = next((item for item in all_operations(interface.model) if item is layer), None)
    if operation is None:
        return Direction.UNKNOWN
    inputs = sampler.draw(np.random.default_rng(1), temporal, STEPS)
    calls: list[_Call] = []
    try:
        with relaxed(interface.model), contextlib.ExitStack() as stack:
            stack.enter_context(attribute(operation, "call", _recorder(operation, calls)))
            own = list(operation._flatten_layers()) if isinstance(operation, keras.Layer) else []
            for recurrent in recurrent_layers(interface.model).values():
                if any(recurrent is layer for layer in own):
                    continue  # This layer itself is examined.
                stack.enter_context(attribute(recurrent, "inner_loop", _without_loop(recurrent)))
            interface.call(
                [tf.cast(value, info.dtype) for value, info in zip(inputs, interface.inputs, strict=True)]
            )
            return _look(calls)
    except Exception:  # This only improves a message, and Keras and user code may raise anything.
        return Direction.UNKNOWN


def _look(calls: Sequence[_Call]) -> Direction:
    found = Direction.UNKNOWN
    for call in calls:
        usual = call(None)
        if not _has_time(usual):
            continue
        for place in _PLACES:
            disturbed = call(place)
            if _differ(usual[:, :place], disturbed[:, :place]):
                return Direction.AHEAD
            if _differ(usual[:, place + 1 :], disturbed[:, place + 1 :]):
                found = Direction.BACK
    return found


def _without_loop(layer: Any) -> Callable[..., Any]:
    """Return a replacement for a loop over hundreds of steps: random outputs with the shape of the cell's."""

    def inner_loop(sequences: Any, initial_state: Any, **_kwargs: Any) -> Any:
        now = keras.tree.map_structure(lambda x: x[:, 0], sequences)
        last, after = layer.cell(now, initial_state)
        shape = (last.shape[0], keras.tree.flatten(sequences)[0].shape[1], *last.shape[1:])
        noise = np.random.default_rng(3).standard_normal(shape)
        outputs = tf.cast(tf.constant(noise), last.dtype)
        after = after if keras.tree.is_nested(after) else [after]
        return outputs[:, -1], outputs, after

    return inner_loop


def _recorder(operation: Any, calls: list[_Call]) -> Callable[..., Any]:
    original = operation.call

    def call(*args: Any, **kwargs: Any) -> Any:
        if any(_has_time(value) for value in keras.tree.flatten((args, kwargs))):
            calls.append(_again(original, args, kwargs))
        return original(*args, **kwargs)

    return call


def _again(original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    def call(time: int | None) -> Any:
        def given(value: Any) -> Any:
            if time is None or not _has_time(value) or not value.dtype.is_floating:
                return value
            array = np.array(value)
            noise = np.random.default_rng(2).standard_normal(array[:, time].shape)
            # Large enough to change a maximum too.
            array[:, time] += (10 + np.abs(noise)).astype(array.dtype)
            return tf.constant(array)

        changed_args, changed_kwargs = keras.tree.map_structure(given, (args, kwargs))
        return keras.tree.flatten(original(*changed_args, **changed_kwargs))[0]

    return call


def _has_time(value: Any) -> bool:
    return tf.is_tensor(value) and len(value.shape) > 1 and value.shape[1] == STEPS


def _differ(one: Any, two: Any) -> bool:
    first, second = np.asarray(one, np.float64), np.asarray(two, np.float64)
    return bool(np.max(np.abs(first - second), initial=0) > 1e-6 * max(1.0, np.max(np.abs(first), initial=0)))
