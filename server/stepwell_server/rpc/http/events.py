"""Answers in the form of server-sent events: the replies of streaming methods, each as an event in JSON.

The head of the answer leaves with the first event, so a call that is refused before it has an answer of its own status.
Later, an error is the last event. While no event leaves, comments show proxies and both ends that the other is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from google.protobuf.message import Message

from stepwell_server.rpc.boundary import internal
from stepwell_server.rpc.fronts.base import CallEnded, HttpAnswer, HttpCall
from stepwell_server.rpc.http.answers import Headers, of_error, of_status

MEDIA_TYPE = "text/event-stream"
EVENT = "reply"
"""Name of the events of methods that have no other."""
KEEP_ALIVE_S = 15.0
"""Interval of comments while no event leaves. Proxies close connections that are silent for 30 s or longer."""
_COMMENT = b": keep-alive\n\n"
_HEADERS: Headers = (
    ("content-type", MEDIA_TYPE),
    ("cache-control", "no-store"),
    ("x-content-type-options", "nosniff"),
    ("x-accel-buffering", "no"),  # nginx would otherwise collect events
)
Sleep = Callable[[float], Awaitable[None]]
Write = Callable[[bytes], Coroutine[Any, Any, None]]
AsJson = Callable[[type[Message], bytes], Awaitable[bytes]]
"""Returns a serialized reply of that type as JSON."""


def accepts_events(accept: str) -> bool:
    """Whether the header `accept` names events."""
    for one in accept.split(","):
        media_type, _, parameters = one.partition(";")
        if media_type.strip().lower() == MEDIA_TYPE:
            return parameters.replace(" ", "").lower() not in {"q=0", "q=0.0", "q=0.00", "q=0.000"}
    return False


class Source(NamedTuple):
    """A method whose replies are events."""

    event: str
    """Name of the events."""
    reply_type: type[Message]
    serve: Callable[[Write], Awaitable[bytes]]
    """Serves a call of the method, which writes its replies with the given function. It may raise `CallEnded`."""


class EventAnswer:
    """The answer to a request, with the events of one or several methods. Lives on the event loop.

    Args:
        call: The request.
        headers: Further headers of the answer.
        as_json: Converts replies.
        sleep: Sleeps between two comments.
    """

    def __init__(
        self, call: HttpCall, headers: Headers, as_json: AsJson, sleep: Sleep = asyncio.sleep
    ) -> None:
        self._call = call
        self._headers = headers
        self._as_json = as_json
        self._sleep = sleep
        self._is_begun = False
        self._is_quiet = True
        """Whether nothing was sent since the last comment was due."""
        self._count = 0
        self._sending = asyncio.Lock()

    async def run(self, sources: Sequence[Source]) -> HttpAnswer | None:
        """Send the events until all methods have ended, or one has failed. None: they were sent.

        A failure before the first event is returned, without the further headers.
        """
        try:
            await self._serve(sources)
        except CallEnded as ended:
            return await self._fail(of_status(ended.status))
        except Exception as error:
            return await self._fail(of_error(internal(error)))
        if not self._is_begun:
            await self._send(b"")
        return None

    async def _serve(self, sources: Sequence[Source]) -> None:
        # a task for each: the guard ends a stream by cancelling its task
        tasks = [asyncio.create_task(self._serve_one(source)) for source in sources]
        keeping_alive = asyncio.create_task(self._keep_alive())
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in ended:
                task.result()
        finally:
            for task in (*tasks, keeping_alive):
                task.cancel()
            await asyncio.gather(*tasks, keeping_alive, return_exceptions=True)

    async def _serve_one(self, source: Source) -> None:
        async def write(reply: bytes) -> None:
            await self._send_event(source.event, await self._as_json(source.reply_type, reply))

        await source.serve(write)

    async def _fail(self, answer: HttpAnswer) -> HttpAnswer | None:
        if not self._is_begun:
            return answer
        await self._send_event("error", answer.body)
        return None

    async def _send_event(self, event: str, document: bytes) -> None:
        self._count += 1
        await self._send(b"event: %b\nid: %d\ndata: %b\n\n" % (event.encode(), self._count, document))

    async def _send(self, part: bytes) -> None:
        # one at a time: a call has one writer
        async with self._sending:
            self._is_quiet = False
            if self._is_begun:
                await self._call.write(part)
                return
            self._is_begun = True
            self._call.begin(HttpAnswer(HTTPStatus.OK, (*_HEADERS, *self._headers), part))

    async def _keep_alive(self) -> None:
        while True:
            await self._sleep(KEEP_ALIVE_S)
            if self._is_quiet and not self._sending.locked():
                await self._send(_COMMENT)
            self._is_quiet = True
