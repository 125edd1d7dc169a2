"""Streams of Triton's protocol without gRPC: order, errors, limits, the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from stepwell_server.errors import InvalidInput, Unavailable
from stepwell_server.rpc.steps.stream import StreamLimits
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.sequences import QueuePosition, SequenceQueues
from stepwell_server.rpc.triton.stream import InferStream
from support.rpc.fake_call import FakeCall, Requests

_PATIENCE_S = 100.0
_ROOMY = StreamLimits(frames=100, bytes=1 << 20)


class Call:
    """A running ModelStreamInfer call, and the requests that its server has at work."""

    def __init__(self, limits: StreamLimits) -> None:
        self.context = FakeCall()
        self.observer = Requests()
        self.queues = SequenceQueues()
        self.begun_when_entered: list[int] = []
        self.on_enter: Callable[[], object] = lambda: None
        self.begun: list[str] = []
        self.cancelled: list[str] = []
        self._begun = asyncio.Condition()
        self._answers: dict[str, asyncio.Future[pb.ModelInferResponse]] = {}
        self.stream = InferStream(self._enter, self._infer, limits, self.observer, self.context)
        self.task = asyncio.create_task(self.stream.run())

    def send(self, *ids: str) -> None:
        self.context.send(*(pb.ModelInferRequest(id=one) for one in ids))

    async def at_work(self, count: int) -> None:
        async with asyncio.timeout(_PATIENCE_S), self._begun:
            await self._begun.wait_for(lambda: len(self.begun) >= count)

    def answer(self, one: str) -> None:
        self._answers[one].set_result(pb.ModelInferResponse(id=one))

    def fail(self, one: str, error: Exception) -> None:
        self._answers[one].set_exception(error)

    async def reply(self) -> pb.ModelStreamInferResponse:
        raw = await asyncio.wait_for(self.context.replies.get(), _PATIENCE_S)
        return pb.ModelStreamInferResponse.FromString(raw)

    async def ends(self) -> None:
        await asyncio.wait_for(self.task, _PATIENCE_S)

    def _enter(self, request: pb.ModelInferRequest) -> QueuePosition:
        self.begun_when_entered.append(len(self.begun))
        self.on_enter()
        return self.queues.enter(request.id)

    async def _infer(
        self, request: pb.ModelInferRequest, position: QueuePosition | None
    ) -> pb.ModelInferResponse:
        assert position is not None
        answer: asyncio.Future[pb.ModelInferResponse] = asyncio.get_running_loop().create_future()
        self._answers[request.id] = answer
        async with self._begun:
            self.begun.append(request.id)
            self._begun.notify_all()
        try:
            return await answer
        except asyncio.CancelledError:
            self.cancelled.append(request.id)
            raise


@asynccontextmanager
async def stream(limits: StreamLimits = _ROOMY) -> AsyncIterator[Call]:
    call = Call(limits)
    yield call
    call.task.cancel()
    await asyncio.gather(call.task, return_exceptions=True)


@pytest.fixture
async def call() -> AsyncIterator[Call]:
    async with stream() as found:
        yield found


async def test_replies_come_in_the_order_of_the_requests(call: Call) -> None:
    call.send("a", "b", "c")
    await call.at_work(3)
    for one in ("c", "b", "a"):
        call.answer(one)
    assert [(await call.reply()).infer_response.id for _ in range(3)] == ["a", "b", "c"]
    call.context.half_close()
    await call.ends()


async def test_a_stream_continues_after_an_error(call: Call) -> None:
    call.send("a", "b", "c")
    await call.at_work(3)
    call.fail("a", InvalidInput("no good"))
    call.fail("b", RuntimeError("a secret"))
    call.answer("c")
    first, second, third = [await call.reply() for _ in range(3)]
    assert (first.error_message, first.infer_response) == ("no good", pb.ModelInferResponse(id="a"))
    assert second.error_message.startswith("internal error")
    assert "secret" not in second.error_message
    assert (third.error_message, third.infer_response.id) == ("", "c")
    assert call.observer.refusals == {"INVALID_INPUT": 1, "INTERNAL": 1}


async def test_a_request_gets_its_place_when_it_is_read(call: Call) -> None:
    """Not when its task begins: what the front reads by itself is done in between."""
    call.send("a", "b", "c")
    await call.at_work(3)
    assert call.begun_when_entered == [0, 0, 0]
    assert call.queues.are_busy(["a", "d"]) is not None
    for one in ("a", "b", "c"):
        call.answer(one)
        await call.reply()
    assert call.queues.are_busy(["a", "b", "c"]) is None


async def test_a_request_that_is_cancelled_before_it_begins_leaves_its_place(call: Call) -> None:
    call.on_enter = call.task.cancel
    call.send("a")
    with pytest.raises(asyncio.CancelledError):
        await call.task
    assert call.begun_when_entered == [0]
    assert call.begun == []
    assert call.queues.are_busy(["a"]) is None


async def test_the_final_flag_is_sent_on_request(call: Call) -> None:
    for wanted in (True, False):
        request = pb.ModelInferRequest(id=str(wanted))
        request.parameters["triton_enable_empty_final_response"].bool_param = wanted
        call.context.send(request)
    await call.at_work(2)
    call.answer("True")
    call.answer("False")
    first, second = await call.reply(), await call.reply()
    assert first.infer_response.parameters["triton_final_response"].bool_param
    assert not second.infer_response.parameters


async def test_requests_before_the_end_are_answered(call: Call) -> None:
    call.send("a", "b")
    call.context.half_close()
    await call.at_work(2)
    call.answer("a")
    call.answer("b")
    await call.ends()
    assert call.context.replies.qsize() == 2


@pytest.mark.parametrize("limits", [StreamLimits(2, 1 << 20), StreamLimits(100, 6)])
async def test_reading_stops_while_too_much_is_unanswered(limits: StreamLimits) -> None:
    async with stream(limits) as call:
        call.send("a", "b", "c")  # 3 bytes each
        await call.at_work(2)
        for _ in range(5):
            await asyncio.sleep(0)
        assert call.begun == ["a", "b"]
        call.answer("b")  # not the first: nothing can be sent yet
        for _ in range(5):
            await asyncio.sleep(0)
        assert call.begun == ["a", "b"]
        call.answer("a")
        await call.at_work(3)
        call.answer("c")
        assert [(await call.reply()).infer_response.id for _ in range(3)] == ["a", "b", "c"]


async def test_a_stopping_server_answers_and_ends_the_stream(call: Call) -> None:
    call.send("a")
    await call.at_work(1)
    call.stream.stop()
    call.answer("a")
    assert (await call.reply()).infer_response.id == "a"
    with pytest.raises(Unavailable, match="the server is stopping"):
        await call.ends()


async def test_invalid_request_bytes_end_the_stream(call: Call) -> None:
    call.send("a")
    call.context.send(b"\xff\xff")
    await call.at_work(1)
    call.answer("a")
    with pytest.raises(InvalidInput, match=r"must be a inference\.ModelInferRequest"):
        await call.ends()
    assert call.context.replies.qsize() == 1


async def test_requests_of_a_client_that_leaves_are_dropped(call: Call) -> None:
    call.send("a", "b")
    await call.at_work(2)
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    assert call.cancelled == ["a", "b"]
    assert call.queues.are_busy(["a", "b"]) is None
