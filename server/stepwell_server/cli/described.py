"""Describes a compiled model file as a `stepwell.v1.Model`, for `stepwell models show`. Imports no server packages."""

from __future__ import annotations

from pathlib import Path

from stepwell.v1 import models_pb2
from stepwell_server import program_file
from stepwell_server.engine.api import ModelInfo
from stepwell_server.rpc import convert


def described(path: str) -> models_pb2.Model:
    """Read and check a .stepwell file. The model is named by its path.

    Raises:
        ValueError: it is not a compiled model, or it is corrupt.
        OSError: it cannot be read.
    """
    return convert.from_model(ModelInfo(path, program_file.load(Path(path)), 0), counted=False)
