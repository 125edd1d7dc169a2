"""All weights of the file are in the program, or the model is refused: weights are identified by place, not by number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepwell_server.compile.errors import ModelError
from support.models import zoo
from support.models.compiled import Compiled
from support.models.programs import compile_model

pytestmark = [
    # Keras calls numpy in a way that numpy 2 deprecates.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Model 'never_built.*' had a build config:UserWarning"),
    pytest.mark.filterwarnings("ignore:Layer 'the_head' .* unbuilt state:UserWarning"),
]


def tied_embeddings(keras: Any) -> Any:
    from support.models.sharing_layers import TiedTokens

    model = TiedTokens()
    model(np.zeros((2, 5), "int32"))
    return model


def spectral_normalization(keras: Any) -> Any:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((None, 3)),
            layers.LSTM(4, return_sequences=True),
            layers.SpectralNormalization(layers.Dense(2)),
        ]
    )


def layer_used_twice(keras: Any) -> Any:
    x, dense = keras.Input((None, 3)), keras.layers.Dense(3)
    return keras.Model(x, dense(keras.layers.LSTM(3, return_sequences=True)(dense(x))))


def model_used_twice(keras: Any) -> Any:
    layers = keras.layers
    inner = keras.Sequential([keras.Input((None, 3)), layers.Dense(3), layers.GRU(3, return_sequences=True)])
    a, x = keras.Input((None, 3)), keras.Input((None, 3))
    outer = keras.Model(a, inner(layers.Dense(3)(a)))
    return keras.Model(x, outer(outer(x)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "build", [tied_embeddings, spectral_normalization, layer_used_twice, model_used_twice]
)
def test_shared_weights_are_restored(keras: Any, build: Any, tmp_path: Path) -> None:
    model = build(keras)
    zoo.randomize(model)
    model.save(tmp_path / "model.keras")
    compiled = Compiled(build.__name__, model, compile_model(tmp_path / "model.keras"))
    inputs = compiled.draw(1, 3, 6)
    for name, expected in compiled.keras(inputs).items():
        np.testing.assert_allclose(compiled.stepped(inputs, 6)[name], expected, rtol=2e-6, atol=2e-6)


def refusal_of(model: Any, folder: Path) -> str:
    from stepwell_server.compile.keras_file.archive import load_model

    model.save(folder / "model.keras")
    with pytest.raises(ModelError) as caught:
        load_model(folder / "model.keras")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_layers_that_keras_does_not_restore_are_named(tmp_path: Path) -> None:
    """Keras reads nothing for them, and says nothing or only warns."""
    said = refusal_of(zoo.build("weights_not_restored"), tmp_path)
    assert "5 of 5 weights of the model were not restored" in said
    assert "(layers/dense), layer 'lstm_cell' (layers/lstm/cell): " in said
    assert "build_from_config()" in said


def test_one_layer_of_several_that_is_not_restored_is_named(tmp_path: Path) -> None:
    from stepwell_server.compile.graph.tensorflow_setup import keras  # noqa: F401  before any other imports Keras
    from support.models.sharing_layers import ForgetsItsHead

    model = ForgetsItsHead()
    model(np.zeros((2, 5, 3), "float32"))
    said = refusal_of(model, tmp_path)
    assert "2 of 5 weights of the model were not restored, those of layer 'the_head' (head): " in said


def test_a_class_that_has_changed_since_is_named(
    keras: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.models.sharing_layers import Scale

    model = keras.Sequential([keras.Input((None, 3)), Scale(name="scaling"), keras.layers.GRU(3)])
    monkeypatch.setattr(Scale, "variables", 2)
    said = refusal_of(model, tmp_path)
    assert "the weights in the file do not fit: Layer 'scaling' expected 2 variables, but received 1" in said
    assert "--import" in said
