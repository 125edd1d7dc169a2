"""Keys and values of one Valkey server, and the commands on them that the store needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Value: TypeAlias = bytes | dict[bytes, bytes] | frozenset[bytes]
"""A string, a hash or a sorted set all of whose scores are alike. It is never changed, but replaced."""
Kept: TypeAlias = tuple[Value, float] | None
"""A value, and when it goes (ms; infinity: never); None: there is none."""

_NEVER = float("inf")


class Keyspace:
    """See the module. `wrote` is told of each write: the key, and what was there before."""

    def __init__(self, now_ms: Callable[[], int], wrote: Callable[[bytes, Kept], None]) -> None:
        self._now_ms = now_ms
        self._wrote = wrote
        self._kept: dict[bytes, tuple[Value, float]] = {}

    def kept(self, key: bytes) -> Kept:
        """The current value of a key."""
        kept = self._kept.get(key)
        if kept is not None and kept[1] <= self._now_ms():
            del self._kept[key]
            return None
        return kept

    def put_back(self, key: bytes, kept: Kept) -> None:
        """Let something be under a key as if it had never been otherwise."""
        if kept is None:
            self._kept.pop(key, None)
        else:
            self._kept[key] = kept

    def all(self) -> list[bytes]:
        """All keys that there are, in order."""
        return [key for key in sorted(self._kept) if self.kept(key) is not None]

    def call(self, command: bytes, *words: bytes) -> Any:
        """Run a command and return its reply."""
        return getattr(self, f"_{command.decode().lower()}")(*words)

    def _value(self, key: bytes) -> Any:
        kept = self.kept(key)
        return None if kept is None else kept[0]

    def _put(self, key: bytes, value: Value | None, until: float = _NEVER) -> None:
        before = self.kept(key)
        self.put_back(key, None if value is None else (value, until))
        self._wrote(key, before)

    # -------------------------------------------------------------------------------------------------------- strings

    def _get(self, key: bytes) -> bytes | None:
        return self._value(key)  # type: ignore[no-any-return]

    def _set(self, key: bytes, value: bytes, how: bytes = b"", ms: bytes = b"") -> bytes:
        assert how in (b"", b"PX"), how
        self._put(key, value, self._now_ms() + int(ms) if how else _NEVER)
        return b"OK"

    def _mset(self, *words: bytes) -> bytes:
        for key, value in zip(words[::2], words[1::2], strict=True):
            self._put(key, value)
        return b"OK"

    def _getrange(self, key: bytes, first: bytes, last: bytes) -> bytes:
        value, begin, end = self._value(key) or b"", int(first), int(last)
        begin = max(0, begin + len(value)) if begin < 0 else begin
        end = end + len(value) if end < 0 else end
        return bytes(value[begin : end + 1])

    def _setrange(self, key: bytes, at: bytes, part: bytes) -> int:
        kept = self.kept(key)
        value, until = (b"", _NEVER) if kept is None else kept
        assert isinstance(value, bytes)
        begin = int(at)
        assert len(value) >= begin, "the store writes into what is there"
        value = value[:begin] + part + value[begin + len(part) :]
        self._put(key, value, until)
        return len(value)

    def _del(self, *keys: bytes) -> int:
        there = [key for key in keys if self.kept(key) is not None]
        for key in there:
            self._put(key, None)
        return len(there)

    def _exists(self, key: bytes) -> int:
        return int(self.kept(key) is not None)

    # ---------------------------------------------------------------------------------------------- hashes and sets

    def _hget(self, key: bytes, name: bytes) -> bytes | None:
        return (self._value(key) or {}).get(name)

    def _hset(self, key: bytes, *words: bytes) -> int:
        has = self._value(key) or {}
        more = dict(zip(words[::2], words[1::2], strict=True))
        self._put(key, {**has, **more})
        return len(more.keys() - has.keys())

    def _hdel(self, key: bytes, name: bytes) -> int:
        has = self._value(key) or {}
        if name not in has:
            return 0
        self._put(key, {each: value for each, value in has.items() if each != name} or None)
        return 1

    def _hincrby(self, key: bytes, name: bytes, by: bytes) -> int:
        has = self._value(key) or {}
        new = int(has.get(name, b"0")) + int(by)
        self._put(key, {**has, name: b"%d" % new})
        return new

    def _hgetall(self, key: bytes) -> list[bytes]:
        return [word for pair in (self._value(key) or {}).items() for word in pair]

    def _zadd(self, key: bytes, score: bytes, name: bytes) -> int:
        assert score == b"0", score
        has = self._value(key) or frozenset()
        self._put(key, has | {name})
        return int(name not in has)

    def _zrem(self, key: bytes, name: bytes) -> int:
        has = self._value(key) or frozenset()
        if name not in has:
            return 0
        self._put(key, (has - {name}) or None)
        return 1

    def _zscore(self, key: bytes, name: bytes) -> bytes | None:
        return b"0" if name in (self._value(key) or ()) else None

    def _zcard(self, key: bytes) -> int:
        return len(self._value(key) or ())

    def _zrangebylex(
        self, key: bytes, low: bytes, high: bytes, limit: bytes, first: bytes, count: bytes
    ) -> list[bytes]:
        assert limit == b"LIMIT", limit
        found = [
            name for name in sorted(self._value(key) or ()) if _is_above(name, low) and _is_below(name, high)
        ]
        return found[int(first) : int(first) + int(count)]

    # --------------------------------------------------------------------------------------------------------- others

    def _time(self) -> list[bytes]:
        seconds, ms = divmod(self._now_ms(), 1000)
        return [b"%d" % seconds, b"%d" % (ms * 1000)]

    def _publish(self, _channel: bytes, _message: bytes) -> int:
        return 0


def _is_above(name: bytes, low: bytes) -> bool:
    return low == b"-" or (name >= low[1:] if low[:1] == b"[" else name > low[1:])


def _is_below(name: bytes, high: bytes) -> bool:
    return high == b"+" or (name <= high[1:] if high[:1] == b"[" else name < high[1:])
