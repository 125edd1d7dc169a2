"""Streaming speech models as others publish them, rebuilt in Keras with few weights. Keras is imported inside functions only.

- kws_streaming (github.com/google-research/google-research, Apache 2.0) wraps each layer that looks back in a `Stream` with a ring
  buffer: SVDF, DS-TC-ResNet, CRNN, CNN, Inception, BC-ResNet, with a flattened or averaged window at the end, and delays
  that align residuals.
- SEANet, the codec of Moshi (github.com/kyutai-labs/moshi, MIT): causal convolutions with ELU, dilated residual blocks, and
  strides. A time step is a frame of samples here.
- The convolution module of the Conformer (arXiv:2005.08100), and DTLN (arXiv:2005.07551), which cleans overlapping
  windows, as asked for in triton-inference-server/server#2442.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Layers = Callable[[Any, Any], Any]
"""Takes ``keras`` and a tensor, and returns a tensor."""
SPEECH: dict[str, tuple[Layers, tuple[int, ...]]] = {}
"""What each model computes, and the sizes of one time step of its input."""


def _add(*features: int) -> Callable[[Layers], Layers]:
    def add(layers: Layers) -> Layers:
        SPEECH[layers.__name__.strip("_")] = layers, features
        return layers

    return add


def _front(keras: Any, x: Any, steps: int) -> Any:
    """Put zeros in front of the time axis, whatever follows it."""
    return keras.ops.pad(x, ((0, 0), (steps, 0), *[(0, 0)] * (len(x.shape) - 2)))


def delayed(keras: Any, x: Any, steps: int) -> Any:
    return _front(keras, x, steps)[:, :-steps] if steps else x


def _window(keras: Any, x: Any, steps: int) -> Any:
    """The last time steps as features, the current one last: what a `Stream` of a Flatten gives."""
    return keras.ops.concatenate([delayed(keras, x, steps - 1 - i) for i in range(steps)], -1)


def _in_time(keras: Any, x: Any, filters: int, kernel: int, dilation: int = 1, **options: Any) -> Any:
    """A convolution over time of ``(batch, time, 1, features)``; no filters: depthwise."""
    x = _front(keras, x, (kernel - 1) * dilation)
    rest: dict[str, Any] = {"dilation_rate": (dilation, 1), "use_bias": False, **options}
    layers = keras.layers
    return (
        layers.Conv2D(filters, (kernel, 1), **rest)(x)
        if filters
        else layers.DepthwiseConv2D((kernel, 1), **rest)(x)
    )


def _normed(keras: Any, x: Any, activation: str = "relu") -> Any:
    return keras.layers.Activation(activation)(keras.layers.BatchNormalization()(x))


def _averaged(keras: Any, x: Any, steps: int) -> Any:
    """The mean of the last time steps: what a `Stream` of a GlobalAveragePooling2D gives."""
    pooled = keras.layers.AveragePooling2D((steps, 1), strides=1)(_front(keras, x, steps - 1))
    return keras.layers.Reshape((-1, x.shape[2] * x.shape[3]))(pooled)


# --- kws_streaming ----------------------------------------------------------------------------------------


@_add(10)
def svdf(keras: Any, x: Any) -> Any:
    for units, memory, projected in ((12, 4, 6), (12, 10, 6), (8, 10, 0)):
        x = keras.layers.Dense(units, use_bias=False)(x)
        x = keras.layers.DepthwiseConv1D(memory)(keras.layers.ZeroPadding1D((memory - 1, 0))(x))
        x = keras.layers.Activation("relu")(x)
        x = keras.layers.Dense(projected)(x) if projected else x
    return keras.layers.Dense(3, activation="softmax")(x)


def _resnet_block(
    keras: Any, x: Any, repeat: int, kernel: int, filters: int, dilation: int, *, residual: bool, delay: bool
) -> Any:
    """With ``delay``, the block was trained with padding on both sides: its residual waits for the centre of the kernels."""
    before = delayed(keras, x, repeat * dilation * (kernel - 1) // 2 if delay else 0)
    for i in range(repeat):
        x = _in_time(keras, x, 0, kernel, dilation)
        x = keras.layers.BatchNormalization()(keras.layers.Conv2D(filters, 1, use_bias=False)(x))
        if i < repeat - 1:
            x = keras.layers.Dropout(0.1)(keras.layers.Activation("relu")(x))
    if residual:
        y = keras.layers.BatchNormalization()(keras.layers.Conv2D(filters, 1, use_bias=False)(before))
        x = keras.layers.Add()([x, y])
    return keras.layers.Dropout(0.1)(keras.layers.Activation("relu")(x))


def _ds_tc_resnet(keras: Any, x: Any, *, delay: bool) -> Any:
    x = keras.ops.expand_dims(x, 2)
    for repeat, kernel, filters, dilation, residual in (
        (1, 11, 8, 1, False),
        (2, 13, 6, 1, True),
        (1, 15, 8, 2, True),
    ):
        x = _resnet_block(keras, x, repeat, kernel, filters, dilation, residual=residual, delay=delay)
    return keras.layers.Dense(3)(_averaged(keras, x, 12))


@_add(10)
def ds_tc_resnet(keras: Any, x: Any) -> Any:
    return _ds_tc_resnet(keras, x, delay=False)


@_add(10)
def ds_tc_resnet_with_delays(keras: Any, x: Any) -> Any:
    return _ds_tc_resnet(keras, x, delay=True)


def _planes(keras: Any, x: Any) -> Any:
    """Convolutions over time and features; returns ``(batch, time, features, channels)``."""
    x = keras.ops.expand_dims(x, -1)
    for filters, kernel in ((4, (3, 3)), (3, (5, 3))):
        x = keras.layers.Conv2D(filters, kernel, activation="relu")(_front(keras, x, kernel[0] - 1))
    return x


@_add(10)
def crnn(keras: Any, x: Any) -> Any:
    x = _planes(keras, x)
    x = keras.layers.Reshape((-1, x.shape[2] * x.shape[3]))(x)
    x = keras.layers.GRU(6, return_sequences=True, name="gru")(x)
    x = keras.layers.Dense(5, activation="relu")(keras.layers.Dropout(0.1)(x))
    return keras.layers.Dense(3, activation="softmax")(x)


@_add(10)
def cnn(keras: Any, x: Any) -> Any:
    x = _planes(keras, x)
    x = _window(keras, keras.layers.Reshape((-1, x.shape[2] * x.shape[3]))(x), 9)
    for units in (8, 5):
        x = keras.layers.Dense(units, activation="relu")(x)
    return keras.layers.Dense(3)(x)


@_add(10)
def inception(keras: Any, x: Any) -> Any:
    x = keras.ops.expand_dims(x, 2)
    x = _normed(keras, _in_time(keras, x, 6, 5))
    for _ in range(2):
        branches = []
        for count in range(3):
            y = _normed(keras, keras.layers.Conv2D(4, 1, use_bias=False)(x))
            for _ in range(count):
                y = _normed(keras, _in_time(keras, y, 4, 5))
            branches.append(y)
        x = _normed(keras, keras.layers.Conv2D(6, 1, use_bias=False)(keras.layers.Concatenate()(branches)))
        x = keras.layers.MaxPooling2D((3, 1), strides=1)(keras.layers.ZeroPadding2D(((2, 0), (0, 0)))(x))
    return keras.layers.Dense(3)(_averaged(keras, x, 20))


@_add(8, 1)
def bc_resnet(keras: Any, x: Any) -> Any:
    """Each block adds what it finds over frequencies, and what it finds over time in their mean."""
    x = keras.layers.Conv2D(4, (1, 5), padding="same")(x)
    for dilation in (1, 2, 4):
        y = keras.layers.BatchNormalization()(keras.layers.DepthwiseConv2D((1, 3), padding="same")(x))
        z = keras.ops.mean(y, axis=2, keepdims=True)
        z = _normed(keras, _in_time(keras, z, 0, 3, dilation), "swish")
        z = keras.layers.Conv2D(4, 1)(z)
        x = keras.layers.Activation("relu")(x + y + z)
    return keras.layers.Dense(3)(keras.ops.mean(x, axis=2))


# --- Moshi -----------------------------------------------------------------------------------------------


def _causal(keras: Any, x: Any, filters: int, kernel: int, dilation: int = 1) -> Any:
    return keras.layers.Conv1D(filters, kernel, padding="causal", dilation_rate=dilation)(
        keras.layers.Activation("elu")(x)
    )


def _residual_units(keras: Any, x: Any, count: int = 2) -> Any:
    for j in range(count):
        y = _causal(keras, x, x.shape[-1] // 2, 3, 2**j)
        x = x + _causal(keras, y, x.shape[-1], 1)
    return x


@_add(3)
def seanet_units(keras: Any, x: Any) -> Any:
    return _causal(keras, _residual_units(keras, _causal(keras, x, 8, 7), 3), 5, 7)


_Ratios = tuple[tuple[int, int], ...]
"""By how much each part divides or multiplies the number of samples, and its filters."""


def _encoded(keras: Any, x: Any, ratios: _Ratios, units: int) -> Any:
    """From frames of samples to 6 features of each."""
    x = _causal(keras, keras.layers.Reshape((-1, 1))(x), 4, 7)
    for ratio, filters in ratios:
        x = keras.layers.Activation("elu")(_residual_units(keras, x, units))
        x = keras.layers.Conv1D(filters, 2 * ratio, strides=ratio)(keras.layers.ZeroPadding1D((ratio, 0))(x))
    return _causal(keras, x, 6, 3)


def _decoded(keras: Any, x: Any, ratios: _Ratios, units: int) -> Any:
    """Back to frames of 8 samples."""
    x = _causal(keras, x, 8, 7)
    for ratio, filters in ratios:
        x = keras.layers.Conv1DTranspose(filters, 2 * ratio, strides=ratio)(keras.layers.Activation("elu")(x))
        x = _residual_units(keras, keras.layers.Cropping1D((0, ratio))(x), units)
    return keras.layers.Reshape((-1, 8))(_causal(keras, x, 1, 3))


@_add(8)
def seanet_encoder(keras: Any, x: Any) -> Any:
    return _encoded(keras, x, ((2, 6), (4, 8)), 2)


@_add(6)
def seanet_decoder(keras: Any, x: Any) -> Any:
    return _decoded(keras, x, ((4, 6), (2, 4)), 2)


@_add(8)
def codec(keras: Any, x: Any) -> Any:
    """As Mimi: encoder, two residual layers of codes, decoder."""
    left = _encoded(keras, x, ((8, 8),), 1)
    found = []
    for _ in range(2):
        scores = keras.layers.Dense(5)(left)
        chosen = keras.ops.cast(keras.ops.equal(scores, keras.ops.max(scores, -1, keepdims=True)), "float32")
        found.append(keras.layers.Dense(6, use_bias=False)(chosen))
        left = left - found[-1]
    return _decoded(keras, keras.layers.Add()(found), ((8, 4),), 1)


# --- others ----------------------------------------------------------------------------------------------


@_add(6)
def conformer_convolutions(keras: Any, x: Any) -> Any:
    layers = keras.layers
    for _ in range(2):
        y = layers.Dense(12, activation="swish")(layers.LayerNormalization()(x))
        x = x + 0.5 * layers.Dense(6)(y)
        y = layers.Conv1D(12, 1)(layers.LayerNormalization()(x))
        y = y[:, :, :6] * keras.ops.sigmoid(y[:, :, 6:])
        y = layers.DepthwiseConv1D(15)(layers.ZeroPadding1D((14, 0))(y))
        x = x + layers.Conv1D(6, 1)(_normed(keras, y, "swish"))
    return layers.LayerNormalization()(x)


@_add(8)
def overlapping_windows(keras: Any, x: Any) -> Any:
    """Each step brings 8 new samples of a window of 32, which is normalized and classified as a whole."""
    window = _window(keras, x, 4)
    centred = window - keras.ops.mean(window, -1, keepdims=True)
    scaled = centred / keras.ops.sqrt(keras.ops.mean(keras.ops.square(centred), -1, keepdims=True) + 1e-3)
    return keras.layers.Dense(3, activation="softmax")(keras.layers.Dense(8, activation="relu")(scaled))


@_add(8)
def dtln(keras: Any, x: Any) -> Any:
    """Masks what it finds in overlapping windows, and adds them up again: the second part of DTLN."""
    found = keras.layers.Dense(12, use_bias=False)(_window(keras, x, 4))
    mask = keras.layers.LSTM(6, return_sequences=True, name="lstm")(keras.layers.LayerNormalization()(found))
    mask = keras.layers.Dense(12, activation="sigmoid")(mask)
    clean = keras.layers.Dense(32, use_bias=False)(found * mask)
    return keras.layers.Add()([delayed(keras, clean[:, :, 8 * i : 8 * (i + 1)], i) for i in range(4)])


@_add(8)
def short_time_fourier(keras: Any, x: Any) -> Any:
    """Masks the spectrum of windows of 32 samples, of which a step brings 8, and returns to samples."""
    samples = keras.ops.pad(keras.layers.Reshape((-1,))(x), ((0, 0), (24, 0)))
    real, imaginary = keras.ops.stft(samples, 32, 8, 32, center=False)
    size = keras.ops.sqrt(real * real + imaginary * imaginary + 1e-6)
    mask = keras.layers.Dense(17, activation="sigmoid")(
        keras.layers.GRU(5, return_sequences=True, name="gru")(size)
    )
    clean = keras.ops.istft((real * mask, imaginary * mask), 32, 8, 32, center=False)
    return keras.layers.Reshape((-1, 8))(clean[:, :-24])
