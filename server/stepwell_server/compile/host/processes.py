"""The fork server and its workers, as the server sees them. Imports no framework.

The fork server of `multiprocessing` is not used: it inherits the server's environment with its secrets, gives every
worker a pipe to a process outside the sandbox (the resource tracker), and lives as long as any worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import stepwell_server
from stepwell_server.compile.host.limits import DETAIL_BYTES
from stepwell_server.compile.host.wire import CHECK_INTERVAL_S, Channel

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_MODULE = "stepwell_server.compile.host.fork_server"
_MAX_DETAIL_LINES = 40
#: Environment variables that only configure Python, its libraries and the locale.
_PASSED = frozenset(["LANG", "LANGUAGE", "LD_LIBRARY_PATH", "PATH", "SOURCE_DATE_EPOCH", "TZ", "VIRTUAL_ENV"])
_PASSED_PREFIXES = ("COVERAGE_", "KMP_", "LC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "TF_", "XLA_")


class ForkServerError(Exception):
    """The fork server has ended, or cannot fork a worker."""

    def __init__(self, problem: str, code: int | None = None, details: str = "") -> None:
        super().__init__(problem)
        self.code = code
        """Its exit code in the form of `subprocess`; None if it is still running."""
        self.details = details


@dataclasses.dataclass
class Worker:
    """One worker and its folder. For one thread at a time."""

    folder: Path
    channel: Channel
    log: IO[bytes]
    """Its output."""
    pid: int = 0

    @property
    def home(self) -> Path:
        """The folder that it may write. Its content is not trusted: see `take`."""
        return self.folder / "home"

    @property
    def given(self) -> Path:
        """The folder that it may only read."""
        return self.folder / "given"

    def take(self, name: str, target: Path) -> None:
        """Copy a regular file that it has written to ``target``, and delete it.

        Raises:
            OSError: it is not a regular file, or cannot be copied.
        """
        source = self.home / name
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file, target.open("xb") as copy:
            shutil.copyfileobj(file, copy)
        source.unlink()

    def clear(self) -> None:
        """Delete its input files and its output."""
        os.ftruncate(self.log.fileno(), 0)
        for entry in self.given.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def last_words(self) -> str:
        """Return the end of its output."""
        return last_lines(self.log)

    def forget(self) -> None:
        """Close its channel and log, and delete its folder. Idempotent."""
        self.channel.close()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _Running:
    """The process of a fork server, and its connections and files."""

    process: subprocess.Popen[bytes]
    control: Connection
    log: IO[bytes]
    folder: tempfile.TemporaryDirectory[str]


class ForkServer:
    """The process that forks workers (`fork_server`). For one thread at a time, except `pid`.

    It starts when it is first needed, and again if it was killed. It ends with `end`, and when this process ends in any
    way; its workers end with it.
    """

    def __init__(self) -> None:
        """Starts no process."""
        self._running: _Running | None = None
        self._made = 0

    @property
    def pid(self) -> int | None:
        """Its process id, if it is running."""
        running = self._running
        return None if running is None else running.process.pid

    def fork(self, terms: Mapping[str, Any], check: Callable[[], None]) -> Worker:
        """Fork a worker, after importing its modules.

        Args:
            terms: see `worker.run`; its folders are added here.
            check: called many times per second while this waits; if it raises, the fork server is ended.

        Raises:
            ForkServerError: the worker cannot be forked.
        """
        # Without reaping it: until `end`, no other process can get its process id.
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        if self.pid is not None and os.waitid(os.P_PID, self.pid, ended) is not None:
            self.end()
        try:
            running = self._running = self._running or _started()
            self._made += 1
            ours, theirs = socket.socketpair()
            worker = Worker(Path(running.folder.name, str(self._made)), Channel(ours), _log_file())
            with theirs, contextlib.ExitStack() as failed:
                failed.callback(worker.forget)
                worker.home.mkdir(parents=True)
                worker.given.mkdir()
                folders = {"home": str(worker.home), "given": str(worker.given)}
                files = (theirs.fileno(), worker.log.fileno())
                answer = self._ask({"fork": {**terms, **folders}}, files, check)
                if "problem" in answer:
                    raise ForkServerError(str(answer["problem"]))
                worker.pid = int(answer["pid"])
                failed.pop_all()
                return worker
        except OSError as error:
            raise ForkServerError(str(error.strerror)) from error

    def reap(self, worker: Worker) -> int:
        """End a worker, if it is running; return its exit code in the form of `subprocess`.

        If the fork server has ended, and the worker with it, return the exit code of the fork server.
        """
        try:
            return int(self._ask({"reap": worker.pid})["status"])
        except ForkServerError as error:
            return error.code or 0

    def forget(self, worker: Worker) -> None:
        """End a worker, if it is running, and delete its files."""
        self.reap(worker)
        worker.forget()

    def end(self) -> int:
        """End the fork server and its workers; return its exit code in the form of `subprocess`. Idempotent."""
        running, self._running = self._running, None
        if running is None:
            return 0
        # Including the processes that it has started. Until it is reaped, no other process can get its id.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()
        running.control.close()
        running.log.close()
        running.folder.cleanup()
        return running.process.returncode

    def _ask(
        self, request: Mapping[str, Any], files: Sequence[int] = (), check: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        from multiprocessing.reduction import send_handle

        running = self._running
        if running is None:
            raise ForkServerError("it has ended", 0)
        try:
            running.control.send_bytes(json.dumps(request).encode())
            for file in files:
                send_handle(running.control, file, running.process.pid)
            while check is not None and not running.control.poll(CHECK_INTERVAL_S):
                check()
            return dict(json.loads(running.control.recv_bytes()))
        except (OSError, EOFError) as error:
            details = last_lines(running.log)
            raise ForkServerError("it has ended", self.end(), details) from error
        except BaseException:  # Raised by `check`: nobody waits for the answer any more.
            self.end()
            raise


def _started() -> _Running:
    from multiprocessing import Pipe  # Takes milliseconds, which servers without this process save.

    folder, log = (
        tempfile.TemporaryDirectory(prefix="stepwell-compile-", ignore_cleanup_errors=True),
        _log_file(),
    )
    control, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            # -P: modules in the current folder are not found unless --import names them.
            [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno()), folder.name],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(folder.name),
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    return _Running(process, control, log, folder)


def _log_file() -> IO[bytes]:
    """Return an unnamed file for the output of a process. Writes append, even after a truncation."""
    return tempfile.TemporaryFile("a+b")


def last_lines(log: IO[bytes]) -> str:
    """Return the end of a log file as text."""
    size = os.fstat(log.fileno()).st_size
    read = os.pread(log.fileno(), DETAIL_BYTES, max(0, size - DETAIL_BYTES))
    return "\n".join(read.decode(errors="replace").strip().splitlines()[-_MAX_DETAIL_LINES:])


def _environment(folder: str) -> dict[str, str]:
    """Return the environment of the processes, without the tokens, keys and passwords that the server's may contain.

    It makes them find this package, installed or not, and the caller's modules, and write to their own folders.
    """
    paths = [str(Path(stepwell_server.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED or name.startswith(_PASSED_PREFIXES)
    }
    return passed | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HOME": folder,
        "TMPDIR": folder,
        "HDF5_PLUGIN_PATH": folder,
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
