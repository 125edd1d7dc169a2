"""A server on each front, to be sent the same messages: what one of them reads by itself the other lets protobuf read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import grpc

from support import served, wire
from support.wire import SERVICE, Wire

FRONTS = ("native", "python")
Outcome = tuple[Any, ...]


@contextlib.contextmanager
def serve(*models: str) -> Iterator[Mapping[str, Wire]]:
    """Serve models of `served` on both fronts; a client of each."""
    with contextlib.ExitStack() as stack:
        wires, servers = {}, []
        for front in FRONTS:
            server = stack.enter_context(
                served.local_server(*models, extra_args=["--store", "memory", "--front", front])
            )
            wires[front] = stack.enter_context(Wire(server.address))
            servers.append(server)
            assert f"front={front}" in server.logs()
        yield wires
        for server in servers:
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
