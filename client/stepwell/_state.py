"""A recurrent state as a value."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Self, TypeAlias

import numpy.typing as npt

from stepwell._tensors import Array
from stepwell.errors import InvalidInputError

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

    _FORMAT = "stepwell-state/1"

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

        Args:
            path: Where to; the suffix .safetensors is customary.

        Raises:
            OSError: The file cannot be written. It is Python's own, no `StepwellError`, and names the path.

        Example:
            >>> session.get_state().save("user-42.safetensors")
            >>> stepwell.State.load("user-42.safetensors") == session.get_state()
            True
        """
        from safetensors import numpy as safetensors_numpy

        arrays = {name: array.copy(order="C") for name, array in self._tensors.items()}
        _write_atomically(os.fspath(path), safetensors_numpy.save(arrays, metadata=self._metadata()))

    def _metadata(self) -> dict[str, str]:
        return {
            "format": self._FORMAT,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "batch_size": str(self.batch_size),
            "revision": str(self.revision),
            "position": str(self.position),
            # The file format sorts its tensors; a list of states is read in the model's order.
            "names": json.dumps(list(self._tensors)),
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file that `save` wrote.

        Args:
            path: The file.

        Raises:
            OSError: The file cannot be read, or is not there (`FileNotFoundError`). It is Python's own, no
                `StepwellError`.
            InvalidInputError: It is no saved state.

        Example:
            >>> session.get_state().save("user-42.safetensors")
            >>> session.reset_states(stepwell.State.load("user-42.safetensors"))
        """
        from safetensors import SafetensorError, safe_open

        with open(path, "rb"):  # safe_open's own errors do not tell a missing file from a broken one
            pass
        try:
            with safe_open(os.fspath(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != cls._FORMAT:
                    raise InvalidInputError(
                        f"path must be a state saved by State.save; {os.fspath(path)!r} has the format "
                        f"{metadata.get('format')!r} instead of {cls._FORMAT!r}"
                    )
                tensors = {name: file.get_tensor(name) for name in json.loads(metadata["names"])}
                return cls._loaded(tensors, metadata)
        except (SafetensorError, KeyError, ValueError) as error:
            raise InvalidInputError(
                f"path must be a state saved by State.save; {os.fspath(path)!r} is not: {error}"
            ) from None

    @classmethod
    def _loaded(cls, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> Self:
        return cls(
            tensors,
            model=metadata["model"],
            fingerprint=metadata["fingerprint"],
            batch_size=int(metadata["batch_size"]),
            revision=int(metadata["revision"]),
            position=int(metadata["position"]),
        )


def _write_atomically(path: str, data: bytes) -> None:
    """Writes beside the target and renames: a crash leaves the old file or the new one."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".stepwell-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        if error.errno is None:
            raise
        # Not the temporary file's name: the caller knows only this one.
        raise OSError(error.errno, error.strerror, path) from None
