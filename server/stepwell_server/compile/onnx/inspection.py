"""Prints the description of a step function's file. Imports no framework."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def lines(model: Path, found: Mapping[str, Any]) -> list[str]:
    """Return the result of `description.described` as text."""
    states: Mapping[str, str] = found["states"]
    after = {output: before for before, output in states.items()}
    shown = []
    for kind in ("inputs", "outputs"):
        shown.append(f"{kind}:")
        for tensor in found[kind]:
            name = tensor["name"]
            role = ""
            if kind == "inputs" and name in states:
                role = f", the state before a step: {states[name]} holds it after the step"
            elif kind == "outputs" and name in after:
                role = f", the state {after[name]!r} after a step"
            shown.append(f"  {name}: {tensor['dtype']}{_shape(tensor['shape'])}{role}")
    if found["problem"]:
        shown += ["", f"not ready: {found['problem']}"]
    if found["note"]:
        shown += ["", f"note: {found['note']}"]
    shown += ["", "compile it:", f"  {command(model, found)}"]
    # Names in a file may hold what moves the cursor of a terminal.
    return [line if line.isprintable() else repr(line)[1:-1] for line in shown]


def command(model: Path, found: Mapping[str, Any]) -> str:
    """Return the command that compiles the model. Names in a file may hold characters that a shell interprets."""
    options = [word for option in found["options"] for word in option.split(" ", 1)]
    return shlex.join(["stepwell", "compile", str(model), *options])


def _shape(sizes: list[int | None] | None) -> str:
    if sizes is None:
        return " of unknown shape"
    return "[" + ", ".join("?" if size is None else str(size) for size in sizes) + "]"
