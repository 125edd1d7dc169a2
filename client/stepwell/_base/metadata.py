"""Metadata that a caller adds to every call: pairs of key and value, like HTTP headers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from stepwell.errors import InvalidInputError

Metadata: TypeAlias = Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]
"""Headers of calls: values by their keys, or pairs of key and value."""
Pairs: TypeAlias = tuple[tuple[str, str | bytes], ...]

#: Position of the flags in W3C's `traceparent`: version, trace, span and flags in hexadecimal, separated by dashes.
_FLAGS = slice(53, 55)
_KEY = re.compile(r"[0-9a-z_.-]+")
_VALUE = re.compile(r"[ -~]*")
# Keys of HTTP/2 and gRPC, and those that this SDK sends or may send in the future.
_RESERVED = frozenset(
    {
        *("connection", "content-length", "content-type", "host", "keep-alive", "proxy-connection"),
        *("te", "transfer-encoding", "upgrade", "user-agent"),
    }
)
_RESERVED_BEGINNINGS = ("grpc-", "stepwell-")


def sampled(trace: Pairs) -> str:
    """The `traceparent` among pairs, if its trace is recorded; otherwise empty."""
    for key, value in trace:
        if key == "traceparent" and isinstance(value, str):
            return value if int(value[_FLAGS] or "0", 16) & 1 else ""
    return ""


def checked(metadata: object) -> Pairs:
    """Checks metadata and returns it as gRPC takes it. Messages do not show values, which may be secret.

    Raises:
        InvalidInputError: It is not metadata, or a pair cannot be sent.
    """
    try:
        pairs: Any = metadata.items() if isinstance(metadata, Mapping) else metadata
        split = [(key, value) for key, value in pairs]
    except (TypeError, ValueError):
        raise InvalidInputError(
            f"metadata must be a mapping, or pairs, of key and value; got {type(metadata).__name__}"
        ) from None
    return tuple(_checked(key, value) for key, value in split)


def _checked(given: object, value: object) -> tuple[str, str | bytes]:
    key = given.lower() if isinstance(given, str) else ""
    if not _KEY.fullmatch(key):
        raise InvalidInputError(
            f"keys of metadata must be letters, digits and any of '_.-', one or more; got {given!r}"
        )
    if key in _RESERVED or key.startswith(_RESERVED_BEGINNINGS):
        raise InvalidInputError(f"keys of metadata must not be reserved by gRPC or this SDK; got {given!r}")
    if key.endswith("-bin"):
        if not isinstance(value, bytes):
            raise InvalidInputError(
                f"metadata[{given!r}] must be bytes because its key ends in -bin; got {type(value).__name__}"
            )
    elif not isinstance(value, str) or not _VALUE.fullmatch(value):
        raise InvalidInputError(
            f"metadata[{given!r}] must be a string of printable ASCII characters (bytes need a key that ends in "
            f"-bin); got {type(value).__name__}"
        )
    return key, value
