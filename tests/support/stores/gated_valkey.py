"""A real Valkey behind the gates of a test, whose scripts have the time from a clock of the test."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

from stepwell_server.clock import Clock
from stepwell_server.store.base import StoredSession
from stepwell_server.store.valkey import scripts
from stepwell_server.store.valkey.keys import HEAD, RECORD
from stepwell_server.store.valkey.store import ValkeyStore
from support.servers.valkey_servers import Valkey
from support.stores.gates import Gated, Service
from support.stores.valkey_store import fresh_prefix, opened

_TIME = "t[1] * 1000 + math.floor(t[2] / 1000)"
_CLOCK = "test-clock"
_AGE = """
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. '*')) do
  local left = redis.call('PTTL', key)
  if left >= 0 then redis.call('PEXPIRE', key, math.max(0, left - ARGV[2])) end
end
"""


@contextlib.contextmanager
def clocked(valkey: Valkey) -> Iterator[None]:
    """Let scripts take the time from a key of a server, where there is one; at the end the server is empty again."""
    before = [(script, script.source, script.sha) for script in scripts.ALL]
    for script, source, _ in before:
        changed = source.replace(f"return {_TIME}", f"return tonumber(call('GET', '{_CLOCK}')) or {_TIME}")
        assert (changed == source) == ("'TIME'" not in source), "the scripts ask for the time in another way"
        _set(script, changed)
        valkey.ask("SCRIPT", "LOAD", changed)
    try:
        yield
    finally:
        valkey.ask("FLUSHALL")
        for script, source, _ in before:
            _set(script, source)


def _set(script: scripts.Script, source: str) -> None:
    object.__setattr__(script, "source", source)
    sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest().encode()
    object.__setattr__(script, "sha", sha)


@dataclasses.dataclass(slots=True)
class _Database:
    """Shared by the servers on one store."""

    valkey: Valkey
    prefix: str
    clock: Clock | None
    partitions: int
    service: Service = dataclasses.field(default_factory=Service)
    now: float = 0.0
    """The time that the scripts have."""

    def set_time(self, now: float) -> None:
        """Let the scripts, and what expires by itself, have this time."""
        if now == self.now:
            return
        if self.now:
            self.valkey.ask("EVAL", _AGE, 0, self.prefix, round((now - self.now) * 1000))
        self.valkey.ask("SET", _CLOCK, round(now * 1000))
        self.now = now


class _OwnClock:
    """The clock of the server that uses a store, which is known when it starts."""

    def __init__(self) -> None:
        self.store: GatedValkey | None = None

    def monotonic(self) -> float:
        return self._clock.monotonic()

    def now(self) -> float:
        return self._clock.now()

    @property
    def _clock(self) -> Clock:
        assert self.store is not None
        return self.store.own_clock


class GatedValkey(Gated):
    """`ValkeyStore` as one server sees it."""

    def __init__(self, inner: ValkeyStore, database: _Database) -> None:
        super().__init__(inner, database.service)
        self._database = database

    @property
    def inner(self) -> Any:
        """The store itself, which has the test's time whenever it is asked."""
        database = self._database
        database.set_time((database.clock or self.own_clock).now())
        return self._inner

    @inner.setter
    def inner(self, inner: ValkeyStore) -> None:
        self._inner = inner

    async def another(self) -> GatedValkey:
        return await _opened(self._database)

    def serve(self, clock: Clock) -> None:
        super().serve(clock)
        self._database.clock = self._database.clock or clock

    async def put_back(self, session_id: str, before: StoredSession) -> None:
        key = self._inner._keys.session(session_id)
        head = HEAD.pack(RECORD, before.stamp.to_bytes(8, "little"), round(self._database.now * 1000))
        self._database.valkey.ask("SET", key, head + bytes(before.record or b""))

    async def close(self) -> None:
        await super().close()
        await self._inner.close()


async def gated_valkey(valkey: Valkey, clock: Clock | None = None) -> GatedValkey:
    """A new store; `clock` is its own, None: that of the first server."""
    # between partitions the look for idle sessions rests: three times as long as one took, by a clock that the test moves
    partitions = 4 if clock is None else 1
    return await _opened(_Database(valkey, fresh_prefix(), clock, partitions))


async def _opened(database: _Database) -> GatedValkey:
    own = _OwnClock()
    url = database.valkey.url(f"?prefix={database.prefix}&partitions={database.partitions}&timeout_ms=60000")
    own.store = GatedValkey(await opened(url, clock=own), database)
    return own.store
