"""Calls and their targets, as values. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

from google.protobuf.message import Message

from stepwell._base.metadata import Pairs
from stepwell.errors import InvalidInputError

Requests: TypeAlias = Callable[[], Iterator[Message]]
"""Creates the requests of one attempt."""


class Endpoint:
    """One of several servers that a client may ask. Compared by identity."""

    __slots__ = ("address", "authority", "host")

    def __init__(self, address: str, host: str = "", name: str = "") -> None:
        """An endpoint.

        Args:
            address: As gRPC takes it.
            host: Host of its certificate, if it was found by a name lookup; otherwise empty.
            name: That name with dns:/// and the port.
        """
        self.address = address
        self.host = host
        self.authority = name.removeprefix("dns:///")


class Call(NamedTuple):
    """Make one attempt of a call; the answer is its response, or the last one."""

    rpc: str
    request: Message | bytes | Requests
    """The request (encoded, for Step), or a function that creates the requests of a call that streams them."""
    timeout_s: float | None
    metadata: Pairs = ()
    """Metadata of this call, in addition to that of every call."""
    on_reply: Callable[[Any], object] | None = None
    """Called with each response of a call that streams them. If it returns an awaitable, the async client awaits it."""
    to: Endpoint | None = None
    """The replica to ask; None: the client has one server."""
    on_open: Callable[[Callable[[], object]], object] | None = None
    """Called with a function that cancels a call that streams its responses."""


def check_size(what: str, request: Message, max_message_bytes: int) -> None:
    """Checks the size of a message. gRPC would reject a large one with the status of an overload.

    Raises:
        InvalidInputError: The message exceeds the limit.
    """
    check_length(what, request.ByteSize(), max_message_bytes)


def check_length(what: str, length: int, max_message_bytes: int) -> None:
    """As `check_size`, by the length of the encoded message."""
    if length > max_message_bytes:
        raise InvalidInputError(
            f"the message of {what} must be at most max_message_bytes = {max_message_bytes}; got {length} bytes"
        )
