"""A server on each front, to be sent the same messages: what one of them reads by itself the other lets protobuf read.

Not every machine can build the native one. With ``REQUIRE_NATIVE_FRONT`` set, as `.ci/run` does, tests of it are
never skipped: they fail where it is not there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import numpy as np
import pytest

from stepwell.v1 import models_pb2
from support.peers import wire
from support.peers.wire import SERVICE, Wire
from support.servers import served

FRONTS = ("native", "python")
Outcome = tuple[Any, ...]
needs_native = pytest.mark.skipif(
    importlib.util.find_spec("stepwell_front") is None and "REQUIRE_NATIVE_FRONT" not in os.environ,
    reason="no native front was built here",
)


def damaged(message: bytes, rng: np.random.Generator) -> bytes:
    """A message with up to three bytes changed, left out or added."""
    raw = bytearray(message)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(raw)))
        kind = int(rng.integers(3))
        if kind == 0:
            raw[at] = int(rng.integers(256))
        elif kind == 1:
            del raw[at]
        else:
            raw.insert(at, int(rng.integers(256)))
    return bytes(raw)


@contextlib.contextmanager
def serve(*models: str) -> Iterator[Mapping[str, Wire]]:
    """Serve models of `served` on both fronts; a client of each. In the end each finds that it has answered everybody."""
    with contextlib.ExitStack() as stack:
        wires, servers = {}, []
        for front in FRONTS:
            server = stack.enter_context(
                served.local_server(*models, extra_args=["--store", "memory", "--front", front])
            )
            wires[front] = stack.enter_context(Wire(server.address))
            servers.append(server)
            assert f"front={front}" in server.logs()
            listed = wires[front].models.ListModels(models_pb2.ListModelsRequest(), timeout=100)
            assert listed.server.front == front
        yield wires
        for server in servers:
            assert server.stop(timeout_s=100) == 0
            assert "not finished in time" not in server.logs()
            assert "internal error" not in server.logs(), "a defect was reported to some caller; see the log"


def called(
    one: Wire, rpc: str, raw: bytes, *, service: str = SERVICE, timeout: float = 100, **options: Any
) -> Outcome:
    """How a unary call of these bytes ends: the reply's bytes, or status, reason, message and facts."""
    call: Any = one.channel.unary_unary(f"/{service}/{rpc}")
    try:
        return ("OK", call(raw, timeout=timeout, **options))
    except grpc.RpcError as error:
        refused = wire.of_call(error)
        return refused.code, refused.reason, refused.message, dict(refused.metadata)
