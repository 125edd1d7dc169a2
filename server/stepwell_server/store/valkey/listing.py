"""Lists the sessions of a shared store in the order of their ids, by merging the partitions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from stepwell_server.store.valkey.connection.requests import Request, Requests
from stepwell_server.store.valkey.keys import Keys

_MIN_PAGE_SIZE = 8
"""Minimum of ids read at once from one partition."""
_BEYOND = b"\xff"
"""Higher than any byte of UTF-8."""


@dataclasses.dataclass(slots=True)
class _Page:
    """The ids read from one partition."""

    found: list[bytes] = dataclasses.field(default_factory=list)
    is_last: bool = False


async def ids_after(requests: Requests, keys: Keys, after: str, prefix: str, limit: int) -> list[bytes]:
    """Return at most `limit` sorted ids after `after` that begin with `prefix`; fewer only if there are no more.

    Raises:
        Unavailable: the store cannot be read now.
    """
    low, high = _range(after.encode(), prefix.encode())
    pages = {partition: _Page() for partition in range(keys.partitions)}
    # usually enough in one round, as ids are spread evenly
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
    """Return the bounds for `ZRANGEBYLEX`."""
    low = b"(" + after if after >= prefix and after else b"[" + prefix if prefix else b"-"
    return low, b"(" + prefix + _BEYOND if prefix else b"+"


def _command(key: bytes, low: bytes, high: bytes, size: int) -> Sequence[bytes | int]:
    return (b"ZRANGEBYLEX", key, low, high, b"LIMIT", 0, size)
