"""Keras's call of the whole model on sequences, and refusals of modes that a step cannot reproduce.

A file may contain modes of Keras's layers: ``stateful=True``, which keeps a state between calls, and a hard-coded
``training=True``. Served models run without both, so models whose results would change are refused.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stepwell_server.compile.causality.cut import Cuts, time_distributed
from stepwell_server.compile.errors import ModelError, quoted
from stepwell_server.compile.graph.concrete import concrete
from stepwell_server.compile.graph.interface import Interface
from stepwell_server.compile.graph.patch import attribute, relaxed
from stepwell_server.compile.graph.samples import Array, Sampler
from stepwell_server.compile.graph.scopes import named
from stepwell_server.compile.graph.tensorflow_setup import keras, tf
from stepwell_server.compile.graph.watch import all_operations, is_of_keras_only, plain, recurrent_layers
from stepwell_server.compile.probe.sequences import ROUNDINGS, added_roundings, rounding

#: Relative to the largest value: the same operations in another mode may round differently.
_SAME = 1e-5
#: Odd numbers: the top bit of a product depends on all bits of the other factor.
_MULTIPLIERS = (2654435761, 2246822519)
_Wrapper = Callable[[Any, Callable[..., Any]], Callable[..., Any]]
#: Larger results of a cell count as unbounded. They soon overflow, depending on the order of a sum, and LiteRT's
#: sigmoid returns NaN from 1e27 on.
_UNBOUNDED = 1e24


class WholeCall:
    """Keras's call of a model on whole sequences, compiled, because an eager loop over time takes seconds.

    It reads the model's variables in each call.
    """

    def __init__(self, interface: Interface) -> None:
        self._interface = interface
        self._functions: dict[tuple[Any, ...], Any] = {}

    def __call__(self, inputs: Sequence[Array]) -> dict[str, Array]:
        """Return the outputs by name.

        Raises:
            Exception: anything that Keras and user code raise.
        """
        tensors = self._tensors(inputs)
        key = tuple(tuple(tensor.shape) for tensor in tensors)
        if key not in self._functions:
            self._functions[key] = concrete(lambda *given: self._call(given), *_specs(tensors))
        return {name: plain(value) for name, value in self._functions[key](*tensors).items()}

    def perturbed(
        self, inputs: Sequence[Array], held: frozenset[int], kept: Sequence[float], run: int
    ) -> dict[str, Array]:
        """Return the outputs after adding some roundings (see `added_roundings`) to each value, up or down.

        They are added to the inputs and to the results of each layer and cell, including states, at each time step.
        Results of a cell beyond 1e24 become NaN.

        The same ``run`` (0 or 1) adds the same roundings.

        Args:
            inputs: one array per input.
            held: inputs that are indices, which do not change.
            kept: values that the model compares with, which do not change either: a rounding would unmask a masked
                time step.
            run: determines the signs.

        Raises:
            Exception: whatever Keras and user code raise.
        """
        model = self._interface.model
        tensors = self._tensors(perturbed_inputs(model, inputs, held, kept, seed=run))
        multiplier = tf.constant(_MULTIPLIERS[run], tf.uint32)
        key = (tuple(kept), *(tuple(tensor.shape) for tensor in tensors))
        if key not in self._functions:
            signature = _specs([multiplier, *tensors])
            self._functions[key] = concrete(
                lambda multiplier, *given: self._call(given, _perturbing(model, kept, multiplier)), *signature
            )
        return {name: plain(value) for name, value in self._functions[key](multiplier, *tensors).items()}

    def _tensors(self, inputs: Sequence[Array]) -> list[Any]:
        casts = zip(inputs, self._interface.inputs, strict=True)
        return [tf.cast(value, info.dtype) for value, info in casts]

    def _call(self, tensors: Sequence[Any], wrapper: _Wrapper | None = None) -> dict[str, Any]:
        model = self._interface.model
        with relaxed(model), contextlib.ExitStack() as stack:
            for layer in recurrent_layers(model).values():
                stack.enter_context(attribute(layer, "unroll", False))
            for operation in all_operations(model):
                # Keras would copy the layer in a TimeDistributed for each time step.
                merged = time_distributed(operation)
                if wrapper is not None:
                    call = wrapper(operation, merged or operation.call)
                    stack.enter_context(attribute(operation, "call", call))
                elif merged is not None:
                    stack.enter_context(attribute(operation, "call", merged))
            return self._interface.call(tensors)


def _specs(tensors: Sequence[Any]) -> list[Any]:
    return [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]


def perturbed_inputs(
    model: Any, inputs: Sequence[Array], held: frozenset[int], kept: Sequence[float], seed: int
) -> list[Array]:
    """Return inputs with some roundings added to each number, up or down.

    ``held`` inputs, integers (which may be codes) and ``kept`` values do not change.
    """
    rng, size = np.random.default_rng(seed), added_roundings(model) * rounding(model)
    found: list[Array] = []
    for i, value in enumerate(inputs):
        if i in held or not np.issubdtype(value.dtype, np.floating) or np.array_equal(value, np.rint(value)):
            found.append(value)
            continue
        signs = rng.choice([-1.0, 1.0], value.shape)
        moved = np.asarray(value.astype(np.float64) * (1 + signs * size), value.dtype)
        exact = np.isin(value, np.asarray(kept, value.dtype))
        found.append(np.where(exact, value, moved))
    return found


def _perturbing(model: Any, kept: Sequence[float], multiplier: Any) -> _Wrapper:
    """Return a wrapper that adds roundings to the results of an operation's call."""
    count = added_roundings(model)
    cells = {id(layer.cell) for layer in recurrent_layers(model).values()}

    def wrapper(operation: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        def one(value: Any) -> Any:
            if not isinstance(value, tf.Tensor) or value.dtype.name not in ROUNDINGS:
                return value
            moved = _moved(value, count, kept, multiplier)
            if id(operation) in cells:
                is_unbounded = tf.abs(tf.cast(value, tf.float32)) > _UNBOUNDED
                moved = tf.where(is_unbounded, tf.constant(math.nan, value.dtype), moved)
            mask = getattr(value, "_keras_mask", None)
            if mask is not None:
                moved._keras_mask = mask
            return moved

        def call(*args: Any, **kwargs: Any) -> Any:
            return keras.tree.map_structure(one, original(*args, **kwargs))

        return call

    return wrapper


def _moved(value: Any, count: int, kept: Sequence[float], multiplier: Any) -> Any:
    """Return numbers with ``count`` roundings of their type added; the bits of a number determine the direction.

    No number crosses an integer, which may be a bound (of a share, an index) or a code.
    """
    one = ROUNDINGS[value.dtype.name]
    wide = value if value.dtype == tf.float64 else tf.cast(value, tf.float32)
    bits = tf.bitcast(tf.cast(value, tf.float32), tf.uint32) * multiplier
    up = tf.cast(tf.bitwise.right_shift(bits, tf.constant(31, tf.uint32)), wide.dtype)
    moved = wide * (1 + count * one * (2 * up - 1))
    bounded = tf.clip_by_value(moved, tf.floor(wide), tf.math.ceil(wide))
    moved = tf.where(tf.abs(wide) < 1 / one, bounded, moved)  # Larger numbers are all integers.
    for number in kept:
        moved = tf.where(wide == tf.constant(number, wide.dtype), wide, moved)
    return tf.cast(moved, value.dtype)


def refuse_kept_states(interface: Interface, cuts: Cuts) -> None:
    """Refuse ``stateful=True`` if Keras's call continues from a kept state within one sequence.

    Raises:
        ModelError: a stateful layer is inside a TimeDistributed, or called more than once.
    """
    model = interface.model
    for operation in all_operations(model):
        if not isinstance(operation, keras.layers.TimeDistributed):
            continue
        for layer in (operation.layer, *operation.layer._flatten_layers()):
            if _is_stateful(layer):
                raise ModelError(
                    f"{named(model, operation)} calls {named(model, layer)} once for each time step, and stateful=True "
                    "makes it continue from the state of the step before; build it with stateful=False for "
                    "independent steps, or without TimeDistributed for a state that a session carries, and load the "
                    "weights into it"
                )
    for call in cuts.first.calls:
        if call.number and _is_stateful(call.layer):
            raise ModelError(
                f"{named(model, call.layer)} is called more than once, and stateful=True makes each call continue from the "
                "state of the one before; build it with stateful=False, and load the weights into it"
            )


def refuse_training(sampler: Sampler, temporal: Sequence[bool], steps: int) -> None:
    """Refuse a model whose default call differs from ``predict``, which uses ``training=False``, on ``steps`` time steps.

    Raises:
        ModelError: they differ for the same inputs.
    """
    interface = sampler.interface
    if has_no_modes(interface.model):
        return
    inputs = sampler.draw(np.random.default_rng(31), temporal, steps)
    tensors = [tf.cast(value, info.dtype) for value, info in zip(inputs, interface.inputs, strict=True)]
    with relaxed(interface.model, has_dropout=True):
        served = interface.call(tensors)
        written = interface.call(tensors, training=None)
    for name, value in served.items():
        one, two = (np.asarray(plain(x), np.float64) for x in (value, written[name]))
        size = np.max(np.abs(np.nan_to_num(one)), initial=1e-3)
        if not np.allclose(one, two, rtol=0, atol=_SAME * size, equal_nan=True):
            raise ModelError(
                f"model(x) is not what predict() computes: output {quoted(name)} differs with training=False; "
                f"{_culprit(interface.model)}, and load the weights into it"
            )


def has_no_modes(model: Any) -> bool:
    """Whether a model consists only of Keras's own layers, and none of them runs in training mode."""
    return is_of_keras_only(model) and all(
        not _trains_by_itself(operation)
        and not (
            isinstance(operation, keras.Layer) and any(map(_has_mode_argument, operation._inbound_nodes))
        )
        for operation in (model, *all_operations(model))
    )


def _trains_by_itself(operation: Any) -> bool:
    training = inspect.signature(type(operation).call).parameters.get("training")
    return training is not None and training.default not in {None, False}


def _has_mode_argument(node: Any) -> bool:
    """Whether a call has arguments other than tensors: `training=True`, or unknown ones."""
    arguments = keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
    return any(not (value is None or value is False or hasattr(value, "shape")) for value in arguments)


def _culprit(model: Any) -> str:
    for operation in all_operations(model):
        for node in getattr(operation, "_inbound_nodes", ()):
            if node.arguments.kwargs.get("training") is True:
                return f"{named(model, operation)} is called with training=True: build the model without it"
    return (
        "one of its layers runs in training mode by default: build it so that dropout and batch statistics are active in "
        "training only"
    )


def _is_stateful(layer: Any) -> bool:
    return isinstance(layer, keras.layers.RNN) and bool(layer.stateful)
