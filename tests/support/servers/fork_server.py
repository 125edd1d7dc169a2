"""Servers of tests as forks of one process that has imported their modules: importing them is most of a start.

A fork is a process as any other: a child of this one, with its own id, ports, files, signals and end. Whole runs use
forks, except soaks. Tests of the start itself use `subprocess`.

Run as a program, this is the process that forks. It imports only modules that start no threads, because a fork has none.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepwell.testing import _LAUNCHER, LocalServer

_PROGRAM = "stepwell_server"
_MODULES = (
    "stepwell.cli",
    "stepwell_server.cli.serve",
    "stepwell_server.app",
    "stepwell_server.engine.executors.litert",
    "uvloop",
)
_NATIVE_FRONT = "stepwell_server.rpc.fronts.native"
#: Beginnings of the names of variables that modules, libraries or Python itself read when they are loaded.
_READ_EARLY = ("PYTHON", "LD_", "LC_", "LANG", "TZ", "MALLOC_", "OPENBLAS_", "OMP_")
_PR_SET_CHILD_SUBREAPER = 36
_MAX_BYTES = 1 << 17
_LOCK = threading.Lock()
_is_on = False


def switch_on() -> None:
    """From now on `Process` forks."""
    global _is_on  # noqa: PLW0603
    _is_on = sys.platform == "linux"


class Process(subprocess.Popen[str]):
    """A program as `subprocess.Popen` starts it; a server as a fork, if the switch is on and nothing prevents it."""

    def _execute_child(self, args: Sequence[str], *others: Any) -> None:
        # As `subprocess` calls it; its own method starts the program.
        _executable, preexec_fn, _close_fds, pass_fds, cwd, env, _info, _flags, shell, *rest = others
        *pipes, _restore, gid, gids, uid, umask, new_session, process_group = rest
        special = (preexec_fn, pass_fds, cwd, shell, gid, gids, uid)
        this: Any = self
        program = _program(args)
        if any(special) or umask != -1 or process_group != -1 or not program or not _fits(env):
            super()._execute_child(args, *others)  # type: ignore[misc]
            return
        given = [pipe if pipe != -1 else number for number, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
        self.pid = _fork_server().start(program, env, given, new_session=new_session)
        this._child_created = True
        this._close_pipe_fds(*pipes)


class ForkedServer(LocalServer):
    """A `LocalServer` that forks, where the start itself is not what a test is about."""

    _popen = Process


def _program(command: Sequence[str]) -> list[str]:
    """The arguments of Python that start a server as users do, alone or tied to this process as `LocalServer` does it.

    Nothing else is forked: a script may replace what modules take from each other when they are imported, and a wrapper
    may change what the process sees.
    """
    tied = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
    own = list(command[len(tied) :] if list(command[: len(tied)]) == tied else command)
    return own[1:] if own[:3] == [sys.executable, "-m", _PROGRAM] else []


def _fits(environment: Mapping[str, str] | None) -> bool:
    """Whether a process with this environment would have imported its modules in the same way."""
    found = os.environ if environment is None else environment
    return _is_on and _read_early(found) == _fork_server().read_early


def _read_early(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_EARLY)}


class _ForkServer:
    """The process that forks."""

    def __init__(self) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        self.read_early = _read_early(environment)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        atexit.register(self._end)

    def start(
        self,
        program: Sequence[str],
        environment: Mapping[str, str] | None,
        descriptors: Sequence[int],
        *,
        new_session: bool,
    ) -> int:
        """Start a program with these three descriptors; its process id."""
        terms = {
            "program": program,
            "environment": dict(os.environ if environment is None else environment),
            "new_session": new_session,
            "folder": os.getcwd(),
        }
        with _LOCK, _adopting():
            socket.send_fds(self._control, [json.dumps(terms).encode()], descriptors)
            answer = self._control.recv(_MAX_BYTES)
        assert answer, "the process that forks has ended"
        return int(answer)

    def _end(self) -> None:
        self._control.close()
        self._process.wait()


def _fork_server() -> _ForkServer:
    with _LOCK:  # tests start replicas in threads
        return _started()


@functools.cache
def _started() -> _ForkServer:
    return _ForkServer()


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """In this block a process whose parent ends becomes a child of this one, which may then wait for it."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(_PR_SET_CHILD_SUBREAPER, 1) == 0
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork until the other end is closed. Returns the terms in a fork."""
    started = list[int]()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, _MAX_BYTES, 3)
        if not message:
            break
        read, write = os.pipe()
        if (between := os.fork()) == 0:
            parent = os.getpid()
            if (pid := os.fork()) == 0:
                while os.getppid() == parent:
                    os.sched_yield()
                for number, descriptor in enumerate(descriptors):
                    os.dup2(descriptor, number)
                os.closerange(len(descriptors), max(map(int, os.listdir("/proc/self/fd"))) + 1)
                control.detach()
                return dict(json.loads(message))
            os.write(write, str(pid).encode())
            os._exit(0)
        os.close(write)
        pid = int(os.read(read, 16))
        # Nobody has waited for it yet, so the id is still its own.
        started.append(os.pidfd_open(pid))
        os.waitpid(between, 0)
        for descriptor in (read, *descriptors):
            os.close(descriptor)
        control.send(str(pid).encode())
    for descriptor in started:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    return None


def _run(terms: Mapping[str, Any]) -> None:
    """Run a program as Python would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # What the old ones know of their files is about others.
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    if terms["new_session"]:
        os.setsid()
    os.chdir(terms["folder"])
    os.environ.clear()
    os.environ.update(terms["environment"])
    sys.path[0], sys.argv = terms["folder"], terms["program"][1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def main() -> None:
    """Fork, or run in a fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, and they end this process
    for module in _MODULES:
        importlib.import_module(module)
    with contextlib.suppress(ImportError):
        importlib.import_module(_NATIVE_FRONT)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a module has started a thread"
    gc.collect()
    gc.freeze()  # otherwise garbage collection in a fork would copy all shared memory
    if (terms := _serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        _run(terms)


if __name__ == "__main__":
    main()
