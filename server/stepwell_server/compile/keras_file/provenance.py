"""The provenance of a program: its file, compiler and time, and the model's layers, as information."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepwell_server.compile.cache import version_of
from stepwell_server.compile.graph.tensorflow_setup import keras
from stepwell_server.program import Layer, Provenance

_PACKAGES = ("stepwell", "tensorflow", "keras", "ai-edge-litert")


def of(path: Path, model: Any) -> Provenance:
    """Return the provenance of a program compiled now from ``model``, which was loaded from ``path``.

    If SOURCE_DATE_EPOCH is set, as for reproducible builds, it is the time.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return Provenance(
        source=path.name,
        source_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        compiled_time=int(epoch if epoch.isdecimal() else time.time()),
        versions={name: version_of(name) for name in _PACKAGES},
        processor=platform.machine(),
        parameters=_parameters(model),
        layers=tuple(_layers(model)),
    )


def _layers(model: Any) -> Iterator[Layer]:
    for layer in model.layers:
        yield Layer(layer.name, type(layer).__name__, _output_of(layer), _parameters(layer))
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _layers(layer)


def _output_of(layer: Any) -> str:
    try:
        output = layer.output
    except (AttributeError, ValueError):  # It has no single output: called more than once, or inside a call.
        return ""
    return ", ".join(str(tuple(tensor.shape)) for tensor in keras.tree.flatten(output))


def _parameters(layer: Any) -> int:
    return sum(math.prod(weight.shape) for weight in layer.weights)
