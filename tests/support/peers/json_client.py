"""A client of JSON over HTTP/1.1, for the server itself and for Envoy."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

TIMEOUT_S = 60.0
#: One row at one time step of the model `seq`.
X = [0.5, -1.0, 2.0]


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
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        """Status, body and headers of the answer."""
        connection = (
            http.client.HTTPConnection(self.address, timeout=TIMEOUT_S)
            if self._tls is None
            else http.client.HTTPSConnection(self.address, timeout=TIMEOUT_S, context=self._tls)
        )
        return exchanged(connection, method, path, body, headers)

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
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes, http.client.HTTPMessage]:
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
