"""Runs programs on TensorFlow that LiteRT cannot convert. Importing this module loads TensorFlow."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

# TensorFlow reads this variable while it is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from stepwell_server.engine.executors.base import ExecutionError, Executor
from stepwell_server.engine.executors.light_imports import light_imports
from stepwell_server.engine.executors.padded import PaddedExecutor
from stepwell_server.engine.types import Array
from stepwell_server.logs import Log
from stepwell_server.program import SAVED_MODEL, Program

with light_imports():
    import tensorflow as tf

_log = Log("engine.executors")


#: Rewrites of graphs that change results. The first divides by a constant as a product with its rounded reciprocal:
#: ``floor(51037 / 1)`` is 51036. The second adds three values in the order in which their buffers come free.
_REWRITES = ("constant_folding", "arithmetic_optimization")


def configure() -> None:
    """Make TensorFlow compute on one CPU thread, and each operation as it is.

    The number of threads decides how Eigen splits a sum, and so the result's last bits. A program's batch sizes
    were checked with one thread, on the CPU. Use more executors for more speed, not more threads.
    """
    tf.config.optimizer.set_experimental_options(dict.fromkeys(_REWRITES, False))
    threading = tf.config.threading
    if threading.get_intra_op_parallelism_threads() == 1:
        return
    try:
        threading.set_intra_op_parallelism_threads(1)
        threading.set_inter_op_parallelism_threads(1)
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError as error:
        _log.warning("TensorFlow was running before it could be set to one thread", error=error)


configure()


def load(program: Program) -> Executor:
    """Return an executor of ``program``.

    Raises:
        ValueError: the SavedModel is corrupt.
    """
    # TensorFlow can only read complete folders.
    with tempfile.TemporaryDirectory(prefix="stepwell-") as folder:
        for name, content in program.files.items():
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        try:
            loaded = tf.saved_model.load(str(Path(folder, SAVED_MODEL)))
        except (OSError, tf.errors.OpError) as error:
            raise ValueError(f"the SavedModel cannot be read: {error}") from error
    accepted = set(loaded.signatures["step"].structured_input_signature[1])

    def run(inputs: Sequence[Array], states: Sequence[Array]) -> tuple[Sequence[Array], Sequence[Array]]:
        named = {f"in_{i}": tf.constant(value) for i, value in enumerate(inputs)}
        named |= {f"state_{i}": tf.constant(value) for i, value in enumerate(states)}
        known = {key: value for key, value in named.items() if key in accepted}
        try:
            # Looked up each time: a loaded function dies with its object.
            results = loaded.signatures["step"](**known)
        except tf.errors.OpError as error:
            raise ExecutionError(error.message) from error
        outputs = [results[f"out_{i}"].numpy() for i in range(len(program.outputs))]
        return outputs, [results[f"next_{i}"].numpy() for i in range(len(program.state))]

    return PaddedExecutor(program, run)
