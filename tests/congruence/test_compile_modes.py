"""What a file keeps of how a model is called: states that are kept, training, masks; and numbers of every size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepwell_server.compile.errors import ModelError
from stepwell_server.engine.executors import load_executor
from support.models import zoo
from support.models.programs import compile_model


def _compiled(model: Any, folder: Path) -> Any:
    zoo.randomize(model)
    model.save(folder / "model.keras")
    return compile_model(folder / "model.keras")


def _refused(model: Any, folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        _compiled(model, folder)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_a_period_is_as_keras_has_it_for_a_clock(keras: Any, name: str, tmp_path: Path) -> None:
    """LiteRT's leave [-1, 1] for numbers as large as seconds since 1970."""
    x = keras.Input((None, 1))
    model = keras.Model(
        x, getattr(keras.ops, name)(keras.layers.SimpleRNN(1, return_sequences=True)(x) * 0 + x)
    )
    program = _compiled(model, tmp_path)
    assert program.executor == "tensorflow"
    assert program.executor_reason.startswith(
        f"LiteRT cannot run this model: its {name} is wrong for large numbers; TensorFlow runs it, "
    )
    values = np.array([[1.0], [1e7], [1.7e9], [4e9], [1e15]], np.float32)
    executor = load_executor(program)
    executor.bind(len(values))
    executor.inputs()[0][...] = values
    executor.states()[0][...] = 0
    executor.invoke()
    whole = np.array(model(values[:, None]))[:, 0]
    found: Any = executor.outputs()[0]
    np.testing.assert_allclose(found, whole, atol=2e-5)


def test_a_layer_that_keeps_its_state_from_step_to_step_is_refused(keras: Any, tmp_path: Path) -> None:
    x = keras.Input(batch_shape=(2, 6, 5, 3))
    inner = keras.layers.LSTM(4, stateful=True, name="inner")
    model = keras.Model(
        x, keras.layers.GRU(3, return_sequences=True)(keras.layers.TimeDistributed(inner, name="each")(x))
    )
    said = _refused(model, tmp_path)
    assert "the layer 'each' (TimeDistributed) calls the layer 'inner' (LSTM) once for each time step" in said
    assert "build it with stateful=False" in said


def test_a_layer_that_continues_from_its_own_first_call_is_refused(keras: Any, tmp_path: Path) -> None:
    x = keras.Input(batch_shape=(2, None, 3))
    layer = keras.layers.GRU(3, stateful=True, return_sequences=True, name="twice")
    assert "the layer 'twice' (GRU) is called more than once, and stateful=True" in _refused(
        keras.Model(x, layer(layer(x))), tmp_path
    )


def _always(kind: str) -> Any:
    from stepwell_server.compile.graph.tensorflow_setup import keras

    layers = keras.layers
    x = keras.Input((None, 4))
    if kind == "rnn":
        return keras.Model(x, layers.LSTM(3, dropout=0.5, return_sequences=True, name="on")(x, training=True))
    on = layers.Dropout(0.5, name="on") if kind == "dropout" else layers.BatchNormalization(name="on")
    return keras.Model(x, layers.LSTM(3, return_sequences=True)(on(x, training=True)))


@pytest.mark.parametrize("kind", ["dropout", "statistics", "rnn"])
def test_training_that_is_written_into_a_model_is_refused(kind: str, tmp_path: Path) -> None:
    said = _refused(_always(kind), tmp_path)
    assert "model(x) is not what predict() computes" in said
    assert "the layer 'on' (" in said
    assert "is called with training=True: build the model without it" in said


def test_training_that_changes_nothing_is_served(keras: Any, tmp_path: Path) -> None:
    x = keras.Input((None, 4))
    _compiled(keras.Model(x, keras.layers.LSTM(3, return_sequences=True)(x, training=True)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("value", [-1.0, -999.0, 1e6])
def test_rounding_is_not_tried_on_what_a_mask_looks_for(
    keras: Any, trace_and_probe: Any, value: float
) -> None:
    """A masked time step with another last digit is one that counts: nothing could be compared behind it."""
    from stepwell_server.compile.probe import evidence

    x = keras.Input((None, 2))
    masked = keras.layers.Masking(value)(x)
    traced = trace_and_probe(keras.Model(x, keras.layers.LSTM(3, return_sequences=True)(masked)))
    found = [evidence.compare(traced.plan, sample, sample.outputs, 3e-5) for sample in traced.evidence]
    assert evidence.compared_share(found) > 0.95


def test_the_call_is_compared_with_predict_wherever_a_mode_could_be_on(keras: Any) -> None:
    from stepwell_server.compile.probe.whole_call import has_no_modes
    from support.models.odd_cells import OwnLoop

    x = keras.Input((None, 8, 3))
    inner = keras.layers.Dropout(0.5)(keras.layers.Dense(3)(x))
    plain = keras.Model(x, inner + 1.0)
    assert has_no_modes(plain)
    assert has_no_modes(keras.Sequential([keras.Input((None, 8, 3)), plain]))
    for layer in (
        keras.layers.Lambda(lambda value: value),
        keras.layers.RandomBrightness(0.1),  # which trains by default
        keras.layers.TimeDistributed(OwnLoop(keras.layers.SimpleRNNCell(3))),
    ):
        assert not has_no_modes(keras.Model(x, layer(x)))
    told = keras.Model(x, keras.layers.Dropout(0.5)(x, training=True))
    assert not has_no_modes(told)
    assert not has_no_modes(keras.Sequential([keras.Input((None, 8, 3)), told]))
