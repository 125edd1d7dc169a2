"""Models that number their time steps, count them, or depend on a length, beyond all lengths of the proof."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from stepwell_server.compile.errors import ModelError
from support.samples import one_in

Kind = Callable[[Any, Any, Any], Any]
#: More than the time steps for which values were compared once: 65,537.
FAR = 70_000


def numbers(ops: Any, x: Any) -> Any:
    return ops.arange(ops.shape(x)[1])


def _column(ops: Any, value: Any) -> Any:
    return ops.cast(value, "float32")[None, :, None]


def _frames(ops: Any, x: Any, places: Any) -> Any:
    return ops.max(ops.take(ops.pad(x, ((0, 0), (2, 0), (0, 0))), places, 1), 2)


def _model(kind: Kind, weights: Any, features: int = 1) -> Any:
    from stepwell_server.compile.graph.tensorflow_setup import keras

    class Numbering(keras.layers.Layer):
        def build(self, _shape: Any) -> None:
            self.table = self.add_weight(shape=np.shape(weights), name="table")
            self.table.assign(weights)

        def call(self, x: Any) -> Any:
            return kind(keras.ops, x, self.table)

        def compute_output_shape(self, shape: Any) -> Any:
            return shape

    x = keras.Input((None, features))
    return keras.Model(x, Numbering(name="numbering")(x))


TABLE = np.random.default_rng(5).uniform(1, 2, (7, 1)).astype(np.float32)
SERVED: dict[str, tuple[Kind, Any]] = {
    "compared": (lambda o, x, _: o.where((numbers(o, x) > FAR)[None, :, None], 0.0, x), 0.0),
    "a threshold in the weights": (
        lambda o, x, w: o.where((o.cast(numbers(o, x), "float32") > w)[None, :, None], 0.0, x),
        np.float32(FAR),
    ),
    "scaled and compared": (
        lambda o, x, _: x * _column(o, o.cast(numbers(o, x), "float32") * 1e-6 < 0.07),
        0.0,
    ),
    "clipped": (lambda o, x, _: x + _column(o, o.maximum(numbers(o, x) - FAR, 0)), 0.0),
    "divided": (lambda o, x, _: x + _column(o, numbers(o, x) // FAR), 0.0),
    "a remainder": (lambda o, x, _: x + _column(o, (numbers(o, x) % 100_000) // FAR), 0.0),
    "one step only": (lambda o, x, _: x + _column(o, o.equal(numbers(o, x), FAR)), 0.0),
    "integers that overflow": (lambda o, x, _: x + _column(o, numbers(o, x) * 30_680 < 0), 0.0),
    "repeated for each row": (
        lambda o, x, _: o.where(o.broadcast_to((numbers(o, x) > FAR)[None, :, None], o.shape(x)), 0.0, x),
        0.0,
    ),
    "a table of the first steps": (
        lambda o, x, w: x + o.take(w, o.minimum(numbers(o, x), 6), 0)[None],
        TABLE,
    ),
    "a table over and over": (lambda o, x, w: x + o.take(w, numbers(o, x) % 7, 0)[None], TABLE),
    "a table by larger steps": (
        lambda o, x, w: x + o.take(w, o.clip(numbers(o, x) // 11_000, 0, 6), 0)[None],
        TABLE,
    ),
}


@pytest.mark.parametrize("name", one_in(4, SERVED))
def test_a_number_of_the_time_step_is_that_of_keras_beyond_all_compared_lengths(
    name: str, trace_and_probe: Any
) -> None:
    model = _model(*SERVED[name])
    traced = trace_and_probe(model)
    x = np.random.default_rng(1).uniform(1, 2, (1, FAR + 3, 1)).astype(np.float32)
    (whole,) = np.asarray(model(x))
    steps = [0, 1, 6, 7, 8, 10_999, 11_000, FAR - 1, FAR, FAR + 1, FAR + 2]
    (state,) = traced.plan.state
    assert (state.name, state.dtype) == ("numbering/steps", "int32")
    found = traced.function(in_0=x[0, steps], state_0=np.array(steps, np.int32))
    np.testing.assert_allclose(found["out_0"], whole[steps], rtol=1e-6)
    np.testing.assert_array_equal(found["next_0"], np.array(steps) + 1)


def _of_samples(kind: Kind) -> Kind:
    """Apply a kind to the four samples of each time step, one after the other."""

    def call(ops: Any, x: Any, weights: Any) -> Any:
        rows, steps = ops.shape(x)[0], ops.shape(x)[1]
        return ops.reshape(kind(ops, ops.reshape(x, (rows, steps * 4, 1)), weights), (rows, steps, 4))

    return call


OF_SAMPLES = (
    "compared",
    "divided",
    "integers that overflow",
    "repeated for each row",
    "a table over and over",
)


@pytest.mark.parametrize("name", one_in(5, OF_SAMPLES))
def test_a_number_of_a_sample_is_that_of_keras_beyond_all_compared_lengths(
    name: str, trace_and_probe: Any
) -> None:
    kind, weights = SERVED[name]
    model = _model(_of_samples(kind), weights, 4)
    traced = trace_and_probe(model)
    steps = FAR // 4 + 3
    x = np.random.default_rng(1).uniform(1, 2, (1, steps, 4)).astype(np.float32)
    (whole,) = np.asarray(model(x))
    chosen = [0, 1, 6, 7, 2749, 2750, steps - 4, steps - 3, steps - 2, steps - 1]
    found = traced.function(in_0=x[0, chosen], state_0=np.array(chosen, np.int32))
    np.testing.assert_allclose(found["out_0"], whole[chosen], rtol=1e-6)
    np.testing.assert_array_equal(found["next_0"], np.array(chosen) + 1)


def test_numbers_of_samples_end_below_those_of_time_steps(trace_and_probe: Any) -> None:
    """No integer is beyond 2,147,483,647: a session then keeps the last four."""
    kind = _of_samples(lambda o, x, _: x + _column(o, numbers(o, x) // 2**20))
    traced = trace_and_probe(_model(kind, 0.0, 4))
    steps = [2**29 - 2, 2**29 - 1, 2**29, 2**31 - 2, 2**31 - 1]
    found = traced.function(in_0=np.zeros((5, 4), np.float32), state_0=np.array(steps, np.int32))
    np.testing.assert_array_equal(found["out_0"], np.full((5, 4), 2047.0))
    np.testing.assert_array_equal(found["next_0"], [2**29 - 1, 2**29, 2**29 + 1, 2**31 - 1, 2**31 - 1])


@pytest.mark.parametrize("shift", one_in(2, (1, 5)))
def test_numbers_of_samples_beside_others_of_a_part_of_a_time_step_are_refused(
    shift: int, trace_and_probe: Any
) -> None:
    kind = _of_samples(
        lambda o, x, _: o.pad(x[:, :-shift], ((0, 0), (shift, 0), (0, 0))) * _column(o, numbers(o, x))
    )
    pattern = rf"counts elements beside others, {shift} elements? apart, but a time step brings 4; pass the"
    with pytest.raises(ModelError, match=pattern):
        trace_and_probe(_model(kind, 0.0, 4))


def _joined_ones(ops: Any, x: Any, _weights: Any) -> Any:
    import tensorflow as tf

    steps = tf.shape(x)[1]
    front = tf.ones((1, tf.minimum(steps, FAR), 1))
    return x * tf.concat([front, tf.zeros((1, tf.maximum(steps - FAR, 0), 1))], 1)


_ENDS = r"looks up the number of each time step in a table of {} rows, which has an end; let the numbers stay within"
_COUNTS = r"step by step: the layer 'numbering' \(Numbering\) has a constant that counts the time steps, and may change beyond"
_COMBINED = (
    r"'numbering' \(Numbering\) combines numbers that count the time steps or rows, of which other sequences have more or "
    r"fewer \(the first n of them are keras.ops.arange\(n\)\); make it independent"
)
_LENGTH = r"'numbering' \(Numbering\) depends on the number of time steps or of rows; make it independent of the length"
REFUSED: dict[str, tuple[Kind, Any, str]] = {
    "a table that ends": (
        lambda o, x, w: x + o.take(w, numbers(o, x), 0)[None],
        np.zeros((FAR, 1), np.float32),
        _ENDS.format(FAR),
    ),
    "a short table": (lambda o, x, w: x + o.take(w, numbers(o, x), 0)[None], TABLE, _ENDS.format(7)),
    "a table whose numbers overflow": (
        lambda o, x, w: x + o.take(w, o.minimum(numbers(o, x) * 70_000, 6), 0)[None],
        TABLE,
        _ENDS.format(7),
    ),
    "a part of a table": (
        lambda o, x, w: x + w[None, : o.shape(x)[1]],
        np.zeros((FAR, 1), np.float32),
        _COUNTS,
    ),
    "a sum of ones": (
        lambda o, x, _: x * _column(o, o.cumsum(o.ones(o.shape(x)[1])) > FAR),
        0.0,
        _COUNTS,
    ),
    "equal shares": (lambda o, x, _: x * _column(o, o.linspace(0.0, 1.0, o.shape(x)[1]) > 2.0), 0.0, _COUNTS),
    "a length": (lambda o, x, _: x * o.where(o.shape(x)[1] > FAR, 2.0, 1.0), 0.0, _LENGTH),
    "a length in Python": (
        lambda o, x, _: o.tanh(x) if (x.shape[1] or 0) > FAR else o.relu(x),
        0.0,
        "computes something different for another number of time steps",
    ),
    "a factor in Python": (lambda _, x, __: x * (2.0 if (x.shape[1] or 0) > FAR else 1.0), 0.0, _LENGTH),
    "any of all numbers": (lambda o, x, _: x * o.cast(o.any(numbers(o, x) > FAR), "float32"), 0.0, _COMBINED),
    "the first numbers": (lambda o, x, _: x * o.cast(o.sum(numbers(o, x)[:5]), "float32"), 0.0, _COMBINED),
    "ones and later zeros": (_joined_ones, 0.0, "different constant for each time step"),
    "rows beyond some": (
        lambda o, x, _: x * o.cast(o.arange(o.shape(x)[0]) < 1000, "float32")[:, None, None],
        0.0,
        "independent of each other: .* has a constant that counts the rows of the batch",
    ),
    "frames that end": (
        lambda o, x, _: _frames(o, x, o.minimum(numbers(o, x)[:, None] + o.arange(3)[None], FAR)),
        0.0,
        "takes elements by their number along the time axis",
    ),
    "frames with a knee": (
        lambda o, x, _: _frames(
            o, x, (numbers(o, x) + o.maximum(numbers(o, x) - FAR, 0))[:, None] + o.arange(3)[None]
        ),
        0.0,
        "takes elements by their number along the time axis",
    ),
    "the step of a number at most": (
        lambda o, x, _: o.take(x, o.minimum(numbers(o, x), FAR), 1),
        0.0,
        "takes elements by their number along the time axis",
    ),
}


@pytest.mark.parametrize("name", one_in(4, REFUSED))
def test_a_change_beyond_all_compared_lengths_is_refused(name: str, trace_and_probe: Any) -> None:
    kind, weights, pattern = REFUSED[name]
    with pytest.raises(ModelError, match=pattern):
        trace_and_probe(_model(kind, weights))


@pytest.mark.slow
def test_numbers_of_numpy_are_compared_over_many_more_time_steps(trace_and_probe: Any) -> None:
    """Nothing but their values shows what they are."""

    def kind(_ops: Any, x: Any, _weights: Any) -> Any:
        return x * (np.arange(x.shape[1] or 5) <= FAR).astype("float32")[None, :, None]

    with pytest.raises(ModelError, match="has a different constant for each time step"):
        trace_and_probe(_model(kind, 0.0))


@pytest.mark.slow
def test_frames_by_numbers_are_still_served(trace_and_probe: Any) -> None:
    kinds: list[Kind] = [
        lambda o, x, _: _frames(o, x, numbers(o, x)[:, None] + o.arange(3)[None]),
        lambda o, x, _: o.max(o.take(x, o.maximum(numbers(o, x)[:, None] + o.arange(-2, 1)[None], 0), 1), 2),
    ]
    for kind in kinds:
        assert not trace_and_probe(_model(kind, 0.0)).proof.unproven


@pytest.mark.slow
def test_late_time_steps_are_compared_with_tensorflow(trace_and_probe: Any) -> None:
    from stepwell_server.compile.probe.extremes import worst_at_extremes
    from stepwell_server.compile.probe.sequences import step_of_function

    traced = trace_and_probe(_model(lambda o, x, _: x + o.sqrt(_column(o, numbers(o, x))), 0.0))
    step = step_of_function(traced.plan, traced.function)

    def wrong(inputs: Any, states: Any) -> Any:
        outputs, after = step(inputs, states)
        late: npt.NDArray[np.bool_] = np.asarray(states[0]) > 1_000_000
        return [np.where(late[:, None], 0.0, outputs[0])], after

    assert worst_at_extremes(traced, step) == ""
    assert "for inputs, or numbers of time steps, of the size 1e+07" in worst_at_extremes(traced, wrong)
