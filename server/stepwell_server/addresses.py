"""Where a server listens."""

from __future__ import annotations

from typing import NamedTuple


class Address(NamedTuple):
    """A host and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixAddress(NamedTuple):
    """A Unix socket."""

    path: str
    """Absolute."""

    def __str__(self) -> str:
        return f"unix:{self.path}"
