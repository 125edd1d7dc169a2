"""A program as one file: a zip archive, stored without compression, with a manifest in JSON.

``stepwell.json`` is the manifest: the version of the format, specs, fingerprint, proof, provenance and architecture, and
size and digest of every other member. The rest is what the executor loads (`Program.files`, so that
``program.tflite`` can be taken out by any tool) and plain arrays: little-endian numbers, whose types and
shapes follow from the specs. There is no code in it, and no pickle. The same program gives the same bytes.

The compiler's cache keeps its entries in this form, and ``stepwell compile`` hands one out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stepwell_server.files import archive_rules
from stepwell_server.files.flush import flush_folders, flush_open
from stepwell_server.program import (
    FLATBUFFER,
    ONNX_MODEL,
    SAVED_MODEL,
    Architecture,
    Array,
    Layer,
    Program,
    Proof,
    Provenance,
    StateSpec,
    TensorSpec,
    Trial,
    dtype_of,
)

FORMAT = "stepwell-program"
#: Versions of the format: of Keras models, and of step functions and of models with rings, which older readers refuse. A
#: reader refuses others.
VERSION, STEP_VERSION, RING_VERSION = 2, 3, 4
MANIFEST = "stepwell.json"
SUFFIX = ".stepwell"
MAX_BYTES = 2 * 1024**3
"""The default limit of the size of all members of a file."""
_MAX_MANIFEST_BYTES = 16 * 1024**2
_MAX_SIZES = 1024
"""The maximum batch size: as many rows are run when the program is tried."""
_LAST_TIME = 253_402_300_799
"""The end of the year 9999, the last date that can be formatted."""
_INITIAL, _TRIAL = "initial/", "trial/"
#: The only file of a program, by its executor.
_ONE_FILE = {"litert": FLATBUFFER, "onnxruntime": ONNX_MODEL}
_UNREADABLE = (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error)


class ProgramFileError(ValueError):
    """The file cannot be used. The message is a clause without the file's name."""


class _Part(NamedTuple):
    """An array in the archive."""

    name: str
    value: Array


def save(program: Program, path: Path, *, is_kept: bool = True) -> None:
    """Write ``program`` to ``path`` atomically.

    Args:
        program: the program.
        path: the file, which is replaced if it exists.
        is_kept: sync the file and its name to disk. Not needed for a file that is only used briefly.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with unfinished.open("xb") as file:
            _write(program, file)
            file.flush()
            if is_kept:
                flush_open(file.fileno())
        os.replace(unfinished, path)
        if is_kept:
            flush_folders(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: Path, max_bytes: int = MAX_BYTES, *, is_own: bool = False) -> Program:
    """Read the program in ``path``, and check everything against its manifest.

    Args:
        path: the file.
        max_bytes: the maximum size of its contents.
        is_own: it was written by this machine's compiler. Only then may it be for TensorFlow, whose graphs can read and
            write files.

    Raises:
        ProgramFileError: it is not such a file, or corrupt, too large, of another version, or for TensorFlow.
        OSError: it cannot be read.
    """
    with _opened(path) as archive:
        manifest = _manifest(archive)
        members = _members(archive, manifest, max_bytes)
        try:
            program = _program(manifest, members, max_bytes)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, MemoryError) as error:
            raise ProgramFileError(f"corrupt {SUFFIX} file: {MANIFEST}: {_clause(error)}") from error
    if program.executor == "tensorflow" and not is_own:
        raise ProgramFileError(
            f"contains a TensorFlow graph, but a {SUFFIX} file must contain a LiteRT model: serve the .keras file instead"
        )
    return program


def is_program(path: Path) -> bool:
    """Whether ``path`` is, or is meant to be, a program: by its name, or by its content."""
    if path.suffix == SUFFIX:
        return True
    try:
        with archive_rules.open_archive(path) as archive:
            return MANIFEST in archive.namelist()
    except (OSError, *_UNREADABLE):
        return False


# ------------------------------------------------------------------------------------------------------------- writing


def _write(program: Program, file: Any) -> None:
    parts = [_Part(name, value) for name, value in _arrays(program)]
    contents = dict(program.files) | {part.name: _to_bytes(part.value) for part in parts}
    manifest = _document(program) | {
        "members": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in sorted(contents.items())
        }
    }
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry(MANIFEST), json.dumps(manifest, indent=1, sort_keys=True).encode())
        for name, content in sorted(contents.items()):
            archive.writestr(_entry(name), content)


def _entry(name: str) -> zipfile.ZipInfo:
    """Return a member without information about when and where it was made."""
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    return entry


def _document(program: Program) -> dict[str, Any]:
    trial, provenance = program.trial, program.provenance
    return {
        "format": FORMAT,
        "version": _version(program),
        "fingerprint": program.fingerprint,
        "inputs": [dataclasses.asdict(spec) for spec in program.inputs],
        "outputs": [dataclasses.asdict(spec) for spec in program.outputs],
        "state": [_state_document(spec) for spec in program.state],
        "executor": program.executor,
        "executor_reason": program.executor_reason,
        "batch_sizes": list(program.batch_sizes),
        "multiply_adds": program.multiply_adds,
        "proof": _proof_document(program.proof),
        "trial": None
        if trial is None
        else {
            "rows": len(trial.inputs[0]),
            "answered_rows": len(trial.outputs[0]) if trial.outputs else 0,
            "tolerance": trial.tolerance,
            "sizes": list(trial.sizes),
        },
        "provenance": None if provenance is None else dataclasses.asdict(provenance),
        "architecture": None if program.architecture is None else dataclasses.asdict(program.architecture),
    }


def _version(program: Program) -> int:
    if program.has_rings:
        return RING_VERSION
    return STEP_VERSION if program.executor == "onnxruntime" else VERSION


def _state_document(spec: StateSpec) -> dict[str, Any]:
    document = dataclasses.asdict(spec)
    if not spec.gap:  # as files of older versions have it
        del document["gap"]
    return document


def _proof_document(proof: Proof) -> dict[str, Any]:
    document = dataclasses.asdict(proof)
    if not proof.rows:  # as files of version 2 have it
        del document["rows"]
    return document


def _arrays(program: Program) -> Iterator[tuple[str, Array]]:
    for i, value in enumerate(program.initial):
        if np.any(value):  # missing arrays are zero
            yield f"{_INITIAL}state_{i}", value
    if program.trial is not None:
        yield from ((f"{_TRIAL}in_{i}", value) for i, value in enumerate(program.trial.inputs))
        yield from ((f"{_TRIAL}out_{i}", value) for i, value in enumerate(program.trial.outputs))


def _to_bytes(value: Array) -> bytes:
    return np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False).tobytes()


# ------------------------------------------------------------------------------------------------------------- reading


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    if not path.is_file():
        raise ProgramFileError("is a folder" if path.is_dir() else "there is no such file")
    try:
        archive = archive_rules.open_archive(path)
    except archive_rules.ArchiveError as error:
        raise ProgramFileError(f"corrupt {SUFFIX} file: {error}") from error
    except _UNREADABLE as error:
        raise ProgramFileError(
            f"not a {SUFFIX} file, or a truncated one; make it with: stepwell compile MODEL.keras -o {path.name}"
        ) from error
    with archive:
        try:
            yield archive
        except ProgramFileError:
            raise
        except (*_UNREADABLE, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
                # EINVAL: the archive's directory points before the start of the file.
            raise ProgramFileError(f"corrupt {SUFFIX} file: {_clause(error)}") from error


def _manifest(archive: zipfile.ZipFile) -> dict[str, Any]:
    archive_rules.check_members(archive)
    names = archive.namelist()
    if MANIFEST not in names:
        if "config.json" in names:
            raise ProgramFileError(
                "contains a Keras model that is not compiled: name it NAME.keras and run: stepwell compile NAME.keras -o "
                f"NAME{SUFFIX}"
            )
        raise ProgramFileError(f"not a {SUFFIX} file: it has no {MANIFEST}")
    entry = archive.getinfo(MANIFEST)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > _MAX_MANIFEST_BYTES:
        raise ProgramFileError(
            f"corrupt {SUFFIX} file: {MANIFEST} must be stored without compression, in at most {_MAX_MANIFEST_BYTES} bytes"
        )
    try:
        manifest = json.loads(archive.read(entry))
    except (ValueError, RecursionError) as error:
        raise ProgramFileError(f"corrupt {SUFFIX} file: {MANIFEST} is not JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ProgramFileError(f"not a {SUFFIX} file: {MANIFEST} does not say that its format is {FORMAT!r}")
    version = manifest.get("version")
    if version not in {VERSION, STEP_VERSION, RING_VERSION}:
        newer = isinstance(version, int) and version > RING_VERSION
        advice = (
            "use a newer Stepwell, or compile the model with this one" if newer else "compile the model again"
        )
        raise ProgramFileError(
            f"is of version {version!r:.40} of its format, and this Stepwell reads {VERSION} to {RING_VERSION}: "
            f"{advice}"
        )
    return manifest


def _members(archive: zipfile.ZipFile, manifest: Mapping[str, Any], max_bytes: int) -> dict[str, bytes]:
    """Read all members except the manifest, and check their names, digests and total size."""
    entries = archive.infolist()
    size = sum(entry.file_size for entry in entries)
    if size > max_bytes:
        raise ProgramFileError(
            f"its content must be at most {max_bytes} bytes (--max-model-bytes); it is {size} bytes"
        )
    listed = manifest.get("members")
    listed = listed if isinstance(listed, dict) else {}
    names = [entry.filename for entry in entries]
    are_listed = sorted(names) == sorted([MANIFEST, *listed])
    if not are_listed or not all(map(_is_known, names)):
        raise ProgramFileError(f"corrupt {SUFFIX} file: its members are not those that {MANIFEST} names")
    found: dict[str, bytes] = {}
    for entry in entries:
        name = entry.filename
        if name == MANIFEST:
            continue
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ProgramFileError(f"corrupt {SUFFIX} file: {name} must be stored without compression")
        content = archive.read(entry)
        expected = listed[name]
        if not isinstance(expected, dict) or hashlib.sha256(content).hexdigest() != expected.get("sha256"):
            raise ProgramFileError(f"corrupt {SUFFIX} file: {name} does not match its digest")
        found[name] = content
    return found


def _is_known(name: str) -> bool:
    """Whether the name of a member is valid in a program and does not lead out of the folder."""
    known = name in {MANIFEST, FLATBUFFER, ONNX_MODEL} or name.startswith((SAVED_MODEL, _INITIAL, _TRIAL))
    return known and not {"", ".", ".."} & set(name.split("/"))


def _program(manifest: Mapping[str, Any], members: dict[str, bytes], max_bytes: int) -> Program:
    inputs = tuple(_tensor_spec(item) for item in manifest["inputs"])
    outputs = tuple(_tensor_spec(item) for item in manifest["outputs"])
    state = tuple(
        StateSpec(
            _text(item["name"]),
            _shape(item["shape"]),
            _dtype_name(item["dtype"]),
            _window(item),
            _count(item.get("gap", 0)),
        )
        for item in manifest["state"]
    )
    if any(spec.gap > spec.window for spec in state):
        raise ValueError("a ring must be a window of at least as many time steps as its gap")
    specs: tuple[TensorSpec | StateSpec, ...] = (*inputs, *outputs, *state)
    for kind in (inputs, outputs, state):
        _require_different([spec.name for spec in kind])
    if sum(spec.row_bytes for spec in specs) > max_bytes:
        raise ValueError("its tensors are too large")
    executor = manifest["executor"]
    files = {
        name: content
        for name, content in members.items()
        if name in _ONE_FILE.values() or name.startswith(SAVED_MODEL)
    }
    is_whole = files and not set(files) & set(_ONE_FILE.values())
    if executor in _ONE_FILE:
        is_whole = set(files) == {_ONE_FILE[executor]}
    if executor not in {*_ONE_FILE, "tensorflow"} or not is_whole:
        raise ValueError(f"executor {executor!r} does not fit the files")
    trial = manifest["trial"]
    return Program(
        fingerprint=_text(manifest["fingerprint"]),
        inputs=inputs,
        outputs=outputs,
        state=state,
        initial=tuple(_array(members, f"{_INITIAL}state_{i}", spec, None) for i, spec in enumerate(state)),
        executor=executor,
        executor_reason=_text(manifest["executor_reason"]),
        batch_sizes=_sizes(manifest["batch_sizes"]),
        multiply_adds=None if manifest.get("multiply_adds") is None else _count(manifest["multiply_adds"]),
        files=files,
        proof=_proof(manifest["proof"]),
        trial=None if trial is None else _trial(trial, members, inputs, outputs),
        provenance=None if manifest["provenance"] is None else _provenance(manifest["provenance"]),
        architecture=None if manifest["architecture"] is None else _architecture(manifest["architecture"]),
    )


def _tensor_spec(item: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(
        name=_text(item["name"]),
        shape=_shape(item["shape"]),
        dtype=_dtype_name(item["dtype"]),
        temporal=bool(item["temporal"]),
    )


def _window(item: Mapping[str, Any]) -> int:
    """Return `StateSpec.window`, which files of older compilers lack."""
    window = _count(item.get("window", 0))
    if window and item["shape"][:1] != [window]:
        raise ValueError(f"a window of {window} time steps does not fit the shape {item['shape']!r:.40}")
    return window


def _proof(item: Mapping[str, Any]) -> Proof:
    rows = item.get("rows", "")
    if rows not in {"", "proven", "alone", "trusted"}:
        raise ValueError(f"there is no proof of rows {rows!r:.40}")
    return Proof(_count(item["steps"]), _text(item["unproven"]), _share(item["compared"]), rows)


def _trial(
    item: Mapping[str, Any],
    members: Mapping[str, bytes],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> Trial:
    rows, answered = _count(item["rows"]), _count(item["answered_rows"])
    if not rows:
        raise ValueError("a trial needs rows")
    return Trial(
        inputs=tuple(_array(members, f"{_TRIAL}in_{i}", spec, rows) for i, spec in enumerate(inputs)),
        outputs=tuple(_array(members, f"{_TRIAL}out_{i}", spec, answered) for i, spec in enumerate(outputs)),
        tolerance=float(item["tolerance"]),
        sizes=_sizes(item["sizes"]),
    )


def _provenance(item: Mapping[str, Any]) -> Provenance:
    return Provenance(
        source=_text(item["source"]),
        source_sha256=_text(item["source_sha256"]),
        compiled_time=_count(item["compiled_time"], _LAST_TIME),
        versions={_text(name): _text(version) for name, version in item["versions"].items()},
        processor=_text(item["processor"]),
        parameters=_count(item["parameters"]),
        layers=tuple(
            Layer(
                _text(layer["name"]),
                _text(layer["kind"]),
                _text(layer["output"]),
                _count(layer["parameters"]),
            )
            for layer in item["layers"]
        ),
    )


def _architecture(item: Mapping[str, Any]) -> Architecture:
    return Architecture(
        structure=_text(item["structure"]),
        config=_text(item["config"]),
        names=_texts(item["names"]),
        ambiguous=tuple(_texts(group) for group in item["ambiguous"]),
    )


def _array(members: Mapping[str, bytes], name: str, spec: TensorSpec | StateSpec, rows: int | None) -> Array:
    """One array: of ``rows`` rows, or one row of its own where that is None; zeros if it is not there."""
    shape = spec.shape if rows is None else (rows, *spec.shape)
    if rows is None and name not in members:
        return np.zeros(shape, dtype_of(spec.dtype))
    array: Array = np.frombuffer(members[name], dtype_of(spec.dtype).newbyteorder("<")).reshape(shape)
    return array.astype(dtype_of(spec.dtype))


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(_count(size) for size in value)


def _sizes(value: Any) -> tuple[int, ...]:
    sizes = _shape(value)
    if len(sizes) > _MAX_SIZES or not all(1 <= size <= _MAX_SIZES for size in sizes):
        raise ValueError(
            f"batch sizes must be at most {_MAX_SIZES} from 1 to {_MAX_SIZES}; got {value!r:.40}"
        )
    return sizes


def _count(value: Any, largest: int = 2**63 - 1) -> int:
    if type(value) is not int or not 0 <= value <= largest:
        raise ValueError(f"a whole number from 0 to {largest} was expected; got {value!r:.40}")
    return value


def _require_different(names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"its tensors must have different names; got {', '.join(names)!r:.80}")


def _share(value: Any) -> float:
    share = float(value)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"a number from 0 to 1 was expected; got {value!r:.40}")
    return share


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text was expected; got {value!r:.40}")
    value.encode()  # JSON can say half a character, which no message takes
    return value


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple(_text(value) for value in values)


def _dtype_name(value: Any) -> str:
    name = _text(value)
    if dtype_of(name).kind not in "biufV" or dtype_of(name).name != name:
        raise ValueError(f"there is no type {name!r}")
    return name


def _clause(error: BaseException) -> str:
    return (
        f"it does not say {error}" if isinstance(error, LookupError) else str(error) or type(error).__name__
    )
