"""Recent facts about sessions that have ended, so that answers stay true.

A tombstone distinguishes an expired session from one that never existed. The request id of a close lets a retry of
it succeed. Both are bounded: the oldest are forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class RecentValues(Generic[K, V]):
    """The last `limit` values by key. Setting a key again makes it the newest."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: K) -> V | None:
        """The value, or None if it was never set or has been forgotten."""
        return self._items.get(key)

    def put(self, key: K, value: V) -> None:
        """Remember a value."""
        self._items.pop(key, None)
        self._items[key] = value
        while len(self._items) > self._limit:
            self._items.popitem(last=False)

    def forget(self, key: K) -> None:
        """Forget a key, if it exists."""
        self._items.pop(key, None)
