"""A bare grpc.aio server: bytes in, bytes out, nothing parsed. What gRPC in Python costs by itself.

`Unary` and `Stream` send back what came; `Frames` sends back as many bytes as --reply-bytes says. Prints its
address.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

METHODS = "/bench.Echo/"


class Echo:
    """The calls."""

    def __init__(self, reply_bytes: int) -> None:
        self._reply = bytes(reply_bytes)

    async def unary(self, request: bytes, context: Any) -> bytes:
        return request

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request)

    async def frames(self, requests: AsyncIterator[bytes], context: Any) -> None:
        while await context.read() is not grpc.aio.EOF:
            await context.write(self._reply)


async def serve(reply_bytes: int) -> None:
    echo = Echo(reply_bytes)
    handlers: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(echo.unary),
        "Stream": grpc.stream_stream_rpc_method_handler(echo.stream),
        "Frames": grpc.stream_stream_rpc_method_handler(echo.frames),
    }
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uvloop", action="store_true")
    parser.add_argument("--reply-bytes", type=int, default=0)
    options = parser.parse_args()
    if options.uvloop:
        import uvloop

        uvloop.run(serve(options.reply_bytes))
    else:
        asyncio.run(serve(options.reply_bytes))


if __name__ == "__main__":
    main()
