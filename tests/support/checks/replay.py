"""An LSTM with a dense layer behind it in plain numpy, from the weights in a `.keras` file: no code of the server.

It computes in float64. The server computes in float32, where a step's rounding is some 1e-7 and the next steps carry it
on: an LSTM with bounded gates forgets faster than the errors add up. Measured over 16 rows of 10,000 random time steps
without a reset, outputs and states of the server differed from these by 2.3e-7 at most. TOLERANCE is 200 times
that; one input, state or step too many or too few changes far more, because the inputs are random.
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
TOLERANCE = 5e-5


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), of numbers that are not large."""
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


@dataclasses.dataclass(frozen=True)
class LstmState:
    """Rows of a hidden and a cell state, and the time steps since the last reset."""

    h: Floats
    c: Floats
    position: int

    def named(self) -> dict[str, Floats]:
        """As the server calls them."""
        return {"lstm/h": self.h, "lstm/c": self.c}


@dataclasses.dataclass(frozen=True)
class LstmDense:
    """The model; gates in Keras's order i, f, c, o."""

    kernel: Floats
    recurrent: Floats
    bias: Floats
    dense: Floats
    dense_bias: Floats

    @classmethod
    def load(cls, path: Path) -> LstmDense:
        """Read the weights of a functional model of one LSTM and one Dense layer."""
        with (
            zipfile.ZipFile(path) as archive,
            h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file,
        ):
            names = [f"lstm/cell/vars/{i}" for i in range(3)] + [f"dense/vars/{i}" for i in range(2)]
            return cls(*(np.array(file[f"layers/{name}"], np.float64) for name in names))

    @property
    def features(self) -> int:
        """Of an input row."""
        return len(self.kernel)

    @property
    def units(self) -> int:
        """Of a state row."""
        return len(self.recurrent)

    def initial(self, batch_size: int, states: Mapping[str, Floats] | None = None) -> LstmState:
        """The state that a session begins with."""
        zeros = LstmState(np.zeros((batch_size, self.units)), np.zeros((batch_size, self.units)), 0)
        return self.reset(zeros, states, None)

    def step(self, state: LstmState, x: Floats) -> tuple[Floats, LstmState]:
        """Consume (rows, features) or (rows, T, features); the outputs have T where x has."""
        h, c = state.h, state.c
        seen = []
        for now in np.moveaxis(x, 1, 0) if x.ndim == 3 else [x]:
            z = np.asarray(now, np.float64) @ self.kernel + h @ self.recurrent + self.bias
            i, f, candidate, o = np.split(z, 4, axis=-1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(candidate)
            h = sigmoid(o) * np.tanh(c)
            seen.append(h @ self.dense + self.dense_bias)
        y = np.stack(seen, 1) if x.ndim == 3 else seen[0]
        return y, LstmState(h, c, state.position + len(seen))

    def reset(
        self, state: LstmState, states: Mapping[str, Floats] | None, rows: Sequence[int] | None
    ) -> LstmState:
        """Set all rows, and the position to 0; or set some."""
        chosen = slice(None) if rows is None else list(rows)
        h, c = state.h.copy(), state.c.copy()
        h[chosen] = 0.0 if states is None else states["lstm/h"]
        c[chosen] = 0.0 if states is None else states["lstm/c"]
        return LstmState(h, c, 0 if rows is None else state.position)


def bits(array: Floats | None) -> bytes:
    """What tells two answers to the same call apart."""
    return b"" if array is None else array.tobytes()


def is_output(asked: str, seen: Floats | None, y: Floats | None) -> bool:
    """Whether what a step answered is what the replay gives, of which the caller may have asked for less."""
    if y is None or asked == "none":
        return seen is None
    if asked == "last" and y.ndim == 3:
        y = y[:, -1]
    return seen is not None and _is_close(seen, y)


def are_states(seen: Mapping[str, Floats], right: Mapping[str, Floats]) -> bool:
    """Whether states that were read are those of the replay."""
    return set(seen) == set(right) and all(_is_close(seen[name], right[name]) for name in right)


def _is_close(seen: Floats, right: Floats) -> bool:
    return seen.shape == right.shape and bool((np.abs(seen - right) <= TOLERANCE * (1 + np.abs(right))).all())
