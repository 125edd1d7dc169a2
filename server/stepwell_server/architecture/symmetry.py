"""Finds interchangeable layers of a graph, which only differ in their names.

Only where the arguments of a call have no order (``Add``, ``Multiply``, ``Maximum``) can that be. The nodes of the graph are
coloured by what they are, then again and again by the colours around them, until nothing changes (colour refinement).
Layers whose nodes have the same colours in the end are interchangeable. At worst the method finds too many of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from stepwell_server.architecture.canonical import (
    is_generated,
    is_graph,
    kind,
    layers_of,
    objects,
    references,
)

_UNORDERED = frozenset({"Add", "Average", "Maximum", "Minimum", "Multiply"})
_MAX_ROUNDS = 512
_Node = tuple[str, int]


class _Edge(NamedTuple):
    source: _Node
    tensor: int
    target: _Node
    argument: str
    """The argument of the call; empty if the order does not matter."""


def interchangeable(config: Any) -> list[tuple[str, ...]]:
    """Return the names of interchangeable layers, in groups, for every graph in a model's configuration."""
    found: list[tuple[str, ...]] = []
    for each in objects(config):
        if is_graph(each):
            found += _groups(each)
    return found


def _groups(graph: dict[str, Any]) -> list[tuple[str, ...]]:
    layers = {layer["config"]["name"]: layer for layer in layers_of(graph)}
    edges = [edge for layer in layers.values() for edge in _edges(layer)]
    unordered: dict[_Node, int] = defaultdict(int)
    for edge in edges:
        unordered[edge.target] += not edge.argument
    if max(unordered.values(), default=0) < 2:
        return []  # every node is one certain argument of another, or one certain output
    colours = _refined(graph, layers, edges)
    alike: dict[Any, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        count = len(layer.get("inbound_nodes") or [0])
        alike[tuple(colours[name, i] for i in range(count))].append(name)
    return [tuple(group) for group in alike.values() if len(group) > 1]


def _refined(
    graph: dict[str, Any], layers: dict[str, dict[str, Any]], edges: list[_Edge]
) -> dict[_Node, int]:
    incoming: dict[_Node, list[_Edge]] = defaultdict(list)
    outgoing: dict[_Node, list[_Edge]] = defaultdict(list)
    for edge in edges:
        incoming[edge.target].append(edge)
        outgoing[edge.source].append(edge)
    ends: dict[str, list[str]] = defaultdict(list)
    for end in ("input_layers", "output_layers"):
        for place, (name, number, tensor) in references(graph["config"].get(end), end):
            ends[name].append(f"{place} {number} {tensor}")
    nodes = [(name, i) for name, layer in layers.items() for i in range(len(layer["inbound_nodes"]) or 1)]
    seen: dict[Any, int] = {}
    colours = {node: seen.setdefault((_kind(layers[node[0]]), *ends[node[0]]), len(seen)) for node in nodes}
    count = len(seen)
    for _ in range(_MAX_ROUNDS):
        seen = {}
        fresh: dict[_Node, int] = {}
        for node in nodes:
            around = (
                colours[node],
                tuple(sorted((e.argument, colours.get(e.source, -1), e.tensor) for e in incoming[node])),
                tuple(sorted((e.argument, colours[e.target], e.tensor) for e in outgoing[node])),
                tuple(colours[node[0], i] for i in range(len(layers[node[0]]["inbound_nodes"]))),
                node[1],
            )
            fresh[node] = seen.setdefault(around, len(seen))
        colours = fresh
        if len(seen) == count:
            break
        count = len(seen)
    return colours


def _kind(layer: dict[str, Any]) -> str:
    """Describe a layer without its connections and without generated names."""
    name = layer["config"]["name"]
    said = "" if is_generated(name, layer["class_name"]) else name
    return said + "/" + kind(layer)


def _edges(layer: dict[str, Any]) -> Iterator[_Edge]:
    name, is_unordered = layer["config"]["name"], layer["class_name"] in _UNORDERED
    for number, node in enumerate(layer.get("inbound_nodes") or []):
        for place, (source, index, tensor) in references(node):
            yield _Edge((source, index), tensor, (name, number), "" if is_unordered else place)
