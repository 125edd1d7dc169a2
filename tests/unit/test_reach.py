"""Who may reach a server: beyond loopback only with TLS and known callers, or where it was asked for in so many words."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path
from typing import Any

import pytest

from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.errors import StartError
from stepwell_server.exposure import require_closed
from stepwell_server.metrics.token import MetricsToken
from stepwell_server.settings import Settings

OPEN = ["0.0.0.0", "::", "::ffff:0.0.0.0", "::ffff:192.0.2.1", "192.0.2.1", "fe80::1", "0", "names"]
CLOSED = ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "localhost", "127.1"]
TLS: dict[str, Any] = {"tls_cert": Path("c"), "tls_key": Path("k")}
MUTUAL = {**TLS, "tls_client_ca": Path("ca")}


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """One name stands for two addresses, of which one is beyond loopback."""
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        hosts = ("127.0.0.1", "192.0.2.7") if host == "names" else (host,)
        return list(itertools.chain.from_iterable(real(each, port, **options) for each in hosts))

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


PROBLEM = "stepwell-front is not installed; for the native front run a command"


def settings(host: str, **others: Any) -> Settings:
    return Settings(listen=Address(host, 1), **others)


def refused(asked: Settings, front_problem: str = "") -> str:
    try:
        require_closed(asked, front_problem=front_problem)
    except StartError as error:
        (line,) = str(error).splitlines()
        return line
    return ""


@pytest.mark.parametrize("host", OPEN)
def test_beyond_loopback_a_server_needs_tls_and_known_callers(
    host: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refused(settings(host))
    assert message.startswith("--listen: beyond loopback the server must use TLS and authenticate callers")
    assert "be given --insecure-listen" in message
    assert "it does not use TLS (--tls-cert, --tls-key) and it does not authenticate callers" in message
    assert f"got {Address(host, 1)}" in message
    assert "it does not authenticate callers" in refused(settings(host, **TLS))
    assert "TLS (--tls" not in refused(settings(host, **TLS))
    assert not refused(settings(host, **MUTUAL))
    assert not caplog.records
    monkeypatch.setattr(Settings, "asks_callers", property(lambda _self: True))
    assert "it does not use TLS" in refused(settings(host))
    assert not refused(settings(host, **TLS))
    assert not refused(settings(host, insecure_listen=True))
    said = caplog.text
    assert said.count("--insecure-listen: other machines reach this server, and it does not use TLS") == 1


@pytest.mark.parametrize("host", OPEN)
def test_http_beyond_loopback_needs_the_same(host: str, caplog: pytest.LogCaptureFixture) -> None:
    address = Address(host, 2)
    message = refused(settings("127.0.0.1", http_listen=address))
    assert message.startswith(
        "--http-listen: beyond loopback the server must use TLS and authenticate callers"
    )
    assert f"got {address}" in message
    assert not refused(settings("127.0.0.1", http_listen=address, **MUTUAL))
    assert not caplog.records
    assert not refused(settings("127.0.0.1", http_listen=address, insecure_listen=True))
    assert "--insecure-listen: other machines reach this server" in caplog.text


def test_http_needs_the_native_front() -> None:
    local = Address("127.0.0.1", 2)
    assert not refused(settings("127.0.0.1", http_listen=local))
    missing = refused(settings("127.0.0.1", http_listen=local), PROBLEM)
    assert missing == f"--http-listen: only the native front serves HTTP; {PROBLEM}"
    chosen = refused(settings("127.0.0.1", http_listen=local, front="python"))
    assert chosen.startswith("--http-listen: must be left out with --front python")


def test_a_name_says_which_addresses_it_stands_for() -> None:
    assert refused(settings("names")).endswith("got names:1 (192.0.2.7)")
    assert refused(settings("0.0.0.0")).endswith("got 0.0.0.0:1")


@pytest.mark.parametrize("host", CLOSED)
def test_loopback_and_unix_sockets_need_nothing(host: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not refused(settings(host, metrics_listen=Address(host, 2)), PROBLEM)
    assert not refused(Settings(listen=UnixAddress("/x")), PROBLEM)
    assert not caplog.records


def test_the_front_in_python_has_to_be_asked_for_as_well() -> None:
    assert refused(settings("0.0.0.0", **MUTUAL), PROBLEM) == (
        "--listen: without the native front it must be a loopback address, because the Python front does not limit the"
        f" resources that clients use; {PROBLEM}; or accept that with --front python (docs/operate/run.md); got 0.0.0.0:1"
    )
    assert not refused(settings("0.0.0.0", front="python", **MUTUAL))


@pytest.mark.parametrize("host", OPEN)
def test_metrics_beyond_loopback_need_a_token(host: str, caplog: pytest.LogCaptureFixture) -> None:
    asked: dict[str, Any] = {"metrics_listen": Address(host, 2)}
    message = refused(Settings(**asked))
    assert message.startswith(
        "--metrics-listen: beyond loopback it must be given with --metrics-token-file, or with "
    )
    assert "--insecure-listen" in message
    assert not refused(Settings(**asked, metrics_token_file=Path("t")))
    assert not caplog.records
    assert not refused(Settings(**asked, insecure_listen=True))
    assert "--insecure-listen: anybody who reaches" in caplog.text


TOKEN = "b1946ac92492d2347c6235b4d2611184"


def test_a_token_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text(f"{TOKEN}\n")
    token = MetricsToken.of(file)
    assert token.allows(f"Bearer {TOKEN}")
    assert token.allows(f"bearer  {TOKEN}")
    wrong = (
        "",
        TOKEN,
        f"Basic {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        "Bearer",
        "Bearer \u00e9\u20ac",
    )
    assert not any(map(token.allows, wrong))
    file.write_text("0123456789abcdef0")
    assert token.allows("Bearer 0123456789abcdef0")
    assert not token.allows(f"Bearer {TOKEN}")
    file.write_text("short")
    assert token.allows("Bearer 0123456789abcdef0")
    file.unlink()
    assert token.allows("Bearer 0123456789abcdef0")
    said = caplog.text
    assert said.count("the changed token cannot be used, the old one stays") == 2
    assert not any(secret in said for secret in (TOKEN, "0123456789abcdef0"))


@pytest.mark.parametrize("content", ["", "short", "two words which are long", "x" * 5000, "\u00e9" * 40])
def test_what_is_no_token_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text(content)
    with pytest.raises(
        StartError, match=r"^--metrics-token-file: must hold a token: one line of 16 to 4096 "
    ):
        MetricsToken.of(file)
    file.chmod(0o644)
    with pytest.raises(StartError, match=r"^--metrics-token-file: .* must be readable by its owner only"):
        MetricsToken.of(file)
    file.unlink()
    with pytest.raises(StartError, match="No such file"):
        MetricsToken.of(file)
