"""What is remembered of sessions that are gone, so that the answers stay true.

A tombstone tells an expired session from one that never was. A closed session's request id lets a
retry of the closing succeed. Both are bounded: the oldest are forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class RecentValues(Generic[K, V]):
    """The last `limit` values by key; a key set again counts as new."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: K) -> V | None:
        """The value, or None if it was never there or is forgotten."""
        return self._items.get(key)

    def put(self, key: K, value: V) -> None:
        """Remember a value."""
        self._items.pop(key, None)
        self._items[key] = value
        while len(self._items) > self._limit:
            self._items.popitem(last=False)

    def forget(self, key: K) -> None:
        """Forget a key, if it is there."""
        self._items.pop(key, None)
