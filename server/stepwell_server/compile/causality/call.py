"""One operation as a rule sees it: its inputs, attributes and result shapes in both traces."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stepwell_server.compile.causality.axes import (
    BATCH,
    Axes,
    Axis,
    Dim,
    LostAxisError,
    Pair,
    Scales,
    Time,
    is_plain,
    normal,
)
from stepwell_server.compile.causality.constants import Origin
from stepwell_server.compile.causality.refusals import Reason, Refusal
from stepwell_server.compile.causality.values import Array, Const, Data, equal, sizes


class Memory(enum.Enum):
    """What an operation keeps from step to step."""

    DELAY = "the last rows of an input; it reads the oldest of them instead of the current one"
    WINDOW = "the last rows of an input; it reads all of them and the current one"
    TOTAL = "its last result, to which it adds the current row"
    CARRY = "what a loop hands from one time step to the next"
    FIRST = "the first row of an input, once it came"
    COUNT = "how many time steps passed, up to a bound, to know when padding ends"
    SINCE = "the same, to know when rows that were kept are none from before the first time step"


@dataclasses.dataclass(frozen=True)
class Need:
    """What one operation keeps of one of its inputs."""

    kind: Memory
    rows: int
    input: int = 0
    padding: int = 0
    """Zeros that the operation itself puts in front of its input."""
    per: int = 1
    """How many elements of its input a time step brings: ``rows`` counts elements."""


@dataclasses.dataclass
class Notes:
    """What a rule reports besides the axes of the results."""

    needs: list[Need] = dataclasses.field(default_factory=list)
    looks: str = ""
    """What it does to the time axis, as a clause: part of the message if the model looks ahead because of it."""


Rule = Callable[["Call"], "Sequence[Axes | Data | Const]"]
"""Returns the axes of each result of an operation; results that it omits are unknown."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One operation, in the graphs of the two traces."""

    first: Any
    second: Any
    inputs: tuple[Data | Const, ...]
    scales: Scales
    notes: Notes = dataclasses.field(default_factory=Notes)
    holds: bool = False
    """Rows may have values of their own before the first time step: see `Before.ROW`."""

    @property
    def kind(self) -> str:
        """Type of the operation, as TensorFlow names it."""
        return str(self.first.type)

    def attr(self, name: str) -> Any:
        """Return an attribute, which is the same in both traces."""
        return self.first.get_attr(name)

    def out(self, i: int = 0) -> list[Pair]:
        """Return the sizes of a result."""
        return sizes(self.first.outputs[i], self.second.outputs[i])

    def rank(self, i: int) -> int:
        """Return the number of dimensions of an input."""
        return len(self.first.inputs[i].shape)

    def data(self, i: int) -> Data:
        """Return an input that must be data."""
        value = self.inputs[i]
        if isinstance(value, Data):
            return value
        raise LostAxisError(f"{self.kind} of a constant and of data")

    def axes(self, i: int) -> Axes:
        """Return the axes of an input; a constant must be uniform over the followed axes in its shape.

        Raises:
            Refusal: it is a constant whose values differ by time step, row or length.
        """
        value = self.inputs[i]
        if isinstance(value, Data):
            return value.axes
        return self.even(value, tuple(self.scales.factors(size) for size in value.shape()))

    def pairs(self, i: int) -> list[Pair]:
        """Return the integers of a constant input in the two traces."""
        value = self.inputs[i]
        if isinstance(value, Const):
            return value.pairs()
        raise Refusal(Reason.UNPROVEN, f"uses values as shapes or indices ({self.kind})")

    def integers(self, i: int) -> list[int]:
        """Return the integers of a constant input that are the same in both traces."""
        found = self.pairs(i)
        self.require_same(*found)
        return [pair.first for pair in found]

    def require_same(self, *numbers: Pair) -> None:
        """Refuse numbers that depend on the size of the trace."""
        if not all(number.is_same for number in numbers):
            raise Refusal(Reason.LENGTH, f"depends on the number of time steps ({self.kind})")

    def plain(self, size: Pair) -> Dim:
        """Return the dimension of a size that contains neither the batch nor the time axis."""
        self.require_same(size)
        return normal((size.first,))

    def remember(self, kind: Memory, rows: int, i: int = 0, padding: int = 0, per: int = 1) -> None:
        """Report that it keeps something of an input."""
        if rows:
            self.notes.needs.append(Need(kind, rows, i, padding, per))

    def even(self, const: Const, axes: Axes) -> Axes:
        """Return ``axes``, after checking that a constant is uniform over those that are followed.

        Raises:
            Refusal: it is not uniform, or not for certain, or it has a value for each pair of time steps or rows.
        """
        found = [factor for dim in axes for factor in dim]
        if (
            sum(isinstance(factor, Time) for factor in found) > 1
        ):  # Refused before its values are computed: there are millions.
            raise Refusal(Reason.MATRIX, "has a weight for each pair of time steps")
        if found.count(BATCH) > 1:
            raise Refusal(Reason.ROWS, "relates the rows of the batch to each other")
        if all(is_plain(dim) for dim in axes):
            if not const.is_same:
                raise Refusal(Reason.LENGTH, "depends on the number of time steps or of rows")
            if const.origin.counts:
                raise Refusal(
                    Reason.LENGTH,
                    "combines numbers that count the time steps or rows, of which other sequences have more or fewer (the "
                    "first n of them are keras.ops.arange(n))",
                )
            return axes
        try:
            first = self._first_evened(const, axes)
        except Refusal as refusal:
            if refusal.reason is not Reason.POSITION or const.origin.counts:
                raise
            clause = (
                f"{refusal}, and nothing says how it continues (keras.ops.arange(keras.ops.shape(x)[1]) does)"
            )
            raise Refusal(refusal.reason, clause) from refusal
        if const.origin.counts:
            has_time = any(isinstance(factor, Time) for factor in found)
            what = "time steps" if has_time else "rows of the batch"
            raise Refusal(
                Reason.POSITION if has_time else Reason.ROWS,
                f"has a constant that counts the {what}, and may change beyond any number of them",
            )
        if const.origin is Origin.REPEATED:
            return axes
        second = self._evened(const.evaluators[1].array(const.second), axes, self.scales.second.of)
        if first is None or not equal(first, second):
            raise Refusal(Reason.LENGTH, "depends on the number of time steps or of rows")
        return axes

    def _first_evened(self, const: Const, axes: Axes) -> Array | None:
        try:
            return self._evened(const.array, axes, self.scales.first.of)
        except ValueError:
            if const.origin.counts:  # Its numbers may exceed a table.
                return None
            raise

    def _evened(self, value: Array, axes: Axes, size: Callable[[Any], int]) -> Array:
        factors = [factor for dim in axes for factor in dim]
        value = np.reshape(value, [size(factor) for factor in factors])
        for i, factor in enumerate(factors):
            if isinstance(factor, Axis):
                one = np.take(value, [0], i)
                if not equal(value, np.broadcast_to(one, value.shape)):
                    what = "row of the batch" if factor == BATCH else "time step"
                    reason = Reason.ROWS if factor == BATCH else Reason.POSITION
                    raise Refusal(reason, f"has a different constant for each {what}")
                value = one
        return value


def broadcast(call: Call, inputs: Sequence[int]) -> Axes:
    """Return the axes of some inputs after broadcasting."""
    rank = max(call.rank(i) for i in inputs)
    dims: list[Dim] = [()] * rank
    for i in inputs:
        value = call.inputs[i]
        if isinstance(value, Data):
            _align(dims, value.axes)
    for i in inputs:
        value = call.inputs[i]
        if isinstance(value, Const):
            shape = value.shape()
            own = dims[rank - len(shape) :]
            axes = tuple(
                () if size == (1, 1) else dim or call.scales.factors(size)
                for size, dim in zip(shape, own, strict=True)
            )
            if [call.scales.size(dim) for dim in axes] != shape:
                raise LostAxisError("a constant's shape does not fit")
            _align(dims, call.even(value, axes))
    return tuple(dims)


def _align(dims: list[Dim], axes: Axes) -> None:
    start = len(dims) - len(axes)
    for i, dim in enumerate(axes, start):
        if dim and dims[i] and dim != dims[i]:
            raise LostAxisError("two values have their axes in different orders")
        dims[i] = dim or dims[i]
