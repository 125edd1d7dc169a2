"""The audit log: one JSON object a line, written by a thread, so that nobody waits for its disk.

What is to be written waits in a bounded queue. If it is full, the disk being slow or gone, events are dropped and
counted, and the next line that can be written says how many are missing; or calls are refused until there is room, as
the settings say. Lines are handed to the system one batch at a time and not flushed to the disk: a loss of power can
take the last second. The file is opened anew on request, so that it can be renamed away.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import queue
import stat
import sys
import threading
from pathlib import Path

from stepwell_server.logs import Log

_log = Log("audit")
MOST_WAITING = 16_384
"""Events. A line has some hundreds of bytes, or some thousands where it names sessions."""
_AT_ONCE = 512
_STOP, _REOPEN = object(), object()


class AuditError(Exception):
    """The file cannot be written. The message is one line for people."""


class AuditLog:
    """Writes events to a file. `write` is for any thread; the others for one."""

    def __init__(self, path: Path, most_waiting: int = MOST_WAITING) -> None:
        """Open the file, which is made with mode 0600 if it is not there; `-` is standard error.

        Raises:
            AuditError: it cannot be written.
        """
        self._path = path
        self._waiting: queue.Queue[object] = queue.Queue(most_waiting)
        self._counting = threading.Lock()
        self._must_turn = threading.Event()
        self._missing = 0
        """Events that no line has told of."""
        self.written = self.dropped = 0
        self._is_failing = False
        try:
            self._descriptor = self._open()
        except OSError as error:
            raise AuditError(f"{path} must be a file that can be written; {error.strerror}") from error
        self._thread = threading.Thread(target=self._run, name="stepwell-audit", daemon=True)
        self._thread.start()

    @property
    def is_full(self) -> bool:
        """The next event would be dropped."""
        return self._waiting.full()

    def write(self, event: dict[str, object]) -> None:
        """Have an event written, with the time that it is now. Never blocks."""
        moment = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"
        try:
            self._waiting.put_nowait({"time": moment, **event})
        except queue.Full:
            self._drop(1)

    def reopen(self) -> None:
        """Go on in a file of the same name: the one that is open may have been renamed. Never blocks."""
        try:
            self._waiting.put_nowait(_REOPEN)
        except queue.Full:  # then it is after what is being written, and not after all that waits
            self._must_turn.set()

    def close(self) -> None:
        """Write what waits, and end. Blocks."""
        self._waiting.put(_STOP)
        self._thread.join()
        if self._descriptor > 2:
            os.close(self._descriptor)

    def _drop(self, count: int) -> None:
        with self._counting:
            self.dropped += count
            self._missing += count

    def _run(self) -> None:
        going_on = True
        while going_on:
            events: list[object] = [self._waiting.get()]
            while len(events) < _AT_ONCE and events[-1] not in (_STOP, _REOPEN):
                try:
                    events.append(self._waiting.get_nowait())
                except queue.Empty:
                    break
            last = events[-1]
            if last in (_STOP, _REOPEN):
                events.pop()
            self._put(events)
            going_on = last is not _STOP
            if last is _REOPEN or self._must_turn.is_set():
                self._must_turn.clear()
                self._turn()

    def _put(self, events: list[object]) -> None:
        with self._counting:
            missing, self._missing = self._missing, 0
        told: list[object] = [{"action": "missing", "who": "server", "count": missing}] if missing else []
        if not events and not told:
            return
        data = "".join(f"{json.dumps(event, default=str)}\n" for event in [*told, *events]).encode()
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            self._drop(len(events))
            with self._counting:
                self._missing += missing
            if not self._is_failing:
                _log.error("the audit log cannot be written", path=str(self._path), reason=error.strerror)
            self._is_failing = True
            return
        self.written += len(events)
        if self._is_failing:
            _log.info("the audit log can be written again", path=str(self._path))
        self._is_failing = False

    def _turn(self) -> None:
        try:
            descriptor = self._open()
        except OSError as error:
            _log.error(
                "the audit log could not be opened anew, the old file goes on",
                path=str(self._path),
                reason=error.strerror,
            )
            return
        if self._descriptor > 2:
            os.close(self._descriptor)
        self._descriptor = descriptor

    def _open(self) -> int:
        if str(self._path) == "-":
            return sys.stderr.fileno()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._path, flags, 0o600)
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode) and mode & 0o077:
            _log.warning("the audit log was open to other users, and is closed to them", path=str(self._path))
            os.fchmod(descriptor, 0o600)
        return descriptor
