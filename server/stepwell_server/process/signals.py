"""Signal handling: stop the server with a drain, end it at once, or reload its files."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from stepwell_server.clock import Clock
from stepwell_server.logs import Log

_log = Log("app")
_SAME_SIGNAL_S = 0.25


@contextmanager
def interrupting() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt like SIGINT, so that no compile process is left behind.

    SIGHUP does the same if the terminal was closed, and otherwise nothing.
    """
    had_terminal = _has_terminal()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGTERM or (had_terminal and not _has_terminal()):
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, *_hangup())}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_on_signals(clock: Clock, reload: Callable[[], None]) -> asyncio.Event:
    """Return an event that the first SIGTERM or SIGINT sets. A second signal ends the process at once.

    Wrappers may signal a process and then its group, so the same signal within a moment does not count as a second one.

    When the terminal closes, SIGHUP stops the server too. If the terminal is open, or there never was one, SIGHUP calls
    `reload`. Under nohup it stays ignored.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    first: tuple[signal.Signals, float] | None = None
    had_terminal = _has_terminal()

    def on_signal(number: signal.Signals) -> None:
        nonlocal first
        now = clock.monotonic()
        if first is None:
            _log.info("stopping", signal=number.name)
            first = number, now
            stop.set()
        elif number != first[0] or now - first[1] > _SAME_SIGNAL_S:
            _log.warning("stopped at once by a second signal", signal=number.name)
            os._exit(1)

    def on_hangup(number: signal.Signals) -> None:
        if not had_terminal or _has_terminal():
            reload()
        elif first is None:  # the kernel and the shell may both send it, so it is never a second signal
            on_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    for number in _hangup():
        loop.add_signal_handler(number, on_hangup, number)
    return stop


def _hangup() -> tuple[signal.Signals, ...]:
    return () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)


def _has_terminal() -> bool:
    """Whether the process has a terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
