"""What runs a program: LiteRT by default, TensorFlow where LiteRT cannot."""

from __future__ import annotations

from stepwell_server.engine.executors.base import Executor
from stepwell_server.program import Program


def load_executor(program: Program) -> Executor:
    """Return a new executor of ``program``, with buffers of its own.

    The module of the executor's kind is imported on first use: a server whose programs all run on LiteRT
    never loads TensorFlow.

    Raises:
        ValueError: what the executor loads is damaged.
    """
    if program.executor == "litert":
        from stepwell_server.engine.executors import litert

        return litert.load(program)
    from stepwell_server.engine.executors import tensorflow

    return tensorflow.load(program)
