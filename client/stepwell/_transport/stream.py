"""The stream of a sync client: sends frames and receives the parts of their replies.

One thread reads the open stream and gives each part to the sink of its frame. It ends with the stream. A link
whose stream broke opens a new one when it is next used.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TypeAlias

import grpc

from stepwell._base.log import LOG
from stepwell._transport import channel
from stepwell.errors import StepwellError, UnavailableError
from stepwell.v1 import sessions_pb2

Answer: TypeAlias = sessions_pb2.StepStreamResponse | StepwellError
"""A part of the reply to a frame, or the error that ended it."""
Sink: TypeAlias = Callable[[Answer], None]
MakeRequest: TypeAlias = Callable[[int], bytes]
"""Builds the encoded message of a frame with this number on the stream."""
OpenStream = Callable[[Iterator[bytes]], channel.OpenedStream]

# Reader threads must have ended before the interpreter shuts down.
_links: weakref.WeakSet[Link] = weakref.WeakSet()
# A forked child must not try to stop its parent's threads.
os.register_at_fork(after_in_child=_links.clear)


class Link:
    """A stream that is opened when needed, and reopened after it broke. Thread-safe."""

    def __init__(self, open_stream: OpenStream, address: str) -> None:
        self._open = open_stream
        self._address = address
        self._lock = threading.Lock()
        self._stream: _Stream | None = None
        self._ended: Callable[[], StepwellError] | None = None
        self._loss: weakref.finalize[[], Link] | None = None
        _links.add(self)

    def post(self, make: MakeRequest, sink: Sink) -> Callable[[], None]:
        """Sends a frame without waiting for its reply.

        Args:
            make: Builds its message.
            sink: Called with each part of the reply, or with the error that ended it. The reader of the stream calls
                it, so it must neither block nor raise.

        Returns:
            A function that unregisters the sink. Call it when the round is over.

        Raises:
            StepwellError: Nothing was sent, and the sink will not be called.
        """
        stream = self._open_stream()
        return functools.partial(stream.forget, stream.send(make, sink))

    def _open_stream(self) -> _Stream:
        with self._lock:
            if self._ended is not None:
                raise self._ended()
            if self._stream is None or self._stream.error is not None:
                if self._stream is not None:
                    LOG.info("reopening the stream to %s, which broke: %s", self._address, self._stream.error)
                self._stream = _Stream(self._open)
                self._on_loss(self._stream.hang_up)
            return self._stream

    def _on_loss(self, hang_up: Callable[[], None]) -> None:
        # If the link is collected without being closed, its stream and thread must end too.
        if self._loss is not None:
            self._loss.detach()
        self._loss = weakref.finalize(self, hang_up)
        self._loss.atexit = False

    def close(self, ended: Callable[[], StepwellError] = channel.closed) -> None:
        """Ends the stream; frames in flight and later ones get these errors."""
        with self._lock:
            self._ended = ended
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


class _Stream:
    """One call of StepStream, with the thread that reads it."""

    def __init__(self, open_stream: OpenStream) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._sinks: dict[int, Sink] = {}
        self._lock = threading.Lock()
        self._frame_ids = itertools.count(1)
        self.error: StepwellError | None = None
        self._consumer: threading.Thread | None = None
        """gRPC's thread, which takes the requests."""
        self._opened = open_stream(self._requests())
        self._reader = threading.Thread(target=self._read, name="stepwell-stream", daemon=True)
        self._reader.start()

    def _requests(self) -> Iterator[bytes]:
        self._consumer = threading.current_thread()
        while (request := self._outbox.get()) is not None:
            yield request

    def forget(self, frame_id: int) -> None:
        """Unregisters the sink of a frame."""
        with self._lock:
            self._sinks.pop(frame_id, None)

    def send(self, make: MakeRequest, sink: Sink) -> int:
        """Queues a frame; `sink` is called with the parts of its reply, or with the error. Returns its id."""
        frame_id = next(self._frame_ids)
        request = make(frame_id)
        with self._lock:
            error = self.error
            if error is None:
                self._sinks[frame_id] = sink
        if error is None:
            self._outbox.put(request)
        else:
            sink(error)
        return frame_id

    def hang_up(self) -> None:
        """Half-closes the stream; the server then ends the call, which ends the reader."""
        self._outbox.put(None)

    def _read(self) -> None:
        error: StepwellError = UnavailableError("the server ended the stream")
        try:
            for response in self._opened.call:
                with self._lock:
                    sink = self._sinks.get(response.frame_id)
                if sink is not None:
                    sink(response)
        except grpc.RpcError as failed:
            error = self._opened.error(failed)
        finally:
            self._end(error)

    def _end(self, error: StepwellError) -> None:
        with self._lock:
            self.error = error
            sinks = list(self._sinks.values())
        self.hang_up()
        for sink in sinks:
            sink(error)

    def close(self) -> None:
        """Ends the call and waits for its threads.

        This includes gRPC's own thread, a daemon that takes a lock of the call to end it. If the interpreter ended in
        the meantime, the lock stayed locked, and the call's destructor waited for it forever.
        """
        self.hang_up()
        self._opened.call.cancel()
        self._reader.join()
        if self._consumer is not None:
            self._consumer.join()


@atexit.register
def _close_links() -> None:
    for link in list(_links):
        link.close()
