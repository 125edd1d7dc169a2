"""Reads the user's sequences and initial values, and checks what needs no model. Imports no framework."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.compile.errors import DataError, ModelError, gist, quoted
from stepwell_server.program import TensorSpec

Array = npt.NDArray[np.generic]


def load(file: Path) -> Array | Mapping[str, Array]:
    """Return the array of an ``.npy`` file, or the arrays of an ``.npz`` file by their names.

    Raises:
        DataError: it cannot be read, or contains anything other than finite numbers.
    """
    if not file.is_file():
        raise DataError(f"{file}: {'is a folder' if file.is_dir() else 'there is no such file'}")
    try:
        with file.open("rb") as stream:
            content: Any = np.load(stream, allow_pickle=False)
            if not isinstance(content, np.ndarray):
                content = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, LookupError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{file}: must be a NumPy .npy or .npz file of numbers; it is corrupt, or contains objects ({gist(error)})"
        ) from error
    if isinstance(content, np.ndarray):
        _require_numbers(f"{file}: the array", content)
    else:
        for name, array in content.items():
            _require_numbers(f"{file}: array {name!r}", array)
    return content  # type: ignore[no-any-return]  # what numpy.load returns is not typed


def read(file: Path, specs: Sequence[TensorSpec]) -> tuple[list[Array], int]:
    """Read sequences for the inputs of a model; return them and the number of time steps.

    An ``.npy`` file contains the only input of a model, an ``.npz`` file inputs by name. Each is ``(batch, T,
    features...)``; a single sequence may omit the batch.

    Raises:
        DataError: it cannot be read, or does not fit.
    """
    content = load(file)
    if isinstance(content, np.ndarray):
        if len(specs) != 1:
            names = ", ".join(repr(spec.name) for spec in specs)
            raise DataError(
                f"{file}: the model has the inputs {names}: give an .npz file with one array for each"
            )
        found: Mapping[str, Array] = {specs[0].name: content}
    else:
        found = content
    missing = [spec.name for spec in specs if spec.name not in found]
    unknown = [name for name in found if name not in {spec.name for spec in specs}]
    if missing or unknown:
        wanted = ", ".join(repr(spec.name) for spec in specs)
        raise DataError(f"{file}: must hold the inputs {wanted}; got {', '.join(map(repr, found)) or 'none'}")
    arrays = [_fitting(file, spec, found[spec.name]) for spec in specs]
    lengths = {array.shape[1] for array, spec in zip(arrays, specs, strict=True) if spec.temporal}
    rows = {len(array) for array in arrays}
    if len(lengths) > 1 or len(rows) > 1:
        shapes = ", ".join(
            f"{quoted(spec.name)} {array.shape}" for spec, array in zip(specs, arrays, strict=True)
        )
        raise DataError(f"{file}: all inputs must have the same rows and time steps; got {shapes}")
    steps = lengths.pop() if lengths else 1
    if steps < 2 and any(spec.temporal for spec in specs):
        raise DataError(f"{file}: must have at least 2 time steps, so that a state is carried; got {steps}")
    return arrays, steps


def _require_numbers(what: str, array: Any) -> None:
    if array.dtype.kind not in "biuf":
        raise DataError(f"{what} must be of real numbers; got {array.dtype}")
    if array.ndim == 0 or array.size == 0:
        raise DataError(
            f"{what} must have the shape (batch, T, features...), none of them 0; got {array.shape}"
        )
    wrong = np.argwhere(~np.isfinite(array))
    if len(wrong):
        place = tuple(int(i) for i in wrong[0])
        raise DataError(f"{what} must be finite; got {array[place]} at {place}")


def _fitting(file: Path, spec: TensorSpec, array: Array) -> Array:
    leading = 2 if spec.temporal else 1
    if array.ndim == leading - 1 + len(spec.shape):
        array = array[np.newaxis]
    wanted = ("batch", *(("T",) if spec.temporal else ()), *map(str, spec.shape))
    if array.ndim != len(wanted) or array.shape[leading:] != spec.shape or 0 in array.shape[:leading]:
        raise DataError(
            f"{file}: input {quoted(spec.name)} must have the shape ({', '.join(wanted)}), none of them 0; got {array.shape}"
        )
    if not np.can_cast(array.dtype, np.dtype(spec.dtype), "same_kind"):
        raise DataError(f"{file}: input {quoted(spec.name)} must be {spec.dtype}; got {array.dtype}")
    with np.errstate(over="ignore"):
        cast = array.astype(spec.dtype)
    refuse_at(file, spec, array, ~np.isfinite(cast), f"must be finite {spec.dtype}")
    if np.issubdtype(array.dtype, np.integer):
        refuse_at(file, spec, array, cast != array, f"must fit {spec.dtype}")
    return cast


def refuse_at(file: Path, spec: TensorSpec, array: Array, is_wrong: Any, rule: str) -> None:
    """Refuse data, naming the first wrong value."""
    wrong = np.argwhere(is_wrong)
    if len(wrong):
        place = tuple(int(i) for i in wrong[0])
        where = f"row {place[0]}" + (f", time step {place[1]}" if spec.temporal else "")
        raise DataError(f"{file}: input {quoted(spec.name)} {rule}; got {array[place]} at {where}")


def initial_row(name: str, value: Any, shape: tuple[int, ...], dtype: str) -> Array:
    """Return a declared initial value of a state: a number for all elements, or nested lists of one row.

    Raises:
        ModelError: it does not fit.
    """
    try:
        given: Array = np.array(value)
        with np.errstate(over="ignore"):  # refused below
            array: Array = given.astype(dtype)
    except (ValueError, OverflowError) as error:
        raise ModelError(
            f"--initial: state {quoted(name)} must be numbers of {dtype}; got {value!r:.80}"
        ) from error
    if array.dtype.kind != "f" and not np.array_equal(array, given):
        raise ModelError(f"--initial: state {quoted(name)} must be numbers of {dtype}; got {value!r:.80}")
    if array.ndim and array.shape != shape:
        raise ModelError(
            f"--initial: state {quoted(name)} must have the shape of one row, {list(shape)}; got {list(array.shape)}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ModelError(f"--initial: state {quoted(name)} must be finite; got {value!r:.80}")
    # np.ascontiguousarray would add an axis where a row is a single number
    return np.array(np.broadcast_to(array, shape))


def initial_options(initial: Mapping[str, Any], states: Collection[str]) -> list[str]:
    """Return the options that declare initial values of these states; an array must be in a file again."""
    return [
        f"--initial {name}={'FILE.npz' if isinstance(value, list) else json.dumps(value)}"
        for name, value in initial.items()
        if name in states
    ]
