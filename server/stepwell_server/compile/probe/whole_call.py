"""Keras's call of the whole model on sequences, and what of it no step can do alike.

Keras's layers have modes that a file keeps: ``stateful=True``, which keeps a state from one call to the next,
and a ``training=True`` that is written into the model. Both are left out of what is served; here models are
refused of which that would make something else.
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
from stepwell_server.compile.graph.watch import all_operations, plain, recurrent_layers
from stepwell_server.compile.probe.sequences import ROUNDINGS, added_roundings, rounding

_STEPS = 5
#: Layers of Keras's own that run others' code.
_FOREIGN = (keras.layers.Lambda, keras.layers.TFSMLayer, keras.layers.JaxLayer, keras.layers.FlaxLayer)
#: Of the largest value: the same operations in another mode may round otherwise.
_SAME = 1e-5
#: Odd numbers. The top bit of a product with one of them depends on all bits of the other factor.
_MULTIPLIERS = (2654435761, 2246822519)
_Wrapper = Callable[[Any, Callable[..., Any]], Callable[..., Any]]
#: What a cell makes beyond this has grown without bound. Soon it overflows, in one order of a sum and not in another,
#: and LiteRT's sigmoid is not a number from 1e27 on.
_UNBOUNDED = 1e24


class WholeCall:
    """Keras's call of a model on whole sequences, compiled: eager, a loop over time takes seconds.

    It reads the model's variables each time.
    """

    def __init__(self, interface: Interface) -> None:
        self._interface = interface
        self._functions: dict[tuple[Any, ...], Any] = {}

    def __call__(self, inputs: Sequence[Array]) -> dict[str, Array]:
        """Return the outputs by name.

        Raises:
            Exception: whatever Keras and user code raise.
        """
        tensors = self._tensors(inputs)
        key = tuple(tuple(tensor.shape) for tensor in tensors)
        if key not in self._functions:
            self._functions[key] = concrete(lambda *given: self._call(given), *_specs(tensors))
        return {name: plain(value) for name, value in self._functions[key](*tensors).items()}

    def perturbed(
        self, inputs: Sequence[Array], held: frozenset[int], kept: Sequence[float], run: int
    ) -> dict[str, Array]:
        """Return the outputs where some roundings (see `added_roundings`) are added to each value, up or down.

        They are added to the inputs and to what each layer and cell gives, states included, at each time step. What
        a cell gives beyond 1e24 becomes "not a number".
        The same ``run`` (from 0 to 1) adds the same ones.

        Args:
            inputs: one array for each input.
            held: inputs that are indices, which stay as they are.
            kept: values that the model compares with, which stay too: a rounding would turn a masked time step
                into one that counts.
            run: decides about the signs.

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
                # Keras would make a copy of the layer in a TimeDistributed for each time step.
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

    Not to ``held`` inputs, to whole numbers (which may stand for something) and to ``kept`` values.
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
    """Return what wraps an operation's call, so that roundings are added to its results."""
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
    """Return numbers with ``count`` roundings of their type added; a number's bits decide about up or down.

    None crosses a whole number: it may be a bound (of a share, an index), or stand for something by itself.
    """
    one = ROUNDINGS[value.dtype.name]
    wide = value if value.dtype == tf.float64 else tf.cast(value, tf.float32)
    bits = tf.bitcast(tf.cast(value, tf.float32), tf.uint32) * multiplier
    up = tf.cast(tf.bitwise.right_shift(bits, tf.constant(31, tf.uint32)), wide.dtype)
    moved = wide * (1 + count * one * (2 * up - 1))
    bounded = tf.clip_by_value(moved, tf.floor(wide), tf.math.ceil(wide))
    moved = tf.where(tf.abs(wide) < 1 / one, bounded, moved)  # Beyond it all numbers are whole.
    for number in kept:
        moved = tf.where(wide == tf.constant(number, wide.dtype), wide, moved)
    return tf.cast(moved, value.dtype)


def refuse_kept_states(interface: Interface, cuts: Cuts) -> None:
    """Refuse ``stateful=True`` where Keras's call goes on, inside one sequence, from the state that it kept.

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
                    "makes that go on from the state that it kept of the step before; build it with stateful=False to "
                    "have each step by itself, or without TimeDistributed to have a state that a session carries, and load the "
                    "weights into it"
                )
    for call in cuts.first.calls:
        if call.number and _is_stateful(call.layer):
            raise ModelError(
                f"{named(model, call.layer)} is called more than once, and stateful=True makes each call go on from where "
                "the one before it ended; build it with stateful=False, and load the weights into it"
            )


def refuse_training(sampler: Sampler, temporal: Sequence[bool]) -> None:
    """Refuse a model whose call, as it is written, is not what ``predict`` computes: with ``training=False``.

    Raises:
        ModelError: they differ for the same inputs.
    """
    interface = sampler.interface
    if has_no_modes(interface.model):
        return
    inputs = sampler.draw(np.random.default_rng(31), temporal, _STEPS)
    tensors = [tf.cast(value, info.dtype) for value, info in zip(inputs, interface.inputs, strict=True)]
    with relaxed(interface.model, has_dropout=True):
        served = interface.call(tensors)
        written = interface.call(tensors, training=None)
    for name, value in served.items():
        one, two = (np.asarray(plain(x), np.float64) for x in (value, written[name]))
        size = np.max(np.abs(np.nan_to_num(one)), initial=1e-3)
        if not np.allclose(one, two, rtol=0, atol=_SAME * size, equal_nan=True):
            raise ModelError(
                f"model(x) is not what predict() computes: output {quoted(name)} is another with training=False; "
                f"{_culprit(interface.model)}, and load the weights into it"
            )


def has_no_modes(model: Any) -> bool:
    """Whether a model is made of Keras's own layers alone, which without being told do not train, and nothing tells them to."""
    return all(
        type(operation).__module__.startswith("keras.src.")
        and not isinstance(operation, _FOREIGN)
        and not _trains_by_itself(operation)
        and not (isinstance(operation, keras.Layer) and any(map(_is_told, operation._inbound_nodes)))
        for operation in (model, *all_operations(model))
    )


def _trains_by_itself(operation: Any) -> bool:
    training = inspect.signature(type(operation).call).parameters.get("training")
    return training is not None and training.default not in {None, False}


def _is_told(node: Any) -> bool:
    """Whether a call says more than what it is called with: `training=True`, or what nobody here knows."""
    told = keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
    return any(not (value is None or value is False or hasattr(value, "shape")) for value in told)


def _culprit(model: Any) -> str:
    for operation in all_operations(model):
        for node in getattr(operation, "_inbound_nodes", ()):
            if node.arguments.kwargs.get("training") is True:
                return f"{named(model, operation)} is called with training=True: build the model without that"
    return (
        "something in it is on unless it is told training=False: build it so that dropout and batch statistics are on in "
        "training alone"
    )


def _is_stateful(layer: Any) -> bool:
    return isinstance(layer, keras.layers.RNN) and bool(layer.stateful)
