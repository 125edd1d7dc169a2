"""A real Jupyter kernel and the actions of a front end: cells, the stop button, restarts."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import select
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

WAIT_S = 200.0
"""Only a hang takes this long."""


class CellFailedError(AssertionError):
    """A cell ended with an error that the test did not expect."""


@dataclasses.dataclass
class CellResult:
    """The output of a cell and the name of the error that ended it."""

    out: str = ""
    err: str = ""
    html: str = ""
    error: str = ""


class Notebook:
    """A kernel and its client."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        from jupyter_client.manager import KernelManager

        # not over TCP: Jupyter looks for free ports, and another may take one before the kernel does
        self._sockets = tempfile.mkdtemp(prefix="kernel-")  # whose names must be short
        self._manager: Any = KernelManager(kernel_name="python3", transport="ipc", ip=f"{self._sockets}/ipc")
        self._manager.start_kernel(cwd=str(folder), env={**os.environ, **env})
        self._client: Any = self._manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=WAIT_S)

    @property
    def pid(self) -> int:
        """Of the kernel."""
        pid: int = self._manager.provisioner.pid
        return pid

    def run(
        self,
        code: str,
        cell: str | None = None,
        fails: bool = False,
        at: Callable[[CellResult], bool] | None = None,
    ) -> CellResult:
        """Runs a cell to its end; presses the stop button when `at` says so of what it has printed.

        Args:
            code: The cell.
            cell: Its id, as JupyterLab sends it.
            fails: It is to end with an error.
            at: When to interrupt it.
        """
        session = self._client.session
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": False,
        }
        message = session.msg("execute_request", content, metadata={} if cell is None else {"cellId": cell})
        self._client.shell_channel.send(message)
        asked, ran = message["header"]["msg_id"], CellResult()
        while not self._read(asked, ran):
            if at is not None and at(ran):
                at = None
                self._manager.interrupt_kernel()
        # The next cell would be dropped if it came before the end of one that failed.
        while self._client.get_shell_msg(timeout=WAIT_S)["parent_header"].get("msg_id") != asked:
            pass
        if bool(ran.error) is not fails:
            raise CellFailedError(f"{code}\n{ran}")
        return ran

    def _read(self, asked: str, ran: CellResult) -> bool:
        """Takes one message of a cell; True after the last."""
        try:
            message = self._client.get_iopub_msg(timeout=WAIT_S)
        except queue.Empty:
            raise CellFailedError(f"a cell says nothing for {WAIT_S} s: {ran}") from None
        if message["parent_header"].get("msg_id") != asked:
            return False
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            if content["name"] == "stdout":
                ran.out += content["text"]
            else:
                ran.err += content["text"]
        elif kind in ("execute_result", "display_data"):
            ran.html += content["data"].get("text/html", "")
        elif kind == "error":
            ran.error = f"{content['ename']}: {content['evalue']}"
        return bool(kind == "status" and content["execution_state"] == "idle")

    def restart(self) -> None:
        """As the button does: the kernel is asked to end, and another is started."""
        self._manager.restart_kernel()
        self._client.wait_for_ready(timeout=WAIT_S)

    def kill(self) -> None:
        """Kills the kernel alone, as the system does when memory runs out."""
        os.kill(self.pid, signal.SIGKILL)

    def descendants(self) -> list[int]:
        """The processes that the kernel and its children have started."""
        return [child.pid for child in psutil.Process(self.pid).children(recursive=True)]

    def close(self) -> None:
        """Ends the kernel."""
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)
        self._manager.cleanup_resources()
        shutil.rmtree(self._sockets, ignore_errors=True)


@contextlib.contextmanager
def notebook(folder: Path, env: dict[str, str]) -> Iterator[Notebook]:
    """A kernel that runs in a folder."""
    running = Notebook(folder, env)
    try:
        yield running
    finally:
        running.close()


class Watched:
    """Processes whose end is waited for, whoever their parent is, and whether or not their number is used again."""

    def __init__(self, *pids: int) -> None:
        self._files = {pid: os.pidfd_open(pid) for pid in pids}

    def wait(self) -> None:
        """Until all have ended."""
        for pid, file in self._files.items():
            ended, _, _ = select.select([file], [], [], WAIT_S)
            assert ended, f"process {pid} goes on"
            os.close(file)
