"""One call of the compiler, executed by a worker, and the errors if the worker does not answer."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from stepwell_server.clock import Clock
from stepwell_server.compile.errors import REPORT, DataError, ModelError, NotCausalError
from stepwell_server.compile.host.limits import MORE_BYTES, Limit, Limits, disk_of, memory_of
from stepwell_server.compile.host.processes import ForkServer, ForkServerError, Worker
from stepwell_server.compile.host.source import Source, opened
from stepwell_server.compile.host.wire import GarbledError
from stepwell_server.logs import Log
from stepwell_server.program import ProofOptions

Progress = Callable[[str], None]
ABANDONED = "it was cancelled: no caller is waiting for it"
_KINDS: dict[str, type[ModelError]] = {kind.__name__: kind for kind in (DataError, NotCausalError)}
_log = Log("compile")
_CHECKS_PER_DISK_CHECK = 10


@dataclasses.dataclass(frozen=True)
class Call:
    """A model to compile, test or compare, with options."""

    model: Path
    report: Progress
    limits: Limits
    closing: threading.Event
    """Set when the compiler closes."""
    options: ProofOptions = dataclasses.field(default_factory=ProofOptions)
    data: Path | None = None
    keep: bool = False

    @property
    def is_abandoned(self) -> bool:
        """Whether no caller is waiting for it."""
        abandoned = self.limits.abandoned
        return self.closing.is_set() or (abandoned is not None and abandoned.is_set())


class _ExceededError(Exception):
    """A limit is exceeded."""


class Job:
    """One call and the worker that executes it within its limits. A context manager that ends the worker."""

    def __init__(self, call: Call, server: ForkServer, clock: Clock) -> None:
        """The time limit starts now."""
        self._call = call
        self._server = server
        self._clock = clock
        self._began = clock.monotonic()
        self._checks = 0
        self._worker: Worker | None = None
        self._given: Path | None = None
        """The copy of the model."""
        self._data: tuple[Path, Path] | None = None
        """The user's own sequences, and the copy of them."""
        self._stage = "load"
        self.exceeded: Limit | None = None
        """The exceeded limit because of which the worker was ended."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        if self._worker is not None:
            self._server.forget(self._worker)

    def fork(self, *, frameworks: bool, imports: Sequence[str] = ()) -> Worker:
        """Fork a worker, which ends with this job; with ``imports`` it may read all files, because modules may.

        Raises:
            ModelError: the worker cannot be started.
        """
        terms = {
            "frameworks": frameworks,
            "disk_bytes": self._call.limits.disk_bytes,
            "imports": imports,
            "cwd": os.getcwd() if imports else "",
        }
        try:
            self._worker = self._server.fork(terms, self._check)
        except ForkServerError as error:
            problem = (
                f"the compiling process cannot be started: {error}"
                if error.code is None
                else self._problem(error.code)
            )
            raise ModelError(f"{self._call.model}: {problem}", error.details) from error
        except _ExceededError as error:
            raise ModelError(f"{self._call.model}: {self._problem(0)}") from error
        self._call.report(self._stage)
        return self._worker

    def adopt(self, worker: Worker) -> None:
        """Continue with a worker that another job has released."""
        self._worker = worker
        self._call.report(self._stage)

    def release(self, worker: Worker) -> None:
        """Keep the worker beyond this job."""
        worker.clear()
        self._worker = None

    def give(self, worker: Worker, source: Source) -> Path:
        """Give a worker its copy of the model; return the path of the copy.

        Raises:
            ModelError: the file was changed meanwhile, or cannot be copied.
        """
        self._given = worker.given / "model" / self._call.model.name
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
            with opened(data) as source:
                source.copy(copy)
        except ModelError as error:
            raise DataError(str(error)) from error
        self._data = data, copy

    def ask(self, worker: Worker, **job: Any) -> Any:
        """Send a job to a worker; returns its result.

        Raises:
            DataError: the data do not fit.
            ModelError: the model cannot be served, or the worker ended without an answer.
        """
        request = {
            "model": str(self._given),
            "data": str(self._data[1]) if self._data is not None else "",
            "max_model_bytes": self._call.limits.model_bytes,
            "timeout_s": self._call.limits.timeout_s,
            **job,
        }
        try:
            with contextlib.suppress(OSError):  # The worker has ended, which `receive` detects.
                worker.channel.send(request)
            while (message := worker.channel.receive(self._check)) is not None:
                if "protection" in message:
                    protection, missing = str(message["protection"]), str(message.get("missing", ""))
                    _log.info("compiling in a separate process", protection=protection, missing=missing)
                elif "stage" in message:
                    self._stage = str(message["stage"])
                    self._call.report(self._stage)
                elif "error" in message:
                    kind = _KINDS.get(str(message.get("kind")), ModelError)
                    raise kind(self._shown(message["error"]), self._shown(message.get("details", "")))
                elif "done" in message:
                    return message["done"]
        except GarbledError as error:
            raise ModelError(
                f"{self._call.model}: the compiling process sent an invalid message in stage {self._stage} and was ended:"
                " code of the model or of a module of --import writes to its channel"
            ) from error
        except _ExceededError:
            pass
        code = self._server.reap(worker)
        raise ModelError(f"{self._call.model}: {self._problem(code)}", worker.last_words())

    def _check(self) -> None:
        """Check the limits of the process."""
        worker = self._worker
        pid, folder = (self._server.pid, None) if worker is None else (worker.pid, worker.home)
        self.exceeded = self._limit_exceeded_by(pid or 0, folder)
        if self.exceeded is not None:
            raise _ExceededError

    def _limit_exceeded_by(self, pid: int, folder: Path | None) -> Limit | None:
        limits = self._call.limits
        self._checks += 1
        if self._call.is_abandoned:
            return "abandoned"
        if 0 < limits.timeout_s < self._clock.monotonic() - self._began:
            return "time"
        if memory_of(pid) > limits.memory_bytes:
            return "memory"
        if folder is None or self._checks % _CHECKS_PER_DISK_CHECK:
            return None
        return "disk" if disk_of(pid, folder, limits.disk_bytes) > limits.disk_bytes else None

    def _shown(self, text: object) -> str:
        """Replace the names of the copies in a worker's text by those of the user's files."""
        shown = str(text).replace(str(self._given), str(self._call.model))
        return shown if self._data is None else shown.replace(str(self._data[1]), str(self._data[0]))

    def _problem(self, code: int) -> str:
        """Explain why a process ended without an answer, and what to do."""
        match self.exceeded:
            case "abandoned":
                return ABANDONED
            case "memory":
                return (
                    f"compiling it must take at most {self._call.limits.memory_bytes} bytes of memory "
                    f"(--max-compile-memory-bytes); it took more in stage {self._stage} and was ended. Allow more, or "
                    "make the model smaller"
                )
            case "disk":
                return (
                    f"compiling it must write at most {self._call.limits.disk_bytes} bytes, twice --max-model-bytes and"
                    f" {MORE_BYTES}; it wrote more in stage {self._stage} and was ended"
                )
        if self.exceeded == "time" or code == -signal.SIGXCPU:
            return (
                f"compiling it must take at most {self._call.limits.timeout_s:g} s (--compile-timeout-s); it was ended in "
                f"stage {self._stage}. Allow more time, or compile it on a faster machine of the same kind and use "
                "its --cache-dir"
            )
        if code == -signal.SIGKILL:
            return (
                f"the compiling process was killed in stage {self._stage} (SIGKILL), as the system does "
                "when memory runs out. Give it more memory, or set --max-compile-memory-bytes below the system's memory"
            )
        if code < 0:
            return (
                f"the compiler crashed on this model in stage {self._stage} ({_signal_name(-code)}): a defect in "
                f"TensorFlow or in a module of --import, not in the model. {REPORT}"
            )
        return (
            f"the compiling process ended without an answer in stage {self._stage} (exit code {code}). Does a module "
            f"of --import exit? If not: {REPORT}"
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
