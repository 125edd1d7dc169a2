"""What signals do: stop the server with a drain, end it at once, or have its certificates read anew."""

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
    """Let SIGTERM raise KeyboardInterrupt like SIGINT, so that a compiling process is not left behind.

    So does SIGHUP of a terminal that is gone; another one does nothing.
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
    """An event set by the first SIGTERM or SIGINT. A second one ends the process at once.

    Whoever signals a process and then its group, as wrappers do, sends one signal twice: the same again within a
    moment is not a second one.

    A terminal that is closed sends SIGHUP, which stops the server too. While the terminal is there, or where there
    was none, someone has sent it, for `reload`. Under nohup it stays ignored.
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
        elif (
            first is None
        ):  # the kernel and the shell may both send it, and nobody is there who could mean it
            on_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    for number in _hangup():
        loop.add_signal_handler(number, on_hangup, number)
    return stop


def _hangup() -> tuple[signal.Signals, ...]:
    return () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)


def _has_terminal() -> bool:
    """Whether there is a terminal that can be closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
