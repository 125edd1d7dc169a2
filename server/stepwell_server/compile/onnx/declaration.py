"""Reads what a user declares about a step function, or the states of a Keras model: options, and a file beside the model.

Imports no framework, because the server reads declarations itself.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stepwell_server.compile import data_file
from stepwell_server.compile.errors import DataError, ModelError, quoted
from stepwell_server.program import Declaration

SUFFIX = ".onnx"
_KERAS = ".keras"
_BESIDE = "model.toml"
_MAX_BYTES = 1 << 20
_MAX_ELEMENTS = 1 << 16
#: The field of a declaration, by its table in the file, which is the option's name too.
FIELDS = {
    "state": "states",
    "batch-axis": "batch_axes",
    "constant": "constants",
    "initial": "initial",
    "context": "contexts",
    "shape": "shapes",
    "name": "names",
}
#: Those that Keras models have too.
OF_KERAS = ("state", "initial")


def file_beside(model: Path) -> Path | None:
    """Return the declaration beside a model: ``NAME.toml``, else ``model.toml``; None: there is none.

    A Keras model has only the first one, because the second one may belong to a step function in the same folder.
    """
    names = {
        SUFFIX: (model.with_suffix(".toml"), model.with_name(_BESIDE)),
        _KERAS: (model.with_suffix(".toml"),),
    }
    return next((found for found in names.get(model.suffix, ()) if found.is_file()), None)


def read(file: Path, *, of_keras: bool = False) -> Declaration:
    """Read a declaration.

    Args:
        file: the TOML file.
        of_keras: it is beside a Keras model. Then it counts only if it has a table of `OF_KERAS`: people keep other
            things under the name of a model, such as how it was trained.

    Raises:
        ModelError: it is not TOML, or says something else.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ModelError(f"{file}: must have at most {_MAX_BYTES} bytes")
        tables = tomllib.loads(file.read_text())
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # also of a text that is not UTF-8
        if of_keras:
            return Declaration()
        raise ModelError(f"{file}: must be TOML: {error}") from error
    known = OF_KERAS if of_keras else tuple(FIELDS)
    if of_keras and not any(isinstance(tables.get(table), dict) for table in known):
        return Declaration()
    found: dict[str, dict[str, Any]] = {}
    for table, content in tables.items():
        if table not in known:
            whose = "for a Keras model " if of_keras else ""
            raise ModelError(f"{file}: there is no table [{table}]; the tables {whose}are {', '.join(known)}")
        if not isinstance(content, dict):
            raise ModelError(f"{file}: {table} must be a table, [{table}]; got {content!r:.40}")
        found[FIELDS[table]] = {
            name: _checked(f"{file}: [{table}] {quoted(name)}", table, name, value, file.parent)
            for name, value in content.items()
        }
    return Declaration(**found)


def parse(option: str, texts: tuple[str, ...]) -> dict[str, Any]:
    """Read the values of an option of the command line, such as ``state=1`` of ``--batch-axis``.

    Raises:
        ModelError: one of them is wrong; the message names the option.
    """
    mark = ":" if option == "state" else "="
    found: dict[str, Any] = {}
    for text in texts:
        # The names of exporters may contain the mark: the last one counts, unless it belongs to a name such as "Identity:0".
        name, given, value = text.rpartition(mark)
        head, _, tail = name.rpartition(":")
        if option == "state" and value.isdecimal() and head and not tail.isdecimal():
            name, value = head, f"{tail}:{value}"
        what = f"--{option}"
        if not given or not name or not value:
            raise ModelError(f"{what}: must be {_FORMS[option]}; got {text!r:.80}")
        if name in found:
            raise ModelError(f"{what}: must name each tensor once; got {quoted(name)} twice")
        found[name] = _checked(what, option, name, _read(option, value), Path.cwd(), text)
    return found


def merged(first: Declaration, second: Declaration) -> Declaration:
    """Return both declarations; where both declare the same, the first one counts."""
    return Declaration(
        *(
            {**getattr(second, field.name), **getattr(first, field.name)}
            for field in dataclasses.fields(Declaration)
        )
    )


def of_model(model: Path, given: Declaration) -> Declaration:
    """Return the declaration of a model: the given one, and that beside its file.

    Raises:
        ModelError: the file beside it is wrong.
    """
    beside = file_beside(model)
    return given if beside is None else merged(given, read(beside, of_keras=model.suffix == _KERAS))


def to_json(declaration: Declaration) -> dict[str, Any]:
    """Return it for a message to a worker."""
    return dataclasses.asdict(declaration)


def from_json(document: Mapping[str, Any]) -> Declaration:
    """Read the result of `to_json`."""
    shapes = {name: tuple(shape) for name, shape in document["shapes"].items()}
    return Declaration(**{**document, "shapes": shapes})


# ------------------------------------------------------------------------------------------------------------- values

_FORMS = {
    "state": "INPUT:OUTPUT, the state before a step and after it",
    "batch-axis": "TENSOR=AXIS, such as state=1",
    "constant": "INPUT=VALUE, such as sr=16000",
    "initial": "STATE=NUMBER or STATE=FILE.npz",
    "context": "INPUT=N, the elements that precede the next input",
    "shape": "INPUT=SIZES, the shape of one row, such as input=512 or image=3,32",
    "name": "TENSOR=NAME",
}


def _read(option: str, text: str) -> Any:
    """Return the value that a text means: a number or list as in JSON, else the text."""
    if option in {"state", "name"}:
        return text
    try:
        value = json.loads(f"[{text}]" if option == "shape" else text)
    except (ValueError, RecursionError):
        return text
    return value


def _checked(what: str, option: str, name: str, value: Any, folder: Path, text: str | None = None) -> Any:
    shown = repr(value if text is None else text)
    if option == "initial" and isinstance(value, str) and value.endswith((".npz", ".npy")):
        return _from_file(what, name, folder / value)
    if option == "shape" and _is_count(value):
        value = [value]
    if not _RULES[option](value):
        raise ModelError(f"{what}: must be {_FORMS[option]}; got {shown:.80}")
    return tuple(value) if option == "shape" else value


def _from_file(what: str, name: str, file: Path) -> Any:
    """Return the array of a file as nested lists: the only one, or that of the state's name."""
    try:
        found = data_file.load(file)
    except DataError as error:
        raise ModelError(f"{what}: {error}") from error
    arrays = found if isinstance(found, Mapping) else {name: found}
    array = next(iter(arrays.values())) if len(arrays) == 1 else arrays.get(name)
    if array is None:
        raise ModelError(f"{what}: {file} must have an array {name!r}; it has {', '.join(arrays)}")
    if array.size > _MAX_ELEMENTS:
        raise ModelError(
            f"{what}: an initial state must have at most {_MAX_ELEMENTS} elements; {file} has {array.size}"
        )
    return array.tolist()


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_axis(value: Any) -> bool:
    return type(value) is int and 0 <= value < 64


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000


def _are_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_are_numbers, value))
    return isinstance(value, (bool, int, float))


_RULES: dict[str, Callable[[Any], bool]] = {
    "state": _is_text,
    "batch-axis": _is_axis,
    "constant": _are_numbers,
    "initial": _are_numbers,
    "context": _is_count,
    "shape": lambda value: isinstance(value, list) and len(value) < 64 and all(map(_is_count, value)),
    "name": _is_text,
}
