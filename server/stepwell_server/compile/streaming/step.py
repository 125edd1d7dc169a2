"""One time step of a model, made from the graph of many."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from stepwell_server.compile.causality.axes import BATCH, TIME, Axes, time_of
from stepwell_server.compile.causality.call import Memory, Need
from stepwell_server.compile.causality.cut import Cut, CutCall
from stepwell_server.compile.causality.proof import NotAdmitted, Proof, needed
from stepwell_server.compile.causality.refusals import Reason
from stepwell_server.compile.causality.values import Before, Const, Data
from stepwell_server.compile.graph.plan import CarriedState, Plan
from stepwell_server.compile.graph.tensorflow_setup import tf
from stepwell_server.compile.graph.trace import chosen
from stepwell_server.compile.streaming.iteration import iterated
from stepwell_server.compile.streaming.numbers import constant_of, counted
from stepwell_server.compile.streaming.operation import Operation, States, StatesBefore, spread
from stepwell_server.compile.streaming.operations import CannotStreamError, early, make
from stepwell_server.compile.streaming.replay import Constants, is_fixed, reduced
from stepwell_server.program import StateSpec


@dataclasses.dataclass(frozen=True)
class Slot:
    """One state of one operation."""

    owner: str
    """The key of `Proof.needs`."""
    need: Need
    tensor: Any
    """The input that it remembers."""
    data: Data
    gap: int
    """It reads every so many rows of a window."""
    spec: StateSpec


def trace_step(plan: Plan, side: Cut, proof: Proof, slots: Sequence[Slot]) -> Any:
    """Return the concrete function of one time step, as `graph.trace.trace` does.

    Args:
        plan: the plan; its last states are those of ``slots``.
        side: the first graph of the proof.
        proof: what is known of that graph.
        slots: the states of operations that look back.

    Raises:
        NotAdmitted: an operation cannot be created for one time step.
    """

    def step(**tensors: Any) -> dict[str, Any]:
        return _Streaming(plan, side, proof, slots, tensors).run()

    signature = {
        f"in_{i}": tf.TensorSpec([None, *x.shape], x.dtype, f"in_{i}") for i, x in enumerate(plan.inputs)
    }
    signature |= {
        f"state_{i}": tf.TensorSpec([None, *x.taken.shape], x.dtype, f"state_{i}")
        for i, x in enumerate(plan.state)
    }
    return tf.function(step, autograph=False).get_concrete_function(**signature)


class _Streaming:
    """One trace in progress."""

    def __init__(
        self, plan: Plan, side: Cut, proof: Proof, slots: Sequence[Slot], tensors: Mapping[str, Any]
    ) -> None:
        self._plan, self._side, self._proof, self._slots = plan, side, proof, slots
        self._before = [tensors[f"state_{i}"] for i in range(len(plan.state))]
        self._after: list[Any] = [None] * len(plan.state)
        own = self._before[len(plan.state) - len(slots) :]
        self._states = States(
            {_key(slot): value for slot, value in zip(slots, own, strict=True)},
            {_key(slot): slot.gap for slot in slots},
            {_key(slot) for slot in slots if slot.spec.gap},
        )
        self._constants = Constants(side)
        self._made: dict[str, Any] = {}
        self._early: dict[str, Any] = {}
        self._carried = _carried(plan, side)
        self._unmade = {name for scan in proof.scans.values() for name in scan.unmade}
        for i, tensor in enumerate(side.inputs):
            value = tensors[f"in_{i}"]
            self._made[tensor.name] = tf.expand_dims(value, 1) if plan.inputs[i].temporal else value

    def run(self) -> dict[str, Any]:
        """Create all operations; return the results by name."""
        places = {
            tensor.op.name: call
            for call in self._side.calls
            for tensor in (*call.now, *call.before, call.outputs, *call.last)
        }
        for index, op in needed(self._side):
            if op.name in places:
                call = places[op.name]
                if call.now[0].name not in self._made:
                    self._begin(call)
                if op.outputs[0].name not in self._made:
                    self._end(call)
            elif not any(output.name in self._made for output in op.outputs):
                self._make(op, index)
        results: dict[str, Any] = {}
        for i, (spec, tensor) in enumerate(zip(self._plan.outputs, self._side.outputs.values(), strict=True)):
            value = self._input(tensor.name, 0, tensor, self._proof.outputs[spec.name].axes)
            results[f"out_{i}"] = tf.cast(tf.reshape(value, [-1, *spec.shape]), spec.dtype)
        own = len(self._plan.state) - len(self._slots)
        after = [*self._after[:own], *(self._states.after[_key(slot)] for slot in self._slots)]
        for i, (state, value) in enumerate(zip(self._plan.state, after, strict=True)):
            results[f"next_{i}"] = tf.cast(value, state.dtype)
        self._constants.watch_weights()
        return results

    def _make(self, op: Any, index: int) -> None:
        is_data = any(isinstance(self._proof.values.get(output.name), Data) for output in op.outputs)
        if not is_data or op.name in self._unmade:
            return
        needs = self._proof.needs.get(op.name, ())
        values, states = self._proof.values, self._states
        try:
            numbers = self._numbers(op, needs)
            held = {
                need.input: self._before_first(op.inputs[need.input], index)
                for need in _held(needs, op, values)
            }
            scan = self._proof.scans.get(op.name)
            results = (
                make(Operation(op, values, self._made, self._constants, states, needs, numbers, held))
                if scan is None
                else iterated(op, scan, self._made, self._constants, states, needs)
            )
        except CannotStreamError as error:
            raise NotAdmitted(Reason.UNPROVEN, self._side.owner(index), str(error)) from error
        self._made.update((made.name, result) for made, result in zip(op.outputs, results, strict=False))

    def _before_first(self, tensor: Any, index: int) -> Any:
        """Return the value of a tensor before the first time step, which is that of its row, in the shape of one step.

        Raises:
            NotAdmitted: an operation cannot be created.
        """
        values = self._proof.values
        wanted = _without(tensor, values, self._early)
        for op in wanted:
            made = {
                value.name: self._early.get(value.name, self._made.get(value.name)) for value in op.inputs
            }
            needs = tuple(need for need in self._proof.needs.get(op.name, ()) if need.kind is Memory.WINDOW)
            try:
                one = Operation(op, values, made, self._constants, StatesBefore(self._states), needs)
                self._early[op.outputs[0].name] = early(one, self._states.firsts)
            except CannotStreamError as error:
                raise NotAdmitted(Reason.UNPROVEN, self._side.owner(index), str(error)) from error
        return self._early[tensor.name]

    def _numbers(self, op: Any, needs: tuple[Need, ...]) -> dict[int, Any]:
        """Return the inputs of an operation that the number of the time step determines."""
        found = self._proof.numbers.get(op.name, {})
        out = self._proof.values[op.outputs[0].name]
        if not found or not isinstance(out, Data):
            return {}
        number, values = counted(op, needs, self._states), self._proof.values
        axes = list(out.axes)
        if op.type == "Pack":
            del axes[op.get_attr("axis")]
        return {
            i: constant_of(each, op.inputs[i], number, tuple(axes), values, self._constants)
            for i, each in found.items()
        }

    def _input(self, owner: str, i: int, tensor: Any, axes: Axes) -> Any:
        """Return an input of a loop, or an output of the model, after it waited if it has to."""
        value = self._proof.values[tensor.name]
        if isinstance(value, Data):
            needs = self._proof.needs.get(owner, ())
            is_held = any(need.kind is Memory.SINCE and need.input == i for need in needs)
            before = self._before_first(tensor, 0) if is_held else None
            return self._states.delayed(owner, needs, i, self._made[tensor.name], value.axes, before)
        like = next(iter(self._made.values()))
        array = value.array if is_fixed(value) else reduced(value, axes)
        return spread(array, tensor.dtype, axes, like)

    def _begin(self, call: CutCall) -> None:
        """Give a cell its time step and its state."""
        for i, (now, tensor) in enumerate(zip(call.now, call.sequences, strict=True)):
            self._made[now.name] = tf.squeeze(
                self._input(call.outputs.op.name, i, tensor, self._axes(tensor)), 1
            )
        carried = self._carried[id(call.layer), call.number]
        owner, states = call.outputs.op.name, self._before[carried.first :]
        for place, state, first in zip(call.before, states, call.initial, strict=False):
            before = tf.cast(state, place.dtype)
            if isinstance(self._proof.values[first.name], Data):
                needs = self._proof.needs[owner]
                before = self._states.begun(owner, needs, before, self._made[first.name])
            self._made[place.name] = before

    def _end(self, call: CutCall) -> None:
        """Take the output and the state of a cell, as `graph.trace` does."""
        carried = self._carried[id(call.layer), call.number]
        stop = carried.first + len(carried.dtypes)
        output, *after = (self._input("", 0, tensor, ((BATCH,), *step_axes(tensor))) for tensor in call.after)
        before = [self._made[place.name] for place in call.before]
        if call.mask is not None:
            mask = self._input(call.outputs.op.name, len(call.sequences), call.mask, self._axes(call.mask))
            present = tf.reshape(mask, [-1])
            after = [chosen(present, new, old) for new, old in zip(after, before, strict=True)]
            held = (
                tf.cast(self._before[stop - 1], output.dtype)
                if carried.keeps_output
                else tf.zeros_like(output)
            )
            output = chosen(present, output, held)
        self._after[carried.first : stop] = [*after, output] if carried.keeps_output else after
        self._made[call.outputs.name] = tf.expand_dims(output, 1)
        for place, value in zip(call.last, (output, *after), strict=True):
            self._made[place.name] = value

    def _axes(self, tensor: Any) -> Axes:
        value = self._proof.values[tensor.name]
        return value.axes if isinstance(value, Data) else ((BATCH,), (TIME,), *step_axes(tensor)[1:])


def _held(needs: Sequence[Need], op: Any, values: Mapping[str, Data | Const]) -> list[Need]:
    """Return the needs of inputs that have a value of each row before the first time step."""
    found = [need for need in needs if need.kind is Memory.SINCE]
    given = [(need, values[op.inputs[need.input].name]) for need in found]
    return [need for need, value in given if isinstance(value, Data) and value.before is Before.ROW]


def _without(tensor: Any, values: Mapping[str, Data | Const], early: Mapping[str, Any]) -> list[Any]:
    """Return the operations whose results before the first time step are needed for one, dependencies first."""
    found: list[Any] = []
    waiting = [(tensor, False)]
    seen: set[str] = set()
    while waiting:
        current, is_ready = waiting.pop()
        value = values.get(current.name)
        if not isinstance(value, Data) or (time := time_of(value.axes)) is None or time.start >= 0:
            continue
        if is_ready:
            found.append(current.op)
        elif current.name not in seen and current.name not in early:
            seen.add(current.name)
            waiting.append((current, True))
            waiting += [(value, False) for value in current.op.inputs]
    return found


def _key(slot: Slot) -> tuple[str, Need]:
    return slot.owner, slot.need


def step_axes(tensor: Any) -> Axes:
    """Return the plain dimensions behind the first one."""
    return tuple((int(size),) for size in tensor.shape[1:])


def _carried(plan: Plan, side: Cut) -> dict[tuple[int, int], CarriedState]:
    """Return the states of loops by layer and number of the call among those that process the sequence."""
    found: dict[tuple[int, int], CarriedState] = {}
    for call in side.calls:
        numbers = sorted(number for layer, number in plan.carried if layer == id(call.layer))
        found[id(call.layer), call.number] = plan.carried[id(call.layer), numbers[call.number]]
    return found
