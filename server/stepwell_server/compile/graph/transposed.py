"""Transposed convolutions as ordinary ones.

LiteRT's own operation finds the size of its result in each run, as the number of rows is open. The model then runs without
XNNPACK, with bits that depend on a row's place: see `compile.program.sizes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

from stepwell_server.compile.graph.tensorflow_setup import tf


def spread(value: Any, kernel: Any, strides: Sequence[int]) -> Any:
    """Return what a transposed convolution makes of ``value``, ``(rows, lengths..., channels)``.

    The result ``stride * e + phase`` is the sum over ``m`` of the element ``e - m`` times the tap ``phase + stride * m``:
    an ordinary convolution for each phase. Results that lack elements in front or behind are left out. Phases with fewer
    taps are apart: a tap of zero would make NaN of an infinite element.

    Args:
        value: has the first elements of each axis that take part in the first result.
        kernel: ``(window..., filters, channels)``.
        strides: one for each axis of the window.
    """
    *window, filters, channels = kernel.shape.as_list()
    axes = range(len(window))
    counts = [-(-size // stride) for size, stride in zip(window, strides, strict=True)]
    whole = [size - (count - 1) * stride for size, count, stride in zip(window, counts, strides, strict=True)]
    missing = [[0, stride - size] for size, stride in zip(whole, strides, strict=True)]
    taps = tf.pad(kernel, [*missing, [0, 0], [0, 0]])
    taps = tf.reshape(taps, [*chain(*zip(counts, strides, strict=True)), filters, channels])
    taps = tf.reverse(taps, [2 * axis for axis in axes])  # Oldest element first.
    order = [*(2 * axis for axis in axes), 2 * len(window) + 1, *(2 * axis + 1 for axis in axes)]
    result = _phases(value, tf.transpose(taps, [*order, 2 * len(window)]), whole, 0)
    lengths = result.shape.as_list()[1 : 1 + len(window)]
    apart = [axis for axis in axes if strides[axis] > 1]  # LiteRT transposes at most six axes.
    sizes = [-1, *lengths, *(strides[axis] for axis in apart), filters]
    order = [0]
    for axis in axes:
        order += [1 + axis, *(1 + len(window) + place for place, which in enumerate(apart) if which == axis)]
    moving = [place for place in order if place and sizes[place] > 1]
    if moving != sorted(moving):
        result = tf.transpose(tf.reshape(result, sizes), [*order, len(order)])
    return tf.reshape(
        result, [-1, *(length * stride for length, stride in zip(lengths, strides, strict=True)), filters]
    )


def _phases(value: Any, taps: Any, whole: Sequence[int], axis: int) -> Any:
    """Return the phases from an axis on, ``(rows, lengths..., phases..., filters)``; ``whole`` of them have all taps."""
    rank = len(whole)
    if axis == rank:
        return _convolved(value, taps, rank)
    count, phases, place = taps.shape[axis], taps.shape[rank + 1 + axis], 1 + rank + axis
    with_all, with_fewer = tf.split(taps, [whole[axis], phases - whole[axis]], rank + 1 + axis)
    found = _phases(value, with_all, whole, axis + 1)
    if whole[axis] == phases:
        return found
    if count == 1:  # The others have none.
        sizes = found.shape.as_list()
        behind = tf.reshape(
            found, [-1, sizes[place], math.prod(sizes[place + 1 :])]
        )  # LiteRT pads at most five axes.
        sizes[0], sizes[place] = -1, phases
        return tf.reshape(tf.pad(behind, [[0, 0], [0, phases - whole[axis]], [0, 0]]), sizes)
    newer = tf.split(value, [1, value.shape[1 + axis] - 1], 1 + axis)[1]
    with_fewer = tf.split(with_fewer, [1, count - 1], axis)[1]
    return tf.concat([found, _phases(newer, with_fewer, whole, axis + 1)], place)


def _convolved(value: Any, taps: Any, rank: int) -> Any:
    """Convolve with the taps of some phases, which become axes before the channels."""
    shape = taps.shape.as_list()
    window, channels, made = shape[:rank], shape[rank], math.prod(shape[rank + 1 :])
    lengths = [size - count + 1 for size, count in zip(value.shape.as_list()[1:-1], window, strict=True)]
    if math.prod(lengths) == 1:  # One product of matrices, which LiteRT computes faster than a convolution.
        taken = math.prod(window) * channels
        result = tf.matmul(tf.reshape(value, [-1, taken]), tf.reshape(taps, [taken, made]))
    else:
        result = tf.nn.convolution(value, tf.reshape(taps, [*window, channels, made]), padding="VALID")
    return tf.reshape(result, [-1, *lengths, *shape[rank + 1 :]])
