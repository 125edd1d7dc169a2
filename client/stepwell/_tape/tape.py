"""A tape: the inputs, outputs and states of a session over time, as a value."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from stepwell._state import display
from stepwell._state.tensors import Array
from stepwell._tape import file, tables
from stepwell._tape.content import Content
from stepwell._tape.marks import Mark
from stepwell.errors import InvalidInputError

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

RecordedStates: TypeAlias = bool | Literal["last"]
"""States that a tape keeps: True for those after every time step, "last" for those after the last time step of each call,
False for none.
"""


class _Arrays(dict[str, Array]):
    """Arrays by name, with an error that lists the names."""

    def __init__(self, kind: str, arrays: Mapping[str, Array]) -> None:
        super().__init__(arrays)
        self._kind = kind

    def __missing__(self, name: str) -> Array:
        raise KeyError(f"{name!r}; the {self._kind} on the tape are {list(self)}")


class Tape:
    """The inputs, outputs and states of a session, or of a group, over time.

    `Session.record` and `SessionGroup.record` return it, and so does `load`. It has one entry for each time step that
    the session took, and `len` counts them. Arrays have time first: `tape.states["lstm/h"]` has the shape (time,
    batch_size, units), and the rows of a group's members follow each other. A slice such as `tape[-100:]` is a tape of
    these time steps.

    **Missing values are NaN**: outputs that a call did not return, states of time steps that a call did not ask for,
    and rows that a call did not step. An array of integers or booleans with missing values is float64.

    Arrays are read-only views, which do not change while the recording continues. Safe to use from many threads. While
    other threads step the session, take a slice first: all arrays of a slice have the same length.

    Example:
        >>> with session.record() as tape:
        ...     y = session.step(np.ones((1, 10, 3), np.float32))
        >>> len(tape), {array.shape for array in tape.states.values()}
        (10, {(10, 1, 8)})
        >>> tape.positions.tolist()
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    """

    def __init__(self, read: Callable[[], Content]) -> None:
        """A tape; `read` returns its content now."""
        self._read = read

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles and copies the tape as it is now."""
        return self._of, (self._read(),)

    def __len__(self) -> int:
        return len(self._read())

    @property
    def model(self) -> str:
        """Name of the model."""
        return self._read().model

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model when the recording began; empty if it was not known."""
        return self._read().fingerprint

    @property
    def batch_size(self) -> int:
        """Number of rows of the session, or of each member of a group."""
        return self._read().batch_size

    @property
    def inputs(self) -> Mapping[str, Array]:
        """Inputs by name, (time, rows, ...) each, in the model's dtypes."""
        return _Arrays("inputs", self._read().arrays["inputs"])

    @property
    def outputs(self) -> Mapping[str, Array]:
        """Outputs by name, (time, rows, ...) each: those that the calls returned."""
        return _Arrays("outputs", self._read().arrays["outputs"])

    @property
    def states(self) -> Mapping[str, Array]:
        """State tensors by name, after each time step, (time, rows, ...) each. Empty if the tape keeps no states."""
        return _Arrays("states", self._read().arrays["states"])

    @property
    def revisions(self) -> npt.NDArray[np.uint64]:
        """Revision after the change of each time step: (time,) uint64, or (time, members) for a group.

        The time steps of one call have the same revision.
        """
        content = self._read()
        return content.revisions if content.is_group else content.revisions[:, 0]

    @property
    def positions(self) -> npt.NDArray[np.uint64]:
        """Position after each time step: (time,) uint64, or (time, members) for a group."""
        content = self._read()
        return content.positions if content.is_group else content.positions[:, 0]

    @property
    def times(self) -> npt.NDArray[np.datetime64]:
        """Arrival of the answer to each time step by this machine's clock: (time,) datetime64[us], in UTC.

        The time steps of one call have the same time.
        """
        return self._read().times

    @property
    def marks(self) -> list[Mark]:
        """Resets and other events between time steps, in their order."""
        return self._read().marks

    @property
    def dropped(self) -> int:
        """Number of time steps before the first one: those beyond `max_steps`, or before a slice."""
        return self._read().dropped

    @property
    def stopped(self) -> str:
        """Why recording stopped early, as a sentence; empty if it did not."""
        return self._read().stopped

    def __getitem__(self, part: slice) -> Self:
        """Returns a tape of consecutive time steps. It shares the arrays of this one.

        Example:
            >>> with session.record() as tape:
            ...     y = session.step(np.ones((1, 10, 3), np.float32))
            >>> tape[-4:].positions.tolist()
            [7, 8, 9, 10]
        """
        if not isinstance(part, slice):
            raise TypeError(f"a tape must be indexed by a slice, such as tape[-100:]; got {part!r:.100}")
        if part.step not in (None, 1):
            raise InvalidInputError(f"the step of a slice of a tape must be 1; got {part.step!r:.100}")
        content = self._read()
        start, stop, _ = part.indices(len(content))
        return self._of(content.part(start, max(start, stop)))

    __iter__ = None
    """A tape has several arrays; iterate over one of them."""

    def __repr__(self) -> str:
        content = self._read()
        shapes = display.some(
            f"{name}: {array.dtype}{array.shape[1:]}" for _, name, array in content.named_arrays()
        )
        dropped = f"dropped={content.dropped}, " if content.dropped else ""
        return f"Tape(model={content.model!r}, {len(content)} time steps, {dropped}{len(content.marks)} marks, {{{shapes}}})"

    def _repr_html_(self) -> str:
        content = self._read()
        title = f"Tape of {content.model!r}: {len(content)} time steps, {len(content.marks)} marks"
        return display.tensors_html(
            title, {f"{kind}/{name}": array for kind, name, array in content.named_arrays()}
        )

    def to_xarray(self) -> xr.Dataset:
        """Returns a copy as an xarray `Dataset`, with a variable for each array.

        Variables are named "inputs/x", "outputs/y", "states/lstm/h". Their first axes are `time`, which counts time
        steps from the beginning of the recording, and `row`. The other axes are named as in `State.to_xarray`.
        `revision`, `position` and `received` are coordinates along `time`. `ds.attrs` has the model and the
        fingerprint.

        Raises:
            ModuleNotFoundError: xarray is not installed.

        Example:
            >>> with session.record() as tape:
            ...     y = session.step(np.ones((1, 10, 3), np.float32))
            >>> dataset = tape.to_xarray()
            >>> dataset["position"].sel(time=9).item(), dataset.sizes["row"]
            (10, 1)
        """
        return tables.to_xarray(self._read())

    def to_pandas(self) -> pd.DataFrame:
        """Returns a copy as a pandas `DataFrame`, with a line for each time step and row.

        The index has the levels `time`, `revision`, `position`, `received` and `row`, where `time` counts time steps
        from the beginning of the recording. Columns have the levels `kind`, `tensor` and `unit`, so that
        `df["states"]["lstm/h"]` is one tensor. Units of tensors with several axes are numbered in C order.

        Raises:
            ModuleNotFoundError: pandas is not installed.

        Example:
            >>> with session.record() as tape:
            ...     y = session.step(np.ones((1, 10, 3), np.float32))
            >>> frame = tape.to_pandas()
            >>> frame["inputs"].shape, frame["states"].shape
            ((10, 3), (10, 16))
        """
        return tables.to_pandas(self._read())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, completely or not at all. An existing file of that name is replaced.

        Args:
            path: Path of the file; the suffix .safetensors is customary.

        Raises:
            OSError: The file cannot be written. This is Python's own error, not a `StepwellError`, and it names the
                path.

        Example:
            >>> with session.record() as tape:
            ...     y = session.step(np.ones((1, 10, 3), np.float32))
            >>> tape.save("run.safetensors")
            >>> len(stepwell.Tape.load("run.safetensors"))
            10
        """
        file.write(os.fspath(path), self._read())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file that `save` wrote.

        Files from untrusted sources are safe to try: the file is read into memory as a whole, and no code in it is
        run.

        Args:
            path: Path of the file.

        Raises:
            OSError: The file cannot be read or does not exist (`FileNotFoundError`). This is Python's own error, not
                a `StepwellError`.
            InvalidInputError: The file is not a saved tape, or is corrupt.

        Example:
            >>> with session.record() as tape:
            ...     y = session.step(np.ones((1, 10, 3), np.float32))
            >>> tape.save("run.safetensors")
            >>> again = stepwell.Tape.load("run.safetensors")
            >>> all(np.array_equal(again.states[name], tape.states[name]) for name in tape.states)
            True
        """
        return cls._of(file.read(os.fspath(path)))

    @classmethod
    def _of(cls, content: Content) -> Self:
        return cls(lambda: content)
