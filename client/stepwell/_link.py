"""The stream of a sync client: frames out, parts of their replies in.

One thread reads the open stream and hands each part to the caller that waits for it. It ends with the
stream; a link opens a new stream when it is next used.
"""

from __future__ import annotations

import atexit
import itertools
import math
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import grpc

from stepwell import _channel
from stepwell._flow import Exchange
from stepwell.errors import DeadlineExceededError, StepwellError, UnavailableError
from stepwell.v1 import sessions_pb2, sessions_pb2_grpc

Inbox = queue.SimpleQueue[sessions_pb2.StepStreamResponse | StepwellError]

# A reader thread must not outlive the interpreter's machinery under it.
_links: weakref.WeakSet[Link] = weakref.WeakSet()


class Link:
    """A stream that is opened when needed and opened again when it broke. Thread-safe."""

    def __init__(self, stub: sessions_pb2_grpc.SessionServiceStub) -> None:
        self._stub = stub
        self._lock = threading.Lock()
        self._stream: _Stream | None = None
        self._closed = False
        _links.add(self)

    def exchange(self, ask: Exchange) -> None:
        """Sends a frame and passes on the parts of its reply.

        Raises:
            StepwellError: The stream broke or the time limit passed; what was not answered is unknown.
        """
        stream = self._open_stream()
        frame_id, inbox = stream.register()
        try:
            stream.send(ask.request(frame_id))
            while not ask.frame.round_over:
                ask.on_part(ask.frame.accept(_receive(inbox, ask)))
        finally:
            stream.forget(frame_id)

    def _open_stream(self) -> _Stream:
        with self._lock:
            if self._closed:
                raise _channel.closed()
            if self._stream is None or self._stream.error is not None:
                self._stream = _Stream(self._stub)
            return self._stream

    def close(self) -> None:
        """Ends the stream; callers that wait get an error."""
        with self._lock:
            self._closed = True
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


def _receive(inbox: Inbox, ask: Exchange) -> sessions_pb2.StepStreamResponse:
    remaining_s = ask.deadline.remaining_s()
    try:
        answer = inbox.get(timeout=None if math.isinf(remaining_s) else remaining_s)
    except queue.Empty:
        raise DeadlineExceededError("the time limit passed while a frame was unanswered") from None
    if isinstance(answer, StepwellError):
        raise answer
    return answer


class _Stream:
    """One call of StepStream, with the thread that reads it."""

    def __init__(self, stub: sessions_pb2_grpc.SessionServiceStub) -> None:
        self._outbox: queue.SimpleQueue[sessions_pb2.StepStreamRequest | None] = queue.SimpleQueue()
        self._inboxes: dict[int, Inbox] = {}
        self._lock = threading.Lock()
        self._frame_ids = itertools.count(1)
        self.error: StepwellError | None = None
        self._call: Any = stub.StepStream(self._requests())
        self._reader = threading.Thread(target=self._read, name="stepwell-stream", daemon=True)
        self._reader.start()

    def _requests(self) -> Iterator[sessions_pb2.StepStreamRequest]:
        while (request := self._outbox.get()) is not None:
            yield request

    def register(self) -> tuple[int, Inbox]:
        """An id for a frame, and where the parts of its reply will be."""
        frame_id, inbox = next(self._frame_ids), Inbox()
        with self._lock:
            self._inboxes[frame_id] = inbox
            if self.error is not None:
                inbox.put(self.error)
        return frame_id, inbox

    def forget(self, frame_id: int) -> None:
        """Nobody waits for this frame any more."""
        with self._lock:
            self._inboxes.pop(frame_id, None)

    def send(self, request: sessions_pb2.StepStreamRequest) -> None:
        self._outbox.put(request)

    def _read(self) -> None:
        error: StepwellError = UnavailableError("the server ended the stream")
        try:
            for response in self._call:
                with self._lock:
                    inbox = self._inboxes.get(response.frame_id)
                if inbox is not None:
                    inbox.put(response)
        except grpc.RpcError as failed:
            error = _channel.translate(failed)
        finally:
            self._end(error)

    def _end(self, error: StepwellError) -> None:
        with self._lock:
            self.error = error
            inboxes = list(self._inboxes.values())
        self._outbox.put(None)
        for inbox in inboxes:
            inbox.put(error)

    def close(self) -> None:
        """Ends the call and waits for the reader."""
        self._outbox.put(None)
        self._call.cancel()
        self._reader.join()


@atexit.register
def _close_links() -> None:
    for link in list(_links):
        link.close()
