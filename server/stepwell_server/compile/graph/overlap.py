"""Overlapping frames that are added (`tf.signal.overlap_and_add`), traced as sums of shifted parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tensorflow.python.ops.signal import reconstruction_ops

from stepwell_server.compile.graph.patch import attribute
from stepwell_server.compile.graph.tensorflow_setup import tf

_ORIGINAL = reconstruction_ops.overlap_and_add


@contextlib.contextmanager
def shifted_frames() -> Iterator[None]:
    """Add the parts of frames one after the other.

    TensorFlow shifts them by a reshape to rows that are one part shorter, through which nobody can follow the time axis.
    The inverse of the short-time Fourier transform calls it, too.
    """
    with contextlib.ExitStack() as stack:
        for module in (tf.signal, reconstruction_ops):
            stack.enter_context(attribute(module, "overlap_and_add", _overlap_and_add))
        yield


def _overlap_and_add(signal: Any, frame_step: Any, name: Any = None) -> Any:
    """Return the same as TensorFlow's: frame ``i`` begins at the element ``i * frame_step``."""
    frames, step = tf.convert_to_tensor(signal), tf.get_static_value(frame_step)
    if step is None or step < 1 or not frames.shape.is_fully_defined():
        return _ORIGINAL(signal, frame_step, name)
    *outer, count, length = frames.shape.as_list()
    parts = -(-length // int(step))
    around = [[0, 0]] * len(outer)
    frames = tf.pad(frames, [*around, [0, 0], [0, parts * int(step) - length]])
    shifted = (
        tf.pad(part, [*around, [i, parts - 1 - i], [0, 0]])
        for i, part in enumerate(tf.split(frames, parts, -1))
    )
    total = sum(shifted, start=tf.zeros((), frames.dtype))
    joined = tf.reshape(total, [*outer, (count + parts - 1) * int(step)])
    return joined[..., : (count - 1) * int(step) + length]
