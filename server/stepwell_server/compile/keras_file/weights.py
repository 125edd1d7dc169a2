"""Reads the weights in a ``.keras`` file by position, and checks that Keras restored all of them."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from stepwell_server.compile.errors import ModelError, quoted
from stepwell_server.compile.graph import patch
from stepwell_server.compile.graph.tensorflow_setup import keras

MEMBER = "model.weights.h5"
_NAMED_LAYERS = 3


def saved_weights(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the weights in the file as ``(place, array)``, in a fixed order.

    An example of a place is ``layers/lstm/cell/vars/0``. The optimizer and seeds are left out, because they do not affect the results.
    """
    with _weights_file(path) as file:
        for place in _places(file):
            yield place, file[place][()]


@contextlib.contextmanager
def reads_recorded() -> Iterator[set[str]]:
    """Record the places of the weights that Keras reads from files.

    Keras restores a layer by reading the place of the layer in the file. A layer that was not built reads nothing, and
    Keras only warns. The model does not show afterwards what was read: a variable shared by two layers is in the file
    twice, but in the model once.
    """
    saving = keras.src.saving.saving_lib
    store: Any = saving.H5IOStore
    read: set[str] = set()

    class Recorder(store):
        """Keras's reader of weights in a file, which records what was read."""

        def get(self, path: str) -> Any:
            self._place = f"{path}/vars" if path else "vars"
            return super().get(path)

        def __getitem__(self, key: str) -> Any:
            value = super().__getitem__(key)
            read.add(f"{self._place}/{key}")
            return value

    with patch.attribute(saving, "H5IOStore", Recorder):
        yield read


def check_restored(path: Path, read: set[str]) -> None:
    """Check that Keras has read each weight in the file.

    Raises:
        ModelError: some were not read, so that the model would run with freshly initialized weights.
    """
    with _weights_file(path) as file:
        places = _places(file)
        lost = [place for place in places if place not in read]
        if not lost:
            return
        layers = list(dict.fromkeys(_layer(file, place) for place in lost))
    more = f" and {len(layers) - _NAMED_LAYERS} more" if len(layers) > _NAMED_LAYERS else ""
    raise ModelError(
        f"{path}: {len(lost)} of {len(places)} weights of the model were not restored, those of "
        f"{', '.join(layers[:_NAMED_LAYERS])}{more}: Keras could not build their layers while loading; give the "
        "class that creates these layers a build() that builds each of them for its input shapes, or "
        "build_from_config(), and save the model again"
    )


@contextlib.contextmanager
def _weights_file(path: Path) -> Iterator[h5py.File]:
    with zipfile.ZipFile(path) as archive:
        content = io.BytesIO(archive.read(MEMBER))
    with h5py.File(content, "r") as file:
        yield file


def _places(file: h5py.File) -> list[str]:
    found: list[str] = []
    file.visititems(lambda place, item: found.append(place) if isinstance(item, h5py.Dataset) else None)
    return [place for place in sorted(found) if _counts(place.split("/"))]


def _counts(parts: list[str]) -> bool:
    return parts[0] != "optimizer" and "seed_generator" not in parts


def _layer(file: h5py.File, place: str) -> str:
    """Return the layer of a weight: its saved name and its place."""
    group = place.rpartition("/")[0]
    where = group.removesuffix("vars").rstrip("/") or "the model itself"
    name = file[group].attrs.get("name")
    return f"layer {quoted(name)} ({where})" if isinstance(name, str) else where
