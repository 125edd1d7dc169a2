"""A compiled model's file in the protocol's words, for `stepwell models show`. Needs none of the server's packages."""

from __future__ import annotations

from pathlib import Path

from stepwell.v1 import models_pb2
from stepwell_server import program_file
from stepwell_server.engine.api import ModelInfo
from stepwell_server.rpc import convert


def described(path: str) -> models_pb2.Model:
    """Read and check the file ``path``, whose name is the model's.

    Raises:
        ValueError: it is none, or damaged.
        OSError: it cannot be read.
    """
    return convert.from_model(ModelInfo(path, program_file.load(Path(path)), 0), counted=False)
