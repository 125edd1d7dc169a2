"""Compiles models for a server, in warm processes. Imports no TensorFlow, because the server uses this module.

Importing TensorFlow takes seconds, compiling a model less than one. So one process imports it and stays: the fork
server (`processes`, `fork_server`). It forks a worker for each model. The worker enters a sandbox (`sandbox`), receives
a copy of the file (`source`), and ends after its answer. So no model can affect another one.

`concurrent.futures.ProcessPoolExecutor` is no alternative: it unpickles messages of workers, which a model may control.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from stepwell_server import program_file
from stepwell_server.architecture.canonical import comparable
from stepwell_server.clock import Clock, SystemClock
from stepwell_server.compile import cache, data_file
from stepwell_server.compile.comparison import Comparison
from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.host.job import ABANDONED, Call, Job, Progress
from stepwell_server.compile.host.limits import Limits, memory_of
from stepwell_server.compile.host.processes import ForkServer, Worker
from stepwell_server.compile.host.source import Source, opened
from stepwell_server.compile.keras_file import origin
from stepwell_server.compile.onnx import declaration
from stepwell_server.logs import Log
from stepwell_server.program import Program, ProofOptions

IDLE_S = 300.0
_ABANDONED_INTERVAL_S = 0.05
_DECLARATION = "declaration.json"
_PROGRAM = f"program{program_file.SUFFIX}"
#: A worker whose memory has grown by more than this is not kept, because TensorFlow does not release everything.
_MAX_GROWTH_BYTES = 256 << 20
_log = Log("compile")


class WarmCompiler:
    """Compiles models one after the other. Thread-safe; its methods block, so an event loop calls them on threads.

    Its processes start when they are first needed. They end with `close`, with this process, however it ends, and with
    `end_idle` after some idle time. If one is killed, the next call starts another.
    """

    def __init__(
        self,
        cache_dir: Path,
        imports: Sequence[str] = (),
        limits: Limits | None = None,
        clock: Clock | None = None,
        idle_s: float = IDLE_S,
    ) -> None:
        """Prepare; no process is started.

        Args:
            cache_dir: folder of compiled programs; created when needed. Several processes may share it.
            imports: modules that register the models' custom layers and functions; the current folder is searched first.
                Their source is part of the cache's key, that of modules they import is not.
            limits: the limits of a compilation, unless a call has its own; `Limits()` by default.
            clock: for the time limit; by default the machine's.
            idle_s: how long idle processes are kept, in seconds; see `end_idle`.
        """
        self._cache_dir = cache_dir
        self._imports = tuple(imports)
        self._limits = limits or Limits()
        self._clock = clock or SystemClock()
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._fork_server = ForkServer()
        self._kept: _Kept | None = None
        self._last_used = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.close()

    def compile(
        self,
        model: Path,
        progress: Progress | None = None,
        options: ProofOptions | None = None,
        limits: Limits | None = None,
        data: Path | None = None,
        *,
        keep: bool = True,
    ) -> Program:
        """Return the program of a ``.keras`` or ``.onnx`` file, from the cache if possible.

        Args:
            model: the file.
            progress: called with each stage as it begins: waiting, if another model is being compiled, then load, trace,
                probe, convert, check. Not called when the program comes from the cache. Called on the caller's thread.
            options: the user's options for the proof.
            limits: the limits of the compilation.
            data: sequences for a later comparison, which are checked before the model is compiled.
            keep: keep its worker for the next model. If that differs only in its weights, compiling it takes less than
                half of the time, with the same result.

        Raises:
            DataError: the data do not fit the model, as far as can be checked in advance.
            ModelError: the model cannot be served; the message is one line.
            OSError: the cache cannot be written, or others can write it.
        """
        if data is not None:
            data_file.load(data)
        options = options or ProofOptions()
        with opened(model) as source:
            if not source.size:
                raise ModelError(f"{model}: {origin.other_problem(model)}")
            options = _declared(model, options)
            cache.make(self._cache_dir)
            target = cache.entry(self._cache_dir, cache.key_of(source.sha256(), self._imports, options))
            found = cache.load(target)
            if found is None:
                limits = limits or self._limits
                call = Call(model, progress or _silent, limits, self._closing, options, data, keep)
                with self._exclusive(call):
                    # Another caller may have compiled it meanwhile.
                    compiled = self._step_function if model.suffix == declaration.SUFFIX else self._compiled
                    found = cache.load(target) or compiled(call, source, target)
        return _named(found, model.name)

    def compare(
        self,
        model: Path,
        program: Program,
        data: Path | None = None,
        limits: Limits | None = None,
        options: ProofOptions | None = None,
    ) -> Comparison:
        """Compare stepping a program with Keras's own call of its model, or with ONNX Runtime in a plain loop.

        Args:
            model: the ``.keras`` or ``.onnx`` file.
            program: its compiled program.
            data: an ``.npy`` or ``.npz`` file of sequences, (batch, T, features); None: those of the proof.
            limits: the limits of the comparison.
            options: those with which a step function was compiled.

        Raises:
            DataError: the data do not fit the model.
            ModelError: Keras's call of it fails.
        """
        is_step_function = model.suffix == declaration.SUFFIX
        call = Call(model, _silent, limits or self._limits, self._closing)
        with opened(model) as source, self._exclusive(call), self._job(call) as job:
            worker = job.fork(frameworks=not is_step_function, imports=self._imports)
            file = worker.given / _PROGRAM
            program_file.save(program, file)
            job.give(worker, source)
            job.give_data(worker, data)
            if is_step_function:
                terms = _step_job(worker, _declared(model, options or ProofOptions())) | {
                    "job": "compare-onnx"
                }
            else:
                terms = {"job": "compare", "imports": self._imports}
            result = job.ask(worker, **terms, program=str(file))
            return Comparison.from_json(result)

    def inspect(self, model: Path, options: ProofOptions | None = None) -> dict[str, Any]:
        """Describe an ``.onnx`` or ``.keras`` file (`compile.onnx.inspection`).

        Raises:
            ModelError: it is no such file, or contains something that is refused.
        """
        options = _declared(model, options or ProofOptions())
        call = Call(model, _silent, self._limits, self._closing)
        is_step_function = model.suffix == declaration.SUFFIX
        with opened(model) as source, self._exclusive(call), self._job(call) as job:
            worker = job.fork(frameworks=not is_step_function, imports=self._imports)
            job.give(worker, source)
            terms = _step_job(worker, options) | {"job": "inspect" if is_step_function else "inspect-keras"}
            return dict(job.ask(worker, **terms, imports=self._imports))

    def settle(
        self, model: Path, progress: Progress | None = None, limits: Limits | None = None
    ) -> tuple[Program, tuple[int, ...], tuple[int, ...]]:
        """Read a ``.stepwell`` file and test it on this processor. Needs no frameworks.

        Args:
            model: the file.
            progress: called with waiting, if another model is being compiled, then load and check.
            limits: the limits of the test.

        Returns:
            The program in the file, the batch sizes that were compared, and those that give a row the same bits (see
            `trial.with_sizes`).

        Raises:
            ModelError: it cannot be read, cannot run here, or gives other results here.
        """
        call = Call(model, progress or _silent, limits or self._limits, self._closing)
        with opened(model) as source, self._exclusive(call), self._job(call) as job:
            worker = job.fork(frameworks=False)
            try:
                program = program_file.load(job.give(worker, source), call.limits.model_bytes)
            except program_file.ProgramFileError as error:
                raise ModelError(f"{model}: {error}") from error
            except OSError as error:
                raise ModelError(f"{model}: cannot be read: {error.strerror}") from error
            call.report("check")
            result = job.ask(worker, job="settle")
            return program, tuple(map(int, result["sizes"])), tuple(map(int, result["agreeing"]))

    @property
    def limits(self) -> Limits:
        """The limits of a compilation, unless a call has its own."""
        return self._limits

    @property
    def pids(self) -> list[int]:
        """Process ids of the fork server and of a kept worker, if any. For any thread."""
        kept = self._kept
        pids = self._fork_server.pid, None if kept is None else kept.worker.pid
        return [pid for pid in pids if pid is not None]

    def end_idle(self) -> bool:
        """End the processes if they have been idle for ``idle_s``; return whether none is left. Call it periodically."""
        if self._lock.acquire(blocking=False):
            try:
                if self._clock.monotonic() - self._last_used >= self._idle_s:
                    self._end()
            finally:
                self._lock.release()
        return self._fork_server.pid is None

    def close(self) -> None:
        """End the running call and the processes. Idempotent; later calls raise ModelError."""
        self._closing.set()
        with self._lock:
            self._end()

    def _end(self) -> None:
        kept, self._kept = self._kept, None
        self._fork_server.end()
        if kept is not None:
            kept.worker.forget()

    def _compiled(self, call: Call, source: Source, target: Path) -> Program:
        """Compile a model and store the program in the cache."""
        architecture = self._architecture(call, source)
        kept, self._kept = self._kept, None
        if kept is not None and kept.architecture == architecture and call.data is None:
            program = self._again(call, kept, source, target)
            if program is not None:
                return program
        elif kept is not None:
            self._fork_server.forget(kept.worker)
        with self._job(call) as job:
            worker = job.fork(frameworks=True, imports=self._imports)
            job.give(worker, source)
            job.give_data(worker, call.data)
            keep = call.keep and architecture is not None
            may_be_kept = job.ask(
                worker,
                **_step_job(worker, call.options),
                job="compile",
                imports=self._imports,
                program=str(worker.home / _PROGRAM),
                steps=call.options.steps,
                trust=call.options.trust,
                keep=keep,
            )
            program = _published(worker, target)
            if keep and may_be_kept and architecture is not None:
                job.release(worker)
                self._kept = _Kept(worker, architecture, memory_of(worker.pid))
            return program

    def _step_function(self, call: Call, source: Source, target: Path) -> Program:
        """Compile a step function, without frameworks, and store the program in the cache."""
        with self._job(call) as job:
            worker = job.fork(frameworks=False)
            job.give(worker, source)
            job.give_data(worker, call.data)
            job.ask(
                worker, **_step_job(worker, call.options), job="onnx", program=str(worker.home / _PROGRAM)
            )
            return _published(worker, target)

    def _again(self, call: Call, kept: _Kept, source: Source, target: Path) -> Program | None:
        """Compile a model in the worker that compiled it with other weights; None if it needs a new worker."""
        worker = kept.worker
        with self._job(call) as job:
            try:
                job.adopt(worker)
                job.give(worker, source)
                job.ask(worker, job="again", program=str(worker.home / _PROGRAM))
                program = _published(worker, target)
            except (ModelError, OSError) as error:
                if job.exceeded in {"abandoned", "time"}:
                    raise
                _log.info(
                    "compiled completely, not only with other weights", model=str(call.model), reason=error
                )
                return None
            if memory_of(worker.pid) <= kept.memory_bytes + _MAX_GROWTH_BYTES:
                job.release(worker)
                self._kept = kept
            return program

    def _architecture(self, call: Call, source: Source) -> bytes | None:
        """Return a digest that two models share if they differ only in their weights; None if unknown."""
        configuration = source.configuration()
        if configuration is None:
            return None
        digest = hashlib.sha256(f"{call.options}\n".encode())
        digest.update(cache.sources_of(self._imports))
        try:
            digest.update(comparable(json.loads(configuration)))
        except (ValueError, RecursionError):
            return None
        return digest.digest()

    @contextlib.contextmanager
    def _exclusive(self, call: Call) -> Iterator[None]:
        """Wait for the calls before this one; later calls wait during the block."""
        if not self._lock.acquire(blocking=False):
            call.report("waiting")
            while not self._lock.acquire(timeout=_ABANDONED_INTERVAL_S):
                _require_wanted(call)
        try:
            _require_wanted(call)
            yield
        finally:
            self._last_used = self._clock.monotonic()
            self._lock.release()

    def _job(self, call: Call) -> Job:
        return Job(call, self._fork_server, self._clock)


def _require_wanted(call: Call) -> None:
    if call.is_abandoned:
        raise ModelError(f"{call.model}: {ABANDONED}")


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A worker kept for models of one architecture."""

    worker: Worker
    architecture: bytes
    memory_bytes: int
    """Its memory when it was first kept."""


def _silent(_stage: str) -> None:
    return None


def _declared(model: Path, options: ProofOptions) -> ProofOptions:
    """Add what the file beside a model declares."""
    return dataclasses.replace(options, declaration=declaration.of_model(model, options.declaration))


def _step_job(worker: Worker, options: ProofOptions) -> dict[str, Any]:
    """The options for states and rows; what is declared may be too long for a message."""
    file = worker.given / _DECLARATION
    file.write_text(json.dumps(declaration.to_json(options.declaration)))
    return {"declaration": str(file), "trust_rows": options.trust_rows}


def _published(worker: Worker, target: Path) -> Program:
    """Move the program of a worker into the cache."""
    with cache.unfinished(target) as file:
        worker.take(_PROGRAM, file)
        return cache.publish(file, target)


def _named(program: Program, source: str) -> Program:
    """Return the program with this source name: the same content may have been compiled under another name."""
    if program.provenance is None:
        return program
    return dataclasses.replace(program, provenance=dataclasses.replace(program.provenance, source=source))
