"""JSON of the native front: others run while it is read and written."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from stepwell.v1 import sessions_pb2
from stepwell_server.rpc.http import json_form
from stepwell_server.rpc.http.conversion import Conversion
from support.rpc.http_client import codec
from support.servers.both_fronts import needs_native

pytestmark = needs_native
MANY = 65_535


@pytest.fixture
def a_thread_keeps_the_lock() -> Iterator[None]:
    """Until it releases Python's lock itself."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)
    yield
    sys.setswitchinterval(before)


def slices_of_others(work: Callable[[], object]) -> int:
    """How often another thread had Python's lock during some work."""
    slices = 0
    found: list[int] = []

    def run() -> None:
        before = slices
        work()
        found.append(slices - before)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():
        slices += 1
        time.sleep(0)  # gives the lock away
    return found[0]


def others_run_during(work: Callable[[], object]) -> bool:
    """Whether another thread ever has Python's lock: on a busy machine it is seldom quick enough to take it."""
    return any(slices_of_others(work) > 0 for _ in range(200))


@pytest.mark.parametrize(
    "document",
    [
        {"inputs": [{"values": np.random.default_rng().normal(size=MANY).tolist()}]},
        {"session_ids": [random.randbytes(8).hex() for _ in range(MANY)]},
        {"inputs": [{"values": ["NaN"] * MANY}]},
        {"unknown": [{}] * MANY},
    ],
    ids=["numbers", "texts", "no numbers", "objects"],
)
def test_others_run_while_a_body_is_read(a_thread_keeps_the_lock: None, document: object) -> None:
    body = json.dumps(document).encode()
    assert others_run_during(lambda: codec().read(body, 10))


def test_others_run_while_numbers_are_written(a_thread_keeps_the_lock: None) -> None:
    doubles = np.random.default_rng().normal(size=MANY).tobytes()
    assert others_run_during(lambda: codec().numbers(doubles))


class Waiting:
    """A codec that waits for the event loop."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def read(self, body: bytes, max_fields: int) -> Any:
        assert self.may_go_on.wait(60), "the event loop waits for the codec"
        return codec().read(body, max_fields)

    def numbers(self, doubles: bytes) -> str:
        assert self.may_go_on.wait(60), "the event loop waits for the codec"
        return codec().numbers(doubles)


async def test_the_event_loop_does_not_wait_for_large_bodies_and_replies() -> None:
    waiting = Waiting()
    conversion = Conversion(waiting)
    values = np.random.default_rng().normal(size=1000).tolist()
    body = json.dumps({"inputs": [{"values": values}]}).encode()
    assert not json_form.is_small(body)

    def request() -> bytes:
        message = sessions_pb2.StepRequest()
        json_form.read_body(body, message, waiting)
        return message.SerializeToString()

    reading = asyncio.create_task(conversion.run(request, is_large=True))
    await asyncio.sleep(0)
    waiting.may_go_on.set()
    raw = await reading
    waiting.may_go_on.clear()
    writing = asyncio.create_task(conversion.as_json(sessions_pb2.StepRequest, raw))
    await asyncio.sleep(0)
    waiting.may_go_on.set()
    assert json.loads(await writing) == {"inputs": [{"values": values}]}


@pytest.mark.parametrize("body", [b"{}", b"[" + b"1," * 256 + b"1]"])
def test_a_body_of_few_values_is_small(body: bytes) -> None:
    assert json_form.is_small(body)
    assert not json_form.is_small(body.replace(b"1]", b"1,1]") + b" " * (16 << 10))
