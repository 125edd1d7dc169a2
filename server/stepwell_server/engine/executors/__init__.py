"""Executors run programs: LiteRT by default, TensorFlow where LiteRT cannot."""

from __future__ import annotations

from stepwell_server.engine.executors.base import Executor
from stepwell_server.program import Program


def load_executor(program: Program) -> Executor:
    """Return a new executor of ``program``, with buffers of its own.

    Each kind of executor is imported on first use: a server whose programs all run on LiteRT never loads
    TensorFlow.

    Raises:
        ValueError: the program's data is corrupt.
    """
    if program.executor == "litert":
        from stepwell_server.engine.executors import litert

        return litert.load(program)
    from stepwell_server.engine.executors import tensorflow

    return tensorflow.load(program)
