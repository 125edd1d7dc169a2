"""The model zoo: small Keras models with random, non-trivial weights. Keras is imported inside functions only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Builder = Callable[[Any], Any]
SERVED: dict[str, Builder] = {}
"""Models that Stepwell must serve, by name; each takes the ``keras`` module."""
COMMON = (
    *("lstm_dense", "lstm_last_only", "gru_reset_after", "masking", "embedding_mask_zero"),
    "several_inputs_and_outputs",
)
"""Those of them that many tests use: one more test of such a model compiles nothing."""
REFUSED: dict[str, tuple[Builder, str]] = {}
"""Models that it must refuse, with a pattern of the message."""


def served(build: Builder) -> Builder:
    SERVED[build.__name__] = build
    return build


def refused(pattern: str) -> Callable[[Builder], Builder]:
    def register(build: Builder) -> Builder:
        REFUSED[build.__name__] = (build, pattern)
        return build

    return register


def build(name: str, seed: int = 0) -> Any:
    """Build the model ``name`` with random weights and biases drawn from ``seed``."""
    # Before anything loads Keras: it makes TensorFlow compute on one thread.
    from stepwell_server.compile.graph.tensorflow_setup import keras

    builder = SERVED.get(name) or REFUSED[name][0]
    model = builder(keras)
    randomize(model, seed)
    return model


def randomize(model: Any, seed: int = 0) -> None:
    """Give every weight a random value: zero biases and unit variances would hide mistakes."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "int" in weight.dtype:
            continue  # The quantizer made it of a float kernel.
        value = rng.standard_normal(weight.shape) * 0.4
        if "variance" in weight.path:
            value = np.abs(value) + 0.5
        weight.assign(value.astype("float32"))
    for layer in model._flatten_layers():
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()  # Normalization keeps values computed from the old weights.


def random_inputs(model_inputs: Any, rows: int, steps: int, seed: int = 0) -> list[Any]:
    """Return random inputs for specs like `Program.inputs`; integers are below 4."""
    rng = np.random.default_rng(seed)
    arrays = []
    for spec in model_inputs:
        shape = (rows, *((steps,) if spec.temporal else ()), *spec.shape)
        integral = np.issubdtype(np.dtype(spec.dtype), np.integer)
        drawn = rng.integers(0, 4, shape) if integral else rng.standard_normal(shape)
        arrays.append(drawn > 0 if spec.dtype == "bool" else drawn.astype(spec.dtype))
    return arrays


# --- layer kinds ---------------------------------------------------------------------------------------


@served
def lstm_dense(keras: Any) -> Any:
    x = keras.Input((None, 3), name="x")
    y = keras.layers.LSTM(8, return_sequences=True, name="lstm")(x)
    return keras.Model(x, keras.layers.Dense(2, name="y")(y))


@served
def lstm_last_only(keras: Any) -> Any:
    return keras.Sequential(
        [keras.Input((None, 3)), keras.layers.LSTM(4, name="lstm"), keras.layers.Dense(2)]
    )


@served
def gru_reset_after(keras: Any) -> Any:
    return keras.Sequential([keras.Input((None, 3)), keras.layers.GRU(5, return_sequences=True, name="gru")])


@served
def gru_reset_before(keras: Any) -> Any:
    gru = keras.layers.GRU(5, reset_after=False, return_sequences=True, name="gru")
    return keras.Sequential([keras.Input((None, 3)), gru])


@served
def simple_rnn_relu(keras: Any) -> Any:
    rnn = keras.layers.SimpleRNN(5, activation="relu", return_sequences=True, name="rnn")
    return keras.Sequential([keras.Input((None, 3)), rnn])


@served
def lstm_all_options(keras: Any) -> Any:
    lstm = keras.layers.LSTM(
        5, activation="softsign", recurrent_activation="hard_sigmoid", use_bias=False, return_sequences=True
    )
    return keras.Sequential([keras.Input((None, 3)), lstm])


@served
def lstm_unrolled(keras: Any) -> Any:
    x = keras.Input((6, 3))
    return keras.Model(x, keras.layers.LSTM(5, unroll=True, return_sequences=True, name="lstm")(x))


@served
def seed_model(keras: Any) -> Any:
    """The seed's: a stateful RNN of an LSTMCell, fixed batch and time, its states among the outputs."""
    x = keras.Input(batch_shape=(10, 2, 3))
    rnn = keras.layers.RNN(
        keras.layers.LSTMCell(10), return_state=True, return_sequences=True, stateful=True, name="rnn"
    )
    out, hidden, carry = rnn(x)
    return keras.Model(x, [hidden, carry, keras.layers.Dense(3, name="dense")(out)])


@served
def stacked_cells(keras: Any) -> Any:
    cells = [keras.layers.LSTMCell(4), keras.layers.GRUCell(3), keras.layers.SimpleRNNCell(5)]
    return keras.Sequential(
        [keras.Input((None, 3)), keras.layers.RNN(cells, return_sequences=True, name="rnn")]
    )


@served
def stacked_rnn_cells_with_state(keras: Any) -> Any:
    x = keras.Input((None, 3))
    stack = keras.layers.StackedRNNCells([keras.layers.LSTMCell(4), keras.layers.LSTMCell(3)])
    out, first, second = keras.layers.RNN(stack, return_state=True, name="rnn")(x)
    return keras.Model(x, {"out": out, "h0": first[0], "c1": second[1]})


@served
def single_cell_in_list(keras: Any) -> Any:
    rnn = keras.layers.RNN([keras.layers.LSTMCell(4)], return_sequences=True, name="rnn")
    return keras.Sequential([keras.Input((None, 3)), rnn])


@served
def conv_lstm_1d(keras: Any) -> Any:
    rnn = keras.layers.ConvLSTM1D(2, 3, padding="same", return_sequences=True, name="conv")
    return keras.Sequential([keras.Input((None, 6, 2)), rnn])


@served
def conv_lstm_2d(keras: Any) -> Any:
    x = keras.Input((None, 5, 4, 1))
    out = keras.layers.ConvLSTM2D(2, 3, padding="valid", strides=1, name="conv")(x)
    return keras.Model(x, keras.layers.Dense(3)(keras.layers.Flatten()(out)))


@served
def frames(keras: Any) -> Any:
    """Values that grow without bound, as they do in many a model of films."""
    x = out = keras.Input((None, 8, 8, 1))
    for _ in range(2):
        conv = keras.layers.ConvLSTM2D(4, 3, padding="same", activation="relu", return_sequences=True)
        out = keras.layers.BatchNormalization()(conv(out))
    return keras.Model(x, keras.layers.TimeDistributed(keras.layers.Dense(1, activation="sigmoid"))(out))


@served
def time_distributed(keras: Any) -> Any:
    x = keras.Input((None, 6, 6, 1))
    frames = keras.layers.TimeDistributed(keras.layers.Conv2D(2, 3))(x)
    flat = keras.layers.TimeDistributed(keras.layers.Flatten())(frames)
    return keras.Model(x, keras.layers.LSTM(4, return_sequences=True, name="lstm")(flat))


@served
def time_distributed_inner_lstm(keras: Any) -> Any:
    """Sentences of words: the inner LSTM reads the words of one time step, and carries nothing."""
    x = keras.Input((None, 4, 3))
    words = keras.layers.TimeDistributed(keras.layers.LSTM(5, name="words"))(x)
    return keras.Model(x, keras.layers.GRU(4, return_sequences=True, name="sentences")(words))


# --- how models are put together -----------------------------------------------------------------------


@served
def deep_with_normalization(keras: Any) -> Any:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((None, 3)),
            layers.LSTM(6, return_sequences=True, dropout=0.3, recurrent_dropout=0.2),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.GRU(5, return_sequences=True, dropout=0.3),
            layers.LayerNormalization(),
            layers.GaussianNoise(0.5),
            layers.Dense(4, activation="gelu"),
            layers.SpatialDropout1D(0.5),
        ]
    )


@served
def stateful_fixed_batch(keras: Any) -> Any:
    x = keras.Input(batch_shape=(4, None, 3))
    hidden = keras.layers.LSTM(5, stateful=True, return_sequences=True, name="lstm")(x)
    return keras.Model(x, keras.layers.GRU(4, stateful=True, name="gru")(hidden))


@served
def nested_same_names(keras: Any) -> Any:
    def inner(name: str) -> Any:
        x = keras.Input((None, 4))
        y = keras.layers.LSTM(4, return_sequences=True, name="lstm")(x)
        return keras.Model(x, keras.layers.Dense(4, name="dense")(y), name=name)

    x = keras.Input((None, 4))
    return keras.Model(x, inner("right")(inner("left")(x)))


@served
def nested_sequential_fixed_time(keras: Any) -> Any:
    encoder = keras.Sequential(
        [keras.Input((8, 3)), keras.layers.GRU(4, return_sequences=True)], name="encoder"
    )
    return keras.Sequential([keras.Input((8, 3)), encoder, keras.layers.LSTM(3, name="lstm")])


@served
def shared_layer(keras: Any) -> Any:
    left, right = keras.Input((None, 3), name="left"), keras.Input((None, 3), name="right")
    lstm = keras.layers.LSTM(4, return_sequences=True, name="lstm")
    return keras.Model([left, right], keras.layers.Subtract()([lstm(left), lstm(right)]))


@served
def layer_in_a_block(keras: Any) -> Any:
    from support.models.custom_layers import Block

    x = keras.Input((None, 4))
    return keras.Model(x, Block(4, name="second")(Block(4, name="first")(x)))


@served
def residual_of_operations(keras: Any) -> Any:
    x = keras.Input((None, 4))
    y = keras.layers.LSTM(4, return_sequences=True)(x)
    return keras.Model(x, keras.ops.tanh(y) * 2.0 + x[..., ::-1])


@served
def several_inputs_and_outputs(keras: Any) -> Any:
    series, token = keras.Input((None, 3), name="series"), keras.Input((None,), dtype="int32", name="token")
    profile = keras.Input((5,), name="profile")
    embedded = keras.layers.Embedding(9, 4)(token)
    hidden = keras.layers.LSTM(6, return_sequences=True)(keras.layers.Concatenate()([series, embedded]))
    last = keras.layers.GRU(4)(hidden)
    head = keras.layers.Dense(2, name="head")(keras.layers.Concatenate()([last, profile]))
    return keras.Model(
        {"token": token, "series": series, "profile": profile},
        {"each": keras.layers.Dense(1, name="each")(hidden), "head": head, "echo": series, "same": profile},
    )


@served
def static_image_beside_a_series(keras: Any) -> Any:
    series, image = keras.Input((None, 3), name="series"), keras.Input((8, 8, 1), name="image")
    seen = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(image))
    return keras.Model([series, image], keras.layers.Add()([keras.layers.LSTM(4)(series), seen]))


@served
def fixed_length_tokens(keras: Any) -> Any:
    x = keras.Input((10,), dtype="int64", name="tokens")
    embedded = keras.layers.Embedding(13, 4)(x)
    return keras.Model(x, keras.layers.Dense(13, activation="softmax")(keras.layers.LSTM(6)(embedded)))


@served
def float_tokens(keras: Any) -> Any:
    return keras.Sequential([keras.Input((None,)), keras.layers.Embedding(6, 4), keras.layers.GRU(3)])


@served
def repeat_vector_decoder(keras: Any) -> Any:
    """A forecast of four steps after each step: the decoder runs whole inside one time step."""
    x = keras.Input((None, 3))
    _, hidden, carry = keras.layers.LSTM(5, return_state=True, name="encoder")(x)
    repeated = keras.layers.RepeatVector(4)(hidden)
    decoder = keras.layers.LSTM(5, return_sequences=True, name="decoder")
    return keras.Model(x, keras.layers.Dense(2)(decoder(repeated, initial_state=[hidden, carry])))


@served
def sequential_without_input(keras: Any) -> Any:
    model = keras.Sequential([keras.layers.GRU(4, return_sequences=True, name="gru"), keras.layers.Dense(2)])
    model(np.zeros((3, 6, 3), "float32"))
    return model


@served
def preprocessing(keras: Any) -> Any:
    x, kind = keras.Input((None, 3), name="x"), keras.Input((None,), dtype="int32", name="kind")
    scaled = keras.layers.Rescaling(0.5, 0.1)(keras.layers.Normalization()(x))
    encoded = keras.ops.one_hot(kind, 5)
    return keras.Model([x, kind], keras.layers.LSTM(4)(keras.layers.Concatenate()([scaled, encoded])))


@served
def lookup_table(keras: Any) -> Any:
    """LiteRT has no such tables, and TensorFlow cannot make one a constant."""
    x = keras.Input((None,), dtype="int64")
    found = keras.layers.IntegerLookup(vocabulary=[3, 2, 7])(x)
    return keras.Model(x, keras.layers.GRU(3, name="gru")(keras.layers.Embedding(4, 3)(found)))


@served
def int8_dense(keras: Any) -> Any:
    # The quantizer's result stays: it must be the same each time.
    dense = keras.layers.Dense(2, kernel_initializer=keras.initializers.GlorotUniform(seed=1))
    model = keras.Sequential([keras.Input((None, 3)), keras.layers.LSTM(4, name="lstm"), dense])
    dense.quantize("int8")
    return model


@served
def after_fitting(keras: Any) -> Any:
    model = keras.Sequential(
        [keras.Input((None, 3)), keras.layers.LSTM(4, dropout=0.2, name="lstm"), keras.layers.Dense(1)]
    )
    model.compile("adam", "mse", metrics=["mae"])
    rng = np.random.default_rng(0)
    model.fit(rng.standard_normal((8, 5, 3)), rng.standard_normal((8, 1)), epochs=1, verbose=0)
    return model


@served
def stateless(keras: Any) -> Any:
    return keras.Sequential([keras.Input((None, 3)), keras.layers.Dense(4, activation="relu")])


@served
def stateless_without_time(keras: Any) -> Any:
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="relu")])


@served
def subclassed(keras: Any) -> Any:
    from support.models.custom_layers import Subclassed

    model = Subclassed()
    model(np.zeros((2, 7, 3), "float32"))
    return model


@served
def subclassed_tokens(keras: Any) -> Any:
    from support.models.custom_layers import SubclassedTokens

    model = SubclassedTokens()
    model(np.zeros((2, 7), "int32"))
    return model


@served
def subclassed_two_arguments(keras: Any) -> Any:
    from support.models.custom_layers import SubclassedTwoArguments

    model = SubclassedTwoArguments()
    model(series=np.zeros((2, 7, 3), "float32"), profile=np.zeros((2, 5), "float32"))
    return model


@served
def hybrid_with_subclassed_inside(keras: Any) -> Any:
    from support.models.custom_layers import Subclassed

    x = keras.Input((None, 3))
    return keras.Model(x, keras.layers.Dense(2)(Subclassed(name="inner")(x)["y"]))


# --- masks ---------------------------------------------------------------------------------------------


@served
def masking(keras: Any) -> Any:
    x = keras.Input((None, 3))
    masked = keras.layers.Masking(-1.0)(x)
    hidden = keras.layers.LSTM(5, return_sequences=True, name="lstm")(masked)
    return keras.Model(x, keras.layers.GRU(4, return_sequences=True, name="gru")(hidden))


@served
def embedding_mask_zero(keras: Any) -> Any:
    x = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(9, 4, mask_zero=True)(x)
    return keras.Model(x, keras.layers.Dense(3)(keras.layers.LSTM(5, name="lstm")(embedded)))


@served
def mask_with_zero_output(keras: Any) -> Any:
    x = keras.Input((None, 3))
    lstm = keras.layers.LSTM(5, return_sequences=True, zero_output_for_mask=True, name="lstm")
    return keras.Model(x, lstm(keras.layers.Masking()(x)))


@served
def mask_over_stacked_cells(keras: Any) -> Any:
    x = keras.Input((None, 3))
    rnn = keras.layers.RNN(
        [keras.layers.LSTMCell(4), keras.layers.GRUCell(3)], return_sequences=True, name="rnn"
    )
    return keras.Model(x, rnn(keras.layers.Masking()(x)))


@served
def mask_over_conv_lstm(keras: Any) -> Any:
    x, mask = keras.Input((None, 4, 2)), keras.Input((None,), dtype="bool", name="mask")
    return keras.Model([x, mask], keras.layers.ConvLSTM1D(2, 3, return_sequences=True)(x, mask=mask))


# --- custom cells --------------------------------------------------------------------------------------


@served
def accumulator(keras: Any) -> Any:
    from support.models.custom_layers import Accumulator

    rnn = keras.layers.RNN(Accumulator(3), return_sequences=True, name="sum")
    return keras.Sequential([keras.Input((None, 3)), rnn])


@served
def integer_accumulator(keras: Any) -> Any:
    from support.models.custom_layers import Accumulator

    x = keras.Input((None, 3), dtype="int32")
    return keras.Model(
        x,
        keras.layers.RNN(Accumulator(3, dtype="int32"), return_sequences=True, name="sum", dtype="int32")(x),
    )


@served
def learned_initial_state(keras: Any) -> Any:
    from support.models.custom_layers import LearnedStart

    rnn = keras.layers.RNN(LearnedStart(4), return_sequences=True, name="learned")
    return keras.Sequential([keras.Input((None, 3)), rnn])


@served
def swapper(keras: Any) -> Any:
    from support.models.custom_layers import Swapper

    x = keras.Input((None, 3))
    return keras.Model(x, keras.layers.RNN(Swapper(3), return_sequences=True, name="memory")(x))


@served
def not_convertible(keras: Any) -> Any:
    from support.models.custom_layers import BetaCell

    x = keras.Input((None, 3))
    hidden = keras.layers.RNN(BetaCell(4), return_sequences=True, name="beta")(x)
    return keras.Model(x, keras.layers.Dense(2)(hidden))


@served
def holt_winters(keras: Any) -> Any:
    from support.models.custom_layers import HoltWinters

    x = keras.Input((None, 1))
    return keras.Model(x, keras.layers.RNN(HoltWinters(7), return_sequences=True, name="smoothing")(x))


@served
def whole_quotients(keras: Any) -> Any:
    from support.models.custom_layers import WholeQuotients

    x = keras.Input((None, 1))
    return keras.Model(x, WholeQuotients(name="quotients")(x))


# --- other types ---------------------------------------------------------------------------------------


@served
def half_precision(keras: Any) -> Any:
    x = keras.Input((None, 3), dtype="float16")
    return keras.Model(x, keras.layers.LSTM(4, return_sequences=True, dtype="float16")(x))


@served
def mixed_float16(keras: Any) -> Any:
    x = keras.Input((None, 3))
    hidden = keras.layers.GRU(4, return_sequences=True, dtype="mixed_float16", name="gru")(x)
    return keras.Model(x, keras.layers.Dense(2, dtype="float32")(hidden))


@served
def mixed_bfloat16(keras: Any) -> Any:
    x = keras.Input((None, 3))
    hidden = keras.layers.LSTM(4, return_sequences=True, dtype="mixed_bfloat16", name="lstm")(x)
    return keras.Model(x, keras.layers.Dense(2, dtype="float32")(hidden))


# --- what cannot be stepped ----------------------------------------------------------------------------


@refused(r"not causal: the layer 'both' \(Bidirectional\) looks ahead: it reads its sequence backwards; use")
def bidirectional(keras: Any) -> Any:
    both = keras.layers.Bidirectional(keras.layers.LSTM(4, return_sequences=True), name="both")
    return keras.Sequential([keras.Input((None, 3)), both, keras.layers.Dense(2)])


@refused(r"not causal.*'both' \(Bidirectional\)")
def bidirectional_last_fixed_time(keras: Any) -> Any:
    both = keras.layers.Bidirectional(keras.layers.GRU(4), name="both")
    return keras.Sequential([keras.Input((10, 3)), both, keras.layers.Dense(2)])


@refused(r"not causal: the layer 'back' \(LSTM\) looks ahead: it reads its sequence backwards")
def go_backwards(keras: Any) -> Any:
    lstm = keras.layers.LSTM(4, return_sequences=True, go_backwards=True, name="back")
    return keras.Sequential([keras.Input((None, 3)), lstm])


@refused(
    r"step by step: the layer 'pool' \(GlobalAveragePooling1D\) mixes time steps: it takes the mean over"
)
def pooling_over_time(keras: Any) -> Any:
    layers = keras.layers
    pool = layers.GlobalAveragePooling1D(name="pool")
    return keras.Sequential([keras.Input((None, 3)), layers.LSTM(4, return_sequences=True), pool])


@refused(r"not causal: the layer 'conv' \(Conv1D\) looks ahead: it has a window of 3 over the time axis")
def convolution_over_time(keras: Any) -> Any:
    conv = keras.layers.Conv1D(4, 3, padding="same", name="conv")
    return keras.Sequential([keras.Input((None, 3)), conv, keras.layers.LSTM(4, return_sequences=True)])


@served
def causal_convolution(keras: Any) -> Any:
    conv = keras.layers.Conv1D(4, 3, padding="causal", name="conv")
    return keras.Sequential([keras.Input((None, 3)), conv, keras.layers.LSTM(4, return_sequences=True)])


@refused(r"step by step: the layer 'attend' \(MultiHeadAttention\) depends on the whole sequence so far")
def causal_attention(keras: Any) -> Any:
    x = keras.Input((None, 4))
    hidden = keras.layers.LSTM(4, return_sequences=True)(x)
    attend = keras.layers.MultiHeadAttention(2, 4, name="attend")
    return keras.Model(x, attend(hidden, hidden, use_causal_mask=True))


@refused(r"not causal: the layer 'attend' \(MultiHeadAttention\) looks ahead: it relates all time steps")
def attention(keras: Any) -> Any:
    x = keras.Input((None, 4))
    hidden = keras.layers.LSTM(4, return_sequences=True)(x)
    return keras.Model(x, keras.layers.MultiHeadAttention(2, 4, name="attend")(hidden, hidden))


@refused(
    r"step by step: the operation 'mean' \(Mean\) mixes time steps: it takes the mean over the time axis"
)
def mean_operation(keras: Any) -> Any:
    x = keras.Input((None, 4))
    hidden = keras.layers.LSTM(4, return_sequences=True)(x)
    return keras.Model(x, keras.ops.mean(hidden, axis=1))


@refused(
    r"step by step: the model's own call \(MeanOverTime\) mixes time steps: it takes the mean over the time"
)
def mean_in_a_subclass(keras: Any) -> Any:
    from support.models.custom_layers import MeanOverTime

    model = MeanOverTime()
    model(np.zeros((2, 6, 3), "float32"))
    return model


@refused(
    r"initial state is computed from the model's inputs: the layer 'decoder' \(LSTM\).*open_session\(\) or reset"
)
def encoder_decoder(keras: Any) -> Any:
    source, target = keras.Input((None, 3), name="source"), keras.Input((None, 2), name="target")
    _, *state = keras.layers.LSTM(4, return_state=True, name="encoder")(source)
    out = keras.layers.LSTM(4, return_sequences=True, name="decoder")(target, initial_state=state)
    return keras.Model([source, target], out)


@refused(r"weights .* were not restored")
def weights_not_restored(keras: Any) -> Any:
    from support.models.custom_layers import NeverBuilt

    model = NeverBuilt()
    model(series=np.zeros((2, 7, 3), "float32"), profile=np.zeros((2, 5), "float32"))
    return model


@refused(r"safe mode")
def lambda_layer(keras: Any) -> Any:
    x = keras.Input((None, 3))
    hidden = keras.layers.LSTM(4, return_sequences=True)(x)
    return keras.Model(x, keras.layers.Lambda(lambda value: value * 2.0)(hidden))
