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

#: A length that hardly any feature axis has.
STEPS = 11


def culprits(sampler: Sampler, temporal: Sequence[bool]) -> list[str]:
    """Return the layers at fault, each as a clause like "the layer 'x' (Bidirectional) looks ahead"."""
    interface = sampler.interface
    inputs = sampler.draw(np.random.default_rng(1), temporal, STEPS)
    calls: list[tuple[Any, Callable[[Any], Any], Any]] = []
    with relaxed(interface.model):
        with _recording(interface, calls):
            interface.call(
                [tf.cast(value, info.dtype) for value, info in zip(inputs, interface.inputs, strict=True)]
            )
        return [clause for operation, call, value in calls if (clause := _accuse(operation, call, value))]


def _accuse(operation: Any, call: Callable[[Any], Any], value: Any) -> str:
    who = f"the layer {operation.name!r} ({type(operation).__name__})"
    if getattr(operation, "go_backwards", False):
        return f"{who} reads its sequence backwards"
    usual = _first(call(value))
    if _has_time(usual):
        ahead = _first(call(_disturbed(value, STEPS - 1)))
        if _differ(usual[:, :-1], ahead[:, :-1]):
            return f"{who} looks ahead"
    if _is_recurrent(operation):
        return ""
    behind = _first(call(_disturbed(value, 0)))
    later = slice(1, None) if _has_time(usual) else slice(None)
    if _has_time(usual) and _differ(usual[:, later], behind[:, later]):
        return f"{who} mixes time steps without carrying a state"
    if not _has_time(usual) and _differ(usual, behind):
        return f"{who} mixes time steps without carrying a state"
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
def _recording(interface: Interface, calls: list[tuple[Any, Callable[[Any], Any], Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for operation in _operations(interface.model):
            stack.enter_context(attribute(operation, "call", _recorder(operation, calls)))
        yield


def _recorder(operation: Any, calls: list[tuple[Any, Callable[[Any], Any], Any]]) -> Callable[..., Any]:
    original = operation.call

    def call(*args: Any, **kwargs: Any) -> Any:
        if args and _has_time(args[0]) and args[0].dtype.is_floating:
            again = _again(original, args[1:], kwargs)
            calls.append((operation, again, args[0]))
        return original(*args, **kwargs)

    return call


def _again(original: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda value: original(value, *rest, **kwargs)


def _has_time(value: Any) -> bool:
    return tf.is_tensor(value) and len(value.shape) > 1 and value.shape[1] == STEPS


def _disturbed(value: Any, time: int) -> Any:
    array = np.array(value)
    noise = np.random.default_rng(2).standard_normal(array[:, time].shape)
    array[:, time] += (1 + np.abs(noise)).astype(array.dtype)
    return tf.constant(array)


def _first(result: Any) -> Any:
    return keras.tree.flatten(result)[0]


def _differ(one: Any, two: Any) -> bool:
    first, second = np.asarray(one, np.float64), np.asarray(two, np.float64)
    return bool(np.max(np.abs(first - second), initial=0) > 1e-6 * max(1.0, np.max(np.abs(first), initial=0)))


def _is_recurrent(operation: Any) -> bool:
    layers = operation._flatten_layers() if isinstance(operation, keras.Layer) else []
    return any(isinstance(layer, keras.layers.RNN) for layer in layers)
