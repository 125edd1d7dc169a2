"""One time step of a Keras model as a TensorFlow function.

The whole model is called on a sequence of one time step. For each call of a recurrent layer that processes the
sequence, the loop (`RNN.inner_loop`) is replaced by one call of its cell on the input state, and the new state is
returned. Everything else is done by Keras.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from stepwell_server.compile.errors import ModelError, quoted
from stepwell_server.compile.graph.concrete import concrete
from stepwell_server.compile.graph.patch import attribute, relaxed
from stepwell_server.compile.graph.plan import CarriedState, Plan
from stepwell_server.compile.graph.tensorflow_setup import keras, tf
from stepwell_server.compile.graph.watch import recurrent_layers


def trace(plan: Plan) -> Any:
    """Return the concrete function of one time step.

    Its arguments and results are named as in `stepwell_server.program`: ``in_<i>`` and ``state_<i>``,
    ``out_<i>`` and ``next_<i>``, each ``(rows, *shape)``. It reads the model's variables.

    Raises:
        ModelError: the model cannot be traced on one time step.
    """

    def step(**tensors: Any) -> dict[str, Any]:
        time = _TimeAxis()
        carrying = _StateCarrier(plan, [tensors[f"state_{i}"] for i in range(len(plan.state))], time)
        inputs = [_keras_input(plan, i, tensors[f"in_{i}"], time) for i in range(len(plan.inputs))]
        with relaxed(plan.interface.model), carrying.installed():
            results = plan.interface.call(inputs)
        return _results(plan, list(results.values()), carrying, time)

    signature = {
        f"in_{i}": tf.TensorSpec([None, *x.shape], x.dtype, f"in_{i}") for i, x in enumerate(plan.inputs)
    }
    signature |= {
        f"state_{i}": tf.TensorSpec([None, *x.shape], x.dtype, f"state_{i}") for i, x in enumerate(plan.state)
    }
    return concrete(step, **signature)


class _TimeAxis:
    """Adds and removes the time axis of one step.

    To remove an added axis, the original tensor is used again instead of an operation. So no reshape stays in the graph
    between layers, which would break up LiteRT's fast kernels.
    """

    def __init__(self) -> None:
        self._added: dict[int, tuple[Any, Any]] = {}

    def add(self, value: Any) -> Any:
        sequence = tf.expand_dims(value, 1)
        self._added[id(sequence)] = (sequence, value)
        return sequence

    def remove(self, sequence: Any) -> Any:
        _, value = self._added.get(id(sequence), (None, None))
        return tf.squeeze(sequence, 1) if value is None else value


def _keras_input(plan: Plan, i: int, tensor: Any, time: _TimeAxis) -> Any:
    value = tf.cast(tensor, plan.interface.inputs[i].dtype)
    return time.add(value) if plan.inputs[i].temporal else value


def _results(plan: Plan, outputs: Sequence[Any], carrying: _StateCarrier, time: _TimeAxis) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for i, (spec, value) in enumerate(zip(plan.outputs, outputs, strict=True)):
        step = time.remove(value) if spec.temporal else value
        named[f"out_{i}"] = tf.cast(step, spec.dtype)
    for i, (state, value) in enumerate(zip(plan.state, carrying.after, strict=True)):
        if value is None:
            raise ModelError(
                f"the layer of state {quoted(state.name)} is not called on a sequence of one time step"
            )
        named[f"next_{i}"] = tf.cast(value, state.dtype)
    return named


class _StateCarrier:
    """Carries the state through one traced step."""

    def __init__(self, plan: Plan, before: Sequence[Any], time: _TimeAxis) -> None:
        self._plan = plan
        self._time = time
        self._before = before
        self._counts: dict[int, int] = {}
        self.after: list[Any] = [None] * len(plan.state)

    @contextlib.contextmanager
    def installed(self) -> Any:
        """Replace the loops of the recurrent layers."""
        stepped = {key[0] for key in self._plan.carried}
        with contextlib.ExitStack() as stack:
            for layer in self._plan.interface.model._flatten_layers():
                if isinstance(layer, keras.layers.Dense) and type(layer).call is keras.layers.Dense.call:
                    stack.enter_context(attribute(layer, "call", self._dense(layer.call)))
            for layer in recurrent_layers(self._plan.interface.model).values():
                # A layer that processes another axis runs completely inside the step. It is unrolled, because
                # tensor lists of a loop cannot be converted.
                stack.enter_context(attribute(layer, "unroll", True))
                if id(layer) in stepped:
                    stack.enter_context(attribute(layer, "inner_loop", self._loop(layer)))
            yield

    def _dense(self, original: Any) -> Any:
        """Drop a time axis of one step, which does not matter to a Dense layer.

        With it, the product would become a tensordot over shapes known only at run time.
        """

        def call(inputs: Any, **kwargs: Any) -> Any:
            if len(inputs.shape) < 3 or inputs.shape[1] != 1:
                return original(inputs, **kwargs)
            return self._time.add(original(self._time.remove(inputs), **kwargs))

        return call

    def _loop(self, layer: Any) -> Any:
        original = layer.inner_loop

        def inner_loop(sequences: Any, initial_state: Any, mask: Any = None, training: Any = False) -> Any:
            number = self._counts.get(id(layer), 0)
            self._counts[id(layer)] = number + 1
            call = self._plan.carried.get((id(layer), number))
            if call is None:
                return original(
                    sequences=sequences, initial_state=initial_state, mask=mask, training=training
                )
            return self._one_step(layer, call, sequences, initial_state, keras.tree.flatten(mask)[0])

        return inner_loop

    def _one_step(self, layer: Any, call: CarriedState, sequences: Any, initial: Any, mask: Any) -> Any:
        stop = call.first + len(call.dtypes)
        before = [
            tf.cast(value, dtype)
            for value, dtype in zip(self._before[call.first : stop], call.dtypes, strict=True)
        ]
        previous = before.pop() if call.keeps_output else None
        now = keras.tree.map_structure(self._time.remove, sequences)
        output, after = _call_cell(layer.cell, now, keras.tree.pack_sequence_as(initial, before))
        if mask is not None:
            present = mask[:, 0]
            after = [chosen(present, new, old) for new, old in zip(after, before, strict=True)]
            output = chosen(present, output, tf.zeros_like(output) if previous is None else previous)
        self.after[call.first : stop] = [*after, output] if call.keeps_output else after
        return output, self._time.add(output), keras.tree.pack_sequence_as(initial, after)


def _call_cell(cell: Any, now: Any, state: Any) -> tuple[Any, list[Any]]:
    takes_training = isinstance(cell, keras.Layer) and cell._call_has_training_arg
    kwargs = {"training": False} if takes_training else {}
    output, after = cell(now, state, **kwargs)
    return output, keras.tree.flatten(after)


def chosen(present: Any, new: Any, old: Any) -> Any:
    """Return rows of ``new`` where ``present``, else of ``old``: a masked time step changes nothing."""
    present = tf.cast(present, tf.bool)
    return tf.where(tf.reshape(present, [-1] + [1] * (len(new.shape) - 1)), new, old)
