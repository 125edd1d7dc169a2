"""The fork server: ``python -m stepwell_server.compile CONTROL FOLDER``, a process that is kept, so that TensorFlow is imported once.

It never sees a model. Each worker (`worker`) is a copy of it, made when it is asked for one on the socket CONTROL (see
`wire`), and gives up what may do harm before it looks at anything. So what one worker did another one does not meet,
and none of them waits for an import.

Only what starts no threads is imported here: a copy has none. TensorFlow starts its own when it first computes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import shutil
import signal
import socket
import sys
import warnings
from typing import Any

from stepwell_server.compile.host import worker
from stepwell_server.compile.host.wire import Channel

#: What workers need: to try compiled programs; and to compile, too.
_ALWAYS = ("stepwell_server.engine.executors.litert", "stepwell_server.engine.executors.trial")
_FRAMEWORKS = (
    "stepwell_server.compile.keras_file.sizes",
    "stepwell_server.compile.program.pipeline",
    "stepwell_server.compile.program.again",
    "stepwell_server.compile.probe.own_data",
)


def main() -> int:
    """Make workers until the server closes its side, or is gone; returns the exit code."""
    control = socket.socket(fileno=int(sys.argv[1]))
    os.dup2(2, 1)  # What others print is no message.
    server, this = _ForkServer(Channel(control)), os.getpid()
    try:
        return server.run()
    finally:
        if os.getpid() == this:
            server.end_all()
            shutil.rmtree(sys.argv[2], ignore_errors=True)  # The server, whose it is, may have been killed.


class _ForkServer:
    """The workers, by the numbers of their processes."""

    def __init__(self, control: Channel) -> None:
        self._control = control
        self._workers = set[int]()
        self._imported = set[str]()

    def run(self) -> int:
        """Do what is asked for; returns an exit code, which in a worker is that of the worker."""
        while (request := self._control.receive()) is not None:
            if "fork" in request:
                code = self._fork(request["fork"])
                if code is not None:
                    return code
            else:
                self._control.send({"status": self._reap(int(request["reap"]))})
        return 0

    def end_all(self) -> None:
        """End all workers."""
        for pid in list(self._workers):
            self._reap(pid)

    def _fork(self, terms: dict[str, Any]) -> int | None:
        """Make a worker. Returns None; in the worker, its exit code when its work is over."""
        channel, noise = self._control.files()
        self._import(_ALWAYS)
        if terms["frameworks"]:
            self._import(_FRAMEWORKS)
        this = os.getpid()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Of threads: those of NumPy's sums, which are made for it.
                pid = os.fork()
        except OSError as error:
            self._control.send({"problem": str(error.strerror)})
            return None
        if pid == 0:
            self._workers.clear()  # They are not its own.
            self._control.close()
            return worker.run(Channel(socket.socket(fileno=channel)), noise, terms, this)
        os.close(channel)
        os.close(noise)
        self._workers.add(pid)
        self._control.send({"pid": pid})
        return None

    def _import(self, modules: tuple[str, ...]) -> None:
        """Import modules before a worker is made that needs them.

        What cannot be imported fails in the worker again, which says so.
        """
        new = [module for module in modules if module not in self._imported]
        for module in new:
            self._imported.add(module)
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        if new:
            gc.collect()
            gc.freeze()  # Or looking for garbage would make a worker copy all that it shares.

    def _reap(self, pid: int) -> int:
        """End a worker and what it has started; returns its status, as `subprocess` has it."""
        if pid not in self._workers:
            return 0
        self._workers.discard(pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # It may not have a group of its own yet.
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
