"""The connection of an async client: its channel, its stream, and the coalescer of its steps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from stepwell._aio_link import AsyncLink
from stepwell._channel import AsyncTransport
from stepwell._coalesce import Coalescer
from stepwell._flow import Retrier
from stepwell._steps import Step, Stepped, read
from stepwell.config import ClientConfig


class AsyncConnection:
    """Belongs to the event loop that runs when it is made."""

    def __init__(self, config: ClientConfig, retrier: Retrier, *, coalesce: bool) -> None:
        self.transport = AsyncTransport(config)
        self.link = AsyncLink(self.transport.stream, config.address)
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
