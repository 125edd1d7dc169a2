"""The article's second system, which is Predict, and its wish, which is a session.

The wish: "pass single sample through the LSTM as well as being able to train in batches".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import stepwell
from stepwell.testing import LocalServer
from stepwell_server.compile.graph.tensorflow_setup import keras
from support.models import article, programs
from support.models.article import NODES, Floats

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # Keras's own, when saving

#: Both sides compute in float32, but sum in another order and with other approximations of tanh and exp. One
#: such difference is about 1e-7 of a value near 1; some dozens of them add up within a step or a sequence.
TOLERANCE = 5e-6
BATCH_SIZES = (1, 3, 10, 64)
OUT, HIDDEN, CELL = "out", "lstm", "lstm_1"  # the article's three outputs


class Served(NamedTuple):
    client: stepwell.Client
    stateless: keras.Model
    trained: keras.Model


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    trained = train_in_batches()
    saved = {
        "stateless": programs.saved("stateless-scaled", article.stateless_model, kept=programs.kept_folder()),
        # of this process: nothing promises that another one's training ends at the same weights
        "trained": programs.saved(f"trained-{os.getpid()}", lambda: trained),
    }
    server = LocalServer(
        models={name: one.path for name, one in saved.items()},
        cache_dir=programs.cache_dir(),
        start_timeout_s=100,
    )
    with server, stepwell.connect(server.address) as client:
        yield Served(client, article.stateless_model(), trained)


def train_in_batches() -> keras.Model:
    """The article's model, fitted in batches of 32 to the running mean of its inputs."""
    keras.utils.set_random_seed(42)
    x = np.random.default_rng(42).standard_normal((256, 12, article.INPUT_DIM)).astype(np.float32)
    y = np.cumsum(x, axis=1) / np.arange(1, 13, dtype=np.float32)[:, None]
    inputs = keras.Input((None, article.INPUT_DIM))
    hidden = keras.layers.RNN(keras.layers.LSTMCell(NODES), return_sequences=True)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(article.OUTPUT_DIM)(hidden))
    model.compile(keras.optimizers.Adam(0.01), loss="mse")
    losses = model.fit(x, y, batch_size=32, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0] / 2, "it must have learnt something"
    return model


def random_input(batch_size: int) -> Floats:
    random = np.random.default_rng(batch_size)
    return random.random((batch_size, article.TIMESTEPS, article.INPUT_DIM), np.float32)


def keras_call(model: keras.Model, x: Floats, states: list[Floats]) -> dict[str, Any]:
    """The plain Keras call, with `initial_state` given to the layer."""
    sequence, hidden, cell = model.get_layer("lstm")(x, initial_state=states)
    outputs = {OUT: model.get_layer("out")(sequence), HIDDEN: hidden, CELL: cell}
    return {name: keras.ops.convert_to_numpy(output) for name, output in outputs.items()}


def predict(
    client: stepwell.Client, x: Floats, states: Any = None
) -> tuple[dict[str, np.ndarray], stepwell.State]:
    outputs, state = client.predict("stateless", x, state=states)
    assert isinstance(outputs, dict)
    return outputs, state


def assert_close(actual: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=TOLERANCE)


def assert_same_bits(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_any_batch_size_equals_the_plain_keras_call(served: Served, batch_size: int) -> None:
    x = random_input(batch_size)
    zeros = np.zeros((batch_size, NODES), np.float32)
    outputs, state = predict(served.client, x)
    assert_close(outputs, keras_call(served.stateless, x, [zeros, zeros]))
    for tensor, name in zip(state.values(), (HIDDEN, CELL), strict=True):
        np.testing.assert_array_equal(tensor, outputs[name])


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_ones_as_the_initial_state_give_another_output(served: Served, batch_size: int) -> None:
    x = random_input(batch_size)
    ones = np.ones((batch_size, NODES), np.float32)
    from_zeros, _ = predict(served.client, x)
    from_ones, _ = predict(served.client, x, [ones, ones])
    assert np.abs(from_ones[OUT] - from_zeros[OUT]).max() > 0.1
    assert_close(from_ones, keras_call(served.stateless, x, [ones, ones]))


def test_states_of_every_row_are_its_own(served: Served) -> None:
    x, random = random_input(3), np.random.default_rng(0)
    states = [random.standard_normal((3, NODES)).astype(np.float32) for _ in range(2)]
    outputs, _ = predict(served.client, x, states)
    assert_close(outputs, keras_call(served.stateless, x, states))
    for row in range(3):
        alone, _ = predict(served.client, x[row : row + 1], [state[row : row + 1] for state in states])
        assert_same_bits(alone, {name: output[row : row + 1] for name, output in outputs.items()})


def test_the_final_state_is_where_the_next_call_goes_on(served: Served) -> None:
    x = random_input(10)
    whole, final = predict(served.client, x)
    first, between = predict(served.client, x[:, :1])
    second, state = predict(served.client, x[:, 1:], between)
    np.testing.assert_array_equal(np.concatenate([first[OUT], second[OUT]], axis=1), whole[OUT])
    assert state == final


def test_trained_in_batches_then_served_one_sample_at_a_time(served: Served) -> None:
    x = np.random.default_rng(1).standard_normal((5, 40, article.INPUT_DIM)).astype(np.float32)
    whole_sequences = served.trained.predict(x, verbose=0)
    for sample, expected in zip(x, whole_sequences, strict=True):
        with served.client.open_session("trained") as session:
            stepped = np.concatenate([np.asarray(session.step(now[None])) for now in sample])
            assert session.position == len(sample)
        np.testing.assert_allclose(stepped, expected, rtol=0, atol=TOLERANCE)
