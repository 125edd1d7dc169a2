"""From the file that a user names to the program that is served: compiled here, or elsewhere before.

Imports no TensorFlow, and needs none for a ``.stepwell`` file.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from stepwell_server import program_file
from stepwell_server.compile.errors import DataError, ModelError
from stepwell_server.compile.launch import compile_program
from stepwell_server.compile.limits import Limits
from stepwell_server.engine.executors import trial
from stepwell_server.program import Program, ProofOptions

INSTALL = "pip install 'stepwell[server]'"
_FRAMEWORKS = ("tensorflow", "keras", "h5py")


def load_program(
    path: Path,
    cache_dir: Path,
    imports: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
    options: ProofOptions | None = None,
    limits: Limits | None = None,
    data: Path | None = None,
) -> Program:
    """Return the program of a ``.keras`` or of a ``.stepwell`` file, as it is to run on this processor.

    Args:
        path: the file. What it is, its name or its content says.
        cache_dir: see `compile_program`; of no use for a ``.stepwell`` file.
        imports: see `compile_program`; of no use for a ``.stepwell`` file.
        progress: called with each stage as it begins: those of `compile_program`, or load and check.
        options: what the user says about the proof of a ``.keras`` file.
        limits: what loading may take; by default those of `Limits`.
        data: see `compile_program`.

    Raises:
        DataError: the data do not fit the model, as far as that can be seen before.
        ModelError: the model cannot be served; the message is one line for people.
        OSError: the cache cannot be written.
    """
    if not program_file.is_program(path):
        require_frameworks(path)
        return compile_program(path, cache_dir, imports, progress, options, limits, data=data)
    _require_plain(path, options or ProofOptions(), data)
    report = progress or (lambda _stage: None)
    report("load")
    try:
        program = program_file.load(path, (limits or Limits()).model_bytes)
        report("check")
        return trial.settled(program)
    except (program_file.ProgramFileError, trial.TrialError) as error:
        raise ModelError(f"{path}: {error}") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


def require_frameworks(path: Path) -> None:
    """Check that what compiles a ``.keras`` file is installed.

    Raises:
        ModelError: it is not.
    """
    missing = [name for name in _FRAMEWORKS if importlib.util.find_spec(name) is None]
    if missing and path.is_file():
        raise ModelError(
            f"{path}: must be compiled, which needs packages that are not installed ({', '.join(missing)}): {INSTALL}; or "
            f"compile it where they are, by: stepwell compile {path.name} -o {path.stem}{program_file.SUFFIX}, and serve "
            "that file"
        )


def _require_plain(path: Path, options: ProofOptions, data: Path | None) -> None:
    """Refuse what can be said of a model only where it is compiled."""
    if options != ProofOptions():
        raise ModelError(
            f"{path}: is compiled already: --probe-steps and --trust-causality are for stepwell compile, which made it"
        )
    if data is not None:
        raise DataError(
            f"{path} is compiled, and its Keras model is needed to compare with; name the .keras file"
        )
