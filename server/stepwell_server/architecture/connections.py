"""Finds layers with the same generated names in two models, but with different connections.

A made-up name is a count. Where two models differ, a layer ``lstm_1`` of one need not be the ``lstm_1`` of the other: two
branches that are built in another order exchange their names. So each such layer is described by its anchors: the inputs,
outputs, named layers and recurrent layers that it is connected to, through any other layers. A layer with other anchors may
be another layer.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from stepwell_server.architecture.canonical import is_graph, layers_of, references
from stepwell_server.program import Architecture, StateSpec

_Layer = dict[str, Any]
_Level = dict[str, list[int]]
"""The layers of a graph that carry states, by name, with the indices of their states."""


def moved(
    old: Architecture, old_states: Sequence[str], new: Architecture, new_states: Sequence[StateSpec]
) -> list[str]:
    """Return the layers whose states may belong to another layer of the new model, by their names in it.

    Only layers with made-up names, and only where another layer of the graph has states of the same shapes. Empty where
    the configurations do not list the layers, as for a model that is a class of the user's.

    Args:
        old: what the sessions were on.
        old_states: the names that its file has for its states, in their order.
        new: what they are to be carried to.
        new_states: its states, as many as of the old one and in the same order, with the names that its file has.
    """
    try:
        before, after = json.loads(old.config or "null"), json.loads(new.config or "null")
        mine = [name.split("/")[:-1] for name in old_states]
        theirs = [spec.name.split("/")[:-1] for spec in new_states]
        places = range(len(new_states))
        found = _moved(before, after, (mine, theirs), (old.names, new.names), new_states, places)
        return list(dict.fromkeys(found))
    except (RecursionError, ValueError, LookupError, TypeError, AttributeError):  # a file may say anything
        return []


def _moved(
    before: Any,
    after: Any,
    paths: tuple[list[list[str]], list[list[str]]],
    names: tuple[Sequence[str], Sequence[str]],
    specs: Sequence[StateSpec],
    places: Sequence[int],
) -> Iterator[str]:
    mine, theirs = layers_of(before), layers_of(after)
    if not (mine and theirs):
        return
    old, new = _level(mine, paths[0], names[0], places), _level(theirs, paths[1], names[1], places)
    of_old = {states[0]: name for name, states in old.items()}
    given = {_name(layer) for layer in mine} & {_name(layer) for layer in theirs}
    before_anchors, after_anchors = _Anchors(before, old, given), _Anchors(after, new, given)
    rivals: dict[str, list[str]] = defaultdict(list)
    for name, states in new.items():
        kinds = [(specs[i].name.split("/")[-1], specs[i].shape, specs[i].dtype) for i in states]
        rivals[repr(kinds)].append(name)
    layers = {_name(layer): layer for layer in theirs}
    counterparts = {_name(layer): layer for layer in mine}
    for name, states in new.items():
        other = of_old.get(states[0])
        if other is None:
            continue
        is_one_of_many = any(name in group and len(group) > 1 for group in rivals.values())
        number = _number(name)
        if number is not None and is_one_of_many and before_anchors.of(other) != after_anchors.of(name):
            yield names[1][number]
        rest = ([path[1:] for path in paths[0]], [path[1:] for path in paths[1]])
        yield from _moved(counterparts[other], layers[name], rest, names, specs, states)


def _level(
    layers: list[_Layer], paths: list[list[str]], names: Sequence[str], places: Sequence[int]
) -> _Level:
    found: _Level = {}
    by_name = {}
    for layer in layers:
        number = _number(_name(layer))
        by_name[_name(layer) if number is None else names[number]] = _name(layer)
    for place in places:
        part = paths[place][0].partition("#")[0] if paths[place] else ""
        if part in by_name:
            found.setdefault(by_name[part], []).append(place)
    return found


class _Anchors:
    """The connections between the layers of one graph."""

    def __init__(self, graph: Any, carrying: _Level, given: set[str]) -> None:
        self._sources: dict[str, set[str]] = defaultdict(set)
        self._targets: dict[str, set[str]] = defaultdict(set)
        self._labels: dict[str, str] = {name: f"layer {name}" for name in given if _number(name) is None} | {
            name: f"states {states[0]}" for name, states in carrying.items()
        }
        for source, target in _edges(graph):
            self._sources[target].add(source)
            self._targets[source].add(target)
        for source, label in _ends(graph, "input_layers"):
            self._labels.setdefault(source, label)
        for source, label in _ends(graph, "output_layers"):
            self._targets[source].add(label)
            self._labels[label] = label

    def of(self, name: str) -> tuple[set[str], set[str]]:
        """Return the labels of a layer's sources and of its targets."""
        return self._reached(name, self._sources), self._reached(name, self._targets)

    def _reached(self, name: str, edges: dict[str, set[str]]) -> set[str]:
        found, seen, waiting = set[str](), {name}, [*edges[name]]
        while waiting:
            each = waiting.pop()
            if each in self._labels:
                found.add(self._labels[each])
            elif each not in seen:
                seen.add(each)
                waiting += edges[each]
        return found


def _edges(graph: Any) -> Iterator[tuple[str, str]]:
    layers = layers_of(graph)
    if not is_graph(graph):  # Sequential: one after the other
        yield from ((_name(one), _name(other)) for one, other in itertools.pairwise(layers))
        return
    for layer in layers:
        for _, (source, _, _) in references(layer.get("inbound_nodes")):
            yield source, _name(layer)


def _ends(graph: Any, key: str) -> Iterator[tuple[str, str]]:
    if not is_graph(graph):
        yield _name(layers_of(graph)[0 if key == "input_layers" else -1]), f"{key} 0"
        return
    for place, (source, _, _) in references(graph["config"].get(key)):
        yield source, f"{key} {place}"


def _name(layer: _Layer) -> str:
    return str(layer["config"]["name"])


def _number(name: str) -> int | None:
    return int(name[1:]) if name.startswith("#") and name[1:].isdecimal() else None
