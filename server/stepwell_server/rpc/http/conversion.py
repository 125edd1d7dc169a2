"""Converts between messages and JSON, large ones in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from google.protobuf.message import Message

from stepwell_server.rpc.fronts.base import JsonCodec
from stepwell_server.rpc.http import json_form

_Result = TypeVar("_Result")


class Conversion:
    """Lives on the event loop. `codec` reads and writes JSON."""

    def __init__(self, codec: JsonCodec) -> None:
        self.codec = codec
        # a single thread: with more of them the event loop would wait longer for Python's lock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stepwell-json")

    async def run(self, work: Callable[[], _Result], *, is_large: bool) -> _Result:
        """Do some work, in the thread if it is large."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work) if is_large else work()

    async def as_json(self, reply_type: type[Message], raw: bytes) -> bytes:
        """Return a serialized reply as JSON."""
        return await self.run(
            lambda: json_form.dump(reply_type.FromString(raw), self.codec),
            is_large=len(raw) > json_form.SMALL_BYTES,
        )
