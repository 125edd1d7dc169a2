"""Unexpected exceptions as a `ModelError`: one line with the probable cause and the fix."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from pathlib import Path
from types import TracebackType

from stepwell import _install
from stepwell_server.compile.errors import REPORT, ModelError, gist

_PACKAGE = Path(__file__).parents[2]


def failure(model: Path, error: BaseException) -> ModelError:
    """The error for a model that the compiler fails on, with the traceback as its details."""
    details = "".join(traceback.format_exception(error))
    return ModelError(f"{model}: {_problem(error)}", details)


def _problem(error: BaseException) -> str:
    what = f"{type(error).__name__}: {gist(str(error))}"
    if isinstance(error, MemoryError):
        return f"memory ran out while it was compiled ({what}). Give the compiling process more memory"
    if isinstance(error, ImportError) and error.name in {"tensorflow", "keras", "h5py", "ai_edge_litert"}:
        return f"the compiler cannot be loaded ({what}). Install it with: {_install.advice(_install.SERVER)}"
    theirs = _users_line(error.__traceback__)
    if theirs:
        return f"code that --import has loaded failed on this model ({what}) at {theirs}"
    return f"the compiler failed on this model ({what}): a defect of Stepwell, not of the model. {REPORT}"


def _users_line(where: TracebackType | None) -> str:
    """File and line of the innermost call in code of the user's, empty if there is none."""
    installed = [_PACKAGE, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))]
    installed += [Path(sys.base_prefix), Path(sys.prefix)]
    found = ""
    for frame in traceback.extract_tb(where):
        file = Path(frame.filename)
        generated = file.name.startswith("__autograph_generated_file")  # by TensorFlow, of anybody's code
        if file.is_file() and not generated and not any(file.is_relative_to(folder) for folder in installed):
            found = f"{frame.filename}:{frame.lineno}"
    return found
