"""Whether tensors fit a program: names, dtypes, shapes, finite numbers.

Every error names the argument, the rule and what came. Casting is done here, so that what leaves has the
program's own dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.engine.types import Array, Tensors
from stepwell_server.errors import InvalidInput
from stepwell_server.program import Program, StateSpec, TensorSpec


@dataclasses.dataclass(frozen=True, slots=True)
class CheckedInputs:
    """Inputs in the program's order and dtypes."""

    arrays: tuple[Array, ...]
    """Temporal inputs `(rows, T, ...)` if `steps > 1`, everything else `(rows, ...)`."""
    steps: int
    """T."""
    with_time: bool
    """The caller gave a time axis, so the reply has one too."""


def check_inputs(program: Program, inputs: Tensors, rows: int) -> CheckedInputs:
    """Check and cast the inputs of `rows` rows. Finite numbers are `finite_rows`' affair.

    Raises:
        InvalidInput: a name, dtype or shape does not fit.
    """
    by_name = _by_name("inputs", inputs, [spec.name for spec in program.inputs])
    arrays = []
    times: dict[str, int | None] = {}
    for spec in program.inputs:
        array = _cast("input", spec.name, by_name[spec.name], spec.dtype)
        if spec.temporal:
            times[spec.name] = _time_steps(spec, array, rows)
        elif array.shape != (rows, *spec.shape):
            raise _shape_error(spec.name, f"{(rows, *spec.shape)}", array)
        arrays.append(array)
    time = _common_time(times)
    steps = 1 if time is None else time
    if time == 1:
        arrays = [
            array[:, 0] if spec.temporal else array
            for spec, array in zip(program.inputs, arrays, strict=True)
        ]
    return CheckedInputs(tuple(arrays), steps, time is not None)


def check_state(program: Program, state: Tensors, rows: int) -> tuple[Array, ...]:
    """Check and cast a whole state of `rows` rows, in the program's order.

    Raises:
        InvalidInput: a name, dtype or shape does not fit.
    """
    by_name = _by_name("state", state, [spec.name for spec in program.state])
    return tuple(_check_state_tensor(spec, by_name[spec.name], rows) for spec in program.state)


def finite_rows(arrays: Sequence[Array]) -> npt.NDArray[np.bool_] | None:
    """Which rows hold only finite numbers, `(rows,)`; None if all do."""
    bad: npt.NDArray[np.bool_] | None = None
    for array in arrays:
        if not is_float(array.dtype) or np.logical_and.reduce(np.isfinite(array), axis=None):
            continue
        finite = np.isfinite(array).reshape(len(array), -1)
        bad = np.logical_or(~finite.all(axis=1), False if bad is None else bad)
    return None if bad is None else ~bad


def require_finite(what: str, arrays: Sequence[Array], names: Sequence[str]) -> None:
    """Refuse NaN and infinity anywhere in `arrays`.

    Raises:
        InvalidInput: it names the first tensor at fault and the first index in it.
    """
    for array, name in zip(arrays, names, strict=True):
        if is_float(array.dtype) and not np.isfinite(array).all():
            raise not_finite(what, name, array)


def not_finite(what: str, name: str, array: Array) -> InvalidInput:
    """The error for an array that holds NaN, infinity or a value too large for its dtype."""
    where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
    return InvalidInput(
        f"{what} {name!r} must hold finite numbers within {array.dtype}'s range;"
        f" got {array[where]} at index {list(where)}"
    )


def is_float(dtype: np.dtype[np.generic]) -> bool:
    """Whether a dtype is a float type, bfloat16 included."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _by_name(what: str, given: Tensors, names: Sequence[str]) -> Mapping[str, Array]:
    if len(names) == 1 and len(given) == 1 and "" in given:
        return {names[0]: given[""]}
    missing = [name for name in names if name not in given]
    extra = [name for name in given if name not in names]
    if missing or extra:
        raise InvalidInput(
            f"{what} must name each of {list(names)} once;"
            f" got {sorted(given)} (missing {missing}, not known {extra})"
        )
    return given


def _cast(what: str, name: str, array: Array, dtype: str) -> Array:
    wanted = np.dtype(dtype)
    if array.dtype == wanted:
        return array
    if not _may_cast(array.dtype, wanted):
        raise InvalidInput(f"{what} {name!r} must have a dtype that fits {wanted}; got {array.dtype}")
    if wanted.kind in "iub" and array.size:
        _require_range(what, name, array, wanted)
    with np.errstate(over="ignore"):  # becomes infinity, which is refused as such
        return array.astype(wanted)


def _may_cast(given: np.dtype[np.generic], wanted: np.dtype[np.generic]) -> bool:
    if is_float(wanted):
        return is_float(given) or given.kind in "iu"
    if wanted.kind in "iu":
        return given.kind in "iu"
    return False


def _require_range(what: str, name: str, array: Array, wanted: np.dtype[np.generic]) -> None:
    limits = np.iinfo(wanted)  # type: ignore[type-var]
    low, high = int(array.min()), int(array.max())
    if low < limits.min or high > limits.max:
        value = low if low < limits.min else high
        raise InvalidInput(
            f"{what} {name!r} must hold values within {wanted}'s range,"
            f" {limits.min} to {limits.max}; got {value}"
        )


def _time_steps(spec: TensorSpec, array: Array, rows: int) -> int | None:
    """T, or None without a time axis."""
    if array.shape == (rows, *spec.shape):
        return None
    if array.ndim == len(spec.shape) + 2 and array.shape[0] == rows and array.shape[2:] == spec.shape:
        if array.shape[1] == 0:
            raise InvalidInput(f"input {spec.name!r} must have at least one time step; got T = 0")
        return int(array.shape[1])
    features = "".join(f", {size}" for size in spec.shape)
    one = f"({rows}{features})" if spec.shape else f"({rows},)"
    raise _shape_error(spec.name, f"{one} or ({rows}, T{features})", array)


def _shape_error(name: str, wanted: str, array: Array) -> InvalidInput:
    return InvalidInput(f"input {name!r} must have shape {wanted}; got {array.shape}")


def _common_time(times: Mapping[str, int | None]) -> int | None:
    if len(set(times.values())) > 1:
        said = ", ".join(f"{name!r}: {'none' if t is None else t}" for name, t in times.items())
        raise InvalidInput(f"inputs must have the same number of time steps; got {said}")
    return next(iter(times.values()), None)


def _check_state_tensor(spec: StateSpec, given: Array, rows: int) -> Array:
    array = _cast("state", spec.name, given, spec.dtype)
    if array.shape != (rows, *spec.shape):
        raise InvalidInput(f"state {spec.name!r} must have shape {(rows, *spec.shape)}; got {array.shape}")
    return array
