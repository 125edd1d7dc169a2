"""All stages of a compilation, in the compiling process."""

from __future__ import annotations

import dataclasses
import importlib
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from stepwell_server.compile.errors import DataError, ModelError, NotCausalError, gist
from stepwell_server.compile.graph.interface import describe
from stepwell_server.compile.keras_file import archive, provenance
from stepwell_server.compile.probe import check, own_data
from stepwell_server.compile.probe.extremes import worst_at_extremes
from stepwell_server.compile.probe.first_difference import first_to_differ, undefined_cast
from stepwell_server.compile.probe.probe import TracedModel, trace_and_probe
from stepwell_server.compile.probe.sequences import Array, tolerance
from stepwell_server.compile.program import convert, cost
from stepwell_server.engine.executors import load_executor, trial
from stepwell_server.engine.executors.base import ExecutionError
from stepwell_server.engine.executors.step_function import step_of_executor
from stepwell_server.program import FLATBUFFER, Program, ProofOptions, Provenance, dtype_of

#: On another processor, a few time steps may differ by this many times the difference allowed while compiling.
_ELSEWHERE = 16


def compile_traced(
    model: Path,
    imports: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
    options: ProofOptions | None = None,
    data: Path | None = None,
) -> tuple[Program, TracedModel]:
    """Compile ``model``; also return the traced model, for `recompile.compile_again`.

    Raises:
        DataError: ``data``, for a later comparison, do not fit the model. This is checked first.
        ModelError: the model cannot be served.
    """
    report = progress or _silent
    report("load")
    import_modules(imports)
    loaded = archive.load_model(model)
    fingerprint = archive.fingerprint(model, (options or ProofOptions()).declaration.initial)
    origin = provenance.of(model, loaded)
    report("trace")
    try:
        if data is not None:
            own_data.look(data, describe(loaded))
        traced = trace_and_probe(loaded, report, options)
        program = artefact(traced, fingerprint, origin, report)
        return dataclasses.replace(program, architecture=archive.architecture(model, program)), traced
    except DataError:
        raise
    except ModelError as error:
        raise type(error)(f"{model}: {error}", error.details) from error


def _silent(_stage: str) -> None:
    return None


def import_modules(modules: Sequence[str]) -> None:
    """Import the modules that register custom layers.

    Raises:
        ModelError: one of them cannot be imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # A user's module may raise anything.
            raise ModelError(
                f"--import {module}: {type(error).__name__}: {gist(error)}", traceback.format_exc()
            ) from error


def artefact(
    traced: TracedModel, fingerprint: str, origin: Provenance, report: Callable[[str], None]
) -> Program:
    """Convert a traced model into a program, and check it.

    Raises:
        ModelError: neither LiteRT nor TensorFlow can run it.
    """
    program = Program(
        fingerprint=fingerprint,
        inputs=traced.plan.inputs,
        outputs=traced.plan.outputs,
        state=traced.plan.state,
        initial=traced.plan.initial,
        executor="litert",
        executor_reason=trial.ANY_SIZE,
        batch_sizes=(),
        files={},
        proof=traced.proof,
        provenance=origin,
    )
    report("convert")
    try:
        return _litert(traced, program, report)
    except (convert.ConversionError, check.CheckError, trial.TrialError) as error:
        return _tensorflow(traced, program, f"LiteRT cannot run this model: {error}", report)


def _litert(traced: TracedModel, program: Program, report: Callable[[str], None]) -> Program:
    model = traced.plan.interface.model
    frozen = convert.freeze(traced.function)
    content = convert.to_litert(frozen, model)
    count = cost.multiply_adds(frozen.inlined)  # It counts no products with elements that padding adds.
    program = dataclasses.replace(program, files={FLATBUFFER: content}, multiply_adds=count)
    report("check")
    try:
        step = step_of_executor(load_executor(program, is_exact=True))
        program = _compared(program, check.check_against_keras(traced, step))
        differs = worst_at_extremes(traced, step)
        if differs:
            raise check.CheckError(differs)
        known = _known_inputs(traced)
        sizes = trial.affordable(program, known, step, trial.LITERT_SIZES, trial.COMPILE_BUDGET_S)
        agreeing = trial.agreeing_sizes(program, known, step, sizes)
        allowed = min(0.1, _ELSEWHERE * tolerance(model))
        tried = trial.tried(program, known, step, allowed, sizes)
    except (ExecutionError, RuntimeError, ValueError) as error:  # The interpreter cannot run it.
        raise check.CheckError(gist(error)) from error
    return dataclasses.replace(trial.with_sizes(program, sizes, agreeing), trial=tried)


def _tensorflow(traced: TracedModel, program: Program, reason: str, report: Callable[[str], None]) -> Program:
    reason_shown = f"{reason}; TensorFlow runs it, which takes longer per step"
    program = dataclasses.replace(program, executor="tensorflow", executor_reason=reason_shown)
    try:
        frozen = _frozen(traced)
        if frozen is None:
            count, files = None, convert.to_tensorflow(traced.function, traced.plan.interface.model)
        else:
            count, files = cost.multiply_adds(frozen.inlined), convert.to_tensorflow(frozen.traced(), None)
        program = dataclasses.replace(program, files=files, multiply_adds=count)
        report("check")
        step = step_of_executor(load_executor(program, is_exact=True))
        program = _compared(program, check.check_against_keras(traced, step))
    except check.DiffersError as error:
        first = first_to_differ(
            traced.plan, traced.sampler, traced.evidence[0].inputs, traced.evidence[0].steps
        )
        refusal = undefined_cast(traced.plan.interface.model, traced.function, first, str(error))
        raise (
            refusal
            or NotCausalError(
                f"model cannot be run step by step: {error}, though its graph does not show it; "
                f"{first.clause}does it behave differently beyond some number of time steps?"
            )
        ) from error
    except (convert.ConversionError, check.CheckError) as error:
        raise ModelError(f"{reason}; TensorFlow cannot run the traced function either: {error}") from error
    known = _known_inputs(traced)
    sizes = trial.affordable(program, known, step, trial.TENSORFLOW_SIZES, trial.COMPILE_BUDGET_S)
    return dataclasses.replace(program, batch_sizes=trial.agreeing_sizes(program, known, step, sizes) or (1,))


def _compared(program: Program, share: float) -> Program:
    return dataclasses.replace(program, proof=dataclasses.replace(program.proof, compared=share))


def _known_inputs(traced: TracedModel) -> tuple[Array, ...]:
    """Draw random rows of one time step, in the types of the program."""
    temporal, inputs = traced.plan.temporal, traced.plan.inputs
    rows = trial.rows_for(sum(spec.row_bytes for spec in inputs))
    drawn = traced.sampler.draw(np.random.default_rng(13), temporal, 1, rows)
    return tuple(
        np.asarray(value[:, 0] if timed else value, dtype_of(spec.dtype))
        for value, timed, spec in zip(drawn, temporal, inputs, strict=True)
    )


def _frozen(traced: TracedModel) -> convert.Frozen | None:
    """Return the function with its weights as constants, if that can be done."""
    try:
        return convert.freeze(traced.function)
    except convert.ConversionError:
        return None
