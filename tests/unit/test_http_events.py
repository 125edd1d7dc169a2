"""Server-sent events without a network: the replies of streaming methods, errors, comments, and slow clients."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from stepwell.v1 import models_pb2 as pb
from stepwell_server.errors import ModelNotFound
from stepwell_server.rpc.boundary import Boundary
from stepwell_server.rpc.fronts.base import Call
from stepwell_server.rpc.http.events import accepts_events
from support.engine.fake_executor import PLAIN
from support.rpc.calls import MAX_MESSAGE_BYTES, Calls, calls
from support.rpc.fake_call import Requests
from support.rpc.http_client import EVENTS, Client, Streamed

LOAD = "/v1/models/m:load"


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
    requests = Requests()
    serve = Boundary(requests, MAX_MESSAGE_BYTES).stream("LoadModel", produce)
    async with calls() as at:
        methods = {**at.methods, "LoadModel": dataclasses.replace(at.methods["LoadModel"], serve=serve)}
        found = Calls(at.at, methods, at.slow_steps, at.live, at.loads)
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
