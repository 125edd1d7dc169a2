"""Models as callers name them: paths, Keras objects, or several by name. This module does not import Keras."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

from stepwell.errors import InvalidInputError

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_VERSION = re.compile(r"[1-9][0-9]{0,18}")
_DEFAULT_NAME = "model"
_SAVED_AT = "date_saved"
_NO_DATE = (1980, 1, 1, 0, 0, 0)


class KerasModel(Protocol):
    """A `keras.Model`; this package does not import Keras."""

    def save(self, filepath: Any, /) -> object:
        """Saves it to a file."""


ModelSource: TypeAlias = str | os.PathLike[str] | KerasModel
"""A model: the path of its file, or a Keras object."""


def named(models: object, name: str | None) -> dict[str, Any]:
    """Returns the models by name, each of which is a path or an object that can be saved.

    Raises:
        InvalidInputError: An argument breaks a rule.
    """
    if isinstance(models, Mapping):
        if name is not None:
            raise InvalidInputError(f"name must be None if models is a mapping; got {name!r}")
        if not models:
            raise InvalidInputError("models must have at least one model; got an empty mapping")
        named = dict(models)
    else:
        named = {_default_name(models) if name is None else name: models}
    for one, source in named.items():
        if not _is_served_as(one):
            what = "a name in models" if isinstance(models, Mapping) else "name"
            raise InvalidInputError(
                f"{what} must be 1 to 128 letters, digits, _, - or ., or NAME@VERSION; got {one!r:.150}"
            )
        if not _is_source(source):
            raise InvalidInputError(
                f"models must be the path of a model's file, a keras.Model, or a mapping of names to these; got {source!r:.150}"
            )
    return named


def is_name(name: object) -> bool:
    """Whether this is a valid name of a model."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _is_served_as(name: object) -> bool:
    """Whether it is NAME or NAME@VERSION."""
    if not isinstance(name, str):
        return False
    plain, mark, version = name.partition("@")
    return is_name(plain) and (not mark or _VERSION.fullmatch(version) is not None)


def _is_source(source: object) -> bool:
    return isinstance(source, str | os.PathLike) or _is_keras(source)


def _is_keras(source: object) -> bool:
    homes = {kind.__module__.partition(".")[0] for kind in type(source).__mro__}
    return not homes.isdisjoint({"keras", "tf_keras"}) and callable(getattr(source, "save", None))


def _default_name(source: object) -> str:
    if isinstance(source, str | os.PathLike):
        return Path(source).stem
    given = getattr(source, "name", None)
    # Keras generates names with a counter (`sequential`, `sequential_1`), which change with each run of a cell.
    kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])", "_", type(source).__name__).lower()
    made_up = not isinstance(given, str) or re.fullmatch(rf"{re.escape(kind)}(_\d+)?", given)
    return _DEFAULT_NAME if made_up else str(given)


class ModelFile(NamedTuple):
    """The file of a model."""

    path: str
    """Path of the file."""
    is_given: bool
    """Whether it is the caller's own file. Otherwise it was saved from an object."""

    def digest(self) -> str:
        """Returns the hash of its content; empty for a folder."""
        if os.path.isdir(self.path):
            return ""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def file_of(name: str, source: ModelSource, folder: str) -> ModelFile:
    """Returns the file of a model: the given file, or one in `folder` to which it saves the object.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if isinstance(source, str | os.PathLike):
        path = os.path.expanduser(os.fspath(source))
        if not os.path.exists(path):
            raise FileNotFoundError(errno.ENOENT, f"{os.strerror(errno.ENOENT)}: the model {name!r}", path)
        return ModelFile(path, is_given=True)
    saved, path = os.path.join(folder, f"{name}.saved.keras"), os.path.join(folder, f"{name}.keras")
    source.save(saved)
    _copy_without_dates(saved, path)
    os.unlink(saved)
    return ModelFile(path, is_given=False)


class Placed(NamedTuple):
    """A file to load."""

    path: str
    """Path on this machine if the file is sent, otherwise on the server."""
    is_sent: bool
    is_temporary: bool
    """Whether it is deleted after the load."""


@contextlib.contextmanager
def placed(
    name: str, source: ModelSource, *, upload: bool | None, is_on_this_machine: bool
) -> Iterator[Placed]:
    """Yields the file of a model for the body of a `with`. An object is saved to a file that is deleted afterwards.

    Args:
        name: Name of the model.
        source: Its file, or the object.
        upload: Send the file to the server. False: the server reads the path on its own disk. None: send it if the
            server is on another machine.
        is_on_this_machine: Whether the server is on this machine.

    Raises:
        InvalidInputError: An argument breaks a rule.
        FileNotFoundError: There is no such file.
    """
    if not _is_source(source):
        raise InvalidInputError(
            f"model must be the path of a model's file or a keras.Model; got {source!r:.150}"
        )
    if upload not in (None, True, False):
        raise InvalidInputError(f"upload must be True, False or None; got {upload!r:.150}")
    if upload is False and isinstance(source, str | os.PathLike):
        yield Placed(os.fspath(source), is_sent=False, is_temporary=False)
        return
    with tempfile.TemporaryDirectory(prefix="stepwell-") as folder:
        file = file_of(name, source, folder)
        is_sent = not is_on_this_machine if upload is None else upload
        yield Placed(os.path.abspath(file.path), is_sent, is_temporary=not file.is_given)


def _copy_without_dates(saved: str, path: str) -> None:
    """Copies a saved model without its dates, so that the same model always has the same digest."""
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename == "metadata.json":
                content = json.dumps(json.loads(content) | {_SAVED_AT: ""}).encode()
            new.writestr(zipfile.ZipInfo(entry.filename, _NO_DATE), content)
