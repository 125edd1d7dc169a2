"""The time steps of one change, ready for a tape. Each source of a tape makes them; a tape knows nothing of the source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from stepwell._batching.frames import Change
from stepwell._state.infos import ModelInfo, TensorInfo
from stepwell._state.tensors import Array, dtype_of, to_messages, unpack_all
from stepwell._state.trace import TracedStates

Rows = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, slots=True)
class Members:
    """The sessions that a change reached, and their counts after it."""

    indexes: Rows | None
    """Their indexes on the tape; None: all."""
    revisions: npt.NDArray[np.uint64]
    """Revision of each after the change, (members,)."""
    before: npt.NDArray[np.uint64]
    """Position of each before the change, (members,)."""
    positions: npt.NDArray[np.uint64]
    """Position of each after the change, (members,)."""
    versions: npt.NDArray[np.uint64]
    """Model version that each uses, (members,); 0 if it is not known."""


@dataclasses.dataclass(frozen=True, slots=True)
class Frames:
    """The time steps of one change. Arrays have time first, then the rows of the sessions that the change reached.

    An array may have fewer time steps than `count`: it then has the last ones.
    """

    count: int
    """Number of time steps."""
    members: Members
    rows: Rows | None
    """Rows of the tape that the arrays have; None: all."""
    restarts: Mask | None
    """Rows that restarted before each time step, (count, rows); None: none."""
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    states: Mapping[str, Array]
    """Empty if they were not requested."""


def frames_of(
    change: Change,
    info: ModelInfo,
    members: Members,
    rows: Rows | None,
    outputs: Mapping[str, Array],
    states: TracedStates,
) -> Frames:
    """The time steps of an applied step.

    Args:
        change: The step.
        info: Its model.
        members: The sessions that it reached.
        rows: Rows of the tape that it stepped; None: all.
        outputs: Outputs of the reply, rows first.
        states: States of the reply, rows first.
    """
    sent = unpack_all(to_messages(change.tensors))
    inputs = {}
    count = 1
    for spec, array in _described(info.inputs, sent):
        if spec.temporal and array.ndim == len(spec.shape) + 2:
            count = array.shape[1]
    for spec, array in _described(info.inputs, sent):
        values = array.astype(dtype_of(spec.dtype), copy=False)
        has_time = spec.temporal and array.ndim == len(spec.shape) + 2
        inputs[spec.name] = np.moveaxis(values, 1, 0) if has_time else np.stack([values] * count)
    restarts: Mask | None = None
    if change.reset:
        entries = np.frombuffer(change.reset, np.bool_).reshape(len(next(iter(sent.values()))), -1)
        restarts = np.zeros((count, len(entries)), np.bool_)
        restarts[: entries.shape[1]] = entries.T  # without a time axis: before the first time step
    return Frames(
        count=count,
        members=members,
        rows=rows,
        restarts=restarts,
        inputs=inputs,
        outputs={
            spec.name: _time_first(array, has_time=spec.temporal and array.ndim == len(spec.shape) + 2)
            for spec, array in _described(info.outputs, outputs)
        },
        states={name: _time_first(array, has_time=states.has_time) for name, array in states.items()},
    )


def _described(specs: Sequence[TensorInfo], arrays: Mapping[str, Array]) -> list[tuple[TensorInfo, Array]]:
    """Arrays with their descriptions. A single input may have an empty name."""
    named = {specs[0].name: arrays[""]} if list(arrays) == [""] else arrays
    return [(spec, named[spec.name]) for spec in specs if spec.name in named]


def _time_first(array: Array, *, has_time: bool) -> Array:
    return np.moveaxis(array, 1, 0) if has_time else array[None]
