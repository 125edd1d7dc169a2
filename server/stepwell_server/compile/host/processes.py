"""The fork server and its workers as the server has them. Imports no framework."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import stepwell_server
from stepwell_server.compile.host import limits
from stepwell_server.compile.host.wire import Channel, GarbledError

_DETAIL_LINES = 40
#: Variables of the environment that say how Python, its libraries and the language work, and nothing of anybody's.
_PASSED = frozenset(["LANG", "LANGUAGE", "LD_LIBRARY_PATH", "PATH", "SOURCE_DATE_EPOCH", "TZ", "VIRTUAL_ENV"])
_PASSED_PREFIXES = ("COVERAGE_", "KMP_", "LC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "TF_", "XLA_")


class EndedError(Exception):
    """The fork server has ended, or cannot make a worker."""

    def __init__(self, code: int | None, details: str, problem: str = "") -> None:
        super().__init__(problem)
        self.code = code
        """Its exit code, as `subprocess` has it; None if it goes on."""
        self.details = details
        self.problem = problem
        """Why there is no worker, where the system says so."""


@dataclasses.dataclass
class Worker:
    """One worker, and the folder that is its own. For one thread at a time."""

    pid: int
    channel: Channel
    noise: IO[bytes]
    folder: Path

    @property
    def home(self) -> Path:
        """What it may write. Whatever is in there may be a trap: see `taken`."""
        return self.folder / "home"

    @property
    def given(self) -> Path:
        """What it may read, and not write."""
        return self.folder / "given"

    def take(self, name: str, target: Path) -> None:
        """Copy a plain file that it has written to ``target``, and remove it.

        Raises:
            OSError: it is none, or cannot be copied.
        """
        source = self.home / name
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file, target.open("xb") as copy:
            shutil.copyfileobj(file, copy)
        source.unlink()

    def clear(self) -> None:
        """Remove what it was given, and what it has printed."""
        os.ftruncate(self.noise.fileno(), 0)
        for name in os.listdir(self.given):
            shutil.rmtree(self.given / name)

    def last_words(self) -> str:
        """The end of what it has printed."""
        return last_lines(self.noise)

    def forget(self) -> None:
        """Close and remove all that there is of it here. Idempotent."""
        self.channel.close()
        self.noise.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class ForkServer:
    """The process that makes workers: `fork_server`. For one thread at a time.

    It ends when `end` is called, and by itself when this process has ended, however that was; its workers end with it.
    """

    def __init__(self) -> None:
        """Start it.

        Raises:
            OSError: it cannot be started.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="stepwell-compile-", ignore_cleanup_errors=True)
        self._noise = _noise()
        self._made = 0
        ours, theirs = socket.socketpair()
        self._control = Channel(ours)
        # -P: what lies in the current folder is no module unless --import names it.
        command = [sys.executable, "-P", "-m", "stepwell_server.compile.host.fork_server"]
        command += [str(theirs.fileno()), self._folder.name]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._noise,
                    env=_environment(self._folder.name),
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        except BaseException:
            self._close()
            raise

    @property
    def pid(self) -> int:
        """Number of its process."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """It was ended by others."""
        # Without waiting for it: until `end`, nobody else can have its number.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def fork(self, terms: Mapping[str, Any]) -> Worker:
        """Make a worker, once what it needs is imported.

        Args:
            terms: see `worker.run`; its folders are added here.

        Raises:
            EndedError: it cannot be made.
            OSError: its folder cannot be made.
        """
        self._made += 1
        folder = Path(self._folder.name, str(self._made))
        ours, theirs = socket.socketpair()
        worker = Worker(0, Channel(ours), _noise(), folder)
        try:
            with theirs:
                worker.home.mkdir(parents=True)
                worker.given.mkdir()
                wanted = {**terms, "home": str(worker.home), "given": str(worker.given)}
                said = self._ask({"fork": wanted}, theirs.fileno(), worker.noise.fileno())
            if "problem" in said:
                raise EndedError(None, "", str(said["problem"]))
        except BaseException:
            worker.forget()
            raise
        worker.pid = int(said["pid"])
        return worker

    def reap(self, worker: Worker) -> int:
        """End a worker, if it has not; returns its exit code as `subprocess` has it.

        Raises:
            EndedError: the fork server has ended, and the worker with it.
        """
        return int(self._ask({"reap": worker.pid})["status"])

    def end(self) -> int:
        """End it and its workers; returns its exit code as `subprocess` has it."""
        if self._process.returncode is None:
            # What it has started, too. Until it is waited for, nobody else can have its number.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._close()
        return int(self._process.returncode)

    def _ask(self, request: Mapping[str, Any], *files: int) -> dict[str, Any]:
        try:
            self._control.send(request, files)
            said = self._control.receive()
        except (OSError, GarbledError):
            said = None
        if said is None:
            details = "" if self._noise.closed else last_lines(self._noise)
            raise EndedError(self.end(), details)
        return said

    def _close(self) -> None:
        self._control.close()
        self._noise.close()
        self._folder.cleanup()


class Processes:
    """The fork server, as long as it is needed. For one thread at a time, but for `pids`."""

    def __init__(self) -> None:
        """No process is started."""
        self._server: ForkServer | None = None

    @property
    def pids(self) -> list[int]:
        """Numbers of the processes that are kept."""
        server = self._server
        return [] if server is None else [server.pid]

    def fork(self, watch: limits.Watch, terms: Mapping[str, Any]) -> Worker:
        """Have a worker made, and watched; the fork server is started if there is none.

        Args:
            watch: ends whichever of them takes too much.
            terms: see `worker.run`.

        Raises:
            EndedError: it cannot be made.
        """
        try:
            if self._server is not None and self._server.has_ended:  # Somebody has killed it: nobody's model.
                self.end()
            if self._server is None:
                self._server = ForkServer()
            watch.look_at(self._server.pid)
            worker = self._server.fork(terms)
        except OSError as error:
            raise EndedError(None, "", str(error.strerror)) from error
        except EndedError as error:
            if error.code is not None:
                watch.look_at(None)
                self._server = None
            raise
        watch.look_at(worker.pid, worker.home)
        return worker

    def forget(self, worker: Worker) -> None:
        """End a worker, and remove what is left of it."""
        self.reap(worker)
        worker.forget()

    def reap(self, worker: Worker) -> int:
        """End a worker that is not watched any more; returns its exit code as `subprocess` has it.

        Or that of the fork server, if that has ended, and the worker with it.
        """
        if self._server is None:
            return 0
        try:
            return self._server.reap(worker)
        except EndedError as error:
            self._server = None
            return error.code or 0

    def end(self) -> None:
        """End all that there is. Idempotent."""
        if self._server is not None:
            self._server.end()
            self._server = None


def _noise() -> IO[bytes]:
    """A file without a name for what a process prints; what is printed goes to its end, also if it is cut meanwhile."""
    return tempfile.TemporaryFile("a+b")


def last_lines(noise: IO[bytes]) -> str:
    """The end of what was printed into a file, as text."""
    size = os.fstat(noise.fileno()).st_size
    read = os.pread(noise.fileno(), limits.DETAIL_BYTES, max(0, size - limits.DETAIL_BYTES))
    return "\n".join(read.decode(errors="replace").strip().splitlines()[-_DETAIL_LINES:])


def _environment(folder: str) -> dict[str, str]:
    """What the processes are told: no tokens, keys or passwords that the server's own environment may have.

    They find this very package, installed or not, and the caller's modules. What they write goes into folders of their
    own.
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
