"""Reports the server's state to systemd: sd_notify(3), a datagram of KEY=VALUE lines to the socket in NOTIFY_SOCKET.

While models are loading, it keeps extending the start timeout. The event loop feeds the watchdog, so systemd restarts a
server whose loop is stuck.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Mapping

from stepwell_server.logs import Log
from stepwell_server.process.readiness import Report

_log = Log("systemd")
EXTEND_S = 60.0
"""Each message during the start extends its timeout to this many seconds from now."""
_FEED_S = 10.0


class Notifier:
    """Sends messages to systemd; does nothing without it. Lives on the event loop."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._place = environment.get("NOTIFY_SOCKET", "")
        self._socket: socket.socket | None = None
        self._was_ready = self._is_stopping = self._is_failing = False
        self._feeding: asyncio.Task[None] | None = None
        watchdog = environment.get("WATCHDOG_USEC", "")
        is_meant = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(watchdog) / 1e6 if watchdog.isdecimal() and is_meant else 0.0
        """Watchdog timeout in seconds; 0: no watchdog."""
        if self._place:
            # an abstract socket is written with @
            self._place = "\0" + self._place[1:] if self._place[0] == "@" else self._place
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    def start(self) -> None:
        """Start to report regularly that the event loop runs, and during the start, that it makes progress."""
        if self._socket is not None:
            self._feeding = asyncio.create_task(self._feed())

    def changed(self, report: Report) -> None:
        """Report the server's state. For `Readiness.listen`."""
        if report.is_ready and not self._was_ready:
            self._was_ready = True
            self.notify(READY="1", STATUS="ready")
        elif "stopping" in report.problems:
            self._is_stopping = True
            self.notify(STOPPING="1", STATUS=_one_line(report.problems["stopping"]))
        else:
            about = "; ".join((*report.problems.values(), *report.warnings.values())) or "ready"
            self.notify(STATUS=_one_line(about))

    def reloading(self) -> None:
        """Report a reload of files, but only between start and stop: READY=1 would end a start as well as a reload."""
        if not self._was_ready or self._is_stopping:
            return
        self.notify(RELOADING="1", MONOTONIC_USEC=str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000))
        self.notify(READY="1")

    def notify(self, **facts: str) -> None:
        """Send lines to systemd, without waiting."""
        if self._socket is None:
            return
        try:
            self._socket.sendto(
                "\n".join(f"{key}={value}" for key, value in facts.items()).encode(), self._place
            )
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                _log.warning("the server's state cannot be reported to systemd", reason=error.strerror)
            self._is_failing = True

    def close(self) -> None:
        """Stop reporting."""
        if self._feeding is not None:
            self._feeding.cancel()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _feed(self) -> None:
        every = min(_FEED_S, self.watchdog_s / 3) if self.watchdog_s else _FEED_S
        while True:
            facts = {"WATCHDOG": "1"} if self.watchdog_s else {}
            if not self._was_ready:
                facts["EXTEND_TIMEOUT_USEC"] = str(int(EXTEND_S * 1e6))
            if facts:
                self.notify(**facts)
            await asyncio.sleep(every)


def _one_line(text: str) -> str:
    return " ".join(text.split())
