"""What one call of the whole model does beside what its layers compute, and no step can do alike.

Keras's layers have modes that a file keeps: ``stateful=True``, which keeps a state from one call to the next,
and a ``training=True`` that is written into the model. Both are left out of what is served; here models are
refused of which that would make something else.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepwell_server.compile.causality.cut import Cuts, all_operations
from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.interface import Interface
from stepwell_server.compile.patch import relaxed
from stepwell_server.compile.samples import Sampler
from stepwell_server.compile.scopes import named
from stepwell_server.compile.tensorflow_setup import keras, tf
from stepwell_server.compile.watch import plain

_STEPS = 5
#: Layers of Keras's own that run others' code.
_FOREIGN = (keras.layers.Lambda, keras.layers.TFSMLayer, keras.layers.JaxLayer, keras.layers.FlaxLayer)
#: Of the largest value: the same operations in another mode may round otherwise.
_SAME = 1e-5


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
                f"model(x) is not what predict() computes: output {name!r} is another with training=False; "
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
