"""All sessions of a shared store in the order of their ids, though each partition has an order of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from stepwell_server.store.valkey.connection.requests import Request, Requests
from stepwell_server.store.valkey.keys import Keys

_MIN_PAGE_SIZE = 8
"""Ids of one partition that are read at once, at least."""
_BEYOND = b"\xff"
"""No byte of UTF-8 is as high."""


@dataclasses.dataclass(slots=True)
class _Page:
    """What was read of one partition."""

    found: list[bytes] = dataclasses.field(default_factory=list)
    is_last: bool = False


async def ids_after(requests: Requests, keys: Keys, after: str, prefix: str, limit: int) -> list[bytes]:
    """Ids in their order: at most `limit` of those behind `after` that begin with `prefix`; fewer only if there are no more.

    Raises:
        Unavailable: the store cannot be read now.
    """
    low, high = _range(after.encode(), prefix.encode())
    pages = {partition: _Page() for partition in range(keys.partitions)}
    # mostly enough at once, as ids are spread evenly
    size = max(_MIN_PAGE_SIZE, limit // keys.partitions + limit // (4 * keys.partitions) + 1)
    while True:
        bound = min(
            (page.found[-1] for page in pages.values() if not page.is_last and page.found), default=None
        )
        unread = [p for p, page in pages.items() if not page.is_last and not page.found]
        if not unread:
            ready = sorted(i for page in pages.values() for i in page.found if bound is None or i <= bound)
            if bound is None or len(ready) >= limit:
                return ready[:limit]
            unread = [p for p, page in pages.items() if not page.is_last and page.found[-1] == bound]
        asked = [
            Request(
                p,
                _command(keys.ids(p), b"(" + pages[p].found[-1] if pages[p].found else low, high, size),
                otherwise=(),
            )
            for p in unread
        ]
        for partition, found in zip(unread, await requests.ask(*asked), strict=True):
            page = pages[partition]
            page.found += found
            page.is_last = len(found) < size


def _range(after: bytes, prefix: bytes) -> tuple[bytes, bytes]:
    """The ends of ids in the words of `ZRANGEBYLEX`."""
    low = b"(" + after if after >= prefix and after else b"[" + prefix if prefix else b"-"
    return low, b"(" + prefix + _BEYOND if prefix else b"+"


def _command(key: bytes, low: bytes, high: bytes, size: int) -> Sequence[bytes | int]:
    return (b"ZRANGEBYLEX", key, low, high, b"LIMIT", 0, size)
