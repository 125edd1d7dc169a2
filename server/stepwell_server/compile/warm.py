"""Compiles models beside a server, in processes that are kept warm. Imports no TensorFlow: the server has one of these.

Importing TensorFlow takes seconds, compiling a model less than one. So a process that has imported it is kept (the fork
server, `processes`, `__main__`), and is copied for each model: a worker, which gives up what may do harm (`sandbox`),
is given a copy of the file (`handover`), and is ended when it has answered. No worker meets what another one did.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from stepwell_server import program_file
from stepwell_server.clock import Clock, SystemClock
from stepwell_server.compile import cache, data_file, handover, origin
from stepwell_server.compile.comparison import Comparison
from stepwell_server.compile.errors import REPORT, DataError, ModelError, NotCausalError
from stepwell_server.compile.handover import Source
from stepwell_server.compile.limits import MORE_BYTES, Limits, Watch
from stepwell_server.compile.processes import EndedError, Processes, Worker
from stepwell_server.compile.wire import GarbledError
from stepwell_server.logs import Log
from stepwell_server.program import Program, ProofOptions

Progress = Callable[[str], None]
IDLE_S = 300.0
_KINDS: dict[str, type[ModelError]] = {kind.__name__: kind for kind in (DataError, NotCausalError)}
_PROGRAM = f"program{program_file.SUFFIX}"
_WAIT_S = 0.05
_ABANDONED = "nobody waits for it any more"
_log = Log("compile")


class WarmCompiler:
    """Compiles models, one after the other. Thread-safe; its methods block, so an event loop calls them on threads.

    Its processes are started when they are first needed, and end with `close`, when this process ends, however it does, and by
    `end_idle` when they have not been needed for a while. If one is killed, the next call starts another.
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
            cache_dir: folder of compiled programs; made when it is needed. Several processes may share it.
            imports: modules that register the models' custom layers and functions; the current folder is searched first.
                Their source is part of the cache's key, that of modules they import is not.
            limits: what compiling a model may take, where a call says nothing else; by default those of `Limits`.
            clock: against which the time is limited; by default the machine's.
            idle_s: for how long processes that nobody needs are kept, in seconds; see `end_idle`.
        """
        self._cache_dir = cache_dir
        self._imports = tuple(imports)
        self._limits = limits or Limits()
        self._clock = clock or SystemClock()
        self._idle_s = idle_s
        self._turns = _Turns()
        self._closing = threading.Event()
        self._processes = Processes()
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
    ) -> Program:
        """Return the program of a ``.keras`` file, from the cache if it is there.

        Args:
            model: the ``.keras`` file.
            progress: called with each stage as it begins: waiting, if another model is being compiled, then load, trace,
                probe, convert, check. Not called when the program comes from the cache. Called on the caller's thread.
            options: what the user says about the proof.
            limits: what compiling it may take.
            data: sequences on which the program will be compared: looked at before the model is compiled.

        Raises:
            DataError: the data do not fit the model, as far as that can be seen before.
            ModelError: the model cannot be served; the message is one line for people.
            OSError: the cache cannot be written, or others can write it.
        """
        if data is not None:
            data_file.load(data)
        options = options or ProofOptions()
        with handover.opened(model) as source:
            if not source.size:
                raise ModelError(f"{model}: {origin.other_problem(model)}")
            cache.make(self._cache_dir)
            target = cache.entry(self._cache_dir, cache.key_of(source.sha256(), self._imports, options))
            found = cache.load(target)
            if found is None:
                with self._job(model, progress, limits) as job:
                    # Whoever was first may have compiled just this.
                    found = cache.load(target) or self._compiled(job, source, target, options, data)
        return _named(found, model.name)

    def compare(
        self, model: Path, program: Program, data: Path | None = None, limits: Limits | None = None
    ) -> Comparison:
        """Return how stepping a program differs from Keras's own call of the model it was made from.

        Args:
            model: the ``.keras`` file.
            program: what was compiled from it.
            data: an ``.npy`` or ``.npz`` file of sequences, (batch, T, features); None: those of the proof.
            limits: what it may take.

        Raises:
            DataError: the data do not fit the model.
            ModelError: Keras's call of it fails.
        """
        with handover.opened(model) as source, self._job(model, None, limits) as job:
            worker = job.fork(frameworks=True, imports=self._imports)
            file = worker.given / _PROGRAM
            program_file.save(program, file)
            job.give(worker, source)
            job.give_data(worker, data)
            told = job.ask(worker, job="compare", imports=self._imports, program=str(file))
            return Comparison.from_json(told)

    def settle(
        self, model: Path, progress: Progress | None = None, limits: Limits | None = None
    ) -> tuple[Program, tuple[int, ...], tuple[int, ...]]:
        """Read a ``.stepwell`` file, and try it on this processor. Needs no frameworks.

        Args:
            model: the file.
            progress: called with waiting, if another model is being compiled, then load and check.
            limits: what it may take.

        Returns:
            The program as it is in the file, the batch sizes that were compared, and those that give a row the same bits
            (see `trial.with_sizes`).

        Raises:
            ModelError: it cannot be read, cannot run here, or computes something else here.
        """
        report = progress or (lambda _stage: None)
        with handover.opened(model) as source, self._job(model, progress, limits) as job:
            worker = job.fork(frameworks=False)
            try:
                program = program_file.load(job.give(worker, source), job.limits.model_bytes)
            except program_file.ProgramFileError as error:
                raise ModelError(f"{model}: {error}") from error
            except OSError as error:
                raise ModelError(f"{model}: cannot be read: {error.strerror}") from error
            report("check")
            told = job.ask(worker, job="settle")
            return program, tuple(map(int, told["sizes"])), tuple(map(int, told["agreeing"]))

    @property
    def limits(self) -> Limits:
        """What compiling a model may take, where a call says nothing else."""
        return self._limits

    @property
    def pids(self) -> list[int]:
        """Numbers of the processes that are kept. Empty while there are none."""
        return self._processes.pids

    def end_idle(self) -> bool:
        """End the processes if nobody has needed them for ``idle_s``; whether there are none then. To be called now and then."""
        with self._turns.at_once() as is_ours:
            if is_ours and self._clock.monotonic() - self._last_used >= self._idle_s:
                self._processes.end()
            return not self._processes.pids

    def close(self) -> None:
        """End what is under way, and the processes. Idempotent; what is called afterwards raises ModelError."""
        self._closing.set()
        with self._turns.next():
            self._processes.end()

    def _compiled(
        self, job: _Job, source: Source, target: Path, options: ProofOptions, data: Path | None
    ) -> Program:
        """Have it compiled, and put it into the cache."""
        worker = job.fork(frameworks=True, imports=self._imports)
        job.give(worker, source)
        job.give_data(worker, data)
        job.ask(
            worker,
            job="compile",
            imports=self._imports,
            program=str(worker.home / _PROGRAM),
            steps=options.steps,
            trust=options.trust,
        )
        with cache.unfinished(target) as file:
            worker.take(_PROGRAM, file)
            return cache.publish(file, target)

    @contextlib.contextmanager
    def _job(self, model: Path, progress: Progress | None, limits: Limits | None) -> Iterator[_Job]:
        """Wait for the turn, and have what is done in it limited."""
        limits = limits or self._limits
        report = progress or (lambda _stage: None)

        def require_wanted() -> None:
            if self._closing.is_set() or (limits.abandoned is not None and limits.abandoned.is_set()):
                raise ModelError(f"{model}: {_ABANDONED}")

        with self._turns.next(lambda: report("waiting"), require_wanted):
            require_wanted()
            with Watch(limits, self._clock, self._closing) as watch:
                job = _Job(self._processes, model, report, limits, watch)
                try:
                    yield job
                finally:
                    job.end()
                    self._last_used = self._clock.monotonic()


class _Job:
    """One turn: a model, and the worker that is at it."""

    def __init__(
        self, processes: Processes, model: Path, report: Progress, limits: Limits, watch: Watch
    ) -> None:
        self._processes = processes
        self._model = model
        self._report = report
        self.limits = limits
        self._watch = watch
        self._worker: Worker | None = None
        self._given: Path | None = None
        """The copy of the model."""
        self._data: tuple[Path, Path] | None = None
        """The user's own sequences, and the copy of them."""
        self._stage = "load"

    def fork(self, *, frameworks: bool, imports: Sequence[str] = ()) -> Worker:
        """Have a worker for it, which ends with it; where there are ``imports``, one that may read what they read.

        Raises:
            ModelError: it cannot be made.
        """
        terms = {
            "frameworks": frameworks,
            "disk_bytes": self.limits.disk_bytes,
            "imports": imports,
            "cwd": os.getcwd() if imports else "",
        }
        try:
            self._worker = self._processes.fork(self._watch, terms)
        except EndedError as error:
            if error.code is None:
                said = f"the compiling process cannot be started: {error.problem}"
                raise ModelError(f"{self._model}: {said}", error.details) from error
            raise ModelError(f"{self._model}: {self._problem(error.code)}", error.details) from error
        self._report(self._stage)
        return self._worker

    def give(self, worker: Worker, source: Source) -> Path:
        """Give a worker its copy of the model; returns where that is.

        Raises:
            ModelError: the file was changed meanwhile, or cannot be copied.
        """
        self._given = worker.given / "model" / self._model.name
        self._given.parent.mkdir()
        source.copy(self._given)
        return self._given

    def give_data(self, worker: Worker, data: Path | None) -> None:
        """Give a worker its copy of the user's own sequences, if there are any.

        Raises:
            DataError: they cannot be read.
        """
        if data is None:
            return
        copy = worker.given / "data" / data.name
        copy.parent.mkdir()
        try:
            with handover.opened(data) as source:
                source.copy(copy)
        except ModelError as error:
            raise DataError(str(error)) from error
        self._data = data, copy

    def ask(self, worker: Worker, **job: Any) -> Any:
        """Have a worker do something with what it was given; returns what comes of it.

        Raises:
            DataError: the data do not fit.
            ModelError: the model cannot be served, or the worker did not come to an end.
        """
        request = {
            "model": str(self._given),
            "data": str(self._data[1]) if self._data is not None else "",
            "max_model_bytes": self.limits.model_bytes,
            "timeout_s": self.limits.timeout_s,
            **job,
        }
        try:
            with contextlib.suppress(OSError):  # It has ended, and is asked why.
                worker.channel.send(request)
            while (message := worker.channel.receive()) is not None:
                if "protection" in message:
                    _log.info("compiling in a process of its own", **message)
                elif "stage" in message:
                    self._stage = str(message["stage"])
                    self._report(self._stage)
                elif "error" in message:
                    kind = _KINDS.get(str(message.get("kind")), ModelError)
                    raise kind(self._shown(message["error"]), self._shown(message.get("details", "")))
                elif "done" in message:
                    return message["done"]
        except GarbledError as error:
            raise ModelError(
                f"{self._model}: the compiling process said what it never says in stage {self._stage}, and was ended:"
                " something of the model or of a module of --import speaks for it"
            ) from error
        code = self._processes.reap(self._watch, worker)
        raise ModelError(f"{self._model}: {self._problem(code)}", worker.last_words())

    def end(self) -> None:
        """End the worker, and remove what is left of it."""
        if self._worker is not None:
            self._processes.reap(self._watch, self._worker)
            self._worker.forget()

    def _shown(self, text: object) -> str:
        """What a worker says, of the user's own files."""
        shown = str(text).replace(str(self._given), str(self._model))
        return shown if self._data is None else shown.replace(str(self._data[1]), str(self._data[0]))

    def _problem(self, code: int) -> str:
        """Why a process ended without an answer, and the way on."""
        match self._watch.exceeded:
            case "abandoned":
                return _ABANDONED
            case "memory":
                return (
                    f"compiling it must take at most {self.limits.memory_bytes} bytes of memory "
                    f"(--max-compile-memory-bytes); it took more in stage {self._stage} and was ended. Allow more, or "
                    "make the model smaller"
                )
            case "disk":
                return (
                    f"compiling it must write at most {self.limits.disk_bytes} bytes, twice --max-model-bytes and"
                    f" {MORE_BYTES}; it wrote more in stage {self._stage} and was ended"
                )
        if self._watch.exceeded == "time" or code == -signal.SIGXCPU:
            return (
                f"compiling it must take at most {self.limits.timeout_s:g} s (--compile-timeout-s); it was ended in "
                f"stage {self._stage}. Allow more time, or compile it on a faster machine of the same kind and take "
                "that one's --cache-dir"
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


class _Turns:
    """Whose turn it is: one caller's at a time, in the order in which they came. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: collections.deque[object] = collections.deque()

    @contextlib.contextmanager
    def next(
        self, waits: Callable[[], None] | None = None, look: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Wait for the turn, and have it for the block.

        Args:
            waits: called if it is not at once.
            look: called again and again while it waits; what it raises ends that.
        """
        ticket = object()
        with self._changed:
            self._line.append(ticket)
            is_first = self._line[0] is ticket
        try:
            if not is_first and waits is not None:
                waits()
            while not is_first:
                with self._changed:
                    self._changed.wait_for(lambda: self._line[0] is ticket, _WAIT_S if look else None)
                    is_first = self._line[0] is ticket
                if look is not None:
                    look()
            yield
        finally:
            with self._changed:
                self._line.remove(ticket)
                self._changed.notify_all()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[bool]:
        """Have the turn for the block if nobody has it; whether it is so."""
        with self._changed:
            is_free = not self._line
            ticket = object()
            if is_free:
                self._line.append(ticket)
        try:
            yield is_free
        finally:
            if is_free:
                with self._changed:
                    self._line.remove(ticket)
                    self._changed.notify_all()


def _named(program: Program, source: str) -> Program:
    """Return the program as that of this file: the same content may have been compiled under another name."""
    if program.provenance is None:
        return program
    return dataclasses.replace(program, provenance=dataclasses.replace(program.provenance, source=source))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
