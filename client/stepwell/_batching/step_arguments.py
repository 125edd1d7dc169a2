"""The arguments of a step, for sessions and groups alike: checked, and made into a `Change`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepwell._batching.frames import SELECTIONS, STATES, Change
from stepwell._batching.steps import SHARED_BYTES
from stepwell._state.arguments import pack_inputs
from stepwell._state.infos import Inputs, Mask, Outputs
from stepwell._state.tensors import Array, Packed, sent_as_is
from stepwell.errors import InvalidInputError

_TIMES = ("all", "last")


def step_change(
    inputs: Inputs,
    row_count: int,
    *,
    outputs: object = "all",
    time: object = "all",
    reset: Mask | None = None,
    states: object = "none",
    rows: tuple[int, ...] = (),
    count: str = "",
) -> Change:
    """Checks the arguments of a step and returns it as a value.

    Args:
        inputs: One array, or arrays by name.
        row_count: Number of rows that each must have.
        outputs: See `check_outputs`.
        time: See `check_outputs`.
        reset: Rows that restart: see `pack_reset`.
        states: Time steps whose states to return: "all", "last" or "none".
        rows: Rows of a session that the inputs are for, as `check_rows` returns them; () for all.
        count: The caller's name of `row_count`, for messages.
    """
    selection, names = check_outputs(outputs, time)
    selected_states = check_states(states)
    packed = pack_inputs(inputs, row_count, count or ("len(rows)" if rows else "batch_size"))
    mask = b"" if reset is None else pack_reset(reset, packed)
    return Change("step", packed, selection, rows, mask, names, selected_states)


@functools.lru_cache(maxsize=256)
def plain_form(
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    row_count: int,
    outputs: object,
    time: object,
    states: object,
) -> Change | None:
    """The change of a step of one array that may share a frame and is sent as it is, all but its data; None for another step.

    It is checked and made once for all steps that are alike.

    Raises:
        TypeError: An argument is not hashable, such as a list of outputs.
    """
    number = sent_as_is(dtype)
    if (
        number is None
        or shape[:1] != (row_count,)
        or not 0 < math.prod(shape) * dtype.itemsize <= SHARED_BYTES
    ):
        return None
    selection, names = check_outputs(outputs, time)
    if names:
        return None
    return Change("step", (Packed("", number, shape, b""),), selection, states=check_states(states))


def check_states(states: object) -> str:
    """Time steps whose states to return: "all", "last" or "none"."""
    if not isinstance(states, str) or states not in STATES:
        raise InvalidInputError(f"states must be one of {list(STATES)}; got {states!r}")
    return states


def check_outputs(outputs: object, time: object = "all") -> tuple[str, tuple[str, ...]]:
    """Time steps to return ("all", "last" or "none"), and the outputs to return (empty: all).

    Args:
        outputs: One of these words, or a list of names.
        time: "all" or "last" time steps.
    """
    if not isinstance(time, str) or time not in _TIMES:
        raise InvalidInputError(f"time must be one of {list(_TIMES)}; got {time!r}")
    if isinstance(outputs, str) and outputs in SELECTIONS:
        return (time if outputs == "all" else outputs), ()
    if not isinstance(outputs, Sequence) or isinstance(outputs, str | bytes):
        raise InvalidInputError(
            f"outputs must be one of {list(SELECTIONS)}, or a list of names; got {outputs!r}"
        )
    wrong = [name for name in outputs if not isinstance(name, str) or not name]
    if wrong or not outputs or len(set(outputs)) != len(outputs):
        raise InvalidInputError(
            f"outputs must name at least one output of the model, each at most once; got {list(outputs)!r}"
        )
    return time, tuple(outputs)


def pack_reset(reset: Mask, inputs: Sequence[Packed]) -> bytes:
    """Rows that restart, as `Change.reset`: booleans of shape (rows,), or (rows, T) for every time step."""
    rows = inputs[0].shape[0]
    # only the server knows whether n in (rows, n) is T or features
    rank = min(3, max(len(tensor.shape) for tensor in inputs))
    times = sorted({tensor.shape[1] for tensor in inputs if len(tensor.shape) >= rank > 1})
    try:
        mask = np.asarray(reset)
    except (TypeError, ValueError):
        raise InvalidInputError(f"reset must be booleans of {_shapes(rows, times)}; got {reset!r}") from None
    fits = mask.shape == (rows,) or (mask.ndim == 2 and mask.shape[0] == rows and mask.shape[1] in times)
    if mask.dtype != np.bool_ or not fits:
        raise InvalidInputError(
            f"reset must be booleans of {_shapes(rows, times)}; got {mask.dtype} of shape {mask.shape}"
        )
    return mask.tobytes() if mask.any() else b""


def _shapes(rows: int, times: Sequence[int]) -> str:
    return " or ".join([f"shape ({rows},)", *[f"({rows}, {time})" for time in times]])


def selected(outputs: dict[str, Array], change: Change) -> Outputs:
    """The outputs of a step as the caller receives them. `change` may be its form."""
    if len(outputs) == 1 and not change.output_names and change.outputs != "none":
        [only] = outputs.values()
        return only
    if change.output_names:
        return {name: outputs[name] for name in change.output_names if name in outputs}
    if change.outputs == "none":
        return None
    return outputs


def selected_of(names: Sequence[str], arrays: Sequence[Array], change: Change) -> Outputs:
    """As `selected`, without a dict of a single output."""
    if len(arrays) == 1 and not change.output_names and change.outputs != "none":
        return arrays[0]
    return selected(dict(zip(names, arrays, strict=True)), change)


def as_one(outputs: dict[str, Array]) -> Outputs:
    """The array of a model with one output; otherwise all of them by name."""
    return next(iter(outputs.values())) if len(outputs) == 1 else outputs
