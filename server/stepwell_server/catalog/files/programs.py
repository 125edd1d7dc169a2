"""From the file that a user names to the program that is served: compiled here, or elsewhere before.

Imports no TensorFlow, and needs none for a ``.stepwell`` file.
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
from stepwell_server.engine.executors import trial
from stepwell_server.program import Program, ProofOptions

_FRAMEWORKS = ("tensorflow", "keras", "h5py")


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
    """Return the program of a ``.keras`` or of a ``.stepwell`` file, as it is to run on this processor.

    Whatever is read of the file by others' code, and whatever it makes run, happens in the compiler's processes: it may be
    called, on a thread, while this process serves.

    What its arguments mean, and what it raises, `WarmCompiler.compile` says; a ``.stepwell`` file has the stages load and check.
    """
    with opened(path):  # Or it is no file, which nothing below expects.
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
    """Check that what compiles a ``.keras`` file is installed.

    Raises:
        ModelError: it is not.
    """
    missing = [name for name in _FRAMEWORKS if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"{path}: must be compiled, but the required packages are not installed ({', '.join(missing)}): "
            f"{_install.advice(_install.SERVER)}; or "
            f"compile it where they are, by: stepwell compile {path.name} -o {path.stem}{program_file.SUFFIX}, and serve "
            "that file"
        )


def _require_plain(path: Path, options: ProofOptions, data: Path | None) -> None:
    """Refuse what can be said of a model only where it is compiled."""
    if options != ProofOptions():
        raise ModelError(
            f"{path}: is already compiled: --probe-steps and --trust-causality are for stepwell compile, which made it"
        )
    if data is not None:
        raise DataError(
            f"{path} is compiled, and its Keras model is needed to compare with; name the .keras file"
        )
