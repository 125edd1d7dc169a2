"""LiteRT's delegate for wide dense layers, if there is one for this installation and processor.

The native module has it. A row's bits are those that LiteRT's own kernels give it. This is the only module of the
engine that imports `stepwell_front`.
"""

from __future__ import annotations

import functools
from importlib import metadata

try:
    from stepwell_front import dense_delegate
except ImportError:  # it is not installed, or older

    def dense_delegate() -> int | None:
        """Return nothing."""
        return None


#: The native module relies on the layout of structures of LiteRT, which another version may change. These were tried;
#: with others LiteRT's own kernels run all layers.
LITERT_VERSIONS = ("2.1", "2.2", "2.3")


class DenseDelegate:
    """A delegate as LiteRT's `Interpreter` expects it. It has no state, so any number of interpreters may share it."""

    def __init__(self, address: int) -> None:
        self._address = address

    def _get_native_delegate_pointer(self) -> int:
        return self._address


def is_tried(version: str) -> bool:
    """Whether the native module is known to work with this version of LiteRT."""
    return ".".join(version.split(".")[:2]) in LITERT_VERSIONS


@functools.cache
def dense_delegates() -> tuple[DenseDelegate, ...]:
    """Return the delegate, or nothing."""
    if not is_tried(metadata.version("ai-edge-litert")):
        return ()
    address = dense_delegate()
    return () if address is None else (DenseDelegate(address),)
