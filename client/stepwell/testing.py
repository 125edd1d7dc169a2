"""A real server for tests and experiments, started and stopped by the program that uses it."""

from __future__ import annotations

import collections
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from stepwell import _install
from stepwell._base.ports import reserved
from stepwell.config import check_timeout
from stepwell.errors import InvalidInputError, ServerStartError

__all__ = ["LocalServer", "ServerStartError"]

_READY = re.compile(
    r"^stepwell: \w+ front\b(?:.*, HTTP on https?://(?P<http>\S+:\d+))?.*, listening on (?P<address>unix:\S+|\S+:\d+)\s*$"
)
_REFUSAL = re.compile(r"^stepwell: (?:error: )?(?P<reason>.+)$")
_MISSING = re.compile(r"No module named '?(?P<module>[\w.]+)'?$")
_LOG_LINES = 10_000
_GIVE_UP_S = 10.0
_SHOWN_LINES = 30

# Runs in the child before the server does: on Linux, asks to be killed when the thread that started it
# ends. argv: the parent's pid, then the command. Exec keeps the request, unlike a fork.
_LAUNCHER = """
import os, sys
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def serve_arguments(extra_args: object) -> list[str]:
    """Converts additional options of `stepwell serve` to strings.

    Raises:
        InvalidInputError: It is not a list, or an entry is not a string or path.
    """
    if isinstance(extra_args, Sequence) and not isinstance(extra_args, str | bytes):
        wrong = [one for one in extra_args if not isinstance(one, str | os.PathLike)]
        if not wrong:
            return [os.fsdecode(one) for one in extra_args]
        extra_args = wrong[0]
    raise InvalidInputError(f"extra_args must be a list of strings; got {extra_args!r}")


class LocalServer:
    """A `stepwell serve` in a process of its own, on a free port of 127.0.0.1.

    The server ends with the `with` block. On Linux it also ends when this process dies for any reason. It has a
    process group of its own: Ctrl-C and a notebook's stop button interrupt your program, and leave the server and its
    sessions alone. Call the methods from one thread at a time; the server itself serves any number of clients.

    Args:
        models: A mapping of names, or `NAME@VERSION`, to paths of `.keras`, `.onnx` or `.stepwell` files. `Client.load_model`
            loads more while the server runs.
        data_dir: Folder for the sessions. None: in memory, so that `kill` and `restart` lose them.
        extra_args: Additional options of `stepwell serve`.
        cache_dir: Folder for compiled models. None: the server's default.
        env: Additional environment variables.
        start_timeout_s: Time limit for the start, which includes compiling the models, in seconds.
        on_log: Called by `start` with each line that the server writes until it is ready.

    Raises:
        InvalidInputError: extra_args or start_timeout_s breaks a rule.

    Example:
        >>> from stepwell.testing import LocalServer
        >>> with LocalServer(models={"forecast": model_path}) as server:
        ...     with stepwell.connect(server.address) as client:
        ...         [model.name for model in client.models()]
        ['forecast']

        A crash, and back on the same port; with `data_dir`, with the same sessions:

        >>> server = LocalServer({"forecast": model_path})
        >>> server.start()
        >>> server.kill()
        -9
        >>> server.restart()
        >>> "listening on" in server.logs()
        True
        >>> server.stop()
        0
    """

    _popen: type[subprocess.Popen[str]] = subprocess.Popen

    def __init__(
        self,
        models: Mapping[str, str | os.PathLike[str]] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        extra_args: Sequence[str] = (),
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = 180.0,
        on_log: Callable[[str], object] | None = None,
    ) -> None:
        self._models = {name: os.fspath(path) for name, path in (models or {}).items()}
        self._store = ["--store", "memory"] if data_dir is None else ["--data-dir", os.fspath(data_dir)]
        self._extra_args = serve_arguments(extra_args)
        self._env = dict(env or {})
        if cache_dir is not None:
            self._env["STEPWELL_CACHE_DIR"] = os.fspath(cache_dir)
        self._start_timeout_s = check_timeout("start_timeout_s", start_timeout_s)
        self._on_log = on_log
        self._address: str | None = None
        self._http_address: str | None = None
        self._release: Callable[[], object] | None = None
        """Releases the server's port."""
        self._run: _Run | None = None

    @property
    def address(self) -> str:
        """The server's address, 127.0.0.1:PORT, also after a restart. On Linux no other program can take the port."""
        if self._address is None:
            raise ServerStartError(
                "the server must be started before it has an address; use `with` or start()"
            )
        return self._address

    @property
    def http_address(self) -> str | None:
        """The address of JSON over HTTP, 127.0.0.1:PORT; None if `extra_args` has no `--http-listen`."""
        return self._http_address

    @property
    def pid(self) -> int | None:
        """Id of the server's process; None if it is not running."""
        return None if self._run is None else self._run.pid

    def start(self) -> None:
        """Starts the server and waits until it is ready. A `with` block does this for you.

        Raises:
            ServerStartError: The server refused to start, or was not ready in time.
        """
        if self.pid is not None:
            raise ServerStartError(f"the server must be stopped before it is started; it runs as {self.pid}")
        # serves no metrics unless they are requested, because nobody would know their port
        environment = {"STEPWELL_METRICS_LISTEN": "off", **os.environ, **self._env}
        self._run = run = _Run(self._command(), environment, self._popen)
        try:
            run.start()
            ready = run.wait_ready(self._start_timeout_s, self._on_log)
        except BaseException:  # Ctrl-C: a server that nobody waits for must not keep running
            run.end(signal.SIGTERM, _GIVE_UP_S)
            raise
        if ready is None:
            running = run.exit_code is None
            run.end(signal.SIGKILL, None)
            if running:
                how = f"was not ready within {self._start_timeout_s:g} s"
            else:
                how = f"ended with exit code {run.exit_code}"
            refusal = run.refusal()
            why = f": {refusal}" if refusal else f"; its last log lines:\n{run.text(_SHOWN_LINES)}"
            raise ServerStartError(f"the server {how}{why}", refusal=refusal)
        self._address, self._http_address = ready["address"], ready["http"]

    def _command(self) -> list[str]:
        models = [f"{name}={path}" for name, path in self._models.items()]
        listen = ["--listen", self._address or self._new_address()]
        return [sys.executable, "-m", "stepwell_server", *models, *listen, *self._store, *self._extra_args]

    def _new_address(self) -> str:
        """Reserves a port until the `with` block ends or the object is collected."""
        if self._release is not None:
            self._release()
        held = reserved("127.0.0.1")
        if held is None:
            return "127.0.0.1:0"
        self._release = weakref.finalize(self, held.close)
        return f"127.0.0.1:{held.getsockname()[1]}"

    def stop(self, timeout_s: float = 30.0) -> int:
        """Asks the server to finish (SIGTERM) and waits for it.

        Args:
            timeout_s: How long to wait before killing it, in seconds.

        Returns:
            The exit code; negative if a signal ended the process.
        """
        return self._end(signal.SIGTERM, timeout_s)

    def kill(self) -> int:
        """Kills the server immediately (SIGKILL), like a crash.

        Returns:
            The exit code: -9 if the server was running.
        """
        return self._end(signal.SIGKILL, None)

    def _end(self, with_signal: signal.Signals, timeout_s: float | None) -> int:
        if self._run is None:
            raise ServerStartError("the server must be started before it is stopped")
        return self._run.end(with_signal, timeout_s)

    def restart(self) -> None:
        """Starts the server again on the same port with the same data. Stops it first if it is running.

        Raises:
            ServerStartError: The server refused to start, or was not ready in time.
        """
        if self.pid is not None:
            self.stop()
        self.start()

    def logs(self) -> str:
        """Returns the output of the current or last process, up to its last 10,000 lines."""
        return "" if self._run is None else self._run.text()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pid is not None:
            self.stop()
        if self._release is not None:
            self._release()


def _left_s(deadline: float) -> float:
    return min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)


class _Run:
    """One process of the server, and the thread that starts it and reads its output.

    The kernel ties the child to the thread that created it, not to the process. So the thread that lives as long as
    the child creates it.
    """

    def __init__(
        self, command: list[str], env: Mapping[str, str], popen: type[subprocess.Popen[str]]
    ) -> None:
        self._command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
        self._env = env
        self._popen = popen
        self._lines: collections.deque[str] = collections.deque(maxlen=_LOG_LINES)
        self._early: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._is_starting = True
        self._started = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="stepwell-local-server", daemon=True)

    def start(self) -> None:
        """Creates the process.

        Raises:
            ServerStartError: The system refuses to.
        """
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise ServerStartError(f"the server's process cannot be started: {self._failure}")

    def _serve(self) -> None:
        try:
            self._process = self._popen(
                self._command,
                env=dict(self._env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that Ctrl-C in a terminal or a notebook does not reach it
            )
        except Exception as error:  # raised by `start`; in this thread nobody would see it
            self._failure = error
            return
        finally:
            self._started.set()
        self._read(self._process)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._lines.append(line)
                if self._is_starting:
                    self._early.put(line)
        process.wait()
        self._early.put(None)

    def wait_ready(self, timeout_s: float, on_log: Callable[[str], object] | None) -> re.Match[str] | None:
        """Returns the server's ready line, or None if the server ended or took too long.

        Passes on the lines until then, in this thread.
        """
        deadline = time.monotonic() + timeout_s
        try:
            while (line := self._early.get(timeout=_left_s(deadline))) is not None:
                if on_log is not None:
                    on_log(line.rstrip("\n"))
                if (ready := _READY.match(line)) is not None:
                    return ready
        except queue.Empty:
            pass
        finally:
            self._is_starting = False
        return None

    @property
    def pid(self) -> int | None:
        """Id of the process; None if it is not running."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def end(self, with_signal: signal.Signals, timeout_s: float | None) -> int:
        """Sends a signal, waits, and kills the process if it does not end in time."""
        if self._thread.ident is not None:
            self._started.wait()
        if self._process is None:
            return 1
        if self._process.poll() is None:
            self._process.send_signal(with_signal)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._thread.join()
        return self._process.wait()

    def text(self, last: int = 0) -> str:
        """Returns the output: its `last` lines, or all lines kept."""
        return "".join(tuple(self._lines)[-last:])

    def refusal(self) -> str:
        """Returns why the server did not start, from its last line; empty if that line does not tell."""
        lines = tuple(self._lines)
        last = lines[-1].rstrip() if lines else ""
        if (refusal := _REFUSAL.match(last)) is not None:
            return refusal["reason"]
        if (missing := _MISSING.search(last)) is not None:
            return f"serving needs a package that is not installed ({missing['module']}): {_install.advice(_install.SERVER)}"
        return ""
