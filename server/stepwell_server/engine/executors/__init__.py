"""Executors run programs: LiteRT by default, TensorFlow where LiteRT cannot, ONNX Runtime for step functions."""

from __future__ import annotations

from stepwell_server.engine.executors.base import Executor
from stepwell_server.engine.executors.windows import WindowExecutor
from stepwell_server.program import Program


def load_executor(program: Program, *, is_exact: bool = False) -> Executor:
    """Return a new executor of ``program``, with buffers of its own, which shows whole states.

    Each kind of executor is imported on first use: a server whose programs all run on LiteRT never loads
    TensorFlow or ONNX Runtime.

    Args:
        program: what it runs.
        is_exact: each batch runs at its own size, never with rows beyond it, for a trial of the sizes.

    Raises:
        ValueError: the program's data is corrupt.
    """
    executor = _loaded(program, is_exact)
    return WindowExecutor(executor, program) if program.has_rings else executor


def _loaded(program: Program, is_exact: bool) -> Executor:
    if program.executor == "litert":
        from stepwell_server.engine.executors import litert

        return litert.load(program, is_exact=is_exact)
    if program.executor == "onnxruntime":
        from stepwell_server.engine.executors import onnx_runtime

        return onnx_runtime.load(program)
    from stepwell_server.engine.executors import tensorflow

    return tensorflow.load(program)
