"""Server-sent events from a real server: versions of HTTP, clients that leave or do not read, and the server's end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from support.peers.curl import curl
from support.peers.events import events_of
from support.servers.both_fronts import needs_native
from support.servers.server_process import ServerProcess, forecast, serve

HTTP = ("--http-listen", "127.0.0.1:0")
pytestmark = [needs_native, pytest.mark.plain("the tests secure their servers themselves")]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serve(*HTTP) as running:
        yield running


def address_of(server: ServerProcess) -> str:
    found = re.search(r"HTTP on http://(\S+),", server.ready_line)
    assert found is not None, server.ready_line
    return found[1]


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
def test_a_load_shows_its_stages_to_curl(server: ServerProcess, version: str) -> None:
    url = f"http://{address_of(server)}/v1/models/other:load"
    wish = ("--header", "accept: text/event-stream", "--json", json.dumps({"path": str(forecast().path)}))
    head, _, body = curl(version, "--no-buffer", "--include", *wish, url).partition("\n\n")
    assert " 200" in head.splitlines()[0]
    assert "content-type: text/event-stream" in head
    assert "content-length" not in head
    events = events_of(body.encode())
    assert {event.name for event in events} == {"reply"}
    assert events[-1].data["model"]["name"] == "other"
    assert all("stage" in event.data for event in events[:-1])
