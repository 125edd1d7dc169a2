"""A proxy on the loopback that loses answers on request. It runs on the event loop of the test."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self

from support.servers.valkey_servers import HOST


class DroppingProxy:
    """Forwards what comes to `port`. Leaving the block ends it.

    An answer is lost when the server has begun to send it: what was asked has been done then.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.losses = 0
        """The number of next answers to lose, each with its connection."""
        self.lost = 0
        """How many were."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        to_reader, to_writer = await asyncio.open_connection(HOST, self._target)
        sending = asyncio.ensure_future(self._send(reader, to_writer))
        try:
            with contextlib.suppress(OSError):
                while answer := await to_reader.read(65536):
                    if self.losses:
                        self.losses -= 1
                        self.lost += 1
                        break
                    writer.write(answer)
                    await writer.drain()
        finally:
            sending.cancel()
            for each in (writer, to_writer):
                each.close()

    async def _send(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while request := await reader.read(65536):
                writer.write(request)
                await writer.drain()
        writer.close()
