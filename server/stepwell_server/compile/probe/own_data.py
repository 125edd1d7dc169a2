"""Compares a compiled program with Keras on the user's sequences, or on the hard sequences of the proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepwell_server.compile import data_file
from stepwell_server.compile.causality.cut import cut
from stepwell_server.compile.comparison import Comparison
from stepwell_server.compile.errors import DataError, quoted
from stepwell_server.compile.graph.interface import Input, Interface, describe
from stepwell_server.compile.graph.plan import assignments
from stepwell_server.compile.graph.samples import Sampler, fitted, make_sampler, plain_dtype
from stepwell_server.compile.keras_file import archive
from stepwell_server.compile.probe import evidence
from stepwell_server.compile.probe.sequences import Array, run, tolerance
from stepwell_server.engine.executors import load_executor
from stepwell_server.engine.executors.step_function import step_of_executor
from stepwell_server.program import Program, TensorSpec


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
    sampler = make_sampler(describe(loaded), [spec.temporal for spec in program.inputs])
    interface = sampler.interface
    if data is None:
        temporal = [spec.temporal for spec in program.inputs]
        cuts = cut(interface, temporal)
        sampler = fitted(sampler, cuts.compared(), cuts.table_sizes())
        steps = program.proof.steps
        inputs: Sequence[Array] = sampler.hard(np.random.default_rng(23), temporal, steps)
    else:
        inputs, steps = read(data, program.inputs, sampler)
    casts = [np.asarray(value, spec.dtype) for value, spec in zip(inputs, program.inputs, strict=True)]
    sample = evidence.observe(program, interface, casts, steps, sampler.whole, sampler.exact)
    stepped = run(program, step_of_executor(load_executor(program)), inputs, steps)
    return evidence.compare(program, sample, stepped, tolerance(loaded))


def read(file: Path, specs: Sequence[TensorSpec], sampler: Sampler | None = None) -> tuple[list[Array], int]:
    """Read sequences for the inputs of a model; return them and the number of time steps.

    An ``.npy`` file contains the only input of a model, an ``.npz`` file inputs by name. Each is ``(batch, T,
    features...)``; a single sequence may omit the batch. ``sampler`` knows which inputs are indices into tables, or
    words of a vocabulary.

    Raises:
        DataError: it cannot be read, or does not fit.
    """
    content = data_file.load(file)
    if isinstance(content, np.ndarray):
        if len(specs) != 1:
            names = ", ".join(repr(spec.name) for spec in specs)
            raise DataError(
                f"{file}: the model has the inputs {names}: give an .npz file with one array for each"
            )
        found: Mapping[str, Array] = {specs[0].name: content}
    else:
        found = content
    missing = [spec.name for spec in specs if spec.name not in found]
    unknown = [name for name in found if name not in {spec.name for spec in specs}]
    if missing or unknown:
        wanted = ", ".join(repr(spec.name) for spec in specs)
        raise DataError(f"{file}: must hold the inputs {wanted}; got {', '.join(map(repr, found)) or 'none'}")
    arrays = [_fitting(file, spec, found[spec.name]) for spec in specs]
    for i, (spec, array) in enumerate(zip(specs, arrays, strict=True)):
        if sampler is not None:
            _refuse_unknown(file, spec, array, sampler, i)
    lengths = {array.shape[1] for array, spec in zip(arrays, specs, strict=True) if spec.temporal}
    rows = {len(array) for array in arrays}
    if len(lengths) > 1 or len(rows) > 1:
        shapes = ", ".join(
            f"{quoted(spec.name)} {array.shape}" for spec, array in zip(specs, arrays, strict=True)
        )
        raise DataError(f"{file}: all inputs must have the same rows and time steps; got {shapes}")
    steps = lengths.pop() if lengths else 1
    if steps < 2 and any(spec.temporal for spec in specs):
        raise DataError(f"{file}: must have at least 2 time steps, so that a state is carried; got {steps}")
    return arrays, steps


def look(file: Path, interface: Interface) -> None:
    """Check sequences before the model is compiled.

    Raises:
        DataError: they do not fit any choice of inputs with a time axis.
    """
    problems: list[DataError] = []
    for temporal in assignments(interface):
        try:
            read(file, [_spec(info, timed) for info, timed in zip(interface.inputs, temporal, strict=True)])
        except DataError as error:
            problems.append(error)
        else:
            return
    raise problems[0]


def _spec(info: Input, timed: bool) -> TensorSpec:
    shape = tuple(int(size or 1) for size in info.shape[2 if timed else 1 :])
    return TensorSpec(info.name, shape, plain_dtype(info.dtype), temporal=timed)


def _fitting(file: Path, spec: TensorSpec, array: Array) -> Array:
    leading = 2 if spec.temporal else 1
    if array.ndim == leading - 1 + len(spec.shape):
        array = array[np.newaxis]
    wanted = ("batch", *(("T",) if spec.temporal else ()), *map(str, spec.shape))
    if array.ndim != len(wanted) or array.shape[leading:] != spec.shape or 0 in array.shape[:leading]:
        raise DataError(
            f"{file}: input {quoted(spec.name)} must have the shape ({', '.join(wanted)}), none of them 0; got {array.shape}"
        )
    if not np.can_cast(array.dtype, np.dtype(spec.dtype), "same_kind"):
        raise DataError(f"{file}: input {quoted(spec.name)} must be {spec.dtype}; got {array.dtype}")
    with np.errstate(over="ignore"):
        cast = array.astype(spec.dtype)
    _refuse_at(file, spec, array, ~np.isfinite(cast), f"must be finite {spec.dtype}")
    if np.issubdtype(array.dtype, np.integer):
        _refuse_at(file, spec, array, cast != array, f"must fit {spec.dtype}")
    return cast


def _refuse_unknown(file: Path, spec: TensorSpec, array: Any, sampler: Sampler, i: int) -> None:
    """Refuse indices and words that the model does not accept."""
    table, words = None if sampler.is_guessed else sampler.tables.get(i), sampler.vocabularies.get(i)
    if table is not None:
        rule = f"must be indices from 0 to {table - 1}"
        _refuse_at(file, spec, array, (array < 0) | (array >= table), rule)
    if words is not None and words.is_closed:
        rule = "must be in the vocabulary of the model's IntegerLookup, which has no index for others"
        _refuse_at(file, spec, array, ~np.isin(array, words.known), rule)


def _refuse_at(file: Path, spec: TensorSpec, array: Array, is_wrong: Any, rule: str) -> None:
    """Refuse data, naming the first wrong value."""
    wrong = np.argwhere(is_wrong)
    if len(wrong):
        place = tuple(int(i) for i in wrong[0])
        where = f"row {place[0]}" + (f", time step {place[1]}" if spec.temporal else "")
        raise DataError(f"{file}: input {quoted(spec.name)} {rule}; got {array[place]} at {where}")
