"""Requests to the door of JSON over HTTP, without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stepwell.v1 import models_pb2, sessions_pb2
from stepwell_server.rpc.fronts.base import HttpAnswer
from stepwell_server.rpc.http.door import Door
from stepwell_server.rpc.http.origin import OriginRules
from support.rpc.calls import MAX_MESSAGE_BYTES, Calls

SERVICES = [
    service
    for file in (sessions_pb2.DESCRIPTOR, models_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
]
HOST = "127.0.0.1:8080"
JSON = {"content-type": "application/json"}


class Client:
    """Sends requests to a door, and keeps the reasons of the refused ones."""

    def __init__(self, at: Calls, *origins: str, is_open: bool = True) -> None:
        self.refused: list[str] = []
        rules = OriginRules("127.0.0.1", origins, is_open=is_open, scheme="http")
        self.door = Door(
            SERVICES,
            at.methods.values(),
            rules,
            refused=self.refused.append,
            max_message_bytes=MAX_MESSAGE_BYTES,
            version="1.2.3",
        )
        self._at = at

    async def send(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> HttpAnswer:
        """The answer to a request, whose headers are these alone."""
        call = self._at.new_call(body)
        call.metadata = {":method": method, ":path": path, ":authority": HOST, **(headers or {})}
        return self.door.judge(call) or await self.door.serve(call)

    async def json(self, method: str, path: str, document: object = None) -> tuple[int, Any]:
        """Status and document of the answer to a request in JSON."""
        raw = b"" if document is None else json.dumps(document).encode()
        answer = await self.send(method, path, raw, JSON)
        assert dict(answer.headers)["content-type"] == "application/json"
        return answer.status, json.loads(answer.body)
