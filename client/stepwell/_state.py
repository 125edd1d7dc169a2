"""A recurrent state as a value."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Self, TypeAlias

import numpy.typing as npt

from stepwell import _state_file
from stepwell._tensors import Array

States: TypeAlias = "State | Mapping[str, npt.ArrayLike] | Sequence[npt.ArrayLike]"
"""State tensors by name, or as a list in the model's order."""


class State(Mapping[str, Array]):
    """A recurrent state as a value: tensors by name, and what they belong to.

    It is a copy; changing its arrays changes no session. Two states are equal if they belong to the same
    fingerprint and hold the same bytes. Safe to share between threads as long as nobody writes to its arrays.

    Example:
        >>> state = session.get_state()
        >>> {name: array.shape[0] for name, array in state.items()} == dict.fromkeys(
        ...     state, session.batch_size
        ... )
        True
        >>> session.reset_states(state)
    """

    def __init__(
        self,
        tensors: Mapping[str, Array],
        *,
        model: str,
        fingerprint: str,
        batch_size: int,
        revision: int = 0,
        position: int = 0,
    ) -> None:
        self._tensors = dict(tensors)
        self.model = model
        """Name of the model it came from."""
        self.fingerprint = fingerprint
        """Fingerprint of the model it belongs to."""
        self.batch_size = batch_size
        """Rows: the first axis of every tensor."""
        self.revision = revision
        """Revision of the session when it was read; 0 from `predict` and from a group."""
        self.position = position
        """Position of the session when it was read; 0 from `predict` and from a group."""

    def __getitem__(self, name: str) -> Array:
        return self._tensors[name]

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
        shapes = ", ".join(f"{name}: {array.dtype}{array.shape}" for name, array in self._tensors.items())
        return (
            f"State(model={self.model!r}, revision={self.revision}, position={self.position}, {{{shapes}}})"
        )

    def _bytes(self) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in self._tensors.items()}

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
        header = _state_file.Header(
            self.model, self.fingerprint, self.batch_size, self.revision, self.position
        )
        _state_file.write(os.fspath(path), self._tensors, header)

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
        tensors, header = _state_file.read(os.fspath(path))
        return cls(tensors, **header._asdict())
