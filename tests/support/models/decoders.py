"""Decoders whose states are inputs and outputs of the model, as in Keras's seq2seq tutorial. Keras is imported inside functions only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Make = Callable[[Any], Any]
"""Takes ``keras`` and returns a model; its input with a time axis is ``x``."""
DECODERS: dict[str, Make] = {}
STATES: dict[str, dict[str, str]] = {}
"""The output that holds each state input after the last time step."""
DECLARED = {"last_of_all_outputs", "last_output"}
"""Those whose states are such only if they are declared."""


def build(name: str, seed: int = 1) -> Any:
    """Build a model with random weights."""
    from stepwell_server.compile.graph.tensorflow_setup import keras
    from support.models.zoo import randomize

    model = DECODERS[name](keras)
    randomize(model, seed)
    return model


def _decoder(**states: str) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        name = make.__name__
        DECODERS[name], STATES[name] = make, states
        return make

    return add


@_decoder(state_h="lstm", state_c="lstm_1")
def tutorial(keras: Any) -> Any:
    x = keras.Input((None, 5), name="x")
    state = [keras.Input((6,), name="state_h"), keras.Input((6,), name="state_c")]
    lstm = keras.layers.LSTM(6, return_sequences=True, return_state=True, name="lstm")
    y, h, c = lstm(x, initial_state=state)
    return keras.Model([x, *state], [keras.layers.Dense(4, activation="softmax", name="out")(y), h, c])


@_decoder(state="gru")
def gru_behind_an_embedding(keras: Any) -> Any:
    x, state = keras.Input((None,), dtype="int32", name="x"), keras.Input((5,), name="state")
    gru = keras.layers.GRU(5, return_sequences=True, return_state=True, name="gru")
    y, after = gru(keras.layers.Embedding(30, 4)(x), initial_state=state)
    return keras.Model({"state": state, "x": x}, [keras.layers.Dense(30, name="out")(y), after])


@_decoder(h0="h0_after", c0="c0_after", h1="h1_after")
def stacked(keras: Any) -> Any:
    x = keras.Input((None, 3), name="x")
    h0, c0, h1 = (keras.Input((size,), name=name) for name, size in (("h0", 4), ("c0", 4), ("h1", 5)))
    y, *first = keras.layers.LSTM(4, return_sequences=True, return_state=True, name="low")(
        x, initial_state=[h0, c0]
    )
    y, last = keras.layers.GRU(5, return_sequences=True, return_state=True, name="high")(y, initial_state=h1)
    return keras.Model(
        [h1, x, c0, h0],
        {"out": keras.layers.Dense(2)(y), "c0_after": first[1], "h1_after": last, "h0_after": first[0]},
    )


@_decoder(state_h="lstm", state_c="lstm_1")
def masked(keras: Any) -> Any:
    x = keras.Input((None,), dtype="int32", name="x")
    state = [keras.Input((4,), name="state_h"), keras.Input((4,), name="state_c")]
    told = keras.layers.Embedding(9, 3, mask_zero=True)(x)
    y, h, c = keras.layers.LSTM(4, return_sequences=True, return_state=True, name="lstm")(
        told, initial_state=state
    )
    return keras.Model([x, *state], [keras.layers.Dense(2, name="out")(y), h, c])


@_decoder(a="rnn_1", b="rnn_2", c="rnn_3")
def stacked_cells(keras: Any) -> Any:
    x = keras.Input((None, 3), name="x")
    state = [keras.Input((size,), name=name) for name, size in (("a", 4), ("b", 4), ("c", 5))]
    cells = [keras.layers.LSTMCell(4), keras.layers.GRUCell(5)]
    rnn = keras.layers.RNN(cells, return_sequences=True, return_state=True, name="rnn")
    y, first, second = rnn(x, initial_state=[state[:2], state[2]])
    return keras.Model([x, *state], [y, *first, second])


@_decoder(state="gru")
def last_output_only(keras: Any) -> Any:
    x, state = keras.Input((None, 3), name="x"), keras.Input((4,), name="state")
    last, after = keras.layers.GRU(4, return_state=True, name="gru")(x, initial_state=state)
    return keras.Model([x, state], [keras.layers.Dense(2, name="out")(last), after])


@_decoder(state="gru")
def behind_a_convolution(keras: Any) -> Any:
    x, state = keras.Input((None, 3), name="x"), keras.Input((4,), name="state")
    y = keras.layers.Conv1D(4, 3, padding="causal", name="conv")(x)
    y, after = keras.layers.GRU(4, return_sequences=True, return_state=True, name="gru")(
        y, initial_state=state
    )
    return keras.Model([x, state], [keras.layers.Dense(2, name="out")(y), after])


@_decoder(state_h="lstm", state_c="lstm_1")
def attention_over_an_encoder(keras: Any) -> Any:
    """Attends to 7 outputs of an encoder, which are an input without a time axis."""
    x, source = keras.Input((None, 3), name="x"), keras.Input((7, 4), name="source")
    state = [keras.Input((4,), name="state_h"), keras.Input((4,), name="state_c")]
    y, h, c = keras.layers.LSTM(4, return_sequences=True, return_state=True, name="lstm")(
        x, initial_state=state
    )
    seen = keras.layers.Attention(name="attention")([y, source])
    return keras.Model(
        [x, source, *state], [keras.layers.Dense(2, name="out")(keras.layers.Concatenate()([y, seen])), h, c]
    )


@_decoder(state="decoder")
def nested(keras: Any) -> Any:
    inner, before = keras.Input((None, 3)), keras.Input((4,))
    y, after = keras.layers.GRU(4, return_sequences=True, return_state=True, name="gru")(
        inner, initial_state=before
    )
    decoder = keras.Model([inner, before], [after, y], name="decoder")
    x, state = keras.Input((None, 3), name="x"), keras.Input((4,), name="state")
    after, y = decoder([x, state])
    return keras.Model([x, state], [keras.layers.Dense(2, name="out")(y), after])


@_decoder(frame="conv", memory="conv_1")
def frames(keras: Any) -> Any:
    x = keras.Input((None, 6, 2), name="x")
    state = [keras.Input((6, 3), name="frame"), keras.Input((6, 3), name="memory")]
    layer = keras.layers.ConvLSTM1D(
        3, 3, padding="same", return_sequences=True, return_state=True, name="conv"
    )
    y, *after = layer(x, initial_state=state)
    return keras.Model([x, *state], [y * 1.0, *after])


@_decoder(state="gru")
def one_time_step(keras: Any) -> Any:
    """Saved for one time step only, as people do who call it in a loop."""
    x, state = keras.Input((1, 3), name="x"), keras.Input((4,), name="state")
    y, after = keras.layers.GRU(4, return_sequences=True, return_state=True, name="gru")(
        x, initial_state=state
    )
    return keras.Model([x, state], [keras.layers.Dense(2, name="out")(y), after])


@_decoder(state="last")
def last_of_all_outputs(keras: Any) -> Any:
    x, state = keras.Input((None, 3), name="x"), keras.Input((4,), name="state")
    y = keras.layers.GRU(4, return_sequences=True, name="gru")(x, initial_state=state)
    return keras.Model([x, state], {"out": keras.layers.Dense(2, name="dense")(y), "last": y[:, -1]})


@_decoder(state="last")
def last_output(keras: Any) -> Any:
    x, state = keras.Input((None, 3), name="x"), keras.Input((4,), name="state")
    last = keras.layers.SimpleRNN(4, name="rnn")(x, initial_state=state)
    return keras.Model([x, state], {"out": keras.layers.Dense(2, name="dense")(last), "last": last})


@_decoder(state="gru")
def nothing_but_its_state(keras: Any) -> Any:
    x, state = keras.Input((None, 3), name="x"), keras.Input((4,), name="state")
    _, after = keras.layers.GRU(4, return_state=True, name="gru")(x, initial_state=state)
    return keras.Model([x, state], after)
