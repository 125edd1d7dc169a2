"""Describes how two models differ, in terms of their layers."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from stepwell_server.architecture.canonical import is_named, layers_of, with_references
from stepwell_server.program import Architecture

_MAX_VALUE = 60
"""The maximum number of characters of a value in a clause."""
_MAX_NAME = 80
_Layer = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Differences:
    """How one model differs from another."""

    clauses: tuple[str, ...]
    """Each names a layer, what differs, and both values. Empty: nothing differs, or it is unknown."""
    is_of_names: bool
    """The layers and their connections are the same, but with other names that cannot be matched reliably."""


class _Clause(NamedTuple):
    text: str
    is_of_name: bool = False


def compare(old: Architecture, new: Architecture) -> Differences:
    """Describe how ``new`` differs from ``old``, given that their `Architecture.structure` differs."""
    try:
        before, after = json.loads(old.config or "null"), json.loads(new.config or "null")
        if before is None or after is None:
            return Differences((), is_of_names=False)
        real = list(_of_models(before, after, old.names, new.names))
    except (RecursionError, ValueError, LookupError, TypeError, AttributeError):  # a file may say anything
        return Differences((), is_of_names=False)
    if real:
        return Differences(
            tuple(each.text for each in real), is_of_names=all(each.is_of_name for each in real)
        )
    groups = new.ambiguous or old.ambiguous
    if groups:
        names = "; ".join(" and ".join(repr(_short(name)) for name in group) for group in groups)
        why = f"layers {names} are interchangeable: only their names tell which state belongs to which"
        return Differences((why,), is_of_names=True)
    if old.structure == new.structure:
        return Differences((), is_of_names=True)
    why = "layers of the same kind were made in another order, so that it is not clear which is which"
    return Differences((why,), is_of_names=True)


def _of_models(before: Any, after: Any, old: tuple[str, ...], new: tuple[str, ...]) -> Iterator[_Clause]:
    mine, theirs = layers_of(before), layers_of(after)
    if not (mine and theirs):
        yield from _of_objects(before, after, old, new, "the model")
        return
    pairs, gone, new_ones = _paired(mine, theirs)
    found = [clause for one, other in pairs for clause in _of_layers(one, other, old, new)]
    found += [_Clause(f"{_said(one, old)} is not there") for one in gone]
    found += [_Clause(f"{_said(other, new)} is new") for other in new_ones]
    yield from found or [*_wiring(pairs, old, new), *_ends(before, after, pairs)]


def _paired(
    mine: list[_Layer], theirs: list[_Layer]
) -> tuple[list[tuple[_Layer, _Layer]], list[_Layer], list[_Layer]]:
    """The corresponding layers of two models, matched by names that the user chose, then by class and order."""
    given = {_own_name(layer): layer for layer in theirs if not _is_number(_own_name(layer))}
    pairs = [(one, given[_own_name(one)]) for one in mine if _own_name(one) in given]
    paired = {_own_name(one) for one, _ in pairs}
    rest = [one for one in mine if _own_name(one) not in paired]
    others = [other for other in theirs if _own_name(other) not in paired]
    gone, new_ones = list[_Layer](), list[_Layer]()
    matcher = difflib.SequenceMatcher(None, [*map(_key, rest)], [*map(_key, others)], autojunk=False)
    for tag, i, j, k, m in matcher.get_opcodes():
        count = min(j - i, m - k) if tag in {"equal", "replace"} else 0
        pairs += zip(rest[i : i + count], others[k : k + count], strict=True)
        gone += rest[i + count : j]
        new_ones += others[k + count : m]
    return pairs, gone, new_ones


def _own_name(layer: _Layer) -> str:
    return str(layer["config"]["name"])


def _key(layer: dict[str, Any]) -> str:
    return str(layer.get("registered_name") or layer["class_name"])


def _of_layers(one: _Layer, other: _Layer, old: tuple[str, ...], new: tuple[str, ...]) -> Iterator[_Clause]:
    if _key(one) != _key(other):
        yield _Clause(f"{_said(one, old)} is not there, but {_said(other, new)}")
        return
    if layers_of(one) and layers_of(other):
        yield from _renamed(_own_name(one), _own_name(other), new, _said(one, old))
        yield from _of_models(one, other, old, new)
        return
    yield from _of_objects(one, other, old, new, _said(one, old))


def _of_objects(
    one: Any, other: Any, old: tuple[str, ...], new: tuple[str, ...], said: str
) -> Iterator[_Clause]:
    for key, value, instead in _changes(one.get("config"), other.get("config"), ""):
        is_dtype = key.endswith("dtype.name")
        if key == "name":
            yield from _renamed(value, instead, new, said)
        elif not (key.endswith(".name") and _is_number(value) and _is_number(instead)):
            argument = key.removesuffix(".name") if is_dtype else key
            yield _Clause(
                f"{said}: {argument} was {_value(value, old)} and is {_value(instead, new)}",
                is_of_name=key.endswith(".name") and not is_dtype,
            )


def _renamed(name: Any, instead: Any, new: tuple[str, ...], said: str) -> Iterator[_Clause]:
    if name != instead and not (_is_number(name) and _is_number(instead)):
        yield _Clause(f"{said} is called {_value(instead, new)} now", is_of_name=True)


def _changes(one: Any, other: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        if is_named(one) and is_named(other) and one["class_name"] != other["class_name"]:
            yield key, one["class_name"], other["class_name"]
            return
        for part in dict.fromkeys((*one, *other)):
            if part in {"module", "registered_name", "shared"}:
                continue
            inner = part if not key else key if part == "config" else f"{key}.{part}"
            yield from _changes(one.get(part), other.get(part), inner)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for place, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            yield from _changes(mine, theirs, f"{key}[{place}]" if isinstance(mine, dict) else key)
    elif one != other:
        yield key, one, other


def _wiring(
    pairs: list[tuple[_Layer, _Layer]], old: tuple[str, ...], new: tuple[str, ...]
) -> Iterator[_Clause]:
    """Return differences in what layers are called on; only for models with the same layers."""
    numbers = {_own_name(one): str(number) for number, (one, _) in enumerate(pairs)}
    others = {_own_name(other): str(number) for number, (_, other) in enumerate(pairs)}
    for one, other in pairs:
        mine = with_references(one.get("inbound_nodes"), lambda name: numbers.get(name, name))
        theirs = with_references(other.get("inbound_nodes"), lambda name: others.get(name, name))
        if mine != theirs:
            before, after = _sources(one, old), _sources(other, new)
            if before != after:  # else another layer has the name now, which is a clause of its own
                yield _Clause(f"{_said(one, old)} was called on {before} and is called on {after} now")


def _ends(before: Any, after: Any, pairs: list[tuple[_Layer, _Layer]]) -> Iterator[_Clause]:
    """Return differences in the names and sources of inputs and outputs; only for models with the same connections."""
    numbers = {_own_name(one): str(number) for number, (one, _) in enumerate(pairs)}
    others = {_own_name(other): str(number) for number, (_, other) in enumerate(pairs)}
    for key, said in (("input_layers", "inputs"), ("output_layers", "outputs")):
        mine, theirs = before["config"].get(key), after["config"].get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict) and mine.keys() != theirs.keys():
            yield _Clause(f"the {said} were {_value(sorted(mine), ())} and are {_value(sorted(theirs), ())}")
        elif with_references(mine, lambda name: numbers.get(name, name)) != with_references(
            theirs, lambda name: others.get(name, name)
        ):
            yield _Clause(f"the {said} are those of other layers, or in another order or structure")


def _sources(layer: _Layer, names: tuple[str, ...]) -> str:
    found: list[str] = []

    def note(name: str) -> str:
        found.append(repr(_short(_name(name, names))))
        return name

    with_references(layer.get("inbound_nodes"), note)
    return ", ".join(found[:4]) + (" and others" if len(found) > 4 else "") or "nothing"


def _said(layer: _Layer, names: tuple[str, ...]) -> str:
    return f"layer {_short(_name(layer['config']['name'], names))!r} ({_short(layer['class_name'])})"


def _is_number(name: Any) -> bool:
    return isinstance(name, str) and name.startswith("#") and name[1:].isdecimal()


def _name(name: str, names: tuple[str, ...]) -> str:
    return names[int(name[1:])] if _is_number(name) else name


def _value(value: Any, names: tuple[str, ...]) -> str:
    return _short(repr(_name(value, names) if isinstance(value, str) else value), _MAX_VALUE)


def _short(text: str, limit: int = _MAX_NAME) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
