"""Which layer makes a model impossible to step: found by disturbing each layer's input on its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from stepwell_server.compile.interface import Interface
from stepwell_server.compile.patch import attribute, relaxed
from stepwell_server.compile.samples import Sampler
from stepwell_server.compile.tensorflow_setup import keras, tf

#: What a layer does whose results are causal, but of a window of inputs that no state carries.
LOOKS_BACK = "looks back over several time steps and keeps no state, so that one call per time step gives other results"
#: A length that hardly any feature axis has.
STEPS = 11
_Call = Callable[[int | None], Any]
"""Call an operation again on what it was given, one time step disturbed (or none); its first result."""


def culprits(sampler: Sampler, temporal: Sequence[bool]) -> list[str]:
    """Return the layers at fault, each as a clause like "the layer 'x' (Bidirectional) looks ahead"."""
    interface = sampler.interface
    inputs = sampler.draw(np.random.default_rng(1), temporal, STEPS)
    calls: list[tuple[Any, _Call]] = []
    with relaxed(interface.model):
        with _recording(interface, calls):
            interface.call(
                [tf.cast(value, info.dtype) for value, info in zip(inputs, interface.inputs, strict=True)]
            )
        return [clause for operation, call in calls if (clause := _accuse(operation, call))]


def _accuse(operation: Any, call: _Call) -> str:
    """Disturb one time step of what the operation was given, and see which of its results change."""
    who = f"the layer {operation.name!r} ({type(operation).__name__})"
    usual, late, early = call(None), call(STEPS - 1), call(0)
    if _has_time(usual) and _differ(usual[:, :-1], late[:, :-1]):
        return f"{who} looks ahead"
    recurrent = _recurrent_layers(operation)
    if any(layer.go_backwards for layer in recurrent):
        return f"{who} reads its sequence backwards"
    later = slice(1, None) if _has_time(usual) else slice(None)
    if not recurrent and _differ(usual[:, later], early[:, later]):
        what = LOOKS_BACK if _has_time(usual) else "mixes time steps without carrying a state"
        return f"{who} {what}"
    return ""


def _operations(model: Any) -> Iterator[Any]:
    """Yield what a model is made of, models inside it taken apart."""
    graph = getattr(model, "_functional", None) or model
    for operation in getattr(graph, "_operations", None) or graph._layers:
        if isinstance(operation, keras.Model):
            yield from _operations(operation)
        else:
            yield operation


@contextlib.contextmanager
def _recording(interface: Interface, calls: list[tuple[Any, _Call]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for operation in _operations(interface.model):
            stack.enter_context(attribute(operation, "call", _recorder(operation, calls)))
        yield


def _recorder(operation: Any, calls: list[tuple[Any, _Call]]) -> Callable[..., Any]:
    original = operation.call

    def call(*args: Any, **kwargs: Any) -> Any:
        if any(_is_sequence(value) for value in keras.tree.flatten((args, kwargs))):
            calls.append((operation, _again(original, args, kwargs)))
        return original(*args, **kwargs)

    return call


def _again(original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    def call(time: int | None) -> Any:
        def disturbed(value: Any) -> Any:
            return value if time is None or not _is_sequence(value) else _disturbed(value, time)

        changed_args, changed_kwargs = keras.tree.map_structure(disturbed, (args, kwargs))
        return keras.tree.flatten(original(*changed_args, **changed_kwargs))[0]

    return call


def _is_sequence(value: Any) -> bool:
    return _has_time(value) and value.dtype.is_floating


def _has_time(value: Any) -> bool:
    return tf.is_tensor(value) and len(value.shape) > 1 and value.shape[1] == STEPS


def _disturbed(value: Any, time: int) -> Any:
    array = np.array(value)
    noise = np.random.default_rng(2).standard_normal(array[:, time].shape)
    array[:, time] += (1 + np.abs(noise)).astype(array.dtype)
    return tf.constant(array)


def _differ(one: Any, two: Any) -> bool:
    first, second = np.asarray(one, np.float64), np.asarray(two, np.float64)
    return bool(np.max(np.abs(first - second), initial=0) > 1e-6 * max(1.0, np.max(np.abs(first), initial=0)))


def _recurrent_layers(operation: Any) -> list[Any]:
    layers = operation._flatten_layers() if isinstance(operation, keras.Layer) else []
    return [layer for layer in layers if isinstance(layer, keras.layers.RNN)]
