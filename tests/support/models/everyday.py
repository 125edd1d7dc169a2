"""What people put around their recurrent layers: all of it must be served, without anybody's trust.

Each block takes Keras, a series ``(batch, time, 4)`` and tokens ``(batch, time)`` below 4, and returns one output.
Blocks are compiled together, a dozen at a time, as one model with an output for each; single layers and
activations all stand behind one recurrent layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.models import zoo
from support.models.mixing_steps import odd

Block = Callable[[Any, Any, Any], Any]
BLOCKS: dict[str, Block] = {}
GROUP = 13


def block(function: Block) -> Block:
    BLOCKS[function.__name__] = function
    return function


#: LiteRT cannot convert them: in a model of their own, so that the others run where they will be served.
ON_TENSORFLOW = [
    "features_reversed_and_rolled",
    "best_class",
    "hashed",
    "looked_up",
    "searched",
    "cross_product",
    "small_matrices",
    "spectrum_and_back",
    "scanned",
    "mapped",
]


def groups() -> dict[str, list[str]]:
    """Return the names of the blocks of each model."""
    names = [name for name in BLOCKS if name not in ON_TENSORFLOW]
    blocks = {names[i]: names[i : i + GROUP] for i in range(0, len(names), GROUP)}
    return {"layers": [*_SINGLE], "activations": [*_ACTIVATIONS], "on_tensorflow": ON_TENSORFLOW, **blocks}


def build_behind_a_convolution(names: list[str]) -> Any:
    """Build a model of some blocks, of which each sees the results of an operation that looks back."""
    from stepwell_server.compile.graph.tensorflow_setup import keras

    x, tokens = keras.Input((None, 4), name="x"), keras.Input((None,), dtype="int32", name="tokens")
    y = keras.layers.Conv1D(4, 3, padding="causal", name="conv")(x)
    outputs = {name: _block(keras, name, y, tokens, y) for name in names}
    outputs["tokens"] = keras.ops.expand_dims(tokens, -1) + 0
    model = keras.Model([x, tokens], outputs)
    zoo.randomize(model)
    return model


def build(names: list[str], steps: int | None = None, seed: int = 0) -> Any:
    """Build one model of some blocks, with random weights."""
    from stepwell_server.compile.graph.tensorflow_setup import keras

    x = keras.Input((steps, 4), name="x")
    tokens = keras.Input((steps,), dtype="int32", name="tokens")
    hidden = keras.layers.SimpleRNN(4, return_sequences=True, name="hidden")(x)
    model = keras.Model([x, tokens], {name: _block(keras, name, x, tokens, hidden) for name in names})
    zoo.randomize(model, seed)
    return model


def _block(keras: Any, name: str, x: Any, tokens: Any, hidden: Any) -> Any:
    if name in BLOCKS:
        return BLOCKS[name](keras, x, tokens)
    if name in _SINGLE:
        return _SINGLE[name](keras.layers)(hidden)
    return keras.layers.Activation(name)(hidden)


_SINGLE: dict[str, Callable[[Any], Any]] = {
    "dense": lambda k: k.Dense(3, activation="relu"),
    "batch_norm": lambda k: k.BatchNormalization(),
    "layer_norm": lambda k: k.LayerNormalization(),
    "rms_norm": lambda k: k.RMSNormalization(),
    "unit_norm": lambda k: k.UnitNormalization(),
    "dropout": lambda k: k.Dropout(0.3),
    "spatial_dropout": lambda k: k.SpatialDropout1D(0.3),
    "noise": lambda k: k.GaussianNoise(0.3),
    "alpha_dropout": lambda k: k.AlphaDropout(0.3),
    "softmax": lambda k: k.Softmax(),
    "prelu": lambda k: k.PReLU(shared_axes=[1]),
    "leaky": lambda k: k.LeakyReLU(0.2),
    "elu": lambda k: k.ELU(),
    "activity": lambda k: k.ActivityRegularization(0.1),
    "conv_1": lambda k: k.Conv1D(3, 1, activation="gelu"),
    "conv_1_grouped": lambda k: k.Conv1D(4, 1, groups=2),
    "conv_1_causal": lambda k: k.Conv1D(3, 1, padding="causal", dilation_rate=7),
    "depthwise_1": lambda k: k.DepthwiseConv1D(1),
    "separable_1": lambda k: k.SeparableConv1D(3, 1),
    "conv_transpose_1": lambda k: k.Conv1DTranspose(3, 1),
    "pool_1": lambda k: k.MaxPooling1D(1),
    "einsum_dense": lambda k: k.EinsumDense("abc,cd->abd", (None, 3), bias_axes="d"),
    "time_distributed": lambda k: k.TimeDistributed(k.Dense(3)),
    "rescaling": lambda k: k.Rescaling(0.3, 1.0),
    "normalization": lambda k: k.Normalization(),
    "identity": lambda k: k.Identity(),
    "in_a_function": odd("in_a_function"),
    "scaled": odd("scaled"),
    "reshaped_by_sizes": odd("reshaped_by_sizes"),
    "time_first": odd("time_first"),
    "channels_first": odd("channels_first"),
    "even_constant": odd("even_constant"),
    "norm_of_the_weights": odd("norm_of_the_weights"),
    "checked": odd("checked"),
    "binned": odd("binned"),
    "repeated": odd("repeated"),
    "repeated_by_while": odd("repeated_by_while"),
}
_ACTIVATIONS = (
    "elu",
    "exponential",
    "gelu",
    "hard_sigmoid",
    "hard_silu",
    "hard_tanh",
    "leaky_relu",
    "linear",
    "log_sigmoid",
    "log_softmax",
    "mish",
    "relu6",
    "selu",
    "silu",
    "soft_shrink",
    "softplus",
    "softsign",
    "sparse_plus",
    "squareplus",
    "tanh_shrink",
    "glu",
    "celu",
    "sparsemax",
)


# --- heads and residuals ---------------------------------------------------------------------------------


@block
def residual(keras: Any, x: Any, _tokens: Any) -> Any:
    hidden = keras.layers.LSTM(4, return_sequences=True)(x)
    return keras.layers.Add()([x, keras.layers.LayerNormalization()(hidden)])


@block
def highway(keras: Any, x: Any, _tokens: Any) -> Any:
    gate = keras.layers.Dense(4, activation="sigmoid")(x)
    hidden = keras.layers.SimpleRNN(4, return_sequences=True)(x)
    return gate * hidden + (1.0 - gate) * x


@block
def merged(keras: Any, x: Any, _tokens: Any) -> Any:
    k = keras.layers
    one, two = k.Dense(3)(x), k.LSTM(3, return_sequences=True)(x)
    return k.Concatenate()([k.Multiply()([one, two]), k.Maximum()([one, two]), k.Average()([one, two])])


@block
def dot_of_features(keras: Any, x: Any, _tokens: Any) -> Any:
    one, two = (keras.layers.TimeDistributed(keras.layers.Dense(6))(x) for _ in range(2))
    return keras.layers.SimpleRNN(3)(keras.ops.sum(one * two, -1, keepdims=True))


@block
def last_output_only(keras: Any, x: Any, _tokens: Any) -> Any:
    hidden = keras.layers.LSTM(5, return_sequences=True)(x)
    return keras.layers.Dense(2, activation="softmax")(hidden[:, -1])


@block
def last_output_by_range(keras: Any, x: Any, _tokens: Any) -> Any:
    hidden = keras.layers.LSTM(5, return_sequences=True)(x)
    return keras.layers.Dense(2)(hidden[:, -1:, :])[:, 0]


@block
def states_joined(keras: Any, x: Any, _tokens: Any) -> Any:
    out, hidden, carry = keras.layers.LSTM(3, return_state=True)(x)
    return keras.layers.Concatenate()([out, hidden * 2.0, keras.ops.tanh(carry)])


@block
def mixture_of_normals(keras: Any, x: Any, _tokens: Any) -> Any:
    k, ops = keras.layers, keras.ops
    hidden = k.LSTM(6, return_sequences=True)(x)
    weights = ops.softmax(k.Dense(3)(hidden))
    means = k.Reshape((-1, 3, 2))(k.Dense(6)(hidden))
    scales = ops.softplus(k.Reshape((-1, 3, 2))(k.Dense(6)(hidden))) + 1e-3
    return ops.concatenate([ops.expand_dims(weights, -1), means, scales], -1)


@block
def expected_value(keras: Any, x: Any, _tokens: Any) -> Any:
    logits = keras.layers.Dense(5)(keras.layers.SimpleRNN(4, return_sequences=True)(x))
    return keras.ops.sum(keras.ops.softmax(logits) * keras.ops.arange(5, dtype="float32"), -1)


@block
def best_class(keras: Any, x: Any, _tokens: Any) -> Any:
    logits = keras.layers.Dense(5)(keras.layers.SimpleRNN(4, return_sequences=True)(x))
    return keras.ops.argmax(logits, -1)


@block
def two_best(keras: Any, x: Any, _tokens: Any) -> Any:
    hidden = keras.layers.SimpleRNN(5, return_sequences=True)(x)
    return keras.ops.top_k(hidden, 2)[0]


@block
def quantiles_in_order(keras: Any, x: Any, _tokens: Any) -> Any:
    steps = keras.ops.softplus(keras.layers.Dense(4)(keras.layers.SimpleRNN(4, return_sequences=True)(x)))
    return keras.ops.cumsum(steps, -1)


@block
def horizon_of_features(keras: Any, x: Any, _tokens: Any) -> Any:
    flat = keras.layers.Dense(12)(keras.layers.LSTM(4)(x))
    return keras.layers.Reshape((6, 2))(flat)


@block
def horizon_by_convolution(keras: Any, x: Any, _tokens: Any) -> Any:
    grid = keras.layers.Reshape((8, 1))(keras.layers.Dense(8)(keras.layers.LSTM(4)(x)))
    return keras.layers.Conv1D(2, 3, padding="same")(grid)


@block
def decoder_by_repeating(keras: Any, x: Any, _tokens: Any) -> Any:
    repeated = keras.layers.RepeatVector(5)(keras.layers.LSTM(4)(x))
    decoded = keras.layers.SimpleRNN(4, return_sequences=True)(repeated)
    return keras.layers.TimeDistributed(keras.layers.Dense(2))(decoded)


@block
def decoder_of_both_ways(keras: Any, x: Any, _tokens: Any) -> Any:
    repeated = keras.layers.RepeatVector(3)(keras.layers.LSTM(4)(x))
    return keras.layers.Bidirectional(keras.layers.GRU(3, return_sequences=True))(repeated)


@block
def attention_over_a_horizon(keras: Any, x: Any, _tokens: Any) -> Any:
    repeated = keras.layers.Reshape((4, 3))(keras.layers.Dense(12)(keras.layers.SimpleRNN(4)(x)))
    return keras.layers.MultiHeadAttention(2, 3)(repeated, repeated)


@block
def gated_unit(keras: Any, x: Any, _tokens: Any) -> Any:
    doubled = keras.layers.Dense(8)(keras.layers.LSTM(4, return_sequences=True)(x))
    one, two = keras.ops.split(doubled, 2, -1)
    return one * keras.ops.sigmoid(two)


@block
def gated_residual_network(keras: Any, x: Any, _tokens: Any) -> Any:
    k = keras.layers
    hidden = k.Dense(4)(k.Dense(4, activation="elu")(k.LSTM(4, return_sequences=True)(x)))
    return k.LayerNormalization()(x + hidden * k.Dense(4, activation="sigmoid")(hidden))


@block
def experts(keras: Any, x: Any, _tokens: Any) -> Any:
    hidden = keras.layers.SimpleRNN(4, return_sequences=True)(x)
    heads = keras.ops.stack([keras.layers.Dense(3)(hidden) for _ in range(3)], 2)
    return keras.ops.einsum("bte,bteo->bto", keras.layers.Dense(3, activation="softmax")(hidden), heads)


@block
def attention_over_features(keras: Any, x: Any, _tokens: Any) -> Any:
    tokens = keras.ops.expand_dims(keras.layers.LSTM(6, return_sequences=True)(x), -1)
    scores = keras.ops.softmax(keras.ops.matmul(tokens, keras.ops.swapaxes(tokens, -1, -2)))
    return keras.ops.squeeze(keras.ops.matmul(scores, tokens), -1)


@block
def squeezed_channels(keras: Any, x: Any, _tokens: Any) -> Any:
    hidden = keras.layers.SimpleRNN(4, return_sequences=True)(x)
    return hidden * keras.layers.Dense(4, activation="sigmoid")(
        keras.layers.Dense(2, activation="relu")(hidden)
    )


@block
def features_reversed_and_rolled(keras: Any, x: Any, _tokens: Any) -> Any:
    return keras.ops.roll(keras.ops.flip(keras.layers.SimpleRNN(4, return_sequences=True)(x), -1), 1, -1)


@block
def features_sorted(keras: Any, x: Any, _tokens: Any) -> Any:
    return keras.ops.sort(keras.layers.SimpleRNN(4, return_sequences=True)(x), -1)


@block
def features_padded(keras: Any, x: Any, _tokens: Any) -> Any:
    return keras.ops.pad(keras.layers.SimpleRNN(4, return_sequences=True)(x), ((0, 0), (0, 0), (1, 2)))


@block
def features_normalised_by_hand(keras: Any, x: Any, _tokens: Any) -> Any:
    mean, variance = keras.ops.moments(x, -1, keepdims=True)
    return keras.layers.SimpleRNN(3)((x - mean) * keras.ops.rsqrt(variance + 1e-3))


@block
def polar(keras: Any, x: Any, _tokens: Any) -> Any:
    ops = keras.ops
    angle = ops.arctan2(x[..., 0], x[..., 1])
    return keras.layers.SimpleRNN(3, return_sequences=True)(
        ops.stack([ops.sin(angle), ops.cos(angle), ops.log1p(ops.abs(x[..., 2]))], -1)
    )


@block
def clipped_and_chosen(keras: Any, x: Any, _tokens: Any) -> Any:
    ops = keras.ops
    hidden = keras.layers.LSTM(4, return_sequences=True)(ops.clip(x, -1.0, 1.0))
    return ops.where(ops.isnan(hidden), 0.0, ops.where(hidden > 0, hidden, x))


@block
def features_crossed(keras: Any, x: Any, _tokens: Any) -> Any:
    crossed = keras.ops.einsum("bti,btj->btij", x, x)
    return keras.layers.SimpleRNN(3)(keras.layers.Reshape((-1, 16))(crossed))


@block
def columns_apart(keras: Any, x: Any, _tokens: Any) -> Any:
    each = [keras.layers.SimpleRNN(2, return_sequences=True)(x[:, :, i : i + 1]) for i in range(4)]
    return keras.layers.Concatenate()(each)


# --- tokens --------------------------------------------------------------------------------------------------


@block
def tokens_embedded(keras: Any, x: Any, tokens: Any) -> Any:
    embedded = keras.layers.Embedding(9, 3, mask_zero=True)(tokens)
    return keras.layers.LSTM(4, return_sequences=True)(keras.layers.Dropout(0.1)(embedded))


@block
def tokens_tied(keras: Any, _x: Any, tokens: Any) -> Any:
    """A language model that uses its embedding twice."""
    table = keras.layers.ReversibleEmbedding(9, 4)
    return table(keras.layers.LSTM(4, return_sequences=True)(table(tokens)), reverse=True)


@block
def tokens_one_hot(keras: Any, x: Any, tokens: Any) -> Any:
    encoded = keras.ops.one_hot(tokens, 5)
    return keras.layers.SimpleRNN(3)(keras.layers.Concatenate()([x, encoded]))


@block
def tokens_masked_by_hand(keras: Any, x: Any, tokens: Any) -> Any:
    known = keras.ops.not_equal(tokens, 2)
    return keras.layers.SimpleRNN(3, return_sequences=True)(x, mask=known)


@block
def tokens_scaled(keras: Any, _x: Any, tokens: Any) -> Any:
    return keras.layers.SimpleRNN(3)(keras.ops.expand_dims(keras.ops.cast(tokens, "float32") / 4.0, -1))


@block
def tokens_choose_a_scale(keras: Any, x: Any, tokens: Any) -> Any:
    scale = keras.layers.Embedding(9, 4)(keras.ops.minimum(tokens, 3))
    return keras.layers.LSTM(4, return_sequences=True)(x) * scale


@block
def discretised(keras: Any, x: Any, _tokens: Any) -> Any:
    bins = keras.layers.Discretization(bin_boundaries=[-1.0, 0.0, 1.0])(x[..., :1])
    return keras.layers.SimpleRNN(3)(keras.layers.Embedding(4, 3)(keras.ops.squeeze(bins, -1)))


@block
def categories_one_hot(keras: Any, _x: Any, tokens: Any) -> Any:
    encoded = keras.layers.CategoryEncoding(9, output_mode="one_hot")(keras.ops.expand_dims(tokens, -1))
    return keras.layers.SimpleRNN(3)(encoded)


@block
def hashed(keras: Any, _x: Any, tokens: Any) -> Any:
    k = keras.layers
    salted = k.Hashing(5, salt=[1, 2], mask_value=0)(tokens)
    both = k.Concatenate()([k.Embedding(7, 3)(k.Hashing(7)(tokens)), k.Embedding(5, 2)(salted)])
    return k.SimpleRNN(3)(both)


@block
def looked_up(keras: Any, _x: Any, tokens: Any) -> Any:
    k = keras.layers
    return k.SimpleRNN(3)(
        k.Embedding(4, 3)(k.IntegerLookup(vocabulary=[3, 2, 7])(keras.ops.cast(tokens, "int64")))
    )


@block
def categories_multi_hot(keras: Any, x: Any, tokens: Any) -> Any:
    pair = keras.ops.stack([tokens, keras.ops.minimum(tokens + 1, 4)], -1)
    encoded = keras.ops.max(keras.ops.one_hot(pair, 9), -2)
    return keras.layers.SimpleRNN(3)(encoded)


# --- recurrent layers -----------------------------------------------------------------------------------------


@block
def stacked_cells(keras: Any, x: Any, _tokens: Any) -> Any:
    cells = [keras.layers.LSTMCell(3), keras.layers.GRUCell(2), keras.layers.SimpleRNNCell(2)]
    return keras.layers.RNN(keras.layers.StackedRNNCells(cells), return_sequences=True)(x)


@block
def odd_but_plain_cell(keras: Any, x: Any, _tokens: Any) -> Any:
    from support.models.odd_cells import OddCell

    return keras.layers.RNN(OddCell(4, "plain"), return_sequences=True)(x)


@block
def convolution_lstm_of_features(keras: Any, x: Any, _tokens: Any) -> Any:
    grid = keras.layers.Reshape((-1, 4, 1))(x)
    return keras.layers.Reshape((-1, 8))(
        keras.layers.ConvLSTM1D(2, 3, padding="same", return_sequences=True)(grid)
    )


@block
def both_ways_over_features(keras: Any, x: Any, _tokens: Any) -> Any:
    words = keras.layers.Reshape((-1, 4, 1))(x)
    return keras.layers.SimpleRNN(3)(
        keras.layers.TimeDistributed(keras.layers.Bidirectional(keras.layers.LSTM(2)))(words)
    )


@block
def frames(keras: Any, x: Any, _tokens: Any) -> Any:
    k = keras.layers
    grid = k.Reshape((-1, 4, 4, 1))(k.Dense(16)(x))
    seen = k.TimeDistributed(k.MaxPooling2D(2))(
        k.TimeDistributed(k.Conv2D(2, 3, padding="same", activation="relu"))(grid)
    )
    return k.LSTM(3)(
        k.TimeDistributed(k.GlobalAveragePooling2D())(k.TimeDistributed(k.BatchNormalization())(seen))
    )


@block
def frames_dilated(keras: Any, x: Any, _tokens: Any) -> Any:
    k = keras.layers
    grid = k.Reshape((-1, 6, 6, 1))(k.Dense(36)(x))
    seen = k.TimeDistributed(k.Conv2D(2, 3, dilation_rate=2))(grid)
    return k.LSTM(3)(k.TimeDistributed(k.Flatten())(k.TimeDistributed(k.DepthwiseConv2D(2))(seen)))


@block
def frames_up_and_down(keras: Any, x: Any, _tokens: Any) -> Any:
    k = keras.layers
    inner = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            k.Conv2D(2, 3, 2, "same"),
            k.UpSampling2D(2, interpolation="bilinear"),
            k.Conv2DTranspose(1, 3, padding="same"),
            k.ZeroPadding2D(1),
            k.Cropping2D(1),
            k.GroupNormalization(1),
            k.GlobalMaxPooling2D(),
        ]
    )
    return k.SimpleRNN(2)(k.TimeDistributed(inner)(k.Reshape((-1, 4, 4, 1))(k.Dense(16)(x))))


@block
def frames_by_separable(keras: Any, x: Any, _tokens: Any) -> Any:
    k = keras.layers
    grid = k.Reshape((-1, 4, 4, 2))(k.Dense(32)(x))
    return k.SimpleRNN(2)(k.TimeDistributed(k.Flatten())(k.TimeDistributed(k.SeparableConv2D(2, 3))(grid)))


@block
def volumes(keras: Any, x: Any, _tokens: Any) -> Any:
    k = keras.layers
    grid = k.Reshape((-1, 2, 2, 2, 1))(k.Dense(8)(x))
    return k.SimpleRNN(2)(
        k.TimeDistributed(k.Flatten())(k.TimeDistributed(k.Conv3D(2, 2, padding="same"))(grid))
    )


@block
def windows_within_a_step(keras: Any, x: Any, _tokens: Any) -> Any:
    """Each time step is a window of 12 readings."""
    k = keras.layers
    window = k.Reshape((-1, 12, 1))(k.Dense(12)(x))
    inner = keras.Sequential(
        [keras.Input((12, 1)), k.Conv1D(3, 3, dilation_rate=2), k.MaxPooling1D(2), k.Flatten()]
    )
    return k.LSTM(3, return_sequences=True)(k.TimeDistributed(inner)(window))


@block
def convolution_across_features(keras: Any, x: Any, _tokens: Any) -> Any:
    grid = keras.ops.expand_dims(x, -1)
    seen = keras.layers.Conv2D(2, (1, 3), padding="same")(grid)
    return keras.layers.SimpleRNN(3)(keras.layers.Reshape((-1, 8))(seen))


@block
def nodes_by_features(keras: Any, x: Any, _tokens: Any) -> Any:
    """A graph convolution within each time step."""
    nodes = keras.layers.Reshape((-1, 4, 2))(keras.layers.Dense(8)(x))
    spread = keras.ops.einsum("btnf,nm->btmf", nodes, keras.ops.eye(4) * 0.5 + 0.1)
    return keras.layers.LSTM(3)(keras.layers.Reshape((-1, 8))(spread))


@block
def normalised_in_groups(keras: Any, x: Any, _tokens: Any) -> Any:
    k = keras.layers
    return k.SimpleRNN(3)(k.TimeDistributed(k.GroupNormalization(2))(k.Dense(6)(x)))


@block
def masked_series(keras: Any, x: Any, _tokens: Any) -> Any:
    k = keras.layers
    hidden = k.LSTM(4, return_sequences=True)(k.Masking(0.0)(x))
    return k.Dense(2)(k.LayerNormalization()(k.SimpleRNN(3)(k.Dropout(0.2)(hidden))))


@block
def deep(keras: Any, x: Any, _tokens: Any) -> Any:
    for i in range(3):
        hidden = keras.layers.LSTM(4, return_sequences=True, dropout=0.1, recurrent_dropout=0.1)(x)
        x = keras.layers.BatchNormalization()(x + keras.layers.Dense(4)(hidden)) if i else hidden
    return x


# --- vectors and matrices within a step ------------------------------------------------------------------


@block
def searched(keras: Any, x: Any, _tokens: Any) -> Any:
    return keras.layers.SimpleRNN(3)(odd("searched")(keras.layers)(x))


@block
def scanned(keras: Any, x: Any, _tokens: Any) -> Any:
    return keras.layers.SimpleRNN(3)(odd("scanned_over_features")(keras.layers)(x))


@block
def mapped(keras: Any, x: Any, _tokens: Any) -> Any:
    return keras.layers.SimpleRNN(3)(odd("mapped_over_features")(keras.layers)(x))


@block
def cross_product(keras: Any, x: Any, _tokens: Any) -> Any:
    return keras.layers.SimpleRNN(3)(keras.ops.cross(x[..., :3], x[..., 1:]))


def _matrices(keras: Any, x: Any) -> Any:
    """Matrices that can be inverted, ``(batch, time, 2, 2)``."""
    return keras.layers.Reshape((-1, 2, 2))(keras.ops.tanh(x)) + 3.0 * keras.ops.eye(2)


@block
def small_matrices(keras: Any, x: Any, _tokens: Any) -> Any:
    ops, matrices = keras.ops, _matrices(keras, x)
    inverse = keras.layers.Reshape((-1, 4))(ops.inv(matrices))
    diagonal = ops.diagonal(matrices, axis1=2, axis2=3)
    found = ops.concatenate([inverse, ops.expand_dims(ops.det(matrices), -1), diagonal], -1)
    return keras.layers.SimpleRNN(3, return_sequences=True)(found)


@block
def triangles(keras: Any, x: Any, _tokens: Any) -> Any:
    matrices = _matrices(keras, x)
    flat = keras.layers.Reshape((-1, 4))
    return keras.layers.SimpleRNN(3)(flat(keras.ops.tril(matrices)) + flat(keras.ops.triu(matrices, 1)))


@block
def spectrum(keras: Any, x: Any, _tokens: Any) -> Any:
    return keras.layers.SimpleRNN(3)(keras.ops.concatenate(keras.ops.rfft(x), -1))


@block
def spectrum_and_back(keras: Any, x: Any, _tokens: Any) -> Any:
    real, imaginary = keras.ops.rfft(x)
    low = keras.ops.array([1.0, 1.0, 0.0], "float32")
    return keras.layers.SimpleRNN(3)(keras.ops.irfft((real * low, imaginary * low)))
