"""Inputs that are whole numbers with a meaning: samples and the user's data hold what the model itself takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepwell_server.compile.errors import ModelError
from support.models.programs import compile_model


def _looked_up(**options: Any) -> Any:
    """A model of words 10, 20 and 30."""
    from stepwell_server.compile.graph.tensorflow_setup import keras

    k = keras.layers
    x = keras.Input((None,), dtype="int64", name="words")
    lookup = k.IntegerLookup(vocabulary=[10, 20, 30], name="lookup", **options)
    return keras.Model(x, k.GRU(3)(k.Embedding(6, 3)(lookup(x))))


def _binned() -> Any:
    from stepwell_server.compile.graph.tensorflow_setup import keras

    k = keras.layers
    x = keras.Input((None,), name="x")
    return keras.Model(x, k.GRU(3)(k.Embedding(4, 3)(k.Discretization([-1.0, 0.0, 1.0])(x))))


def _sampler(model: Any) -> Any:
    from stepwell_server.compile.graph.interface import describe
    from stepwell_server.compile.graph.samples import make_sampler

    return make_sampler(describe(model), [True])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, {10, 20, 30, 31}),
        ({"num_oov_indices": 0}, {10, 20, 30}),
        ({"num_oov_indices": 2, "mask_token": 0}, {0, 10, 20, 30, 31}),
    ],
)
def test_samples_hold_the_words_of_a_vocabulary(options: dict[str, Any], words: set[int]) -> None:
    sampler, rng = _sampler(_looked_up(**options)), np.random.default_rng(1)
    assert set(np.unique(sampler.draw(rng, [True], 200)[0])) == words
    (hard,) = sampler.hard(rng, [True], 200)
    assert set(np.unique(hard)) == words
    (moved,), times = sampler.disturbed(rng, [True], [hard])
    for row, at in times.items():
        assert moved[row, at] != hard[row, at]
    assert set(np.unique(moved)) == words


def test_samples_of_binned_numbers_are_numbers() -> None:
    sampler = _sampler(_binned())
    (drawn,) = sampler.draw(np.random.default_rng(1), [True], 50)
    assert np.any(drawn < 0)
    assert not sampler.tables


@pytest.mark.slow
def test_a_lookup_without_room_for_other_words_is_served_and_equal(tmp_path: Path) -> None:
    from stepwell_server.compile.probe.own_data import compare

    _looked_up(num_oov_indices=0).save(tmp_path / "model.keras")
    program = compile_model(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", np.array([[10, 20, 30, 10]]))
    assert compare(tmp_path / "model.keras", program, tmp_path / "x.npy").outputs[0].is_allowed
    np.save(tmp_path / "x.npy", np.array([[10, 20, 15]]))
    with pytest.raises(
        ModelError, match=r"input 'words' must be in the vocabulary of .*; got 15 at row 0, time step 2"
    ):
        compare(tmp_path / "model.keras", program, tmp_path / "x.npy")


@pytest.mark.slow
def test_ones_own_numbers_may_be_binned(tmp_path: Path) -> None:
    from stepwell_server.compile.probe.own_data import compare

    _binned().save(tmp_path / "model.keras")
    program = compile_model(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", np.array([[-7.5, 0.1, 99.0]]))
    assert compare(tmp_path / "model.keras", program, tmp_path / "x.npy").outputs[0].is_allowed


def test_samples_fit_a_small_table_of_a_layer_of_ones_own(keras: Any, trace_and_probe: Any) -> None:
    class Rows(keras.Layer):
        """A table of three rows that Keras does not know as one."""

        def build(self, _shape: Any) -> None:
            self.table = self.add_weight(shape=(3, 4), name="table")

        def call(self, numbers: Any) -> Any:
            return keras.ops.take(self.table, numbers, axis=0)

    x = keras.Input((None,), dtype="int32")
    traced = trace_and_probe(keras.Model(x, keras.layers.GRU(2)(Rows()(x))))
    assert traced.sampler.integers == 3
    assert traced.proof.unproven == ""
