"""Rows of a state: selecting them, and joining states."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from stepwell._state.tensors import Array
from stepwell.errors import InvalidInputError

Rows: TypeAlias = (
    int
    | np.integer[Any]
    | slice
    | Sequence[int]
    | Sequence[bool]
    | npt.NDArray[np.integer[Any]]
    | npt.NDArray[np.bool_]
)
"""One row, a slice, indexes from -batch_size to batch_size - 1, or a mask of batch_size booleans."""


def chosen(rows: object, count: int) -> npt.NDArray[np.intp]:
    """The indexes that `rows` selects from `count` rows: (n,), each from 0 to count - 1.

    Raises:
        TypeError: It is not a number, a slice, a list or a mask.
        IndexError: There is no such row, or the mask has another length.
    """
    if isinstance(rows, slice):
        return np.arange(count)[rows]
    if isinstance(rows, bool | np.bool_ | tuple):
        raise _no_rows(rows)
    try:
        return _checked(np.asarray([operator.index(rows)]), count)  # type: ignore[arg-type]  # refused below
    except TypeError:
        pass
    if not isinstance(rows, Sequence | np.ndarray) or isinstance(rows, bytes):
        raise _no_rows(rows)
    given = np.asarray(rows)
    if given.shape == (0,):
        return np.arange(0)
    if given.ndim != 1 or given.dtype.kind not in "iub":
        raise _no_rows(rows)
    if given.dtype.kind == "b":
        if len(given) != count:
            raise IndexError(f"a mask of rows must have batch_size = {count} booleans; got {len(given)}")
        return np.flatnonzero(given)
    return _checked(given, count)


def _checked(rows: npt.NDArray[Any], count: int) -> npt.NDArray[np.intp]:
    wrong = rows[(rows < -count) | (rows >= count)]
    if len(wrong):
        raise IndexError(f"rows must be from {-count} to {count - 1}; got {wrong[0]}")
    indexes = rows.astype(np.intp)  # a smaller type may not hold the sum
    return np.where(indexes < 0, indexes + count, indexes)


def _no_rows(rows: object) -> TypeError:
    return TypeError(
        "a state takes the name of a tensor, or rows as an integer, a slice, a list of integers or a mask of booleans; "
        f"got {rows!r:.100}"
    )


def joined(states: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The tensors of states, concatenated on the first axis.

    Raises:
        InvalidInputError: Their tensors have different names, dtypes or row shapes.
    """
    kinds = [{name: (array.dtype, array.shape[1:]) for name, array in state.items()} for state in states]
    for number, kind in enumerate(kinds):
        for name in kinds[0].keys() | kind.keys():
            if kind.get(name) != kinds[0].get(name):
                raise InvalidInputError(
                    f"states must have the same tensors; {name!r} is {_described(kinds[0].get(name))} in the first, "
                    f"{_described(kind.get(name))} in number {number}"
                )
    return {name: np.concatenate([state[name] for state in states]) for name in states[0]}


def _described(kind: tuple[np.dtype[Any], tuple[int, ...]] | None) -> str:
    return "missing" if kind is None else f"{kind[0]} of shape ({', '.join(['rows', *map(str, kind[1])])})"
