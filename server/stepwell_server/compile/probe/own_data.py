"""Compares a compiled program with Keras on the user's sequences, or on the hard sequences of the proof."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepwell_server.compile import data_file
from stepwell_server.compile.causality.cut import Cuts
from stepwell_server.compile.comparison import Comparison
from stepwell_server.compile.errors import DataError
from stepwell_server.compile.graph.interface import Input, Interface, describe
from stepwell_server.compile.graph.plan import assignments
from stepwell_server.compile.graph.samples import Sampler, fitted, make_sampler, plain_dtype
from stepwell_server.compile.keras_file import archive
from stepwell_server.compile.probe import evidence
from stepwell_server.compile.probe.sequences import Array, run, tolerance
from stepwell_server.compile.probe.state_inputs import cut_apart
from stepwell_server.engine.executors import load_executor
from stepwell_server.engine.executors.step_function import step_of_executor
from stepwell_server.program import Declaration, Program, TensorSpec


def compare(model: Path, program: Program, data: Path | None) -> Comparison:
    """Compare stepping ``program`` with Keras's call of ``model``, whose modules are already imported.

    Args:
        model: the ``.keras`` file that the program was made from.
        program: the program.
        data: an ``.npy`` or ``.npz`` file, see `read`; None for the proof's own sequences.

    Raises:
        DataError: the data do not fit the model.
        ModelError: Keras's call of it fails.
    """
    loaded = archive.load_model(model)
    interface, temporal, cuts = _cut(describe(loaded), program)
    sampler = make_sampler(interface, temporal)
    interface = sampler.interface
    if data is None:
        sampler = fitted(sampler, cuts.compared(), cuts.table_sizes())
        steps = program.proof.steps
        inputs: Sequence[Array] = sampler.hard(np.random.default_rng(23), temporal, steps)
    else:
        inputs, steps = read(data, program.inputs, sampler)
    casts = [np.asarray(value, spec.dtype) for value, spec in zip(inputs, program.inputs, strict=True)]
    sample = evidence.observe(program, interface, casts, steps, sampler.whole, sampler.exact)
    stepped = run(program, step_of_executor(load_executor(program)), inputs, steps)
    return evidence.compare(program, sample, stepped, tolerance(loaded))


def _cut(interface: Interface, program: Program) -> tuple[Interface, tuple[bool, ...], Cuts]:
    """Cut a model as when it was compiled, with the same states and initial values."""
    timed = {spec.name: spec.temporal for spec in program.inputs}
    names = {info.name for info in interface.inputs} - timed.keys()
    pairs = zip(program.state, program.initial, strict=True)
    initial = {spec.name: value.tolist() for spec, value in pairs if spec.name in names}
    temporal = [timed.get(info.name, False) for info in interface.inputs]
    return cut_apart(interface, temporal, Declaration(initial=initial))


def read(file: Path, specs: Sequence[TensorSpec], sampler: Sampler | None = None) -> tuple[list[Array], int]:
    """Read sequences for the inputs of a model: see `data_file.read`.

    ``sampler`` knows which inputs are indices into tables, or words of a vocabulary.

    Raises:
        DataError: they cannot be read, or do not fit.
    """
    arrays, steps = data_file.read(file, specs)
    for i, (spec, array) in enumerate(zip(specs, arrays, strict=True)):
        if sampler is not None:
            _refuse_unknown(file, spec, array, sampler, i)
    return arrays, steps


def look(file: Path, interface: Interface) -> None:
    """Check sequences before the model is compiled.

    Raises:
        DataError: they do not fit any choice of inputs with a time axis.
    """
    problems: list[DataError] = []
    for temporal in assignments(interface):
        specs = [_spec(info, timed) for info, timed in zip(interface.inputs, temporal, strict=True)]
        # Sessions may keep what has no time axis (`state_inputs`): then it is not in the file.
        for given in (specs, [spec for spec in specs if spec.temporal] or specs):
            try:
                read(file, given)
            except DataError as error:
                problems.append(error)
            else:
                return
    raise problems[0]


def _spec(info: Input, timed: bool) -> TensorSpec:
    shape = tuple(int(size or 1) for size in info.shape[2 if timed else 1 :])
    return TensorSpec(info.name, shape, plain_dtype(info.dtype), temporal=timed)


def _refuse_unknown(file: Path, spec: TensorSpec, array: Any, sampler: Sampler, i: int) -> None:
    """Refuse indices and words that the model does not accept."""
    table, words = None if sampler.is_guessed else sampler.tables.get(i), sampler.vocabularies.get(i)
    if table is not None:
        rule = f"must be indices from 0 to {table - 1}"
        data_file.refuse_at(file, spec, array, (array < 0) | (array >= table), rule)
    if words is not None and words.is_closed:
        rule = "must be in the vocabulary of the model's IntegerLookup, which has no index for others"
        data_file.refuse_at(file, spec, array, ~np.isin(array, words.known), rule)
