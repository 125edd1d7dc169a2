"""Turns a file into the program to serve, compiling it unless it is compiled already.

Does not import TensorFlow, and does not need it for ``.stepwell`` files.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from stepwell import _install
from stepwell_server import program_file
from stepwell_server.compile.errors import DataError, ModelError
from stepwell_server.compile.host.compiler import WarmCompiler
from stepwell_server.compile.host.job import Progress
from stepwell_server.compile.host.limits import Limits
from stepwell_server.compile.host.source import opened
from stepwell_server.compile.onnx import declaration
from stepwell_server.engine.executors import trial
from stepwell_server.program import Program, ProofOptions

_FRAMEWORKS = ("tensorflow", "keras", "h5py")
_ONNX = ("onnx", "onnxruntime")


def load_program(
    path: Path,
    compiler: WarmCompiler,
    progress: Progress | None = None,
    options: ProofOptions | None = None,
    limits: Limits | None = None,
    data: Path | None = None,
    *,
    keep: bool = True,
) -> Program:
    """Return the program of a ``.keras``, ``.onnx`` or ``.stepwell`` file, prepared for this processor.

    Third-party code reads and runs the file only in the compiler's processes, so this function may be called on a
    thread while this process serves.

    See `WarmCompiler.compile` for arguments and errors; a ``.stepwell`` file has the stages load and check.
    """
    with opened(path):  # raises if it is not a file
        is_program = program_file.is_program(path)
    if not is_program:
        require_frameworks(path)
        return compiler.compile(path, progress, options, limits, data, keep=keep)
    _require_plain(path, options or ProofOptions(), data)
    program, sizes, agreeing = compiler.settle(path, progress, limits)
    try:
        return trial.with_sizes(program, sizes, agreeing)
    except trial.TrialError as error:
        raise ModelError(f"{path}: {error}") from error


def require_frameworks(path: Path) -> None:
    """Check that the packages that compile this ``.keras`` or ``.onnx`` file are installed.

    Raises:
        ModelError: they are not.
    """
    is_onnx = path.suffix == declaration.SUFFIX
    missing = [name for name in (_ONNX if is_onnx else _FRAMEWORKS) if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"{path}: must be compiled, but the required packages are not installed ({', '.join(missing)}): "
            f"{_install.advice(_install.ONNX if is_onnx else _install.SERVER)}; or "
            f"compile it where they are, by: stepwell compile {path.name} -o {path.stem}{program_file.SUFFIX}, and serve "
            "that file"
        )


def _require_plain(path: Path, options: ProofOptions, data: Path | None) -> None:
    """Refuse options that only apply when a model is compiled."""
    if options != ProofOptions():
        raise ModelError(
            f"{path}: is already compiled: --probe-steps and --trust-causality are for stepwell compile, which made it"
        )
    if data is not None:
        raise DataError(
            f"{path} is compiled, and its Keras model is needed to compare with; name the .keras file"
        )
