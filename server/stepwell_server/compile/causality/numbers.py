"""Constants that the number of each time step determines, such as ``arange(T) + 1`` or sinusoidal positions.

A constant with another value for each time step is known for the lengths of the two traces only: nothing says what
follows. But if it was computed from a ``Range`` that begins with the same number and grows by the same amount in both
traces, then its element ``i`` is a function of ``i``, whatever the length. Proof: it is true of the ``Range``, by its
definition. Every operation behind it has a rule, so it treats each time step alone, and its other inputs are constants
that are equal in both traces and at all time steps. It may leave out elements, but add none. So it is true of each
result. A session that counts its time steps
can compute such a constant.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stepwell_server.compile.causality.axes import (
    BATCH,
    Axes,
    Dim,
    LostAxisError,
    Scales,
    Time,
    dim_of,
    elements,
    labels,
    placed,
    time_of,
)
from stepwell_server.compile.causality.call import Call
from stepwell_server.compile.causality.refusals import Reason, Refusal
from stepwell_server.compile.causality.rules import RULES
from stepwell_server.compile.causality.values import Const, Data, attributes, needed_by, sizes

#: Beyond this number of time steps a session counts no further: 24 days at a thousand steps a second.
MAX_NUMBER = 2**31 - 1
_UNLIMITED = (-math.inf, math.inf)
#: Their results have the values of their first input.
_KEEPING = {"BroadcastTo", "Cast", "ExpandDims", "Identity", "Reshape", "Squeeze", "Tile", "Transpose"}


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A constant that the number of the time step determines."""

    values: Mapping[str, Data]
    """The axes of the tensors that it is computed from, and its own, from the ``Range`` on. Rows are left out: all are
    equal."""
    axes: Axes
    rows: int | None = None
    """The dimension of the rows, if it has any."""
    lag: int = 0
    """How much lower than the number of the time step that one is whose elements this step needs."""

    @property
    def data(self) -> Data:
        """Its axes, with those of the rows."""
        rows = self.rows
        return Data(tuple((BATCH,) if i == rows else dim for i, dim in enumerate(self.axes)))

    def beside(self, time: Time | None) -> Numbered:
        """Return it for an operation on data with a time axis, if that has any.

        At time step ``t`` such an operation computes its element ``t - start``. This is element ``t - start + shift`` of
        the ``Range``, where ``shift`` are the numbers that were left out behind it. If a time step brings several
        elements, they are those of a whole time step of the ``Range``.

        Raises:
            Refusal: they are not.
        """
        own = counted_by(self.axes)
        if time is None or own is None or own.per != time.per:
            return self
        lag, rest = divmod(time.start - own.start, own.per)
        if rest:
            apart = abs(time.start - own.start)
            raise Refusal(
                Reason.POSITION,
                f"counts elements beside others, {apart} element{'s'[: apart > 1]} apart, but a time step brings {own.per}",
            )
        place = next(i for i, dim in enumerate(self.axes) if time_of([dim]))
        found = placed(self.axes, place, dataclasses.replace(own, start=time.start))
        return dataclasses.replace(self, axes=found, lag=lag)


def counted_by(axes: Axes) -> Time | None:
    """Return the time axis of a tensor, with all elements that a time step brings in its dimension."""
    dim = next((dim for dim in axes if time_of([dim])), ())
    return elements(dim) or time_of([dim])


def numbered(const: Const, known: Mapping[str, Data | Const], scales: Scales) -> Numbered | None:
    """Return how a constant is determined by the number of the time step, or None.

    Raises:
        Refusal: it is read from a table that later numbers exceed.
    """
    found: dict[str, Data] = {}
    ops = [[op for _, op in needed_by([tensor], tensor.graph)] for tensor in (const.first, const.second)]
    if [op.type for op in ops[0]] != [op.type for op in ops[1]]:
        return None
    try:
        for one, two in zip(*ops, strict=True):
            if not _follow(one, two, found, known, scales):
                return None
    except (Refusal, LostAxisError, ValueError, IndexError):
        return None
    result = found.get(const.first.name)
    if result is None or not any(map(elements, result.axes)):
        return None
    for op in (op for op in ops[0] if op.type == "GatherV2" and op.inputs[1].name in found):
        _require_in_table(op, found, known)
    rows = (i for i, size in enumerate(const.shape()) if size == scales.size((BATCH,)))
    return Numbered(found, result.axes, next(rows, None))


def _follow(
    one: Any, two: Any, found: dict[str, Data], known: Mapping[str, Data | Const], scales: Scales
) -> bool:
    """Derive the results of one operation, if a ``Range`` is behind them; return whether that is known."""
    inputs = [found.get(value.name, known.get(value.name)) for value in one.inputs]
    if one.type == "Range":
        time = _counted(one, two, inputs, scales)
        if time is not None:  # Else its length is another one, or its numbers depend on the length.
            found[one.outputs[0].name] = Data((dim_of(time),))
        return True
    if not any(isinstance(value, Data) for value in inputs):
        return True
    rule = RULES.get(one.type)
    if rule is None or attributes(one) != attributes(two) or any(value is None for value in inputs):
        return False
    call = Call(one, two, tuple(value for value in inputs if value is not None), scales)
    before = [time_of(value.axes) for value in inputs if isinstance(value, Data)]
    several = {
        dim for value in inputs if isinstance(value, Data) for dim in value.axes if _is_of_several(dim)
    }
    for i, result in enumerate(rule(call)):
        data = Data(result) if isinstance(result, tuple) else result
        if isinstance(data, Const):
            continue
        axes = list(labels(data.axes))
        rows = scales.size((BATCH,))  # Repeated for each row in an input, whose axes leave them out.
        is_whole = all(
            size == scales.size(dim) or (size == rows and not dim)
            for size, dim in zip(call.out(i), data.axes, strict=True)
        )
        if not is_whole or data.ends or len(axes) - (BATCH in axes) != 1:
            return False
        if BATCH in axes:
            data = Data(tuple(() if dim == (BATCH,) else dim for dim in data.axes))
            if BATCH in labels(data.axes):
                return False
        if any(time is None or _is_longer(time_of(data.axes), time) for time in before):
            return False
        if one.type != "Reshape" and not several <= set(data.axes):  # It selects or repeats some of them.
            return False
        found[one.outputs[i].name] = data
    return not call.notes.needs


def _require_in_table(op: Any, found: Mapping[str, Data], known: Mapping[str, Data | Const]) -> None:
    """Refuse a look-up of numbers that reach beyond a table, which both traces may be shorter than."""
    table = op.inputs[0]
    axis = known.get(op.inputs[2].name)
    if table.name in found or not isinstance(axis, Const):
        return
    size = table.shape[int(axis.array)]
    least, most = _limits(op.inputs[1], found, known)
    if least < 0 or most >= size:
        raise Refusal(
            Reason.TABLE, f"looks up the number of each time step in a table of {size} rows, which has an end"
        )


def _limits(tensor: Any, found: Mapping[str, Data], known: Mapping[str, Data | Const]) -> tuple[float, float]:
    """Return bounds of the values of a constant, at all time steps that a session can count."""
    if tensor.name not in found:
        value = known.get(tensor.name)
        array = value.array if isinstance(value, Const) else np.empty(0)
        return (float(array.min()), float(array.max())) if array.size else _UNLIMITED
    op = tensor.op
    if op.type == "Range":
        start, growth = (_limits(op.inputs[i], found, known)[0] for i in (0, 2))
        return _fitting(tensor.dtype, sorted((start, start + growth * MAX_NUMBER)))
    if op.type in _KEEPING:
        return _fitting(tensor.dtype, _limits(op.inputs[0], found, known))
    if op.type == "SelectV2" and op.inputs[0].op.type == "Less":
        return _chosen(op, found, known)
    if op.type not in _LIMITS:
        return _UNLIMITED
    return _fitting(tensor.dtype, _LIMITS[op.type](*(_limits(one, found, known) for one in op.inputs)))


def _chosen(op: Any, found: Mapping[str, Data], known: Mapping[str, Data | Const]) -> tuple[float, float]:
    """Return bounds of one or the other, such as of numbers that are not below 0."""
    one, two = (_limits(value, found, known) for value in op.inputs[0].op.inputs)
    other = _limits(op.inputs[2], found, known)
    if one[0] >= two[1]:  # It is never below.
        return other
    chosen = _limits(op.inputs[1], found, known)
    return min(chosen[0], other[0]), max(chosen[1], other[1])


def _fitting(dtype: Any, limits: Sequence[float]) -> tuple[float, float]:
    """Return bounds, or that there are none: integers beyond those of their type begin at the other end."""
    least, most = limits
    is_beyond = dtype.is_integer and not (dtype.min <= least and most <= dtype.max)
    return _UNLIMITED if is_beyond else (least, most)


def _quotient(value: tuple[float, float], divisor: tuple[float, float]) -> tuple[float, float]:
    is_usual = value[0] >= 0 and divisor[0] > 0
    return (value[0] // divisor[1], value[1] // divisor[0]) if is_usual else _UNLIMITED


def _product(one: tuple[float, float], two: tuple[float, float]) -> tuple[float, float]:
    return (one[0] * two[0], one[1] * two[1]) if min(one[0], two[0]) >= 0 else _UNLIMITED


_LIMITS: dict[str, Callable[..., tuple[float, float]]] = {
    "AddV2": lambda one, two: (one[0] + two[0], one[1] + two[1]),
    "Sub": lambda one, two: (one[0] - two[1], one[1] - two[0]),
    "Mul": _product,
    "FloorDiv": _quotient,
    "FloorMod": lambda _, divisor: (0.0, divisor[1] - 1) if divisor[0] > 0 else _UNLIMITED,
    "Minimum": lambda one, two: (min(one[0], two[0]), min(one[1], two[1])),
    "Maximum": lambda one, two: (max(one[0], two[0]), max(one[1], two[1])),
    "ClipByValue": lambda value, least, most: (
        min(max(value[0], least[0]), most[0]),
        min(max(value[1], least[1]), most[1]),
    ),
}


def _is_of_several(dim: Dim) -> bool:
    """Whether it has the elements of time steps, of which each brings several."""
    time = elements(dim)
    return time is not None and time.per > 1


def _is_longer(time: Time | None, before: Time) -> bool:
    """Whether an operation put elements in front of a sequence of numbers, or behind it: they are not counted."""
    return time is None or time.start < before.start or time.start + time.extra > before.start + before.extra


def _counted(one: Any, two: Any, inputs: list[Any], scales: Scales) -> Time | None:
    """Return the time axis of a ``Range`` if it has as many numbers for each time step, and always as many more.

    Only of whole numbers: TensorFlow adds others up, with roundings.
    """
    start, _, step = inputs
    for value in (start, step):
        if not isinstance(value, Const) or not value.is_same or np.any(np.mod(value.array, 1)):
            return None
    (size,) = sizes(one.outputs[0], two.outputs[0])
    per, rest = divmod(size.second - size.first, scales.second.steps - scales.first.steps)
    extra = size.first - per * scales.first.steps
    return Time(0, extra, per) if per > 0 and not rest else None
