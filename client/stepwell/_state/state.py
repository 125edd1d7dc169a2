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
    """A recurrent state as a value: tensors by name, and the model that they belong to.

    It is a mapping of the tensors' names: `state["lstm/h"]` is an array of shape (batch_size, ...), and `len` counts
    tensors. Index it by rows to get the `State` of these rows: `state[0]`, `state[1:3]`, `state[[0, 2]]` or
    `state[mask]`, where `mask` has batch_size booleans. One row is a state of batch size 1.

    It is a copy: changing its arrays changes no session. Two states are equal if they belong to the same fingerprint
    and hold the same bytes. Threads may share it if none of them writes to its arrays.

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
        """Name of the model that it came from."""
        self.fingerprint = fingerprint
        """Fingerprint of the model that it belongs to."""
        self.batch_size = batch_size
        """Number of rows: the first axis of every tensor."""
        self.revision = revision
        """Revision of the session when the state was read. None if it is not the state of one session, as from
        `predict`, a group or `concat`.
        """
        self.position = position
        """Position of the session when the state was read. None in the same cases as `revision`."""
        self.structure = structure
        """Structure of the model (`ModelInfo.structure`): the state fits every version of the model with the same
        structure. Empty: it fits only models with its fingerprint.
        """

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
        """The revision and position, if known."""
        counts = {"revision": self.revision, "position": self.position}
        return {name: count for name, count in counts.items() if count is not None}

    def _bytes(self) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in self._tensors.items()}

    @classmethod
    def concat(cls, states: Sequence[State]) -> Self:
        """Joins the rows of several states of one model, one after the other.

        Args:
            states: One or more states of one fingerprint, of any batch sizes.

        Returns:
            A state with the rows of all of them. Its revision and position are None.

        Raises:
            InvalidInputError: The list is empty, an entry is not a `State`, or their tensors differ.
            ModelMismatchError: The states belong to different fingerprints.

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
            raise InvalidInputError("states must have at least one State; got none")
        return cls(
            rows.joined(states),
            model=states[0].model,
            fingerprint=states[0].fingerprint,
            batch_size=sum(state.batch_size for state in states),
            structure=states[0].structure,
        )

    def to_dataframe(self) -> pd.DataFrame:
        """Returns a copy as a pandas `DataFrame`, with a line for each row and a column for each of its numbers.

        Columns have two levels, `tensor` and `unit`, so that `df["lstm/h"]` is one tensor. Units of tensors with
        several axes are numbered in C order. `df.attrs` has the model, the fingerprint and, if known, the revision
        and position.

        Raises:
            ModuleNotFoundError: pandas is not installed.

        Example:
            >>> frame = session.get_state().to_dataframe()
            >>> frame.shape, list(frame.columns.names)
            ((1, 16), ['tensor', 'unit'])
        """
        return tables.to_dataframe(self._tensors, (self.batch_size,), self._attrs(), "State.to_dataframe")

    def to_xarray(self) -> xr.Dataset:
        """Returns a copy as an xarray `Dataset`, with a variable for each tensor.

        The first axis is `row`. The other axes are named after the layer, such as `lstm.1`; tensors of one layer
        share them. `ds.attrs` has the model, the fingerprint and, if known, the revision and position.

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
        """Writes a safetensors file, completely or not at all. An existing file of that name is replaced.

        The state of a model without state tensors can be saved too.

        Args:
            path: Path of the file; the suffix .safetensors is customary.

        Raises:
            InvalidInputError: The file could not be loaded again: a tensor is empty, or does not have `batch_size`
                rows.
            OSError: The file cannot be written. This is Python's own error, not a `StepwellError`, and it names the
                path.

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

        Files from untrusted sources are safe to try: the file is read into memory as a whole, and no code in it is
        run.

        Args:
            path: Path of the file.

        Raises:
            OSError: The file cannot be read or does not exist (`FileNotFoundError`). This is Python's own error, not
                a `StepwellError`.
            InvalidInputError: The file is not a saved state, or is corrupt.

        Example:
            >>> session.get_state().save("user-42.safetensors")
            >>> session.reset_states(stepwell.State.load("user-42.safetensors"))
        """
        tensors, header = file.read(os.fspath(path))
        return cls(tensors, **header._asdict())
