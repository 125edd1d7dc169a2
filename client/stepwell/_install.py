"""The commands that install Stepwell and its extras, for messages. A test runs each of them.

Stepwell is not on a package registry yet: the commands work in a clone, so messages mention that.
"""

from __future__ import annotations

IN_A_CLONE = "in a clone of Stepwell"
LIGHT = "pip install ."
"""The client alone."""
SERVER = "pip install '.[server]' ./server/front"
"""The server with the compiler of Keras models, and the native front."""
SERVE = "pip install '.[serve]' ./server/front"
"""The server for compiled models (.stepwell), and the native front."""
ONNX = "pip install '.[serve,onnx]' ./server/front"
"""The server with the compiler and the executor of step functions (.onnx), and the native front."""
NATIVE_FRONT = "pip install ./server/front"
VALKEY = "pip install '.[valkey]'"
OTEL = "pip install '.[otel]'"
PLOT = "pip install '.[plot]'"
"""matplotlib, pandas and xarray."""


def advice(command: str) -> str:
    """A command of this module and where to run it, for the end of a sentence."""
    return f"{command} ({IN_A_CLONE})"
