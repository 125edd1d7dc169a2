"""Requests to the door of JSON over HTTP, without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from stepwell.v1 import models_pb2, sessions_pb2, watch_pb2
from stepwell_server.rpc.fronts.base import HttpAnswer, JsonCodec
from stepwell_server.rpc.http.door import Door
from stepwell_server.rpc.http.events import Sleep
from stepwell_server.rpc.http.origin import OriginRules
from support.peers.events import Event, EventReader
from support.rpc.calls import MAX_MESSAGE_BYTES, Calls
from support.rpc.fake_call import FakeCall

SERVICES = [
    service
    for file in (sessions_pb2.DESCRIPTOR, models_pb2.DESCRIPTOR, watch_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
]
HOST = "127.0.0.1:8080"
JSON = {"content-type": "application/json"}
EVENTS = {**JSON, "accept": "text/event-stream"}


class FakeHttpCall(FakeCall):
    """A `fronts.base.HttpCall`. The parts of an answer that was begun are in `replies`."""

    head: HttpAnswer | None = None

    def begin(self, answer: HttpAnswer) -> None:
        assert self.head is None, "an answer begins once"
        self.head = answer
        self.replies.put_nowait(answer.body)


class Streamed:
    """A request whose answer comes in parts."""

    def __init__(self, call: FakeHttpCall, answer: asyncio.Task[HttpAnswer | None]) -> None:
        self.call = call
        self.answer = answer
        """The whole answer; None: it was begun."""
        self.reader = EventReader()

    @property
    def head(self) -> HttpAnswer:
        """The head of the answer, once it was begun."""
        assert self.call.head is not None
        return self.call.head

    async def part(self) -> list[Event]:
        """The events in the next part of the answer."""
        return list(self.reader.feed(await asyncio.wait_for(self.call.replies.get(), 60)))

    async def event(self) -> Event:
        """The only event of the next part."""
        (event,) = await self.part()
        return event

    async def rest(self) -> list[Event]:
        """The events until the end of the answer."""
        assert await asyncio.wait_for(self.answer, 60) is None
        found: list[Event] = []
        while not self.call.replies.empty():
            found += await self.part()
        self.reader.end()
        return found


def codec() -> JsonCodec:
    """That of the native front."""
    from stepwell_server.rpc.fronts.native import NativeFront

    assert NativeFront.json is not None
    return NativeFront.json


class Client:
    """Sends requests to a door, and keeps the reasons of the refused ones."""

    def __init__(self, at: Calls, *origins: str, is_open: bool = True, sleep: Sleep = asyncio.sleep) -> None:
        self.refused: list[str] = []
        rules = OriginRules("127.0.0.1", origins, is_open=is_open, scheme="http")
        self.door = Door(
            [service for service in SERVICES if service.methods_by_name.keys() & at.methods.keys()],
            at.methods.values(),
            rules,
            refused=self.refused.append,
            max_message_bytes=MAX_MESSAGE_BYTES,
            version="1.2.3",
            codec=codec(),
            sleep=sleep,
        )
        self._at = at

    async def send(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> HttpAnswer:
        """The answer to a request, whose headers are these alone."""
        call = self._call(method, path, body, headers or {})
        answer = self.door.judge(call) or await self.door.serve(call)
        assert answer is not None, "the answer was begun"
        return answer

    @asynccontextmanager
    async def streamed(
        self, method: str, path: str, document: object = None, headers: Mapping[str, str] = EVENTS
    ) -> AsyncIterator[Streamed]:
        """A request whose answer comes in parts. The client leaves at the end."""
        raw = b"" if document is None else json.dumps(document).encode()
        call = self._call(method, path, raw, headers)
        answer = asyncio.create_task(self.door.serve(call))
        try:
            yield Streamed(call, answer)
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)

    def _call(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> FakeHttpCall:
        call = FakeHttpCall(body)
        call.who = self._at.new_call().who
        call.metadata = {":method": method, ":path": path, ":authority": HOST, **headers}
        return call

    async def json(self, method: str, path: str, document: object = None) -> tuple[int, Any]:
        """Status and document of the answer to a request in JSON."""
        raw = b"" if document is None else json.dumps(document).encode()
        answer = await self.send(method, path, raw, JSON)
        assert dict(answer.headers)["content-type"] == "application/json"
        return answer.status, json.loads(answer.body)
