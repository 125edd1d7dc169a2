"""`stepwell top` on a terminal, while its server goes away and comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

import stepwell
from stepwell import ServerInfo, UnavailableError
from stepwell.cli.toolkit.errors import SERVER_ERROR, Failure
from stepwell.cli.top import command, metrics
from stepwell.cli.top.metrics import url_of
from stepwell.cli.top.scrape import Scrape

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


@pytest.mark.parametrize(
    ("server", "address", "url"),
    [
        ("127.0.0.1:50051", "127.0.0.1:9964", "http://127.0.0.1:9964/metrics"),
        ("127.0.0.1:50051", "0.0.0.0:9964", "http://127.0.0.1:9964/metrics"),
        ("[::1]:50051", "[::]:9964", "http://[::1]:9964/metrics"),
        ("unix:/run/stepwell", "0.0.0.0:9964", "http://127.0.0.1:9964/metrics"),
        ("10.0.0.5:50051", "0.0.0.0:9964", "http://10.0.0.5:9964/metrics"),
        ("[fd00::5]:50051", "[::]:9964", "http://[fd00::5]:9964/metrics"),
        ("grpcs://a.example:50051", "0.0.0.0:9964", "http://a.example:9964/metrics"),
        ("a.example:50051", "10.0.0.6:9964", "http://10.0.0.6:9964/metrics"),
        ("a.example:50051", None, "http://a.example:9464/metrics"),
        ("127.0.0.1:50051", None, "http://127.0.0.1:9464/metrics"),
    ],
)
def test_where_the_metrics_of_a_server_are(server: str, address: str | None, url: str) -> None:
    assert url_of(server, ServerInfo("native", (), "5e1f", address)) == url


@pytest.mark.parametrize("address", ["evil.example", "a:b@c:1", "a:0", "a:1/x", "a b:1"])
def test_what_is_no_address_is_not_asked(address: str) -> None:
    with pytest.raises(Failure, match="must have its metrics at HOST:PORT"):
        url_of("127.0.0.1:50051", ServerInfo("native", (), "5e1f", address))


def test_metrics_of_another_machine_alone_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def scrape(url: str, _token: str | None, _timeout_s: float) -> Scrape:
        raise Failure(f"{url} cannot be read", SERVER_ERROR)

    client = mock.create_autospec(stepwell.Client, instance=True)
    client.server_info.return_value = ServerInfo("native", (), "5e1f", "127.0.0.1:9464")
    monkeypatch.setattr(metrics, "scrape", scrape)
    with pytest.raises(Failure, match=r"127\.0\.0\.1:9464 of its own machine: run 'stepwell top' there"):
        metrics.ServerMetrics("a.example:50051", client, None, 1.0).look()


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
