"""A model that was compiled just now, compiled again with other weights: of the same architecture, so nothing is traced anew.

What is known of the graph is known whatever the weights are: which axes there are, that it may be stepped, the function
of one time step. What depends on the weights is done again as the first time, by the same code and on the same samples:
initial states, Keras's calls, the conversion, all checks of the artefact. So what comes of it is what compiling the file
anew would give, bit for bit. Where that is not sure, or anything at all is found wrong, the file is compiled anew.
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
from stepwell_server.compile.probe.probe import LENGTHS, MORE_LENGTHS, SEED, TracedModel, observe, steps_of
from stepwell_server.compile.probe.sequences import tolerance
from stepwell_server.compile.probe.whole_call import has_no_modes
from stepwell_server.compile.program.pipeline import artefact
from stepwell_server.program import Architecture, Names, Program, Proof


class RecompileError(Exception):
    """It must be compiled anew."""


def may_be_reused(traced: TracedModel, program: Program) -> bool:
    """Whether a model may be compiled again with other weights by what was traced of it.

    Not one whose proof has looked at its weights, or is the user's word; nor one whose weights may be elsewhere than in its
    variables, such as constants that a layer makes of them when it is loaded: so only of Keras's own layers, without
    those for preprocessing, and not quantized.
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
    """Compile the model in ``path``, whose configuration is that of the model that was ``traced`` and `may_be_reused`.

    Names that Keras made up may differ. The model that was traced has other weights afterwards, whatever comes of it.

    Args:
        traced: what was traced.
        before: the architecture of the model that was traced.
        path: the ``.keras`` file.
        report: called with each stage.

    Raises:
        RecompileError: the file must be compiled anew, which also says what is wrong with it.
        ModelError: like that.
    """
    plan, sampler = traced.plan, traced.sampler
    report("trace")
    _load_weights(plan.interface.model, path)
    fingerprint = archive.fingerprint(path)
    origin = provenance.of(path, plan.interface.model)
    rng = np.random.default_rng(SEED)
    seen = [observe(sampler, plan.temporal, steps, rng) for steps in LENGTHS]
    now = make_plan(sampler.interface, plan.temporal, seen[0], seen[1])
    if (now.inputs, now.outputs, now.state, now.carried) != (
        plan.inputs,
        plan.outputs,
        plan.state,
        plan.carried,
    ):
        raise RecompileError("what it takes and gives is something else")
    report("probe")
    seen += [observe(sampler, plan.temporal, steps, rng) for steps in MORE_LENGTHS]
    found = evidence.gather(now, sampler, steps_of(sampler, plan.temporal, traced.options), traced.whole)
    share = evidence.compared_share(now, found, tolerance(plan.interface.model))
    proof = Proof(steps=found[0].steps, compared=share)
    changed = dataclasses.replace(
        traced, plan=now, observations=tuple(seen), evidence=tuple(found), proof=proof
    )
    program = artefact(changed, fingerprint, origin, report)
    if program.executor != "litert":
        raise RecompileError("LiteRT cannot run it")
    program = _with_names_of(path, before, program)
    program = dataclasses.replace(program, architecture=archive.architecture(path, program))
    if program.structure != before.structure:
        raise RecompileError("its layers cannot be matched for sure")
    return program


def _with_names_of(path: Path, before: Architecture, program: Program) -> Program:
    """Give a program the names that its file has, in place of those of the model that was traced."""
    now = canonical(archive.configuration_of(path), of_training=False).names
    named = dict(zip(before.names, now, strict=True))
    if any(named[old] != new for old, new in zip(before.names, now, strict=True)):
        raise RecompileError("layers of several of its models have one name")

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
    )  # these are the names of its own file


def _load_weights(model: Any, path: Path) -> None:
    """Give the model the weights in a file, all of them."""
    archive.check_archive(path)
    before = [variable.path for variable in model.variables]
    try:
        with weights.reads_recorded() as read:
            keras.saving.load_weights(model, path)
    except Exception as error:  # Keras raises whatever it likes here.
        raise RecompileError("its weights cannot be loaded") from error
    weights.check_restored(path, read)
    if before != [variable.path for variable in model.variables]:
        raise RecompileError("it has other variables now")
