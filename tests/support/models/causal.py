"""Models with operations that look back: convolutions, pooling, shifts, sums. Keras is imported inside functions only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.models.speech import SPEECH

Layers = Callable[[Any, Any], Any]
"""Takes ``keras`` and a tensor, and returns a tensor."""
FEATURES: dict[str, tuple[int, ...]] = {}
"""Sizes of one time step of the input, where they are not ``(4,)``."""
CAUSAL: dict[str, Layers] = {}
"""What each model computes."""
REFUSED_LOOPS = {
    **dict.fromkeys(
        (
            *("loop_ahead", "loop_of_the_last", "loop_of_the_second", "loop_by_two", "loop_over_half"),
            *("loop_until_70000", "loop_until_20000000", "loop_until_a_sum", "loop_of_what_it_wrote"),
            "scan_of_all",
        ),
        "loops over the time axis; ",
    ),
    **dict.fromkeys(
        ("loop_written_backwards", "loop_read_backwards"), "looks ahead: it loops over the time axis"
    ),
    "loop_of_numbers": "uses the number of the time step where it loops over the time axis; pass the position as an",
    "loop_of_its_length": "depends on the number of time steps",
    "loop_of_short_lengths": "depends on the number of time steps",
    **dict.fromkeys(
        ("loop_of_long_lengths", "scan_of_long_lengths"), "computes something different for one time step"
    ),
    "loop_of_other_rows": "takes the mean over the rows of the batch",
    "scan_from_the_end": "loops over the time axis from a state on that the inputs determine",
    "scan_backwards": "takes elements by their number along the time axis",
}
"""Reasons why loops over time of `support.models.scanning` are refused."""


def build(name: str, seed: int = 1) -> Any:
    """Build a model with random weights."""
    from stepwell_server.compile.graph.tensorflow_setup import keras
    from support.models.zoo import randomize

    x = keras.Input((None, *FEATURES.get(name, (4,))), name="x")
    model = keras.Model(x, CAUSAL[name](keras, x))
    randomize(model, seed)
    return model


def _add(name: str, layers: Layers, features: tuple[int, ...] = (4,)) -> None:
    CAUSAL[name], FEATURES[name] = layers, features


def apply(kind: str, n: int = 1) -> Layers:
    """Return what a custom layer does with its input."""

    def call(_keras: Any, x: Any) -> Any:
        from support.models import looking_back

        return looking_back.layer(kind, n)(x)

    return call


def apply_loop(kind: str) -> Layers:
    """Return what a custom layer with a loop over time does with its input."""

    def call(_keras: Any, x: Any) -> Any:
        from support.models import scanning

        return scanning.layer(kind)(x)

    return call


def _scan_of_late(keras: Any, x: Any) -> Any:
    y = apply_loop("scan_of_late")(keras, x)
    return {"each": _conv(keras, y), "last": apply_loop("state_of_a_scan")(keras, y)}


def _conv(keras: Any, x: Any, kernel: int = 3, **options: Any) -> Any:
    return keras.layers.Conv1D(options.pop("filters", 4), kernel, padding="causal", **options)(x)


def _front(keras: Any, x: Any, steps: int) -> Any:
    return keras.layers.ZeroPadding1D((steps, 0))(x)


def _lag(keras: Any, x: Any, steps: int, value: float = 0.0) -> Any:
    return keras.ops.pad(x[:, :-steps], ((0, 0), (steps, 0), (0, 0)), constant_values=value)


def _delay(keras: Any, x: Any, steps: int) -> Any:
    return keras.layers.Cropping1D((0, steps))(_front(keras, x, steps))


def _joined(keras: Any, x: Any) -> Any:
    """Two learnt time steps in front, and the last two left out."""
    from support.models.custom_layers import StartSteps

    return StartSteps(2, name="start")(x)[:, :-2]


def _product_of_padding(keras: Any, x: Any) -> Any:
    y = keras.ops.cumprod(keras.layers.Dense(4, activation="sigmoid")(_front(keras, x, 2)) + 0.5, 1)
    return y[:, 2:] - y[:, :-2]


def _numbered(keras: Any, x: Any) -> Any:
    number = keras.ops.cumsum(keras.ops.ones_like(x[..., :1]), 1)
    return _conv(keras, keras.layers.Concatenate()([x, keras.ops.log(number)]))


def _moving_sum(keras: Any, x: Any) -> Any:
    total = keras.ops.cumsum(_front(keras, x, 4), 1)
    return total[:, 4:] - total[:, :-4]


def _difference_by_joining(keras: Any, x: Any) -> Any:
    return keras.ops.concatenate([keras.ops.ones_like(x[:, :1]), x[:, 1:] - x[:, :-1]], 1)


def _same_twice(keras: Any, x: Any) -> Any:
    """Two convolutions that look ahead, and a shift that makes up for it."""
    y = keras.layers.Conv1D(4, 5, padding="same", activation="relu")(x)
    y = keras.layers.DepthwiseConv1D(3, padding="same", dilation_rate=2)(y)
    return _lag(keras, y, 5, 0.5)


# --- convolutions ------------------------------------------------------------------------------------------

_add("conv", lambda k, x: _conv(k, x, name="conv"))
_add("conv_kernel_1", lambda k, x: _conv(k, x, 1))
_add("conv_kernel_9", lambda k, x: _conv(k, x, 9, activation="relu"))
_add("conv_one_feature", lambda k, x: _conv(k, x, 4, filters=1), (1,))
_add("conv_without_bias", lambda k, x: _conv(k, x, use_bias=False))
_add("conv_dilated", lambda k, x: _conv(k, x, dilation_rate=16))
_add("conv_grouped", lambda k, x: _conv(k, x, groups=2, filters=6))
_add("conv_grouped_dilated", lambda k, x: _conv(k, x, groups=4, filters=8, dilation_rate=3))
_add("conv_padded", lambda k, x: k.layers.Conv1D(5, 3)(_front(k, x, 2)))
_add("conv_padded_too_much", lambda k, x: k.layers.Cropping1D((0, 3))(k.layers.Conv1D(5, 3)(_front(k, x, 5))))
_add(
    "conv_same_shifted",
    lambda k, x: k.layers.Cropping1D((0, 2))(k.layers.Conv1D(5, 5, padding="same")(_front(k, x, 2))),
)
_add("conv_same_twice_shifted", _same_twice)
_add("conv_then_padded", lambda k, x: _front(k, k.layers.Conv1D(5, 3)(x), 2))
_add(
    "conv_on_padding_with_bias",
    lambda k, x: k.layers.Conv1D(3, 3)(k.layers.Dense(5, activation="tanh")(_front(k, x, 2))),
)
_add("depthwise", lambda k, x: k.layers.DepthwiseConv1D(3, depth_multiplier=2)(_front(k, x, 2)))
_add("depthwise_dilated", lambda k, x: k.layers.DepthwiseConv1D(3, dilation_rate=4)(_front(k, x, 8)))
_add("separable", lambda k, x: k.layers.SeparableConv1D(6, 3)(_front(k, x, 2)))
_add("separable_dilated", lambda k, x: k.layers.SeparableConv1D(6, 3, dilation_rate=2)(_front(k, x, 4)))


def _plane(before: int, space: Any, *layers: Callable[[Any], Any]) -> Layers:
    def call(keras: Any, x: Any) -> Any:
        rank = len(x.shape) - 2
        padding = getattr(keras.layers, f"ZeroPadding{rank}D")
        x = padding(((before, 0), *[space] * (rank - 1)))(x)
        for layer in layers:
            x = layer(keras.layers)(x)
        return x

    return call


def _turned(layers: Layers) -> Layers:
    """Space before time, as in spectrograms."""

    def call(keras: Any, x: Any) -> Any:
        y = keras.ops.expand_dims(keras.ops.transpose(x, (0, 2, 1)), -1)
        y = layers(keras, keras.layers.ZeroPadding2D(((0, 0), (2, 0)))(y))
        return keras.layers.Permute((2, 1, 3))(y)

    return call


_add("conv_2d", _plane(2, (1, 1), lambda k: k.Conv2D(3, 3)), (6, 2))
_add("conv_2d_dilated", _plane(4, (0, 0), lambda k: k.Conv2D(3, (3, 1), dilation_rate=(2, 1))), (6, 2))
_add("conv_2d_strided_in_space", _plane(1, (0, 1), lambda k: k.Conv2D(3, 2, strides=(1, 2))), (5, 2))
_add(
    "conv_2d_same",
    _plane(
        2, (0, 0), lambda k: k.Conv2D(3, (5, 3), padding="same"), lambda k: k.Cropping2D(((0, 2), (0, 0)))
    ),
    (6, 2),
)
_add(
    "conv_2d_same_over_all_of_space",
    _plane(
        2, (0, 0), lambda k: k.Conv2D(3, (5, 3), padding="same"), lambda k: k.Cropping2D(((0, 2), (0, 0)))
    ),
    (3, 1),
)
_add("conv_2d_over_space_and_time", _turned(lambda k, y: k.layers.Conv2D(3, 3)(y)), (3,))
_add("depthwise_2d", _plane(2, (1, 1), lambda k: k.DepthwiseConv2D(3)), (6, 2))
_add("conv_3d", _plane(2, (0, 1), lambda k: k.Conv3D(3, (3, 2, 2))), (4, 3, 2))
_add(
    "frames",
    lambda k, x: _conv(
        k, k.layers.TimeDistributed(k.layers.Flatten())(k.layers.TimeDistributed(k.layers.Conv2D(2, 3))(x))
    ),
    (5, 5, 1),
)

# --- pooling, shifts, differences, sums -------------------------------------------------------------------

_add("average_pooling", lambda k, x: k.layers.AveragePooling1D(5, strides=1)(_front(k, x, 4)))
_add("max_pooling", lambda k, x: k.layers.MaxPooling1D(4, strides=1)(_front(k, x, 3)))
_add("max_pooling_2d", _plane(1, (0, 0), lambda k: k.MaxPooling2D((2, 2), strides=(1, 2))), (6, 2))
_add("shift", lambda k, x: _delay(k, x, 3))
_add("shift_of_constants", lambda k, x: _lag(k, x, 2, 5.0))
_add("shift_by_joining", _joined)
_add("lags", lambda k, x: k.ops.concatenate([x, _lag(k, x, 1), _lag(k, x, 4)], -1))
_add("difference", lambda k, x: _front(k, x[:, 1:] - x[:, :-1], 1))
_add("difference_by_joining", _difference_by_joining)
_add("second_difference", lambda k, x: _front(k, x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2], 2))
_add("difference_to_shifted", lambda k, x: x - _delay(k, x, 5))
_add(
    "delayed_by_two_ways",
    lambda k, x: k.layers.Concatenate()([_delay(k, x, 2), _delay(k, k.layers.Dense(3)(x), 6)]),
)
_add("product_with_the_past", lambda k, x: x * k.ops.sigmoid(_delay(k, x, 1)))
_add(
    "past_beside_constants",
    lambda k, x: k.ops.concatenate([_delay(k, x, 2), k.ops.ones_like(x[:, :, :1])], -1),
)
_add("stacked_past", lambda k, x: k.ops.max(k.ops.stack([x, _delay(k, x, 1), _delay(k, x, 2)], 2), 2))
_add("cumulative_sum", lambda k, x: k.ops.cumsum(x, 1))
_add("cumulative_sum_of_shifted", lambda k, x: k.ops.cumsum(_delay(k, k.layers.Dense(2)(x), 2), 1))
_add("cumulative_product", lambda k, x: k.ops.cumprod(k.ops.sigmoid(x) + 0.5, 1))
_add("cumulative_sum_of_padding", lambda k, x: k.ops.cumsum(_front(k, x, 3), 1)[:, 3:])
_add("cumulative_product_of_padding", _product_of_padding)
_add("cumulative_mean", lambda k, x: k.ops.cumsum(x, 1) / k.ops.cumsum(k.ops.ones_like(x), 1))
_add("number_of_the_step", _numbered)
_add("difference_to_the_first", lambda k, x: k.layers.Dense(3)(x - x[:, :1]))
_add("first_of_all", lambda k, x: {"first": x[:, 0], "each": k.layers.Dense(2)(x)})
_add(
    "first_of_padded", lambda k, x: _conv(k, x) / (1 + k.ops.abs(k.ops.take(_front(k, x, 2), 2, 1)))[:, None]
)
_add("padding_as_the_first", lambda k, x: x - k.layers.Dense(4)(_front(k, x, 3) + 1)[:, 1:2])
_add("difference_behind_the_first", lambda k, x: k.ops.concatenate([x[:, :1], x[:, 1:] - x[:, :-1]], 1))
_add("lag_behind_the_first", lambda k, x: _conv(k, k.ops.concatenate([x[:, :1], x[:, :-1]], 1)))
_add("frames_before", apply("frames_before", 5))
_add("chosen_lags", apply("chosen_lags"))
_add(
    "sequences_extracted",
    lambda k, x: k.ops.max(
        k.ops.moveaxis(k.ops.extract_sequences(k.ops.transpose(_front(k, x, 3), (0, 2, 1)), 4, 1), 1, 3), 2
    ),
)
_add("mean_so_far", apply("mean_so_far"))
_add("first_steps_left_out", apply("first_steps_left_out", 5))
_add("numbered_differences", lambda k, x: _front(k, apply("numbered")(k, x[:, 1:] - x[:, :-1]), 1))
_add("numbered_padding", lambda k, x: apply("numbered")(k, _front(k, x, 2))[:, 2:])
_add("numbered_static", lambda k, x: apply("numbered_static")(k, x) + _delay(k, x, 1))
_add("attention_to_the_last", apply("attention_to_the_last", 5))
for _kind in ("numbers_on_a_stack", "tiled_numbers", "broadcast_numbers", "numbers_times_ones"):
    _add(_kind, apply(_kind))
for _kind in ("time_before_rows", "frames_before_rows"):
    _add(_kind, apply(_kind, 2))
_add("moving_sum_of_padded", _moving_sum)
_add("moving_sum", lambda k, x: k.ops.cumsum(x, 1) - _delay(k, k.ops.cumsum(x, 1), 3))

# --- several elements in each time step ------------------------------------------------------------------


def _samples(keras: Any, x: Any) -> Any:
    """Frames of samples, one after the other, as one long series."""
    return keras.layers.Reshape((-1, 1))(x)


def _frames(keras: Any, x: Any, each: int) -> Any:
    return keras.layers.Reshape((-1, each * x.shape[-1]))(x)


def _strided(*layers: tuple[int, int]) -> Layers:
    """Convolutions with a kernel and a stride, each padded by the kernel less the stride, as in SEANet."""

    def call(keras: Any, x: Any) -> Any:
        each, y = x.shape[-1], _samples(keras, x)
        for i, (kernel, stride) in enumerate(layers):
            y = keras.layers.Conv1D(3 + i, kernel, strides=stride, activation="elu")(
                _front(keras, y, kernel - stride)
            )
            each //= stride
        return _frames(keras, y, each)

    return call


def _autoencoder(keras: Any, x: Any) -> Any:
    """Down by four and up again, like a neural codec."""
    y = _samples(keras, x)
    for _ in range(2):
        y = keras.layers.Conv1D(4, 4, strides=2, activation="elu")(_front(keras, y, 2))
    y = keras.layers.LSTM(4, return_sequences=True)(_frames(keras, y, x.shape[-1] // 4))
    for _ in range(2):
        y = keras.layers.Conv1DTranspose(4, 4, strides=2, activation="elu")(y)[:, :-2]
    return _frames(keras, _conv(keras, y, filters=1), x.shape[-1])


def _conv_tasnet(keras: Any, x: Any) -> Any:
    """Conv-TasNet (arXiv:1809.07454) for one speaker: a time step brings four of the encoder's frames."""
    from support.models.looking_back import layer

    encoded = keras.layers.Conv1D(6, 4, strides=2, activation="relu")(_front(keras, _samples(keras, x), 2))
    y = keras.layers.Conv1D(4, 1)(layer("cumulative_norm", name="norm")(encoded))
    for dilation in (1, 2):
        z = keras.layers.PReLU(shared_axes=[1])(keras.layers.Conv1D(5, 1)(y))
        z = layer("cumulative_norm", name=f"before_{dilation}")(z)
        z = keras.layers.DepthwiseConv1D(3, dilation_rate=dilation)(_front(keras, z, 2 * dilation))
        z = layer("cumulative_norm", name=f"behind_{dilation}")(keras.layers.PReLU(shared_axes=[1])(z))
        y = keras.layers.Add()([y, keras.layers.Conv1D(4, 1)(z)])
    masked = encoded * keras.layers.Conv1D(6, 1, activation="sigmoid")(y)
    return _frames(keras, keras.layers.Conv1DTranspose(1, 4, strides=2)(masked)[:, :-2], x.shape[-1])


def _residual_samples(keras: Any, x: Any) -> Any:
    y = _samples(keras, x)
    y = y + _conv(keras, keras.layers.Activation("elu")(_conv(keras, y, 3, dilation_rate=2)), 1, filters=1)
    y = keras.layers.Conv1D(4, 6, strides=3)(_front(keras, y, 4)) + keras.layers.AveragePooling1D(4, 3)(
        _front(keras, y, 2)
    )
    return _frames(keras, y, x.shape[-1] // 3)


_add("overlapping_windows", _strided((10, 4)), (4,))
_add("strided_by_steps", _strided((7, 2), (5, 3), (2, 1)), (12,))
_add("strided_same_kernel", _strided((4, 4)), (8,))
_add(
    "strided_padded_less",
    lambda k, x: _frames(k, k.layers.Conv1D(3, 6, strides=3)(_front(k, _samples(k, x), 4)[:, :-1]), 2),
    (6,),
)
_add(
    "samples_of_padding_with_bias",
    lambda k, x: _frames(
        k,
        k.layers.Conv1D(2, 5, strides=2)(k.layers.Dense(3, activation="tanh")(_front(k, _samples(k, x), 3))),
        2,
    ),
    (4,),
)
_add(
    "samples_and_constants",
    lambda k, x: _strided((5, 2))(k, k.ops.concatenate([x, k.ops.ones_like(x[..., :2])], -1)),
    (4,),
)
_add(
    "samples_padded_late",
    lambda k, x: _frames(k, _front(k, k.layers.Conv1D(3, 6, dilation_rate=2)(_samples(k, x)), 10), 4),
    (4,),
)
_add(
    "pairs_of_samples",
    lambda k, x: _frames(
        k, _front(k, k.layers.Reshape((-1, 2))(_front(k, _samples(k, x), 3)[:, :-1]), 1)[:, :-2], 2
    ),
    (4,),
)
_add("samples_joined_late", apply("samples_joined_late", 5), (4,))
_add("lag_by_reshape", apply("lag_by_reshape", 3))
_add("frames_of_samples", apply("frames_of_samples", 4), (4,))
_add("frames_within_steps", apply("frames_within_steps", 5), (4,))
_add(
    "sum_of_differences",
    lambda k, x: _front(k, k.ops.cumsum(k.ops.abs(x[:, 2:] - x[:, :-2]), 1), 2),
)
_add(
    "product_of_differences",
    lambda k, x: _front(k, k.ops.cumprod(1 + 0.1 * k.ops.tanh(x[:, 1:] - x[:, :-1]), 1), 1),
)
_add(
    "depthwise_of_samples_dilated",
    lambda k, x: _frames(
        k, k.layers.DepthwiseConv1D(3, dilation_rate=3, depth_multiplier=2)(_front(k, _samples(k, x), 6)), 4
    ),
    (4,),
)
_add(
    "conv_3d_of_samples_dilated",
    lambda k, x: k.layers.Reshape((-1, 24))(
        k.layers.Conv3D(2, (2, 2, 1), dilation_rate=(3, 1, 1))(
            k.layers.ZeroPadding3D(((3, 0), (0, 0), (0, 0)))(k.layers.Reshape((-1, 3, 2, 1))(x))
        )
    ),
    (18,),
)
_add("codec", _autoencoder, (4,))
_add("cumulative_norm", apply("cumulative_norm"))
_add("cumulative_norm_of_values", apply("cumulative_norm_of_values"))
_add("conv_tasnet", _conv_tasnet, (8,))
_add("mean_of_all_samples", lambda k, x: _frames(k, apply("less_the_mean_so_far")(k, _samples(k, x)), 4))
_add("places_of_samples", apply("places_of_samples"))
_add(
    "cumulative_sum_of_padded_samples",
    lambda k, x: _frames(k, k.ops.cumsum(k.layers.Dense(3)(_front(k, _samples(k, x), 3)), 1)[:, :-3], 4),
)
_add(
    "cumulative_sum_of_late_samples",
    lambda k, x: _frames(k, _front(k, k.ops.cumsum(_samples(k, x)[:, 3:], 1), 3), 4),
)
_add(
    "cumulative_product_of_samples",
    lambda k, x: _frames(k, k.ops.cumprod(1 + 0.1 * k.ops.tanh(_samples(k, x)), 1), 4),
)
_add(
    "number_of_the_sample",
    lambda k, x: _frames(k, _samples(k, x) / k.ops.cumsum(k.ops.ones_like(_samples(k, x)), 1), 4),
)
_add("residual_samples", _residual_samples, (6,))
_add(
    "samples_shifted_twice",
    lambda k, x: _frames(k, _lag(k, _lag(k, _samples(k, x), 1, 0.5), 7), 4),
    (4,),
)
_add("shifted_samples", lambda k, x: _frames(k, _samples(k, x) - _delay(k, _samples(k, x), 5), 4), (4,))
_add("transposed", lambda k, x: k.layers.Conv1DTranspose(3, 4)(x)[:, :-3])
_add(
    "transposed_of_delayed",
    lambda k, x: _frames(k, k.layers.Conv1DTranspose(3, 2, strides=2)(_lag(k, x, 3)), 2),
)
_add("transposed_with_gaps", lambda k, x: _frames(k, k.layers.Conv1DTranspose(3, 2, strides=3)(x), 3))
_add(
    "transposed_unevenly",
    lambda k, x: _frames(
        k,
        k.layers.Conv1DTranspose(2, 5, strides=2)(
            k.layers.Conv1DTranspose(3, 5, strides=3)(_conv(k, x, filters=6))[:, :-2]
        )[:, :-3],
        6,
    ),
)
_add(
    "transposed_2d",
    lambda k, x: k.layers.Reshape((-1, 18))(k.layers.Conv2DTranspose(3, (3, 1), strides=(2, 1))(x)[:, :-1]),
    (3, 2),
)
_add(
    "transposed_in_space",
    lambda k, x: k.layers.TimeDistributed(k.layers.Conv2DTranspose(3, (3, 2), strides=2, padding="same"))(
        k.layers.ZeroPadding3D(((1, 0), (0, 0), (0, 0)))(x)[:, :-1]
    ),
    (4, 3, 2),
)
_add(
    "upsampled_then_pooled",
    lambda k, x: _frames(k, k.layers.MaxPooling1D(3, 2)(_front(k, k.layers.UpSampling1D(4)(x), 1)), 2),
)


def _held(keras: Any, x: Any, steps: int) -> Any:
    """The first time step also stands for those before it."""
    return keras.ops.concatenate([keras.ops.repeat(x[:, :1], steps, axis=1), x], 1)


def _held_twice(keras: Any, x: Any) -> Any:
    y = keras.layers.Conv1D(4, 3, dilation_rate=2, activation="tanh")(_held(keras, x, 9))
    y = keras.layers.DepthwiseConv1D(2)(keras.layers.Concatenate()([y, keras.ops.abs(y)]))
    return keras.layers.MaxPooling1D(5, 1)(y)


def _held_and_shifted(keras: Any, x: Any) -> Any:
    """A lag that begins with the first value, in front of a GRU, and beside it."""
    y = keras.ops.concatenate([keras.ops.tile(x[:, :1], (1, 5, 1)), x[:, :-5]], 1)
    return keras.layers.Concatenate()([keras.layers.GRU(3, return_sequences=True)(y), x - y])


def _held_and_padded(keras: Any, x: Any) -> Any:
    """Copies of the first value beside zeros, before the first time step."""
    y = _held(keras, x, 2) * _front(keras, x, 2) + _held(keras, x + 1.0, 2)
    return keras.layers.Conv1D(4, 3)(y)


def _thirds(x: Any) -> Any:
    return x[:, ::3] - x[:, 2::3]


def _late(keras: Any, x: Any, steps: int) -> Any:
    """Shift what looks ahead by as many steps."""
    return keras.layers.Cropping1D((0, steps))(_front(keras, x, steps))


_add(
    "average_pooling_same_shifted",
    lambda k, x: _late(k, k.layers.AveragePooling1D(5, 1, padding="same")(x), 2),
)
_add(
    "max_pooling_same_shifted",
    lambda k, x: _late(k, k.layers.MaxPooling1D(4, 1, padding="same")(k.ops.log(k.ops.abs(x))), 3),
)
_add(
    "max_pooling_same_of_late",
    lambda k, x: _front(k, k.layers.MaxPooling1D(5, 1, padding="same")(x[:, 2:]), 4)[:, :-2],
)
_add(
    "max_pooling_same_of_padded",
    lambda k, x: k.layers.MaxPooling1D(5, 1, padding="same")(
        k.layers.Dense(3, activation="tanh")(_front(k, x, 2) - 2.0)
    )[:, :-2],
)
_add(
    "max_pooling_2d_same_shifted",
    lambda k, x: k.layers.Cropping2D(((0, 1), (0, 0)))(
        k.layers.ZeroPadding2D(((1, 0), (0, 0)))(k.layers.MaxPooling2D(3, (1, 2), padding="same")(x))
    ),
    (6, 2),
)
_add(
    "average_pooling_same_of_samples",
    lambda k, x: _frames(
        k, _late(k, k.layers.AveragePooling1D(5, 2, padding="same")(_samples(k, x)[:, 1:]), 2), 2
    ),
    (4,),
)
_add(
    "strided_same_shifted",
    lambda k, x: _frames(k, _late(k, k.layers.Conv1D(4, 8, strides=4, padding="same")(_samples(k, x)), 1), 2),
    (8,),
)
_add(
    "every_third_sample",
    lambda k, x: _frames(k, _thirds(_conv(k, _samples(k, x))), 2),
    (6,),
)
_add("transposed_of_late", lambda k, x: _late(k, k.layers.Conv1DTranspose(3, 3)(k.layers.Conv1D(4, 3)(x)), 2))
_add(
    "transposed_of_late_samples",
    lambda k, x: _frames(
        k,
        _front(
            k, k.layers.Conv1DTranspose(2, 5, strides=2)(k.layers.Conv1D(4, 6, strides=2)(_samples(k, x))), 5
        )[:, :-4],
        4,
    ),
    (4,),
)


def _channels_first(keras: Any, x: Any) -> Any:
    """Layers whose channels come before time and space."""
    layers = keras.layers
    y = layers.Reshape((1, -1, x.shape[-1]))(x)
    for filters in (4, 6):
        y = layers.ZeroPadding2D(((4, 0), (1, 1)), data_format="channels_first")(y)
        y = layers.Conv2D(filters, 3, dilation_rate=(2, 1), data_format="channels_first")(y)
        y = layers.PReLU(shared_axes=[2, 3])(layers.BatchNormalization(axis=1)(y))
    y = layers.ZeroPadding2D(((1, 0), (0, 0)), data_format="channels_first")(y)
    y = layers.AveragePooling2D((2, 2), strides=(1, 2), data_format="channels_first")(y)
    y = layers.ZeroPadding2D(((2, 0), (0, 0)), data_format="channels_first")(y)
    y = layers.DepthwiseConv2D((3, 1), data_format="channels_first")(y)
    return layers.Reshape((-1, 18))(layers.Permute((2, 1, 3))(y))


def _channels_first_1d(keras: Any, x: Any) -> Any:
    """Keras adds a bias along the time axis if that is as long as the filters: 3, fewer steps than tests compare."""
    y = keras.layers.ZeroPadding1D((2, 0), data_format="channels_first")(keras.layers.Permute((2, 1))(x))
    y = keras.layers.Conv1D(3, 3, data_format="channels_first", activation="tanh")(y)
    return keras.layers.Permute((2, 1))(y)


_add("overlapping_frames", apply("overlapping_frames", 4), (10,))
_add("channels_first", _channels_first_1d)
_add("channels_first_2d", _channels_first, (6,))
_add("first_value_in_front", lambda k, x: k.layers.Conv1D(3, 3)(_held(k, x, 2)))
_add("first_value_once_in_front", lambda k, x: k.layers.AveragePooling1D(2, 1)(_held(k, x, 1)))
_add(
    "first_value_listed_in_front",
    lambda k, x: k.layers.Conv1D(3, 3)(k.ops.concatenate([x[:, :1], x[:, :1], x], 1)),
)
_add("first_value_through_layers", _held_twice)
_add("first_value_in_a_lag", _held_and_shifted)
_add("first_value_beside_zeros", _held_and_padded)
_add(
    "first_frame_in_front",
    lambda k, x: k.layers.Conv2D(2, (3, 2))(k.layers.TimeDistributed(k.layers.Conv1D(2, 2))(_held(k, x, 2))),
    (6, 2),
)
_add("lag_by_gather", apply("lag_by_gather", 3))
_add("lag_from_the_first", apply("lag_from_the_first", 5))
_add("frames_from_the_first", apply("frames_from_the_first", 4))
_add("mirrored", apply("mirrored"))
_add("rolled", apply("rolled", 3))
_add("rolled_where", lambda k, x: _conv(k, apply("rolled_where", 3)(k, x)))
_add("rolled_unless", lambda k, x: _conv(k, apply("rolled_unless", 2)(k, x)))
for _kind in (
    "scan_of_maxima",
    "smoothed",
    "scan_from_the_first",
    "mapped_over_time",
    "loop_of_turned_elements",
    "loop_with_two_states",
):
    _add(_kind, apply_loop(_kind))
_add("scan_of_late", _scan_of_late)

# --- whole models ---------------------------------------------------------------------------------------


def _tcn(keras: Any, x: Any) -> Any:
    for i in range(4):
        y = keras.layers.Conv1D(6, 3, padding="causal", dilation_rate=2**i, name=f"dilated_{i}")(x)
        y = keras.layers.Dropout(0.1)(keras.layers.Activation("relu")(keras.layers.LayerNormalization()(y)))
        x = keras.layers.Add()([keras.layers.Conv1D(6, 1)(x) if i == 0 else x, y])
    return keras.layers.Dense(2)(x)


def _wavenet(keras: Any, x: Any) -> Any:
    skips = []
    for i in range(3):
        gate = _conv(keras, x, 2, dilation_rate=2**i, activation="sigmoid")
        y = _conv(keras, x, 2, dilation_rate=2**i, activation="tanh") * gate
        skips.append(keras.layers.Conv1D(3, 1)(y))
        x = x + keras.layers.Conv1D(4, 1)(y)
    return keras.layers.Dense(2)(keras.activations.relu(keras.layers.Add()(skips)))


def _spotter(keras: Any, x: Any) -> Any:
    x = keras.layers.BatchNormalization()(_conv(keras, x, 5, activation="relu"))
    x = keras.layers.SeparableConv1D(6, 3, activation="relu")(_front(keras, x, 2))
    return keras.layers.Dense(3, activation="softmax")(keras.layers.GRU(5, name="gru")(x))


def _block(keras: Any, x: Any) -> Any:
    inner = keras.Input((None, 4))
    block = keras.Model(inner, inner + _conv(keras, inner, name="conv"), name="block")
    return block(block(x))


def _around_an_lstm(keras: Any, x: Any) -> Any:
    x = keras.layers.LSTM(4, return_sequences=True, name="lstm")(_conv(keras, x))
    return _conv(keras, x, 4, name="behind")


def _shifted_decoder(keras: Any, x: Any) -> Any:
    return keras.layers.GRU(3, return_sequences=True, name="gru")(_delay(keras, x, 1))


def _masked(keras: Any, x: Any) -> Any:
    told = keras.layers.Masking(0.0)(x)
    hidden = keras.layers.LSTM(3, return_sequences=True, name="lstm")(told)
    return _conv(keras, hidden * 1.0)


def _two_outputs(keras: Any, x: Any) -> Any:
    y = _conv(keras, x, name="conv")
    return {"each": y, "last": keras.layers.GRU(3, name="gru")(y), "late": _delay(keras, y, 2)}


def _begun_by_the_first(keras: Any, x: Any) -> Any:
    """Cells whose first state depends on the first value; of one of them only the last output is needed."""
    first = [keras.layers.Dense(3, activation="tanh")(x[:, 0]) for _ in range(3)]
    y = keras.layers.LSTM(3, return_sequences=True, name="lstm")(_delay(keras, x, 2), initial_state=first[:2])
    last = keras.layers.GRU(3, name="gru")(_delay(keras, y, 1), initial_state=first[2])
    return {"each": y, "last": last}


def _squeezed(keras: Any, x: Any) -> Any:
    y = _conv(keras, x, activation="swish")
    return keras.layers.Multiply()([y, keras.layers.Dense(4, activation="sigmoid")(y)])


def _nodes_of_a_graph(keras: Any, x: Any) -> Any:
    """Nodes that take from their neighbours, with the constant before the data."""
    joined = keras.ops.convert_to_tensor([[0.5, 0.2, 0.0], [0.3, 0.5, 0.1], [0.0, 0.6, 0.4]], "float32")
    y = keras.layers.Dense(3, activation="relu")(keras.ops.einsum("ij,btjf->btif", joined, x))
    return _conv(keras, keras.layers.Reshape((-1, 9))(keras.ops.einsum("ij,btjf->btfi", joined, y)))


_add("tcn", _tcn)
_add("wavenet", _wavenet)
_add("keyword_spotter", _spotter)
_add("block_called_twice", _block)
_add("around_an_lstm", _around_an_lstm)
_add("shifted_decoder", _shifted_decoder)
_add("begun_by_the_first", _begun_by_the_first)
_add("behind_a_mask", _masked)
_add("lstm_inside_a_step", lambda k, x: _conv(k, k.layers.TimeDistributed(k.layers.LSTM(3))(x)), (5, 2))
_add("two_outputs", _two_outputs)
_add("squeeze_and_excite", _squeezed)
_add("nodes_of_a_graph", _nodes_of_a_graph, (3, 2))

for _name, (_layers, _features) in SPEECH.items():
    _add(_name, _layers, _features)
