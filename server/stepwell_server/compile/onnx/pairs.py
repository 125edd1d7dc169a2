"""Recognizes which output is the state after a step for which input, by the names that exporters and people give."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

#: From the name of an input to those of its output: Silero, PyTorch, sherpa, transformers, Keras and others.
_NAMES: tuple[Callable[[str], Sequence[str]], ...] = (
    lambda name: [f"{name}{end}" for end in ("N", "n", "_n", "_N", "_out", ".1", "_new", "_next", "Out")],
    lambda name: [f"{start}{name}" for start in ("new_", "next_", "out_", "updated_", "n")],
    lambda name: [re.sub(r"0$", "n", name), re.sub(r"_0$", "_n", name)],
    lambda name: [re.sub(r"_in(?=$|_|\d)", "_out", name), re.sub(r"^in_", "out_", name)],
    lambda name: [re.sub(r"(?<![A-Za-z])in(?=$|[^A-Za-z])", "out", name)],
    lambda name: [re.sub(r"^initial_", "Y_", name)],  # as the specification of LSTM and GRU names them
    lambda name: [name.replace("past", "present", 1), name.replace("past_key_values", "present", 1)],
    lambda name: [name.replace("prev", "next", 1), name.replace("previous", "next", 1)],
    lambda name: [name.replace("old", "new", 1), name.replace("initial", "final", 1)],
)
#: Names that alone do not say that a tensor is a state: the input and output of the whole model.
_NOT_STATES = re.compile(r"(input|x|data|features|audio|wave|image|tokens?|ids)[\d_.]*", re.IGNORECASE)


def recognized(inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, str]:
    """Return pairs of an input and an output whose names say that they are a state before and after a step."""
    found: dict[str, str] = {}
    taken = set[str]()
    for name in inputs:
        if _NOT_STATES.fullmatch(name):
            continue
        for names in _NAMES:
            match = next(
                (each for each in names(name) if each != name and each in outputs and each not in taken), None
            )
            if match is not None:
                found[name] = match
                taken.add(match)
                break
    return found
