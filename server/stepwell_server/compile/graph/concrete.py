"""Traces Python code into a TensorFlow graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.graph.tensorflow_setup import tf


def concrete(run: Callable[..., Any], *signature: Any, **named: Any) -> Any:
    """Trace a function at a signature; `run` is called once or twice.

    AutoGraph converts loops and branches over tensors into graph operations. It rewrites all called code, including
    Keras's, and takes an eighth of the compile time. Code that needs it raises without it, so it is used only then.

    Raises:
        Exception: whatever `run` raises.
    """
    try:
        return tf.function(run, autograph=False).get_concrete_function(*signature, **named)
    except ModelError:
        raise
    except Exception:  # Keras and user code may raise anything.
        return tf.function(run).get_concrete_function(*signature, **named)
