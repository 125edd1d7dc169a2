"""A failed call is freed at once, without Python's cycle collector."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from typing import Any

import numpy as np
import pytest

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.errors import InvalidInput, SessionNotFound
from stepwell_server.rpc.boundary import Boundary
from stepwell_server.rpc.fronts.base import CallEnded
from stepwell_server.rpc.steps.stream import FrameStream, StreamLimits
from stepwell_server.rpc.triton.inference import service_pb2 as triton_pb
from stepwell_server.rpc.triton.stream import InferStream
from support.engine.harness import running
from support.rpc.fake_call import FakeCall, Requests
from support.rpc.streams import Streams, message

pytestmark = pytest.mark.usefixtures("without_collector")
_ROOMY = StreamLimits(frames=100, bytes=1 << 20)


class _Failing:
    """A behaviour that fails while it holds an array."""

    def __init__(self, how: str) -> None:
        self._how = how
        self.began = asyncio.Event()
        self.array: weakref.ref[Any] | None = None

    async def __call__(self, _request: object, call: object) -> pb.GetSessionResponse:
        large = np.zeros(1 << 20)
        self.array = weakref.ref(large)
        self.began.set()
        if self._how == "wait":
            await asyncio.Event().wait()
        if self._how == "future":
            told: asyncio.Future[pb.GetSessionResponse] = asyncio.get_running_loop().create_future()
            told.set_exception(SessionNotFound("s", "no session 's'"))
            return await told  # the error's frames hold the future, and that the error
        try:
            raise {"refuse": InvalidInput("no"), "break": ValueError("no")}[self._how]
        except (InvalidInput, ValueError) as error:
            kept = error
            raise kept from KeyError("a cause")

    @property
    def is_freed(self) -> bool:
        assert self.array is not None
        return self.array() is None


@pytest.mark.parametrize("how", ["refuse", "break", "future"])
async def test_a_failed_call_is_freed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        logging.Logger, "error", lambda *_, **__: None
    )  # pytest keeps each line, and its traceback
    boundary, failing = Boundary(Requests(), max_message_bytes=1024), _Failing(how)
    serve = boundary.unary("GetSession", failing, pb.GetSessionRequest)
    call = FakeCall(b"\n\x01s")
    freed = weakref.ref(call)
    with pytest.raises(CallEnded) as caught:
        await serve(call)
    assert caught.value.status.message
    del call, caught
    assert freed() is None
    assert failing.is_freed


async def test_invalid_message_bytes_are_freed() -> None:
    serve = Boundary(Requests(), 1024).unary("GetSession", _Failing("refuse"), pb.GetSessionRequest)
    call = FakeCall(b"\xff" * 100)
    freed = weakref.ref(call)
    with pytest.raises(CallEnded):
        await serve(call)
    del call
    assert freed() is None


async def test_a_cancelled_call_is_freed() -> None:
    failing = _Failing("wait")
    serve = Boundary(Requests(), 1024).unary("GetSession", failing, pb.GetSessionRequest)
    call = FakeCall()
    freed = weakref.ref(call)
    task = asyncio.create_task(serve(call))
    del call
    await failing.began.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    del task
    await _turns()
    assert freed() is None
    assert failing.is_freed


async def test_a_request_is_not_kept_with_its_message() -> None:
    seen: list[bytes] = []

    async def behaviour(_request: object, call: Any) -> pb.GetSessionResponse:
        seen.append(call.request)
        return pb.GetSessionResponse()

    await Boundary(Requests(), 1024).unary("GetSession", behaviour, pb.GetSessionRequest)(
        FakeCall(b"\n\x01s")
    )
    assert seen == [b""]


@pytest.mark.parametrize("how", ["bytes", "cancel"])
async def test_a_stream_that_fails_is_freed(how: str) -> None:
    async with running() as at:
        call, limits = FakeCall(), _ROOMY
        freed = weakref.ref(call)

        async def behaviour(call: Any) -> None:
            await FrameStream(at.engine, at.clock, 1 << 20, limits, Requests(), call).run()

        task = asyncio.create_task(Boundary(Requests(), 1024).stream("StepStream", behaviour)(call))
        await _end(task, call, how)
        del call, task
        await _turns()
        assert freed() is None


@pytest.mark.parametrize("how", ["bytes", "cancel"])
async def test_a_stream_of_triton_that_fails_is_freed(how: str) -> None:
    async def infer(_request: object, _turn: object) -> triton_pb.ModelInferResponse:
        raise InvalidInput("no")

    async def behaviour(call: Any) -> None:
        await InferStream(lambda _: None, infer, _ROOMY, Requests(), call).run()

    call = FakeCall()
    freed = weakref.ref(call)
    call.send(triton_pb.ModelInferRequest(id="one"))
    task = asyncio.create_task(Boundary(Requests(), 1024).stream("ModelStreamInfer", behaviour)(call))
    await call.replies.get()
    await _end(task, call, how)
    del call, task
    await _turns()
    assert freed() is None


async def _turns() -> None:
    """The event loop lets go of what has just ended."""
    for _ in range(5):
        await asyncio.sleep(0)


async def _end(task: asyncio.Task[bytes], call: FakeCall, how: str) -> None:
    if how == "bytes":
        call.send(b"\xff" * 100)
    else:
        await _turns()
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_refused_frame_is_freed() -> None:
    """The stream goes on, and keeps neither the frame nor its error."""
    async with running() as at:
        under_test = Streams(at)
        under_test.send(message(1, "unknown"), message(2, x=np.zeros((1, 2), np.float32)))
        await under_test.done()
        gc.collect()
        errors = sum(isinstance(each, InvalidInput | SessionNotFound) for each in gc.get_objects())
        for number in range(3, 60, 2):
            under_test.send(message(number, "unknown"), message(number + 1, x=np.zeros((1, 2), np.float32)))
        await under_test.done()
        left = sum(isinstance(each, InvalidInput | SessionNotFound) for each in gc.get_objects())
        assert left <= errors
        under_test.task.cancel()
        await asyncio.gather(under_test.task, return_exceptions=True)
