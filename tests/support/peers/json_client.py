"""A client of JSON over HTTP/1.1, for the server itself and for Envoy."""

from __future__ import annotations

import collections
import json
import ssl
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, HTTPMessage, HTTPResponse, HTTPSConnection
from typing import Any, Self
from urllib.parse import quote

from support.peers.events import Event, EventReader

TIMEOUT_S = 60.0
#: One row at one time step of the model `seq`.
X = [0.5, -1.0, 2.0]


class EventStream:
    """An answer in parts. Leaving the block closes the connection."""

    def __init__(self, connection: HTTPConnection, response: HTTPResponse) -> None:
        self._connection = connection
        self._response = response
        self._reader = EventReader()
        self._ready: collections.deque[Event] = collections.deque()
        self.status = response.status
        self.headers = response.headers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._connection.close()
        self._response.close()

    def __iter__(self) -> Iterator[Event]:
        """The events until the end of the answer; raises `http.client.IncompleteRead` if it is cut off."""
        while True:
            while self._ready:
                yield self._ready.popleft()
            part = self._response.read1(1 << 16)
            if not part:
                self._reader.end()
                return
            self._ready += self._reader.feed(part)

    def next(self, name: str = "") -> Any:
        """The data of the next event, or of the next one with a name."""
        return next(event.data for event in self if name in {"", event.name})

    def document(self) -> Any:
        """The whole answer, if it is no stream."""
        return json.loads(self._response.read())


class JsonClient:
    """Makes each call on a connection of its own.

    Args:
        address: HOST:PORT.
        tls: How to reach it; None: without TLS.
    """

    def __init__(self, address: str, tls: ssl.SSLContext | None = None) -> None:
        self.address = address
        self._tls = tls

    def http(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes, HTTPMessage]:
        """Status, body and headers of the answer."""
        return exchanged(self._connection(), method, path, body, headers)

    def _connection(self) -> HTTPConnection:
        if self._tls is None:
            return HTTPConnection(self.address, timeout=TIMEOUT_S)
        return HTTPSConnection(self.address, timeout=TIMEOUT_S, context=self._tls)

    def events(
        self, path: str, body: object, headers: Mapping[str, str] | None = None, method: str = "POST"
    ) -> EventStream:
        """A call whose answer is a stream of events."""
        connection = self._connection()
        raw = None if body is None else json.dumps(body).encode()
        connection.request(method, path, raw, {"content-type": "application/json", **(headers or {})})
        return EventStream(connection, connection.getresponse())

    def json(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and document of the answer to a call in JSON."""
        raw = None if body is None else json.dumps(body).encode()
        status, answer, got = self.http(
            method, path, raw, {"content-type": "application/json", **(headers or {})}
        )
        assert got.get_content_type() == "application/json", answer
        return status, json.loads(answer)


def exchanged(
    connection: HTTPConnection,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes, HTTPMessage]:
    """Make a call, and close the connection."""
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()


def path_of(session_id: str) -> str:
    """The path of a session."""
    return f"/v1/sessions/{quote(session_id, safe='')}"


def step_body(**fields: object) -> dict[str, object]:
    """The body of a step of the model `seq`."""
    return {"inputs": [{"values": X}], **fields}
