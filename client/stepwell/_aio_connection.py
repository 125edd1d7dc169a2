"""What an async client has in its event loop: a channel, a stream, and the steps that wait to leave."""

from __future__ import annotations

from stepwell._aio_link import AsyncLink
from stepwell._channel import AsyncTransport
from stepwell._coalesce import Coalescer, Drive
from stepwell._flow import Retrier
from stepwell.config import ClientConfig


class AsyncConnection:
    """Made and used in one running event loop."""

    def __init__(self, config: ClientConfig, retrier: Retrier, drive: Drive) -> None:
        self.transport = AsyncTransport(config)
        self.link = AsyncLink(self.transport.sessions)
        # Room for outputs that are larger than the inputs.
        self.coalescer = Coalescer(retrier, drive, config.max_message_bytes // 4)

    async def close(self) -> None:
        """Ends the calls under way, then the channel."""
        self.transport.is_closed = True
        await self.coalescer.close()
        await self.link.close()
        await self.transport.close()
