"""The fork server: ``python -m stepwell_server.compile.host.fork_server CONTROL FOLDER``, which imports TensorFlow once.

It never reads a model. Each worker (`worker`) is a fork of it, created on request over the connection CONTROL, and
enters the sandbox before it reads anything. So workers do not affect each other, and none waits for an import.

Requests are ``{"fork": terms}``, followed by the worker's ends of its channel and its log, answered by ``{"pid": ...}``
or ``{"problem": ...}``; and ``{"reap": pid}``, which ends a worker, answered by ``{"status": ...}``.

It imports only modules that start no threads, because a fork has none. TensorFlow starts its threads at the first
computation.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import warnings
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

from stepwell_server.compile.host import worker
from stepwell_server.compile.host.wire import Channel

#: Modules that workers need to test compiled programs, and those to compile.
_ALWAYS = ("stepwell_server.engine.executors.litert", "stepwell_server.engine.executors.trial")
_FRAMEWORKS = (
    "stepwell_server.compile.keras_file.sizes",
    "stepwell_server.compile.program.pipeline",
    "stepwell_server.compile.program.recompile",
    "stepwell_server.compile.probe.own_data",
)


def main() -> int:
    """Fork workers until the server closes its end or ends; return the exit code."""
    server, this = _ForkServer(Connection(int(sys.argv[1]))), os.getpid()
    try:
        return server.run()
    finally:
        if os.getpid() == this:
            server.end_all()
            shutil.rmtree(sys.argv[2], ignore_errors=True)  # Its owner, the server, may have been killed.


class _ForkServer:
    """The workers, by process id."""

    def __init__(self, control: Connection) -> None:
        self._control = control
        self._workers = set[int]()
        self._imported = set[str]()

    def run(self) -> int:
        """Serve requests; return the exit code, in a worker that of the worker."""
        while (request := self._request()) is not None:
            if "reap" in request:
                self._answer({"status": self._reap(int(request["reap"]))})
            elif (code := self._fork(request["fork"])) is not None:
                return code
        return 0

    def _request(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self._control.recv_bytes()))
        except (EOFError, ConnectionError):
            return None

    def _answer(self, answer: dict[str, Any]) -> None:
        self._control.send_bytes(json.dumps(answer).encode())

    def end_all(self) -> None:
        """End all workers."""
        for pid in list(self._workers):
            self._reap(pid)

    def _fork(self, terms: dict[str, Any]) -> int | None:
        """Fork a worker. Returns None or, in the worker, its exit code at the end."""
        channel, log = recv_handle(self._control), recv_handle(self._control)
        self._import(_ALWAYS)
        if terms["frameworks"]:
            self._import(_FRAMEWORKS)
        this = os.getpid()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # The warning about threads does not apply: those of NumPy's BLAS support forks.
                pid = os.fork()
        except OSError as error:
            self._answer({"problem": str(error.strerror)})
            return None
        if pid == 0:
            self._workers.clear()  # They belong to the fork server.
            self._control.close()
            return worker.run(Channel(socket.socket(fileno=channel)), log, terms, this)
        os.close(channel)
        os.close(log)
        self._workers.add(pid)
        self._answer({"pid": pid})
        return None

    def _import(self, modules: tuple[str, ...]) -> None:
        """Import modules before a worker needs them. An import that fails here fails again in the worker, which reports it."""
        new = [module for module in modules if module not in self._imported]
        for module in new:
            self._imported.add(module)
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        if new:
            gc.collect()
            gc.freeze()  # Otherwise garbage collection in a worker would copy all shared memory.

    def _reap(self, pid: int) -> int:
        """End a worker and its processes; return its exit status in the form of `subprocess`."""
        if pid not in self._workers:
            return 0
        self._workers.discard(pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # It may not have its own process group yet.
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
