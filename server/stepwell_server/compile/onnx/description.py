"""Describes the file of a step function, for `--inspect`: its tensors, and the pairs whose names reveal a state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from stepwell_server.compile.data_file import initial_options
from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.onnx import pairs, reading
from stepwell_server.compile.onnx.declaration import merged
from stepwell_server.compile.onnx.interface import inputs_of, resolve, sizes_of, type_name
from stepwell_server.program import Declaration

_MAX_TENSORS = 200
_SILERO = Declaration(constants={"sr": 16000}, shapes={"input": (512,)}, contexts={"input": 64})


def described(file: Path, declared: Declaration) -> dict[str, Any]:
    """Return what is in the file, as JSON, with the problem that keeps it from being compiled, if any.

    Raises:
        ModelError: it is no ONNX file, or contains something that is refused.
    """
    try:
        model, _ = reading.read(file)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
    given, made = inputs_of(model.graph), {each.name: each for each in model.graph.output}
    states = dict(declared.states) or pairs.recognized(list(given), list(made))
    known, note = _known_model(given, made, declared)
    problem = ""
    try:
        resolve(model, declared)
    except ModelError as error:
        problem = str(error)
    return {
        "inputs": [_tensor(info) for info in list(given.values())[:_MAX_TENSORS]],
        "outputs": [_tensor(info) for info in list(made.values())[:_MAX_TENSORS]],
        "states": dict(list(states.items())[:_MAX_TENSORS]),
        "options": _options(list(given.values()), states, known),
        "note": note,
        "problem": problem,
    }


def _known_model(
    given: Mapping[str, onnx.ValueInfoProto], made: Mapping[str, onnx.ValueInfoProto], declared: Declaration
) -> tuple[Declaration, str]:
    """The declaration with what is known of a model from elsewhere, and a note about it, because the file shows no context."""
    if declared.contexts:
        return declared, ""
    is_silero = (
        given.keys() == {"input", "state", "sr"}
        and made.keys() == {"output", "stateN"}
        and sizes_of(given["state"]) == [2, None, 128]
    )
    if is_silero:
        return merged(declared, _SILERO), (
            "it has the tensors of Silero VAD. At 16 kHz that takes 512 samples, and expects the 64 before them in front (the context); "
            "at 8 kHz, sr=8000, 256 and 32"
        )
    ends = [name for name, info in given.items() if (sizes_of(info) or [1])[1:][-1:] == [None]]
    inputs = [name for name in ends if name not in declared.shapes]
    if not inputs:
        return declared, ""
    return declared, (
        f"a file does not show a context. If the model expects the end of the previous {inputs[0]!r} in front of the next one, add "
        f"--context {inputs[0]}=N"
    )


def _tensor(info: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = info.type.tensor_type.elem_type
    return {
        "name": info.name,
        "dtype": type_name(kind),
        "shape": sizes_of(info),
    }


def _options(given: list[onnx.ValueInfoProto], states: dict[str, str], declared: Declaration) -> list[str]:
    """The options that are likely needed: what is not known is in capitals."""
    options = [f"--state {before}:{after}" for before, after in states.items()] or ["--state INPUT:OUTPUT"]
    for info in given:
        name, sizes = info.name, sizes_of(info)
        if name in declared.constants or sizes == []:
            value = declared.constants.get(name, "VALUE")
            options.append(f"--constant {name}={value}")
            continue
        if sizes is None:
            continue
        open_axes = [axis for axis, size in enumerate(sizes) if size is None]
        axis = declared.batch_axes.get(name, 0)
        if name not in declared.batch_axes and sizes[0] is not None and open_axes:
            axis = open_axes[0]
        if axis:
            options.append(f"--batch-axis {name}={axis}")
        row = [size for place, size in enumerate(sizes) if place != axis]
        shape = declared.shapes.get(name)
        if shape is not None or None in row:
            shown = row if shape is None else shape
            sizes_text = ",".join("SIZE" if size is None else str(size) for size in shown)
            options.append(f"--shape {name}={sizes_text}")
    options += initial_options(declared.initial, states)
    options += [f"--context {name}={count}" for name, count in declared.contexts.items()]
    options += [f"--name {name}={shown}" for name, shown in declared.names.items()]
    return options
