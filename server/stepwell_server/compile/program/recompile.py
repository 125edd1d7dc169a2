"""Recompiles a model with other weights. Its architecture is the same, so nothing is traced again.

Facts about the graph do not depend on weights: the axes, the proof, and the function of one time step. Everything that
depends on weights is repeated with the same code and samples: initial states, Keras's calls, the conversion, and all
checks of the artefact. So the result equals a full compilation, bit for bit. If that is uncertain, or any problem is
found, the file is compiled completely.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stepwell_server.architecture.canonical import canonical
from stepwell_server.compile.graph.plan import make_plan
from stepwell_server.compile.graph.tensorflow_setup import keras, tf
from stepwell_server.compile.graph.watch import all_operations
from stepwell_server.compile.keras_file import archive, provenance, weights
from stepwell_server.compile.probe import evidence
from stepwell_server.compile.probe.probe import LENGTHS, MORE_LENGTHS, SEED, TracedModel, observe
from stepwell_server.compile.probe.whole_call import has_no_modes
from stepwell_server.compile.program.pipeline import artefact
from stepwell_server.program import Architecture, Names, Program, Proof


class RecompileError(Exception):
    """The model must be compiled completely."""


def may_be_reused(traced: TracedModel, program: Program) -> bool:
    """Whether the trace of a model can be reused for other weights.

    Not if the proof depends on weights or was replaced by --trust-causality. Nor if weights may be outside the
    variables, such as constants that a layer computes when it is loaded. So only models of Keras's own layers qualify,
    without preprocessing layers and quantization.
    """
    model = traced.plan.interface.model
    parts = [model, *all_operations(model)]
    return (
        program.executor == "litert"
        and not traced.is_of_weights
        and not traced.proof.unproven
        and has_no_modes(model)
        and not any(map(_may_hold_constants, parts))
        and all(tensor.dtype == tf.resource for tensor, _ in traced.function.graph.captures)
    )


def _may_hold_constants(part: Any) -> bool:
    return type(part).__module__.startswith("keras.src.layers.preprocessing.") or bool(
        getattr(part, "quantization_mode", None)
    )


def compile_again(
    traced: TracedModel, before: Architecture, path: Path, report: Callable[[str], None]
) -> Program:
    """Compile the model in ``path``, which has the configuration of the ``traced`` model that `may_be_reused`.

    Names that Keras generated may differ. Afterwards the traced model has other weights, even after an error.

    Args:
        traced: the traced model.
        before: the architecture of the traced model.
        path: the ``.keras`` file.
        report: called with each stage.

    Raises:
        RecompileError: the file must be compiled completely, which also reports its problem, if any.
        ModelError: likewise.
    """
    plan, sampler = traced.plan, traced.sampler
    report("trace")
    _load_weights(plan.interface.model, path)
    fingerprint = archive.fingerprint(path, traced.options.declaration.initial)
    origin = provenance.of(path, plan.interface.model)
    rng = np.random.default_rng(SEED)
    least = 0 if traced.memory is None else traced.memory.steps
    seen = [observe(sampler, plan.temporal, least + steps, rng) for steps in LENGTHS]
    now = make_plan(sampler.interface, plan.temporal, seen[0], seen[1], looks_back=traced.memory is not None)
    if traced.memory is not None:
        now = traced.memory.added_to(now)
    if (now.inputs, now.outputs, now.state, now.carried) != (
        plan.inputs,
        plan.outputs,
        plan.state,
        plan.carried,
    ):
        raise RecompileError("its interface has changed")
    report("probe")
    seen += [observe(sampler, plan.temporal, least + steps, rng) for steps in MORE_LENGTHS]
    found = evidence.gather(now, sampler, traced.evidence[0].steps, traced.whole)
    changed = dataclasses.replace(
        traced,
        plan=now,
        observations=tuple(seen),
        evidence=tuple(found),
        proof=Proof(steps=found[0].steps),
    )
    program = artefact(changed, fingerprint, origin, report)
    if program.executor != "litert":
        raise RecompileError("LiteRT cannot run it")
    program = _with_names_of(path, before, program)
    program = dataclasses.replace(program, architecture=archive.architecture(path, program))
    if program.structure != before.structure:
        raise RecompileError("its layers cannot be matched reliably")
    return program


def _with_names_of(path: Path, before: Architecture, program: Program) -> Program:
    """Give a program the names in its file, instead of those of the traced model."""
    now = canonical(archive.configuration_of(path), of_training=False).names
    named = dict(zip(before.names, now, strict=True))
    if any(named[old] != new for old, new in zip(before.names, now, strict=True)):
        raise RecompileError("layers of several of its models have the same name")

    def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
        paths = [[part.partition("#") for part in name.split("/")] for name in names]
        return tuple("/".join(named.get(stem, stem) + mark + n for stem, mark, n in parts) for parts in paths)

    names = program.names
    origin = program.provenance
    if origin is not None:
        layers = [dataclasses.replace(each, name=named.get(each.name, each.name)) for each in origin.layers]
        origin = dataclasses.replace(origin, layers=tuple(layers))
    called = program.called(Names(renamed(names.inputs), renamed(names.outputs), renamed(names.state)))
    return dataclasses.replace(
        called, provenance=origin, file_names=None
    )  # these are already the names in its file


def _load_weights(model: Any, path: Path) -> None:
    """Load all weights of a file into the model."""
    archive.check_archive(path)
    before = [variable.path for variable in model.variables]
    try:
        with weights.reads_recorded() as read:
            keras.saving.load_weights(model, path)
    except Exception as error:  # Keras may raise anything.
        raise RecompileError("its weights cannot be loaded") from error
    weights.check_restored(path, read)
    if before != [variable.path for variable in model.variables]:
        raise RecompileError("its variables have changed")
