"""What the inputs of an operation wait for, and what comes before their first time step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from stepwell_server.compile.causality.axes import LostAxisError, Time, elements, moved, placed, time_of
from stepwell_server.compile.causality.call import Call, Memory, Need
from stepwell_server.compile.causality.numbers import Numbered
from stepwell_server.compile.causality.refusals import Reason, Refusal
from stepwell_server.compile.causality.values import Before, Const, Data, equal

Value = Data | Const
EARLY = "computes padding with a value of the inputs that has no time axis, which a session does not know before its first step"
#: They leave elements out, or put some in front.
_CUTS = {"Slice", "StridedSlice"}
_PADS = {"ConcatV2", "Pad", "PadV2"}


def aligned(kind: str, inputs: Sequence[Value], *, holds: bool = False) -> tuple[list[Value], list[Need]]:
    """Let the inputs of an operation wait for the one that is furthest ahead, so that it sees elements of one place.

    Inputs without a time axis are known only from the first step on. So nothing that is computed with them may be ahead
    of that: elements before the first step must be constants, unless each row ``holds`` its own.
    """
    if kind == "IdentityN":
        return list(inputs), []
    data = [value for value in inputs if isinstance(value, Data)]
    times = [time_of(value.axes) for value in data]
    if len(set(times)) < 2:
        return list(inputs), []
    if any(time is not None and time.per > 1 for time in times):
        return _elements_aligned(inputs)
    holds = holds and not any(value.before is Before.CONSTANTS for value in data)
    starts = {time.start for time in times if time is not None} | (
        {0} if None in times and not holds else set()
    )
    if len(starts) < 2:
        return list(inputs), []
    latest = max(starts)
    found: list[Value] = []
    needs: list[Need] = []
    for i, value in enumerate(inputs):
        time = time_of(value.axes) if isinstance(value, Data) else None
        if isinstance(value, Data) and time is not None and time.start < latest:
            needs.append(Need(Memory.DELAY, latest - time.start, i))
            found.append(dataclasses.replace(value, axes=moved(value.axes, Time(latest, time.extra))))
        else:
            found.append(value)
    return found, needs


def without_unknown(kind: str, inputs: Sequence[Value], numbers: Mapping[int, Numbered]) -> Sequence[Value]:
    """Return the inputs of an operation, without unknown values that it never chooses.

    It chooses by the number of the time step: ``where(arange(T) < 2, 0, roll(x, 2, 1))``. Element ``i`` of the numbers
    stands beside element ``i`` of the values. If those before the first time step are never chosen, any constant may stand
    for them.
    """
    choice = inputs[0] if kind == "SelectV2" and 0 in numbers else None
    if not isinstance(choice, Const):
        return inputs
    place = next(i for i, dim in enumerate(numbers[0].axes) if time_of([dim]))
    found = list(inputs)
    for i, is_chosen in ((1, True), (2, False)):
        value = inputs[i]
        if isinstance(value, Data) and begins_with(value, Before.UNKNOWN):
            time = time_of(value.axes)
            early = range(-time.start if time is not None else 0)
            if not any(np.any(np.take(array, early, place) == is_chosen) for array in choice.arrays()):
                found[i] = dataclasses.replace(value, before=Before.CONSTANTS)
    return found


def early_values(call: Call, result: Data, *, is_numbered: bool) -> Before:
    """Return what a result has before the first time step, if it has anything there.

    Raises:
        Refusal: rows have values of their own there, and other ones too.
    """
    time = time_of(result.axes)
    if time is None or time.start >= 0:
        return Before.CONSTANT
    data = [value for value in call.inputs if isinstance(value, Data)]
    times = [found for value in data if (found := time_of(value.axes)) is not None]
    kinds = {value.before for value in data if (found := time_of(value.axes)) is not None and found.start < 0}
    if Before.UNKNOWN in kinds:
        return Before.UNKNOWN
    if not kinds:
        return Before.CONSTANT if call.kind in _PADS and _is_even(call) else Before.CONSTANTS
    if len(times) < len(data):  # Some have no time axis.
        kinds.add(Before.ROW)
    reach = sum(need.rows for need in call.notes.needs if need.kind is Memory.WINDOW)
    # Windows over other elements too, and padding in front of these.
    is_mixed = any(
        time.start < found.start if call.kind in _CUTS else time.start != found.start + reach
        for found in times
    )
    others = any(need.kind in (Memory.COUNT, Memory.TOTAL) for need in call.notes.needs)
    if is_numbered or is_mixed or others or time.per > 1 or Before.CONSTANTS in kinds:
        if Before.ROW in kinds:
            raise Refusal(Reason.PADDING, EARLY)
        return Before.CONSTANTS
    return Before.ROW if Before.ROW in kinds else Before.CONSTANT


def _is_even(call: Call) -> bool:
    """Whether constants that are joined in front of a sequence are all the same."""
    if call.kind != "ConcatV2":
        return True
    axis = int(call.integers(len(call.inputs) - 1)[0])
    arrays = [value.array for value in call.inputs[:1] if isinstance(value, Const)]
    is_one = isinstance(call.inputs[1], Data)
    return is_one and all(
        equal(array, np.broadcast_to(np.take(array, [0], axis), array.shape)) for array in arrays
    )


def begins_with(value: Data, before: Before) -> bool:
    """Whether a value has elements of a kind before the first time step."""
    time = time_of(value.axes)
    return value.before is before and time is not None and time.start < 0


def with_since(needs: Sequence[Need], inputs: Sequence[Value]) -> list[Need]:
    """Add what tells the rows before the first time step from later ones, where each row of the batch has its own."""
    found = list(needs)
    for need in needs:
        value = inputs[need.input]
        kept = need.kind in (Memory.DELAY, Memory.WINDOW)
        if kept and isinstance(value, Data) and begins_with(value, Before.ROW):
            since = Need(Memory.SINCE, need.rows, need.input)
            if need.per > 1 or any(
                other.kind is Memory.SINCE and other.input == need.input for other in found
            ):
                raise Refusal(Reason.PADDING, EARLY)
            found.append(since)
    return found


def _elements_aligned(inputs: Sequence[Value]) -> tuple[list[Value], list[Need]]:
    """Do the same for inputs of which a time step brings several elements.

    Raises:
        LostAxisError: not as many of each input.
    """
    places = [
        next((i for i, dim in enumerate(value.axes) if time_of([dim])), None)
        if isinstance(value, Data)
        else None
        for value in inputs
    ]
    times: list[Time | None] = []
    for value, place in zip(inputs, places, strict=True):
        time = elements(value.axes[place]) if isinstance(value, Data) and place is not None else None
        if time is None and place is not None:
            raise LostAxisError("time shares its dimension with the rows")
        times.append(time)
    if len({time.per for time in times if time is not None}) > 1:
        raise LostAxisError("two values have different numbers of elements for each time step")
    static = any(
        isinstance(value, Data) and place is None for value, place in zip(inputs, places, strict=True)
    )
    latest = max([0] * static + [time.start for time in times if time is not None])
    found: list[Value] = []
    needs: list[Need] = []
    for i, (value, place, time) in enumerate(zip(inputs, places, times, strict=True)):
        if isinstance(value, Data) and place is not None and time is not None and time.start < latest:
            needs.append(Need(Memory.DELAY, latest - time.start, i, per=time.per))
            moved_time = Time(latest, time.extra, time.per)
            found.append(dataclasses.replace(value, axes=placed(value.axes, place, moved_time)))
        else:
            found.append(value)
    return found, needs
