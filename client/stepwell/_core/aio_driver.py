"""Runs the operations of an async client on its connections; the same as `driver`, awaited."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from stepwell._base.flow import Flow, Notify, drive_async
from stepwell._batching.coalesce import Coalescer, WaitingStep
from stepwell._batching.steps import Step, Stepped, read
from stepwell._core.core import Core
from stepwell._core.finisher import AsyncFinisher
from stepwell._core.lanes import Ask, Exchange, exchange_async
from stepwell._core.observer import notify_async
from stepwell._routing.lookup import Lookup, look_up_async
from stepwell._routing.probing import AsyncProber
from stepwell._routing.router import Router
from stepwell._transport.aio_stream import AsyncLink
from stepwell._transport.call import Call, Endpoint
from stepwell._transport.channel import AsyncTransport, closed, dropped, tokens
from stepwell._transport.tokens import Tokens
from stepwell.config import ClientConfig
from stepwell.errors import StepwellError

T = TypeVar("T")


class AsyncConnection:
    """A channel, its stream, and the coalescer of its steps. Belongs to the event loop in which it is created."""

    def __init__(
        self, config: ClientConfig, known: Tokens, endpoint: Endpoint | None, *, coalesce: bool
    ) -> None:
        self.transport = AsyncTransport(config, known, endpoint)
        self.link = AsyncLink(self.transport.stream, config.address if endpoint is None else endpoint.address)
        self._max_message_bytes = config.max_message_bytes
        self._coalescer = Coalescer(self.link, self._unary, config.max_message_bytes)
        self.step: Callable[[Step], Awaitable[Stepped]] = self._coalescer.step if coalesce else self._unary
        """Makes one attempt of a step."""
        self.attempt: Callable[[WaitingStep], Awaitable[Stepped]] = (
            self._coalescer.attempt if coalesce else self._unary
        )
        """Makes the only attempt of this object."""

    async def _unary(self, step: Step) -> Stepped:
        return read(await self.transport.invoke(step.call(self._max_message_bytes)))

    async def close(self, ended: Callable[[], StepwellError] = closed) -> None:
        """Ends the active calls with these errors, then the channel."""
        self.transport.end(ended)
        self._coalescer.close(ended)
        await self.link.close(ended)
        await self.transport.close()


class AsyncConnections:
    """The connections of a client, each opened when it is first needed. Belongs to one event loop."""

    def __init__(self, config: ClientConfig, *, coalesce: bool) -> None:
        self._config = config
        self._tokens = tokens(config)
        self._coalesce = coalesce
        self._made: dict[Endpoint | None, AsyncConnection] = {}
        self._is_closed = False

    def to(self, endpoint: Endpoint | None) -> AsyncConnection:
        """The connection to an endpoint; None: the client has one server."""
        made = self._made.get(endpoint)
        if made is None:
            if self._is_closed:
                raise closed()
            made = self._made[endpoint] = AsyncConnection(
                self._config, self._tokens, endpoint, coalesce=self._coalesce
            )
        return made

    async def check(self, endpoint: Endpoint, timeout_s: float) -> StepwellError | None:
        """Checks whether an endpoint accepts calls. Returns why not, or None if it does."""
        return await self.to(endpoint).transport.check(timeout_s)

    async def drop(self, endpoint: Endpoint) -> None:
        """Closes the connection to an endpoint that is no longer used. Active calls are retried elsewhere."""
        connection = self._made.pop(endpoint, None)
        if connection is not None:
            await connection.close(dropped)

    async def close(self) -> None:
        """Closes all connections."""
        self._is_closed = True
        for connection in list(self._made.values()):
            await connection.close()


class AsyncDriver:
    """Runs the flows of a client. Belongs to the event loop in which it is first used."""

    def __init__(self, config: ClientConfig, *, coalesce: bool) -> None:
        self.connections = connections = AsyncConnections(config, coalesce=coalesce)
        probers: list[AsyncProber] = []

        def watch(router: Router) -> AsyncProber:
            probers.append(AsyncProber(router, connections.check, connections.drop, config.connect_timeout_s))
            return probers[0]

        self._probers = probers
        self._closing = asyncio.Event()
        self._connect_timeout_s = config.connect_timeout_s
        self._finisher = AsyncFinisher(self.answer)
        self.core = Core(config, finish=self._finisher.add, watch=watch)

    @property
    def is_closed(self) -> bool:
        """Whether the client is closed."""
        return self._closing.is_set()

    def run(self, flow: Flow[T]) -> Coroutine[Any, Any, T]:
        """Runs a flow of the core to its result."""
        return drive_async(self.core.watched(flow), self.answer)

    @functools.cached_property
    def direct(self) -> Callable[[WaitingStep], Awaitable[Stepped]]:
        """Makes the first attempt of a step at the only server of the client."""
        return self.connections.to(None).attempt

    def answer(self, ask: Ask) -> Awaitable[Any]:
        """Answers an ask of a flow."""
        if isinstance(ask, Step):
            return self.connections.to(ask.to).step(ask)
        if isinstance(ask, Call):
            return self.connections.to(ask.to).transport.invoke(ask)
        if isinstance(ask, Exchange):
            return exchange_async(ask, self._link_to)
        if isinstance(ask, Notify):
            return notify_async(ask)
        if isinstance(ask, Lookup):
            return look_up_async(ask, self._connect_timeout_s)
        return self._pause(ask.seconds if ask.is_waited else 0.0)

    def _link_to(self, endpoint: Endpoint | None) -> AsyncLink:
        return self.connections.to(endpoint).link

    async def _pause(self, seconds: float) -> None:
        if self.is_closed:
            raise closed()
        if seconds <= 0:
            return
        try:
            await asyncio.wait_for(self._closing.wait(), seconds)
        except TimeoutError:
            return
        raise closed()

    async def close(self) -> None:
        """Ends the connections; active calls raise `ClosedError`."""
        await self._finisher.close()
        self._closing.set()
        for prober in self._probers:
            await prober.close()
        await self.connections.close()
