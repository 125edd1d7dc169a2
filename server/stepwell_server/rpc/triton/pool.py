"""Descriptors for reflection: our protocol's are in the common pool, Triton's in one of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf import descriptor_pool

from stepwell_server.rpc.triton.inference import service_pb2 as pb


class BothPools:
    """What reflection asks of a pool, answered by the first of two that knows."""

    def __init__(self) -> None:
        self._pools = (descriptor_pool.Default(), pb.DESCRIPTOR.pool)

    def FindFileByName(self, name: str) -> Any:  # noqa: N802  (the names are protobuf's)
        """See `DescriptorPool`."""
        return self._first(lambda pool: pool.FindFileByName(name))

    def FindFileContainingSymbol(self, name: str) -> Any:  # noqa: N802
        """See `DescriptorPool`."""
        return self._first(lambda pool: pool.FindFileContainingSymbol(name))

    def FindMessageTypeByName(self, name: str) -> Any:  # noqa: N802
        """See `DescriptorPool`."""
        return self._first(lambda pool: pool.FindMessageTypeByName(name))

    def FindExtensionByNumber(self, message: Any, number: int) -> Any:  # noqa: N802
        """See `DescriptorPool`."""
        return message.file.pool.FindExtensionByNumber(message, number)

    def FindAllExtensions(self, message: Any) -> Any:  # noqa: N802
        """See `DescriptorPool`."""
        return message.file.pool.FindAllExtensions(message)

    def _first(self, find: Callable[[Any], Any]) -> Any:
        common, own = self._pools
        try:
            return find(common)
        except KeyError:
            return find(own)
