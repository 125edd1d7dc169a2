"""What is known about a tensor of a graph while rows are followed through it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import numpy.typing as npt
import onnx

from stepwell_server.compile.errors import quoted


class _Rows:
    """The number of rows, as a size."""

    def __repr__(self) -> str:
        return "rows"


ROWS: Final = _Rows()
#: A size: known, the number of rows, or unknown (None).
Size = int | _Rows | None
Sizes = tuple[Size, ...]


class LostError(Exception):
    """Rows cannot be followed through an operator. The message is a clause about it."""


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor."""

    axis: int | None = None
    """Each index along this axis is one row; None: it is the same for all rows."""
    sizes: Sizes | None = None
    """Its shape, with `ROWS` at `axis`; None: even its rank is unknown."""
    content: npt.NDArray[Any] | None = None
    """Its elements, if they are known. A size may be `ROWS`, then its type is object."""
    is_sized: bool = False
    """Its elements depend on the number of rows. It may only be used as a size."""
    dtype: int = 0
    """The element type, as ONNX numbers it; 0: unknown."""

    @property
    def rank(self) -> int:
        """The number of its axes.

        Raises:
            LostError: it is unknown.
        """
        if self.sizes is None:
            raise LostError("the number of axes of a tensor is unknown")
        return len(self.sizes)

    @property
    def from_end(self) -> int:
        """The axis, counted from the last one, which is 1."""
        assert self.axis is not None
        return self.rank - self.axis

    @property
    def integers(self) -> list[int]:
        """Its content, without the number of rows.

        Raises:
            LostError: it is not known.
        """
        if self.content is None or self.content.dtype == object:
            raise LostError("an argument that must be constant is not")
        return [int(item) for item in self.content.reshape(-1)]


@dataclasses.dataclass(frozen=True)
class Node:
    """An operator with what is known about its inputs."""

    proto: onnx.NodeProto
    values: Sequence[Value | None]
    """None: an input that is left out."""
    opset: int

    @property
    def kind(self) -> str:
        """The name of the operator."""
        return str(self.proto.op_type)

    def attribute(self, name: str, default: Any = None) -> Any:
        """The value of an attribute."""
        for each in self.proto.attribute:
            if each.name == name:
                return onnx.helper.get_attribute_value(each)
        return default

    def value(self, place: int) -> Value | None:
        """An input; None: it is left out."""
        return self.values[place] if place < len(self.values) else None

    def needed(self, place: int) -> Value:
        """An input that must be there.

        Raises:
            LostError: it is left out.
        """
        found = self.value(place)
        if found is None:
            raise LostError(f"its input {place} is left out")
        return found

    def shared(self, *places: int) -> None:
        """Check that these inputs are the same for all rows.

        Raises:
            LostError: one has rows.
        """
        for place in places:
            found = self.value(place)
            if found is not None and (found.axis is not None or found.is_sized):
                raise LostError(f"its input {quoted(self.proto.input[place])} differs between rows")

    def axes(
        self, rank: int, place: int | None = 1, default: Sequence[int] | None = None
    ) -> list[int] | None:
        """The axes that an attribute or, in newer opsets, an input names; None: neither does.

        Raises:
            LostError: the input is not constant.
        """
        found = self.attribute("axes")
        given = None if place is None else self.value(place)
        if found is None and given is not None:
            found = given.integers
        if found is None:
            found = default
        return None if found is None else [normalized(int(axis), rank) for axis in found]


def normalized(axis: int, rank: int) -> int:
    """Return an axis counted from the first one.

    Raises:
        LostError: there is no such axis.
    """
    if not -rank <= axis < rank:
        raise LostError(f"axis {axis} is not one of {rank}")
    return axis % rank


def placed(axis: int) -> list[Value]:
    """Return the only output of an operator: its rows are on this axis, and its shape is inferred."""
    return [Value(axis=axis)]
