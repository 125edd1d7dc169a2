"""The scripts of the store, run by a real Lua as Valkey runs them, on keys that a test has in memory."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lupa import lua51

from stepwell_server.store.valkey import scripts

Call = Callable[..., Any]
"""`redis.call`: a command and its arguments; returns the reply."""
Defects = Mapping[str, tuple[str, str]]
"""What is wrong with scripts on purpose: by what a script is called in `scripts`, a part of its text and what stands there instead."""

_NAMES = {script.sha: name for name, script in vars(scripts).items() if isinstance(script, scripts.Script)}
_FORMS = {
    b">I8": struct.Struct(">Q"),
    b"<I4": struct.Struct("<I"),
    b"<I2": struct.Struct("<H"),
    b"<I1": struct.Struct("<B"),
}


class _Lua:
    """One interpreter for all nodes of the process: scripts keep nothing between two calls."""

    def __init__(self) -> None:
        self.call: Call = self._nobody
        self._runtime = lua51.LuaRuntime(encoding=None, unpack_returned_tuples=True)
        table = self._runtime.table_from
        own = self._runtime.globals()
        own[b"redis"] = table({b"call": self._called, b"pcall": self._called})
        own[b"struct"] = table({b"pack": _pack, b"unpack": _unpack})

    @functools.lru_cache(maxsize=64)  # noqa: B019 - there is one, for ever
    def function(self, source: str) -> Any:
        """A script as a function of its keys and arguments."""
        return self._runtime.execute(b"return function(KEYS, ARGV)\n%s\nend" % source.encode())

    def run(self, source: str, call: Call, keys: Sequence[bytes], arguments: Sequence[bytes]) -> Any:
        table = self._runtime.table_from
        self.call = call
        try:
            return _reply(self.function(source)(table(keys), table(arguments)))
        finally:
            self.call = self._nobody

    def _called(self, *words: Any) -> Any:
        reply = self.call(*map(word_of, words))
        if reply is None:
            return False
        return self._runtime.table_from(reply) if isinstance(reply, list) else reply

    @staticmethod
    def _nobody(*_words: Any) -> Any:
        raise AssertionError("no script runs")


@functools.cache
def _lua() -> _Lua:
    return _Lua()


class Scripts:
    """The scripts as one store has them."""

    def __init__(self, defects: Defects) -> None:
        self._sources: dict[bytes, str] = {}
        for sha, name in _NAMES.items():
            source = getattr(scripts, name).source
            if name in defects:
                old, new = defects[name]
                assert source.count(old) == 1, f"{name} must have {old!r} once"
                source = source.replace(old, new)
            self._sources[sha] = source

    @staticmethod
    def name(sha: bytes) -> str:
        """The name of a script."""
        return _NAMES[sha]

    def run(self, sha: bytes, call: Call, keys: Sequence[bytes], arguments: Sequence[bytes]) -> Any:
        """The reply of a script."""
        return _lua().run(self._sources[sha], call, keys, arguments)


def word_of(word: bytes | str | float) -> bytes:
    """A word of a command, as it is sent."""
    if isinstance(word, bytes):
        return word
    if isinstance(word, float):
        return b"%d" % word if word.is_integer() else b"%.17g" % word
    return str(word).encode()


def _reply(value: Any) -> Any:
    """The value that a script returned, as Valkey's reply."""
    if value is False or value is None:
        return None
    if isinstance(value, float):
        return int(value)
    if lua51.lua_type(value) != "table":
        return value
    return [_reply(value[place]) for place in range(1, len(value) + 1)]


def _pack(form: bytes, value: float) -> bytes:
    return _FORMS[form].pack(int(value))


def _unpack(form: bytes, data: bytes, at: float = 1) -> int:
    (value,) = _FORMS[form].unpack_from(data, int(at) - 1)
    return int(value)
