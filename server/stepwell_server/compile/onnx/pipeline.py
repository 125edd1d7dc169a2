"""All stages of compiling a step function, in the compiling process. Loads no TensorFlow."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from stepwell_server.compile.cache import version_of
from stepwell_server.compile.errors import ModelError, gist, quoted
from stepwell_server.compile.onnx import declaration, reading, samples
from stepwell_server.compile.onnx.divisions import guarded
from stepwell_server.compile.onnx.interface import Input, Interface, context_name, dtype_of_info, resolve
from stepwell_server.compile.onnx.rewrite import rewritten, with_shapes
from stepwell_server.compile.onnx.rows.walk import Known, Lost, follow, nodes_of
from stepwell_server.compile.onnx.sizes import require_bounded
from stepwell_server.engine.executors import load_executor, onnx_runtime, trial
from stepwell_server.engine.executors.base import ExecutionError
from stepwell_server.engine.executors.step_function import step_of_executor
from stepwell_server.program import (
    ONNX_MODEL,
    Array,
    Program,
    Proof,
    ProofOptions,
    Provenance,
    RowsProof,
    StateSpec,
    TensorSpec,
    dtype_of,
)

_PACKAGES = ("stepwell", "onnx", "onnxruntime")
#: The allowed difference on another processor, as a share of an output's largest value.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.03
_ONE_FOR_EACH = "Change the model so that it gives one value for each row of its input"
#: Numbers of rows whose results show where the rows of an output are.
_TWO, _THREE = 2, 3


def compile_step_function(
    file: Path, options: ProofOptions, report: Callable[[str], None] | None = None
) -> Program:
    """Compile an ``.onnx`` file.

    Raises:
        ModelError: it cannot be served.
    """
    tell = report or _silent
    try:
        tell("load")
        model, content = reading.read(file)
        interface = resolve(model, options.declaration)
        tell("trace")
        traced = _traced(guarded(with_shapes(model, interface)), interface, trust=options.trust_rows)
        tell("convert")
        program = _program(file, content, traced)
        tell("check")
        return _tried(program, _sizes_of(traced))
    except ModelError as error:
        raise type(error)(f"{file}: {error}", error.details) from error


def _silent(_stage: str) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A model of which is known where its rows are."""

    model: onnx.ModelProto
    interface: Interface
    rows: RowsProof
    unproven: str
    """Why its rows are not proven apart, as a clause; empty: they are."""
    is_even: bool
    """No operator is known whose bits depend on the batch size."""
    axes: Mapping[str, int]
    """The axis of the rows of each output."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shape of one row of each output."""


def _traced(model: onnx.ModelProto, interface: Interface, *, trust: bool) -> _Traced:
    """Follow the rows through a model, and run it to see the shapes of its outputs."""
    require_bounded(model.graph, [each.tensor for each in (*interface.inputs, *interface.states)])
    followed = follow(model, interface.given)
    unproven, axes = _proven(followed.outputs, interface)
    try:
        run = onnx_runtime.plain(model.SerializeToString())
    except ValueError as error:
        raise ModelError(
            f"{error}. Are the shapes (--shape) right, and does the installed onnxruntime know its operators?"
        ) from error
    interface, results = _results(run, interface)
    if interface.is_single:
        unproven = "the file fixes a batch of one row"
    rows: RowsProof = (
        "proven" if not unproven else "trusted" if trust and not interface.is_single else "alone"
    )
    found_axes, shapes = {}, {}
    for output in model.graph.output:
        axis = _output_axis(output.name, interface, results, None if unproven else axes[output.name])
        found_axes[output.name] = axis
        shape = results[0][output.name].shape
        shapes[output.name] = (*shape[:axis], *shape[axis + 1 :])
    for state in interface.states:
        if shapes[state.after] != state.shape:
            raise ModelError(
                f"--state {state.tensor}:{state.after}: both must have one shape; a row of {quoted(state.tensor)} has "
                f"{list(state.shape)}, of {quoted(state.after)} {list(shapes[state.after])}"
            )
    return _Traced(model, interface, rows, unproven, not followed.uneven, found_axes, shapes)


def _proven(known: Mapping[str, Known], interface: Interface) -> tuple[str, dict[str, int]]:
    """Why rows are not proven apart, empty if they are; and where they are in the outputs."""
    axes: dict[str, int] = {}
    wanted = [state.after for state in interface.states] + list(interface.outputs)
    for name in wanted:
        value = known.get(name)
        if value is None:
            return f"nothing is known of output {quoted(name)}", {}
        if isinstance(value, Lost):
            return value.reason, {}
        if value.axis is None or value.is_sized:
            return f"output {quoted(name)} has no axis of rows", {}
        declared = interface.declaration.batch_axes.get(name)
        if declared not in {None, value.axis}:
            raise ModelError(
                f"--batch-axis: the rows of output {quoted(name)} are on axis {value.axis} by the graph; got {declared}"
            )
        axes[name] = value.axis
    return "", axes


_Results = dict[str, Array]


def _results(run: onnx_runtime.Run, interface: Interface) -> tuple[Interface, list[_Results]]:
    """Run a model with two and three rows, or with one if it accepts no more."""
    problem: Exception | None = None
    if not interface.is_single:
        try:
            return interface, [_first_result(run, interface, rows) for rows in (_TWO, _THREE)]
        except ExecutionError as error:
            problem = error
    single = dataclasses.replace(interface, is_single=True)
    try:
        return single, [_first_result(run, single, 1)]
    except ExecutionError as error:
        why = problem or error
        raise ModelError(
            f"ONNX Runtime cannot run it ({gist(why)}). Are the shapes of a row (--shape), the batch axes (--batch-axis) and "
            "the constants (--constant) right?"
        ) from error


def _first_result(run: onnx_runtime.Run, interface: Interface, rows: int) -> _Results:
    """The results of the first inputs that the model accepts."""
    specs = [TensorSpec(each.tensor, each.shape, each.dtype, temporal=True) for each in interface.inputs]
    problem: ExecutionError | None = None
    for drawn in samples.draws(specs, rows):
        fed = {
            each.tensor: np.moveaxis(array, 0, each.axis)
            for each, array in zip(interface.inputs, drawn, strict=True)
        }
        for each in interface.states:
            assert each.initial is not None
            fed[each.tensor] = np.stack([each.initial] * rows, each.axis)
        try:
            return run({name: np.ascontiguousarray(array) for name, array in fed.items()})
        except ExecutionError as error:
            problem = error
    assert problem is not None
    raise problem


def _output_axis(name: str, interface: Interface, results: list[_Results], proven: int | None) -> int:
    """The axis of the rows of an output: declared, proven, or where its shape follows their number."""
    shapes = [result[name].shape for result in results]
    counts = [1] if interface.is_single else [_TWO, _THREE]
    fitting = [
        axis
        for axis in range(len(shapes[0]))
        if all(
            axis < len(shape) and shape[axis] == count for shape, count in zip(shapes, counts, strict=True)
        )
    ]
    axis = interface.declaration.batch_axes.get(name, proven)
    if axis is None and fitting:
        axis = fitting[0]
    if axis not in fitting:
        shown = " and ".join(
            f"{list(shape)} for {count} row{'s' * (count > 1)}"
            for shape, count in zip(shapes, counts, strict=True)
        )
        got = "" if axis is None else f", and got axis {axis}"
        advice = f"Name it, --batch-axis {name}={fitting[0]}" if fitting else _ONE_FOR_EACH
        raise ModelError(
            f"output {quoted(name)} must have a batch axis, which follows the number of rows; its shape is {shown}{got}. {advice}"
        )
    return axis


# ------------------------------------------------------------------------------------------------------------- program


def _program(file: Path, content: bytes, traced: _Traced) -> Program:
    interface = traced.interface
    infos = {each.name: each for each in traced.model.graph.output}
    states = [*interface.states, *(_context(each) for each in interface.inputs if each.context)]
    graph = rewritten(traced.model, interface, traced.axes, traced.shapes)
    used = traced.rows != "alone"
    return Program(
        fingerprint=_fingerprint(content, interface),
        inputs=tuple(
            TensorSpec(each.name, each.fresh, each.dtype, temporal=True) for each in interface.inputs
        ),
        outputs=tuple(
            TensorSpec(
                interface.name_of(name), traced.shapes[name], dtype_of_info(infos[name]), temporal=True
            )
            for name in interface.outputs
        ),
        state=tuple(StateSpec(each.name, each.shape, each.dtype) for each in states),
        initial=tuple(each.initial for each in states if each.initial is not None),
        executor="onnxruntime",
        executor_reason="" if used else f"each row is run alone: {traced.unproven}",
        batch_sizes=() if used else (1,),
        files={ONNX_MODEL: graph.SerializeToString(deterministic=True)},
        proof=Proof(steps=0, unproven=traced.unproven if traced.rows == "trusted" else "", rows=traced.rows),
        provenance=_provenance(file, content, traced.model),
    )


def _context(given: Input) -> Input:
    shape = (*given.shape[:-1], given.context)
    initial = np.zeros(shape, dtype_of(given.dtype))
    return dataclasses.replace(given, name=context_name(given), shape=shape, context=0, initial=initial)


def _fingerprint(content: bytes, interface: Interface) -> str:
    """A hash of the file, and of all that the declaration adds to it."""
    document = {
        "declaration": declaration.to_json(interface.declaration),
        "states": [[each.tensor, each.after, each.axis, each.shape] for each in interface.states],
        "inputs": [[each.tensor, each.axis, each.shape, each.context] for each in interface.inputs],
    }
    digest = hashlib.sha256(b"onnx\n")
    digest.update(json.dumps(document, sort_keys=True).encode())
    digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _provenance(file: Path, content: bytes, model: onnx.ModelProto) -> Provenance:
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return Provenance(
        source=file.name,
        source_sha256=hashlib.sha256(content).hexdigest(),
        compiled_time=int(epoch if epoch.isdecimal() else time.time()),
        versions={name: version_of(name) for name in _PACKAGES},
        processor=platform.machine(),
        parameters=_parameters(model.graph),
        layers=(),
    )


def _parameters(graph: onnx.GraphProto) -> int:
    """The number of weights, also of those in branches, which exporters write as operators (Constant)."""
    tensors = [tensor for each in [graph, *reading.inner_graphs(graph)] for tensor in each.initializer]
    for node in nodes_of(graph):
        if node.op_type == "Constant":
            tensors += [each.t for each in node.attribute if each.HasField("t")]
    return sum(math.prod(tensor.dims) for tensor in tensors)


def _sizes_of(traced: _Traced) -> Sequence[int]:
    """The batch sizes to try."""
    if traced.rows == "alone":
        return (1,)
    return trial.LITERT_SIZES if traced.is_even else trial.EVEN_SIZES


def _tried(program: Program, possible: Sequence[int]) -> Program:
    """Find those of the batch sizes that give a row the same bits.

    Raises:
        ModelError: it cannot run, or no size does.
    """
    problem: Exception | None = None
    for known in samples.draws(
        program.inputs, trial.rows_for(sum(spec.row_bytes for spec in program.inputs))
    ):
        try:
            return _tried_with(program, known, possible)
        except (ExecutionError, ValueError) as error:
            problem = error
        except trial.TrialError as error:
            raise ModelError(str(error)) from error
    assert problem is not None
    raise ModelError(f"ONNX Runtime cannot run it: {gist(problem)}") from problem


def _tried_with(program: Program, known: tuple[Array, ...], possible: Sequence[int]) -> Program:
    step = step_of_executor(load_executor(program))
    sizes = trial.affordable(program, known, step, possible, trial.COMPILE_BUDGET_S)
    agreeing = trial.agreeing_here(program, known, step, sizes)
    dtypes = {spec.dtype for spec in (*program.inputs, *program.outputs)} | {
        spec.dtype for spec in program.state
    }
    tried = trial.tried(program, known, step, _HALF_TOLERANCE if "float16" in dtypes else _TOLERANCE, sizes)
    return dataclasses.replace(trial.with_sizes(program, sizes, agreeing), trial=tried)
