"""Recognizes files and folders with a model in another format than Keras 3's, and explains how to convert them.

Each conversion was tested with LSTM, GRU, stacked cells, nested and subclassed models saved by tf_keras 2.21: Keras 3
loads none of these files as models, but all of their weights. Imports no framework.
"""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path

_SERVED = "Stepwell serves .keras files of Keras 3"
_ONNX = ".onnx"
_MEMBERS = ("config.json", "metadata.json", "model.weights.h5")
_COMPARE = "compare what both models compute: some functions are not the same, such as hard_sigmoid"


def keras2_problem(version: str, weights: str, first: str = "") -> str:
    """Describe a file that Keras 2 has saved.

    Args:
        version: version of Keras.
        weights: the file name with which Keras 3 can read its weights.
        first: an instruction to do before that, ending with a comma and a space.
    """
    return (
        f"saved by Keras {version}: {_SERVED}, which cannot load models of Keras 2, only their weights; "
        f"{first}build the model with Keras 3 by the same code, then model.load_weights({weights!r}) and "
        f"model.save('name.keras'), and {_COMPARE}"
    )


def hdf5_problem(name: str, version: str | None, *, is_model: bool) -> str:
    """Describe an HDF5 file.

    Args:
        name: the file's name.
        version: version of Keras in the file, if any.
        is_model: it contains a model, not only weights.
    """
    rename = ""
    if not name.endswith((".h5", ".hdf5")):  # Keras 2 wrote HDF5 with any suffix; Keras 3 requires this one.
        name = f"{name.removesuffix('.keras')}.h5"
        rename = f"rename it to {name}, "
    if is_model and version is not None and is_keras2(version):
        return f"a legacy HDF5 file, {keras2_problem(version, name, rename)}"
    if is_model:
        return (
            f"a legacy HDF5 file: {_SERVED}; {rename}save it as one: "
            f"keras.models.load_model({name!r}).save('name.keras')"
        )
    return (
        f"an HDF5 file without a model, weights at most: {_SERVED}; {rename}build the model by the code that it was "
        f"saved by, then model.load_weights({name!r}) and model.save('name.keras')"
    )


def no_file_problem(path: Path) -> str:
    """Describe a path that is not a file."""
    return folder_problem(path) if path.is_dir() else "there is no such file"


def folder_problem(folder: Path) -> str:
    """Describe a folder."""
    if (folder / "keras_metadata.pb").is_file():
        return (
            f"is a SavedModel folder of Keras 2: {_SERVED}; where tf_keras is installed, "
            f"tf_keras.models.load_model({folder.name!r}).save_weights('name.weights.h5'), then build the model with "
            f"Keras 3 by the same code, model.load_weights('name.weights.h5') and model.save('name.keras'), and "
            f"{_COMPARE}"
        )
    if (folder / "saved_model.pb").is_file():
        return (
            f"is a SavedModel folder, which holds a graph and no Keras model: {_SERVED}; save the model from the "
            "code that made it, with model.save('name.keras')"
        )
    if folder.suffix == _ONNX:
        return "is a folder; give the .onnx file in it"
    return "is a folder; give the file in it that model.save('name.keras') wrote"


def archive_problem(file: Path) -> str:
    """Describe a file that is not a Keras archive, by its members; empty: it is one."""
    if not zipfile.is_zipfile(file):
        return other_problem(file)
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError, struct.error) as error:
        return f"corrupt .keras file: {error}"
    missing = [name for name in _MEMBERS if name not in names]
    return f"not a .keras file: it has no {', '.join(missing)}" if missing else ""


def other_problem(file: Path) -> str:
    """Describe a file that is neither a zip archive nor HDF5."""
    with file.open("rb") as stream:
        start = stream.read(8)
    save = "save the model with model.save('name.keras')"
    if not start and file.suffix == _ONNX:
        return "is empty; export the model again"
    if not start:
        return f"is empty; {save}"
    if start == b"\x89HDF\r\n\x1a\n":
        return f"an HDF5 file: {_SERVED}; {save}"
    if re.match(rb"\x80[\x02-\x05]", start):
        return (
            "is a Python pickle, which is never loaded, because loading one runs its code; load it where it was created, and "
            f"{save}"
        )
    if start[4:] == b"TFL3":
        return f"is a LiteRT file (.tflite), which holds no Keras model; {save} before it is converted"
    return f"not a .keras file, or a truncated one; {save}"


def is_keras2(version: str) -> bool:
    """Whether a version is one of Keras 2 or before it."""
    return re.match(r"[012]\.", version) is not None
