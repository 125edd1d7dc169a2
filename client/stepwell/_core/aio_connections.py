"""The connections of an async client: one to its server, or one to each replica that it has asked.

Each is a channel, its stream, and the coalescer of its steps. As `_core.connections`, awaited.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from stepwell._base.flow import Retrier
from stepwell._batching.coalesce import Coalescer
from stepwell._batching.steps import Step, Stepped, read
from stepwell._routing.probing import AsyncProber
from stepwell._routing.replica import Replica
from stepwell._transport import channel
from stepwell._transport.aio_stream import AsyncLink
from stepwell._transport.channel import AsyncTransport
from stepwell._transport.tokens import Tokens
from stepwell.config import ClientConfig
from stepwell.errors import StepwellError


class AsyncConnection:
    """Belongs to the event loop that runs when it is made."""

    def __init__(
        self,
        config: ClientConfig,
        retrier: Retrier,
        known: Tokens,
        replica: Replica | None,
        *,
        coalesce: bool,
    ) -> None:
        self.transport = AsyncTransport(config, known, replica)
        self.link = AsyncLink(self.transport.stream, config.address if replica is None else replica.address)
        self._retrier = retrier
        # A quarter of the message limit, because outputs may be larger than inputs.
        self._coalescer = Coalescer(self.link, retrier, self._unary, config.max_message_bytes // 4)
        self.step: Callable[[Step], Awaitable[Stepped]] = self._coalescer.step if coalesce else self._unary
        """Makes one attempt of a step."""

    async def _unary(self, step: Step) -> Stepped:
        return read(await self.transport.invoke(self._retrier.unary(step)))

    async def close(self) -> None:
        """Ends the calls in flight, then the channel."""
        self.transport.is_closed = True
        self._coalescer.close()
        await self.link.close()
        await self.transport.close()

    async def drop(self) -> None:
        """The same while the client goes on: calls in flight are tried again elsewhere."""
        await self.transport.drop()
        await self.link.close()


class AsyncConnections:
    """The connections to replicas, each made when it is first needed. Belongs to one event loop."""

    def __init__(self, config: ClientConfig, retrier: Retrier, *, coalesce: bool) -> None:
        assert retrier.router is not None
        self._config = config
        self._retrier = retrier
        self._tokens = channel.tokens(config)
        self._coalesce = coalesce
        self._made: dict[Replica, AsyncConnection] = {}
        self._is_closed = False
        self._prober = AsyncProber(retrier.router, self._check, self._drop, config.connect_timeout_s)
        retrier.router.attach(self._prober.wake, self._prober.drop)

    def to(self, replica: Replica) -> AsyncConnection:
        """The connection to a replica."""
        made = self._made.get(replica)
        if made is None:
            if self._is_closed:
                raise channel.closed()
            made = self._made[replica] = AsyncConnection(
                self._config, self._retrier, self._tokens, replica, coalesce=self._coalesce
            )
        return made

    async def _check(self, replica: Replica, timeout_s: float) -> StepwellError | None:
        return await self.to(replica).transport.check(timeout_s)

    async def _drop(self, replica: Replica) -> None:
        connection = self._made.pop(replica, None)
        if connection is not None:
            await connection.drop()

    async def close(self) -> None:
        """Ends all of them."""
        self._is_closed = True
        await self._prober.close()
        for connection in list(self._made.values()):
            await connection.close()
