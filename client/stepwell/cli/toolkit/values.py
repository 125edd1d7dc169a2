"""Inputs on the command line: JSON, '@file.json', '.npy', '.npz', '.csv' or stdin, with or without a name."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click
import click.shell_completion

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stepwell import TensorInfo

NAMED = re.compile(r"""(?P<name>[^\s\[{"@/=]+)=(?P<value>.+)""", re.DOTALL)
"""NAME=VALUE. JSON, '@file' and paths with a folder are never read as a name."""


@dataclass(frozen=True)
class Value:
    """An input as it was given."""

    array: NDArray[Any]
    """The numbers."""
    is_csv: bool = False
    """Whether it is a CSV file's (lines, columns), whose lines are time steps and whose columns are features."""
    json: str = ""
    """Its text on the command line; empty if it was not given there."""


_PYTHON_HINT = ": did you mean x[None]?"
_MAX_HINT = 200
"""Longest input, in characters, that a hint repeats."""
Values = Mapping[str | None, Value]
"""Inputs by name; None stands for the only one, unnamed."""


def read_inputs(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> tuple[Values, ...]:
    """Reads every occurrence of the option while the command line is parsed, so that errors name it."""
    try:
        return tuple(read_input(text) for text in given)
    except OSError as error:
        raise click.BadParameter(f"cannot read {error.filename}: {error.strerror}", ctx, param) from None
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def complete_file(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[click.shell_completion.CompletionItem]:
    """Files, which the shell finds; JSON is not completed."""
    return [click.shell_completion.CompletionItem(incomplete, type="file")]


def read_input(text: str) -> Values:
    """Read one `[NAME=]VALUE`.

    Raises:
        ValueError: It cannot be read as numbers.
        OSError: The file cannot be read.
    """
    named = NAMED.fullmatch(text)
    if named is None:
        return read_value(text)
    values = read_value(named["value"])
    if None not in values:
        raise ValueError(f"{named['name']}=... must be one input; {named['value']} holds several with names")
    return {named["name"]: values[None]}


def read_value(text: str) -> Values:
    """Read one VALUE: a file, stdin or JSON."""
    if text == "-":
        return from_json(sys.stdin.read(), "stdin")
    if text.startswith("@"):
        return from_json(read_text(Path(text[1:])), text[1:])
    reader = READERS.get(Path(text).suffix.lower())
    if reader:
        return reader(Path(text))
    values = from_json(text, "the value")
    return {None: replace(values[None], json=text)} if None in values else values


def read_text(path: Path) -> str:
    """Reads a text file, without its byte order mark if it has one."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from None


def from_json(text: str, source: str) -> Values:
    """Read nested lists of one input, or an object of them with the inputs' names as keys."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{source} is not JSON ({error}); give nested lists, @FILE.json, FILE.npy, FILE.npz, FILE.csv or -"
        ) from None
    if isinstance(document, dict):
        return {name: Value(to_array(value, f"{source}, {name}")) for name, value in document.items()}
    return {None: Value(to_array(document, source))}


def to_array(nested: object, source: str) -> NDArray[Any]:
    """Make an array of nested lists of numbers of equal lengths."""
    import numpy as np

    try:
        array = np.asarray(nested)
    except ValueError:
        raise ValueError(f"{source} must be nested lists of equal lengths at each level") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{source} must hold numbers only")
    return array


def from_npy(path: Path) -> Values:
    """Read one array of a `.npy` file, or several of a `.npz` file with the inputs' names as keys."""
    with path.open("rb") as file:
        try:
            return load_arrays(file)
        except Exception as error:  # corrupt files raise various errors of zip, zlib, tokenize and numpy
            raise ValueError(f"{path} is not a NumPy file: {error}") from None


def load_arrays(file: BinaryIO) -> Values:
    """Read what a NumPy file holds; pickled objects are refused."""
    import numpy as np

    loaded = np.load(file, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return {None: Value(loaded)}
    return {name: Value(loaded[name]) for name in loaded.files}


def from_csv(path: Path) -> Values:
    """Reads time steps, one per line, with or without a line of column names."""
    import numpy as np

    lines = read_text(path).splitlines()
    if lines and not is_numbers(lines[0]):
        lines = lines[1:]
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path} has no line of numbers")
    dtype = np.float64 if any(set(".eEnN") & set(line) for line in lines) else np.int64
    try:
        return {
            None: Value(np.loadtxt(lines, dtype=dtype, delimiter=",", ndmin=2, comments=None), is_csv=True)
        }
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def is_numbers(line: str) -> bool:
    """Whether every cell of the line is a number."""
    try:
        [float(cell) for cell in line.split(",")]
    except ValueError:
        return False
    return True


READERS = {".npy": from_npy, ".npz": from_npy, ".csv": from_csv}
"""Readers of files, by suffix."""


def fit(given: Sequence[Values], specs: Sequence[TensorInfo]) -> dict[str, NDArray[Any]]:
    """Gives every input its name, and the type and axes that its form leaves open.

    Args:
        given: The values of each occurrence of the option.
        specs: The model's inputs.

    Raises:
        click.UsageError: An input is given twice, or without a name although the model has several.
    """
    fitted: dict[str, NDArray[Any]] = {}
    by_name = {spec.name: spec for spec in specs}
    for name, value in [item for values in given for item in values.items()]:
        if name is None and len(specs) != 1:
            raise click.UsageError(
                f"--input needs a name, NAME=VALUE; the model's inputs are {', '.join(by_name)}"
            )
        key = specs[0].name if name is None else name
        if key in fitted:
            raise click.UsageError(f"--input must be given once for each input; got {key} twice")
        fitted[key] = fit_one(value, by_name[key]) if key in by_name else value.array
    return fitted


def fit_one(value: Value, spec: TensorInfo) -> NDArray[Any]:
    """Folds a CSV file's columns into the input's features, and converts integers for float inputs."""
    array = fold_columns(value.array, spec) if value.is_csv else value.array
    return array.astype(spec.dtype) if is_float(spec.dtype) and array.dtype.kind in "iu" else array


def fold_columns(array: NDArray[Any], spec: TensorInfo) -> NDArray[Any]:
    """Gives (lines, columns) the input's axes: a line is a time step of one row, or a row if there is no time axis.

    Columns that do not fit the features stay unchanged, for the server to reject.
    """
    lines, columns = array.shape
    features = spec.shape if math.prod(spec.shape) == columns else (columns,)
    return array.reshape((1, lines, *features) if spec.temporal else (lines, *features))


def as_json_hint(message: str, given: Sequence[Values]) -> str:
    """Rewrites the SDK's hint about a missing first axis for this command line."""
    rule, hint, rest = message.partition(_PYTHON_HINT)
    if not hint or rest:
        return message
    texts = [(name, value.json) for values in given for name, value in values.items()]
    if len(texts) != 1 or not 0 < len(texts[0][1]) <= _MAX_HINT:
        return f"{rule}: did you mean one more pair of brackets around it, [[...]]?"
    ((name, text),) = texts
    return f"{rule}: did you mean --input {shlex.quote(f'{name}=[{text}]' if name else f'[{text}]')}?"


def is_float(dtype: str | np.dtype[Any]) -> bool:
    """Whether a model's tensor type is a floating-point one."""
    return "float" in str(dtype)
