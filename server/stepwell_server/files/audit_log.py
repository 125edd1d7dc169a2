"""The audit log: one JSON object per line, written by a thread, so that no call waits for its disk.

Events wait in a bounded queue. A failed write is retried every second, from the byte where it stopped. If the queue
is full because the disk is slow, full or missing, there are two options in the settings. Either events are dropped and
counted, and the next written line has their number; or calls are refused until there is room. Lines are passed to the
system in batches and not flushed, so a loss of power can lose the last second. The file is reopened on request, so that
it can be rotated.
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
"""Maximum of queued events. A line has some hundreds of bytes, or some thousands if it names sessions."""
MAX_WAITING_BYTES = 16 << 20
"""Maximum bytes of queued lines, including those being written."""
MAX_LINE_BYTES = 32 << 10
"""Maximum bytes of a line; a longer one is shortened to fewer sessions and marked as cut."""
_BATCH_BYTES = 1 << 20
_SHORT = 64
"""Characters of each text in a line that is too long even without its lists."""
_BATCH_LINES = 512
_RETRY_INTERVAL_S, _LAST_S = 1.0, 5.0
"""Time between two attempts, and the maximum wait of `close`."""
_STOP, _REOPEN = object(), object()


class AuditLog:
    """Writes events to a file. `write` is for any thread, the other methods for one."""

    def __init__(self, path: Path, max_waiting: int = MAX_WAITING) -> None:
        """Open the file, which is created with mode 0600 if missing; `-` is standard error.

        Raises:
            StartError: it cannot be written.
        """
        self._path = path
        self._waiting: queue.Queue[object] = queue.Queue(max_waiting)
        self._counting = threading.Lock()
        self._waiting_bytes = 0
        self._missing = 0
        """Dropped events that no line has reported yet."""
        self.written = self.dropped = 0
        self._is_failing = False
        self._is_stopping = self._must_rotate = False
        self._nudge = threading.Event()
        """Wakes up the thread while it waits for the next attempt."""
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
        """The next event would be dropped, or could not be written now."""
        has_no_room = self._waiting_bytes > MAX_WAITING_BYTES - MAX_LINE_BYTES
        return has_no_room or self._waiting.full() or self._is_failing

    def write(self, event: Mapping[str, object]) -> None:
        """Queue an event, with the current time. Never blocks."""
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
        """Continue in a new file of the same name, after a rotation. Never blocks."""
        try:
            self._waiting.put_nowait(_REOPEN)
            is_queued = True
        except queue.Full:
            is_queued = False
        if self._is_failing or not is_queued:
            self._must_rotate = True
            self._nudge.set()

    def close(self) -> None:
        """Write the queued events, if possible, and end. Blocks for some seconds if the disk hangs."""
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
        """Account for lines that left the queue."""
        with self._counting:
            self._waiting_bytes -= sum(map(len, lines))

    def _drop(self, count: int) -> None:
        with self._counting:
            self.dropped += count
            self._missing += count

    def _run(self) -> None:
        is_running = True
        while is_running:
            last = self._waiting.get()
            lines: list[bytes] = []
            size = 0
            while isinstance(last, bytes):
                lines.append(last)
                size += len(last)
                if len(lines) >= _BATCH_LINES or size >= _BATCH_BYTES:
                    break
                try:
                    last = self._waiting.get_nowait()
                except queue.Empty:
                    break
            self._put(lines)
            self._release(lines)
            is_running = last is not _STOP
            if last is _REOPEN or self._must_rotate:
                self._rotate()

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
                if self._must_rotate:
                    begin = data.rfind(b"\n", 0, done) + 1
                    if self._cut(done - begin):
                        done = begin
                    self._rotate()
        self.written += count
        if self._is_failing:
            _log.info("the audit log can be written again", path=str(self._path))
        self._is_failing = False

    def _cut(self, count: int) -> bool:
        """Remove the last bytes from the file, so that the next file gets the whole line; not possible for a pipe."""
        with contextlib.suppress(OSError):  # even if the disk refuses everything, the thread must continue
            found = os.fstat(self._descriptor)
            if stat.S_ISREG(found.st_mode):
                os.ftruncate(self._descriptor, found.st_size - count)
                return True
        return False

    def _rotate(self) -> None:
        self._must_rotate = False
        if not self._is_stopping:
            self._nudge.clear()
        try:
            descriptor = self._open()
        except OSError as error:
            _log.error(
                "the audit log could not be reopened, and continues in the old file",
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
            _log.warning("other users could read the audit log; now they cannot", path=str(self._path))
            os.fchmod(descriptor, 0o600)
        return descriptor


def _line(event: Mapping[str, object]) -> bytes:
    """Return the line of an event, within `MAX_LINE_BYTES`."""
    line = _dumped(event)
    kept = 1 << 10
    while len(line) > MAX_LINE_BYTES and kept:
        kept //= 4
        line = _dumped({"cut": True} | {key: _shortened(value, kept) for key, value in event.items()})
    return line


def _dumped(event: Mapping[str, object]) -> bytes:
    return f"{json.dumps(event, default=str)}\n".encode()


def _shortened(value: object, entries: int) -> object:
    """Shorten lists to this many entries, and long texts; other values are short."""
    if isinstance(value, list):
        return [_shortened(each, entries) for each in value[:entries]]
    return value[:_SHORT] if isinstance(value, str) and entries < _SHORT else value
