"""All calls of a server, without a network: bytes go into its methods and come out of them.

Everything is real but the front and the executor. What only a front can do to a call (its status on the wire, a
connection that breaks, a message that is too large) is asked of `served`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from google.rpc import error_details_pb2, status_pb2

from stepwell.v1 import models_pb2, sessions_pb2
from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.catalog.catalog import Catalog
from stepwell_server.catalog.known_files import KnownFiles
from stepwell_server.core.callers import ANYBODY, Caller, Credential
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.metrics.observer import SlowestSteps
from stepwell_server.process.replicas import Replica
from stepwell_server.program import Program
from stepwell_server.rpc.audit import Auditor
from stepwell_server.rpc.fronts.base import (
    CallEnded,
    FrontCounts,
    HttpDoor,
    HttpListener,
    JsonCodec,
    Method,
    Steps,
)
from stepwell_server.rpc.fronts.certificates import Certificates
from stepwell_server.rpc.server import RpcServer
from stepwell_server.rpc.triton.inference import service_pb2
from support.engine.catalog_on_engine import FakeLoads, live_models
from support.engine.harness import Harness, running
from support.peers.wire import Answer, Array, Refusal, of_members, tensors
from support.rpc.fake_call import FakeCall, Requests
from support.rpc.no_figures import no_figures
from support.triton.triton_requests import NoPasses

MAX_MESSAGE_BYTES = 1 << 20
#: Status and reason of what breaks a rule.
BAD_ARGUMENT = ("INVALID_ARGUMENT", "INVALID_INPUT")


class Observer(Requests, NoPasses):
    """Remembers the calls, and knows of no pass."""

    def __init__(self) -> None:
        super().__init__()
        self.slow_steps = SlowestSteps()


class Front:
    """A `fronts.base.Front` that listens nowhere: its methods are called."""

    name = "none"
    limits = FrontLimits(MAX_MESSAGE_BYTES)
    http_address: Address | None = None
    json: JsonCodec | None = None

    def __init__(self) -> None:
        self.methods: Mapping[str, Method] = {}
        self.steps: Steps
        self.door: HttpDoor | None = None
        self.known: dict[Credential, tuple[Caller, float]] = {}

    async def start(
        self,
        address: Address | UnixAddress,
        methods: Sequence[Method],
        steps: Steps,
        certificates: Certificates | None,
        http: HttpListener | None = None,
    ) -> Address | UnixAddress:
        self.door = None if http is None else http.door
        self.methods = {method.name: method for method in methods}
        self.steps = steps
        return address

    def set_fast_path(self, *, enabled: bool) -> None:
        """Every message is a call."""

    def ask_callers(self) -> None:
        """Every message is a call."""

    def know(self, credential: Credential, caller: Caller, until: float) -> None:
        """Remembers it."""
        self.known[credential] = (caller, until)

    def forget(self, credentials: Collection[Credential]) -> None:
        """Remembers it no more."""
        for credential in credentials:
            self.known.pop(credential, None)

    def secure(self, certificates: Certificates) -> None:
        """Nobody connects."""

    def take_durations(self) -> None:
        """Nothing is compiled."""

    def counts(self) -> FrontCounts:
        """Nothing is counted."""
        return FrontCounts({}, {})

    async def flush(self) -> None:
        """Nothing is on its way."""

    async def stop(self, grace_s: float) -> None:
        """No change was started."""


class Calls:
    """A client of an engine's calls, as somebody whom the server knows (`who`), or as anybody."""

    def __init__(
        self,
        at: Harness,
        methods: Mapping[str, Method],
        slow_steps: SlowestSteps,
        live: Catalog,
        loads: FakeLoads,
        who: Caller = ANYBODY,
    ) -> None:
        self.at = at
        self.methods = methods
        self.slow_steps = slow_steps
        self.live = live
        self.loads = loads
        """What becomes of files that are loaded."""
        self._who = who

    def of(self, who: Caller) -> Calls:
        """The same, as somebody else."""
        return Calls(self.at, self.methods, self.slow_steps, self.live, self.loads, who)

    def new_call(self, raw: bytes = b"") -> FakeCall:
        """A call of whom it is."""
        call = FakeCall(raw)
        call.who = self._who
        return call

    async def call(self, request: Any) -> Any:
        """The reply to a unary request, which says by its type what is called; raises `CallEnded`."""
        name = type(request).__name__.removesuffix("Request")
        modules = sessions_pb2, models_pb2, service_pb2
        reply = next(found for module in modules if (found := getattr(module, f"{name}Response", None)))
        return reply.FromString(await self.methods[name].serve(self.new_call(request.SerializeToString())))

    async def refused(self, request: Any) -> Refusal:
        """How a unary request is refused."""
        try:
            answer = await self.call(request)
        except CallEnded as ended:
            return _refusal(ended)
        raise AssertionError(f"it was not refused but answered: {str(answer)[:300]}")

    async def exchange(self, *frames: sessions_pb2.StepStreamRequest) -> list[Answer]:
        """The answers to a stream of these frames."""
        return [Answer.FromString(reply) for reply in await self.streamed("StepStream", *frames)]

    async def streamed(self, name: str, *requests: Any) -> list[bytes]:
        """The answers to a stream of these requests."""
        call = self.new_call()
        call.send(*requests)
        call.half_close()
        await asyncio.wait_for(self.methods[name].serve(call), 100)
        return [call.replies.get_nowait() for _ in range(call.replies.qsize())]

    async def only_member(self, frame: sessions_pb2.StepStreamRequest) -> Refusal:
        """The refusal of a frame of one session, or of a frame as a whole."""
        return of_members(await self.exchange(frame), 1)[0]

    async def opened(self, model: str = "plain", batch_size: int = 2) -> str:
        """A session that has a past."""
        name = f"{model} {batch_size}"
        opening = sessions_pb2.OpenSessionRequest(model=model, session_id=name, batch_size=batch_size)
        session_id: str = (await self.call(opening)).session.session_id
        inputs: dict[str, Array] = {"x": np.full((batch_size, 3, 2), 0.25, np.float32)}
        if model == "rich":
            inputs |= {"token": np.ones((batch_size, 3), np.int32), "gain": np.ones(batch_size, np.float32)}
        await self.call(sessions_pb2.StepRequest(session_id=session_id, inputs=tensors(inputs), request_id=7))
        return session_id

    async def everything(self) -> list[object]:
        """All that a refused call must leave as it is: the sessions, and the state of each, bit for bit."""
        infos, _ = await self.at.engine.list_sessions()
        states = [await self.at.state(info.session_id) for info in infos]
        return [
            (
                *(info.session_id, info.model, info.batch_size, info.revision, info.position, info.created),
                *(array.tobytes() for array in state.values()),
            )
            for info, state in zip(infos, states, strict=True)
        ]


@asynccontextmanager
async def calls(
    programs: Mapping[str, Program] | None = None,
    auditor: Auditor | None = None,
    live_options: Mapping[str, Any] | None = None,
    admin_refusal: str = "",
    files: Mapping[str, Mapping[int, Path]] | None = None,
    replicas: Sequence[Replica] = (),
    **options: Any,
) -> AsyncIterator[Calls]:
    """A client of the calls of an engine on these programs; `live_options` are those of who loads models, `files` the known ones."""
    async with running(programs, **options) as at:
        front, observer = Front(), Observer()
        server = RpcServer(
            front, clock=at.clock, observer=observer, max_message_bytes=MAX_MESSAGE_BYTES, auditor=auditor
        )
        await server.start(Address("", 0))
        server.info.metrics_address = "127.0.0.1:9464"
        loads = FakeLoads()
        live = live_models(at.engine, at.clock, loads, **(live_options or {}))
        known = KnownFiles(at.engine, files or {}, (live_options or {}).get("root"))
        server.serve(at.engine, live, admin_refusal, known_files=known, figures=no_figures(replicas))
        yield Calls(at, front.methods, observer.slow_steps, live, loads)
        await live.close()


def _refusal(ended: CallEnded) -> Refusal:
    status, info = status_pb2.Status(), error_details_pb2.ErrorInfo()
    ((_, details),) = ended.status.trailers
    status.ParseFromString(details)
    assert status.details[0].Unpack(info)
    return Refusal(ended.status.code.name, info.reason, ended.status.message, dict(info.metadata))
