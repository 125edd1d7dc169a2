"""The file of a saved tape: a safetensors file with the arrays of the tape, and its marks in the metadata.

A file may come from anywhere, so every field of it is checked, and any problem raises `InvalidInputError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from stepwell._state.file import (
    CHECKSUM,
    checked,
    checksum,
    number_in,
    tensors_in,
    text_in,
    write_atomically,
)
from stepwell._state.tensors import Array
from stepwell._tape.content import KINDS, Content
from stepwell._tape.marks import KINDS as MARKS
from stepwell._tape.marks import Mark
from stepwell.errors import InvalidInputError

_FORMAT = "stepwell-tape/1"
_COUNTS = {"revisions": np.uint64, "positions": np.uint64, "times": np.int64}
_MAX_ROWS = 2**32 - 1


def write(path: str, content: Content) -> None:
    """Writes a file, completely or not at all; an old file of that name is replaced.

    Raises:
        OSError: The file cannot be written; the error names the path.
    """
    from safetensors import numpy as safetensors_numpy

    tensors = {
        "revisions": content.revisions,
        "positions": content.positions,
        "times": content.times.astype(np.int64),
        **{f"{kind}/{name}": array for kind, name, array in content.named_arrays()},
    }
    metadata = {
        "format": _FORMAT,
        "names": json.dumps(list(tensors)),
        "model": content.model,
        "fingerprint": content.fingerprint,
        "batch_size": str(content.batch_size),
        "sessions": "group" if content.is_group else "one",
        "dropped": str(content.dropped),
        "stopped": content.stopped,
        "marks": json.dumps([[mark.index, mark.kind, mark.rows] for mark in content.marks]),
    }
    # Copies: safetensors takes only arrays in C order.
    arrays = {name: array.copy(order="C") for name, array in tensors.items()}
    metadata[CHECKSUM] = checksum(metadata, arrays)
    write_atomically(path, safetensors_numpy.save(arrays, metadata=metadata))


def read(path: str) -> Content:
    """The content of a file.

    Raises:
        InvalidInputError: It is not a saved tape; the message names the path and the rule.
        OSError: The file cannot be read or does not exist.
    """
    return checked(_read, path, "a tape saved by Tape.save")


def _read(path: str) -> Content:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata: Mapping[str, str] = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise InvalidInputError(f"its format must be {_FORMAT!r}; got {metadata.get('format')!r}")
        tensors = tensors_in(file, metadata)
    counts = {name: _counts(tensors, name) for name in _COUNTS}
    times = counts["times"].view("datetime64[us]")
    batch_size, members = number_in(metadata, "batch_size"), counts["revisions"].shape[1]
    if not 1 <= batch_size <= _MAX_ROWS or not 1 <= members <= _MAX_ROWS:
        raise InvalidInputError(
            f"its batch_size and its number of sessions must be 1 to {_MAX_ROWS}; got {batch_size} and {members}"
        )
    if (sessions := text_in(metadata, "sessions")) not in ("one", "group") or (
        sessions == "one" and members != 1
    ):
        raise InvalidInputError(
            f"its sessions must be 'group', or 'one' with one revision for each time step; got {sessions!r:.100} "
            f"and {members}"
        )
    content = Content(
        model=text_in(metadata, "model"),
        fingerprint=text_in(metadata, "fingerprint"),
        batch_size=batch_size,
        is_group=sessions == "group",
        revisions=counts["revisions"],
        positions=counts["positions"],
        times=times,
        arrays=_arrays(tensors, (len(times), members * batch_size)),
        marks=_marks(text_in(metadata, "marks"), len(times), members * batch_size),
        dropped=number_in(metadata, "dropped"),
        stopped=text_in(metadata, "stopped"),
    )
    if not all(map(str.isprintable, (content.model, content.fingerprint, content.stopped))):
        raise InvalidInputError("its model, fingerprint and reason to stop must be printable")
    for array in (*counts.values(), times, *(array for _, _, array in content.named_arrays())):
        array.flags.writeable = False
    return content


def _counts(tensors: Mapping[str, Array], name: str) -> Array:
    axes = 1 if name == "times" else 2
    times, array = tensors.get("times"), tensors.get(name)
    if (
        array is None
        or times is None
        or array.ndim != axes
        or array.dtype != _COUNTS[name]
        or len(array) != len(times)
    ):
        got = "nothing" if array is None else f"{array.dtype}{array.shape}"
        raise InvalidInputError(
            f"its {name} must be {np.dtype(_COUNTS[name])} with {axes} axes, one entry for each time step; got {got}"
        )
    if name == "positions" and array.shape != tensors["revisions"].shape:
        raise InvalidInputError(
            f"its positions must have the shape of its revisions, {tensors['revisions'].shape}; got {array.shape}"
        )
    return array


def _arrays(tensors: Mapping[str, Array], shape: tuple[int, int]) -> dict[str, dict[str, Array]]:
    arrays: dict[str, dict[str, Array]] = {kind: {} for kind in KINDS}
    for key, array in tensors.items():
        if key in _COUNTS:
            continue
        kind, _, name = key.partition("/")
        if kind not in arrays or not name or not name.isprintable():
            raise InvalidInputError(
                f"its arrays must be named {list(KINDS)}, a slash, and a name; got {key!r:.100}"
            )
        if array.shape[:2] != shape:
            raise InvalidInputError(
                f"its array {key!r:.100} must begin with the axes time and row, {shape}; got {array.shape}"
            )
        if array.dtype == np.bool_ and array.view(np.uint8).max(initial=0) > 1:
            raise InvalidInputError(
                f"its array {key!r:.100} must hold booleans; got a byte that is neither 0 nor 1"
            )
        arrays[kind][name] = array
    return arrays


def _marks(text: str, length: int, rows: int) -> list[Mark]:
    try:
        entries: Any = json.loads(text)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list):
        raise InvalidInputError(f"its marks must be a list in JSON; got {text!r:.100}")
    marks = []
    for entry in entries:
        if not _is_mark(entry, length, rows):
            raise InvalidInputError(
                f"its marks must have an index from 0 to {length}, one of the kinds {list(MARKS)}, and rows from 0 to "
                f"{rows - 1}; got {entry!r:.100}"
            )
        marks.append(Mark(entry[0], entry[1], tuple(entry[2])))
    return marks


def _is_mark(entry: Any, length: int, rows: int) -> bool:
    if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[2], list):
        return False
    index, kind, chosen = entry
    numbers = [index, *chosen]
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and index <= length
        and kind in MARKS
        and all(row < rows for row in chosen)
    )
