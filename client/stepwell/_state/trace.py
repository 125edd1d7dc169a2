"""The outputs of a step and the states after it, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from stepwell._state import display, tables
from stepwell._state.infos import ModelInfo, Outputs
from stepwell._state.tensors import Array

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


class TracedStates(Mapping[str, Array]):
    """State tensors by name, in the model's order: copies of shape (rows, ...), or (rows, T, ...) for every time step.

    Example:
        >>> states = session.trace(np.ones((1, 10, 3), np.float32)).states
        >>> states.has_time, states.to_dataframe().shape
        (True, (10, 16))
    """

    def __init__(self, tensors: Mapping[str, Array], *, has_time: bool) -> None:
        self._tensors = dict(tensors)
        self.has_time = has_time
        """Whether the second axis is time."""

    def __getitem__(self, name: str) -> Array:
        try:
            return self._tensors[name]
        except KeyError:
            raise KeyError(f"{name!r}; the tensors of the states are {list(self._tensors)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        shapes = (f"{name}: {array.dtype}{array.shape}" for name, array in self._tensors.items())
        return f"TracedStates({{{display.some(shapes)}}})"

    def to_dataframe(self) -> pd.DataFrame:
        """Returns a copy as a pandas `DataFrame`, with a line for each row, or for each row and time step.

        Columns are those of `State.to_dataframe`.

        Raises:
            ModuleNotFoundError: pandas is not installed.

        Example:
            >>> frame = session.trace(np.ones((1, 10, 3), np.float32)).states.to_dataframe()
            >>> list(frame.index.names), list(frame.columns.names)
            (['row', 'time'], ['tensor', 'unit'])
        """
        return tables.to_dataframe(self._tensors, self._shape(), {}, "TracedStates.to_dataframe")

    def to_xarray(self) -> xr.Dataset:
        """Returns a copy as an xarray `Dataset`, as `State.to_xarray` does, with the axis `time` after `row`.

        Raises:
            ModuleNotFoundError: xarray is not installed.

        Example:
            >>> h = next(iter(session.trace(np.ones((1, 10, 3))).states.to_xarray().data_vars.values()))
            >>> h.dims[:2], h.shape
            (('row', 'time'), (1, 10, 8))
        """
        return tables.to_xarray(self._tensors, self._shape(), {}, "TracedStates.to_xarray")

    def _shape(self) -> tuple[int, ...]:
        """The axes before those of the model."""
        first = next(iter(self._tensors.values()), None)
        if first is None:
            return (0, 0) if self.has_time else (0,)
        return first.shape[: 2 if self.has_time else 1]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The outputs of a step, and the states after it or after each of its time steps.

    `Session.trace` returns it, and so does `Session.step` with `states`. Its arrays are copies.

    Example:
        >>> trace = session.trace(np.ones((1, 10, 3), np.float32))
        >>> {name: array.shape[:2] for name, array in trace.states.items()} == dict.fromkeys(
        ...     trace.states, (1, 10)
        ... )
        True
    """

    outputs: Outputs
    """Outputs as `Session.step` returns them."""
    states: TracedStates
    """State tensors by name, in the model's order: (rows, T, ...) after every time step, or (rows, ...) after the last
    one or if the inputs have no time axis.
    """
    revision: int | None
    """Revision of the session after the step; None for a group, whose members have revisions of their own."""
    position: int | None
    """Position of the session after the step; None for a group."""
    model_version: int = 0
    """Version of the model that the session uses; 0 for a group, see `SessionGroup.model_versions`."""


def last_states(states: TracedStates) -> TracedStates:
    """The states after the last time step."""
    if not states.has_time:
        return states
    return TracedStates({name: array[:, -1].copy() for name, array in states.items()}, has_time=False)


def traced(states: Mapping[str, Array], info: ModelInfo | None) -> TracedStates:
    """Returns states as a caller receives them. `info` describes their model; None if they have no time axis."""
    axes = {} if info is None else {spec.name: len(spec.shape) for spec in info.state}
    return TracedStates(
        states, has_time=any(array.ndim > 1 + axes.get(name, array.ndim) for name, array in states.items())
    )
