"""Writes documents of dicts, lists and scalars as YAML, without a package for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal

Value = str | int | float | bool | Sequence["Value"] | Mapping[str, "Value"]

#: Strings that YAML reads as strings without quotes, whatever its version.
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def dump(document: Mapping[str, Value]) -> str:
    """The document as YAML, in block style, ending in a line break."""
    return "".join(f"{line}\n" for line in _mapping(document))


def _mapping(value: Mapping[str, Value]) -> Iterator[str]:
    for name, inner in value.items():
        yield from _entry(f"{_scalar(name)}:", inner)


def _sequence(value: Sequence[Value]) -> Iterator[str]:
    for inner in value:
        lines = _lines(inner)
        if lines is None:
            yield f"- {_scalar(inner)}"
            continue
        for at, line in enumerate(lines):
            yield f"  {line}" if at else f"- {line}"


def _entry(head: str, inner: Value) -> Iterator[str]:
    lines = _lines(inner)
    if lines is None:
        yield f"{head} {_scalar(inner)}"
        return
    yield head
    for line in lines:
        yield f"  {line}"


def _lines(value: Value) -> list[str] | None:
    """The lines of what is more than one scalar; None: it stands beside its key."""
    if isinstance(value, Mapping):
        return list(_mapping(value)) or None
    if isinstance(value, str) or not isinstance(value, Sequence):
        return None
    return list(_sequence(value)) or None


def _scalar(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        text = format(Decimal(repr(value)), "f")  # YAML 1.1 takes 1e-05 as a string
        return text if "." in text else f"{text}.0"
    if isinstance(value, str):
        is_plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS
        return value if is_plain else '"' + "".join(map(_character, value)) + '"'
    return "{}" if isinstance(value, Mapping) else "[]"


def _character(one: str) -> str:
    if one in '"\\':
        return f"\\{one}"
    return one if one.isascii() and one.isprintable() else f"\\U{ord(one):08x}"
