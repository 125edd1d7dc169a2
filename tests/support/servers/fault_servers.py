"""Servers for fault tests: the real one, and one with something wrong with it, of the model that the checker replays."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from support.checks import history, linearizability
from support.checks.checker import Report, check
from support.checks.register import Loss, PermittedEvents
from support.checks.replay import LstmDense
from support.load.driver import MODEL
from support.secured import Server
from support.servers.server_process import forecast

_SCRIPT = Path(__file__).with_name("faulty_server.py")
_SMALL = Path(__file__).with_name("small_segments.py")
_CONTROL_S = 100.0
SMALL_BYTES = 8 * 1024
"""Of a segment that is full after some dozens of changes."""


@functools.cache
def replayed() -> LstmDense:
    """The model as the checker runs it."""
    return LstmDense.load(forecast().path)


def verdict(*histories: Path) -> Report:
    """The checker's verdict on the histories of drivers."""
    return check(history.load(histories), replayed())


_MAX_NODES = 3_000
"""Of a search in a history with losses: a session that needs more is not judged."""
SINCE, BEGINS, ENDS = "since", "begins", "ends"
"""Marks in a history, of each fail-over that may lose something: what was acknowledged before the first is safe."""


def verdict_of_losses(path: Path) -> Report:
    """What `linearizability` says of a history during which the store may have lost last writes: see the marks."""
    marks = [at for at, name in history.marks(path) if name in (SINCE, BEGINS, ENDS)]
    losses = [Loss(*marks[i : i + 3]) for i in range(0, len(marks), 3)]
    report = linearizability.check(
        history.load([path]), replayed(), PermittedEvents(losses=losses, most_nodes=_MAX_NODES)
    )
    judged = [each for each in report.violations if each.what != linearizability.TOO_MANY]
    report.unjudged += len(report.violations) - len(judged)
    report.violations = judged
    return report


def local(data_dir: Path | None, *extra: str, segment_bytes: int | None = None) -> Server:
    """The real server; `segment_bytes` makes its segments small."""
    if segment_bytes is None:
        return Server(**arguments(data_dir, extra))
    return SmallSegments(data_dir, *extra, segment_bytes=segment_bytes)


def arguments(data_dir: Path | None, extra: Sequence[str]) -> dict[str, Any]:
    kept = forecast()
    return {
        "models": {MODEL: kept.path},
        "data_dir": data_dir,
        "extra_args": ["--log-level", "warning", *extra],
        "cache_dir": kept.cache_dir,
        "start_timeout_s": 100,
    }


class SmallSegments(Server):
    """`small_segments.py` as a process."""

    def __init__(self, data_dir: Path | None, *extra: str, segment_bytes: int) -> None:
        super().__init__(**arguments(data_dir, extra))
        self._segment_bytes = segment_bytes

    def _command(self) -> list[str]:
        python, _, _, *arguments = super()._command()
        return [python, os.fspath(_SMALL), str(self._segment_bytes), *arguments]


class FaultyServer(Server):
    """`faulty_server.py` as a process, and the commands it takes. `defect` is one of its DEFECTS."""

    def __init__(self, data_dir: Path | None, *extra: str, defect: str = "none") -> None:
        super().__init__(**arguments(data_dir, extra))
        self._defect = defect
        self._jumped_s = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_CONTROL_S)
        self._control: socket.socket | None = None
        self._reader: TextIO | None = None
        self._unread: list[str] = []

    def start(self) -> None:
        """See `LocalServer`. It comes back without the faults, but the clock stays where it was."""
        super().start()
        self._hang_up()
        self._control, _ = self._listener.accept()
        self._control.settimeout(_CONTROL_S)
        self._reader = self._control.makefile()
        self._unread = []

    def tell(self, command: str) -> None:
        """Give a command, and wait until it is obeyed."""
        assert self._control is not None
        self._control.sendall(f"{command}\n".encode())
        self.wait_for("ok")
        if command.startswith("jump"):
            self._jumped_s += float(command.split()[1])

    def wait_for(self, word: str) -> None:
        """Wait until it says a word; what it says before is kept for later."""
        assert self._reader is not None
        while word not in self._unread:
            line = self._reader.readline()
            assert line, "the server has ended"
            self._unread.append(line.strip())
        self._unread.remove(word)

    def wait_for_end(self) -> int:
        """Wait until it ends by itself; its exit code."""
        assert self._reader is not None
        while self._reader.readline():
            pass
        return self.stop()

    def close(self) -> None:
        """Give the sockets back."""
        self._hang_up()
        self._listener.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.close()

    def _hang_up(self) -> None:
        if self._control is not None and self._reader is not None:
            self._reader.close()
            self._control.close()

    def _command(self) -> list[str]:
        python, _, _, *arguments = super()._command()
        host, port = self._listener.getsockname()
        own = [os.fspath(_SCRIPT), f"{host}:{port}", self._defect, str(self._jumped_s)]
        return [python, *own, *arguments]
