"""Answers in parts from the native front: their pace, clients that leave or do not read, and many at the same time.

A method of the test writes the parts, behind the door of JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hyperframe.frame import DataFrame, RstStreamFrame

from stepwell.v1 import models_pb2 as pb
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.rpc.boundary import Boundary
from stepwell_server.rpc.fronts.base import Call, Method, StepColumns
from stepwell_server.rpc.http.door import Door
from stepwell_server.rpc.http.origin import OriginRules
from support.peers.events import Event, EventReader
from support.peers.http2 import Http2, data
from support.rpc.fake_call import Requests
from support.rpc.http_client import codec
from support.rpc.native_steps import NativeSteps
from support.servers.both_fronts import needs_native
from support.stores.durable import until

pytestmark = [needs_native, pytest.mark.plain("the clients here speak without TLS")]
SERVICE = pb.DESCRIPTOR.services_by_name["ModelAdminService"]
LIMIT_S = 100.0
"""Only a hang reaches it."""
PATH = "/v1/models/m:load"
LABEL = "/v1/models/m:setLabel"
HEADERS = (("content-type", "application/json"), ("accept", "text/event-stream"))
CALM = 11
Produce = Callable[[Call], Awaitable[None]]


class Server(NativeSteps):
    """A native front with the door, whose loads write what a test wants."""

    def __init__(self, produce: Produce, limits: FrontLimits | None) -> None:
        super().__init__(limits)
        self.requests = Requests()
        self._load = Boundary(self.requests, 1 << 20).stream("LoadModel", produce)

    def take(self, _columns: StepColumns) -> None:
        raise AssertionError("no test steps")

    async def start(self) -> None:
        methods = [
            Method(SERVICE.full_name, "LoadModel", self._load, streams=True),
            Method(SERVICE.full_name, "SetLabel", self._label),
        ]
        rules = OriginRules("127.0.0.1", (), is_open=True, scheme="http")
        door = Door([SERVICE], methods, rules, lambda _: None, 1 << 20, "1.2.3", codec())
        await self.serve(methods, door)

    async def _label(self, _call: Call) -> bytes:
        return pb.SetLabelResponse().SerializeToString()

    @property
    def http(self) -> str:
        return str(self.front.http_address)

    def count(self, name: str) -> int:
        return self.front.counts().now[name]

    def refused(self, reason: str) -> int:
        return self.front.counts().refused[reason]


@asynccontextmanager
async def serving(produce: Produce, **limits: float) -> AsyncIterator[Server]:
    """A server whose loads are produced so, with some limits."""
    values = {name: type(getattr(FrontLimits(1), name))(value) for name, value in limits.items()}
    server = Server(produce, FrontLimits(message_bytes=1 << 20, **values))
    await server.start()
    try:
        yield server
    finally:
        await server.front.stop(0)


class Client:
    """A request over HTTP/1.1."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer
        self._events = EventReader()

    async def head(self) -> bytes:
        """Status and headers of the answer."""
        return await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), LIMIT_S)

    async def chunk(self) -> list[Event] | None:
        """The events in the next chunk; None: the last one, which is empty."""
        size = int(await asyncio.wait_for(self._reader.readuntil(b"\r\n"), LIMIT_S), 16)
        part = await asyncio.wait_for(self._reader.readexactly(size + 2), LIMIT_S)
        return list(self._events.feed(part[:-2])) if size else None

    async def rest(self) -> list[Event]:
        """The events until the end of the answer.

        Raises:
            asyncio.IncompleteReadError: it was cut off.
        """
        found: list[Event] = []
        while (events := await self.chunk()) is not None:
            found += events
        self._events.end()
        return found


@asynccontextmanager
async def client(server: Server, *headers: str, receive_buffer: int = 1 << 16) -> AsyncIterator[Client]:
    """A client whose request is on its way; it leaves at the end."""
    host, _, port = server.http.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=receive_buffer)
    lines = [
        f"POST {PATH} HTTP/1.1",
        f"host: {server.http}",
        *(f"{name}: {value}" for name, value in HEADERS),
    ]
    writer.write("\r\n".join([*lines, "content-length: 2", *headers, "", "{}"]).encode())
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


def reply(stage: str) -> bytes:
    return pb.LoadModelResponse(stage=stage).SerializeToString()


async def test_each_part_arrives_before_the_next_is_written() -> None:
    more: asyncio.Queue[str] = asyncio.Queue()

    async def produce(call: Call) -> None:
        while stage := await more.get():
            await call.write(reply(stage))

    async with serving(produce) as server, client(server) as one:
        for number in range(20):
            more.put_nowait(f"stage {number}")
            if not number:
                head = await one.head()
                assert head.startswith(b"HTTP/1.1 200 ")
                assert b"transfer-encoding: chunked" in head
            events = await one.chunk() or []
            assert [event.data for event in events] == [{"stage": f"stage {number}"}]
        more.put_nowait("")
        assert await one.rest() == []
        await until(lambda: server.count("calls") == 0)
        assert server.count("held_bytes") == server.count("unwritten_replies") == 0


async def test_a_client_that_does_not_read_holds_its_producer_back_and_then_gets_everything() -> None:
    rng = np.random.default_rng(5)
    stages = [rng.bytes(int(size)).hex() for size in rng.integers(1, 8000, 1500)]
    held: list[int] = []

    async def produce(call: Call) -> None:
        for stage in stages:
            await call.write(reply(stage))
            held.append(server.count("held_bytes"))

    async with serving(produce) as server, client(server) as one:
        await until(lambda: max(held, default=0) > 64 << 10)
        await one.head()
        assert [event.data["stage"] for event in await one.rest()] == stages
        assert max(held) < 256 << 10 < sum(map(len, stages))
        assert server.requests.done == [("LoadModel", "OK")]


async def endless(call: Call) -> None:
    while True:
        await call.write(reply("x" * 1000))


async def test_a_client_that_never_reads_is_cut_off() -> None:
    async with serving(endless, unread_s=0.2) as server, client(server):
        await until(lambda: server.requests.done == [("LoadModel", "CANCELLED")])
        assert server.refused("unread_replies") == 1
        await until(lambda: server.count("calls") == server.count("held_bytes") == 0)


async def silent(call: Call) -> None:
    await call.write(reply("one"))
    await asyncio.Event().wait()


@pytest.mark.parametrize("is_silent", [True, False])
async def test_a_client_that_leaves_ends_its_producer(is_silent: bool) -> None:
    async with serving(silent if is_silent else endless) as server:
        async with client(server) as one:
            await one.head()
            await one.chunk()
        await until(lambda: server.requests.done == [("LoadModel", "CANCELLED")])
        await until(lambda: server.count("calls") == server.count("held_bytes") == 0)


async def test_a_client_with_a_time_limit_gets_an_error_at_the_end() -> None:
    async with serving(silent) as server, client(server, "grpc-timeout: 1S") as one:
        await one.head()
        *_, last = await one.rest()
        assert (last.name, last.data["details"][0]["reason"]) == ("error", "DEADLINE_EXCEEDED")
        await until(lambda: server.requests.done == [("LoadModel", "DEADLINE_EXCEEDED")])


async def test_a_stop_cuts_off_what_does_not_end() -> None:
    async with serving(endless) as server, client(server) as one:
        await one.head()
        stopping = asyncio.create_task(server.front.stop(0))
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await one.rest()
        await stopping
        assert server.requests.done == [("LoadModel", "CANCELLED")]


async def test_a_stop_does_not_wait_for_a_client_that_does_not_read() -> None:
    size = 32 << 20  # more than the buffers of the system

    async def produce(call: Call) -> None:
        await call.write(reply("x" * size))
        await asyncio.Event().wait()

    async with serving(produce, unread_s=5.0) as server, client(server):
        await until(lambda: server.count("held_bytes") >= size)
        await server.front.flush()
        assert server.refused("unread_replies") == 0, "it has not been cut off yet"


# ------------------------------------------------------------------------------------------------------------- HTTP/2


def begin(peer: Http2, path: str) -> int:
    """The stream of a request."""
    stream, head = peer.begin(path, HEADERS)
    peer.send(head, data(stream, b"{}", end=True))
    return stream


async def test_many_streams_of_a_connection_leave_room_for_its_requests() -> None:
    streams = 400
    assert streams * 8 > FrontLimits(1).connection_steps
    end = asyncio.Event()

    async def produce(call: Call) -> None:
        await call.write(reply("one"))
        await end.wait()

    def talk(address: str) -> None:
        with Http2(address) as peer:
            first = {begin(peer, PATH) for _ in range(streams)}
            begun, ended = set[int](), set[int]()

            def read() -> None:
                frame = peer.frame()
                if isinstance(frame, DataFrame):
                    begun.add(frame.stream_id)
                if "END_STREAM" in frame.flags:
                    ended.add(frame.stream_id)

            while not begun >= first:
                read()
            short = begin(peer, LABEL)
            while short not in ended:
                read()
            assert ended == {short}
            loop.call_soon_threadsafe(end.set)
            while not ended >= first:
                read()

    loop = asyncio.get_running_loop()
    async with serving(produce, connection_bytes=64 << 20) as server:
        await asyncio.to_thread(talk, server.http)
        assert server.requests.done == [("LoadModel", "OK")] * streams


async def test_a_stream_that_is_not_read_ends_alone() -> None:
    def talk(address: str) -> int:
        with Http2(address, window=1000) as peer:
            begin(peer, PATH)
            while not isinstance(frame := peer.frame(), RstStreamFrame):
                pass
            short = begin(peer, LABEL)
            while peer.frame().stream_id != short:
                pass
            return frame.error_code

    async with serving(endless, unread_s=0.2) as server:
        assert await asyncio.to_thread(talk, server.http) == CALM
        await until(lambda: server.requests.done == [("LoadModel", "CANCELLED")])
        assert server.refused("unread_replies") == 1
