"""The file of a saved state: a safetensors file whose metadata names the model of the tensors.

A file may come from anywhere, so every field of it is checked, and any problem raises `InvalidInputError`. `write`
rejects what `read` would reject.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from stepwell._state.tensors import Array, pack
from stepwell.errors import InvalidInputError

T = TypeVar("T")

_FORMAT = "stepwell-state/2"
#: Key of the metadata. Files of the console and of other writers do not have it.
CHECKSUM = "sha256"
#: Types of the file format that numpy has too and that a state may have.
_DTYPES = frozenset({"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"})


class Header(NamedTuple):
    """The model and session that the tensors of a file belong to."""

    model: str
    fingerprint: str
    batch_size: int
    revision: int | None
    """None if it is not the state of one session; the file then has no revision."""
    position: int | None
    """None in the same cases as `revision`."""
    structure: str = ""
    """Structure of the model; empty if it is not known."""


def write(path: str, tensors: Mapping[str, Array], header: Header) -> None:
    """Writes a file, completely or not at all.

    Args:
        path: Path of the file; an old file of that name is replaced.
        tensors: In the model's order, (batch_size, ...) each.
        header: The model and session that they belong to.

    Raises:
        InvalidInputError: `read` would reject the file.
        OSError: The file cannot be written; the error names the path.
    """
    from safetensors import numpy as safetensors_numpy

    _check(tensors, header)
    metadata = {name: str(value) for name, value in header._asdict().items() if value is not None}
    # The file format sorts its tensors; a list of states is read in the model's order.
    metadata |= {"format": _FORMAT, "names": json.dumps(list(tensors))}
    arrays = {name: array.copy(order="C") for name, array in tensors.items()}
    metadata[CHECKSUM] = checksum(metadata, arrays)
    write_atomically(path, safetensors_numpy.save(arrays, metadata=metadata))


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Array]) -> str:
    """SHA-256 of the content of a file, in hexadecimal: safetensors itself does not notice a changed byte."""
    digest = hashlib.sha256(json.dumps({**metadata, CHECKSUM: ""}, sort_keys=True).encode())
    for name in sorted(tensors):
        array = tensors[name].astype(tensors[name].dtype.newbyteorder("<"), "C", copy=False)
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def read(path: str) -> tuple[dict[str, Array], Header]:
    """The tensors of a file in the model's order, and the model and session that they belong to.

    Raises:
        InvalidInputError: It is not a saved state; the message names the path and the rule.
        OSError: The file cannot be read or does not exist.
    """
    return checked(_read, path, "a state saved by State.save")


def checked(read: Callable[[str], T], path: str, kind: str) -> T:
    """Reads a file. Every problem of its content becomes one error; `kind` is the expected content."""
    from safetensors import SafetensorError

    with open(path, "rb"):  # safe_open's own errors do not distinguish a missing file from a corrupt one
        pass
    try:
        return read(path)
    except (InvalidInputError, SafetensorError, ValueError, OverflowError) as error:
        # The text may quote the file, so its length is limited.
        raise InvalidInputError(f"path must be {kind}; {path!r} is not: {error!s:.500}") from None


def _read(path: str) -> tuple[dict[str, Array], Header]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata: Mapping[str, str] = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise InvalidInputError(f"its format must be {_FORMAT!r}; got {metadata.get('format')!r}")
        header = Header(
            text_in(metadata, "model"),
            text_in(metadata, "fingerprint"),
            number_in(metadata, "batch_size"),
            number_in(metadata, "revision") if "revision" in metadata else None,
            number_in(metadata, "position") if "position" in metadata else None,
            text_in(metadata, "structure"),
        )
        tensors = tensors_in(file, metadata)
    _check(tensors, header)
    return tensors, header


def tensors_in(file: Any, metadata: Mapping[str, str]) -> dict[str, Array]:
    """The tensors of an open file, in the order of its metadata.

    Raises:
        InvalidInputError: They have other types, names or bytes than the file may have.
    """
    names = names_in(metadata, file.keys())
    for name in names:
        # Checked first, because safetensors raises errors of many kinds for types that numpy lacks.
        if (dtype := file.get_slice(name).get_dtype()) not in _DTYPES:
            raise InvalidInputError(
                f"tensor {name!r} must have one of the types {sorted(_DTYPES)}; got {dtype}"
            )
    tensors = {name: file.get_tensor(name) for name in names}
    if CHECKSUM in metadata and metadata[CHECKSUM] != (found := checksum(metadata, tensors)):
        raise InvalidInputError(
            f"it must have the content that was saved, of the {CHECKSUM} {metadata[CHECKSUM]!r:.80}; got {found}"
        )
    return tensors


def text_in(metadata: Mapping[str, str], key: str) -> str:
    """A text of the metadata."""
    if (text := metadata.get(key)) is None:
        raise InvalidInputError(f"its metadata must have {key!r}; it has only {sorted(metadata)}")
    return text


def number_in(metadata: Mapping[str, str], key: str) -> int:
    """A number of the metadata."""
    text = text_in(metadata, key)
    # `int` would accept signs, spaces and the digits of other scripts too.
    if not (text.isascii() and text.isdecimal() and len(text) <= 20):
        raise InvalidInputError(f"its {key} must be a whole number; got {text!r}")
    return int(text)


def names_in(metadata: Mapping[str, str], keys: Iterable[str]) -> list[str]:
    """The names of a file's tensors (`keys`) in the order of the metadata."""
    text = text_in(metadata, "names")
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidInputError(f"its names must be a list of strings in JSON; got {text!r:.100}")
    if sorted(names) != sorted(keys):
        raise InvalidInputError(
            f"its names must name each of its tensors {sorted(keys)!r:.200} once; got {text!r:.200}"
        )
    return names


def _check(tensors: Mapping[str, Array], header: Header) -> None:
    """Checks the content of a file.

    Raises:
        InvalidInputError: It breaks a rule.
    """
    for key, text in (
        ("model", header.model),
        ("fingerprint", header.fingerprint),
        *(("name", name) for name in tensors),
    ):
        if not text or not text.isprintable():
            raise InvalidInputError(
                f"the {key} in a saved state must be printable and not empty; got {text!r:.100}"
            )
    if not header.structure.isprintable():
        raise InvalidInputError(
            f"the structure in a saved state must be printable; got {header.structure!r:.100}"
        )
    if not 1 <= header.batch_size < 2**32:
        raise InvalidInputError(
            f"the batch_size of a saved state must be 1 to {2**32 - 1}; got {header.batch_size}"
        )
    for key, count in (("revision", header.revision), ("position", header.position)):
        if count is not None and not 0 <= count < 2**64:
            raise InvalidInputError(f"the {key} of a saved state must be 0 to {2**64 - 1}; got {count}")
    for name, array in tensors.items():
        _check_tensor(f"tensor {name!r:.100} of a saved state", array, header.batch_size)


def _check_tensor(what: str, array: Array, batch_size: int) -> None:
    if array.ndim == 0 or array.shape[0] != batch_size:
        raise InvalidInputError(
            f"{what} must have batch_size = {batch_size} rows on its first axis; got shape {array.shape}"
        )
    pack("", what, array[:1])  # the rules for tensors that can be sent to a server
    if array.dtype == np.bool_ and array.view(np.uint8).max(initial=0) > 1:
        raise InvalidInputError(f"{what} must hold booleans; got a byte that is neither 0 nor 1")


def write_atomically(path: str, data: bytes) -> None:
    """Writes a temporary file and renames it: a crash leaves the old file or the new one."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".stepwell-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        if error.errno is None:
            raise
        # Names the caller's file, not the temporary one.
        raise OSError(error.errno, error.strerror, path) from None
