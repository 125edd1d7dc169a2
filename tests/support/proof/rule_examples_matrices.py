"""Examples for the operations on vectors and matrices: see `rule_examples`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

Example = Callable[[Any], Any]
EXAMPLES: dict[str, list[Example]] = {}
REFUSED: dict[str, list[Example]] = {}
raw = tf.raw_ops


def _add(kind: str, *examples: Example, refused: list[Example]) -> None:
    EXAMPLES[kind] = list(examples)
    REFUSED[kind] = refused


def _square(x: Any) -> Any:
    """``(batch, time, 4)`` as matrices that can be inverted, ``(batch, time, 2, 2)``."""
    return tf.reshape(x, (*x.shape[:2], 2, 2)) + tf.constant([[3.0, 0.0], [0.0, 2.0]])


def _over_time(x: Any) -> Any:
    """The same number of rows and columns, the rows of which are time steps."""
    return x[:, :, :1] * tf.ones((1, 1, x.shape[1])) + tf.eye(x.shape[1])


def _over_rows(x: Any) -> Any:
    """The features of each time step as matrices of which each row is one of the batch."""
    return tf.transpose(x, (1, 0, 2))


_add(
    "Complex",
    lambda x: tf.abs(raw.Complex(real=x, imag=x * 2.0)),
    lambda x: tf.abs(raw.Complex(real=x, imag=tf.constant([1.0, 2.0, 3.0, 4.0]))),
    refused=[lambda x: tf.abs(raw.Complex(real=x, imag=tf.range(1.0, 1.0 + x.shape[1])[:, None]))],
)


def _searching(kind: str) -> None:
    search = getattr(raw, kind)
    places = tf.constant([[0.2, 0.5, 0.7]])
    _add(
        kind,
        lambda x: search(sorted_inputs=places, values=tf.reshape(x, (1, -1))),
        lambda x: search(sorted_inputs=tf.sort(tf.reshape(x, (-1, 4))), values=tf.reshape(x * 0.9, (-1, 4))),
        lambda x: search(
            sorted_inputs=tf.tile(places, (x.shape[0] * x.shape[1], 1)), values=tf.reshape(x, (-1, 4))
        ),
        refused=[
            lambda x: search(sorted_inputs=tf.sort(x[:, :, 0]), values=x[:, :, 1]),
            lambda x: search(sorted_inputs=tf.reshape(x, (1, -1)), values=places),
            lambda x: search(
                sorted_inputs=tf.reshape(tf.range(float(3 * x.shape[0])), (-1, 3)) / 30.0,
                values=tf.reshape(x, (x.shape[0], -1)),
            ),
            lambda x: search(
                sorted_inputs=tf.linspace(0.0, 1.0, x.shape[1])[None], values=tf.reshape(x, (1, -1))
            ),
        ],
    )


for _kind in ("LowerBound", "UpperBound"):
    _searching(_kind)
_add(
    "Cross",
    lambda x: raw.Cross(a=x[..., :3], b=x[..., 1:]),
    lambda x: raw.Cross(a=x[..., :3], b=tf.ones_like(x[..., 1:])),
    refused=[
        lambda x: raw.Cross(a=tf.transpose(x, (0, 2, 1))[..., :3], b=tf.transpose(x, (0, 2, 1))[..., :3]),
        lambda x: raw.Cross(a=x[..., :3], b=x[..., :3] * 0 + tf.range(float(x.shape[1]))[:, None]),
    ],
)


def _on_matrices(kind: str, *examples: Example, **more: Any) -> None:
    def applied(x: Any) -> Any:
        return getattr(raw, kind)(input=x, **more)

    _add(
        kind,
        lambda x: applied(_square(x)),
        *examples,
        refused=[lambda x: applied(_over_time(x)), lambda x: applied(_over_rows(x)[:, :4])],
    )


_on_matrices("MatrixInverse", lambda x: raw.MatrixInverse(input=_square(x), adjoint=True))
_on_matrices("MatrixDeterminant")
_on_matrices("LogMatrixDeterminant")
_on_matrices(
    "MatrixBandPart",
    lambda x: raw.MatrixBandPart(input=x[..., None] * x[:, :, None], num_lower=0, num_upper=-1),
    num_lower=-1,
    num_upper=0,
)
REFUSED["MatrixBandPart"].append(
    lambda x: raw.MatrixBandPart(input=_square(x), num_lower=x.shape[1] % 3, num_upper=0)
)
_on_matrices(
    "MatrixDiagPartV3",
    lambda x: raw.MatrixDiagPartV3(input=_square(x), k=[-1, 1], padding_value=7.0),
    k=0,
    padding_value=0.0,
)
_add(
    "MatrixDiagV3",
    lambda x: raw.MatrixDiagV3(diagonal=x, k=0, num_rows=-1, num_cols=-1, padding_value=0.0),
    lambda x: raw.MatrixDiagV3(diagonal=x, k=1, num_rows=5, num_cols=5, padding_value=2.0),
    lambda x: raw.MatrixDiagV3(
        diagonal=tf.stack([x, x], 2), k=[0, 1], num_rows=-1, num_cols=5, padding_value=0.0
    ),
    refused=[
        lambda x: raw.MatrixDiagV3(diagonal=x[:, :, 0], k=0, num_rows=-1, num_cols=-1, padding_value=0.0),
        lambda x: raw.MatrixDiagV3(
            diagonal=tf.transpose(x, (2, 1, 0)), k=0, num_rows=-1, num_cols=-1, padding_value=0.0
        ),
    ],
)


def _parts(x: Any) -> Any:
    return [tf.math.real(x), tf.math.imag(x)]


def _transforming(kind: str, takes: Callable[[Any], Any], length: Any = None) -> None:
    def transformed(x: Any) -> Any:
        more = {} if length is None else {"fft_length": length}
        found = getattr(raw, kind)(input=takes(x), **more)
        return _parts(found) if found.dtype.is_complex else found

    two = kind.endswith("2D")
    _add(
        kind,
        lambda x: transformed(tf.reshape(x, (*x.shape[:2], 2, 2)) if two else x),
        lambda x: transformed(_square(_over_rows(x)) if two else _over_rows(x)),
        refused=[
            lambda x: transformed(tf.transpose(x, (0, 2, 1))),
            lambda x: transformed(tf.transpose(x, (2, 1, 0))),
        ],
    )


def _complex(x: Any) -> Any:
    return tf.complex(x, x * 0.5)


for _kind in ("FFT", "IFFT", "FFT2D", "IFFT2D"):
    _transforming(_kind, _complex)
_transforming("RFFT", lambda x: x, [4])
_transforming("IRFFT", _complex, [4])
_transforming("RFFT2D", lambda x: x, [2, 2])
_transforming("IRFFT2D", _complex, [2, 2])
