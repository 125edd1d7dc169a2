"""The fork server and its workers, as the server sees them. Imports no framework.

The fork server is not that of `multiprocessing`: that one inherits the server's environment with its secrets, gives every
worker a pipe to a process outside of the sandbox (the resource tracker), and lives as long as any worker does.
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
#: Variables of the environment that say how Python, its libraries and the language work, and nothing else.
_PASSED = frozenset(["LANG", "LANGUAGE", "LD_LIBRARY_PATH", "PATH", "SOURCE_DATE_EPOCH", "TZ", "VIRTUAL_ENV"])
_PASSED_PREFIXES = ("COVERAGE_", "KMP_", "LC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "TF_", "XLA_")


class ForkServerError(Exception):
    """The fork server has ended, or cannot make a worker."""

    def __init__(self, problem: str, code: int | None = None, details: str = "") -> None:
        super().__init__(problem)
        self.code = code
        """Its exit code, as `subprocess` has it; None if it continues."""
        self.details = details


@dataclasses.dataclass
class Worker:
    """One worker, and the folder that is its own. For one thread at a time."""

    folder: Path
    channel: Channel
    log: IO[bytes]
    """Has what it prints."""
    pid: int = 0

    @property
    def home(self) -> Path:
        """What it may write. Anything in there may be a trap: see `take`."""
        return self.folder / "home"

    @property
    def given(self) -> Path:
        """What it may read, and not write."""
        return self.folder / "given"

    def take(self, name: str, target: Path) -> None:
        """Copy a plain file that it has written to ``target``, and remove it.

        Raises:
            OSError: it is no plain file, or cannot be copied.
        """
        source = self.home / name
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file, target.open("xb") as copy:
            shutil.copyfileobj(file, copy)
        source.unlink()

    def clear(self) -> None:
        """Remove what it was given and what it has printed."""
        os.ftruncate(self.log.fileno(), 0)
        for entry in self.given.iterdir():
            shutil.rmtree(entry)

    def last_words(self) -> str:
        """The end of what it has printed."""
        return last_lines(self.log)

    def forget(self) -> None:
        """Close and remove all of it that is here. Idempotent."""
        self.channel.close()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _Running:
    """The process of a fork server, and what it shares with this one."""

    process: subprocess.Popen[bytes]
    control: Connection
    log: IO[bytes]
    folder: tempfile.TemporaryDirectory[str]


class ForkServer:
    """The process that makes workers (`fork_server`). For one thread at a time, but for `pid`.

    It starts when it is first needed, and again if it was killed. It ends when `end` is called, and by itself when this
    process ends, in whatever way; its workers end with it.
    """

    def __init__(self) -> None:
        """No process is started."""
        self._running: _Running | None = None
        self._made = 0

    @property
    def pid(self) -> int | None:
        """Number of its process, if there is one."""
        running = self._running
        return None if running is None else running.process.pid

    def fork(self, terms: Mapping[str, Any], check: Callable[[], None]) -> Worker:
        """Make a worker, after its modules are imported.

        Args:
            terms: see `worker.run`; its folders are added here.
            check: called many times in a second while this waits; what it raises ends the fork server.

        Raises:
            ForkServerError: the worker cannot be made.
        """
        # Without waiting for it: until `end`, no other process can have its number.
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
        """End a worker, if it has not ended; returns its exit code as `subprocess` has it.

        Where the fork server has ended, and the worker with it, it is that of the fork server.
        """
        try:
            return int(self._ask({"reap": worker.pid})["status"])
        except ForkServerError as error:
            return error.code or 0

    def forget(self, worker: Worker) -> None:
        """End a worker, if it has not ended, and remove all of it that is here."""
        self.reap(worker)
        worker.forget()

    def end(self) -> int:
        """End it and its workers; returns its exit code as `subprocess` has it. Idempotent."""
        running, self._running = self._running, None
        if running is None:
            return 0
        # The processes that it has started, too. Until it is waited for, no other process can have its number.
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
        except BaseException:  # Of `check`: the answer is not awaited any more.
            self.end()
            raise


def _started() -> _Running:
    from multiprocessing import Pipe  # Takes milliseconds, which servers without this process do not spend.

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
    """A file without a name for what a process prints. It appends, even if the file is cut meanwhile."""
    return tempfile.TemporaryFile("a+b")


def last_lines(log: IO[bytes]) -> str:
    """The end of what was printed into a file, as text."""
    size = os.fstat(log.fileno()).st_size
    read = os.pread(log.fileno(), DETAIL_BYTES, max(0, size - DETAIL_BYTES))
    return "\n".join(read.decode(errors="replace").strip().splitlines()[-_MAX_DETAIL_LINES:])


def _environment(folder: str) -> dict[str, str]:
    """The environment of the processes, without tokens, keys and passwords that the server's own may have.

    They find this very package, installed or not, and the caller's modules. What they write goes into folders of their
    own.
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
