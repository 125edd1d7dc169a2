"""Logs: one line per event on stderr, as ``key=value`` text or as JSON.

A module creates its `Log` once and logs events with fields:

    _log = Log("rpc") _log.info("session opened", model="forecast", session="user-42")

Records of other libraries go through the same handler, without fields.
"""

from __future__ import annotations

import collections
import datetime as dt
import json
import logging
import math
import os
import secrets
import select
import sys
from typing import IO, ClassVar, Literal

from typing_extensions import override

from stepwell_server.errors import Internal, Overloaded, ServerError, release_frames

LogFormat = Literal["text", "json"]
_ROOT = "stepwell_server"
MAX_WAITING_LINES = 1_000
"""Maximum of lines that are kept while the log cannot be written; further ones are dropped and counted."""
REPEAT_S = 10.0
"""A line that a flood would repeat is written again after this time."""


class Repeats:
    """Limits lines that a flood of requests would repeat: one of each kind in `REPEAT_S`."""

    def __init__(self) -> None:
        self._written: dict[str, tuple[float, int]] = {}
        """By kind: when a line was last written, and how many were left out since."""

    def due(self, kind: str, now: float) -> dict[str, int] | None:
        """Return fields for a line, the number left out before; None: leave it out. `now` is monotonic, in seconds."""
        written, more = self._written.get(kind, (-math.inf, 0))
        if now < written + REPEAT_S:
            self._written[kind] = written, more + 1
            return None
        self._written[kind] = now, 0
        return {"more_before": more} if more else {}


class Log:
    """Writes events with fields to the logger ``stepwell_server.<name>``. Thread-safe."""

    is_debug: ClassVar[bool] = False
    """Whether debug events are written; check it before computing expensive fields."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"{_ROOT}.{name}")

    def debug(self, event: str, **fields: object) -> None:
        """Write an event of one request."""
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Write an event of a session or of the server."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Write an event that should be looked at eventually."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Write an event that must be looked at now."""
        self._write(logging.ERROR, event, fields)

    def defect(self, event: str, error: BaseException, **fields: object) -> None:
        """Write a defect with the traceback of ``error``."""
        self._logger.error(event, exc_info=error, extra={"fields": fields})

    def internal(self, event: str, error: BaseException, **fields: object) -> ServerError:
        """Write a defect, and return an opaque error for the client with the same id.

        Running out of memory is not a defect but overload, and is reported as such. The error's frames are
        released, as the log has the traceback.
        """
        if isinstance(error, MemoryError):
            self.warning("out of memory", at=event, **fields)
            release_frames(error)
            return Overloaded(
                "the server must have enough memory for this call; it has too little just now", 1.0
            )
        opaque = Internal(secrets.token_hex(6))
        self.defect(event, error, error_id=opaque.error_id, **fields)
        release_frames(error)
        return opaque

    def _write(self, level: int, event: str, fields: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={"fields": fields})


def configure(level: str, log_format: LogFormat, stream: IO[str] | None = None) -> None:
    """Send every record of this process to ``stream`` (stderr), ``stepwell_server``'s from ``level`` up."""
    handler = LineHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(_ROOT).setLevel(level.upper())
    Log.is_debug = level.upper() == "DEBUG"


class LineHandler(logging.StreamHandler[IO[str]]):
    """Writes lines to a stream, and never waits for its reader: all sessions would wait, too.

    A pipe becomes full if its reader stops, and a terminal may be paused (Ctrl-S). Lines are then kept and written
    with a later one. Beyond a limit they are dropped, and a line reports their number.
    """

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        self._waiting = collections.deque[bytes]()
        self._dropped = 0
        self._ready = select.poll()
        try:
            self._descriptor = stream.fileno()
        except (OSError, ValueError):  # in memory
            self._descriptor = -1
        else:
            self._ready.register(self._descriptor, select.POLLOUT)

    @override
    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or keep it for later."""
        if self._descriptor < 0:
            super().emit(record)
            return
        try:
            line = self._line(record)
            try:
                self._write()  # makes room
            finally:
                self._keep(line)
            self._write()
        except Exception:  # Lines that cannot be written are kept: a full disk may have room again.
            self.handleError(record)

    def _keep(self, line: bytes) -> None:
        if len(self._waiting) >= MAX_WAITING_LINES:
            self._dropped += 1
            return
        if self._dropped:
            note = logging.makeLogRecord(
                {
                    "levelname": "WARNING",
                    "msg": "log lines were dropped",
                    "fields": {"count": self._dropped},
                }
            )
            self._waiting.append(self._line(note))
            self._dropped = 0
        self._waiting.append(line)

    def _line(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + self.terminator).encode(errors="backslashreplace")

    def _write(self) -> None:
        """Write until the stream is full. A pipe that is ready accepts `PIPE_BUF` bytes without blocking."""
        while self._waiting and self._ready.poll(0):
            line = self._waiting[0]
            written = os.write(self._descriptor, line[: select.PIPE_BUF])
            if written < len(line):
                self._waiting[0] = line[written:]
            else:
                self._waiting.popleft()


class TextFormatter(logging.Formatter):
    """``2026-08-01T12:00:00.123Z info session opened model=forecast session=user-42``."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        facts = "".join(f" {key}={_text(value)}" for key, value in _fields(record).items())
        line = f"{_timestamp(record)} {record.levelname.lower()} {_one_line(record.getMessage())}{facts}"
        return line + "\n" + self.formatException(record.exc_info) if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ``time``, ``level``, ``event``, the fields, ``traceback`` if there is one."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, object] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] | None = getattr(record, "fields", None)
    return {"logger": record.name} if fields is None else fields


def _timestamp(record: logging.LogRecord) -> str:
    moment = dt.datetime.fromtimestamp(record.created, dt.UTC)
    return moment.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def _one_line(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    plain = text.isprintable() and not any(mark in text for mark in ' "=')
    return text if text and plain else json.dumps(text, ensure_ascii=not text.isprintable())
