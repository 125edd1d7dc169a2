"""Describes a compiled model without weights and generated names, to recognize models of the same architecture."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from stepwell_server.architecture.canonical import canonical, count_of, is_generated, kind, objects
from stepwell_server.architecture.symmetry import interchangeable
from stepwell_server.program import Architecture, Program

MAX_CONFIG_BYTES = 4 << 20
"""The maximum size of a canonical configuration that is stored to explain differences."""


def describe(
    config: Any, weights: Iterable[tuple[str, Sequence[int], str]], program: Program
) -> Architecture:
    """Describe the architecture of a program.

    Args:
        config: the content of the Keras model's ``config.json``.
        weights: place, shape and dtype of each weight in the file.
        program: the program, whose tensors have their names in the file.
    """
    form = canonical(config, of_training=False)
    carrying = {part.partition("#")[0] for spec in program.state for part in spec.name.split("/")[:-1]}
    ambiguous = [group for group in interchangeable(config) if carrying & set(group)]
    identity = [
        form.config,
        [[place, list(shape), dtype] for place, shape, dtype in weights],
        _specs(program, set(form.names)),
        _order(config, carrying),
        ambiguous,
    ]
    text = json.dumps(form.config, separators=(",", ":"))
    return Architecture(
        hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        text if len(text) <= MAX_CONFIG_BYTES else "",
        form.names,
        tuple(ambiguous),
    )


def _specs(program: Program, made_up: set[str]) -> list[Any]:
    """Return the shapes and types of all tensors, and their names without generated ones."""
    outside = [
        [_given(spec.name, made_up), list(spec.shape), spec.dtype, spec.temporal]
        for spec in (*program.inputs, *program.outputs)
    ]
    inside = [
        [
            [_given(part.partition("#")[0], made_up) for part in spec.name.split("/")],
            list(spec.shape),
            spec.dtype,
        ]
        for spec in program.state
    ]
    return [len(program.inputs), outside, inside]


def _given(name: str, made_up: set[str]) -> str:
    """Return a name, or nothing if Keras generated it; a layer with several outputs appends numbers."""
    stem, _, count = name.rpartition("_")
    return "" if name in made_up or (count.isdecimal() and stem in made_up) else name


def _order(config: Any, carrying: set[str]) -> list[int]:
    """In which order layers that are alike were made, by the numbers in their names; in the order of their wiring.

    The same code makes them in the same order each time. If they were made in another order, nobody can tell which of them
    became which.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for each in objects(config):
        name, class_name = each["config"]["name"], each["class_name"]
        if name in carrying and is_generated(name, class_name):
            groups[kind(each)].append(count_of(name, class_name) or 0)
    return [sorted(counts).index(count) for _, counts in sorted(groups.items()) for count in counts]
