"""Native announcements are left out, nothing else is."""

from __future__ import annotations

import os

import pytest

from stepwell_server.engine.executors.quiet import without_announcements


def _says_something_and_fails() -> None:
    with without_announcements():
        os.write(2, b"INFO: Created a delegate.\nWARNING: slow\nINFO: Another\n")
        os.write(2, b"ERROR: no INFO: at all")
        raise ZeroDivisionError


def test_only_announcements_are_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        _says_something_and_fails()
    os.write(2, b"\nINFO: later\n")
    assert capfd.readouterr().err == "WARNING: slow\nERROR: no INFO: at all\nINFO: later\n"
