"""`stepwell top` on a terminal, while its server goes away and comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stepwell import UnavailableError
from stepwell.cli._errors import SERVER_ERROR, Failure
from stepwell.cli.top import command

SERVER = {"version": "9.8.7", "front": "native", "uptime_s": 1.0, "memory_bytes": 1, "cores": 0.0}
PICTURE = {
    "server": SERVER | {"connections": 1, "streams": 0, "store_ready": True},
    "servers": [{}],
    "models": [],
    "methods": [],
    "errors": [],
    "tenants": [],
    "slow_sessions": [],
}


def test_it_goes_on_over_a_restart_of_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = iter(["seen", Failure("refused", SERVER_ERROR), UnavailableError("is starting"), "back"])
    left = [4]
    seen: list[object] = []

    @contextlib.contextmanager
    def keys() -> Iterator[Callable[[float], bool]]:
        def pressed(seconds: float) -> bool:
            left[0] -= 1
            return left[0] < 0

        yield pressed

    def look() -> Any:
        turn = next(turns)
        if isinstance(turn, Exception):
            raise turn
        return turn

    def picture(clients: object, now: object, rows: int) -> dict[str, Any]:
        seen.append(now)
        return PICTURE

    monkeypatch.setattr(command, "_keys", keys)
    monkeypatch.setattr(command, "_picture", picture)
    monkeypatch.setenv("FORCE_COLOR", "1")
    command._live([], look, 0.1, 10)
    assert seen == ["seen", "back"]
    out = capsys.readouterr().out
    assert "no answer, it is asked again: refused" in out
    assert "is starting" in out
    assert "9.8.7" in out
