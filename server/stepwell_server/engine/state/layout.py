"""The layout of a version's stored rows, for use after the version is unloaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.engine.types import Array
from stepwell_server.program import Program, StateSpec, TensorSpec, dtype_of


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a packed row, one after the other: the states, then the outputs."""

    states: tuple[StateSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, program: Program) -> Layout:
        """The layout of a program."""
        return cls(tuple(program.state), tuple(program.outputs))

    @property
    def _specs(self) -> list[StateSpec | TensorSpec]:
        return [*self.states, *self.outputs]

    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row."""
        return sum(spec.row_bytes for spec in self._specs)

    def unpacked(self, packed: npt.NDArray[np.uint8]) -> tuple[list[Array], list[Array]]:
        """States and outputs of packed rows, `(n, row_bytes)`: each `(n, ...)`."""
        start, arrays = 0, list[Array]()
        for spec in self._specs:
            size = math.prod(spec.shape) * dtype_of(spec.dtype).itemsize
            part = np.ascontiguousarray(packed[:, start : start + size])
            arrays.append(part.view(dtype_of(spec.dtype)).reshape(len(packed), *spec.shape))
            start += size
        return arrays[: len(self.states)], arrays[len(self.states) :]

    def has_shapes_of(self, other: Layout) -> bool:
        """Whether the tensors differ at most in their names, so rows of one have the bytes of rows of the other."""
        return _unnamed(self.states) == _unnamed(other.states) and _unnamed(self.outputs) == _unnamed(
            other.outputs
        )

    def differences(self, other: Layout) -> list[str]:
        """The differences from another layout, each as a clause; empty: rows are interchangeable."""
        found: list[str] = []
        for kind, own, others in (
            ("state", self.states, other.states),
            ("output", self.outputs, other.outputs),
        ):
            mine, theirs = {spec.name: spec for spec in own}, {spec.name: spec for spec in others}
            found += [f"{kind} {name!r} is missing" for name in mine if name not in theirs]
            found += [f"{kind} {name!r} is new" for name in theirs if name not in mine]
            found += [
                f"{kind} {name!r} is {_shown(theirs[name])}, not {_shown(mine[name])}"
                for name in mine
                if name in theirs and mine[name] != theirs[name]
            ]
            if not found and list(mine) != list(theirs):
                found.append(f"the {kind}s are in another order")
        return found


def _unnamed(specs: Sequence[StateSpec | TensorSpec]) -> list[StateSpec | TensorSpec]:
    return [dataclasses.replace(spec, name="") for spec in specs]


def _shown(spec: StateSpec | TensorSpec) -> str:
    shown = f"{spec.dtype}{list(spec.shape)}"
    if isinstance(spec, TensorSpec):
        shown += ", one for each time step" if spec.temporal else ", one for all time steps"
    return shown
