"""`stepwell console`: the address of a server's console, and the demo."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

import stepwell
from stepwell.cli import console_demo, main
from stepwell.cli.console import url_of
from support.servers.both_fronts import needs_native
from support.servers.closed_server import HTTP
from support.servers.served import local_server

_TIMEOUT_S = 100.0


@pytest.mark.parametrize(
    ("http_address", "server", "url"),
    [
        ("http://127.0.0.1:8080", "127.0.0.1:50051", "http://127.0.0.1:8080/console"),
        ("https://10.0.0.5:8443", "grpcs://model.example:50051", "https://10.0.0.5:8443/console"),
        ("http://0.0.0.0:8080", "model.example:50051", "http://model.example:8080/console"),
        ("http://[::]:8080", "[fd00::1]:50051", "http://[fd00::1]:8080/console"),
        ("http://0.0.0.0:8080", "dns:///replicas:50051", "http://replicas:8080/console"),
        ("http://0.0.0.0:8080", "unix:/run/stepwell.sock", "http://127.0.0.1:8080/console"),
    ],
)
def test_the_address_is_one_that_a_browser_reaches(http_address: str, server: str, url: str) -> None:
    assert url_of(http_address, server) == url


def page(url: str) -> bytes:
    """The page at an address."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=_TIMEOUT_S)
    connection.request("GET", urlsplit(url).path)
    response = connection.getresponse()
    assert response.status == 200
    found = response.read()
    connection.close()
    return found


@needs_native
def test_it_prints_the_address_of_a_servers_console() -> None:
    with local_server("seq", extra_args=HTTP) as server:
        found = CliRunner().invoke(main, ["console", "--server", server.address, "--no-browser"])
        assert found.exit_code == 0, found.stderr
        assert b"<title>Stepwell console</title>" in page(found.stdout.strip())
        found = CliRunner().invoke(main, ["console", "--server", server.address, "--no-browser", "--json"])
        assert json.loads(found.stdout) == {"url": f"http://{server.http_address}/console"}


def test_a_server_without_http_has_none() -> None:
    with local_server("seq") as server:
        found = CliRunner().invoke(main, ["console", "--server", server.address])
    wanted = f"the server at {server.address} (--server) has no console: start it with --http-listen"
    assert (found.exit_code, wanted in found.stderr) == (1, True), found.stderr


@needs_native
def test_an_option_turns_it_off() -> None:
    with local_server("seq", extra_args=[*HTTP, "--no-console"]) as server:
        connection = HTTPConnection(server.http_address or "", timeout=_TIMEOUT_S)
        connection.request("GET", "/console")
        assert connection.getresponse().status == 404
        connection.close()


@needs_native
def test_in_the_demo_three_users_step_until_ctrl_c() -> None:
    command = [sys.executable, "-m", "stepwell", "console", "--demo", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        try:
            url, served = demo.stdout.readline().strip(), demo.stdout.readline()
            assert b"<title>Stepwell console</title>" in page(url)
            address = served.split(" at ")[1].split(";")[0]
            with stepwell.connect(address) as client, client.watch_sessions(console_demo.USERS) as watch:
                waited = set(console_demo.USERS)
                for event in watch:
                    if event.kind == "step":
                        waited.discard(event.session_id)
                    if not waited:
                        break
            demo.send_signal(signal.SIGINT)
            assert demo.wait(_TIMEOUT_S) == 0
        finally:
            demo.kill()


def test_the_readings_of_the_demo_move() -> None:
    for values in console_demo.sources().values():
        found = list(itertools.islice(values, 200))
        assert max(found) - min(found) > 1.0
        assert max(map(abs, found)) < 2.0
