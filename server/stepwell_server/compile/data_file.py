"""Reads the user's sequences and checks what needs no model. Imports no framework."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.compile.errors import DataError, gist

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
