"""The content of a tape at one moment, as plain arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from stepwell._state.tensors import Array
from stepwell._tape.marks import Mark

KINDS = ("inputs", "outputs", "states")


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """The time steps of a tape. Every array has time first, and all have the same length."""

    model: str
    fingerprint: str
    """Fingerprint of the model when the recording began."""
    batch_size: int
    is_group: bool
    revisions: npt.NDArray[np.uint64]
    """(time, members): a session is one member."""
    positions: npt.NDArray[np.uint64]
    """(time, members)."""
    times: npt.NDArray[np.datetime64]
    """(time,) datetime64[us]."""
    arrays: Mapping[str, Mapping[str, Array]]
    """By kind and name, (time, rows, ...)."""
    marks: list[Mark]
    dropped: int
    """Time steps before the first one."""
    stopped: str
    """Why recording stopped early; empty if it did not."""

    def __len__(self) -> int:
        return len(self.times)

    @property
    def rows(self) -> int:
        """Number of rows of all members."""
        members: int = self.revisions.shape[1]
        return self.batch_size * members

    def named_arrays(self) -> Iterator[tuple[str, str, Array]]:
        """Kind, name and values of each array."""
        for kind in KINDS:
            for name, array in self.arrays[kind].items():
                yield kind, name, array

    def part(self, start: int, stop: int) -> Content:
        """The time steps from `start` to `stop`: views."""
        where = slice(start, stop)
        return dataclasses.replace(
            self,
            revisions=self.revisions[where],
            positions=self.positions[where],
            times=self.times[where],
            arrays={
                kind: {name: array[where] for name, array in arrays.items()}
                for kind, arrays in self.arrays.items()
            },
            marks=[
                dataclasses.replace(mark, index=mark.index - start)
                for mark in self.marks
                if start <= mark.index <= stop
            ],
            dropped=self.dropped + start,
        )
