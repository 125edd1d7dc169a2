"""Whose plain steps the native front takes by itself: those of callers that it was told of, as long as it is so."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
import numpy as np
import pytest

from stepwell.v1 import sessions_pb2
from stepwell_server.clock import SystemClock
from stepwell_server.core.callers import ANYBODY, Caller, Credential, Role
from stepwell_server.core.namespaces import SEPARATOR, prefix_of
from stepwell_server.rpc.fronts.base import Call, CallEnded, Method, OutputColumn, StepColumns
from stepwell_server.rpc.status import Code, Status
from support import secured
from support.peers.http2 import Http2
from support.rpc import streams
from support.rpc.native_steps import NativeSteps
from support.servers.both_fronts import needs_native
from support.stores.durable import until
from support.triton import triton_requests

pytestmark = needs_native
SESSIONS, TRITON = "stepwell.v1.SessionService", "inference.GRPCInferenceService"
KINDS = {
    "step": (SESSIONS, "Step"),
    "frames": (SESSIONS, "StepStream"),
    "infer": (TRITON, "ModelInfer"),
    "infer_stream": (TRITON, "ModelStreamInfer"),
}
ANNA = Caller("anna", "acme", Role.USER)
BERT = Caller("bert", "beta", Role.USER)
CHIEF = Caller("anna", "acme", Role.ADMIN)
TOKENS = {"anna": ANNA, "bert": BERT}
_PATIENCE_S = 100.0


def credential(token: str) -> Credential:
    return Credential("token", hashlib.sha256(token.encode()).digest())


class Server(NativeSteps):
    """A native front that asks who calls. What is plain is answered at once, and so is what is not."""

    def __init__(self, *, asks: bool = True) -> None:
        super().__init__()
        if asks:
            self.front.ask_callers()
        self.tells = True
        """What Python finds out it tells the front."""
        self.plain: list[tuple[list[str], list[Caller]]] = []
        self.general: list[Caller] = []

    async def start(self) -> None:
        methods = [Method(*KINDS[kind], self.unary) for kind in ("step", "infer")]
        methods += [Method(*KINDS[kind], self.stream, streams=True) for kind in ("frames", "infer_stream")]
        await self.serve(methods)

    def take(self, columns: StepColumns) -> None:
        self.plain.append((list(columns.session_ids), list(columns.whos)))
        numbers = np.arange(len(columns.session_ids), dtype=np.uint64)
        (tensor,) = columns.inputs
        outputs = [OutputColumn("y", tensor.dtype, tensor.tail, tensor.data)]
        columns.replies.applied(None, numbers, numbers, outputs, replayed=False, model_version=3)

    def identify(self, call: Call) -> None:
        """As the boundary and its authenticator do."""
        token = str(call.metadata.get("authorization", "")).removeprefix("Bearer ")
        caller = TOKENS.get(token)
        if caller is None:
            raise CallEnded(Status(Code.UNAUTHENTICATED, "nobody who is known", ()))
        if self.tells:
            self.front.know(credential(token), caller, float("inf"))
        call.who = caller

    async def unary(self, call: Call) -> bytes:
        self.identify(call)
        self.general.append(call.who)
        return b""

    async def stream(self, call: Call) -> bytes:
        self.identify(call)
        while await call.read() is not None:
            self.general.append(call.who)
            await call.write(b"")
        return b""

    async def reads(self, one: Talk) -> list[tuple[list[str], list[Caller]]]:
        """Ask until the front takes the steps by itself; what it takes then.

        On a stream it may hand on a few before: they came when Python had not yet looked at the last one.
        """
        async with asyncio.timeout(_PATIENCE_S):
            while not self.plain:
                await one.ask()
        return self.seen()[0]

    def seen(self) -> tuple[list[tuple[list[str], list[Caller]]], list[Caller]]:
        """What has come since the last look: plain, and not."""
        found = self.plain, self.general
        self.plain, self.general = [], []
        return found


class Talk:
    """One caller's steps of sessions `s`, in one way."""

    def __init__(self, channel: grpc.aio.Channel, kind: str, *metadata: tuple[str, str]) -> None:
        self.kind, self._metadata = kind, metadata
        path = "/{}/{}".format(*KINDS[kind])
        self._call: Any = None
        self._unary: Any = channel.unary_unary(path)
        if kind not in {"step", "infer"}:
            stream: Any = channel.stream_stream(path)
            self._call = stream(metadata=metadata, timeout=_PATIENCE_S)
        self.is_unary = self._call is None
        self._frames = 0

    async def ask(self, session: str = "s") -> bytes:
        """The reply to a step."""
        x = np.ones((1, 2), np.float32)
        self._frames += 1
        if self.kind == "step":
            raw = streams.request(session, x)
        elif self.kind == "frames":
            raw = streams.message(self._frames, session, x=x)
        else:
            raw = triton_requests.request(x, sequence_id=session).SerializeToString()
        return await self._send(raw)

    async def _send(self, raw: bytes) -> bytes:
        if self.is_unary:
            reply: bytes = await self._unary(raw, metadata=self._metadata, timeout=_PATIENCE_S)
            return reply
        await self._call.write(raw)
        found: bytes = await self._call.read()
        return found


def inner(kind: str, tenant: str, session: str = "s") -> str:
    """What the server calls a session."""
    name = f'triton/plain/"{session}"' if kind.startswith("infer") else session
    return f"{prefix_of(tenant)}{name}"


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.start()
    yield server
    await server.front.stop(0)


@pytest.fixture
async def talk(server: Server) -> AsyncIterator[Callable[..., Talk]]:
    async with secured.channel_aio(server.address, token=False) as channel:

        def begin(kind: str, token: str, *metadata: tuple[str, str]) -> Talk:
            return Talk(channel, kind, ("authorization", f"Bearer {token}"), *metadata)

        yield begin


@pytest.mark.parametrize("kind", KINDS)
async def test_a_known_caller_steps_its_own_tenants_sessions(
    server: Server, talk: Callable[..., Talk], kind: str
) -> None:
    for token, who in TOKENS.items():
        one = talk(kind, token)
        await one.ask()
        if one.is_unary:  # a stream may be known before its first message
            assert server.seen() == ([], [who]), "the front has not been told of it"
        server.seen()
        assert await server.reads(one) == [([inner(kind, who.tenant)], [who])]
        for _ in range(2):
            reply = await one.ask()
            assert server.seen() == ([([inner(kind, who.tenant)], [who])], [])
            assert reply
            assert SEPARATOR.encode() not in reply
            assert who.tenant.encode() not in reply
        await one.ask(inner("", "acme"))
        assert server.seen() == ([], [who]), "an id with a tenant's mark is Python's, which refuses it"
        elsewhere = talk(kind, token, ("stepwell-tenant", "acme"))
        await elsewhere.ask()
        await elsewhere.ask()
        assert server.seen() == ([], [who] * 2), "and who may work for whom is so too"


@pytest.mark.parametrize("kind", KINDS)
async def test_who_is_forgotten_steps_no_more_until_it_is_known_again(
    server: Server, talk: Callable[..., Talk], kind: str
) -> None:
    server.front.know(credential("anna"), ANNA, float("inf"))
    open_before = talk(kind, "anna")
    plain = [([inner(kind, "acme")], [ANNA])]
    assert await server.reads(open_before) == plain
    server.tells = False
    server.front.forget([credential("bert"), credential("anna")])
    for one in (open_before, talk(kind, "anna")):
        await one.ask()
        assert server.seen() == ([], [ANNA])
    server.front.know(credential("anna"), CHIEF, float("inf"))
    await open_before.ask()
    if open_before.is_unary:
        assert server.seen() == ([([inner(kind, "acme")], [CHIEF])], [])
    else:
        assert server.seen() == ([], [ANNA]), "a stream is not taken over"
    server.front.know(credential("anna"), ANNA, float("inf"))
    assert await server.reads(open_before) == plain
    server.front.know(credential("anna"), ANNA, SystemClock.monotonic() - 1.0)
    await open_before.ask()
    assert server.seen() == ([], [ANNA]), "its time is over"


def have_come(server: Server, size: int) -> None:
    """Wait until the wire has so many bytes of plain steps, while the event loop stands still and takes none."""
    end = time.monotonic() + _PATIENCE_S
    while server.front.counts().now["queued_bytes"] < size:
        assert time.monotonic() < end
        time.sleep(0.001)


async def test_several_tenants_share_a_batch_and_each_has_its_own(server: Server) -> None:
    for token, who in TOKENS.items():
        server.front.know(credential(token), who, float("inf"))
    sent = streams.request("s", np.ones((1, 2), np.float32))
    with contextlib.ExitStack() as stack:
        for token in ("anna", "bert", "anna"):
            one = stack.enter_context(Http2(server.address))
            one.call(f"/{SESSIONS}/Step", sent, extra=[("authorization", f"Bearer {token}")])
        have_come(server, 3 * len(sent))
        await until(lambda: server.plain)
        ((ids, whos),), general = server.seen()
        assert sorted(zip(ids, whos, strict=True), key=str) == [
            (inner("", "acme"), ANNA),
            (inner("", "acme"), ANNA),
            (inner("", "beta"), BERT),
        ]
        assert not general


async def test_where_nobody_is_asked_a_mark_is_python_s_all_the_same() -> None:
    server = Server(asks=False)
    await server.start()
    async with secured.channel_aio(server.address, token=False) as channel:
        one = Talk(channel, "step")
        await one.ask()
        assert server.seen() == ([(["s"], [ANYBODY])], [])
        with pytest.raises(grpc.aio.AioRpcError, match="nobody who is known"):
            await one.ask(inner("", "acme"))
        assert server.seen() == ([], [])
    await server.front.stop(0)


@pytest.mark.parametrize(("kind", "reply"), [("step", "StepResponse"), ("frames", "StepStreamResponse")])
async def test_a_plain_reply_says_on_which_version_the_step_ran(
    server: Server, talk: Callable[..., Talk], kind: str, reply: str
) -> None:
    server.front.know(credential("anna"), ANNA, float("inf"))
    one = talk(kind, "anna")
    await server.reads(one)
    said = getattr(sessions_pb2, reply).FromString(await one.ask())
    assert said.model_version == 3
    assert server.seen()[1] == [], "it was plain"


class SlowServer(Server):
    """It takes its time to find out who calls."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.may_answer = asyncio.Event()

    async def stream(self, call: Call) -> bytes:
        self.asked.append(call.caller)
        await self.may_answer.wait()
        return await super().stream(call)


async def test_of_each_connection_few_calls_at_a_time_ask_who_makes_them() -> None:
    """A flood of calls by strangers leaves the event loop to others."""
    server, count = SlowServer(), 100
    await server.start()
    try:
        with await asyncio.to_thread(Http2, server.address) as flood, Http2(server.address) as other:
            begun = [flood.begin("/{}/{}".format(*KINDS["frames"])) for _ in range(count)]
            flood.send(*(frame for _, frame in begun))
            await until(lambda: len(server.asked) == 8)
            other.send(other.begin("/{}/{}".format(*KINDS["frames"]))[1])
            await until(lambda: len(server.asked) == 9)
            assert len(set(server.asked[:8])) == 1
            assert server.asked[8] != server.asked[0], "the flood has all of its places"
            server.may_answer.set()
            ended: set[int] = set()
            while len(ended) < count:
                frame = await asyncio.to_thread(flood.frame)
                if "END_STREAM" in frame.flags:
                    ended.add(frame.stream_id)
            assert ended == {stream for stream, _ in begun}
            assert len(server.asked) == count + 1
    finally:
        await server.front.stop(0)
