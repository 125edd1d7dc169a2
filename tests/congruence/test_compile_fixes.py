"""Refusals that name a fix: it is in the message, and it works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepwell_server.compile.errors import ModelError
from stepwell_server.engine.executors import load_executor
from stepwell_server.program import Program, ProofOptions
from support.models import zoo
from support.models.mixing_steps import odd
from support.models.programs import compile_model


def _compiled(model: Any, folder: Path) -> Program:
    zoo.randomize(model)
    model.save(folder / "model.keras")
    return compile_model(folder / "model.keras")


def _stepped(program: Program, inputs: list[Any], states: list[Any] | None = None) -> Any:
    """Step through sequences; returns the first output of each time step."""
    from stepwell_server.compile.probe.sequences import at
    from stepwell_server.engine.executors.step_function import initial_rows, step_of_executor

    step = step_of_executor(load_executor(program))
    steps = next(value.shape[1] for value, spec in zip(inputs, program.inputs, strict=True) if spec.temporal)
    now: Any = states or initial_rows(program.initial, len(inputs[0]))
    seen = []
    for time in range(steps):
        outputs, now = step(at(program, inputs, time), now)
        seen.append(outputs[0])
    return np.stack(seen, 1)


@pytest.mark.slow
def test_a_series_of_fixed_length_that_is_reshaped(keras: Any, tmp_path: Path) -> None:
    def built(length: int | None) -> Any:
        x = keras.Input((length,))
        series = keras.layers.Reshape((length or -1, 1), name="shape")(x)
        return keras.Model(x, keras.layers.LSTM(4, return_sequences=True)(series))

    fixed = built(30)
    with pytest.raises(
        ModelError,
        match=r"accepts only sequences of 30 time steps.*the layer 'shape' \(Reshape\) fails on another length.*"
        r"keras\.Input\(\(None, \.\.\.\)\) and Reshape\(\(-1, 1\)\) instead of 'shape', and load the weights",
    ):
        _compiled(fixed, tmp_path)
    free = built(None)
    program = _compiled(free, tmp_path)
    free.set_weights(fixed.get_weights())  # What the message tells people to do.
    program = _compiled(free, tmp_path)
    x = np.random.default_rng(1).standard_normal((2, 30)).astype("float32")
    np.testing.assert_allclose(_stepped(program, [x]), np.array(fixed(x)), rtol=2e-5, atol=2e-6)


@pytest.mark.slow
def test_static_features_that_are_repeated(keras: Any, tmp_path: Path) -> None:
    def built(length: int | None) -> Any:
        x, s = keras.Input((length, 3), name="x"), keras.Input((2,), name="s")
        if length:
            spread = keras.layers.RepeatVector(length, name="again")(s)
        else:
            spread = keras.ops.expand_dims(s, 1) * keras.ops.ones_like(x[:, :, :1])
        joined = keras.layers.Concatenate()([x, spread])
        return keras.Model([x, s], keras.layers.GRU(4, return_sequences=True)(joined))

    fixed = built(24)
    with pytest.raises(
        ModelError,
        match=r"accepts only sequences of 24 time steps.*instead of 'again' repeat with "
        r"keras\.ops\.expand_dims\(s, 1\) \* keras\.ops\.ones_like\(x\[:, :, :1\]\)",
    ):
        _compiled(fixed, tmp_path)
    free = built(None)
    program = _compiled(free, tmp_path)
    fixed.set_weights(free.get_weights())
    rng = np.random.default_rng(2)
    x, s = rng.standard_normal((2, 24, 3)).astype("float32"), rng.standard_normal((2, 2)).astype("float32")
    named = {"x": x, "s": s}
    stepped = _stepped(program, [named[spec.name] for spec in program.inputs])
    np.testing.assert_allclose(stepped, np.array(fixed([x, s])), rtol=2e-5, atol=2e-6)
    # Keras takes a sum of these for one with a bias where one row has as many time steps as features.
    for rows, steps in ((1, 2), (1, 1), (2, 2), (1, 24)):
        one, other = named["x"][:rows, :steps], named["s"][:rows]
        whole = np.array(free([one, other]))
        arrays = {"x": one, "s": other}
        stepped = _stepped(program, [arrays[spec.name] for spec in program.inputs])
        np.testing.assert_allclose(stepped, whole, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
def test_a_decoder_whose_initial_state_is_an_input(keras: Any, tmp_path: Path) -> None:
    x, h, c = keras.Input((None, 3)), keras.Input((4,)), keras.Input((4,))
    decoder = keras.layers.LSTM(4, return_sequences=True, name="decoder")
    whole = keras.Model([x, h, c], decoder(x, initial_state=[h, c]))
    with pytest.raises(
        ModelError,
        match=r"the layer 'decoder' \(LSTM\) takes its initial state from the model's inputs.*remove the state inputs "
        r".*open_session\(\) or reset_states\(\)",
    ):
        _compiled(whole, tmp_path)
    alone = keras.Input((None, 3))
    program = _compiled(keras.Model(alone, decoder(alone)), tmp_path)
    rng = np.random.default_rng(3)
    values = [rng.standard_normal(shape).astype("float32") for shape in ((2, 20, 3), (2, 4), (2, 4))]
    stepped = _stepped(program, values[:1], values[1:])
    np.testing.assert_allclose(stepped, np.array(whole(values)), rtol=2e-5, atol=2e-6)


def test_a_model_without_recurrent_layers_takes_its_fixed_axes_as_features(
    keras: Any, tmp_path: Path
) -> None:
    x = keras.Input((16,), name="x")
    program = _compiled(keras.Model(x, keras.layers.Dense(1)(x)), tmp_path)
    assert [(spec.shape, spec.temporal) for spec in program.inputs] == [((16,), False)]
    assert [(spec.shape, spec.temporal) for spec in program.outputs] == [((1,), False)]


def test_a_chaotic_cell_is_not_refused_for_rounding(trace_and_probe: Any, keras: Any, tmp_path: Path) -> None:
    """The logistic map doubles a rounding with every step: after some forty there is nothing to compare."""

    class Logistic(keras.Layer):
        """A cell of one number."""

        state_size = 1
        output_size = 1

        def call(self, inputs: Any, states: Any) -> Any:
            mixed = keras.ops.sigmoid(states[0] * 6 - 3 + inputs * 0.1)
            after = 3.99 * mixed * (1 - mixed)
            return after, [after]

    x = keras.Input((None, 1))
    rnn = keras.layers.RNN(Logistic(), return_sequences=True)
    assert trace_and_probe(keras.Model(x, rnn(x))).proof.unproven == ""


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        ("int8", -128, 127),
        pytest.param("uint8", 0, 255, marks=pytest.mark.slow),
    ],
)
def test_a_cast_beyond_the_range_of_its_integers(
    keras: Any, tmp_path: Path, dtype: str, low: int, high: int
) -> None:
    def built(clip: Callable[[Any], Any]) -> Any:
        x = keras.Input((None, 4))
        whole = keras.ops.cast(clip(x * 100), dtype)
        rnn = keras.layers.SimpleRNN(3, return_sequences=True)
        return keras.Model(x, rnn(keras.ops.cast(whole, "float32") * 0.01))

    with pytest.raises(
        ModelError,
        match=rf"the operation 'cast\w*' \(Cast\) casts floats to {dtype}, which is undefined for numbers below {low} or "
        rf"above {high}: Keras itself gives other results .* with keras\.ops\.clip\(x, {low}, {high}\) \(output ",
    ):
        _compiled(built(lambda x: x), tmp_path)
    program = _compiled(built(lambda x: keras.ops.clip(x, low, high)), tmp_path)
    assert not program.proof.unproven
    assert program.proof.compared == 1


@pytest.mark.slow
def test_a_cast_is_not_blamed_for_what_another_layer_does(keras: Any, tmp_path: Path) -> None:
    x = keras.Input((None, 4))
    lagging = odd("lag_by_masked_gather", 16)(keras.layers)(x)
    whole = keras.ops.cast(keras.ops.clip(lagging, -100, 100), "int8")
    model = keras.Model(x, keras.layers.SimpleRNN(3)(keras.ops.cast(whole, "float32") * 0.1))
    zoo.randomize(model)
    model.save(tmp_path / "model.keras")
    with pytest.raises(
        ModelError, match=r"the layer 'lag_by_masked_gather' \(Apply\) differs first"
    ) as caught:
        compile_model(tmp_path / "model.keras", options=ProofOptions(trust=True))
    assert "undefined" not in str(caught.value)


def test_a_cell_without_its_constants_is_refused(trace_and_probe: Any, keras: Any) -> None:
    class Conditioned(keras.Layer):
        """A cell for Keras 2, which passed constants."""

        state_size = 4

        def call(self, inputs: Any, states: Any, constants: Any = None) -> Any:
            after = keras.ops.tanh(inputs + states[0] + constants[0])
            return after, [after]

    x = keras.Input((None, 4))
    with pytest.raises(
        ModelError,
        match=r"the layer 'conditioned' \(Conditioned\) uses an argument of its call\(\) that is None.*Keras 3 passes no "
        r"constants to a cell.*; pass what it needs as features of each time step, or keep it in a weight",
    ):
        trace_and_probe(keras.Model(x, keras.layers.RNN(Conditioned())(x)))


def test_weights_of_a_bidirectional_cannot_be_kept(trace_and_probe: Any, keras: Any) -> None:
    x = keras.Input((None, 4))
    both = keras.layers.Bidirectional(keras.layers.LSTM(3, return_sequences=True))
    with pytest.raises(
        ModelError, match=r"use forward layers.*; train the model again: its weights cannot be reused"
    ):
        trace_and_probe(keras.Model(x, both(x)))


@pytest.mark.parametrize(
    "kind",
    [
        "Conv1D",
        pytest.param("Bidirectional", marks=pytest.mark.slow),
        pytest.param("Flatten", marks=pytest.mark.slow),
        "output",
    ],
)
def test_a_refusal_shortens_long_names(trace_and_probe: Any, keras: Any, kind: str) -> None:
    name = "n" * 200_000
    x = keras.Input((None, 4))
    match kind:
        case "Conv1D":
            model = keras.Model(x, keras.layers.Conv1D(3, 3, padding="same", name=name)(x))
        case "Bidirectional":
            model = keras.Model(x, keras.layers.Bidirectional(keras.layers.LSTM(3), name=name)(x))
        case "Flatten":
            x = keras.Input((6, 4))
            flat = keras.layers.Flatten(name=name)(keras.layers.LSTM(2, return_sequences=True)(x))
            model = keras.Model(x, keras.layers.Dense(2)(flat))
        case _:
            model = keras.Model(x, {name: odd("lag_by_masked_gather", 18)(keras.layers)(x)})
    options = ProofOptions(trust=kind == "output")
    with pytest.raises(ModelError, match=r"n{100}\.\.\. \(200000 characters\)") as caught:
        trace_and_probe(model, options=options)
    assert len(str(caught.value)) < 2000
