"""Server-sent events without a network: the replies of streaming methods, errors, comments, and slow clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from google.protobuf import duration_pb2

from stepwell.v1 import models_pb2 as pb
from stepwell.v1 import watch_pb2
from stepwell_server.errors import InvalidInput, ModelNotFound, Overloaded
from stepwell_server.rpc.boundary import Boundary
from stepwell_server.rpc.fronts.base import Call, Method
from stepwell_server.rpc.fronts.shape import Shape
from stepwell_server.rpc.http.events import accepts_events
from support.engine.fake_executor import PLAIN
from support.rpc.calls import MAX_MESSAGE_BYTES, Calls, calls
from support.rpc.fake_call import Requests
from support.rpc.http_client import EVENTS, JSON, SERVICES, Client, Streamed

LOAD = "/v1/models/m:load"
SERVICE_OF = {method.name: service.full_name for service in SERVICES for method in service.methods}
INPUT_OF = {method.name: method.input_type for service in SERVICES for method in service.methods}


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("text/event-stream", True),
        ("Text/Event-Stream; charset=utf-8", True),
        ("application/json, text/event-stream;q=0.5", True),
        ("text/event-stream; q=0", False),
        ("text/event-stream;q=0.000, */*", False),
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("text/event-streams", False),
    ],
)
def test_events_are_for_those_who_ask(accept: str, expected: bool) -> None:
    assert accepts_events(accept) is expected


async def test_a_load_shows_its_stages(tmp_path: Path) -> None:
    async with calls(live_options={"root": tmp_path}) as at:
        at.loads.free.clear()
        path = at.loads.file(tmp_path, "other.keras", PLAIN)
        async with Client(at).streamed("POST", "/v1/models/other:load", {"path": path}) as streamed:
            first = await streamed.event()
            assert (first.name, first.data) == ("reply", {"stage": "load"})
            head = dict(streamed.head.headers)
            assert (streamed.head.status, head["content-type"]) == (200, "text/event-stream")
            assert head["cache-control"] == "no-store"
            at.loads.free.set()
            *_, last = await streamed.rest()
            assert last.data["model"]["name"] == "other"


async def test_without_the_wish_for_events_the_replies_are_a_list(tmp_path: Path) -> None:
    async with calls(live_options={"root": tmp_path}) as at:
        path = at.loads.file(tmp_path, "other.keras", PLAIN)
        status, found = await Client(at).json("POST", "/v1/models/other:load", {"path": path})
        assert (status, found[0], found[-1]["model"]["name"]) == (200, {"stage": "load"}, "other")


# ------------------------------------------------------------------------------------------------------------ streams

Produce = Callable[[Call], Awaitable[None]]


class Sleeps:
    """A `sleep` that ends when the test says so."""

    def __init__(self) -> None:
        self._ends: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()

    async def __call__(self, _seconds: float) -> None:
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ends.put_nowait(end)
        await end

    async def pass_one(self) -> None:
        """The running sleep ends, and the next one has begun."""
        (await asyncio.wait_for(self._ends.get(), 60)).set_result(None)
        while self._ends.empty():  # noqa: ASYNC110 (a turn of the loop, no time)
            await asyncio.sleep(0)


@asynccontextmanager
async def producer(
    produce: Produce, *origins: str, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> AsyncIterator[tuple[Client, Requests]]:
    """A client of a server whose LoadModel produces what the test wants."""
    async with producers({"LoadModel": produce}, *origins, sleep=sleep) as found:
        yield found


@asynccontextmanager
async def producers(
    produce: Mapping[str, Produce],
    *origins: str,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncIterator[tuple[Client, Requests]]:
    """The same for several methods."""
    requests = Requests()
    boundary = Boundary(requests, MAX_MESSAGE_BYTES)
    async with calls() as at:
        methods = {
            name: Method(
                SERVICE_OF[name], name, boundary.stream(name, one), Shape(INPUT_OF[name]), streams=True
            )
            for name, one in produce.items()
        }
        found = Calls(at.at, {**at.methods, **methods}, at.slow_steps, at.live, at.loads)
        yield Client(found, *origins, sleep=sleep), requests


def reply(stage: str) -> bytes:
    return pb.LoadModelResponse(stage=stage).SerializeToString()


async def test_an_error_before_the_first_event_has_its_status() -> None:
    async def produce(call: Call) -> None:
        await call.read()
        raise ModelNotFound("no such model", model="m")

    async with producer(produce) as (client, requests):
        answer = await client.send("POST", LOAD, b"{}", EVENTS)
        assert (answer.status, json.loads(answer.body)["message"]) == (404, "no such model")
        assert dict(answer.headers)["content-type"] == "application/json"
        assert requests.done == [("LoadModel", "NOT_FOUND")]


@pytest.mark.parametrize("is_known", [True, False])
async def test_an_error_after_the_first_event_is_the_last_event(is_known: bool) -> None:
    async def produce(call: Call) -> None:
        await call.write(reply("one"))
        raise ModelNotFound("no such model", model="m") if is_known else ZeroDivisionError

    async with producer(produce) as (client, _), client.streamed("POST", LOAD, {}) as streamed:
        first, error = await streamed.rest()
        assert (first.data, error.name) == ({"stage": "one"}, "error")
        assert error.data["code"] == (5 if is_known else 13)
        assert error.data["details"][0]["reason"] == ("MODEL_NOT_FOUND" if is_known else "INTERNAL")
        assert "division" not in str(error.data)


async def test_a_body_that_is_not_the_message_is_refused() -> None:
    async def produce(call: Call) -> None:
        await call.read()

    async with producer(produce) as (client, _):
        answer = await client.send("POST", LOAD, b"[]", EVENTS)
        assert (answer.status, json.loads(answer.body)["code"]) == (400, 3)


async def test_a_stream_without_replies_has_a_head_and_an_end() -> None:
    async def produce(call: Call) -> None:
        await call.read()

    async with producer(produce) as (client, _), client.streamed("POST", LOAD, {}) as streamed:
        assert await streamed.rest() == []
        assert streamed.head.status == 200


async def test_pages_of_allowed_origins_may_read_the_events() -> None:
    app = "https://app.example.org"

    async def produce(call: Call) -> None:
        await call.write(reply("one"))

    async with producer(produce, app) as (client, _):
        async with client.streamed("POST", LOAD, {}, {**EVENTS, "origin": app}) as streamed:
            await streamed.rest()
            assert dict(streamed.head.headers)["access-control-allow-origin"] == app
        refused = await client.send("POST", LOAD, b"{}", {**EVENTS, "origin": "https://evil.example"})
        assert refused.status == 403


async def test_large_replies_are_the_same_as_small_ones() -> None:
    stages = [chr(0x61 + number) * int(size) for number, size in enumerate([5, 200_000, 7, 90_000])]

    async def produce(call: Call) -> None:
        for stage in stages:
            await call.write(reply(stage))

    async with producer(produce) as (client, _), client.streamed("POST", LOAD, {}) as streamed:
        assert [event.data["stage"] for event in await streamed.rest()] == stages


async def test_lines_in_a_text_stay_in_their_event() -> None:
    stage = "one\ntwo\r\n\n: three\u2028"

    async def produce(call: Call) -> None:
        await call.write(reply(stage))

    async with producer(produce) as (client, _), client.streamed("POST", LOAD, {}) as streamed:
        assert (await streamed.event()).data == {"stage": stage}


async def test_a_client_that_does_not_read_holds_its_producer_back() -> None:
    written: list[int] = []

    async def produce(call: Call) -> None:
        for number in range(10):
            await call.write(reply(str(number)))
            written.append(number)

    async with producer(produce) as (client, _), client.streamed("POST", LOAD, {}) as streamed:
        streamed.call.client_reads.clear()
        await streamed.event()
        for _ in range(50):
            await asyncio.sleep(0)
        assert written == [0]
        streamed.call.client_reads.set()
        assert len(await streamed.rest()) == 9


async def test_a_client_that_leaves_ends_its_producer() -> None:
    async def produce(call: Call) -> None:
        await call.write(reply("one"))
        await asyncio.Event().wait()

    async with producer(produce) as (client, requests):
        async with client.streamed("POST", LOAD, {}) as streamed:
            await streamed.event()
            assert requests.streams["LoadModel"] == 1
        assert requests.done == [("LoadModel", "CANCELLED")]
        assert requests.streams["LoadModel"] == 0


async def test_silence_is_filled_with_comments() -> None:
    sleeps = Sleeps()
    more: asyncio.Queue[str] = asyncio.Queue()

    async def produce(call: Call) -> None:
        while stage := await more.get():
            await call.write(reply(stage))

    async def comments(streamed: Streamed) -> int:
        await sleeps.pass_one()
        while not streamed.call.replies.empty():
            assert await streamed.part() == []
        return streamed.reader.comments

    async with producer(produce, sleep=sleeps) as (client, _), client.streamed("POST", LOAD, {}) as streamed:
        assert await comments(streamed) == 1, "the answer begins with a comment if need be"
        assert await comments(streamed) == 2
        more.put_nowait("one")
        assert (await streamed.event()).data == {"stage": "one"}
        assert await comments(streamed) == 2, "an event left in this interval"
        assert await comments(streamed) == 3
        streamed.call.client_reads.clear()
        more.put_nowait("two")
        while not more.empty():  # noqa: ASYNC110 (a turn of the loop, no time)
            await asyncio.sleep(0)
        for _ in range(5):
            assert await comments(streamed) == 3, "a client that does not read gets none"
        streamed.call.client_reads.set()
        assert (await streamed.event()).data == {"stage": "two"}
        more.put_nowait("")
        assert await streamed.rest() == []


# ------------------------------------------------------------------------------------------------------------ watches

WATCH = "/v1/watch"


class Watched:
    """Sessions and a server that change as the test says."""

    def __init__(self) -> None:
        self.sessions: asyncio.Queue[str] = asyncio.Queue()
        """Ids of sessions with an event; an empty one ends the watch."""
        self.server: asyncio.Queue[float] = asyncio.Queue()
        """Uptimes of the server."""
        self.asked: dict[str, object] = {}
        """The requests, by the method."""

    async def watch_sessions(self, call: Call) -> None:
        request = watch_pb2.WatchSessionsRequest.FromString(await call.read() or b"")
        self.asked["WatchSessions"] = request
        if not request.session_ids:
            raise InvalidInput("session_ids must have 1 to 1024 entries; got 0")
        while session_id := await self.sessions.get():
            event = watch_pb2.SessionEvent(session_id=session_id)
            await call.write(watch_pb2.WatchSessionsResponse(events=[event]).SerializeToString())

    async def watch_server(self, call: Call) -> None:
        self.asked["WatchServer"] = watch_pb2.WatchServerRequest.FromString(await call.read() or b"")
        while True:
            server = watch_pb2.ServerActivity(uptime_seconds=await self.server.get())
            await call.write(watch_pb2.WatchServerResponse(server=server).SerializeToString())

    @property
    def produce(self) -> Mapping[str, Produce]:
        return {"WatchSessions": self.watch_sessions, "WatchServer": self.watch_server}


async def test_one_stream_has_the_events_of_sessions_and_of_the_server() -> None:
    watched = Watched()
    body = {"sessions": {"session_ids": ["a", "b"], "interval": "0.5s"}, "server": {"interval": "2s"}}
    async with producers(watched.produce) as (client, requests):
        async with client.streamed("POST", WATCH, body, JSON) as streamed:
            watched.sessions.put_nowait("a")
            one = await streamed.event()
            assert (one.name, one.data) == ("sessions", {"events": [{"session_id": "a"}]})
            watched.server.put_nowait(1.5)
            other = await streamed.event()
            assert (other.name, other.data) == ("server", {"server": {"uptime_seconds": 1.5}})
            watched.sessions.put_nowait("")
            watched.server.put_nowait(2.5)
            assert (await streamed.event()).name == "server"
            assert requests.done == [("WatchSessions", "OK")]
        assert requests.done[1:] == [("WatchServer", "CANCELLED")]
    assert watched.asked == {
        "WatchSessions": watch_pb2.WatchSessionsRequest(
            session_ids=["a", "b"], interval=duration_pb2.Duration(nanos=500_000_000)
        ),
        "WatchServer": watch_pb2.WatchServerRequest(interval=duration_pb2.Duration(seconds=2)),
    }


@pytest.mark.parametrize(
    ("method", "path", "body", "name"),
    [
        ("POST", WATCH, {"sessions": {"session_ids": ["a"]}}, "sessions"),
        ("POST", "/v1/sessions:watch", {"session_ids": ["a"]}, "sessions"),
        ("POST", WATCH, {"server": {}, "sessions": None}, "server"),
        ("GET", "/v1/server:watch?interval=0.5s", None, "server"),
    ],
)
async def test_a_watch_alone_is_answered_with_events_whatever_is_accepted(
    method: str, path: str, body: object, name: str
) -> None:
    watched = Watched()
    watched.sessions.put_nowait("a")
    watched.server.put_nowait(1.0)
    async with (
        producers(watched.produce) as (client, _),
        client.streamed(method, path, body, JSON) as streamed,
    ):
        assert (await streamed.event()).name == name
        assert len(watched.asked) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{}", "the body must have one of the fields sessions, server; got none of them"),
        (b"{", "the body must be a JSON object"),
        (b'{"sessions": []}', "sessions must be an object; got a list"),
        (b'{"sessions": {"session_ids": [1]}}', "sessions.session_ids[0] must be a string; got 1"),
        (b'{"sessions": {}, "server": {}}', "session_ids must have 1 to 1024 entries; got 0"),
        (b'{"server": {"interval": 1}}', 'server.interval must be a duration such as "3.5s"; got 1'),
        (
            b'{"sessions": {"session_ids": ["a"], "revisions": 2, "interval": "1s"}}',
            "sessions.interval must be left out if sessions.revisions is given; got both",
        ),
    ],
)
async def test_a_watch_that_makes_no_sense_is_refused(body: bytes, words: str) -> None:
    watched = Watched()
    async with producers(watched.produce) as (client, requests):
        answer = await client.send("POST", WATCH, body, JSON)
        assert (answer.status, words in json.loads(answer.body)["message"]) == (400, True), answer.body
        assert ("INVALID_ARGUMENT" in {code for _, code in requests.done}) is True
        assert not any(requests.streams.values())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", WATCH, 405), ("POST", f"{WATCH}?server=1", 400), ("POST", f"{WATCH}/a", 404)],
)
async def test_other_requests_near_the_watch_are_refused(method: str, path: str, status: int) -> None:
    async with producers(Watched().produce) as (client, _):
        assert (await client.send(method, path, b'{"server": {}}', JSON)).status == status


async def test_a_watch_too_many_is_refused_with_the_time_of_a_retry() -> None:
    async def refuse(call: Call) -> None:
        await call.read()
        raise Overloaded("too much is watched", 1.5)

    async with producers({**Watched().produce, "WatchSessions": refuse}) as (client, requests):
        answer = await client.send("POST", WATCH, b'{"sessions": {}, "server": {}}', JSON)
        assert (answer.status, dict(answer.headers)["retry-after"]) == (429, "2")
        assert requests.done == [("WatchSessions", "RESOURCE_EXHAUSTED"), ("WatchServer", "CANCELLED")]


async def test_a_failure_of_one_watch_ends_the_other() -> None:
    watched = Watched()

    async def fail(call: Call) -> None:
        await call.read()
        await watched.sessions.get()
        raise ModelNotFound("no such model", model="m")

    async with producers({**watched.produce, "WatchSessions": fail}) as (client, requests):
        body: object = {"sessions": {}, "server": {}}
        async with client.streamed("POST", WATCH, body, JSON) as streamed:
            watched.server.put_nowait(1.0)
            await streamed.event()
            watched.sessions.put_nowait("")
            (error,) = await streamed.rest()
            assert (error.name, error.data["code"]) == ("error", 5)
        assert requests.done == [("WatchSessions", "NOT_FOUND"), ("WatchServer", "CANCELLED")]
