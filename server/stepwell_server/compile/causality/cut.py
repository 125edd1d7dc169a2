"""The graph of the whole model, cut at its recurrent layers, at two sizes.

The loop of a recurrent layer that processes the sequence is left out. In its place the graph has one call of
the cell, on placeholders for one time step and the state, and placeholders for the results of the loop. So the
graph shows what the model does outside its loops, and what its cells do.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tensorflow.python.ops import array_ops, nn_impl, nn_ops

from stepwell_server.compile.causality.axes import Scale, Scales
from stepwell_server.compile.errors import ModelError, gist, quoted
from stepwell_server.compile.graph.channels import channels_last
from stepwell_server.compile.graph.concrete import concrete
from stepwell_server.compile.graph.interface import Interface
from stepwell_server.compile.graph.overlap import shifted_frames
from stepwell_server.compile.graph.patch import attribute, relaxed
from stepwell_server.compile.graph.tensorflow_setup import keras, tf
from stepwell_server.compile.graph.watch import all_operations, is_of_keras_only, recurrent_layers

#: Primes, larger than the likely reach of any layer. Behavior that changes beyond some length differs between the two
#: traces or, below the first length, between samples of one and of at least `evidence.STEPS` time steps. So those must be
#: longer than the first length. Others than the first are for models that leave out more time steps than that has, or
#: begin further before the first time step.
SCALES = (
    Scales(Scale(rows=37, steps=509), Scale(rows=41, steps=4099)),
    Scales(Scale(rows=37, steps=4099), Scale(rows=41, steps=16411)),
    Scales(Scale(rows=37, steps=16411), Scale(rows=41, steps=32771)),
)
#: The proof is repeated with the first of these on which it can be done for models that it admits, because a layer may
#: behave differently beyond the lengths above. Only those: constants of a refused model may have an element for each pair
#: of time steps. They are primes; the first is larger than the integers that float32 can count.
FAR = (Scale(rows=2, steps=16_777_259), Scale(rows=2, steps=65_537))
#: Long enough for most windows, and short enough that a model may create operations for each time step.
_SMALL = (Scale(rows=3, steps=23), Scale(rows=3, steps=29))
#: A layer with a loop over at least every second time step creates this many operations of one kind, at the first of
#: these lengths. A loop over fewer is detected later, by the proof, because the graphs differ.
_FEWEST = 11
#: A loop over another axis than the sequence stays in the graph. If it is longer than this, it stays only if it has the
#: same length in both traces: a loop over a part of the sequence would create a thousand copies of a cell.
_SHORT = 16
#: The module of Keras with the operations that take functions, such as `keras.ops.scan`.
_OF_FUNCTIONS = "keras.src.ops.core"
_COMPARISONS = {"Equal", "NotEqual", "Less", "LessEqual", "Greater", "GreaterEqual", "Maximum", "Minimum"}
_GATHERS = {"GatherV2", "ResourceGather"}
_PLACED = {"Pad", "PadV2", "Slice", "StridedSlice"}
_HELD = {"Const", "Placeholder", "ReadVariableOp"}
#: For a window with gaps (a dilation rate), TensorFlow folds the sequence into rows, which the proof cannot follow; but not
#: in a graph for a TPU.
_UNFOLDED = types.SimpleNamespace(enclosing_tpu_context=lambda: "unfolded")
_FOLDED = nn_ops.with_space_to_batch
#: Keras's own loops, which call the cell once per time step, in order. ConvLSTM uses that of RNN.
_KNOWN_LOOPS = {
    layer.inner_loop
    for layer in (keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN)
}


_Loop = tuple[str, int]
"""A call of a recurrent layer: its path and the number of the call."""


class _LoopKind(enum.Enum):
    """How a trace treats a loop."""

    FOLLOWS = "it processes the sequence, and is left out"
    PART = "it processes something else, is too long, and is left out"
    OTHER = "it processes other rows, or more or fewer time steps per input time step, and is left out"
    WHOLE = "it processes something else, and stays"


@dataclasses.dataclass(frozen=True)
class CutCall:
    """A call of a recurrent layer whose loop was left out of the graph."""

    layer: Any
    path: str
    number: int
    sequences: tuple[Any, ...]
    mask: Any
    initial: tuple[Any, ...]
    now: tuple[Any, ...]
    """Placeholders: one time step of each sequence."""
    before: tuple[Any, ...]
    """Placeholders: the state before the step."""
    after: tuple[Any, ...]
    """The results of the cell: its output, then the state."""
    outputs: Any
    """Placeholder: the outputs of all time steps."""
    last: tuple[Any, ...]
    """Placeholders: the output and the state after the last time step."""
    problem: str = ""
    """Why no session could keep its state, if it processes other rows or time steps."""

    @property
    def loop_is_known(self) -> bool:
        """The omitted loop is Keras's own."""
        return type(self.layer).inner_loop in _KNOWN_LOOPS


@dataclasses.dataclass(frozen=True)
class Cut:
    """The graph of a model at one size."""

    scale: Scale
    function: Any
    """Keeps the graph and its captures alive."""
    inputs: tuple[Any, ...]
    outputs: dict[str, Any]
    calls: tuple[CutCall, ...]
    parts: tuple[CutCall, ...]
    """Calls over a part of the sequence, over more than the sequence, or over other rows: their loops are left out too."""
    owners: tuple[tuple[int, int, Any], ...]
    """Ranges of operations (first, end) and the layer that created them; inner layers before outer ones."""
    kinds: Mapping[_Loop, _LoopKind]

    @property
    def graph(self) -> Any:
        """The TensorFlow graph."""
        return self.function.graph

    def owner(self, index: int) -> Any:
        """Return the innermost layer that created the operation at ``index``, or None."""
        return next((layer for first, end, layer in self.owners if first <= index < end), None)


@dataclasses.dataclass(frozen=True)
class Cuts:
    """The graphs of a model at two sizes."""

    temporal: tuple[bool, ...]
    scales: Scales
    first: Cut
    second: Cut

    def compared(self) -> tuple[float, ...]:
        """Return the scalars that the graph compares values with."""
        found: set[float] = set()
        for op in self.first.graph.get_operations():
            if op.type in _COMPARISONS:
                for value in op.inputs:
                    if value.op.type == "Const" and value.shape.num_elements() == 1:
                        number = float(tf.make_ndarray(value.op.get_attr("value")).reshape(-1)[0])
                        found |= {number} if math.isfinite(number) else set()
        return tuple(sorted(found))

    def may_be_short(self) -> bool:
        """Whether the graph pads or leaves out about as many elements as the first trace has time steps, or more."""
        least = self.scales.first.steps // 2
        places = (
            value.op.get_attr("value")
            for op in self.first.graph.get_operations()
            if op.type in _PLACED
            for value in op.inputs[1:]
            if value.op.type == "Const"
        )
        return any(np.max(np.abs(tf.make_ndarray(place)), initial=0) >= least for place in places)

    def table_sizes(self) -> tuple[int, ...]:
        """Return the sizes of the tables (weights and constants) in which the graph looks up rows by index."""
        tables = (op.inputs[0] for op in self.first.graph.get_operations() if op.type in _GATHERS)
        return tuple(
            table.shape[0]
            for table in tables
            if table.op.type in _HELD and table.shape.rank and table.shape[0] is not None
        )


class CutError(ModelError):
    """The model does not run on sequences of other lengths."""

    def __init__(self, layer: Any, problem: str) -> None:
        super().__init__(problem)
        self.layer = layer
        """The layer that raised, or None."""


class LoopError(CutError):
    """The model creates operations per time step: it runs a Python loop over them."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer, "runs a Python loop over its time steps")


class _Tracer:
    """One trace in progress."""

    def __init__(
        self,
        interface: Interface,
        scale: Scale,
        inner: frozenset[_Loop],
        kinds: Mapping[_Loop, _LoopKind] | None = None,
    ) -> None:
        self.interface, self.scale, self.inner, self.fixed_kinds = interface, scale, inner, kinds
        self.kinds: dict[_Loop, _LoopKind] = {}
        self.short = 0 if scale in _SMALL else _SHORT
        self.calls: list[CutCall] = []
        self.long: dict[_Loop, CutCall] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self.owners: list[tuple[int, int, Any]] = []
        self.inputs: tuple[Any, ...] = ()
        self.outputs: dict[str, Any] = {}
        self.raised: Any = None

    def run(self, *tensors: Any) -> list[Any]:
        """Call the model while its graph is traced."""
        self.calls.clear()  # TensorFlow may trace twice.
        self.owners.clear()
        self.long.clear()
        self.kinds.clear()
        self.counts.clear()
        self.raised = None
        self.inputs = tensors
        model = self.interface.model
        with relaxed(model), contextlib.ExitStack() as stack:
            for path, layer in recurrent_layers(model).items():
                # A loop over another axis stays in the graph, unrolled.
                stack.enter_context(attribute(layer, "unroll", True))
                stack.enter_context(attribute(layer, "inner_loop", self._loop(path, layer)))
            for module in (nn_ops, nn_impl):
                stack.enter_context(attribute(module, "device_context", _UNFOLDED))
            stack.enter_context(attribute(nn_ops, "with_space_to_batch", _unfolded))
            stack.enter_context(channels_last())
            stack.enter_context(shifted_frames())
            # Else zeros of fewer than 1,000 elements are a constant: the graphs differ where the rows decide that.
            stack.enter_context(attribute(array_ops, "_constant_if_small", _never))
            for operation in all_operations(model):
                original = time_distributed(operation) or operation.call
                stack.enter_context(attribute(operation, "call", self._owned(operation, original)))
            start = _count()
            casts = zip(tensors, self.interface.inputs, strict=True)
            self.outputs = self.interface.call([tf.cast(value, info.dtype) for value, info in casts])
            self.owners.append((start, _count(), model))
        return list(self.outputs.values())

    def _owned(self, operation: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = _count()
            try:
                result = original(*args, **kwargs)
            except Exception:
                self.raised = self.raised or operation
                raise
            self.owners.append((start, _count(), operation))
            return result

        return call

    def _loop(self, path: str, layer: Any) -> Callable[..., Any]:
        original = layer.inner_loop

        def inner_loop(sequences: Any, initial_state: Any, mask: Any = None, training: Any = False) -> Any:
            rows, steps, *_ = keras.tree.flatten(sequences)[0].shape
            self.counts[path] += 1
            loop = (path, self.counts[path])
            kind = (
                self._kind(loop, rows, steps)
                if self.fixed_kinds is None
                else self.fixed_kinds.get(loop, _LoopKind.WHOLE)
            )
            self.kinds[loop] = kind
            if kind is _LoopKind.WHOLE:
                return original(
                    sequences=sequences, initial_state=initial_state, mask=mask, training=training
                )
            results, call = self._cut(path, layer, sequences, initial_state, mask)
            if kind is _LoopKind.FOLLOWS:
                self.calls.append(call)
            else:
                problem = "" if kind is _LoopKind.PART else _other_rows(path, layer, rows, steps, self.scale)
                self.long[loop] = dataclasses.replace(call, problem=problem)
            return results

        return inner_loop

    def _kind(self, loop: _Loop, rows: int, steps: int) -> _LoopKind:
        if steps % self.scale.steps or rows % self.scale.rows:
            return _LoopKind.PART if steps > self.short and loop not in self.inner else _LoopKind.WHOLE
        same = (rows, steps) == (self.scale.rows, self.scale.steps)
        return _LoopKind.FOLLOWS if same else _LoopKind.OTHER

    def _cut(
        self, path: str, layer: Any, sequences: Any, initial_state: Any, mask: Any
    ) -> tuple[Any, CutCall]:
        rows, steps = keras.tree.flatten(sequences)[0].shape[:2]
        map_structure, flatten = keras.tree.map_structure, keras.tree.flatten
        now = map_structure(lambda x: _placeholder(x.dtype, (rows, *x.shape[2:])), sequences)
        before = map_structure(lambda x: _placeholder(x.dtype, x.shape), initial_state)
        takes_training = isinstance(layer.cell, keras.Layer) and layer.cell._call_has_training_arg
        output, after = layer.cell(now, before, **({"training": False} if takes_training else {}))
        outputs = _placeholder(output.dtype, (rows, steps, *output.shape[1:]))
        last = _placeholder(output.dtype, output.shape)
        states = map_structure(lambda x: _placeholder(x.dtype, x.shape), after)
        states = states if keras.tree.is_nested(states) else [states]
        call = CutCall(
            layer=layer,
            path=path,
            number=sum(call.layer is layer for call in self.calls),
            sequences=tuple(flatten(sequences)),
            mask=flatten(mask)[0],
            initial=tuple(flatten(initial_state)),
            now=tuple(flatten(now)),
            before=tuple(flatten(before)),
            after=(output, *flatten(after)),
            outputs=outputs,
            last=(last, *flatten(states)),
        )
        return (last, outputs, keras.tree.pack_sequence_as(initial_state, flatten(states))), call


def cut(interface: Interface, temporal: Sequence[bool], scales: Scales = SCALES[0]) -> Cuts:
    """Trace the model at two sizes.

    Raises:
        LoopError: it runs a Python loop over the time steps.
        CutError: it does not run on sequences of such lengths.
        ModelError: no session can keep the state of a recurrent layer.
    """
    if not any(temporal) and recurrent_layers(interface.model):
        raise ModelError("no recurrent layer of the model processes its input sequence")
    _refuse_loops(interface, temporal)
    one, two = (_cut(interface, temporal, scale) for scale in scales.both)
    inner = one[1].items() & two[1].items()
    if inner:
        loops = frozenset(loop for loop, _ in inner)
        one, two = (_cut(interface, temporal, scale, loops) for scale in scales.both)
    return Cuts(tuple(temporal), scales, one[0], two[0])


def cut_few_steps(interface: Interface, cuts: Cuts, steps: int) -> Cut:
    """Trace the model on one or a few time steps, with the same loops left out as in the longer traces.

    Raises:
        CutError: it does not run on so few.
    """
    scale = Scale(rows=cuts.first.scale.rows, steps=steps)
    return _cut(interface, cuts.temporal, scale, kinds=cuts.first.kinds)[0]


def _never(*_args: Any, **_options: Any) -> None:
    return None


def cut_far(interface: Interface, cuts: Cuts, scale: Scale) -> Cuts:
    """Trace the model on a far longer sequence, as the counterpart of the first trace, with the same loops left out.

    Raises:
        CutError: it does not run on it.
    """
    far = _cut(interface, cuts.temporal, scale, kinds=cuts.first.kinds)[0]
    return Cuts(cuts.temporal, Scales(cuts.first.scale, scale), cuts.first, far)


def _refuse_loops(interface: Interface, temporal: Sequence[bool]) -> None:
    """Refuse a model that creates operations per time step, before it does so for thousands of them.

    Keras's own layers create none: those with loops over time are replaced in the trace. Only their operations that take
    functions may, and pieces of a sequence.
    """
    if is_of_keras_only(interface.model) and not any(
        type(operation).__module__ == _OF_FUNCTIONS for operation in all_operations(interface.model)
    ):
        return
    try:
        one = _cut(interface, temporal, _SMALL[0])[0]
        if not _may_loop(one):
            return
        two = _cut(interface, temporal, _SMALL[1])[0]
    except CutError:
        return  # It may run on longer sequences.
    first, second = (side.graph.get_operations() for side in (one, two))
    if len(first) != len(second):
        kinds = zip(first, second, strict=False)
        parts = (i for i, (a, b) in enumerate(kinds) if a.type != b.type)
        raise LoopError(two.owner(next(parts, min(len(first), len(second)))))


def _may_loop(side: Cut) -> bool:
    """Whether a layer creates enough operations of one kind for a loop over the time steps."""
    operations = side.graph.get_operations()
    owners = [0] * len(operations)
    for first, end, layer in reversed(side.owners):  # outer layers before inner ones
        owners[first:end] = [id(layer)] * (end - first)
    kinds = collections.Counter(
        (owner, op.type)
        for owner, op in zip(owners, operations, strict=True)
        if owner and op.type not in _HELD
    )
    return max(kinds.values(), default=0) >= _FEWEST


def _cut(
    interface: Interface,
    temporal: Sequence[bool],
    scale: Scale,
    inner: frozenset[_Loop] = frozenset(),
    kinds: Mapping[_Loop, _LoopKind] | None = None,
) -> tuple[Cut, dict[_Loop, int]]:
    """Trace the model on sequences of ``scale.steps`` time steps.

    Returns:
        the graph, and the lengths of omitted loops over another axis.

    Raises:
            CutError: it does not run on them.
            ModelError: no session can keep the state of a recurrent layer.
    """
    signature = []
    for info, timed in zip(interface.inputs, temporal, strict=True):
        features = info.shape[2:] if timed else info.shape[1:]
        shape = (scale.rows, *((scale.steps,) if timed else ()), *features)
        signature.append(tf.TensorSpec(shape, info.dtype))
    tracing = _Tracer(interface, scale, inner, kinds)
    try:
        function = _traced(tracing.run, signature)
    except ModelError:
        raise
    except Exception as error:  # Keras and user code may raise anything.
        message = gist(error)
        at_fault = tracing.raised or _mentioned(interface.model, message)
        raise CutError(at_fault, f"{type(error).__name__}: {message}") from error
    for call in (*tracing.calls, *tracing.long.values()):
        _require_kept(call)
    found = Cut(
        scale=scale,
        function=function,
        inputs=tracing.inputs,
        outputs=tracing.outputs,
        calls=tuple(tracing.calls),
        parts=tuple(tracing.long.values()),
        owners=tuple(tracing.owners),
        kinds=dict(tracing.kinds),
    )
    return found, {
        loop: call.sequences[0].shape[1] for loop, call in tracing.long.items() if not call.problem
    }


def _mentioned(model: Any, message: str) -> Any:
    """Return the layer that a Keras error names: Keras checks inputs before it calls a layer."""
    return next((layer for layer in all_operations(model) if f"layer '{layer.name}'" in message), None)


def _traced(run: Callable[..., Any], signature: Sequence[Any]) -> Any:
    """Trace with all called functions inlined, because a separate graph of a function has no sizes.

    TensorFlow cannot inline functions that need AutoGraph, for example with loops over tensors.
    """
    eagerly = tf.config.functions_run_eagerly()
    try:
        tf.config.run_functions_eagerly(True)
        return concrete(run, *signature)
    except ModelError:
        raise
    except Exception:  # Keras and user code may raise anything; try without inlining.
        tf.config.run_functions_eagerly(eagerly)
        return concrete(run, *signature)
    finally:
        tf.config.run_functions_eagerly(eagerly)


def time_distributed(operation: Any) -> Callable[..., Any] | None:
    """Return an equivalent of Keras's TimeDistributed without a copy of the layer per time step.

    TimeDistributed calls its layer on each time step. That equals one call with all time steps as rows of one batch if
    the layer treats rows independently, which the proof checks.
    """
    if type(operation).__dict__.get("call") is not keras.layers.TimeDistributed.call:
        return None
    layer = operation.layer

    def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
        rows, steps = inputs.shape[:2]
        kwargs: dict[str, Any] = {"training": training} if layer._call_has_training_arg else {}
        if layer._call_has_mask_arg and mask is not None:
            kwargs["mask"] = tf.reshape(mask, (rows * steps, *mask.shape[2:]))
        result = layer.call(tf.reshape(inputs, (rows * steps, *inputs.shape[2:])), **kwargs)
        return tf.reshape(result, (rows, steps, *result.shape[1:]))

    return call


def _unfolded(*args: Any, **options: Any) -> Any:
    """Give a separable convolution its gaps, instead of folding its sequence; fold for everything else."""
    op: Any = options.get("op")
    if getattr(op, "__qualname__", "") != "separable_conv2d.<locals>.op":
        return _FOLDED(*args, **options)
    gaps = functools.partial(nn_ops.depthwise_conv2d_native, dilations=[1, *options["dilation_rate"], 1])
    with attribute(nn_ops, "depthwise_conv2d_native", gaps):
        return op(options["input"], None, options["padding"])


def _other_rows(path: str, layer: Any, rows: int, steps: int, scale: Scale) -> str:
    who = f"the layer {quoted(path)} ({type(layer).__name__})"
    if rows != scale.rows:
        return (
            f"{who} processes {rows // scale.rows} rows for each row of the batch (such as the nodes of a graph), but a "
            "session keeps one state for each of its rows; make every node a row of the batch, and open "
            "sessions whose batch_size is the number of nodes"
        )
    return (
        f"{who} processes {steps // scale.steps} time steps for each input time step, but a step of a session "
        "advances every layer by one; move them to the feature axis before the layer"
    )


def _require_kept(call: CutCall) -> None:
    """Refuse a cell that returns a state of another shape, which no loop can carry."""
    given, made = ([tuple(x.shape[1:]) for x in states] for states in (call.before, call.after[1:]))
    if given != made:
        raise ModelError(
            f"the cell of the layer {quoted(call.path)} ({type(call.layer).__name__}) must return states with the "
            f"shapes of its "
            f"input states; for each row it receives {_listed(given)} and returns {_listed(made)}: make state_size match "
            "what call() returns"
        )


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes)) or "none"


def _placeholder(dtype: Any, shape: Any) -> Any:
    return tf.compat.v1.placeholder(dtype, shape)


def _count() -> int:
    return len(tf.compat.v1.get_default_graph().get_operations())
