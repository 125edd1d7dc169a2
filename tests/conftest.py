"""What holds for all tests."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Let Ctrl-C be what it is on a terminal, for the processes that tests start too.

    A shell ignores SIGINT for what it starts in the background, and children inherit that: then a test
    that interrupts a server or a command would wait in vain.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
