"""The position of the batch and time axis in a tensor: the abstract value that the proof follows.

A dimension is a tuple of factors, outermost first: ``BATCH``, ``TIME`` or a plain size. For example, a reshape
from (batch, time, features) to (batch * time, features) results in ``(BATCH, TIME)``. A dimension of size 1 has
no factors.

Padding, slices and windows move the time axis: see `Time`. So the proof knows how far ahead each tensor looks, and
an operation that looks back is followed like any other. The two traces (`cut.SCALES`) have prime numbers of rows and time steps, so that the two sizes of a
dimension reveal its axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Axis:
    """A followed axis."""


@dataclasses.dataclass(frozen=True)
class Batch(Axis):
    """The rows."""


@dataclasses.dataclass(frozen=True)
class Time(Axis):
    """The time axis, or one made from it, whose number of elements differs from the number of time steps by ``extra``.

    Its element ``i`` depends on no input after the time step ``i + start``. Padding in front makes ``start`` smaller, and a
    window or a slice makes it larger. Where it is negative, the first ``-start`` elements depend on no input at all.
    Where it is positive, the model looks ahead by so many time steps, unless padding follows.

    A time step may bring several elements, ``per``, such as the samples of an audio frame. Then element ``i`` depends on no
    input after the time step ``(i + start) // per``, and there are ``extra`` more elements than ``per`` times the time
    steps. At time step ``t`` a session has computed the elements before ``per * (t + 1) - start``.
    """

    start: int = 0
    extra: int = 0
    per: int = 1


BATCH, TIME = Batch(), Time()
Factor = Axis | int
Dim = tuple[Factor, ...]
Axes = tuple[Dim, ...]


class Scale(NamedTuple):
    """The sizes of one trace."""

    rows: int
    steps: int

    def of(self, factor: Factor) -> int:
        """Return the size of a factor in this trace."""
        if isinstance(factor, Time):
            return self.steps * factor.per + factor.extra
        return factor if isinstance(factor, int) else self.rows


class Pair(NamedTuple):
    """One size, or one integer, in the two traces."""

    first: int
    second: int

    @property
    def is_same(self) -> bool:
        """It is independent of the sizes of the trace."""
        return self.first == self.second


class LostAxisError(Exception):
    """The position of the batch or time axis is unknown from here on."""


@dataclasses.dataclass(frozen=True)
class Scales:
    """The sizes of the two traces."""

    first: Scale
    second: Scale

    @property
    def both(self) -> tuple[Scale, Scale]:
        """The sizes of the first and of the second trace."""
        return self.first, self.second

    def size(self, dim: Iterable[Factor]) -> Pair:
        """Return the size of a dimension in the two traces."""
        factors = tuple(dim)
        return Pair(
            math.prod(self.first.of(factor) for factor in factors),
            math.prod(self.second.of(factor) for factor in factors),
        )

    def factors(self, size: Pair) -> Dim:
        """Return the factors of a size: batch, time, then a plain number.

        Raises:
            LostAxisError: it is not a product of batch, time and a fixed number; time + 2, for example.
        """
        for axes in ((), (TIME,), (BATCH,), (BATCH, TIME)):
            of_axes = self.size(axes)
            rest = Pair(size.first // of_axes.first, size.second // of_axes.second)
            if rest.is_same and (rest.first * of_axes.first, rest.second * of_axes.second) == size:
                return normal((*axes, rest.first))
        raise LostAxisError(f"a dimension has {size.first} and {size.second} elements")

    def reshape(self, axes: Axes, sizes: Sequence[Pair]) -> Axes:
        """Return the axes after a reshape, which keeps the order of all elements.

        Raises:
            LostAxisError: the new dimensions cut through the batch or the time axis.
        """
        left = list(normal(factor for dim in axes for factor in dim))
        result: list[Dim] = []
        for size in sizes:
            dim: list[Factor] = []
            while self.size(dim) != size:
                dim.append(self._next(left, self.size(dim), size))
            result.append(normal(dim))
        if left:
            raise LostAxisError("a reshape leaves elements over")
        return tuple(result)

    def _next(self, left: list[Factor], so_far: Pair, wanted: Pair) -> Factor:
        """Take the next factor for a dimension off ``left``, or a part of it if it is a plain size."""
        if left:
            factor = left[0]
            grown = self.size((factor,))
            grown = Pair(so_far.first * grown.first, so_far.second * grown.second)
            if not wanted.first % grown.first and not wanted.second % grown.second:
                return left.pop(0)
            part = Pair(wanted.first // so_far.first, wanted.second // so_far.second)
            if isinstance(factor, int) and part.is_same and part.first and not factor % part.first:
                left[0] = factor // part.first
                return part.first
            # This dimension takes a part of a fixed number, and an axis follows.
            shared = math.gcd(factor, *part) if isinstance(factor, int) else 1
            if shared > 1:
                left[0] = int(factor) // shared  # type: ignore[arg-type]
                return shared
        raise LostAxisError("a reshape cuts through the batch or the time axis")


def normal(dim: Iterable[Factor]) -> Dim:
    """Return the normal form of a dimension: adjacent sizes multiplied, ones removed."""
    result: list[Factor] = []
    for factor in dim:
        if isinstance(factor, int) and result and isinstance(result[-1], int):
            result[-1] *= factor
        elif factor != 1:
            result.append(factor)
    return tuple(result)


def elements(dim: Dim) -> Time | None:
    """Return the time axis of a dimension that has nothing else but some elements of each time step, or None."""
    match dim:
        case (Time() as time,):
            return time
        case (Time(start, extra, per), int(each)):
            return Time(start * each, extra * each, per * each)
    return None


def by_elements(axes: Axes) -> Axes:
    """Return the axes of a tensor with its time axis alone in its dimension."""
    found = (elements(dim) if time_of([dim]) else None for dim in axes)
    return tuple(dim if time is None else (time,) for dim, time in zip(axes, found, strict=True))


def dim_of(time: Time) -> Dim:
    """Return the dimension of a time axis: if its elements are those of whole time steps, these and a plain size."""
    if time.start % time.per or time.extra % time.per:
        return (time,)
    return normal((Time(time.start // time.per, time.extra // time.per), time.per))


def placed(axes: Axes, place: int, time: Time) -> Axes:
    """Return the axes of a tensor with another time axis as one of its dimensions."""
    return (*axes[:place], dim_of(time), *axes[place + 1 :])


def labels(axes: Axes) -> Iterator[Axis]:
    """Yield the followed axes of a tensor, with repetitions."""
    return (factor for dim in axes for factor in dim if isinstance(factor, Axis))


def time_of(axes: Iterable[Dim]) -> Time | None:
    """Return the time axis of a tensor, or None."""
    return next((factor for dim in axes for factor in dim if isinstance(factor, Time)), None)


def moved(axes: Axes, time: Time) -> Axes:
    """Return the axes of a tensor with another time axis."""
    return tuple(tuple(time if isinstance(factor, Time) else factor for factor in dim) for dim in axes)


def is_plain(dim: Dim) -> bool:
    """Whether a dimension contains neither the batch nor the time axis."""
    return all(isinstance(factor, int) for factor in dim)
