"""The stream of an async client: sends frames and receives the parts of their replies; `_transport.stream`, awaited."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from stepwell._base.log import LOG
from stepwell._transport import channel
from stepwell._transport.stream import MakeRequest, Sink
from stepwell.errors import StepwellError, UnavailableError

OpenStream = Callable[[AsyncIterator[bytes]], Awaitable[channel.OpenedStream]]


class AsyncLink:
    """A stream that is opened when needed, and reopened after it broke. Belongs to one event loop."""

    def __init__(self, open_stream: OpenStream, address: str) -> None:
        self._open = open_stream
        self._address = address
        self._stream: _Stream | None = None
        self._ended: Callable[[], StepwellError] | None = None

    def post(self, make: MakeRequest, sink: Sink) -> Callable[[], None]:
        """Sends a frame without waiting for its reply, by the rules of `Link.post`."""
        stream = self._open_stream()
        return functools.partial(stream.forget, stream.send(make, sink))

    def _open_stream(self) -> _Stream:
        if self._ended is not None:
            raise self._ended()
        if self._stream is None or self._stream.error is not None:
            if self._stream is not None:
                LOG.info("reopening the stream to %s, which broke: %s", self._address, self._stream.error)
            self._stream = _Stream(self._open)
        return self._stream

    async def close(self, ended: Callable[[], StepwellError] = channel.closed) -> None:
        """Ends the stream; frames in flight and later ones get these errors."""
        self._ended = ended
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close()


class _Stream:
    """One call of StepStream, with the task that reads it."""

    def __init__(self, open_stream: OpenStream) -> None:
        self._outbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._sinks: dict[int, Sink] = {}
        self._frame_ids = itertools.count(1)
        self.error: StepwellError | None = None
        self._open = open_stream
        self._opened: channel.OpenedStream | None = None
        self._reader = asyncio.create_task(self._read(), name="stepwell-stream")

    async def _requests(self) -> AsyncIterator[bytes]:
        while (request := await self._outbox.get()) is not None:
            yield request

    def forget(self, frame_id: int) -> None:
        """Unregisters the sink of a frame."""
        self._sinks.pop(frame_id, None)

    def send(self, make: MakeRequest, sink: Sink) -> int:
        """Queues a frame; `sink` is called with the parts of its reply, or with the error. Returns its id."""
        frame_id = next(self._frame_ids)
        request = make(frame_id)
        self._sinks[frame_id] = sink
        self._outbox.put_nowait(request)
        return frame_id

    async def _read(self) -> None:
        error: StepwellError = UnavailableError("the server ended the stream")
        try:
            opened = self._opened = await self._open(self._requests())
        except StepwellError as failed:
            self._end(failed)
            return
        try:
            async for response in opened.call:
                sink = self._sinks.get(response.frame_id)
                if sink is not None:
                    sink(response)
        except grpc.RpcError as failed:
            error = opened.error(failed)
        finally:
            self._end(error)

    def _end(self, error: StepwellError) -> None:
        self.error = error
        self._outbox.put_nowait(None)
        for sink in list(self._sinks.values()):
            sink(error)

    async def close(self) -> None:
        """Ends the call and waits for the reader."""
        self._outbox.put_nowait(None)
        if self._opened is None:
            self._reader.cancel()  # it waits for a token
        else:
            self._opened.call.cancel()
        await asyncio.wait([self._reader])
