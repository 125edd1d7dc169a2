"""What the native front makes of Triton's requests: columns, or calls; replies in their order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Self
from unittest import mock

import grpc.aio
import numpy as np
import pytest

from stepwell_server.clock import SystemClock
from stepwell_server.core.callers import Caller, Role
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.rpc.fronts.base import Call, FrontCounts, Method, OutputColumn, StepColumns
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from support import secured
from support.clock import ManualClock
from support.peers.http2 import PREFACE, Http2, data, settings
from support.rpc.native_steps import NativeSteps
from support.servers.both_fronts import needs_native
from support.stores.durable import until
from support.triton.triton_requests import request

pytestmark = needs_native
SERVICE = "inference.GRPCInferenceService"
_PATIENCE_S = 100.0


class Server(NativeSteps):
    """A native front, whose plain requests and calls the test looks at."""

    def __init__(self, limits: FrontLimits | None = None) -> None:
        super().__init__(limits)
        self.taken: asyncio.Queue[StepColumns] = asyncio.Queue()
        self.on_take: Callable[[StepColumns], None] = self.taken.put_nowait
        self.general: asyncio.Queue[pb.ModelInferRequest] = asyncio.Queue()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.counts: Callable[[], FrontCounts] = self.front.counts

    def take(self, columns: StepColumns) -> None:
        self.on_take(columns)

    async def unary(self, call: Call) -> bytes:
        asked = pb.ModelInferRequest.FromString(call.request)
        self.general.put_nowait(asked)
        await self.may_answer.wait()
        return pb.ModelInferResponse(id=f"general {asked.id}").SerializeToString()

    async def stream(self, call: Call) -> bytes:
        while (raw := await call.read()) is not None:
            asked = pb.ModelInferRequest.FromString(raw)
            self.general.put_nowait(asked)
            await self.may_answer.wait()
            answer = pb.ModelInferResponse(id=f"general {asked.id}")
            await call.write(pb.ModelStreamInferResponse(infer_response=answer).SerializeToString())
        return b""

    async def columns(self) -> StepColumns:
        return await asyncio.wait_for(self.taken.get(), _PATIENCE_S)

    async def handed_on(self) -> str:
        return (await asyncio.wait_for(self.general.get(), _PATIENCE_S)).id


@pytest.fixture
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    server = Server(getattr(request, "param", None))
    methods = [
        Method(SERVICE, "ModelInfer", server.unary),
        Method(SERVICE, "ModelStreamInfer", server.stream, streams=True),
    ]
    await server.serve(methods)
    try:
        yield server
    finally:
        await server.front.stop(0)


def asked(number: int, *, sequence_id: int | str = 5, **fields: Any) -> bytes:
    x = np.full((1, 2), number, np.float32)
    return request(x, sequence_id=sequence_id, request_id=str(number), **fields).SerializeToString()


def answer(columns: StepColumns, members: list[int] | None = None) -> None:
    """Answer requests with their own input."""
    some = range(len(columns.session_ids)) if members is None else members
    x = np.frombuffer(columns.inputs[0].data, np.float32).reshape(-1, 2)[list(some)]
    columns.replies.applied(
        None if members is None else np.array(members, np.intp),
        np.arange(len(some), dtype=np.uint64),
        np.arange(len(some), dtype=np.uint64),
        [OutputColumn("y", 1, (2,), x.tobytes())],
        replayed=False,
        model_version=1,
    )


class Client:
    """A channel to the server, and a stream on it."""

    def __init__(self, server: Server) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        self._channel = secured.channel_aio(server.address, options)
        self.infer: Any = self._channel.unary_unary(f"/{SERVICE}/ModelInfer")
        self.stream: Any = self._channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(timeout=_PATIENCE_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def send(self, *messages: bytes) -> None:
        for message in messages:
            await self.stream.write(message)

    async def replies(self, count: int) -> list[str]:
        """Ids of the next replies, whose outputs are those of their own requests."""
        found = []
        for _ in range(count):
            reply = pb.ModelStreamInferResponse.FromString(await self.stream.read())
            said = reply.infer_response.id
            found.append(reply.error_message or said)
            if reply.infer_response.outputs:
                (raw,) = reply.infer_response.raw_output_contents
                assert raw == np.full(2, float(said), np.float32).tobytes()
        return found


async def test_a_plain_request_comes_as_columns(server: Server) -> None:
    async with Client(server) as client:
        reply = client.infer(
            asked(1, stepwell_revision=4, stepwell_request_id=9, timeout=60_000_000), timeout=_PATIENCE_S
        )
        columns = await server.columns()
        assert columns.model == ("plain", "")
        assert list(columns.session_ids) == ["triton/plain/5"]
        assert columns.expected is not None
        assert columns.request_ids is not None
        assert (columns.expected.tolist(), columns.request_ids.tolist()) == ([4], [9])
        (tensor,) = columns.inputs
        assert (tensor.name, tensor.dtype, list(tensor.tail)) == ("x", 1, [2])
        assert SystemClock.monotonic() < columns.deadlines[0] <= SystemClock.monotonic() + 60
        answer(columns)
        said = pb.ModelInferResponse.FromString(await reply)
        assert (said.model_name, said.model_version, said.id) == ("plain", "1", "1")
        assert said.raw_output_contents == [np.ones(2, np.float32).tobytes()]
        assert server.general.empty()


async def test_it_is_counted_who_drives_when_something_is_taken(server: Server) -> None:
    """The event loop where one client alone steps back to back, as far as this machine lets it: `driver.rs` tests that."""
    taken = server.counts().taken
    assert taken.keys() == {"event_loop", "thread"}
    async with Client(server) as client:
        for number in range(50):
            reply = client.infer(asked(number), timeout=_PATIENCE_S)
            answer(await server.columns())
            await reply
    assert sum(server.counts().taken.values()) >= sum(taken.values()) + 50


@pytest.mark.parametrize("flags", [{"start": True}, {"end": True}])
async def test_what_begins_or_ends_a_sequence_is_a_call(server: Server, flags: Any) -> None:
    async with Client(server) as client:
        said = pb.ModelInferResponse.FromString(await client.infer(asked(1, **flags), timeout=_PATIENCE_S))
        assert said.id == "general 1"
        assert server.taken.empty()


async def test_replies_leave_in_the_order_of_the_requests_whoever_answers(server: Server) -> None:
    """Two plain ones, then one that is not, and one more, which must not overtake it."""
    server.may_answer.clear()
    async with Client(server) as client:
        await client.send(asked(1, sequence_id=1))
        first = await server.columns()
        await client.send(asked(2, sequence_id=2))
        second = await server.columns()
        await client.send(asked(3, sequence_id=3, start=True))
        assert await server.handed_on() == "3"
        held = server.counts().now["held_bytes"]
        await client.send(asked(4, sequence_id=3))
        await until(lambda: server.counts().now["held_bytes"] > held)  # it has come
        answer(second)
        server.may_answer.set()
        assert await server.handed_on() == "4", "what came before it has no answer yet"
        answer(first)
        assert await client.replies(4) == ["1", "2", "general 3", "general 4"]
        await client.send(asked(5, sequence_id=3))
        answer(await server.columns())
        assert await client.replies(1) == ["5"]


async def test_a_request_in_columns_is_there_as_it_came(server: Server) -> None:
    async with Client(server) as client:
        first, second = asked(1, sequence_id=1), asked(2, sequence_id=2)
        await client.send(first, second)
        found: list[bytes] = []
        while len(found) < 2:
            columns = await server.columns()
            found += [columns.replies.request(member) for member in range(len(columns.session_ids))]
            answer(columns)
        assert found == [first, second]
        assert await client.replies(2) == ["1", "2"]


async def test_plain_requests_wait_until_what_came_before_them_on_their_connection_was_looked_at(
    server: Server,
) -> None:
    """Calls of one connection, in one piece: a START, steps, another START, and a step of another model."""
    looked_at: list[int] = []
    done = asyncio.Event()

    def taken(columns: StepColumns) -> None:
        looked_at.append(server.general.qsize())
        answer(columns)
        if columns.model == ("other", ""):
            done.set()

    server.on_take = taken
    with secured.connected(server.address) as connection:
        connection.sendall(
            in_one_piece(asked(1, start=True), asked(2), asked(3, start=True), asked(4, model="other"))
        )
        await asyncio.wait_for(done.wait(), _PATIENCE_S)
    assert looked_at == [1, 2]
    assert [await server.handed_on() for _ in range(2)] == ["1", "3"]


def in_one_piece(*messages: bytes) -> bytes:
    """A connection's bytes with a call of each message: gRPC's own clients do not promise an order of calls."""
    headers = b"".join(
        b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value
        for name, value in (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":authority", b"localhost"),
            (b":path", f"/{SERVICE}/ModelInfer".encode()),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        )
    )
    out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    for index, message in enumerate(messages):
        data = b"\x00" + len(message).to_bytes(4, "big") + message
        out += frame(1, 0x4, 2 * index + 1, headers) + frame(0, 0x1, 2 * index + 1, data)
    return out


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    """Of HTTP/2."""
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


async def test_a_call_that_is_over_is_known_to_be_gone(server: Server) -> None:
    async with Client(server) as client:
        call = client.infer(asked(1), timeout=_PATIENCE_S)
        columns = await server.columns()
        call.cancel()
        later = client.infer(asked(2), timeout=_PATIENCE_S)  # on the same connection: it comes after the end
        answer(await server.columns())
        await later
        assert columns.replies.gone().tolist() == [0]


async def test_a_stream_ends_when_all_its_plain_requests_are_answered(server: Server) -> None:
    async with Client(server) as client:
        await client.send(asked(1, sequence_id=1), asked(2, sequence_id=2))
        batches = [await server.columns()]
        while sum(len(columns.session_ids) for columns in batches) < 2:
            batches.append(await server.columns())
        await client.stream.done_writing()
        for columns in reversed(batches):
            for member in reversed(range(len(columns.session_ids))):
                answer(columns, [member])
        assert await client.replies(2) == ["1", "2"]
        assert await client.stream.read() is grpc.aio.EOF
        assert await client.stream.code() is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("server", "requests", "reason"),
    [
        (FrontLimits(1 << 20, unread_s=0.05), 1, "unread_replies"),
        (FrontLimits(1 << 20, connection_bytes=1 << 20), 3, "memory"),
    ],
    indirect=["server"],
)
async def test_replies_that_nobody_takes_end_their_stream(server: Server, requests: int, reason: str) -> None:
    """After a time, and before that where they are too many: gRPC takes it as RESOURCE_EXHAUSTED."""
    with await asyncio.to_thread(Http2, server.address, window=1000) as client:
        messages = [asked(number, sequence_id=number) for number in range(1, requests + 1)]
        stream = client.call(f"/{SERVICE}/ModelStreamInfer", *messages, end=False)
        answered = 0
        while answered < requests:
            columns = await server.columns()
            count = len(columns.session_ids)
            numbers = np.zeros(count, np.uint64)
            rows = OutputColumn("y", 9, (600_000,), bytes(count * 600_000))
            columns.replies.applied(None, numbers, numbers, [rows], replayed=False, model_version=1)
            answered += count
        end = await asyncio.to_thread(client.outcome, stream)
        assert end["rst"] == "11", "ENHANCE_YOUR_CALM"
        counts = server.counts()
        assert counts.refused[reason] == 1


@pytest.mark.parametrize("server", [FrontLimits(1 << 20, connection_steps=20)], indirect=True)
async def test_a_connection_has_so_many_steps_under_way_and_others_are_served(server: Server) -> None:
    numbers = [str(number) for number in range(1, 101)]
    waiting: list[StepColumns] = []
    async with Client(server) as busy, Client(server) as other:
        await busy.send(*(asked(int(number), sequence_id=number) for number in numbers))
        while sum(len(columns.session_ids) for columns in waiting) < 20:
            waiting.append(await server.columns())
        await other.send(asked(500, sequence_id=500))
        answer(await server.columns())
        assert await other.replies(1) == ["500"], "more of the busy one's were taken"
        assert server.taken.empty()
        left = len(numbers)
        while True:
            for columns in waiting:
                answer(columns)
                left -= len(columns.session_ids)
            if not left:
                break
            waiting = [await server.columns()]
        assert await busy.replies(100) == numbers


async def cut_off(server: Server, reason: str, begin: bytes, drip: bytes) -> None:
    """Connect and send `begin`, then `drip` byte by byte, until the server closes the connection for a reason."""
    host, _, port = secured.host_and_port(server.address).rpartition(":")
    tls = secured.contexts()[1] if secured.is_on() else None
    reader, writer = await asyncio.open_connection(host, int(port), ssl=tls)
    writer.write(begin)
    closed = asyncio.create_task(reader.read())
    sent = 0
    while not closed.done():
        writer.write(drip[sent : sent + 1])
        sent += 1
        await asyncio.wait([closed], timeout=0.01)  # the pace of the drip
    assert (await asyncio.gather(closed, return_exceptions=True))[0] is not None
    writer.close()
    assert sent < len(drip)
    await until(lambda: dict(server.counts().refused)[reason] == 1)  # counted when it is closed


@pytest.mark.parametrize("server", [FrontLimits(1 << 20, handshake_s=0.1)], indirect=True)
async def test_a_peer_that_takes_its_time_to_begin_is_cut_off(server: Server) -> None:
    # settings of which the last byte never comes
    await cut_off(
        server, "handshake", b"", PREFACE + (6 * 4096).to_bytes(3, "big") + bytes([4, *bytes(5 + 6 * 4095)])
    )


@pytest.mark.parametrize(
    "server", [FrontLimits(1 << 20, keepalive_s=0.1, keepalive_timeout_s=0.1)], indirect=True
)
async def test_a_peer_that_sends_and_answers_no_ping_is_cut_off(server: Server) -> None:
    frame = data(1, bytes(10_000))
    await cut_off(server, "silent", PREFACE + settings(), frame[:-1])


@pytest.mark.parametrize("server", [FrontLimits(1 << 20, calls=6)], indirect=True)
async def test_calls_of_all_connections_have_a_limit(server: Server) -> None:
    server.may_answer.clear()
    async with Client(server) as one, Client(server) as other:  # each has a stream, too
        under_way = [
            asyncio.ensure_future(client.infer(asked(number, start=True), timeout=_PATIENCE_S))
            for number, client in enumerate((one, other))
        ]
        assert {await server.handed_on(), await server.handed_on()} == {"0", "1"}
        await until(lambda: server.counts().now["calls"] == 4)
        with pytest.raises(grpc.aio.AioRpcError, match="overloaded") as refused:
            await other.infer(asked(2, start=True), timeout=_PATIENCE_S)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(server.counts().refused)["calls"] == 1
        server.may_answer.set()
        await asyncio.gather(*under_way)
        await other.infer(asked(3, start=True), timeout=_PATIENCE_S)


async def test_what_is_large_is_taken_after_a_look_at_what_else_has_come() -> None:
    from stepwell_server.rpc.fronts import native

    front = native.NativeFront(ManualClock(), FrontLimits(1 << 20))
    front._steps = steps = mock.create_autospec(Server, instance=True)
    steps.take.return_value, steps.run.return_value = None, False
    steps.add_part.side_effect = lambda _, part: asyncio.get_running_loop().call_soon(part)

    def batch(peer: str, count: int) -> tuple[Any, ...]:
        ids = [f"{peer}-{place}" for place in range(count)]
        counts, sizes = np.array([count], np.uint32).tobytes(), np.ones(count, np.uint32).tobytes()
        numbers = (counts, sizes, b"", b"", np.full(count, np.inf).tobytes())
        handle = mock.Mock()
        handle.columns.return_value = ids, [peer], None, numbers, (1, [], True, None), []
        return native._BATCH, handle, count, 1, ids[0], [peer], None, True

    wire = mock.Mock()
    wire.take.side_effect = [[batch("other", 1)], [batch("flood", 1024)], [batch("other", 1)], []]
    front._callers.put("flood", Caller("ann", "acme", Role.USER))
    front._run(lambda: front._take_all(wire))
    steps.reset_mock()
    front._run(lambda: front._take_all(wire))
    assert [len(call.args[0].session_ids) for call in steps.mock_calls if call[0] == "take"] == [1]
    # what was answered before its bookkeeping is settled before what came after the answer
    assert [call[0] for call in steps.mock_calls] == ["settle", "settle", "add_part", "run", "take", "go"]
    assert steps.add_part.call_args.args[0] == ("arrivals", "acme", "ann", "flood"), (
        "among those of its caller"
    )
    steps.reset_mock()
    await asyncio.sleep(0)
    assert [call[0] for call in steps.mock_calls] == ["run", "take"], "and its pass later still"
    steps.reset_mock()
    steps.run.return_value = True
    wire.take.side_effect = [[batch("other", 1)], []]
    front._run(lambda: front._take_all(wire))
    assert [call[0] for call in steps.mock_calls] == ["settle", "run"], "no pass: nothing needs one"


async def test_a_defect_in_one_arrival_does_not_keep_those_behind_it() -> None:
    from stepwell_server.rpc.fronts import native

    front = native.NativeFront(SystemClock(), FrontLimits(1 << 20))
    front._steps = steps = mock.create_autospec(Server, instance=True)
    steps.duplicate.return_value = b"answer"
    steps.add_part.side_effect = lambda _, part: asyncio.get_running_loop().call_soon(part)
    handle = mock.Mock()
    bad = mock.Mock()
    bad.write.side_effect = KeyError
    for one in (bad, handle):
        front._add((native._DUPLICATE, 0, one, 7))
    with pytest.raises(KeyError):
        front._run(lambda: None)
    handle.write.assert_not_called()
    await asyncio.sleep(0)
    handle.write.assert_called_once_with(b"answer")
    assert steps.go.call_count == 2
