"""A worker: a process that compiles or tests programs for the server, in a sandbox (`sandbox`).

It is a fork of the fork server (`fork_server`). It executes jobs from its channel (`wire`) until that is closed: one
job, or several of the same configuration if it is kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepwell_server import program_file
from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.host import limits, sandbox
from stepwell_server.compile.host.failure import failure
from stepwell_server.compile.host.wire import Channel
from stepwell_server.program import ONNX_MODEL, Architecture, ProofOptions

if TYPE_CHECKING:
    from stepwell_server.compile.probe.probe import TracedModel


def run(channel: Channel, log: int, terms: dict[str, Any], parent: int) -> int:
    """Execute jobs until the channel is closed; return the exit code.

    Args:
        channel: the channel to the server.
        log: an open file for all output.
        terms: see `ForkServer.fork`: folders and limits.
        parent: process id of the fork server; this process ends with it.
    """
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    home = str(terms["home"])
    os.environ |= {"HOME": home, "TMPDIR": home}
    tempfile.tempdir = None  # Forget the folder of the fork server.
    if terms["imports"]:
        os.chdir(terms["cwd"])
        if terms["cwd"] not in sys.path:
            sys.path.insert(0, terms["cwd"])
    protection = _protected(terms)
    if os.getppid() != parent:
        return 1
    channel.send({"protection": str(protection), "missing": protection.missing})
    jobs = _Jobs(channel)
    while (job := channel.receive()) is not None:
        _allow_time(float(job["timeout_s"]))
        channel.send(jobs.answer(job))
    return 0


def _protected(terms: dict[str, Any]) -> sandbox.Protection:
    """Enter the sandbox. With modules of the operator all files are readable, because their needs are unknown."""
    sandbox.limit(int(terms["disk_bytes"]))
    readable = [Path(terms["given"]), *(Path(entry) for entry in sys.path if entry)]
    return sandbox.enter(None if terms["imports"] else readable, [Path(terms["home"])])


def _allow_time(timeout_s: float) -> None:
    """Set the processor time that fits into the time limit: a bound that the kernel enforces even without the server."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    most = math.ceil(used + limits.processor_s(timeout_s)) + 1 if timeout_s > 0 else resource.RLIM_INFINITY
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(
        resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
    )


class _Jobs:
    """The jobs of a worker."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._traced: TracedModel | None = None
        """The trace of the last model, if it can be reused for other weights."""
        self._architecture: Architecture | None = None
        """The architecture of the same model."""

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Execute one job; return the last message about it."""
        try:
            return {"done": self.do(job)}
        except ModelError as error:
            found = error
        # SystemExit: a user's module may call sys.exit().
        except (Exception, SystemExit) as error:
            found = failure(Path(job["model"]), error)
        details = found.details[-limits.DETAIL_BYTES :]
        return {"error": str(found), "kind": type(found).__name__, "details": details}

    def do(self, job: dict[str, Any]) -> Any:
        """Execute one job; return its result."""
        kind, model, most = job["job"], Path(job["model"]), int(job["max_model_bytes"])
        if kind == "settle":
            return _settle(model, most)
        step_function = {
            "onnx": self._step_function,
            "inspect": _inspected,
            "compare-onnx": _compare_step_function,
        }
        if kind in step_function:
            return step_function[kind](job, model)
        from stepwell_server.compile.keras_file.sizes import check_sizes  # brings HDF5

        check_sizes(model, most)
        if kind == "inspect-keras":
            return _inspected_keras(job, model)
        if kind == "compare":
            return _compare(job, model)
        return self._again(job, model) if kind == "again" else self._compile(job, model)

    def _compile(self, job: dict[str, Any], model: Path) -> bool:
        """Compile a model; return whether it can be recompiled with other weights."""
        from stepwell_server.compile.program.pipeline import compile_traced
        from stepwell_server.compile.program.recompile import may_be_reused

        program, traced = compile_traced(
            model,
            job["imports"],
            self._report,
            dataclasses.replace(_step_options(job), steps=job["steps"], trust=bool(job["trust"])),
            Path(job["data"]) if job["data"] else None,
        )
        program_file.save(program, Path(job["program"]), is_kept=False)
        if job["keep"] and may_be_reused(traced, program):
            self._traced, self._architecture = traced, program.architecture
        return self._traced is not None

    def _step_function(self, job: dict[str, Any], model: Path) -> bool:
        """Compile a step function."""
        from stepwell_server.compile.onnx.pipeline import compile_step_function

        program = compile_step_function(model, _step_options(job), self._report)
        program_file.save(program, Path(job["program"]), is_kept=False)
        return True

    def _again(self, job: dict[str, Any], model: Path) -> bool:
        """Compile a model of the same configuration as the last one.

        Raises:
            Exception: anything; then the server starts a new worker, which reports the problem.
        """
        from stepwell_server.compile.program.recompile import compile_again

        assert self._traced is not None
        assert self._architecture is not None
        program = compile_again(self._traced, self._architecture, model, self._report)
        program_file.save(program, Path(job["program"]), is_kept=False)
        return True

    def _report(self, stage: str) -> None:
        if stage != "load":
            self._channel.send({"stage": stage})


def _compare(job: dict[str, Any], model: Path) -> Any:
    """Compare a program with Keras."""
    from stepwell_server.compile.probe.own_data import compare
    from stepwell_server.compile.program.pipeline import import_modules

    import_modules(job["imports"])
    program = program_file.load(Path(job["program"]), sys.maxsize, is_own=True)
    return compare(model, program, Path(job["data"]) if job["data"] else None).to_json()


def _require_plain_graph(content: bytes, model: Path) -> None:
    """Check the graph of a step function that another machine has compiled, as if it were compiled here."""
    from stepwell_server.compile.onnx import reading
    from stepwell_server.compile.onnx.interface import inputs_of
    from stepwell_server.compile.onnx.sizes import require_bounded

    try:
        graph = reading.parsed(content).graph
        require_bounded(graph, inputs_of(graph))
    except ModelError as error:
        raise ModelError(f"{model}: {error}") from error


def _compare_step_function(job: dict[str, Any], model: Path) -> Any:
    """Compare a program with ONNX Runtime in a plain loop."""
    from stepwell_server.compile.onnx.comparison import compare

    program = program_file.load(Path(job["program"]), sys.maxsize, is_own=True)
    data = Path(job["data"]) if job["data"] else None
    return compare(model, program, _step_options(job).declaration, data).to_json()


def _inspected(job: dict[str, Any], model: Path) -> dict[str, Any]:
    """Describe the file of a step function."""
    from stepwell_server.compile.onnx.description import described

    return described(model, _step_options(job).declaration)


def _inspected_keras(job: dict[str, Any], model: Path) -> dict[str, Any]:
    """Describe a Keras model."""
    from stepwell_server.compile.program.description import described
    from stepwell_server.compile.program.pipeline import import_modules

    import_modules(job["imports"])
    return described(model, _step_options(job))


def _step_options(job: dict[str, Any]) -> ProofOptions:
    """The options for states and rows."""
    from stepwell_server.compile.onnx import declaration

    declared = declaration.from_json(json.loads(Path(job["declaration"]).read_text()))
    return ProofOptions(trust_rows=bool(job["trust_rows"]), declaration=declared)


def _settle(model: Path, most: int) -> dict[str, Any]:
    """Test a compiled program on this processor; return the compared batch sizes, and those that agree."""
    from stepwell_server.engine.executors import trial

    try:
        program = program_file.load(model, most)
        if program.executor == "onnxruntime":
            _require_plain_graph(program.files[ONNX_MODEL], model)
        sizes, agreeing = trial.sizes_here(program)
    except (program_file.ProgramFileError, trial.TrialError) as error:
        raise ModelError(f"{model}: {error}") from error
    return {"sizes": sizes, "agreeing": agreeing}
