"""Blocks of random models that look back by windows, sums, counts and first values, or over the samples of a time step.

Each takes Keras, a generator and a series ``(batch, time, 4)``, and returns another one. `random_models` stacks them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from support.models.causal import apply
from support.models.speech import delayed

Rng = np.random.Generator


def pick(rng: Rng, *values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def _custom(rng: Rng, x: Any, *kinds: tuple[str, int]) -> Any:
    """One of some custom layers, with a whole number from 2 to the one that it is given with; 1: it takes none."""
    from support.models import looking_back

    kind, largest = pick(rng, *kinds)
    name = f"{kind}_{rng.integers(1 << 30)}"
    return looking_back.layer(kind, int(rng.integers(min(2, largest), largest + 1)), name)(x)


def _mixed(keras: Any, rng: Rng, x: Any, activation: str | None = None) -> Any:
    """Back to four features."""
    chosen = pick(rng, None, "tanh", "elu") if activation is None else activation
    return keras.layers.Dense(4, activation=chosen)(x)


def _front(keras: Any, x: Any, steps: int, value: float = 0.0) -> Any:
    return keras.ops.pad(x, ((0, 0), (steps, 0), (0, 0)), constant_values=value)


# --- windows and lags -------------------------------------------------------------------------------------


def stacked_window(keras: Any, rng: Rng, x: Any) -> Any:
    """The last time steps on an axis of their own, or as features."""
    lags = [int(lag) for lag in np.cumsum([0, *rng.integers(1, 5, int(rng.integers(1, 5)))])]
    past = [delayed(keras, x, lag) for lag in (lags if rng.random() < 0.5 else lags[::-1])]
    if rng.random() < 0.4:
        return _mixed(keras, rng, keras.ops.concatenate(past, -1))
    axis = pick(rng, 2, 3, -1)
    window = keras.ops.stack(past, axis)
    return pick(
        rng,
        lambda: keras.ops.max(window, axis),
        lambda: keras.ops.mean(window, axis),
        lambda: _mixed(keras, rng, keras.layers.Reshape((-1, 4 * len(past)))(window)),
        lambda: keras.ops.sum(window * keras.ops.softmax(window, axis), axis),
    )()


def joined_lags(keras: Any, rng: Rng, x: Any) -> Any:
    """Branches of other layers and lags, which meet."""
    branches = []
    for _ in range(int(rng.integers(2, 4))):
        y = x
        for _ in range(int(rng.integers(1, 3))):
            kernel, lag = int(rng.integers(2, 5)), int(rng.integers(1, 9))
            y = pick(
                rng,
                lambda y=y, lag=lag: delayed(keras, y, lag),
                lambda y=y, kernel=kernel: keras.layers.Conv1D(
                    4, kernel, padding="causal", activation="tanh"
                )(y),
                lambda y=y, kernel=kernel: keras.layers.Conv1D(4, kernel)(_front(keras, y, kernel - 1, 0.5)),
                lambda y=y, lag=lag: _front(keras, y[:, lag:] - y[:, :-lag], lag),
                lambda y=y: keras.layers.Dense(4, activation="tanh")(y),
            )()
        branches.append(y)
    how = pick(rng, "add", "multiply", "concatenate", "maximum")
    if how == "concatenate":
        return _mixed(keras, rng, keras.layers.Concatenate()(branches))
    if how == "multiply":
        branches = [keras.ops.tanh(branch) for branch in branches]
    return getattr(keras.layers, how.title())()(branches)


def framed(keras: Any, rng: Rng, x: Any) -> Any:
    """Frames of the last time steps, by each function that takes some."""
    if rng.random() < 0.3:
        length = int(rng.integers(2, 7))
        padded = _front(keras, x, length - 1)
        frames = keras.ops.extract_sequences(keras.ops.transpose(padded, (0, 2, 1)), length, 1)
        return keras.ops.max(keras.ops.moveaxis(frames, 1, 3), 2)
    made = _custom(
        rng, x, ("frames_before", 9), ("chosen_lags", 1), ("attention_to_the_last", 9), ("rolled", 9)
    )
    return made if made.shape[-1] == 4 else _mixed(keras, rng, made)


def padded(keras: Any, rng: Rng, x: Any) -> Any:
    """Windows over constants in front, or over what layers make of them."""
    kernel, gap, value = int(rng.integers(2, 6)), int(rng.integers(1, 5)), float(rng.uniform(-2, 2))
    y = _front(keras, x, (kernel - 1) * gap, value)
    y = keras.layers.Dense(4, activation="tanh")(y) if rng.random() < 0.5 else y
    if rng.random() < 0.7:
        return keras.layers.Conv1D(4, kernel, dilation_rate=gap)(y)
    return pick(rng, keras.layers.MaxPooling1D, keras.layers.AveragePooling1D)((kernel - 1) * gap + 1, 1)(y)


def pooled_late(keras: Any, rng: Rng, x: Any) -> Any:
    """Pooling with padding on both sides, and a delay that makes up for it."""
    size = int(rng.integers(2, 8))
    kind = pick(rng, keras.layers.MaxPooling1D, keras.layers.AveragePooling1D)
    return delayed(keras, kind(size, 1, padding="same")(x), size // 2 + int(rng.integers(2)))


def channels_before_time(keras: Any, rng: Rng, x: Any) -> Any:
    """No bias: Keras would add it along another axis at some lengths."""
    kernel, first = int(rng.integers(2, 5)), {"data_format": "channels_first"}
    y = keras.layers.ZeroPadding1D((kernel - 1, 0), **first)(keras.layers.Permute((2, 1))(x))
    y = keras.layers.Conv1D(4, kernel, use_bias=False, activation="tanh", **first)(y)
    return keras.layers.Permute((2, 1))(y)


# --- sums, counts and first values ------------------------------------------------------------------------


def linear_attention(keras: Any, rng: Rng, x: Any) -> Any:
    """Sums of outer products so far, asked by each time step."""
    heads, size = int(rng.integers(1, 3)), int(rng.integers(2, 4))
    query, key, value = (keras.layers.Dense(heads * size)(x) for _ in range(3))
    split = keras.layers.Reshape((-1, heads, size))
    query, key, value = split(keras.ops.sigmoid(query)), split(keras.ops.sigmoid(key)), split(value)
    if rng.random() < 0.5:
        product = keras.ops.einsum("bthd,bthe->bthde", key, value)
    else:
        product = keras.ops.expand_dims(key, -1) * keras.ops.expand_dims(value, -2)
    found = keras.ops.einsum("bthd,bthde->bthe", query, keras.ops.cumsum(product, 1))
    weight = keras.ops.einsum("bthd,bthd->bth", query, keras.ops.cumsum(key, 1))
    found = found / (keras.ops.expand_dims(weight, -1) + 0.1)
    return x + _mixed(keras, rng, keras.layers.Reshape((-1, heads * size))(found))


def cumulative_norm(keras: Any, rng: Rng, x: Any) -> Any:
    """Norms over all so far, where a time step may bring several elements."""
    each = int(pick(rng, 1, 2, 4))
    elements = x if each == 1 else keras.layers.Reshape((-1, 4 // each))(x)
    # Rounding decides the norm of values without a spread.
    elements = keras.ops.tanh(elements)
    normed = _custom(
        rng,
        elements,
        ("cumulative_norm", 1),
        ("cumulative_norm_of_values", 1),
        ("less_the_mean_so_far", 1),
    )
    return keras.layers.Reshape((-1, 4))(normed)


def counted(keras: Any, rng: Rng, x: Any) -> Any:
    """Numbers of time steps or of samples, as features or as factors."""
    made = _custom(
        rng,
        keras.ops.tanh(x),
        ("tiled_numbers", 1),
        ("broadcast_numbers", 1),
        ("numbers_on_a_stack", 1),
        ("numbers_times_ones", 1),
        ("places_of_samples", 1),
    )
    # Factors of many thousand would leave no digits for the rest.
    return _mixed(keras, rng, made * 0.01, "tanh")


def held(keras: Any, rng: Rng, x: Any) -> Any:
    """Copies of the first value before the first time step."""
    steps = int(rng.integers(1, 7))
    first = pick(
        rng,
        lambda: keras.ops.repeat(x[:, :1], steps, axis=1),
        lambda: keras.ops.tile(x[:, :1], (1, steps, 1)),
        lambda: keras.ops.concatenate([x[:, :1]] * steps, 1),
    )()
    y = keras.ops.concatenate([first, x], 1)
    return pick(
        rng,
        lambda: keras.layers.Conv1D(4, steps + 1, activation="tanh")(y),
        lambda: keras.layers.AveragePooling1D(steps + 1, 1)(y),
        lambda: x - y[:, :-steps],
    )()


def from_the_first(keras: Any, rng: Rng, x: Any) -> Any:
    """Earlier than the first time step is the first one, or the one that mirrors it."""
    return _custom(
        rng,
        x,
        *(("lag_from_the_first", 9), ("frames_from_the_first", 6), ("lag_by_gather", 9), ("mirrored", 1)),
    )


def summed_differences(keras: Any, rng: Rng, x: Any) -> Any:
    """Sums and products of what begins late."""
    lag = int(rng.integers(1, 4))
    change = keras.ops.tanh(x[:, lag:] - x[:, :-lag])
    if rng.random() < 0.5:
        return _front(keras, keras.ops.cumsum(change, 1), lag)
    return _front(keras, keras.ops.cumprod(1 + 0.01 * change, 1), lag, 1.0)


def moving_sum(keras: Any, rng: Rng, x: Any) -> Any:
    """The difference of two sums so far."""
    steps = int(rng.integers(1, 9))
    total = keras.ops.cumsum(_front(keras, keras.ops.tanh(x), steps), 1)
    return total[:, steps:] - total[:, :-steps]


# --- several samples in each time step ----------------------------------------------------------------------


def coded(keras: Any, rng: Rng, x: Any) -> Any:
    """A strided encoder of samples, something between, and a decoder, as in SEANet."""
    strides = [(2, 2), (4,), (2,)][int(rng.integers(3))]
    y = keras.layers.Reshape((-1, 1))(x)
    for stride in strides:
        kernel = stride * int(rng.integers(1, 3)) + int(rng.integers(2))
        y = _front(keras, y, max(kernel - stride, 0))
        y = keras.layers.Conv1D(3, kernel, strides=stride, activation="elu")(y)
    each = 4 // int(np.prod(strides))
    if rng.random() < 0.5:
        y = keras.layers.Reshape((-1, 3 * each))(y)
        y = keras.layers.GRU(3 * each, return_sequences=True)(y)
        y = keras.layers.Reshape((-1, 3))(y)
    for stride in strides:
        kernel = stride + int(rng.integers(1, 4))
        y = keras.layers.Conv1DTranspose(3, kernel, strides=stride, activation="tanh")(y)
        y = y[:, : stride - kernel]
    if rng.random() < 0.5:
        y = keras.layers.Conv1D(3, 3, padding="causal", dilation_rate=2)(y)
    return keras.layers.Reshape((-1, 4))(keras.layers.Conv1D(1, 1)(y))


def overlap_added(keras: Any, rng: Rng, x: Any) -> Any:
    """Frames that overlap and are added; some come from spectra."""
    if rng.random() < 0.6:
        size = int(rng.integers(5, 14))
        return apply("overlapping_frames", 4)(keras, keras.layers.Dense(size)(x))
    window = int(pick(rng, 8, 16))
    samples = keras.ops.pad(keras.layers.Reshape((-1,))(x), ((0, 0), (window - 4, 0)))
    real, imaginary = keras.ops.stft(samples, window, 4, window, center=False)
    size = keras.ops.sqrt(real * real + imaginary * imaginary + 1e-3)
    mask = keras.layers.Dense(window // 2 + 1, activation="sigmoid")(size)
    clean = keras.ops.istft((real * mask, imaginary * mask), window, 4, window, center=False)
    return keras.layers.Reshape((-1, 4))(clean[:, : 4 - window])


def framed_samples(keras: Any, rng: Rng, x: Any) -> Any:
    made = _custom(rng, x, ("frames_of_samples", 9), ("frames_within_steps", 5), ("samples_joined_late", 5))
    return made if made.shape[-1] == 4 else _mixed(keras, rng, made)


def shifted_samples(keras: Any, rng: Rng, x: Any) -> Any:
    """Shifts by single samples, beside samples and sums of them."""
    samples = keras.layers.Reshape((-1, 1))(x)
    late = delayed(keras, samples, int(rng.integers(1, 12)))
    y = pick(
        rng,
        lambda: samples - late,
        lambda: keras.ops.cumsum(keras.ops.tanh(late), 1),
        lambda: keras.layers.Conv1D(1, 3, padding="causal", dilation_rate=int(rng.integers(1, 6)))(late),
        lambda: keras.layers.MaxPooling1D(3, 1)(_front(keras, late, 2, 0.25)),
    )()
    return keras.layers.Reshape((-1, 4))(y)


LOOKING_BACK = {
    function.__name__: function
    for function in (
        *(stacked_window, joined_lags, framed, padded, pooled_late, channels_before_time),
        *(linear_attention, cumulative_norm, counted, held, from_the_first, summed_differences, moving_sum),
        *(coded, overlap_added, framed_samples, shifted_samples),
    )
}
