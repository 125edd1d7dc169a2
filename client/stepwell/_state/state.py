"""A recurrent state as a value."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeAlias, overload

import numpy.typing as npt

from stepwell._state import display, file, rows, tables
from stepwell._state.rows import Rows
from stepwell._state.tensors import Array
from stepwell.errors import InvalidInputError, ModelMismatchError

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

States: TypeAlias = "State | Mapping[str, npt.ArrayLike] | Sequence[npt.ArrayLike]"
"""State tensors by name, or as a list in the model's order."""


class State(Mapping[str, Array]):
    """A recurrent state as a value: tensors by name, and what they belong to.

    A mapping of the tensors' names: `state["lstm/h"]` is an array, (batch_size, ...), and `len` counts tensors.
    With rows in place of a name, `state[0]`, `state[1:3]`, `state[[0, 2]]` or `state[done]` (a mask of batch_size
    booleans), it is the `State` of those rows; one row is a state of batch size 1.

    It is a copy; changing its arrays changes no session. Two states are equal if they belong to the same
    fingerprint and hold the same bytes. Safe to share between threads as long as nobody writes to its arrays.

    Example:
        >>> state = session.get_state()
        >>> {name: array.shape[0] for name, array in state.items()} == dict.fromkeys(
        ...     state, session.batch_size
        ... )
        True
        >>> session.reset_states(state)
        >>> state[0].batch_size
        1
    """

    def __init__(
        self,
        tensors: Mapping[str, Array],
        *,
        model: str,
        fingerprint: str,
        batch_size: int,
        revision: int | None = None,
        position: int | None = None,
        structure: str = "",
    ) -> None:
        self._tensors = dict(tensors)
        self.model = model
        """Name of the model it came from."""
        self.fingerprint = fingerprint
        """Fingerprint of the model it belongs to."""
        self.batch_size = batch_size
        """Rows: the first axis of every tensor."""
        self.revision = revision
        """Revision of the session when it was read. None if it is not the state of one session, as from `predict`, a
        group or `concat`."""
        self.position = position
        """Position of the session when it was read. None as `revision`."""
        self.structure = structure
        """Structure of the model (`ModelInfo.structure`): the state fits every version of the model that has the same
        one. Empty: only the fingerprint says what it fits."""

    @overload
    def __getitem__(self, key: str) -> Array: ...
    @overload
    def __getitem__(self, key: Rows) -> Self: ...
    def __getitem__(self, key: str | Rows) -> Array | Self:
        if not isinstance(key, str):
            return self._of_rows(rows.chosen(key, self.batch_size))
        try:
            return self._tensors[key]
        except KeyError:
            raise KeyError(f"{key!r}; the tensors of the state are {list(self._tensors)}") from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._tensors

    def _of_rows(self, rows: npt.NDArray[Any]) -> Self:
        return type(self)(
            {name: array[rows] for name, array in self._tensors.items()},
            model=self.model,
            fingerprint=self.fingerprint,
            batch_size=len(rows),
            revision=self.revision,
            position=self.position,
            structure=self.structure,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State):
            return NotImplemented
        return self.fingerprint == other.fingerprint and self._bytes() == other._bytes()

    __hash__ = None  # type: ignore[assignment]  # its arrays may be written to

    def __repr__(self) -> str:
        tensors = ((name, f"{array.dtype}{array.shape}") for name, array in self._tensors.items())
        shapes = display.some(f"{name}: {kind}" for name, kind in tensors)
        counts = "".join(f"{name}={count}, " for name, count in self._counts().items())
        return f"State(model={self.model!r}, batch_size={self.batch_size}, {counts}{{{shapes}}})"

    def _repr_html_(self) -> str:
        counts = "".join(f", {name} {count}" for name, count in self._counts().items())
        title = f"State of {self.model!r}: batch_size {self.batch_size}{counts}"
        return display.tensors_html(title, self._tensors)

    def _counts(self) -> dict[str, int]:
        """Revision and position, if it has them."""
        counts = {"revision": self.revision, "position": self.position}
        return {name: count for name, count in counts.items() if count is not None}

    def _bytes(self) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in self._tensors.items()}

    @classmethod
    def concat(cls, states: Sequence[State]) -> Self:
        """The rows of several states of one model, one after the other.

        Args:
            states: One or more, of one fingerprint; of any batch sizes.

        Returns:
            A state of as many rows as all of them have; its revision and position are None.

        Raises:
            InvalidInputError: There is none, one is no `State`, or their tensors differ.
            ModelMismatchError: They belong to different fingerprints.

        Example:
            >>> state = stepwell.State.concat([session.get_state(), session.get_state()])
            >>> state.batch_size, state[1] == state[0] == session.get_state()
            (2, True)
        """
        states = list(states)
        for number, state in enumerate(states):
            if not isinstance(state, State):
                raise InvalidInputError(f"states must be of type State; number {number} is {state!r:.100}")
            if state.fingerprint != states[0].fingerprint:
                raise ModelMismatchError(
                    "states must belong to one model; the first has the fingerprint "
                    f"{states[0].fingerprint:.12} ({states[0].model}), number {number} has {state.fingerprint:.12} ({state.model})"
                )
        if not states:
            raise InvalidInputError("states must have one State at least; got none")
        return cls(
            rows.joined(states),
            model=states[0].model,
            fingerprint=states[0].fingerprint,
            batch_size=sum(state.batch_size for state in states),
            structure=states[0].structure,
        )

    def to_dataframe(self) -> pd.DataFrame:
        """A copy as a pandas `DataFrame`: a row for each row, a column for each number of it.

        Columns have two levels, `tensor` and `unit`, so that `df["lstm/h"]` is one tensor; units of tensors with
        several axes are numbered in C order. `df.attrs` holds model, fingerprint, and revision and position if it has them.

        Raises:
            ModuleNotFoundError: pandas is not installed.

        Example:
            >>> frame = session.get_state().to_dataframe()
            >>> frame.shape, list(frame.columns.names)
            ((1, 16), ['tensor', 'unit'])
        """
        return tables.to_dataframe(self._tensors, (self.batch_size,), self._attrs(), "State.to_dataframe")

    def to_xarray(self) -> xr.Dataset:
        """A copy as an xarray `Dataset`: a variable for each tensor, with the axis `row` and those of its layer.

        The axes after `row` are called after the layer, `lstm.1` and so on; tensors of one layer share them.
        `ds.attrs` holds model, fingerprint, and revision and position if it has them.

        Raises:
            ModuleNotFoundError: xarray is not installed.

        Example:
            >>> h = next(iter(session.get_state().to_xarray().data_vars.values()))
            >>> h.dims[0], h.shape
            ('row', (1, 8))
        """
        return tables.to_xarray(self._tensors, (self.batch_size,), self._attrs(), "State.to_xarray")

    def _attrs(self) -> dict[str, Any]:
        return {"model": self.model, "fingerprint": self.fingerprint, **self._counts()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all; an old file of that name is replaced.

        The state of a model that keeps none is saved too: it has no tensors, and says what it belongs to.

        Args:
            path: Where to; the suffix .safetensors is customary.

        Raises:
            InvalidInputError: It could not be loaded again: a tensor does not have `batch_size` rows, or is
                empty.
            OSError: The file cannot be written. It is Python's own, no `StepwellError`, and names the path.

        Example:
            >>> session.get_state().save("user-42.safetensors")
            >>> stepwell.State.load("user-42.safetensors") == session.get_state()
            True
        """
        header = file.Header(
            self.model, self.fingerprint, self.batch_size, self.revision, self.position, self.structure
        )
        file.write(os.fspath(path), self._tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file that `save` wrote.

        Args:
            path: The file.

        Raises:
            OSError: The file cannot be read, or is not there (`FileNotFoundError`). It is Python's own, no
                `StepwellError`.
            InvalidInputError: It is no saved state, or a damaged one. A file from anywhere may be tried: it is
                read whole into memory, and no code in it is run.

        Example:
            >>> session.get_state().save("user-42.safetensors")
            >>> session.reset_states(stepwell.State.load("user-42.safetensors"))
        """
        tensors, header = file.read(os.fspath(path))
        return cls(tensors, **header._asdict())
