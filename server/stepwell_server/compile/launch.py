"""Compile a model in a process of its own. Imports no TensorFlow: the server calls this."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import stepwell_server
from stepwell_server import program_file
from stepwell_server.clock import Clock, SystemClock
from stepwell_server.compile import cache, data_file, origin
from stepwell_server.compile.comparison import Comparison
from stepwell_server.compile.errors import REPORT, DataError, ModelError, NotCausalError
from stepwell_server.compile.limits import MORE_BYTES, Limits, Watch
from stepwell_server.logs import Log
from stepwell_server.program import Program, ProofOptions

Progress = Callable[[str], None]
_KINDS: dict[str, type[ModelError]] = {kind.__name__: kind for kind in (DataError, NotCausalError)}
_DETAIL_LINES, _DETAIL_BYTES = 40, 64 << 10
_MESSAGE_BYTES = 1 << 20
"""Of one message of the child's, which may be under somebody else's control."""
#: Variables of the environment that say how Python, its libraries and the language work, and nothing of anybody's.
_PASSED = frozenset(["LANG", "LANGUAGE", "LD_LIBRARY_PATH", "PATH", "SOURCE_DATE_EPOCH", "TZ", "VIRTUAL_ENV"])
_PASSED_PREFIXES = ("COVERAGE_", "KMP_", "LC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "TF_", "XLA_")
_log = Log("compile")


def compile_program(
    model: Path,
    cache_dir: Path,
    imports: Sequence[str] = (),
    progress: Progress | None = None,
    options: ProofOptions | None = None,
    limits: Limits | None = None,
    clock: Clock | None = None,
    data: Path | None = None,
) -> Program:
    """Return the program of a ``.keras`` file, from the cache if it is there.

    Args:
        model: the ``.keras`` file.
        cache_dir: folder of compiled programs; made if it is missing. Several processes may share it.
        imports: modules that register the model's custom layers and functions; the current folder is
            searched first. Their source is part of the cache's key, that of modules they import is not.
        progress: called with each stage as it begins: load, trace, probe, convert, check. Not called
            when the program comes from the cache.
        options: what the user says about the proof.
        limits: what compiling may take; by default those of `Limits`.
        clock: against which the time is limited; by default the machine's.
        data: sequences on which the program will be compared: looked at before the model is compiled.

    Raises:
        DataError: the data do not fit the model, as far as that can be seen before.
        ModelError: the model cannot be served; the message is one line for people.
        OSError: the cache cannot be written, or others can write it.
    """
    if data is not None:
        data_file.load(data)
    if not model.is_file():
        raise ModelError(f"{model}: {origin.no_file_problem(model)}")
    options = options or ProofOptions()
    cache.make(cache_dir)
    key = cache.cache_key(model, imports, options)
    target = cache.entry(cache_dir, key)
    found = cache.load(target)
    if found is not None:
        return _from(model, found)
    with cache.unfinished(target) as file:
        told = [] if options.steps is None else ["--steps", str(options.steps)]
        told += ["--trust"] if options.trust else []
        told += [] if data is None else ["--data", str(data)]
        _Compilation(model, limits or Limits(), progress).run(file, imports, told, clock or SystemClock())
        return _from(model, cache.publish(file, target))


def _from(model: Path, program: Program) -> Program:
    """Return the program as that of this file: the same content may have been compiled under another name."""
    if program.provenance is None:
        return program
    return dataclasses.replace(program, provenance=dataclasses.replace(program.provenance, source=model.name))


def compare_with_keras(
    model: Path,
    program: Program,
    data: Path | None = None,
    imports: Sequence[str] = (),
    limits: Limits | None = None,
    clock: Clock | None = None,
) -> Comparison:
    """Return how stepping a program differs from Keras's own call of the model it was made from.

    Args:
        model: the ``.keras`` file.
        program: what was compiled from it.
        data: an ``.npy`` or ``.npz`` file of sequences, (batch, T, features); None: those of the proof.
        imports: see `compile_program`.
        limits: see `compile_program`.
        clock: see `compile_program`.

    Raises:
        DataError: the data do not fit the model.
        ModelError: Keras's call of it fails.
    """
    told = ["--compare", *([] if data is None else ["--data", str(data)])]
    run = _Compilation(model, limits or Limits(), None).run
    with tempfile.TemporaryDirectory(prefix="stepwell-") as folder:
        file = Path(folder, f"program{program_file.SUFFIX}")
        program_file.save(program, file)
        return Comparison.from_json(run(file, imports, told, clock or SystemClock()))


class _Compilation:
    """One run of the compiling process."""

    def __init__(self, model: Path, limits: Limits, progress: Progress | None) -> None:
        self._model = model
        self._limits = limits
        self._progress = progress
        self._stage = "load"

    def run(self, file: Path, imports: Sequence[str], told: Sequence[str], clock: Clock) -> Any:
        """Compile the model into ``file``, or what else the options in ``told`` say; return what comes of it.

        Raises:
            ModelError: it cannot be served, or the process did not come to an end.
        """
        # -P: what lies in the current folder is no module unless --import names it.
        command = [sys.executable, "-P", "-m", "stepwell_server.compile", str(self._model), str(file), *told]
        command += ["--max-model-bytes", str(self._limits.model_bytes)]
        command += ["--timeout-s", str(self._limits.timeout_s)]
        command += [argument for module in imports for argument in ("--import", module)]
        with (
            tempfile.TemporaryFile("w+", errors="replace") as noise,
            tempfile.TemporaryDirectory(prefix="stepwell-compile-", ignore_cleanup_errors=True) as folder,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=noise,
                text=True,
                env=_environment(folder),
                start_new_session=True,
            ) as process,
        ):
            try:
                assert process.stdout is not None
                with Watch(process, self._limits, clock, [Path(folder), file.parent]) as watch:
                    done = self._relay(process.stdout)
                    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            finally:
                _end(process)
            code = process.returncode
            if done is None:
                raise ModelError(f"{self._model}: {self._problem(watch, code)}", _last_lines(noise))
            return done

    def _relay(self, lines: IO[str]) -> Any:
        """Read the child's messages; return what it says with "done", or None if it never says so."""
        while line := lines.readline(_MESSAGE_BYTES):
            if not line.endswith("\n") and len(line) < _MESSAGE_BYTES:
                return None  # It ended in the middle of a message.
            message = self._message(line)
            if "protection" in message:
                _log.info("compiling in a process of its own", **message)
            elif "stage" in message:
                self._stage = message["stage"]
                if self._progress is not None:
                    self._progress(self._stage)
            elif "error" in message:
                kind = _KINDS.get(str(message.get("kind")), ModelError)
                raise kind(message["error"], message.get("details", ""))
            elif "done" in message:
                return message["done"]
        return None

    def _message(self, line: str) -> dict[str, Any]:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if isinstance(message, dict):
            return message
        raise ModelError(
            f"{self._model}: the compiling process said what it never says in stage {self._stage}, and was ended: something"
            " of the model or of a module of --import speaks for it"
        )

    def _problem(self, watch: Watch, code: int) -> str:
        """Why the process ended without an answer, and the way on."""
        if watch.exceeded == "abandoned":
            return "nobody waits for it any more"
        if watch.exceeded == "time" or code == -signal.SIGXCPU:
            return (
                f"compiling it must take at most {self._limits.timeout_s:g} s (--compile-timeout-s); it was ended in "
                f"stage {self._stage}. Allow more time, or compile it on a faster machine of the same kind and take "
                "that one's --cache-dir"
            )
        if watch.exceeded == "memory":
            return (
                f"compiling it must take at most {self._limits.memory_bytes} bytes of memory "
                f"(--max-compile-memory-bytes); it took more in stage {self._stage} and was ended. Allow more, or "
                "make the model smaller"
            )
        if watch.exceeded == "disk":
            return (
                f"compiling it must write at most {self._limits.disk_bytes} bytes, twice --max-model-bytes and"
                f" {MORE_BYTES}; it wrote more in stage {self._stage} and was ended"
            )
        if code == -signal.SIGKILL:
            return (
                f"the compiling process was killed from outside in stage {self._stage} (SIGKILL), as the system does "
                "when memory runs out. Give it more memory, or less than the system's to --max-compile-memory-bytes"
            )
        if code < 0:
            return (
                f"the compiler crashed on this model in stage {self._stage} ({_signal_name(-code)}): a defect in "
                f"TensorFlow or in a module of --import, not in the model. {REPORT}"
            )
        return (
            f"the compiling process ended without an answer in stage {self._stage} (exit code {code}). Does a module "
            f"of --import end it? If not: {REPORT}"
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_lines(noise: IO[str]) -> str:
    noise.seek(max(0, os.fstat(noise.fileno()).st_size - _DETAIL_BYTES))
    return "\n".join(noise.read().strip().splitlines()[-_DETAIL_LINES:])


def _end(process: subprocess.Popen[str]) -> None:
    """End it and what it has started, if that goes on. Until it is waited for, nobody else can have its number."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment(folder: str) -> dict[str, str]:
    """What the child is told: no tokens, keys or passwords that the server's own environment may have.

    It finds this very package, installed or not, and the caller's modules. What it writes goes into a folder of its own.
    """
    package = str(Path(stepwell_server.__file__).parents[1])
    paths = [package, os.environ.get("PYTHONPATH", "")]
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED or name.startswith(_PASSED_PREFIXES)
    }
    return passed | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HOME": folder,
        "TMPDIR": folder,
        "HDF5_PLUGIN_PATH": folder,
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
