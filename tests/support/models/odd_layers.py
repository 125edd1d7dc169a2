"""One custom layer for many odd things: `Apply` does what its kind says, with one whole number to turn.

Each kind is a function of the layer and its input, ``(batch, time, features)``; they are what people write in
their own layers, and most of them cannot be stepped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# First of all, so that TensorFlow has one thread: the generator below starts it.
from stepwell_server.compile.graph.tensorflow_setup import keras, tf

Kind = Callable[["Apply", Any], Any]
KINDS: dict[str, Kind] = {}
ops = keras.ops


@keras.saving.register_keras_serializable(package="zoo")
class Apply(keras.Layer):
    """Does ``kind`` with the number ``n``."""

    def __init__(self, kind: str, n: int = 1, **kwargs: Any) -> None:
        super().__init__(**{"name": kind, **kwargs})
        self.kind, self.n = kind, n
        self.supports_masking = True
        self.seeds = keras.random.SeedGenerator(1)

    def build(self, shape: Any) -> None:
        self.weight = self.add_weight(shape=(shape[-1],), name="weight")
        self.count = self.add_weight(shape=(), name="count", trainable=False)

    def call(self, inputs: Any) -> Any:
        return KINDS[self.kind](self, inputs)

    def compute_output_spec(self, inputs: Any) -> Any:
        """Keras would find out by calling the layer without a length; some of them need one."""
        with keras.StatelessScope():
            sizes = [size or 5 for size in inputs.shape]
            result = self.call(tf.zeros(sizes, inputs.dtype))
        shape = list(result.shape)
        for i, size in enumerate(inputs.shape[:2]):
            if size is None and i < len(shape):
                shape[i] = None
        return keras.KerasTensor(shape, dtype=result.dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "kind": self.kind, "n": self.n}


def kind(function: Kind) -> Kind:
    KINDS[function.__name__] = tf.autograph.experimental.do_not_convert(function)
    return function


# --- code that is no graph -----------------------------------------------------------------------------


@kind
def values_as_numpy(layer: Apply, x: Any) -> Any:
    return tf.constant(x.numpy() * 2)


@kind
def value_as_number(layer: Apply, x: Any) -> Any:
    return x * float(ops.max(x))


@kind
def while_values_are_large(layer: Apply, x: Any) -> Any:
    while bool(ops.max(x) > layer.n):
        x = x / 2
    return x


@kind
def asserting(layer: Apply, x: Any) -> Any:
    tf.debugging.assert_less(x, float(layer.n))
    return x


@kind
def missing_key(layer: Apply, x: Any) -> Any:
    factors: dict[str, float] = {}
    return x if tf.executing_eagerly() else x * factors["absent"]


@kind
def as_complex(layer: Apply, x: Any) -> Any:
    return tf.cast(x, tf.complex64)


# --- look back, look ahead -----------------------------------------------------------------------------


@kind
def lag_by_padding(layer: Apply, x: Any) -> Any:
    return ops.pad(x, [[0, 0], [layer.n, 0], [0, 0]])[:, : ops.shape(x)[1]]


@kind
def lead_by_padding(layer: Apply, x: Any) -> Any:
    return ops.pad(x, [[0, 0], [0, layer.n], [0, 0]])[:, layer.n :]


@kind
def lag_by_joining(layer: Apply, x: Any) -> Any:
    return ops.concatenate([ops.zeros_like(x[:, : layer.n]), x[:, : -layer.n]], 1)


@kind
def lead_in_a_loop(layer: Apply, x: Any) -> Any:
    def body(i: Any, y: Any) -> Any:
        return i + 1, tf.pad(y[:, 1:], [[0, 0], [0, 1], [0, 0]])

    return tf.while_loop(lambda i, _: i < layer.n, body, (0, x))[1]


@kind
def first_elements(layer: Apply, x: Any) -> Any:
    return x[:, : layer.n]


@kind
def last_elements(layer: Apply, x: Any) -> Any:
    return x[:, -layer.n :]


@kind
def at_most_so_many(layer: Apply, x: Any) -> Any:
    return x[:, : tf.minimum(tf.shape(x)[1], layer.n)]


@kind
def lag_by_roll(layer: Apply, x: Any) -> Any:
    return ops.roll(x, layer.n, 1)


@kind
def lead_by_gather(layer: Apply, x: Any) -> Any:
    steps = ops.shape(x)[1]
    return ops.take(x, ops.minimum(ops.arange(steps) + layer.n, steps - 1), 1)


@kind
def lag_by_gather(layer: Apply, x: Any) -> Any:
    return ops.take(x, ops.maximum(ops.arange(ops.shape(x)[1]) - layer.n, 0), 1)


@kind
def lag_by_masked_gather(layer: Apply, x: Any) -> Any:
    """Zeros at first: no difference shows in the first ``n`` time steps."""
    place = ops.arange(ops.shape(x)[1])
    known = ops.cast(place >= layer.n, "float32")
    return ops.take(x, ops.maximum(place - layer.n, 0), 1) * known[None, :, None]


@kind
def lag_by_reshape(layer: Apply, x: Any) -> Any:
    """What was called skewing: one row of padding, and the same elements cut at other places."""
    rows, steps, size = x.shape
    flat = tf.reshape(tf.pad(x, [[0, 0], [layer.n, 0], [0, 0]]), (rows, -1))
    return tf.reshape(flat[:, : steps * size], (rows, steps, size))


@kind
def lag_by_python_loop(layer: Apply, x: Any) -> Any:
    steps = x.shape[1] or 5
    if steps > 1000:
        return x
    return ops.stack([x[:, max(t - layer.n, 0)] for t in range(steps)], 1)


@kind
def reversed_over_time(layer: Apply, x: Any) -> Any:
    return ops.flip(x, 1)


@kind
def first_step(layer: Apply, x: Any) -> Any:
    return x - x[:, :1]


@kind
def second_step(layer: Apply, x: Any) -> Any:
    return x - x[:, 1:2]


@kind
def last_step(layer: Apply, x: Any) -> Any:
    return x - x[:, -1:]


@kind
def last_step_twice_reversed(layer: Apply, x: Any) -> Any:
    return x + ops.flip(ops.flip(x, 1)[:, -1:], 1)


@kind
def numbers_of_numpy(layer: Apply, x: Any) -> Any:
    return x + layer.weight * np.arange(x.shape[1], dtype="float32")[None, :, None]


@kind
def by_scan(layer: Apply, x: Any) -> Any:
    summed = tf.scan(lambda total, now: total + now, tf.transpose(x, (1, 0, 2)), reverse=True)
    return tf.transpose(summed, (1, 0, 2))


@kind
def by_while_loop(layer: Apply, x: Any) -> Any:
    def body(i: Any, y: Any) -> Any:
        return i + 1, tf.roll(y, 1, 1)

    return tf.while_loop(lambda i, y: i < layer.n, body, (0, x))[1]


@kind
def by_map_over_rows(layer: Apply, x: Any) -> Any:
    return tf.map_fn(lambda row: row - tf.reduce_max(row, 0), x)


@kind
def by_numpy(layer: Apply, x: Any) -> Any:
    return tf.ensure_shape(tf.numpy_function(lambda v: np.roll(v, layer.n, 1), [x], tf.float32), x.shape)


@kind
def by_condition(layer: Apply, x: Any) -> Any:
    return tf.cond(tf.reduce_sum(x[0]) > 0, lambda: x, lambda: -x)


@kind
def number_of_distinct_values(layer: Apply, x: Any) -> Any:
    return x + ops.cast(tf.size(tf.unique(tf.reshape(x, [-1]))[0]), x.dtype)


@kind
def differences(layer: Apply, x: Any) -> Any:
    return x[:, 1:] - x[:, :-1]


@kind
def every_second(layer: Apply, x: Any) -> Any:
    return x[:, ::2]


@kind
def frames_before(layer: Apply, x: Any) -> Any:
    """Frames of the last ``n`` time steps, by TensorFlow's way to take them."""
    padded = ops.pad(x, [[0, 0], [layer.n - 1, 0], [0, 0]])
    return ops.mean(tf.signal.frame(padded, layer.n, 1, axis=1), 2)


@kind
def frames_of_samples(layer: Apply, x: Any) -> Any:
    """Spectra of overlapping windows over the samples of frames."""
    rows, _, each = ops.shape(x)
    samples = ops.pad(ops.reshape(x, (rows, -1)), [[0, 0], [layer.n, 0]])
    frames = tf.signal.frame(samples, layer.n + each, each)
    return tf.abs(tf.signal.rfft(frames * tf.signal.hann_window(layer.n + each)))


@kind
def frames_within_steps(layer: Apply, x: Any) -> Any:
    """Two frames for each time step, shifted by one sample against them."""
    rows, steps, each = ops.shape(x)
    samples = ops.pad(ops.reshape(x, (rows, -1)), [[0, 0], [layer.n, 0]])[:, :-1]
    places = ops.arange(0, steps * each, each // 2)[:, None] + ops.arange(layer.n)
    return ops.reshape(ops.take(samples, places, 1), (rows, steps, 2 * layer.n))


@kind
def samples_joined_late(layer: Apply, x: Any) -> Any:
    """Differences of samples, with the same weights instead of the first ones."""
    rows, steps, each = ops.shape(x)
    pairs = ops.reshape(x, (rows, -1, 2))
    late = pairs[:, layer.n :] - pairs[:, : -layer.n]
    first = ops.broadcast_to(layer.weight[:2] + 1.0, (rows, layer.n, 2))
    return ops.reshape(ops.concatenate([first, late], 1), (rows, steps, each))


@kind
def chosen_lags(layer: Apply, x: Any) -> Any:
    """Some of the last time steps, by number, through a layer of features."""
    padded = ops.pad(ops.tanh(x + layer.weight), [[0, 0], [7, 0], [0, 0]], constant_values=0.5)
    places = ops.arange(ops.shape(x)[1])[:, None] + tf.constant([[7, 0, 5]])
    chosen = ops.take(padded, places, 1)
    return ops.reshape(chosen, (-1, ops.shape(x)[1], 3 * x.shape[2]))


@kind
def later_lags(layer: Apply, x: Any) -> Any:
    padded = ops.pad(x, [[0, 0], [2, 1], [0, 0]])
    places = ops.arange(ops.shape(x)[1])[:, None] + tf.constant([[3, 0]])
    return ops.max(ops.take(padded, places, 1), 2)


@kind
def window_of_frames(layer: Apply, x: Any) -> Any:
    return tf.reshape(
        tf.signal.frame(x, layer.n, 1, pad_end=True, axis=1), (*x.shape[:2], layer.n * x.shape[2])
    )


# --- sums and scales over time ---------------------------------------------------------------------------


@kind
def cumulative_sum(layer: Apply, x: Any) -> Any:
    return ops.cumsum(x, 1)


@kind
def cumulative_product(layer: Apply, x: Any) -> Any:
    return ops.cumprod(x, 1)


@kind
def running_max(layer: Apply, x: Any) -> Any:
    return x / ops.maximum(5.0, tf.scan(tf.maximum, tf.transpose(ops.abs(x), (1, 0, 2)))[-1][:, None])


@kind
def largest_scale(layer: Apply, x: Any) -> Any:
    return x / ops.maximum(5.0, ops.max(ops.abs(x), axis=1, keepdims=True))


@kind
def mean_so_far(layer: Apply, x: Any) -> Any:
    count = ops.cast(ops.arange(ops.shape(x)[1]) + 1, "float32")
    return x - ops.cumsum(x, 1) / count[None, :, None]


@kind
def mean_of_the_rest(layer: Apply, x: Any) -> Any:
    steps = ops.shape(x)[1]
    return x - ops.cumsum(x, 1) / ops.cast(ops.arange(steps, 0, -1), "float32")[None, :, None]


@kind
def cumulated_numbers(layer: Apply, x: Any) -> Any:
    """A sum of constants that differ: no time step has the same one as another."""
    return x * ops.cast(ops.cumsum(ops.arange(ops.shape(x)[1])), "float32")[None, :, None]


@kind
def exponential_moving_average(layer: Apply, x: Any) -> Any:
    """As a product with a triangle of powers."""
    place = ops.cast(ops.arange(ops.shape(x)[1]), "float32")
    powers = place[:, None] - place[None]
    return ops.einsum("st,btf->bsf", ops.where(powers >= 0, 0.5 ** ops.maximum(powers, 0.0), 0.0), x)


@kind
def standardised_over_time(layer: Apply, x: Any) -> Any:
    return (x - ops.mean(x, 1, keepdims=True)) / (ops.std(x, 1, keepdims=True) + 1e-3)


@kind
def softmax_over_time(layer: Apply, x: Any) -> Any:
    return x * ops.softmax(x, 1)


@kind
def sorted_over_time(layer: Apply, x: Any) -> Any:
    return ops.sort(x, 1)


@kind
def place_of_the_largest(layer: Apply, x: Any) -> Any:
    return x * ops.cast(ops.argmax(x, 1), "float32")[:, None]


@kind
def spectrum(layer: Apply, x: Any) -> Any:
    return tf.math.real(tf.signal.ifft(tf.signal.fft(tf.cast(x, tf.complex64))))


@kind
def spectrum_over_time(layer: Apply, x: Any) -> Any:
    waves = tf.transpose(tf.cast(x, tf.complex64), (0, 2, 1))
    return tf.transpose(tf.abs(tf.signal.fft(waves)), (0, 2, 1))


# --- attention -------------------------------------------------------------------------------------------


@kind
def plain_attention(layer: Apply, x: Any) -> Any:
    return ops.matmul(ops.softmax(ops.matmul(x, ops.transpose(x, (0, 2, 1)))), x)


@kind
def masked_attention(layer: Apply, x: Any) -> Any:
    steps = ops.shape(x)[1]
    scores = ops.einsum("bsf,btf->bst", x, x)
    hidden = ops.arange(steps)[:, None] < ops.arange(steps)[None]
    return ops.einsum("bst,btf->bsf", ops.softmax(ops.where(hidden[None], -1e9, scores)), x)


@kind
def pooled_by_attention(layer: Apply, x: Any) -> Any:
    weights = ops.softmax(ops.sum(x * layer.weight, -1, keepdims=True), 1)
    return x + ops.sum(weights * x, 1, keepdims=True)


# --- position and length -----------------------------------------------------------------------------------


@kind
def position_waves(layer: Apply, x: Any) -> Any:
    return x + ops.sin(ops.cast(ops.arange(ops.shape(x)[1]), "float32"))[None, :, None]


@kind
def only_places(layer: Apply, x: Any) -> Any:
    return ops.broadcast_to(ops.cast(ops.arange(ops.shape(x)[1]), "float32")[None, :, None], ops.shape(x))


@kind
def places_from_the_end(layer: Apply, x: Any) -> Any:
    steps = ops.shape(x)[1]
    return x + ops.cast(steps - ops.arange(steps), "float32")[None, :, None]


@kind
def shares_of_the_length(layer: Apply, x: Any) -> Any:
    return x + ops.linspace(0.0, 1.0, ops.shape(x)[1])[None, :, None]


@kind
def padded_places(layer: Apply, x: Any) -> Any:
    places = ops.cast(ops.arange(ops.shape(x)[1] - layer.n), "float32")
    return x + ops.pad(places, [[layer.n, 0]])[None, :, None]


@kind
def places_padded_at_the_end(layer: Apply, x: Any) -> Any:
    places = ops.cast(ops.arange(ops.shape(x)[1]), "float32")
    return x + ops.pad(places, [[0, layer.n]])[None, layer.n :, None]


@kind
def places_by_numpy(layer: Apply, x: Any) -> Any:
    """Values without a rule behind them: nothing says how they go on."""
    return x + tf.constant(np.arange(x.shape[1] or 5, dtype="float32"))[None, :, None]


@kind
def places_of_other_size(layer: Apply, x: Any) -> Any:
    """TensorFlow adds up numbers that are not whole, with roundings."""
    steps = x.shape[1] or 5
    return x + tf.range(0.0, 0.5 * steps, 0.5)[None, :, None]


@kind
def last_steps_left_out(layer: Apply, x: Any) -> Any:
    steps = ops.shape(x)[1]
    return x * ops.cast(ops.arange(steps) < steps - layer.n, "float32")[None, :, None]


@kind
def numbered(layer: Apply, x: Any) -> Any:
    """Two numbers of each step, one of them counted from another one, and with features of their own."""
    number = ops.cast(ops.arange(ops.shape(x)[1] + 3), "float32")[3:, None]
    waves = ops.concatenate([ops.tanh(number / (1.0 + i)) for i in range(x.shape[2])], -1)
    return ops.where(ops.arange(0, 2 * ops.shape(x)[1], 2)[None, :, None] < 7, x, x * waves)


@kind
def numbered_static(layer: Apply, x: Any) -> Any:
    return layer.weight / (1.0 + ops.cast(ops.arange(ops.shape(x)[1]), "float32"))[None, :, None]


@kind
def first_steps_left_out(layer: Apply, x: Any) -> Any:
    return x * ops.cast(ops.arange(ops.shape(x)[1]) >= layer.n, "float32")[None, :, None]


@kind
def divided_by_length(layer: Apply, x: Any) -> Any:
    return x / ops.cast(ops.shape(x)[1], "float32")


@kind
def divided_by_length_in_a_function(layer: Apply, x: Any) -> Any:
    return x * _share(x.shape[1] or 5)


@tf.function
def _share(steps: int) -> Any:
    return tf.constant(1.0 / max(steps, 1))


@kind
def other_above_a_length(layer: Apply, x: Any) -> Any:
    return x * 2.0 if (x.shape[1] or 5) > layer.n else x


@kind
def other_above_a_length_by_tensors(layer: Apply, x: Any) -> Any:
    return x * (1.0 + tf.cast(tf.shape(x)[1] > layer.n, "float32"))


@kind
def other_for_one_step(layer: Apply, x: Any) -> Any:
    return ops.relu6(x) if x.shape[1] == 1 else ops.relu(x)


@kind
def another_number_for_one_step(layer: Apply, x: Any) -> Any:
    return x * (0.5 if x.shape[1] == 1 else 1.0)


@kind
def other_below_a_length_in_wiring(layer: Apply, x: Any) -> Any:
    one, two = ops.tanh(x), ops.relu(x)
    return one - two if x.shape[1] == 1 else two - one


# --- rows ----------------------------------------------------------------------------------------------------


@kind
def mean_over_rows(layer: Apply, x: Any) -> Any:
    return x - ops.mean(x, 0, keepdims=True)


@kind
def other_row(layer: Apply, x: Any) -> Any:
    return x + ops.roll(x, 1, 0)


@kind
def first_row(layer: Apply, x: Any) -> Any:
    return x - x[:1]


@kind
def number_of_the_row(layer: Apply, x: Any) -> Any:
    return x + ops.cast(ops.arange(ops.shape(x)[0]), "float32")[:, None, None]


@kind
def number_of_rows(layer: Apply, x: Any) -> Any:
    return x / ops.cast(ops.shape(x)[0], "float32")


@kind
def rows_against_each_other(layer: Apply, x: Any) -> Any:
    return ops.einsum("atf,btf->atf", x, x)


@kind
def norm_of_everything(layer: Apply, x: Any) -> Any:
    return x / (1.0 + ops.norm(ops.reshape(x, (-1,))))


@kind
def batch_statistics(layer: Apply, x: Any) -> Any:
    mean, variance = ops.moments(x, (0, 1), keepdims=True)
    return (x - mean) / ops.sqrt(variance + 1e-3)


@kind
def reversed_rows(layer: Apply, x: Any) -> Any:
    return ops.flip(x, 0)


# --- random numbers, things kept ---------------------------------------------------------------------------------


@kind
def noise(layer: Apply, x: Any) -> Any:
    return x + keras.random.normal(ops.shape(x), seed=layer.seeds)


@kind
def noise_of_a_seed(layer: Apply, x: Any) -> Any:
    return x + keras.random.normal(ops.shape(x), seed=3)


@kind
def noise_of_tensorflow(layer: Apply, x: Any) -> Any:
    return x + tf.random.truncated_normal((x.shape[-1],))


@kind
def noise_of_a_generator(layer: Apply, x: Any) -> Any:
    return x + _GENERATOR.normal((x.shape[-1],))


_GENERATOR = tf.random.Generator.from_seed(3)


@kind
def noise_from_values(layer: Apply, x: Any) -> Any:
    seed = tf.cast(x[0, 0, :2] * 1000, tf.int32)
    return x + tf.random.stateless_normal((x.shape[-1],), seed)


@kind
def counter(layer: Apply, x: Any) -> Any:
    layer.count.assign(layer.count + 1.0)
    return x * layer.count


@kind
def counter_in_a_function(layer: Apply, x: Any) -> Any:
    @tf.function
    def counted(y: Any) -> Any:
        layer.count.value.assign_add(1.0)
        return y

    return counted(x)


@kind
def running_mean(layer: Apply, x: Any) -> Any:
    layer.weight.assign(0.9 * layer.weight + 0.1 * ops.mean(x, (0, 1)))
    return x - layer.weight


@kind
def clock(layer: Apply, x: Any) -> Any:
    return x + tf.cast(tf.timestamp() % 2.0, "float32")


# --- harmless ones --------------------------------------------------------------------------------------------------


@kind
def scaled(layer: Apply, x: Any) -> Any:
    return ops.tanh(x) * layer.weight + 0.1


@kind
def in_a_function(layer: Apply, x: Any) -> Any:
    @tf.function
    def squashed(y: Any) -> Any:
        return tf.nn.softsign(y) * 2.0

    return squashed(x)


@kind
def reshaped_by_sizes(layer: Apply, x: Any) -> Any:
    rows, steps, size = ops.shape(x)
    return ops.reshape(ops.reshape(x, (rows * steps, size)) * 2.0, (rows, steps, size))


@kind
def time_first(layer: Apply, x: Any) -> Any:
    return ops.transpose(ops.tanh(ops.transpose(x, (1, 0, 2))), (1, 0, 2))


@kind
def channels_first(layer: Apply, x: Any) -> Any:
    return ops.transpose(ops.softmax(ops.transpose(x, (0, 2, 1)), 1), (0, 2, 1))


@kind
def even_constant(layer: Apply, x: Any) -> Any:
    return x * ops.ones((ops.shape(x)[0], ops.shape(x)[1], 1)) * 0.5


@kind
def norm_of_the_weights(layer: Apply, x: Any) -> Any:
    return x * layer.weight / ops.sqrt(1e-3 + ops.sum(layer.weight**2))


@kind
def binned(_layer: Apply, x: Any) -> Any:
    return ops.cast(ops.digitize(x, np.array([-0.5, 0.0, 0.5])), x.dtype)


@kind
def searched(_layer: Apply, x: Any) -> Any:
    """Keras itself takes no more than one dimension."""
    places = ops.searchsorted(ops.array([-0.5, 0.0, 0.5], x.dtype), ops.reshape(x, (-1,)), side="right")
    return ops.cast(ops.reshape(places, ops.shape(x)), x.dtype)


@kind
def repeated(_layer: Apply, x: Any) -> Any:
    """A loop of TensorFlow's with a fixed number of turns."""
    return ops.fori_loop(0, 3, lambda i, y: ops.tanh(y + x * (ops.cast(i, x.dtype) + 1)), x)


@kind
def repeated_by_while(layer: Apply, x: Any) -> Any:
    def body(i: Any, y: Any) -> Any:
        return i + 1, ops.tanh(y * layer.weight + x)

    return ops.while_loop(lambda i, y: i < 3, body, (0, x))[1]


@kind
def scanned_over_features(_layer: Apply, x: Any) -> Any:
    features = ops.moveaxis(x, -1, 0)
    _, sums = ops.scan(lambda total, now: (total + now, ops.tanh(total + now)), features[0], features)
    return ops.moveaxis(sums, 0, -1)


@kind
def mapped_over_features(_layer: Apply, x: Any) -> Any:
    return ops.moveaxis(ops.map(lambda one: one * 2.0 - 1.0, ops.moveaxis(x, -1, 0)), 0, -1)


@kind
def other_for_one_step_in_a_loop(_layer: Apply, x: Any) -> Any:
    return ops.fori_loop(0, 3, lambda _i, y: y * (0.5 if x.shape[1] == 1 else 0.9), x)


@kind
def repeated_for_each_step(_layer: Apply, x: Any) -> Any:
    return ops.fori_loop(0, x.shape[1], lambda _i, y: y * 0.9, x)


@kind
def repeated_until_all_are_small(_layer: Apply, x: Any) -> Any:
    return ops.while_loop(lambda y: ops.max(ops.abs(y)) > 1.0, lambda y: (y * 0.5,), (x,))[0]


@kind
def checked(layer: Apply, x: Any) -> Any:
    return tf.ensure_shape(x, [None, None, x.shape[-1]])


@kind
def position_alone(layer: Apply, x: Any) -> Any:
    place = ops.cast(ops.arange(ops.shape(x)[1]), "float32")
    return ops.broadcast_to(place[None, :, None], ops.shape(x))


@kind
def mask_by_position(layer: Apply, x: Any) -> Any:
    return tf.broadcast_to(tf.range(tf.shape(x)[1]) >= layer.n, tf.shape(x)[:2])


@kind
def after_token_2(layer: Apply, x: Any) -> Any:
    """What comes after the end token counts for nothing."""
    found = tf.math.cumulative_logsumexp(tf.where(x == 2, 0.0, -1e9), 1)
    return ops.cast(found < -1, "float32")


@kind
def nodes_as_rows(layer: Apply, x: Any) -> Any:
    """``(batch, time, nodes, features)`` as ``(batch * nodes, time, features)``."""
    rows, steps, nodes, size = x.shape
    return tf.reshape(tf.transpose(x, (0, 2, 1, 3)), (rows * nodes, steps, size))
