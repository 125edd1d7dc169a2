"""The protocol's calls that this server does not have: each ends with UNIMPLEMENTED and says why."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from stepwell_server.rpc.boundary import Context
from stepwell_server.rpc.triton.servicer import SERVICE

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


def unsupported_handler() -> grpc.GenericRpcHandler:
    """A handler for all of them."""
    handlers = {name: _refuse(name, reason) for name, reason in _REASONS.items()}
    return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)


def _refuse(method: str, reason: str) -> Any:
    async def handle(_raw: bytes, context: Context) -> bytes:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method}: {reason}")

    return grpc.unary_unary_rpc_method_handler(handle)
