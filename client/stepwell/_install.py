"""The commands that install Stepwell and its extras, for messages. Each of them is run by a test.

Stepwell is on no package registry yet: they work in a clone, so a message says that beside them.
"""

from __future__ import annotations

IN_A_CLONE = "in a clone of Stepwell"
LIGHT = "pip install ."
"""The client alone."""
SERVER = "pip install '.[server]' ./server/front"
"""The server with what compiles Keras models, and the native front."""
SERVE = "pip install '.[serve]' ./server/front"
"""The server for compiled models (.stepwell), and the native front."""
NATIVE_FRONT = "pip install ./server/front"
VALKEY = "pip install '.[valkey]'"
OTEL = "pip install '.[otel]'"


def advice(command: str) -> str:
    """A command of this module and where to run it, for the end of a sentence."""
    return f"{command} ({IN_A_CLONE})"
