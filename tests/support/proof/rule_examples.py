"""An example for every operation on the proof's list: run for real to see that its rule is true.

Each takes the data, ``(batch, time, 4)`` or what `LAYOUTS` says, and returns what the operation makes of it.
They read sizes off what they are given, so that they run on a part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from stepwell_server.compile.causality import constants
from support.proof import rule_examples_loops, rule_examples_matrices
from support.proof.rule_examples_matrices import Example

EXAMPLES: dict[str, list[Example]] = rule_examples_matrices.EXAMPLES | rule_examples_loops.EXAMPLES
REFUSED: dict[str, list[Example]] = rule_examples_matrices.REFUSED | rule_examples_loops.REFUSED
"""What the same operations do along the batch or the time axis."""
raw = tf.raw_ops
_INTEGERS = {"BitwiseAnd", "BitwiseOr", "BitwiseXor", "LeftShift", "RightShift", "Invert"}
_BOOLEANS = {"LogicalAnd", "LogicalOr", "LogicalNot"}
_COMPLEX = {"Angle", "ComplexAbs", "Imag", "Real"}
_TEXTS = {"StringToHashBucketFast", "StringToHashBucketStrong"}
_UNARY_MORE: dict[str, dict[str, Any]] = {
    "Bitcast": {"type": tf.int32},
    "Bucketize": {"boundaries": [0.2, 0.5, 0.7]},
    "Cast": {"DstT": tf.int32},
    "EnsureShape": {"shape": [None, None, 4]},
    "PreventGradient": {},
    "StringToHashBucketFast": {"num_buckets": 1000},
    "StringToHashBucketStrong": {"num_buckets": 1000, "key": [3, 5]},
}


def _typed(kind: str, x: Any) -> Any:
    if kind in _INTEGERS:
        return tf.cast(x * 7, tf.int32)
    if kind in _COMPLEX:
        return tf.complex(x, x - 0.4)
    if kind in _TEXTS:
        return tf.strings.as_string(x)
    return x > 0.5 if kind in _BOOLEANS else x


def _argument_names(kind: str) -> list[str]:
    import inspect

    return list(inspect.signature(getattr(raw, kind)).parameters)


def _unary(kind: str) -> Example:
    first = _argument_names(kind)[0]
    return lambda x: getattr(raw, kind)(**{first: _typed(kind, x)}, **_UNARY_MORE.get(kind, {}))


def _binary(kind: str, other: Callable[[Any], Any]) -> Example:
    names = _argument_names(kind)[:2]

    def example(x: Any) -> Any:
        values = (_typed(kind, x), _typed(kind, other(x)))
        return getattr(raw, kind)(**dict(zip(names, values, strict=True)))

    return example


_OTHERS: list[Callable[[Any], Any]] = [
    lambda _x: tf.constant([0.3, 0.6, 1.1, 1.4]),
    lambda x: x[:, :, :1] * 1.5,
    lambda x: tf.ones((x.shape[0], x.shape[1], 1)) * 0.7,
    lambda x: tf.reverse(x, [2]),
]
for _kind in constants.UNARY:
    EXAMPLES[_kind] = [_unary(_kind)]
_SPECIAL = {"AddN", "BiasAdd", "Betainc", "ClipByValue", "Complex", "SelectV2"}
for _kind in constants.BROADCAST - _SPECIAL:
    EXAMPLES[_kind] = [_binary(_kind, other) for other in _OTHERS]
    REFUSED[_kind] = [
        _binary(_kind, lambda x: tf.range(1.0, 1.0 + x.shape[1])[:, None] / 10.0),
        _binary(_kind, lambda x: tf.range(1.0, 1.0 + x.shape[0])[:, None, None] / 10.0),
        _binary(_kind, lambda x: tf.ones((1,)) / x.shape[1]),
    ] if _kind not in _BOOLEANS | _INTEGERS else []  # fmt: skip


def _with(kind: str, name: str, **options: Any) -> Example:
    return lambda x: getattr(raw, kind)(**{name: x}, **options)


def _grid(x: Any) -> Any:
    """``(batch, time, 4)`` as images, ``(batch * time, 4, 4, 2)``."""
    flat = tf.reshape(x, (x.shape[0] * x.shape[1], 4))
    grid = flat[:, :, None] * tf.constant([0.5, 1.0, -1.0, 2.0])
    return tf.stack([grid, grid**2], -1)


def _weights(*shape: int) -> Any:
    return tf.constant(np.random.default_rng(5).standard_normal(shape), tf.float32)


def _add(kind: str, *examples: Example, refused: list[Example] | None = None) -> None:
    EXAMPLES[kind] = list(examples)
    REFUSED[kind] = refused or []


_add("AddN", lambda x: raw.AddN(inputs=[x, x * 2.0, tf.ones_like(x)]))
_add("BiasAdd", lambda x: raw.BiasAdd(value=x, bias=tf.constant([1.0, 2.0, 3.0, 4.0])))
_add("Betainc", lambda x: raw.Betainc(a=x + 1.0, b=x + 2.0, x=x))
_add(
    "ClipByValue",
    lambda x: raw.ClipByValue(t=x, clip_value_min=0.3, clip_value_max=0.6),
    lambda x: raw.ClipByValue(t=x, clip_value_min=x * 0.5, clip_value_max=x * 0.9),
)
_add(
    "SelectV2",
    lambda x: raw.SelectV2(condition=x[:, :, :1] > 0.5, t=x, e=tf.constant([1.0, 2.0, 3.0, 4.0])),
    lambda x: raw.SelectV2(condition=tf.constant([True, False, True, False]), t=x, e=-x),
)
_add("IdentityN", lambda x: raw.IdentityN(input=[x, x[:, :, 0]]))


def _table(x: Any) -> Any:
    return _TABLE.lookup(tf.cast(x * 5, tf.int64))


_TABLE = tf.lookup.StaticHashTable(
    tf.lookup.KeyValueTensorInitializer(tf.constant([0, 1, 3], tf.int64), tf.constant([7, 5, 2], tf.int64)),
    9,
)
_add("LookupTableFindV2", _table)


def _normalised(x: Any) -> Any:
    one = tf.ones(2)
    return raw.FusedBatchNormV3(
        x=_grid(x), scale=one * 2, offset=one, mean=one * 0.3, variance=one * 0.5, is_training=False
    )[0]


def _normalised_in_training(x: Any) -> Any:
    one = tf.ones(2)
    return raw.FusedBatchNormV3(
        x=_grid(x), scale=one * 2, offset=one, mean=one[:0], variance=one[:0], is_training=True
    )[0]


_add("FusedBatchNormV3", _normalised, refused=[_normalised_in_training])

# --- moving elements -------------------------------------------------------------------------------------

_add(
    "Reshape",
    lambda x: tf.reshape(x, (x.shape[0] * x.shape[1], 2, 2)),
    lambda x: tf.reshape(x, (x.shape[0], x.shape[1] * 2, 2)),
    lambda x: tf.reshape(tf.reshape(x, (-1,)), (*x.shape[:2], 2, 2)),
    refused=[
        lambda x: tf.reshape(x, (x.shape[0], 4, x.shape[1])),
        lambda x: tf.reshape(x, (x.shape[1], x.shape[0], 4)),
        lambda x: tf.reshape(x, (2, -1)) if x.shape[0] % 2 == 0 else tf.reshape(x, (4, -1)),
    ],
)
_add(
    "Squeeze",
    lambda x: raw.Squeeze(input=x[:, :, :1], axis=[2]),
    lambda x: raw.Squeeze(input=x[:, :, None, :1]),
)
_add("ExpandDims", lambda x: raw.ExpandDims(input=x, axis=1), lambda x: raw.ExpandDims(input=x, axis=-1))
_add("Transpose", lambda x: tf.transpose(x, (2, 1, 0)), lambda x: tf.transpose(x, (0, 2, 1)))
_add(
    "StridedSlice",
    lambda x: x[:, :, 1:3],
    lambda x: x[..., 3:0:-2],
    lambda x: x[:, tf.newaxis, ..., 1],
    lambda x: x[0 : x.shape[0], : x.shape[1], -2],
    lambda x: x[..., tf.newaxis, :2],
    refused=[
        lambda x: x[:, 1:],
        lambda x: x[:, :-1],
        lambda x: x[:, ::2],
        lambda x: x[:, ::-1],
        lambda x: x[:, :3],
        lambda x: x[:, 0],
        lambda x: x[1:],
        lambda x: x[0],
        lambda x: x[-1],
        lambda x: x[:, :, x.shape[1] % 3],
    ],
)
_add(
    "Slice",
    lambda x: tf.slice(x, (0, 0, 1), (-1, -1, 2)),
    lambda x: tf.slice(x, (0, 0, 1), (x.shape[0], x.shape[1], 3)),
    refused=[
        lambda x: tf.slice(x, (0, 1, 0), (-1, -1, -1)),
        lambda x: tf.slice(x, (0, 0, 0), (-1, 3, -1)),
        lambda x: tf.slice(x, (1, 0, 0), (-1, -1, -1)),
        lambda x: tf.slice(x, (0, 0, 0), (-1, x.shape[1] - 1, -1)),
    ],
)
_add(
    "ConcatV2",
    lambda x: tf.concat([x, tf.ones((x.shape[0], x.shape[1], 2)), x[..., :1]], -1),
    refused=[lambda x: tf.concat([x, x], 1), lambda x: tf.concat([x, x], 0)],
)
_add(
    "Pack",
    lambda x: tf.stack([x, x * 2], 2),
    lambda x: tf.stack([x, tf.ones_like(x)], -1),
    lambda x: tf.stack([x, x]),
)
_add(
    "Unpack",
    lambda x: tf.unstack(x, axis=2),
    refused=[lambda x: tf.unstack(x, axis=1)[0], lambda x: tf.unstack(x, axis=0)[0]],
)
_add(
    "Split",
    lambda x: raw.Split(axis=2, value=x, num_split=2),
    refused=[lambda x: raw.Split(axis=1, value=tf.tile(x, (1, 2, 1)), num_split=2)[0]],
)
_add("SplitV", lambda x: raw.SplitV(value=x, size_splits=[1, 3], axis=-1, num_split=2))
_add(
    "Tile",
    lambda x: tf.tile(x, (1, 1, 3)),
    lambda x: tf.tile(x, (1, 2, 1)),
    lambda x: tf.tile(x, (3, 1, 1)),
    refused=[lambda x: tf.tile(x, (1, x.shape[1], 1))],
)
_add(
    "BroadcastTo",
    lambda x: tf.broadcast_to(x[..., :1], (*x.shape[:2], 5)),
    lambda x: tf.broadcast_to(x, (2, *x.shape)),
)
_add(
    "Pad",
    lambda x: raw.Pad(input=x, paddings=[[0, 0], [0, 0], [1, 2]]),
    refused=[
        lambda x: raw.Pad(input=x, paddings=[[0, 0], [1, 0], [0, 0]]),
        lambda x: raw.Pad(input=x, paddings=[[0, 1], [0, 0], [0, 0]]),
    ],
)
_add(
    "PadV2",
    lambda x: raw.PadV2(input=x, paddings=[[0, 0], [0, 0], [1, 2]], constant_values=7.0),
    refused=[
        lambda x: raw.PadV2(input=x, paddings=[[0, 0], [0, 2], [0, 0]], constant_values=7.0),
        lambda x: raw.PadV2(input=x, paddings=[[0, 0], [0, 0], [0, 2]], constant_values=1.0 / x.shape[1]),
    ],
)
_add(
    "MirrorPad",
    lambda x: raw.MirrorPad(input=x, paddings=[[0, 0], [0, 0], [1, 2]], mode="REFLECT"),
    refused=[lambda x: raw.MirrorPad(input=x, paddings=[[0, 0], [1, 1], [0, 0]], mode="SYMMETRIC")],
)


def _accumulating(kind: str) -> None:
    _add(
        kind,
        lambda x: getattr(raw, kind)(x=x, axis=2),
        lambda x: getattr(raw, kind)(x=x, axis=-1, reverse=True, exclusive=True),
        refused=[_with(kind, "x", axis=place) for place in (0, 1, -2)],
    )


for _kind in ("Cumsum", "Cumprod", "CumulativeLogsumexp"):
    _accumulating(_kind)
_add(
    "ReverseV2",
    lambda x: tf.reverse(x, [2]),
    lambda x: tf.reverse(x, [-1]),
    refused=[lambda x: tf.reverse(x, [1]), lambda x: tf.reverse(x, [0, 2])],
)
_add(
    "Roll",
    lambda x: tf.roll(x, 1, 2),
    lambda x: tf.roll(x, [1, -2], [2, -1]),
    refused=[
        lambda x: tf.roll(x, 1, 1),
        lambda x: tf.roll(x, [1, 1], [2, 0]),
        lambda x: tf.roll(x, x.shape[1], 2),
    ],
)
_add(
    "GatherV2",
    lambda x: tf.gather(x, [3, 0, 0], axis=2),
    lambda x: tf.gather(x, 2, axis=-1),
    lambda x: tf.gather(tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), tf.cast(x * 3, tf.int32)),
    lambda x: tf.gather(x, tf.cast(x[..., :2] * 4, tf.int32), axis=2, batch_dims=2),
    refused=[
        lambda x: tf.gather(x, [0, 1], axis=1),
        lambda x: tf.gather(x, tf.range(x.shape[1]) // 2, axis=1),
        lambda x: tf.gather(x, tf.range(x.shape[0]), axis=0),
        lambda x: tf.gather(x, tf.cast(x[..., 0] * 3, tf.int32), axis=1, batch_dims=1),
        lambda x: tf.gather(tf.range(20.0), tf.cast(x, tf.int32) + tf.range(x.shape[1])[:, None]),
    ],
)
_add(
    "OneHot",
    lambda x: tf.one_hot(tf.cast(x * 3, tf.int32), 5),
    lambda x: tf.one_hot(tf.cast(x * 3, tf.int32), 5, axis=0),
    refused=[lambda x: tf.one_hot(tf.cast(x * 3, tf.int32), 5, on_value=1.0 / x.shape[1], off_value=0.0)],
)
_add(
    "SpaceToBatchND",
    lambda x: raw.SpaceToBatchND(input=_grid(x), block_shape=[2, 2], paddings=[[0, 0], [1, 1]]),
    lambda x: raw.SpaceToBatchND(input=x[..., None], block_shape=[1, 2], paddings=[[0, 0], [0, 0]]),
    refused=[lambda x: raw.SpaceToBatchND(input=x, block_shape=[1], paddings=[[1, 0]])],
)
_add(
    "BatchToSpaceND",
    lambda x: raw.BatchToSpaceND(
        input=raw.SpaceToBatchND(input=_grid(x), block_shape=[2, 2], paddings=[[0, 0], [1, 1]]) * 2.0,
        block_shape=[2, 2],
        crops=[[0, 1], [1, 0]],
    ),
    lambda x: raw.BatchToSpaceND(
        input=tf.tile(x, (4, 1, 1))[..., None], block_shape=[1, 2], crops=[[0, 0], [0, 0]]
    ),
    refused=[lambda x: raw.BatchToSpaceND(input=tf.tile(x, (2, 1, 1)), block_shape=[2], crops=[[0, 0]])],
)

# --- sums ---------------------------------------------------------------------------------------------------


def _reducing(kind: str) -> None:
    _add(
        kind,
        lambda x: getattr(raw, kind)(input=x, axis=2),
        lambda x: getattr(raw, kind)(input=x, axis=[-1], keep_dims=True),
        lambda x: getattr(raw, kind)(input=_grid(x), axis=[1, 3]),
        refused=[
            lambda x: getattr(raw, kind)(input=x, axis=1),
            lambda x: getattr(raw, kind)(input=x, axis=[0]),
            lambda x: getattr(raw, kind)(input=x, axis=[-2], keep_dims=True),
            lambda x: getattr(raw, kind)(input=tf.reshape(x, (-1, 4)), axis=0),
        ],
    )


for _kind in ("EuclideanNorm", "Max", "Mean", "Min", "Prod", "Sum"):
    _reducing(_kind)


def _testing(kind: str) -> None:
    _add(
        kind,
        lambda x: getattr(raw, kind)(input=x > 0.3, axis=2),
        refused=[lambda x: getattr(raw, kind)(input=x > 0.3, axis=1)],
    )


for _kind in ("All", "Any"):
    _testing(_kind)


def _placing(kind: str) -> None:
    _add(
        kind,
        lambda x: getattr(raw, kind)(input=x, dimension=2),
        refused=[_with(kind, "input", dimension=place) for place in (0, 1, -2)],
    )


for _kind in ("ArgMax", "ArgMin"):
    _placing(_kind)


def _softening(kind: str) -> None:
    _add(
        kind,
        lambda x: getattr(raw, kind)(logits=x),
        refused=[lambda x: getattr(raw, kind)(logits=tf.transpose(x, (0, 2, 1)))],
    )


for _kind in ("Softmax", "LogSoftmax"):
    _softening(_kind)
_add(
    "TopKV2",
    lambda x: raw.TopKV2(input=x, k=2),
    refused=[
        lambda x: raw.TopKV2(input=tf.transpose(x, (0, 2, 1)), k=2)[0],
        lambda x: raw.TopKV2(input=x, k=x.shape[1] % 5)[0],
    ],
)


def _flat(x: Any) -> Any:
    return tf.reshape(x, (-1, 4))


_add(
    "MatMul",
    lambda x: raw.MatMul(a=_flat(x), b=_weights(4, 3)),
    lambda x: raw.MatMul(a=_flat(x), b=_weights(3, 4), transpose_b=True),
    lambda x: raw.MatMul(a=_weights(4, 3), b=tf.transpose(_flat(x)), transpose_a=True),
    refused=[
        lambda x: raw.MatMul(a=_flat(x), b=_flat(x), transpose_a=True),
        lambda x: raw.MatMul(a=_flat(x), b=_flat(x), transpose_b=True),
    ],
)


def _stacked_products(kind: str) -> None:
    more: dict[str, Any] = {"Tout": tf.float32} if kind.endswith("3") else {}
    product = getattr(raw, kind)
    _add(
        kind,
        lambda x: product(x=x[..., None], y=x[..., None, :], **more),
        lambda x: product(x=x[..., None], y=x[..., None], adj_x=True, **more),
        lambda x: product(
            x=x,
            y=tf.ones((x.shape[0], 3, 4)) if kind == "BatchMatMul" else _weights(1, 3, 4),
            adj_y=True,
            **more,
        ),
        refused=[
            lambda x: product(x=x, y=x, adj_y=True, **more),
            lambda x: product(x=x, y=x, adj_x=True, **more),
        ],
    )


for _kind in ("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"):
    _stacked_products(_kind)
_add(
    "Einsum",
    lambda x: tf.einsum("btf,fg->btg", x, _weights(4, 3)),
    lambda x: tf.einsum("btf,btf->bt", x, x * 2),
    lambda x: tf.einsum("btf,btg->tbfg", x, x),
    lambda x: raw.Einsum(inputs=[x, _weights(4, 3)], equation="...f,fg->g..."),
    refused=[
        lambda x: tf.einsum("btf,bsf->bts", x, x),
        lambda x: tf.einsum("btf,btg->bfg", x, x),
        lambda x: tf.einsum("btf,ctf->btf", x, x),
        lambda x: tf.einsum("btf->bf", x),
        lambda x: raw.Einsum(inputs=[x[:, :, :, None] * x[:, :, None]], equation="btff->btf"),
        lambda x: tf.einsum("btf,t->btf", x, tf.range(float(x.shape[1]))),
    ],
)


def _convolved(x: Any, **more: Any) -> Any:
    options: dict[str, Any] = {"strides": [1, 2, 1, 1], "padding": "SAME", **more}
    return raw.Conv2D(input=_grid(x), filter=_weights(3, 2, 2, 3), **options)


def _over_time(size: int, **more: Any) -> Example:
    """``(batch, time, 4, 1)``, a window over time."""
    options: dict[str, Any] = {"strides": [1, 1, 1, 1], "padding": "SAME", **more}
    return lambda x: raw.Conv2D(input=x[..., None], filter=_weights(size, 3, 1, 2), **options)


_add(
    "Conv2D",
    _convolved,
    lambda x: _convolved(x, padding="VALID", dilations=[1, 1, 2, 1], strides=[1, 1, 1, 1]),
    _over_time(1),
    _over_time(1, dilations=[1, 3, 1, 1]),
    refused=[
        _over_time(2),
        _over_time(3, padding="VALID"),
        _over_time(1, strides=[1, 2, 2, 1]),
        _over_time(1, padding="EXPLICIT", explicit_paddings=[0, 0, 1, 0, 0, 0, 0, 0]),
        lambda x: raw.Conv2D(
            input=tf.transpose(x, (1, 0, 2))[..., None],
            filter=_weights(2, 1, 1, 2),
            strides=[1] * 4,
            padding="SAME",
        ),
    ],
)


def _depthwise(size: int) -> Example:
    return lambda x: raw.DepthwiseConv2dNative(
        input=x[:, :, None] * tf.ones((1, 1, 3, 1)),
        filter=_weights(size, 2, 4, 2),
        strides=[1] * 4,
        padding="SAME",
    )


_add("DepthwiseConv2dNative", _depthwise(1), refused=[_depthwise(2)])


def _convolved_3d(size: int) -> Example:
    return lambda x: raw.Conv3D(
        input=x[..., None, None] * tf.ones((1, 1, 1, 3, 2)),
        filter=_weights(size, 2, 2, 2, 3),
        strides=[1] * 5,
        padding="SAME",
    )


_add("Conv3D", _convolved_3d(1), refused=[_convolved_3d(2)])


def _transposed(size: int, stride: int = 1) -> Example:
    def example(x: Any) -> Any:
        shape = (x.shape[0], x.shape[1] * stride, 8, 2)
        return raw.Conv2DBackpropInput(
            input_sizes=shape,
            filter=_weights(size, 3, 2, 1),
            out_backprop=x[..., None],
            strides=[1, stride, 2, 1],
            padding="SAME",
        )

    return example


_add("Conv2DBackpropInput", _transposed(1), refused=[_transposed(2), _transposed(1, 2)])


def _transposed_3d(size: int) -> Example:
    def example(x: Any) -> Any:
        grid = x[..., None, None] * tf.ones((1, 1, 1, 3, 2))
        return raw.Conv3DBackpropInputV2(
            input_sizes=grid.shape,
            filter=_weights(size, 2, 2, 2, 2),
            out_backprop=grid,
            strides=[1] * 5,
            padding="SAME",
        )

    return example


_add("Conv3DBackpropInputV2", _transposed_3d(1), refused=[_transposed_3d(3)])


def _pooled(kind: str, size: int, stride: int = 1) -> Example:
    name = "value" if kind == "AvgPool" else "input"
    return lambda x: getattr(raw, kind)(
        **{name: x[..., None]}, ksize=[1, size, 2, 1], strides=[1, stride, 2, 1], padding="SAME"
    )


def _pooled_3d(kind: str, size: int) -> Example:
    return lambda x: getattr(raw, kind)(
        input=x[..., None, None] * tf.ones((1, 1, 1, 3, 2)),
        ksize=[1, size, 2, 2, 1],
        strides=[1] * 5,
        padding="SAME",
    )


for _kind in ("MaxPool", "AvgPool"):
    _add(_kind, _pooled(_kind, 1), refused=[_pooled(_kind, 2), _pooled(_kind, 1, 2)])
for _kind in ("MaxPool3D", "AvgPool3D"):
    _add(_kind, _pooled_3d(_kind, 1), refused=[_pooled_3d(_kind, 2)])


def _resizing(kind: str) -> None:
    _add(
        kind,
        lambda x: getattr(raw, kind)(images=_grid(x), size=[7, 3]),
        refused=[lambda x: getattr(raw, kind)(images=x[..., None], size=[x.shape[1] * 2, 4])],
    )


for _kind in ("ResizeBilinear", "ResizeNearestNeighbor", "ResizeBicubic"):
    _resizing(_kind)
