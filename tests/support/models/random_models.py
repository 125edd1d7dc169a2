"""Random models: stacks of building blocks, good ones and bad ones, with random reaches.

Seeds that follow each other deal the good blocks out like cards, so that each block is in one of `HANDS` models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from support.models import zoo
from support.models.random_blocks import LOOKING_BACK, Rng
from support.models.random_blocks import pick as _pick

Maker = Callable[[Any, Rng, Any], Any]
"""Takes Keras, a generator and a series ``(batch, time, 4)``; returns another one."""


def _odd(kind: str, largest: int = 1) -> Maker:
    def make(_keras: Any, rng: Rng, x: Any) -> Any:
        from support.models.odd_layers import Apply

        return Apply(kind, int(rng.integers(1, largest + 1)), name=f"{kind}_{rng.integers(1 << 30)}")(x)

    return make


def _recurrent(keras: Any, rng: Rng, x: Any) -> Any:
    kind = _pick(rng, keras.layers.SimpleRNN, keras.layers.GRU, keras.layers.LSTM)
    return kind(4, return_sequences=True)(x)


def _stacked(keras: Any, rng: Rng, x: Any) -> Any:
    cells = [_pick(rng, keras.layers.SimpleRNNCell, keras.layers.GRUCell)(size) for size in (3, 4)]
    return keras.layers.RNN(cells, return_sequences=True)(x)


def _decoded(keras: Any, rng: Rng, x: Any) -> Any:
    """A layer over an axis within each time step."""
    grid = keras.layers.Reshape((-1, 4, 1))(x)
    both = keras.layers.Bidirectional(keras.layers.SimpleRNN(2, return_sequences=bool(rng.integers(2))))
    inner = keras.layers.TimeDistributed(both)(grid)
    flat = keras.layers.TimeDistributed(keras.layers.Flatten())(inner)
    return keras.layers.Dense(4)(flat)


def _residual(keras: Any, rng: Rng, x: Any) -> Any:
    return x + keras.layers.Dense(4, activation=_pick(rng, "relu", "tanh", "gelu", "softmax"))(x)


def _gated(keras: Any, _rng: Rng, x: Any) -> Any:
    one, two = keras.ops.split(keras.layers.Dense(8)(x), 2, -1)
    return one * keras.ops.sigmoid(two)


def _masked(keras: Any, _rng: Rng, x: Any) -> Any:
    return keras.layers.GRU(4, return_sequences=True)(x, mask=x[..., 0] > -0.5)


def _pairwise(keras: Any, _rng: Rng, x: Any) -> Any:
    return keras.ops.einsum("btf,btg->btf", x, keras.ops.softmax(x))


def _difference(keras: Any, _rng: Rng, x: Any) -> Any:
    """From the last time step to this one; the first one has none."""
    return keras.layers.ZeroPadding1D((1, 0))(x[:, 1:] - x[:, :-1])


def _samples(keras: Any, rng: Rng, x: Any) -> Any:
    """Windows over the features, as if they were the samples of a frame."""
    kernel, stride = int(rng.integers(2, 9)), int(_pick(rng, 1, 2, 4))
    y = keras.layers.Reshape((-1, 1))(x)
    y = keras.layers.ZeroPadding1D((max(kernel - stride, 0), 0))(y)
    y = keras.layers.Conv1D(4, kernel, strides=stride)(y)
    return keras.layers.Dense(4)(keras.layers.Reshape((-1, 16 // stride))(y))


def _codec(keras: Any, rng: Rng, x: Any) -> Any:
    """Down and up again by transposed convolutions."""
    kernel = int(rng.integers(2, 7))
    y = keras.layers.Conv1DTranspose(3, kernel, strides=2, activation="tanh")(x)
    y = y[:, : -(kernel - 2)] if kernel > 2 else y
    y = keras.layers.AveragePooling1D(3, 2)(keras.layers.ZeroPadding1D((1, 0))(y))
    return keras.layers.Dense(4)(y)


def _decoder(keras: Any, rng: Rng, x: Any) -> Any:
    """A layer whose states are inputs and outputs of the model."""
    make, names = _pick(rng, (keras.layers.GRU, ("h",)), (keras.layers.LSTM, ("h", "c")))
    layer = make(4, return_sequences=True, return_state=True, name=f"decoder_{rng.integers(1 << 30)}")
    given = [keras.Input((4,), name=f"{layer.name}_{name}") for name in names]
    return layer(x, initial_state=given)[0]


def _plane(keras: Any, rng: Rng, x: Any) -> Any:
    """Windows over time and the features."""
    kernel, gap = (int(rng.integers(1, 4)), int(rng.integers(1, 3))), int(rng.integers(1, 9))
    y = keras.layers.Reshape((-1, 4, 1))(x)
    y = keras.layers.ZeroPadding2D((((kernel[0] - 1) * gap, 0), (kernel[1] - 1, 0)))(y)
    y = keras.layers.Conv2D(2, kernel, dilation_rate=(gap, 1), activation="tanh")(y)
    return keras.layers.Dense(4)(keras.layers.Reshape((-1, 8))(y))


def _spread(keras: Any, rng: Rng, x: Any) -> Any:
    """A transposed convolution over the features, or over time with each stride and kernel."""
    kernel, stride = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    if rng.random() < 0.3:
        y = keras.layers.Reshape((-1, 2, 2))(x)
        y = keras.layers.Conv2DTranspose(2, (1, kernel), strides=(1, stride), activation="tanh")(y)
        return keras.layers.Dense(4)(keras.layers.Reshape((-1, y.shape[2] * 2))(y))
    y = keras.layers.Conv1DTranspose(3, kernel, strides=stride, activation="tanh")(x)
    y = y[:, : stride - kernel] if kernel > stride else y
    return keras.layers.Dense(4)(keras.layers.Reshape((-1, stride * 3))(y))


def _upsampled(keras: Any, rng: Rng, x: Any) -> Any:
    size = int(rng.integers(2, 5))
    y = keras.layers.ZeroPadding1D((size, 0))(keras.layers.UpSampling1D(size)(x))
    return _pick(rng, keras.layers.AveragePooling1D, keras.layers.MaxPooling1D)(2 * size, size)(y)


def _moving(keras: Any, rng: Rng, x: Any) -> Any:
    steps = int(rng.integers(2, 12))
    padded = keras.layers.ZeroPadding1D((steps - 1, 0))(x)
    return _pick(
        rng,
        lambda: keras.layers.AveragePooling1D(steps, 1)(padded),
        lambda: keras.layers.DepthwiseConv1D(steps)(padded),
        lambda: padded[:, steps - 1 :] - padded[:, : 1 - steps],
    )()


def _shifted(keras: Any, rng: Rng, x: Any) -> Any:
    """A convolution that looks ahead, and a delay that makes up for it."""
    reach = int(rng.integers(1, 4))
    y = keras.layers.Conv1D(4, 2 * reach + 1, padding="same")(x)
    steps = reach + int(rng.integers(3))
    return keras.layers.Cropping1D((0, steps))(keras.layers.ZeroPadding1D((steps, 0))(y))


def _beside_constants(keras: Any, rng: Rng, x: Any) -> Any:
    made = _pick(rng, keras.ops.ones_like, keras.ops.zeros_like)(x[..., : int(rng.integers(1, 4))])
    return keras.layers.Dense(4)(keras.ops.concatenate([x, made], -1))


def _shared(keras: Any, rng: Rng, x: Any) -> Any:
    """One convolution, called twice."""
    layer = keras.layers.Conv1D(
        4, int(rng.integers(2, 4)), padding="causal", dilation_rate=int(rng.integers(1, 5)), activation="tanh"
    )
    return layer(layer(x))


GOOD: dict[str, Maker] = {
    "recurrent": _recurrent,
    "stacked": _stacked,
    "decoded": _decoded,
    "residual": _residual,
    "gated": _gated,
    "masked": _masked,
    "pairwise": _pairwise,
    "layer_norm": lambda k, _r, x: k.layers.LayerNormalization()(x),
    "batch_norm": lambda k, _r, x: k.layers.BatchNormalization()(x),
    "dropout": lambda k, _r, x: k.layers.Dropout(0.5)(x),
    "conv_1": lambda k, _r, x: k.layers.Conv1D(4, 1)(x),
    "reversed_features": lambda k, _r, x: k.ops.flip(x, -1),
    "cumulated_features": lambda k, _r, x: k.ops.cumsum(x, -1),
    "reshaped_by_sizes": _odd("reshaped_by_sizes"),
    "time_first": _odd("time_first"),
    "channels_first": _odd("channels_first"),
    "even_constant": _odd("even_constant"),
    "in_a_function": _odd("in_a_function"),
    "scaled": _odd("scaled"),
    "causal": lambda k, r, x: k.layers.Conv1D(
        4,
        int(r.integers(2, 5)),
        padding="causal",
        dilation_rate=int(r.integers(1, 65)),
        groups=int(_pick(r, 1, 2)),
    )(x),
    "separable": lambda k, r, x: k.layers.SeparableConv1D(4, 3)(k.layers.ZeroPadding1D((2, 0))(x)),
    "pooled": lambda k, r, x: k.layers.MaxPooling1D(3, 1)(k.layers.ZeroPadding1D((2, 0))(x)),
    "difference": _difference,
    "lag_by_padding": _odd("lag_by_padding", 7),
    "lag_by_joining": _odd("lag_by_joining", 3),
    "cumulative_sum": _odd("cumulative_sum"),
    "mean_so_far": _odd("mean_so_far"),
    "first_steps_left_out": _odd("first_steps_left_out", 200),
    "numbered": _odd("numbered"),
    "first_step": _odd("first_step"),
    "samples": _samples,
    "codec": _codec,
    "lag_behind_the_first": lambda k, _r, x: k.ops.concatenate([x[:, :1], x[:, :-1]], 1),
    "decoder": _decoder,
    "plane": _plane,
    "spread": _spread,
    "upsampled": _upsampled,
    "moving": _moving,
    "shifted": _shifted,
    "beside_constants": _beside_constants,
    "shared": _shared,
    "cumulative_product": lambda k, _r, x: x + k.ops.cumprod(0.99 + 0.01 * k.ops.tanh(x), 1),
    "difference_to_the_first": lambda k, _r, x: x - x[:, :1],
    **LOOKING_BACK,
}
BAD: dict[str, Maker] = {
    "convolution": lambda k, r, x: k.layers.Conv1D(
        4, int(r.integers(2, 5)), padding="same", dilation_rate=int(r.integers(1, 65))
    )(x),
    "pooling": lambda k, r, x: k.layers.MaxPooling1D(int(r.integers(2, 30)), 1, "same")(x),
    "attention": lambda k, _r, x: k.layers.MultiHeadAttention(1, 3)(x, x, use_causal_mask=True),
    "lead_by_padding": _odd("lead_by_padding", 200),
    "lag_by_roll": _odd("lag_by_roll", 200),
    "lead_by_gather": _odd("lead_by_gather", 200),
    "largest_scale": _odd("largest_scale"),
    "last_step": _odd("last_step"),
    "places_from_the_end": _odd("places_from_the_end"),
    "last_steps_left_out": _odd("last_steps_left_out", 200),
    "divided_by_length": _odd("divided_by_length"),
    "other_above_a_length": _odd("other_above_a_length_by_tensors", 2000),
    "mean_over_rows": _odd("mean_over_rows"),
    "noise": _odd("noise"),
    "counter": _odd("counter"),
    "backwards": lambda k, _r, x: k.layers.GRU(4, return_sequences=True, go_backwards=True)(x),
}


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """A model and its blocks."""

    seed: int
    model: Any
    blocks: tuple[str, ...]
    ends: bool
    """Its output is about the end of the sequence."""

    @property
    def is_good(self) -> bool:
        """Nothing in it stands in the way of stepping."""
        return not set(self.blocks) & set(BAD)

    def __str__(self) -> str:
        """How to get it again, and what it is."""
        return f"ARGS='--models 1 --seed {self.seed}' make fuzz-models: {', '.join(self.blocks)}"


#: As many seeds share out the good blocks. Every fourth model has a bad one, too.
HANDS = 12


def blocks_of(seed: int) -> list[str]:
    """The names of the good blocks of a seed, without the bad one."""
    deal, hand = divmod(seed, HANDS)
    return [str(name) for name in np.random.default_rng(deal).permutation(list(GOOD))[hand::HANDS]]


def draw(seed: int) -> RandomModel:
    """Stack the blocks of a seed."""
    from stepwell_server.compile.graph.tensorflow_setup import keras

    rng = np.random.default_rng(seed)
    names = blocks_of(seed)
    if not set(names) & {"recurrent", "stacked", "masked", "decoder"}:
        names.insert(int(rng.integers(len(names) + 1)), "recurrent")
    if seed % HANDS % 4 == 3:
        names.insert(int(rng.integers(len(names) + 1)), str(rng.choice(list(BAD))))
    x = keras.Input((None, 4), name="x")
    y = x
    for name in names:
        made = (GOOD | BAD)[name](keras, rng, y)
        y = y + made if rng.random() < 0.2 else made
    ends = bool(rng.random() < 0.3)
    y = y[:, -1] if ends else y
    model = _model(keras, x, keras.layers.Dense(2, name="y")(y))
    zoo.randomize(model, int(rng.integers(1 << 30)))
    return RandomModel(seed, model, tuple(names), ends)


def _model(keras: Any, x: Any, y: Any) -> Any:
    """The model from ``x`` to ``y``; states of decoders are its further inputs and outputs."""
    sources = keras.tree.flatten(keras.utils.get_source_inputs(y))
    given = [source for source in sources if source is not x]
    if not given:
        return keras.Model(x, y)
    layers = keras.Model([x, *given], y).layers
    decoders = [x for x in layers if isinstance(x, keras.layers.RNN) and x.name.startswith("decoder")]
    after = [state for layer in decoders for state in layer.output[1:]]
    return keras.Model([x, *given], [y, *after])


def series(rng: Rng, rows: int, steps: int) -> Any:
    """Return a series unlike the probe's: walks, spikes, constant stretches, other scales."""
    scale = 10.0 ** rng.uniform(-2, 1.5, (rows, 1, 1))
    walk = np.cumsum(rng.standard_normal((rows, steps, 4)), 1) / np.sqrt(steps)
    spikes = (rng.random((rows, steps, 1)) < 0.02) * rng.standard_normal((rows, steps, 4)) * 20
    flat = rng.random((rows, steps, 1)) < 0.2
    return np.where(flat, 0.0, scale * walk + spikes).astype(np.float32)
