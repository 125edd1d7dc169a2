"""The protocol's calls that this server does not have: each ends with UNIMPLEMENTED and says why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import empty_pb2
from google.protobuf.message import Message

from stepwell_server.errors import Unsupported
from stepwell_server.rpc.boundary import Boundary, Serve
from stepwell_server.rpc.fronts.base import Call

_SHARED_MEMORY = "shared memory is not supported; send tensors in the messages"
_REPOSITORY = "models are loaded when the server starts; there is no model repository to control"
_REASONS = {
    "RepositoryIndex": _REPOSITORY,
    "RepositoryModelLoad": _REPOSITORY,
    "RepositoryModelUnload": _REPOSITORY,
    "SystemSharedMemoryStatus": _SHARED_MEMORY,
    "SystemSharedMemoryRegister": _SHARED_MEMORY,
    "SystemSharedMemoryUnregister": _SHARED_MEMORY,
    "CudaSharedMemoryStatus": _SHARED_MEMORY,
    "CudaSharedMemoryRegister": _SHARED_MEMORY,
    "CudaSharedMemoryUnregister": _SHARED_MEMORY,
    "TraceSetting": "request tracing is not supported",
    "LogSettings": "log settings are made when the server starts: --log-level, --log-format",
}


def unsupported_methods(boundary: Boundary) -> Mapping[str, Serve]:
    """What serves each of them, by its name. What they are sent is not looked at."""
    return {name: _refuse(boundary, name, reason) for name, reason in _REASONS.items()}


def _refuse(boundary: Boundary, method: str, reason: str) -> Serve:
    async def behaviour(_request: Any, _call: Call) -> Message:
        raise Unsupported(f"{method}: {reason}")

    return boundary.unary(method, behaviour, empty_pb2.Empty)
