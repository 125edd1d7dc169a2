"""Checks and loads a ``.keras`` file, and computes its fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from stepwell_server.architecture.canonical import canonical
from stepwell_server.architecture.description import describe
from stepwell_server.compile.errors import ModelError, gist
from stepwell_server.compile.graph.tensorflow_setup import keras
from stepwell_server.compile.keras_file import configuration, origin, weights
from stepwell_server.compile.keras_file.sizes import UNREADABLE
from stepwell_server.program import Architecture, Program


def load_model(path: Path) -> Any:
    """Load the Keras model in ``path``, with Keras's safe mode on.

    Raises:
        ModelError: the file does not exist, is not a ``.keras`` file or is corrupt, or Keras refuses it or does not
            restore it completely.
    """
    check_archive(path)
    try:
        with weights.reads_recorded() as read:
            model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras and user code raise whatever they like here.
        raise ModelError(f"{path}: {_load_problem(error, _keras_version(path))}") from error
    if not isinstance(model, keras.Model):
        raise ModelError(f"{path}: must hold a keras.Model; it holds a {type(model).__name__}")
    weights.check_restored(path, read)
    return model


def check_archive(path: Path) -> None:
    """Check that ``path`` is a complete ``.keras`` archive.

    Raises:
        ModelError: it is not.
    """
    if not path.is_file():
        raise ModelError(f"{path}: {origin.no_file_problem(path)}")
    # Weights are not compressed in an archive. If they happen to begin at 512 bytes or a power of two times that, HDF5
    # finds its signature there.
    if not zipfile.is_zipfile(path) and h5py.is_hdf5(path):
        raise ModelError(f"{path}: {_hdf5_problem(path)}")
    if problem := origin.archive_problem(path):
        raise ModelError(f"{path}: {problem}")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except UNREADABLE as error:
        raise ModelError(f"{path}: corrupt .keras file: {error}") from error
    if broken:
        raise ModelError(f"{path}: corrupt .keras file: {broken} does not match its checksum")
    _require_config(path)
    # With another suffix Keras may use another format: a file that is also HDF5 may contain code that it runs.
    if path.suffix != ".keras":
        raise ModelError(
            f"{path}: a .keras file must have a name that ends in .keras: rename it to {path.stem}.keras"
        )
    version = _keras_version(path)
    if origin.is_keras2(version):
        raise ModelError(f"{path}: {origin.keras2_problem(version, path.name)}")


def _require_config(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        text = archive.read("config.json")
    try:
        config = configuration.parsed("config.json", text)
        if not isinstance(config, dict) or not {"class_name", "config"} <= config.keys():
            raise ModelError("corrupt .keras file: config.json does not say class_name and config")
        configuration.check(text, _is_registered)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _is_registered(name: str) -> bool:
    return keras.saving.get_registered_object(name) is not None


def _keras_version(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        text = archive.read("metadata.json")
    try:
        return str(configuration.parsed("metadata.json", text)["keras_version"])
    except (LookupError, TypeError) as error:
        raise ModelError(f"{path}: corrupt .keras file: metadata.json does not say keras_version") from error
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _hdf5_problem(path: Path) -> str:
    try:
        with h5py.File(path, "r") as file:
            version, is_model = file.attrs.get("keras_version"), "model_config" in file.attrs
    except OSError as error:
        return f"a corrupt HDF5 file: {gist(error)}"
    return origin.hdf5_problem(path.name, None if version is None else str(version), is_model=is_model)


def fingerprint(path: Path, initial: Mapping[str, Any] | None = None) -> str:
    """Hash architecture and weights: equal for every save of one model, different for other weights.

    ``initial`` are the initial values that the user declares, which are part of it.

    Names that Keras generated are excluded, so that a rebuilt model with the same weights has the same hash. Weights
    are identified by their position in the archive, because Keras's names of a subclassed model's variables depend on
    what else the process has built. Seeds and the optimizer are excluded, because they do not affect the results.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(canonical(configuration_of(path)).config, sort_keys=True).encode())
    for name, value in weights.saved_weights(path):
        digest.update(f"\n{name} {value.shape} {value.dtype}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    if initial:
        digest.update(f"\n{json.dumps(initial, sort_keys=True)}\n".encode())
    return digest.hexdigest()


def architecture(path: Path, program: Program) -> Architecture:
    """Describe the architecture of a program that was compiled from a ``.keras`` file and uses its names."""
    shapes = [(name, value.shape, value.dtype.name) for name, value in weights.saved_weights(path)]
    return describe(configuration_of(path), shapes, program)


def configuration_of(path: Path) -> Any:
    """Return the content of the file's ``config.json``."""
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("config.json"))


def _load_problem(error: Exception, version: str) -> str:
    text = str(error)
    marshalled = "identifier: {'value': ["  # A lambda as an argument, in Keras's saved form.
    if "safe_mode" in text or "unsafe" in text.lower() or "Lambda" in text or marshalled in text:
        return configuration.CODE
    unknown = (
        re.search(r"Could not locate (class|function) '([^']+)'", text)
        or re.search(r"Unknown (\w+(?: \w+)*): '?([\w>.]+)", text)
        or re.search(r"Could not interpret (\w+)(?: function)? identifier: '?([\w>.<]+)", text)
        or re.search(r"Could not deserialize '[\w.]*?()(\w+)' because it is not a KerasSaveable", text)
    )
    if unknown:
        return (
            f"unknown {unknown[1] or 'class'} '{unknown[2]}'; register it with "
            "@keras.saving.register_keras_serializable() and name its module with --import MODULE"
        )
    misfit = re.search(r"^Layer '[^']+' (?:expected \d+ variables|was never built).*$", text, re.MULTILINE)
    if misfit:
        return (
            f"the weights in the file do not fit: {misfit[0].split(' during loading')[0].rstrip('.')}; the class must "
            "be the one that the model was saved with (--import MODULE), and its build() must build all its layers"
        )
    shapes = re.search(
        r"object <(\w+) name=([\w.]+).*?variable\.shape=(\([\d, ]*\)), Received: value\.shape=(\([\d, ]*\))",
        text,
        re.DOTALL,
    )
    if shapes:
        return (
            f"the weights in the file do not fit: layer {shapes[2]!r} ({shapes[1]}) has one of the shape "
            f"{shapes[3]}, and the "
            f"file one of {shapes[4]}; the class must be the one that the model was saved with (--import MODULE)"
        )
    text = text.rpartition("Exception encountered: ")[2]  # The message follows the location.
    if version != keras.__version__:
        return (
            f"Keras {keras.__version__}, which is installed here, cannot load it ({type(error).__name__}: {gist(text)}); it "
            f"was saved by Keras {version}: install that version, or save the model again with this one"
        )
    return f"Keras cannot load it: {type(error).__name__}: {gist(text)}"
