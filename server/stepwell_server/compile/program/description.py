"""Describes a Keras model, for `--inspect`: its inputs and outputs, and the pairs that are states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepwell_server.compile.causality.cut import Cut, cut
from stepwell_server.compile.data_file import initial_options
from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.graph.interface import describe
from stepwell_server.compile.graph.plan import assignments
from stepwell_server.compile.keras_file import archive
from stepwell_server.compile.probe.state_inputs import recognized
from stepwell_server.program import Declaration, ProofOptions

_NOTE = (
    "a state is an input that only one recurrent layer reads, as its initial_state, and an output that is the state of that layer "
    "after the last time step (return_state=True). Sessions keep the pairs above without any option"
)


def described(model: Path, options: ProofOptions) -> dict[str, Any]:
    """Return what is in the file, as JSON, with the problem of the declared states, if any.

    Raises:
        ModelError: the model cannot be loaded, or does not run on sequences of other lengths.
    """
    interface = describe(archive.load_model(model))
    sides: list[Cut] = []
    problems: list[ModelError] = []
    for temporal in assignments(interface):
        try:
            sides.append(cut(interface, temporal).first)
            break
        except ModelError as error:
            problems.append(error)
    if not sides:
        raise ModelError(f"{model}: {problems[0]}")
    (side,) = sides
    problem = ""
    try:
        states = recognized(interface, side, options.declaration)
    except ModelError as error:
        problem = str(error)
        states = recognized(interface, side, Declaration())
    pairs = {state.info.name: state.output for state in states}
    scale = side.scale
    return {
        "inputs": [
            {"name": info.name, "dtype": info.dtype, "shape": [None, *info.shape[1:]]}
            for info in interface.inputs
        ],
        "outputs": [
            {
                "name": name,
                "dtype": tensor.dtype.name,
                "shape": [
                    None if place < 2 and size in (scale.rows, scale.steps) else size
                    for place, size in enumerate(tensor.shape)
                ],
            }
            for name, tensor in side.outputs.items()
        ],
        "states": pairs,
        "options": [
            *(f"--state {before}:{after}" for before, after in pairs.items()),
            *initial_options(options.declaration.initial, pairs),
        ],
        "note": _NOTE if pairs else "",
        "problem": problem,
    }
