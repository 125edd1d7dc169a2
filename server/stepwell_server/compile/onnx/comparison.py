"""Compares a program with ONNX Runtime in a plain loop: one call of the file's own graph per row and time step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepwell_server.compile import data_file
from stepwell_server.compile.comparison import Comparison, Difference
from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.onnx import reading, samples
from stepwell_server.compile.onnx.interface import Input, Interface, resolve
from stepwell_server.compile.onnx.rewrite import with_shapes
from stepwell_server.engine.executors import load_executor, onnx_runtime
from stepwell_server.engine.executors.base import ExecutionError
from stepwell_server.engine.executors.step_function import initial_rows, step_of_executor
from stepwell_server.program import Array, Declaration, Program

#: Sequences without the user's own data.
_ROWS, _STEPS = 8, 64
#: The allowed difference, as a share of an output's largest value: a row is compared alone and in a batch.
_ALLOWED, _HALF_ALLOWED = 1e-5, 1e-2
REFERENCE = "ONNX Runtime in a plain loop"


def compare(file: Path, program: Program, declared: Declaration, data: Path | None) -> Comparison:
    """Compare stepping ``program`` with the graph of ``file``, from which it was compiled.

    Args:
        file: the ``.onnx`` file.
        program: its program.
        declared: what was declared about it.
        data: an ``.npy`` or ``.npz`` file, see `data_file.read`; None: sequences are drawn.

    Raises:
        DataError: the data do not fit the model.
        ModelError: the graph does not run on them.
    """
    if data is None:
        drawn = samples.draws(program.inputs, _ROWS * _STEPS)
        tries = [[array.reshape(_ROWS, _STEPS, *array.shape[1:]) for array in arrays] for arrays in drawn]
    else:
        tries = [data_file.read(data, program.inputs)[0]]
    model, _ = reading.read(file)
    interface = resolve(model, declared)
    run = onnx_runtime.plain(with_shapes(model, interface).SerializeToString())
    inputs, expected, found = _first_results(file, run, interface, program, tries)
    rows, steps = inputs[0].shape[:2]
    return Comparison(
        rows,
        steps,
        tuple(_difference(spec.name, expected[i], found[i]) for i, spec in enumerate(program.outputs)),
    )


_Arrays = Sequence[Array]


def _first_results(
    file: Path, run: onnx_runtime.Run, interface: Interface, program: Program, tries: Sequence[_Arrays]
) -> tuple[_Arrays, _Arrays, _Arrays]:
    """The first inputs that the model accepts, and the outputs of a plain loop and of the program."""
    problem: ExecutionError | None = None
    for inputs in tries:
        try:
            loops = [
                _looped(run, interface, [array[row] for array in inputs]) for row in range(len(inputs[0]))
            ]
            found = _stepped(program, inputs)
        except ExecutionError as error:
            problem = error
        else:
            return inputs, [np.stack(each) for each in zip(*loops, strict=True)], found
    raise ModelError(f"{file}: ONNX Runtime cannot run it on these sequences: {problem}") from problem


def _looped(run: onnx_runtime.Run, interface: Interface, inputs: Sequence[Array]) -> list[Array]:
    """Run the file's own graph over one sequence."""
    states = {each.tensor: _one_row(each, each.initial) for each in interface.states}
    contexts = {
        each.tensor: np.zeros((*each.shape[:-1], each.context), each.dtype)
        for each in interface.inputs
        if each.context
    }
    outputs = []
    for t in range(len(inputs[0])):
        fed = dict(states)
        for each, array in zip(interface.inputs, inputs, strict=True):
            row = array[t]
            if each.context:
                row = np.concatenate([contexts[each.tensor], row], axis=-1)
                contexts[each.tensor] = row[..., -each.context :]
            fed[each.tensor] = _one_row(each, row)
        made = run(fed)
        states = {each.tensor: _as_input(each, made[each.after]) for each in interface.states}
        outputs.append([made[name].reshape(-1) for name in interface.outputs])
    return [np.stack(each) for each in zip(*outputs, strict=True)]


def _one_row(given: Input, row: Any) -> Array:
    return np.ascontiguousarray(np.expand_dims(np.asarray(row, given.dtype), given.axis))


def _as_input(given: Input, after: Array) -> Array:
    """A state after a step as the state before the next one: its rows may be on another axis."""
    return np.ascontiguousarray(after.reshape(_one_row(given, given.initial).shape))


def _stepped(program: Program, inputs: Sequence[Array]) -> list[Array]:
    """Step all sequences together."""
    step = step_of_executor(load_executor(program))
    states: Sequence[Array] = initial_rows(program.initial, len(inputs[0]))
    outputs = []
    for t in range(inputs[0].shape[1]):
        made, states = step([array[:, t] for array in inputs], states)
        outputs.append([array.reshape(len(array), -1) for array in made])
    return [np.stack(each, axis=1) for each in zip(*outputs, strict=True)]


def _difference(name: str, expected: Array, found: Array) -> Difference:
    one, two = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        differences = np.where((one == two) | (np.isnan(one) & np.isnan(two)), 0, np.abs(one - two))
    differences = np.nan_to_num(differences, nan=np.inf, posinf=np.inf)
    largest = max(float(np.max(np.abs(one), initial=0, where=np.isfinite(one))), 1e-3)
    allowed = largest * (_HALF_ALLOWED if expected.dtype == np.float16 else _ALLOWED)
    by_step = differences.max(axis=(0, 2), initial=0)
    row, time, _ = np.unravel_index(int(np.argmax(differences)), differences.shape)
    worst = float(differences.max(initial=0))
    return Difference(
        output=name,
        share=worst / allowed,
        absolute=worst,
        allowed=allowed,
        row=int(row),
        time=int(time),
        by_step=tuple(float(value) for value in by_step),
        reference=REFERENCE,
    )
