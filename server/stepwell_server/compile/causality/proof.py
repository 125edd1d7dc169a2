"""Follows the batch and time axis through the graph of a model, from its inputs to its outputs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from stepwell_server.compile.causality.axes import (
    BATCH,
    TIME,
    Axes,
    LostAxisError,
    Scale,
    Time,
    elements,
    is_plain,
    labels,
    normal,
    time_of,
)
from stepwell_server.compile.causality.call import Call, Memory, Need, Rule
from stepwell_server.compile.causality.constants import BROADCAST
from stepwell_server.compile.causality.cut import Cut, CutCall, Cuts
from stepwell_server.compile.causality.numbers import MAX_NUMBER, Numbered, counted_by, numbered
from stepwell_server.compile.causality.refusals import Reason, Refusal
from stepwell_server.compile.causality.rules import RULES
from stepwell_server.compile.causality.scans import Loop, Scan
from stepwell_server.compile.causality.values import (
    OF_SHAPES,
    Before,
    Const,
    Data,
    Evaluator,
    Items,
    attributes,
    needed_by,
    sizes,
)
from stepwell_server.compile.causality.waiting import (
    EARLY,
    aligned,
    begins_with,
    early_values,
    with_since,
    without_unknown,
)
from stepwell_server.compile.errors import ModelError

_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_WRITES = ("Assign", "ResourceApply", "ResourceScatter", "LookupTableInsert", "LookupTableImport")
LOOPS = ("StatelessWhile", "While")
ACCUMULATING = ("Cumsum", "Cumprod")
#: Maximum of iterations of a loop: more than the time steps of the first trace, so that a loop over those is found to
#: depend on their number.
_MAX_TURNS = 1024
_UNFOLLOWED = ("TensorList", "TensorArray", "StatelessIf", "StatelessCase")
_DRAWS = (
    "Random",
    "Multinomial",
    "TruncatedNormal",
    "Binomial",
    "CandidateSampler",
    "NonDeterministicInts",
    "Rng",
    "StatefulStandardNormal",
    "StatefulUniform",
)
#: Operations that TensorFlow calls stateful, but whose results are constant while nothing is written.
_READS = {
    "HashTableV2",
    "LookupTableFindV2",
    "LookupTableSizeV2",
    "ReadVariableOp",
    "ResourceGather",
    "StatefulPartitionedCall",
    "VarHandleOp",
    "While",
}
_PYTHON = {"EagerPyFunc", "PyFunc", "PyFuncStateless"}
#: Refusals that a model may not have if rows have values of their own before the first time step. Those cost more, so they
#: are tried last.
_HELD = {Reason.TIME, Reason.PAIRS, Reason.AHEAD, Reason.PADDING, Reason.LENGTH}
_OTHERWISE = "computes something different for another number of time steps"
_AROUND = "shifts the time axis around its end, and uses what then comes first"
_Value = Data | Const


class NotAdmitted(Exception):
    """The graph does not admit the model. The message is a clause that says what the layer does."""

    def __init__(self, reason: Reason, layer: Any, clause: str) -> None:
        super().__init__(clause)
        self.reason = reason
        self.layer = layer
        """The innermost layer or operation at fault; the model itself if it is in no layer; None if unknown."""


@dataclasses.dataclass(frozen=True)
class Proof:
    """The result of the proof for an admitted model."""

    calls: tuple[CutCall, ...]
    """The calls of recurrent layers that process the sequence."""
    outputs: Mapping[str, Data]
    """The axes of each output."""
    values: Mapping[str, Data | Const]
    """The abstract value of each tensor of the first graph that its outputs need."""
    needs: Mapping[str, tuple[Need, ...]]
    """What operations keep from step to step, by the name of the operation, of the placeholder operation for a loop's
    outputs, or of the tensor of an output."""
    numbers: Mapping[str, Mapping[int, Numbered]]
    """Inputs of operations that the number of the time step determines, by name of the operation and place."""
    scans: Mapping[str, Scan]
    """Loops over time that are no recurrent layers, by name of the operation."""

    @property
    def looks_back(self) -> bool:
        """Whether other operations than recurrent layers process the sequence."""
        return bool(self.needs or self.scans)

    @property
    def steps(self) -> int:
        """The number of time steps that the model leaves out somewhere: Keras may fail on fewer."""
        times = (time_of(value.axes) for value in self.values.values() if isinstance(value, Data))
        return max((-(time.extra // time.per) for time in times if time is not None), default=0)

    def begins_before(self, scale: Scale) -> bool:
        """Whether a sequence of that many time steps does not reach from where some tensor begins to the first step."""
        times = (time_of(value.axes) for value in self.values.values() if isinstance(value, Data))
        return any(time is not None and -time.start > scale.of(time) for time in times)


def follow(cuts: Cuts) -> tuple[Mapping[str, Data | Const], Mapping[str, tuple[Need, ...]]]:
    """Return the abstract values and the needs of `Proof`, without a check of the results.

    Raises:
        NotAdmitted: the axes cannot be followed through an operation.
    """
    walk = _Walk(cuts)
    return walk.follow().values, walk.needs


def prove(cuts: Cuts) -> Proof:
    """Prove that each output at a time step depends only on the inputs of that time step and on carried states.

    Raises:
        NotAdmitted: it does not, or the known operations do not prove it.
    """
    try:
        return _Walk(cuts).run()
    except NotAdmitted as found:
        if found.reason not in _HELD:
            raise
        try:
            return _Walk(cuts, holds=True).run()
        except NotAdmitted:
            raise found from None


class _Walk:
    """One walk through the graphs of both traces in parallel."""

    def __init__(self, cuts: Cuts, *, holds: bool = False) -> None:
        self.temporal, self.scales, self.holds = cuts.temporal, cuts.scales, holds
        self.first, self.second = cuts.first, cuts.second
        self.made: dict[str, CutCall] = {}
        """The calls that the placeholders for results of loops belong to."""
        self.needs: dict[str, tuple[Need, ...]] = {}
        self.numbers: dict[str, dict[int, Numbered]] = {}
        self.scans: dict[str, Scan] = {}
        self.frame: _Frame | None = None
        self.index = 0
        """Place of the operation that the walk is at."""
        self.looks: dict[str, tuple[int, str]] = {}
        """For tensors that look ahead, the place of the first operation that does, and its clause."""
        self.spent: dict[str, tuple[int, int]] = {}
        """Tensors whose padding met a value without a time axis: the place of that operation, and the padded elements."""

    def run(self) -> Proof:
        """Walk through the graphs and check their results."""
        frame = self.follow()
        for one, two in zip(self.first.calls, self.second.calls, strict=True):
            self._check_cell(frame, one, two)
        places = {op.name: index for index, op in needed(self.first)}
        return Proof(
            self.first.calls,
            {
                name: self._output(frame, tensor, self.second.outputs[name], places[tensor.op.name])
                for name, tensor in self.first.outputs.items()
            },
            frame.values,
            self.needs,
            self.numbers,
            self.scans,
        )

    def follow(self) -> _Frame:
        """Walk through everything that the outputs need."""
        if [(id(call.layer), call.number) for call in self.first.calls] != [
            (id(call.layer), call.number) for call in self.second.calls
        ]:
            raise NotAdmitted(Reason.LENGTH, None, "calls its layers once per time step")
        for graph, scope in ((self.first.graph, self.first), (self.second.graph, self.second)):
            self._refuse_effects(graph, scope)
        values = self._seeds()
        evaluators = (Evaluator(captured(self.first)), Evaluator(captured(self.second)))
        ops = [needed(side) for side in (self.first, self.second)]
        frame = self.frame = _Frame(self, values, evaluators)
        frame.pair(self.first.inputs, self.second.inputs)
        for call, other in zip(self.first.calls, self.second.calls, strict=True):
            frame.pair((*call.now, *call.before), (*other.now, *other.before))
        parts = {tensor.name: call for call in self.first.parts for tensor in (call.outputs, *call.last)}
        for index, one, two in side_by_side(ops[0], ops[1], blamed(self.first, self.second)):
            if one.outputs and one.outputs[0].name in parts:
                call = parts[one.outputs[0].name]
                if call.problem:
                    raise ModelError(call.problem)
                for tensor in call.sequences:
                    self._refuse_ahead(tensor, frame.values[tensor.name])
                raise NotAdmitted(Reason.UNPROVEN, call.layer, "processes only a part of the sequence")
            try:
                self.index = index
                frame.enter(one, two)
                for i, output in enumerate(one.outputs):
                    if output.name in self.made:
                        self._check_call(frame, output.name)
                        frame.values[output.name] = self._given(one.outputs[i], two.outputs[i])
            except Refusal as refusal:
                raise NotAdmitted(refusal.reason, self.first.owner(index), str(refusal)) from refusal
        return frame

    def _seeds(self) -> dict[str, _Value]:
        """Return the values known before the walk: the inputs of the model and of each cell."""
        values: dict[str, _Value] = {}
        for one, two, timed in zip(self.first.inputs, self.second.inputs, self.temporal, strict=True):
            rest = [normal((size.first,)) for size in sizes(one, two)[2 if timed else 1 :]]
            values[one.name] = Data(((BATCH,), *([(TIME,)] if timed else []), *rest))
        for call, other in zip(self.first.calls, self.second.calls, strict=True):
            for one, two in zip((*call.now, *call.before), (*other.now, *other.before), strict=True):
                values[one.name] = _of_step(one, two, call)
            for one in (call.outputs, *call.last):
                self.made[one.name] = call
        return values

    def _given(self, one: Any, two: Any) -> Data:
        """Return the results of a loop: its outputs have time, its last output and states belong to the end."""
        call = self.made[one.name]
        rest = tuple(normal((size.first,)) for size in sizes(one, two))
        if one is call.outputs:
            return Data(((BATCH,), (TIME,), *rest[2:]))
        return Data(((BATCH,), *rest[1:]), ends=True)

    def _check_call(self, frame: _Frame, name: str) -> None:
        """Check that a loop processes the sequence, from a state on that is known at the first time step."""
        call = self.made[name]
        other = next(two for one, two in zip(self.first.calls, self.second.calls, strict=True) if one is call)
        who = call.layer
        frame.require_alike(_into(call), _into(other))
        waits, begins = list[Need](), list[Need]()
        for i, tensor in enumerate((*call.sequences, *([] if call.mask is None else [call.mask]))):
            value = frame.values[tensor.name]
            if isinstance(value, Const):
                rest = (normal((size.first,)) for size in value.shape()[2:])
                what = "a mask" if tensor is call.mask else "a sequence"
                try:
                    self._even(value, ((BATCH,), (TIME,), *rest), who)
                except NotAdmitted as found:
                    if found.reason is not Reason.POSITION:
                        raise
                    clause = f"is given {what} that depends on the number of the time step alone"
                    raise NotAdmitted(found.reason, who, clause) from found
                continue
            time = time_of(value.axes[1:2])
            is_usual = value.axes[:2] == ((BATCH,), (time,)) and all(map(is_plain, value.axes[2:]))
            if time is None or time.per > 1 or not is_usual:
                raise NotAdmitted(Reason.UNPROVEN, who, "processes other axes than batch and time")
            waits += self._punctual(tensor, value, time, i)
        if call.layer.go_backwards:
            raise NotAdmitted(Reason.BACKWARDS, who, "reads its sequence backwards")
        if not call.loop_is_known:
            raise NotAdmitted(
                Reason.UNPROVEN,
                who,
                "has a custom inner_loop, which is not known to run step by step",
            )
        for one, two in zip(call.initial, other.initial, strict=True):
            value = frame.values[one.name]
            own = tuple(normal((size.first,)) for size in sizes(one, two)[1:])
            if not isinstance(value, Data):
                self._even(value, ((BATCH,), *own), who)
            elif value.ends or value.axes != ((BATCH,), *own) or self._is_input(one):
                clause = "takes its initial state from the model's inputs (initial_state=...)"
                raise NotAdmitted(Reason.STATE, who, clause)
            else:
                begins = [Need(Memory.COUNT, 1)]
        if waits or begins:
            self.needs[call.outputs.op.name] = (*waits, *begins)

    def _is_input(self, tensor: Any) -> bool:
        """Whether a tensor is an input of the model, which may be meant as a state that each call returns."""
        while tensor.op.type in ("Identity", "Cast"):
            tensor = tensor.op.inputs[0]
        return any(tensor is one for one in self.first.inputs)

    def _check_cell(self, frame: _Frame, call: CutCall, other: CutCall) -> None:
        """Check that the results of a cell depend only on its time step and row."""
        for one in call.after:
            value = frame.values[one.name]
            if isinstance(value, Const):
                rest = (normal((size.first,)) for size in value.shape()[1:])
                self._even(value, ((BATCH,), *rest), call.layer)
                continue
            if (
                value.axes[:1] != ((BATCH,),)
                or value.ends
                or not all(is_plain(dim) for dim in value.axes[1:])
            ):
                raise NotAdmitted(
                    Reason.UNPROVEN, call.layer, "has a cell that does not return one result per row"
                )
        if len(call.after) != len(other.after):
            raise NotAdmitted(Reason.LENGTH, call.layer, "has a state that depends on the length")

    def _output(self, frame: _Frame, one: Any, two: Any, index: int) -> Data:
        """Check that an output has the batch as its first axis, and time, if it has any, as its second."""
        value, who = frame.values[one.name], self.first.owner(index)
        if isinstance(value, Data) and frame.twins.get(one.name) != two.name:
            raise NotAdmitted(Reason.LENGTH, who, _OTHERWISE)
        if isinstance(value, Const):
            axes = _followed(who, lambda: tuple(self.scales.factors(size) for size in sizes(one, two)))
            value = Data(self._even(value, axes, who))
        time = time_of(value.axes[1:2])
        each = None if time is None else elements(value.axes[1])
        if each is not None and each.per > 1:
            raise NotAdmitted(Reason.RATE, who, f"returns {each.per} elements for each time step")
        leading = 2 if value.axes[1:2] == ((time,),) else 1
        if time is not None and (waits := self._punctual(one, value, time, 0)):
            self.needs[one.name] = waits
        if value.axes[:1] != ((BATCH,),) or not all(is_plain(dim) for dim in value.axes[leading:]):
            raise NotAdmitted(Reason.LAYOUT, who, "moves the batch or the time axis of an output")
        return value

    def _punctual(self, tensor: Any, value: Data, time: Time, i: int) -> tuple[Need, ...]:
        """Return what lets a tensor wait for the current time step, after checking that it has one element for each.

        Raises:
            NotAdmitted: it looks ahead, or has more or fewer elements.
        """
        self._refuse_ahead(tensor, Data(((time,),)))
        if time.extra:
            more = f"{abs(time.extra)} {'more' if time.extra > 0 else 'fewer'} elements than there are time steps"
            raise NotAdmitted(Reason.LENGTH, self.first.owner(self._maker(tensor)), f"returns {more}")
        if begins_with(value, Before.UNKNOWN):
            raise NotAdmitted(Reason.TIME, self.first.owner(self._maker(tensor)), _AROUND)
        waits = [Need(Memory.DELAY, -time.start, i)] if time.start else []
        return tuple(with_since(waits, [value] * (i + 1)))

    def _refuse_ahead(self, tensor: Any, value: _Value) -> None:
        time = time_of(value.axes) if isinstance(value, Data) else None
        if time is not None and time.start > 0:
            index, clause = self.looks[tensor.name]
            place, padded = self.spent.get(tensor.name, (0, 0))
            if padded >= time.start:
                raise NotAdmitted(
                    Reason.PADDING,
                    self.first.owner(place),
                    EARLY,
                )
            ahead = -(-time.start // time.per)
            steps = f"{ahead} time step{'s'[: ahead > 1]}"
            raise NotAdmitted(Reason.AHEAD, self.first.owner(index), f"{clause}, {steps} ahead")

    def _maker(self, tensor: Any) -> int:
        return next(i for i, op in needed(self.first) if op is tensor.op)

    def _even(self, value: Const, axes: Axes, who: Any) -> Axes:
        """Return ``axes``, after checking that the constant is uniform over them.

        Raises:
            NotAdmitted: it is not; ``who`` is at fault.
        """
        return _followed(who, lambda: Call(None, None, (), self.scales).even(value, axes))

    def _refuse_effects(self, graph: Any, scope: Cut) -> None:
        """Refuse side effects on later calls, because all sessions would share them."""
        for index, top in enumerate(graph.get_operations()):
            for op in _with_called(top):
                if any(op.type.startswith(kind) for kind in _WRITES):
                    variable = _variable(op, scope)
                    is_seed = "seed_generator" in variable
                    raise NotAdmitted(
                        Reason.RANDOM if is_seed else Reason.WRITES,
                        scope.owner(index),
                        "draws random numbers"
                        if is_seed
                        else f"changes a variable during the call ({variable})",
                    )


def needed(side: Cut) -> list[tuple[int, Any]]:
    """Return the operations that the outputs need, in graph order, with their indices."""
    loops = {
        placeholder.name: call
        for call in (*side.calls, *side.parts)
        for placeholder in (call.outputs, *call.last)
    }
    waiting = [*side.outputs.values()]
    for call in side.calls:
        waiting += _into(call)
    seen: set[str] = set()
    while waiting:
        tensor = waiting.pop()
        op = tensor.op
        if op.name in seen:
            continue
        seen.add(op.name)
        if op.type not in OF_SHAPES:
            waiting += op.inputs
        for output in op.outputs:
            if output.name in loops:
                waiting += _into(loops[output.name])
    return [(i, op) for i, op in enumerate(side.graph.get_operations()) if op.name in seen]


def _with_called(op: Any, seen: frozenset[str] = frozenset()) -> Iterator[Any]:
    """Yield an operation and the operations of the functions that it calls."""
    yield op
    for value in op.node_def.attr.values():
        for function in (value.func, *value.list.func):
            if function.name and function.name not in seen:
                inner = op.graph._get_function(function.name)
                for other in () if inner is None else inner.graph.get_operations():
                    yield from _with_called(other, seen | {function.name})


def _followed(who: Any, work: Callable[[], Axes]) -> Axes:
    try:
        return work()
    except Refusal as refusal:
        raise NotAdmitted(refusal.reason, who, str(refusal)) from refusal
    except (LostAxisError, ValueError) as error:
        raise NotAdmitted(
            Reason.UNPROVEN, who, f"uses a constant through which the time axis cannot be followed ({error})"
        ) from error


def _into(call: CutCall) -> list[Any]:
    mask = [] if call.mask is None else [call.mask]
    return [*call.sequences, *mask, *call.initial, *call.after]


def _of_step(one: Any, two: Any, call: CutCall) -> Data:
    found = sizes(one, two)
    if not found or not all(size.is_same for size in found[1:]):
        raise NotAdmitted(Reason.LENGTH, call.layer, "has a state or an input that depends on the length")
    return Data(((BATCH,), *(normal((size.first,)) for size in found[1:])))


def _keeps_rows(axes: Axes) -> bool:
    """Whether the rows are the outermost axis of one time step: only the time axis may come before them."""
    outer = itertools.takewhile(lambda factor: factor != BATCH, (factor for dim in axes for factor in dim))
    return all(isinstance(factor, Time) and factor.per == 1 for factor in outer)


def captured(side: Cut) -> dict[str, Any]:
    """Return the values captured by a graph, by the names of their placeholders."""
    return {inner.name: value for value, inner in side.graph.captures}


def _variable(op: Any, scope: Cut) -> str:
    """Return the name of the variable that an operation writes to."""
    handles = {inner.name: value for value, inner in scope.graph.captures}
    handle = handles.get(op.inputs[0].name) if op.inputs else None
    for variable in scope.function.variables:
        if handle is not None and variable.handle is handle:
            return str(variable.name)
    return str(op.type)


def blamed(first: Cut, second: Cut) -> Callable[[int, int], Any]:
    """Return a function that finds the layer at fault where two graphs diverge: the earlier of the two layers there."""

    def layer(index: int, other: int) -> Any:
        one, two = first.owner(index), second.owner(other)
        is_over = any(layer is two and end <= index for _, end, layer in first.owners)
        return two if is_over else one

    return layer


def side_by_side(
    first: Sequence[tuple[int, Any]],
    second: Sequence[tuple[int, Any]],
    at_fault: Callable[[int, int], Any],
) -> Iterable[tuple[int, Any, Any]]:
    """Yield the operations of both graphs in pairs.

    Raises:
        NotAdmitted: the graphs differ in their operations or the order of these.
    """
    for (index, one), (other, two) in zip(first, second, strict=False):
        if one.type != two.type or len(one.inputs) != len(two.inputs):
            raise NotAdmitted(Reason.LENGTH, at_fault(index, other), _OTHERWISE)
        yield index, one, two
    if len(first) != len(second):
        ended = min(len(first), len(second))
        index, other = (ops[min(ended, len(ops) - 1)][0] for ops in (first, second))
        raise NotAdmitted(Reason.LENGTH, at_fault(index, other), _OTHERWISE)


class _Frame:
    """The values of the tensors of one pair of graphs: those of the model or of a called function."""

    def __init__(
        self, walk: _Walk, values: dict[str, _Value], evaluators: tuple[Evaluator, Evaluator]
    ) -> None:
        self.walk, self.values, self.evaluators = walk, values, evaluators
        self.twins: dict[str, str] = {}
        """Tensors of the second graph by their counterparts in the first: both must have the same connections."""

    def pair(self, ones: Iterable[Any], twos: Iterable[Any]) -> None:
        """Pair the tensors of the two graphs."""
        self.twins.update((one.name, two.name) for one, two in zip(ones, twos, strict=False))

    def require_alike(self, ones: Iterable[Any], twos: Iterable[Any]) -> None:
        """Refuse data with another source in the second graph; constants are compared by their values."""
        first, second = list(ones), list(twos)
        if len(first) != len(second):
            raise Refusal(Reason.LENGTH, _OTHERWISE)
        for one, two in zip(first, second, strict=True):
            if isinstance(self.values.get(one.name), Data) and self.twins.get(one.name) != two.name:
                raise Refusal(Reason.LENGTH, _OTHERWISE)

    def enter(self, one: Any, two: Any) -> None:
        """Derive the results of one operation.

        Raises:
            Refusal: the proof does not accept the operation.
        """
        if any(kind in one.type for kind in _DRAWS) and not one.type.startswith("Stateless"):
            raise Refusal(Reason.RANDOM, "draws random numbers")
        if one.type in _PYTHON:
            raise Refusal(
                Reason.PYTHON, "runs Python code when it is called (tf.py_function, tf.numpy_function)"
            )
        if one.op_def.is_stateful and one.type not in _READS and one.type not in RULES:
            raise Refusal(
                Reason.UNPROVEN,
                f"uses the operation {one.type}, which may return a different result each time",
            )
        self.pair(one.outputs, two.outputs)
        self.require_alike(one.inputs, two.inputs)
        if one.type == "TensorListReserve":
            self.values[one.outputs[0].name] = Items((), is_empty=True)
            return
        inputs = [] if one.type in OF_SHAPES else [self.values.get(value.name) for value in one.inputs]
        if any(value is None for value in inputs):
            raise Refusal(Reason.UNPROVEN, f"uses the result of an unknown operation ({one.type})")
        if not any(isinstance(value, Data) for value in inputs):
            if len(one.outputs) != len(two.outputs):
                raise Refusal(Reason.LENGTH, f"depends on the number of time steps ({one.type})")
            if one.type in ACCUMULATING and self._grows(one, two, inputs):
                return
            for result, other in zip(one.outputs, two.outputs, strict=True):
                self.values.setdefault(result.name, Const(result, other, self.evaluators))
            return
        try:
            results = self._results(one, two, [value for value in inputs if value is not None])
        except (LostAxisError, ValueError, IndexError) as error:
            raise Refusal(
                Reason.UNPROVEN,
                f"computes something through which the time axis cannot be followed ({one.type}: {error})",
            ) from error
        for i, (result, value) in enumerate(zip(one.outputs, results, strict=False)):
            self.values[result.name] = value
            if isinstance(value, Data):  # A function that it calls may look ahead.
                self._look(one, i, value, "")

    def _grows(self, one: Any, two: Any, inputs: Sequence[Any]) -> bool:
        """Whether an operation accumulates equal constants along the time axis; then its result is data.

        So a model counts its time steps: ``cumsum(ones_like(x))``. It is a constant that differs for each of them.
        """
        constant, axis = inputs
        try:
            axes = tuple(map(self.walk.scales.factors, constant.shape()))
            Call(one, two, (), self.walk.scales).even(constant, axes)
            (result,) = self._results(one, two, [Data(axes), axis])
        except (Refusal, LostAxisError, ValueError):
            return False
        if one.name not in self.walk.needs:  # It accumulates along another axis.
            return False
        self.values[one.outputs[0].name] = result
        return True

    def _results(self, one: Any, two: Any, inputs: Sequence[_Value]) -> list[_Value]:
        if one.type in _CALLS:
            return self._called("f", one, two, inputs)
        if one.type in LOOPS and any(isinstance(value, Items) and value.over_time for value in inputs):
            return self._scanned(Loop(one, two, inputs, self.values, self.walk.scales))
        if one.type in LOOPS:
            return self._looped(one, two, inputs)
        rule = RULES.get(one.type)
        if rule is None and any(kind in one.type for kind in _UNFOLLOWED):
            raise Refusal(
                Reason.UNPROVEN,
                f"uses a TensorFlow branch or list (tf.cond, tf.TensorArray: {one.type}), which the proof does not follow",
            )
        if rule is None:
            raise Refusal(
                Reason.UNPROVEN,
                f"uses the operation {one.type}, which is not known to treat every time step and every row independently",
            )
        if attributes(one) != attributes(two):
            raise Refusal(Reason.LENGTH, f"depends on the number of time steps ({one.type})")
        try:
            return self._ruled(rule, one, two, inputs, {})
        except Refusal as refusal:
            numbers = self._numbers(one, inputs) if refusal.reason is Reason.POSITION else {}
            if not numbers:
                raise
        return self._ruled(rule, one, two, inputs, numbers)

    def _numbers(self, op: Any, inputs: Sequence[_Value]) -> dict[int, Numbered]:
        """Return the constant inputs that the number of the time step determines."""
        if op.type not in (BROADCAST | {"ConcatV2", "Pack"}) - {"AddN"} or self is not self.walk.frame:
            return {}
        found = (
            (i, numbered(value, self.values, self.walk.scales) if isinstance(value, Const) else None)
            for i, value in enumerate(inputs)
        )
        return {i: number for i, number in found if number is not None}

    def _ruled(
        self, rule: Rule, one: Any, two: Any, inputs: Sequence[_Value], numbers: Mapping[int, Numbered]
    ) -> list[_Value]:
        """Apply a rule; constants that the number of the time step determines are data, which need not wait."""
        inputs = without_unknown(one.type, inputs, numbers)
        inner, needs = aligned(one.type, inputs, holds=self.walk.holds)
        if numbers:
            others = [(i, value) for i, value in enumerate(inner) if isinstance(value, Data)]
            time = next(filter(None, (counted_by(value.axes) for _, value in others)), None)
            beside = {i: number.beside(time) for i, number in numbers.items()}
            for place, number in beside.items():
                inner[place] = number.data
            needs.append(Need(Memory.COUNT, MAX_NUMBER, others[0][0]))
            self.walk.numbers[one.name] = beside
        call = Call(one, two, tuple(inner), self.walk.scales, holds=self.walk.holds)
        spent = self._spent(one, inputs, needs)
        ends = any(value.ends for value in inputs if isinstance(value, Data))
        results: list[_Value] = []
        for i, found in enumerate(rule(call)):
            if isinstance(found, Const):
                results.append(found)
                continue
            data = found if isinstance(found, Data) else Data(found, ends)
            if data.before is Before.CONSTANT:
                data = dataclasses.replace(data, before=early_values(call, data, is_numbered=bool(numbers)))
            results.append(self._checked(call, i, data))
            self._look(one, i, data, call.notes.looks)
            if spent is not None:
                self.walk.spent[one.outputs[i].name] = spent
        self._keep(one, inputs, with_since([*needs, *call.notes.needs], inputs))
        return results

    def _spent(self, op: Any, inputs: Sequence[_Value], needs: Sequence[Need]) -> tuple[int, int] | None:
        """Return where padding waits for a value without a time axis: here, or where it did before."""
        is_static = any(isinstance(value, Data) and not value.has_time for value in inputs)
        if is_static and (waits := [need.rows for need in needs if need.kind is Memory.DELAY]):
            return self.walk.index, max(waits)
        return next(filter(None, (self.walk.spent.get(value.name) for value in op.inputs)), None)

    def _look(self, op: Any, i: int, data: Data, clause: str) -> None:
        """Remember why a result looks ahead: an input did already, or this operation does."""
        time = time_of(data.axes)
        if time is not None and time.start > 0:
            before = (self.walk.looks.get(value.name) for value in op.inputs)
            here = (self.walk.index, clause or "moves the time axis")
            self.walk.looks.setdefault(op.outputs[i].name, next(filter(None, before), here))

    def _keep(self, op: Any, inputs: Sequence[_Value], needs: Sequence[Need]) -> None:
        """Remember what an operation needs, after checking that each row can keep its own.

        Raises:
            Refusal: another axis than time comes before the rows, or it is in a loop or a called function.
        """
        for need in needs:
            value = inputs[need.input]
            if self is not self.walk.frame or not isinstance(value, Data) or not _keeps_rows(value.axes):
                raise Refusal(
                    Reason.UNPROVEN,
                    f"looks back in a way that no session can keep ({op.type} {need.kind.name})",
                )
            if begins_with(value, Before.UNKNOWN):
                raise Refusal(Reason.TIME, _AROUND)
        if needs:
            self.walk.needs[op.name] = tuple(needs)

    def _checked(self, call: Call, i: int, data: Data) -> Data:
        """Check the rules for every result of every operation."""
        if not isinstance(data, Items) and [self.walk.scales.size(dim) for dim in data.axes] != call.out(i):
            raise LostAxisError("the axes do not make up the shape")
        found = list(labels(data.axes))
        if found.count(BATCH) != 1:
            raise Refusal(Reason.ROWS, "relates the rows of the batch to each other")
        times = sum(isinstance(factor, Time) for factor in found)
        if times > 1:
            raise Refusal(Reason.PAIRS, "relates all time steps to each other")
        if times and data.ends:
            raise Refusal(Reason.END, "spreads a value of the whole sequence over its time steps")
        return data

    def _looped(self, one: Any, two: Any, inputs: Sequence[_Value]) -> list[_Value]:
        """Walk through a loop by iteration: their number must not depend on data or on the number of time steps."""
        values = list(inputs)
        for _ in range(_MAX_TURNS):
            (is_running,) = self._called("cond", one, two, values)
            if isinstance(is_running, Data):
                raise Refusal(
                    Reason.ROWS, "runs a loop whose end depends on the values of all rows and time steps"
                )
            first, second = (bool(value) for value in is_running.arrays())
            if first != second:
                raise Refusal(Reason.LENGTH, "runs a loop with one iteration per time step or row")
            if not first:
                return values
            values = self._called("body", one, two, values)
        raise Refusal(
            Reason.UNPROVEN,
            f"runs a loop of more than {_MAX_TURNS} iterations, which the proof does not follow",
        )

    def _scanned(self, loop: Loop) -> list[_Value]:
        """Walk through one iteration of a loop over time."""
        if self is not self.walk.frame:
            raise loop.refusal
        first, second = loop.bodies
        frame = _Frame(self.walk, dict(loop.values), (Evaluator(loop.given[0]), Evaluator(loop.given[1])))
        frame.pair(first.graph.inputs, second.graph.inputs)
        for _, one, two in side_by_side(*loop.operations, lambda _one, _two: None):
            if one.outputs[0].name in loop.values:
                frame.pair(one.outputs, two.outputs)
            elif one.type != "Placeholder" or one.outputs[0].name in loop.given[0]:
                frame.enter(one, two)
        frame.require_alike(first.results, second.results)
        results = loop.results(frame.values)
        self.walk.needs[loop.name], self.walk.scans[loop.name] = loop.needs, loop.scan(frame.values)
        return results

    def _called(self, name: str, one: Any, two: Any, inputs: Sequence[_Value]) -> list[_Value]:
        """Walk through the function in the attribute ``name``."""
        graphs = [op.graph._get_function(op.get_attr(name).name).graph for op in (one, two)]
        values: dict[str, _Value] = {}
        given: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        for inner, other, value in zip(graphs[0].inputs, graphs[1].inputs, inputs, strict=True):
            if isinstance(value, Data):
                values[inner.name] = value
            else:
                given[0][inner.name] = value.evaluators[0].value(value.first)
                given[1][other.name] = value.evaluators[1].value(value.second)
        frame = _Frame(self.walk, values, (Evaluator(given[0]), Evaluator(given[1])))
        frame.pair(graphs[0].inputs, graphs[1].inputs)
        ops = [needed_by(graph.outputs, graph) for graph in graphs]
        for _, first, second in side_by_side(ops[0], ops[1], lambda _one, _two: None):
            frame.enter(first, second)
        frame.require_alike(graphs[0].outputs, graphs[1].outputs)
        if any(output.name not in frame.values for output in graphs[0].outputs):
            raise Refusal(Reason.UNPROVEN, "returns the result of an unknown function")
        return [frame.values[output.name] for output in graphs[0].outputs]
