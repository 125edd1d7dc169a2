"""The states of operations that look back: their names, shapes and values before the first time step."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.compile.causality.axes import Axes, by_elements, elements, time_of
from stepwell_server.compile.causality.call import Memory, Need
from stepwell_server.compile.causality.cut import Cut
from stepwell_server.compile.causality.numbers import MAX_NUMBER
from stepwell_server.compile.causality.proof import NotAdmitted, Proof, needed
from stepwell_server.compile.causality.refusals import Reason
from stepwell_server.compile.causality.values import Before, Const, Data
from stepwell_server.compile.graph.plan import Plan
from stepwell_server.compile.graph.samples import plain_dtype
from stepwell_server.compile.graph.tensorflow_setup import keras, tf
from stepwell_server.compile.streaming.operations import gap_of
from stepwell_server.compile.streaming.replay import first_elements, plain_sizes, reduced
from stepwell_server.compile.streaming.step import Slot, trace_step
from stepwell_server.program import StateSpec

Array = npt.NDArray[np.generic]
_PARTS = {
    Memory.DELAY: "last",
    Memory.WINDOW: "last",
    Memory.TOTAL: "total",
    Memory.CARRY: "carry",
    Memory.FIRST: "first",
    Memory.COUNT: "steps",
    Memory.SINCE: "steps",
}
_COUNTS = (Memory.COUNT, Memory.SINCE)
#: Windows of at least this many rows are rings: less is copied and stored for a step than of a whole window.
RING_ROWS = 4
#: They keep the order of the elements of one row.
_MOVING = {"ExpandDims", "Identity", "Reshape", "Squeeze"}


class StreamingMemory:
    """All states of operations that look back, of one model."""

    def __init__(self, side: Cut, proof: Proof, taken: Collection[str]) -> None:
        """``side`` is the first graph of the proof, ``taken`` are the names of other states.

        Raises:
            NotAdmitted: no session can keep the values of an operation.
        """
        self._side, self._proof = side, proof
        self._slots = _slots(side, proof, taken)

    @property
    def steps(self) -> int:
        """The number of time steps that the model leaves out somewhere: Keras may fail on fewer."""
        return self._proof.steps

    def added_to(self, plan: Plan) -> Plan:
        """Return the plan with these states behind its own, and with the values that the weights give them now."""
        specs = tuple(slot.spec for slot in self._slots)
        values = _initial(self._side, self._proof, self._slots)
        return dataclasses.replace(
            plan, state=(*plan.state, *specs), initial=(*plan.initial, *values), has_memory=True
        )

    @property
    def numbers_steps(self) -> bool:
        """Whether the model counts all time steps."""
        return any(slot.need.rows == MAX_NUMBER for slot in self._slots)

    def late(self, states: Sequence[Array], numbers: npt.NDArray[np.float64]) -> list[Array]:
        """Return states, ``(rows, ...)``, of which each row has counted up to a number, if it counts all time steps."""
        before = len(states) - len(self._slots)
        counts = np.minimum(numbers, MAX_NUMBER).astype(np.int32)
        own = zip(self._slots, states[before:], strict=True)
        return [
            *states[:before],
            *(counts if slot.need.rows == MAX_NUMBER else value for slot, value in own),
        ]

    def trace(self, plan: Plan) -> Any:
        """Return the concrete function of one time step, as `graph.trace.trace` does; ``plan`` has these states.

        Raises:
            NotAdmitted: an operation cannot be created for one time step.
        """
        return trace_step(plan, self._side, self._proof, self._slots)


def _slots(side: Cut, proof: Proof, taken: Collection[str]) -> tuple[Slot, ...]:
    """Return the states of all operations, in the order of the graph; ``taken`` are the names of other states.

    Raises:
        NotAdmitted: no session can keep a value of that type.
    """
    found: list[Slot] = []
    used = set(taken)
    for owner, index, tensors in _owners(side):
        for need in proof.needs.get(owner, ()):
            tensor = tensors[need.input]
            data = proof.values[tensor.name]
            if need.kind is Memory.CARRY:
                scan = proof.scans[owner]
                tensor, data = scan.first[need.input], Data(scan.axes[need.input])
            elif tensor.dtype == tf.variant:  # A list of tensors.
                tensor = tensor.graph.get_operation_by_name(owner).outputs[0]
            if not isinstance(data, Data):  # It accumulates constants; its result has their axes.
                data = proof.values[tensor.graph.get_operation_by_name(owner).outputs[0].name]
            assert isinstance(data, Data)
            if need.per > 1:
                data = dataclasses.replace(data, axes=by_elements(data.axes))
            if not (tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_bool):
                raise NotAdmitted(Reason.UNPROVEN, side.owner(index), f"keeps {tensor.dtype.name} values")
            name = _free(f"{_path(side, index)}/{_PARTS[need.kind]}", used)
            used.add(name)
            dtype = plain_dtype(keras.backend.standardize_dtype(tensor.dtype))
            gap = _gap(side, owner, need, data)
            spec = StateSpec(
                name,
                _shape(need, data.axes),
                "int32" if need.kind in _COUNTS else dtype,
                need.rows if gap else 0,
                gap if need.rows >= RING_ROWS else 0,
            )
            found.append(Slot(owner, need, tensor, data, gap, spec))
    return tuple(found)


def _initial(side: Cut, proof: Proof, made: Collection[Slot]) -> tuple[Array, ...]:
    """Return the values of states before the first time step.

    A window then holds what its input has in front of the first time step: the padding, and what layers made of it. A
    total is that of those elements. They depend on no input of the model.
    """
    ahead = {slot.spec.name: slot for slot in made if _known(slot) and not _is_of_zeros(proof, slot)}
    values = first_elements(
        side,
        {name: (slot.tensor, slot.data, _known(slot)) for name, slot in ahead.items()},
        _of_loops(side, proof),
    )
    found: list[Array] = []
    for slot in made:
        value = np.zeros(slot.spec.shape, slot.spec.dtype)
        begun = proof.values[slot.tensor.name]
        if slot.need.kind is Memory.CARRY and isinstance(begun, Const):
            value = np.asarray(reduced(begun, slot.data.axes)[0], value.dtype)
        rows = values.get(slot.spec.name, value[np.newaxis][:0])
        if slot.need.kind is Memory.TOTAL:
            is_product = side.graph.get_operation_by_name(slot.owner).type == "Cumprod"
            combine: Any = np.prod if is_product else np.sum
            value = np.asarray(combine(rows, 0, dtype=value.dtype))
        elif len(rows):
            kept = rows[-slot.need.rows :]
            value[len(value) - len(kept) :] = kept
        found.append(value)
    return tuple(found)


def _of_loops(side: Cut, proof: Proof) -> set[str]:
    """Return the results of loops over time, which begin with the first time step."""
    made = [op for _, op in needed(side) if op.name in proof.scans]
    lists = (op for _, op in needed(side) if op.type in ("TensorListStack", "TensorListGetItem"))
    made += [op for op in lists if op.inputs[0].op in made]
    return {output.name for op in made for output in op.outputs if output.dtype != tf.variant}


def _known(slot: Slot) -> int:
    """Return how many elements of its input come before the first time step."""
    time = time_of(slot.data.axes)
    is_filled = slot.need.kind not in (Memory.FIRST, *_COUNTS) and slot.data.before is not Before.ROW
    return max(-time.start, 0) if is_filled and time is not None else 0


def _is_of_zeros(proof: Proof, slot: Slot) -> bool:
    """Whether padding with zeros made all that it remembers; then nothing has to be computed."""
    if slot.need.kind is Memory.TOTAL:
        return False
    op = slot.tensor.op
    while op.type in _MOVING:
        op = op.inputs[0].op
    if op.type != "Pad" or op.inputs[1].op.type != "Const":
        return False
    padded = proof.values[op.outputs[0].name]
    assert isinstance(padded, Data)
    place = next(i for i, dim in enumerate(padded.axes) if time_of([dim]) is not None)
    time = elements(padded.axes[place])  # Where a time step brings several, the padding counts each.
    count = tf.make_ndarray(op.inputs[1].op.get_attr("value"))[place, 0]
    return time is not None and bool(count >= -time.start)


def _gap(side: Cut, owner: str, need: Need, data: Data) -> int:
    """Return which rows of a window over time are read: every so many, from the oldest on; 0: it is none."""
    if need.kind not in (Memory.DELAY, Memory.WINDOW) or need.per > 1:
        return 0
    op = None if need.kind is Memory.DELAY else side.graph.get_operation_by_name(owner)
    return gap_of(need, op, data.axes)


def _shape(need: Need, axes: Axes) -> tuple[int, ...]:
    if need.kind in _COUNTS:
        return ()
    apart = need.per > 1  # Then it keeps elements, of which a time step brings several.
    sizes = plain_sizes(dim for dim in axes if not (apart and time_of([dim])))
    one = need.kind in (Memory.TOTAL, Memory.CARRY, Memory.FIRST)
    return tuple(sizes) if one else (need.rows, *sizes)


def _owners(side: Cut) -> Iterator[tuple[str, int, list[Any]]]:
    """Yield the keys of `Proof.needs`, each with the place of an operation and the inputs of the owner."""
    loops = {tensor.op.name: call for call in side.calls for tensor in (call.outputs, *call.last)}
    outputs = {tensor.op.name: tensor for tensor in side.outputs.values()}
    seen: set[str] = set()
    for index, op in needed(side):
        call = loops.get(op.name)
        owner = op.name if call is None else call.outputs.op.name  # Perhaps only its last output is needed.
        if call is None:
            yield owner, index, list(op.inputs)
        elif owner not in seen:
            seen.add(owner)
            yield owner, index, [*call.sequences, *([] if call.mask is None else [call.mask])]
        if op.name in outputs:
            for tensor in {x.name: x for x in side.outputs.values() if x.op is op}.values():
                yield tensor.name, index, [tensor]


def _path(side: Cut, index: int) -> str:
    """Return the names of the layers that created an operation, outer ones first, without the model itself."""
    inside = [layer for first, end, layer in side.owners if first <= index < end]
    names = [layer.name for layer in reversed(inside[:-1])]
    return "/".join(names) or inside[-1].name


def _free(name: str, used: Collection[str]) -> str:
    stem, _, part = name.rpartition("/")
    number, candidate = 1, name
    while candidate in used:
        number += 1
        candidate = f"{stem}#{number}/{part}"
    return candidate
