"""The audit log: one JSON object a line, written by a thread, so that nobody waits for its disk.

What is to be written waits in a bounded queue. What cannot be written is tried again every second, from the byte on
where it stopped. If the queue is full, the disk being slow, full or gone, events are dropped and counted, and the next
line that can be written says how many are missing; or calls are refused until there is room, as the settings say. Lines
are handed to the system one batch at a time and not flushed to the disk: a loss of power can take the last second. The
file is opened anew on request, so that it can be renamed away.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import queue
import stat
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from stepwell_server.errors import StartError
from stepwell_server.logs import Log

_log = Log("audit")
MAX_WAITING = 16_384
"""Events. A line has some hundreds of bytes, or some thousands where it names sessions."""
MAX_WAITING_BYTES = 16 << 20
"""Bytes of the lines that wait, those that are being written among them."""
MAX_LINE_BYTES = 32 << 10
"""Bytes of a line; one that would be longer names fewer sessions, and says so."""
_BATCH_BYTES = 1 << 20
_SHORT = 64
"""Characters that are left of each text where a line is too long without its lists, too."""
_AT_ONCE = 512
_RETRY_INTERVAL_S, _LAST_S = 1.0, 5.0
"""Time between two tries, and how long the end waits for the last one."""
_STOP, _REOPEN = object(), object()


class AuditLog:
    """Writes events to a file. `write` is for any thread; the others for one."""

    def __init__(self, path: Path, most_waiting: int = MAX_WAITING) -> None:
        """Open the file, which is made with mode 0600 if it is not there; `-` is standard error.

        Raises:
            StartError: it cannot be written.
        """
        self._path = path
        self._waiting: queue.Queue[object] = queue.Queue(most_waiting)
        self._counting = threading.Lock()
        self._waiting_bytes = 0
        self._missing = 0
        """Events that no line has told of."""
        self.written = self.dropped = 0
        self._is_failing = False
        self._is_stopping = self._must_turn = False
        self._nudge = threading.Event()
        """Something is to be done now by the thread, although it cannot write."""
        try:
            self._descriptor = self._open()
        except OSError as error:
            raise StartError(
                f"--audit-log: {path} must be a file that can be written; {error.strerror}"
            ) from error
        self._thread = threading.Thread(target=self._run, name="stepwell-audit", daemon=True)
        self._thread.start()

    @property
    def is_full(self) -> bool:
        """The next event would be dropped, or cannot be written now."""
        has_no_room = self._waiting_bytes > MAX_WAITING_BYTES - MAX_LINE_BYTES
        return has_no_room or self._waiting.full() or self._is_failing

    def write(self, event: Mapping[str, object]) -> None:
        """Have an event written, with the time that it is now. Never blocks."""
        moment = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"
        line = _line({"time": moment, **event})
        with self._counting:
            has_room = self._waiting_bytes + len(line) <= MAX_WAITING_BYTES
            self._waiting_bytes += len(line) if has_room else 0
        if not has_room:
            self._drop(1)
            return
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._release([line])
            self._drop(1)

    def reopen(self) -> None:
        """Go on in a file of the same name: the one that is open may have been renamed. Never blocks."""
        try:
            self._waiting.put_nowait(_REOPEN)
            is_queued = True
        except queue.Full:
            is_queued = False
        if self._is_failing or not is_queued:
            self._must_turn = True
            self._nudge.set()

    def close(self) -> None:
        """Write what waits, if it can be written, and end. Blocks, for some seconds if the disk hangs."""
        self._is_stopping = True
        self._nudge.set()
        try:
            self._waiting.put(_STOP, timeout=_LAST_S)
        except queue.Full:
            return
        self._thread.join(_LAST_S)
        if self._descriptor > 2 and not self._thread.is_alive():
            os.close(self._descriptor)

    def _release(self, lines: Sequence[bytes]) -> None:
        """They do not wait any more."""
        with self._counting:
            self._waiting_bytes -= sum(map(len, lines))

    def _drop(self, count: int) -> None:
        with self._counting:
            self.dropped += count
            self._missing += count

    def _run(self) -> None:
        going_on = True
        while going_on:
            last = self._waiting.get()
            lines: list[bytes] = []
            size = 0
            while isinstance(last, bytes):
                lines.append(last)
                size += len(last)
                if len(lines) >= _AT_ONCE or size >= _BATCH_BYTES:
                    break
                try:
                    last = self._waiting.get_nowait()
                except queue.Empty:
                    break
            self._put(lines)
            self._release(lines)
            going_on = last is not _STOP
            if last is _REOPEN or self._must_turn:
                self._turn()

    def _put(self, lines: list[bytes]) -> None:
        with self._counting:
            missing, self._missing = self._missing, 0
        if missing:
            lines = [_line({"action": "missing", "who": "server", "count": missing}), *lines]
        if not lines:
            return
        data, count = b"".join(lines), len(lines) - bool(missing)
        done = 0
        while done < len(data):
            try:
                done += os.write(self._descriptor, data[done:])
            except OSError as error:
                if not self._is_failing:
                    _log.error("the audit log cannot be written", path=str(self._path), reason=error.strerror)
                self._is_failing = True
                if self._is_stopping:
                    lost = min(count, data.count(b"\n", done))
                    self.written += count - lost
                    self._drop(lost)
                    return
                self._nudge.wait(_RETRY_INTERVAL_S)
                if self._must_turn:
                    begin = data.rfind(b"\n", 0, done) + 1
                    if self._cut(done - begin):
                        done = begin
                    self._turn()
        self.written += count
        if self._is_failing:
            _log.info("the audit log can be written again", path=str(self._path))
        self._is_failing = False

    def _cut(self, count: int) -> bool:
        """Take the last bytes out of the file, so that their line can be written whole into another; a pipe has no such."""
        with contextlib.suppress(OSError):  # a disk on which nothing goes: the thread must live all the same
            found = os.fstat(self._descriptor)
            if stat.S_ISREG(found.st_mode):
                os.ftruncate(self._descriptor, found.st_size - count)
                return True
        return False

    def _turn(self) -> None:
        self._must_turn = False
        if not self._is_stopping:
            self._nudge.clear()
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


def _line(event: Mapping[str, object]) -> bytes:
    """An event as it stands in the file, within `MAX_LINE_BYTES`."""
    line = _dumped(event)
    kept = 1 << 10
    while len(line) > MAX_LINE_BYTES and kept:
        kept //= 4
        line = _dumped({"cut": True} | {key: _shortened(value, kept) for key, value in event.items()})
    return line


def _dumped(event: Mapping[str, object]) -> bytes:
    return f"{json.dumps(event, default=str)}\n".encode()


def _shortened(value: object, entries: int) -> object:
    """A list with so many of its entries; other values are short, but for a text that somebody has sent."""
    if isinstance(value, list):
        return [_shortened(each, entries) for each in value[:entries]]
    return value[:_SHORT] if isinstance(value, str) and entries < _SHORT else value
