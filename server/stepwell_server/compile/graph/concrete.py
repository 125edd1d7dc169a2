"""Python code made into a TensorFlow graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.graph.tensorflow_setup import tf


def concrete(run: Callable[..., Any], *signature: Any, **named: Any) -> Any:
    """Trace a function at a signature; `run` is called once or twice.

    AutoGraph, which makes loops and decisions over tensors part of the graph, rewrites all code that is called, Keras's
    too, and takes an eighth of the time of compiling. Without it such code raises, so it is used only then.

    Raises:
        Exception: whatever `run` raises.
    """
    try:
        return tf.function(run, autograph=False).get_concrete_function(*signature, **named)
    except ModelError:
        raise
    except Exception:  # Keras and user code raise whatever they like.
        return tf.function(run).get_concrete_function(*signature, **named)
