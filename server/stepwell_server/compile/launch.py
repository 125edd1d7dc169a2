"""Compile a model in a process of its own. Imports no TensorFlow: the server calls this."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import stepwell_server
from stepwell_server.compile import cache, origin
from stepwell_server.compile.errors import ModelError, NotCausalError
from stepwell_server.program import Program

Progress = Callable[[str], None]
_DETAIL_LINES = 40


def compile_program(
    model: Path,
    cache_dir: Path,
    imports: Sequence[str] = (),
    progress: Progress | None = None,
) -> Program:
    """Return the program of a ``.keras`` file, from the cache if it is there.

    Args:
        model: the ``.keras`` file.
        cache_dir: folder of compiled programs; made if it is missing. Several processes may share it.
        imports: modules that register the model's custom layers and functions; the current folder is
            searched first. Their source is part of the cache's key, that of modules they import is not.
        progress: called with each stage as it begins: load, trace, probe, convert, check. Not called
            when the program comes from the cache.

    Raises:
        ModelError: the model cannot be served; the message is one line for people.
        OSError: the cache cannot be written.
    """
    if not model.is_file():
        raise ModelError(f"{model}: {origin.no_file_problem(model)}")
    key = cache.cache_key(model, imports)
    found = cache.load(cache_dir / key)
    if found is not None:
        return found
    with cache.workspace(cache_dir, key) as folder:
        _compile(model, folder, imports, progress)
        return cache.publish(folder, cache_dir / key)


def _compile(model: Path, folder: Path, imports: Sequence[str], progress: Progress | None) -> None:
    command = [sys.executable, "-m", "stepwell_server.compile", str(model), str(folder)]
    command += [argument for module in imports for argument in ("--import", module)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as noise,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            env=_environment(),
        ) as process,
    ):
        try:
            assert process.stdout is not None
            ended = _relay(process.stdout, progress)
            code = process.wait()
        finally:
            process.kill()  # Does nothing if it has ended; else we are leaving early, and so shall it.
        if not ended:
            raise _crash(model, code, noise)


def _relay(lines: IO[str], progress: Progress | None) -> bool:
    """Read the child's messages; True if the last of them says that the work is done."""
    for line in lines:
        message = json.loads(line)
        if "stage" in message:
            if progress is not None:
                progress(message["stage"])
        elif "error" in message:
            kind = NotCausalError if message.get("kind") == "NotCausalError" else ModelError
            raise kind(message["error"], message.get("details", ""))
        elif "done" in message:
            return True
    return False


def _crash(model: Path, code: int, noise: IO[str]) -> ModelError:
    noise.seek(0)
    lines = noise.read().strip().splitlines()[-_DETAIL_LINES:]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    last = f": {lines[-1].strip()}" if lines else ""
    return ModelError(f"{model}: the compiling process ended unexpectedly ({how}){last}", "\n".join(lines))


def _environment() -> dict[str, str]:
    # The child finds this very package, installed or not, and the caller's modules.
    package = str(Path(stepwell_server.__file__).parents[1])
    paths = [package, os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
