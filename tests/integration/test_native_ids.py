"""The session ids of the native front's batches."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import numpy as np

from stepwell_server.rpc.fronts.base import Call, Method, OutputColumn, StepColumns
from support import secured
from support.rpc import streams
from support.rpc.native_steps import NativeSteps
from support.servers.both_fronts import needs_native

pytestmark = needs_native
_PATIENCE_S = 100.0


class Server(NativeSteps):
    """A native front that answers every step with its inputs and keeps the batches' ids."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[Any] = []

    def take(self, columns: StepColumns) -> None:
        self.ids.append(columns.session_ids)
        numbers = np.arange(len(columns.session_ids), dtype=np.uint64)
        (tensor,) = columns.inputs
        outputs = [OutputColumn("y", tensor.dtype, tensor.tail, tensor.data)]
        columns.replies.applied(None, numbers, numbers, outputs, replayed=False, model_version=1)

    async def general(self, call: Call) -> bytes:
        raise AssertionError("all frames of this test are on the fast path")


async def test_the_same_group_has_the_same_tuple_of_ids() -> None:
    first, second = ([f"{name}{i}" for i in range(64)] for name in "ab")
    changed = [*first[:-1], "a64"]
    server = Server()
    await server.serve([Method("stepwell.v1.SessionService", "StepStream", server.general, streams=True)])
    try:
        async with secured.channel_aio(server.address) as channel, asyncio.timeout(_PATIENCE_S):
            call: Any = channel.stream_stream("/stepwell.v1.SessionService/StepStream")()
            for number, ids in enumerate([first, second, first, changed, second], 1):
                await call.write(streams.message(number, *ids))
                assert await call.read() is not grpc.aio.EOF
    finally:
        await server.front.stop(0)
    assert [list(ids) for ids in server.ids] == [first, second, first, changed, second]
    assert [server.ids.index(ids) for ids in server.ids] == [0, 1, 0, 3, 1]
    assert server.ids[2] is server.ids[0]
    assert server.ids[4] is server.ids[1]
