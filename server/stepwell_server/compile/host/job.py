"""What a worker is asked to do with one model, and what is told of it, also where there is no answer."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stepwell_server.compile.errors import REPORT, DataError, ModelError, NotCausalError
from stepwell_server.compile.host.limits import MORE_BYTES, Limit, Limits, Watch
from stepwell_server.compile.host.processes import EndedError, Processes, Worker
from stepwell_server.compile.host.source import Source, opened
from stepwell_server.compile.host.wire import GarbledError
from stepwell_server.logs import Log
from stepwell_server.program import ProofOptions

Progress = Callable[[str], None]
ABANDONED = "nobody waits for it any more"
_KINDS: dict[str, type[ModelError]] = {kind.__name__: kind for kind in (DataError, NotCausalError)}
_log = Log("compile")


@dataclasses.dataclass(frozen=True)
class Call:
    """What somebody wants."""

    model: Path
    report: Progress
    limits: Limits
    options: ProofOptions = dataclasses.field(default_factory=ProofOptions)
    data: Path | None = None
    keep: bool = False


class Job:
    """One turn: a model, and the worker that is at it."""

    def __init__(self, processes: Processes, call: Call, watch: Watch) -> None:
        self._processes = processes
        self._model = call.model
        self._report = call.report
        self._limits = call.limits
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
            "disk_bytes": self._limits.disk_bytes,
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

    def adopt(self, worker: Worker) -> None:
        """Go on with a worker that was let go."""
        self._worker = worker
        self._watch.look_at(worker.pid, worker.home)
        self._report(self._stage)

    def let_go(self) -> None:
        """Keep the worker beyond this job."""
        self._watch.look_at(None)
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.clear()

    @property
    def exceeded(self) -> Limit | None:
        """The limit for which the worker was ended."""
        return self._watch.exceeded

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
            with opened(data) as source:
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
            "max_model_bytes": self._limits.model_bytes,
            "timeout_s": self._limits.timeout_s,
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
        self._watch.look_at(None)
        code = self._processes.reap(worker)
        raise ModelError(f"{self._model}: {self._problem(code)}", worker.last_words())

    def end(self) -> None:
        """End the worker, and remove what is left of it."""
        self._watch.look_at(None)
        if self._worker is not None:
            self._processes.forget(self._worker)

    def _shown(self, text: object) -> str:
        """What a worker says, of the user's own files."""
        shown = str(text).replace(str(self._given), str(self._model))
        return shown if self._data is None else shown.replace(str(self._data[1]), str(self._data[0]))

    def _problem(self, code: int) -> str:
        """Why a process ended without an answer, and the way on."""
        match self._watch.exceeded:
            case "abandoned":
                return ABANDONED
            case "memory":
                return (
                    f"compiling it must take at most {self._limits.memory_bytes} bytes of memory "
                    f"(--max-compile-memory-bytes); it took more in stage {self._stage} and was ended. Allow more, or "
                    "make the model smaller"
                )
            case "disk":
                return (
                    f"compiling it must write at most {self._limits.disk_bytes} bytes, twice --max-model-bytes and"
                    f" {MORE_BYTES}; it wrote more in stage {self._stage} and was ended"
                )
        if self._watch.exceeded == "time" or code == -signal.SIGXCPU:
            return (
                f"compiling it must take at most {self._limits.timeout_s:g} s (--compile-timeout-s); it was ended in "
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


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
