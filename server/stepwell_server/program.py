"""The compiled artefact: a model made ready to step.

A program is one time step of a model as a pure function ``(inputs, state) -> (outputs, state)``, with
its specs and fingerprint. It lives in a folder: ``program.json``, ``initial.npz`` (only if some initial
state is not zero) and either ``program.tflite`` or ``saved_model/``. This module reads and writes that
folder and knows neither Keras nor any executor.

Tensors are found by fixed signature keys, never by order or by their Keras names (a name may hold
characters that a signature does not allow): input i is ``in_<i>``, state i ``state_<i>``, output i
``out_<i>``, the state after the step ``next_<i>``. The first dimension of each is the rows.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

#: Version of the folder's layout. A folder of another version is compiled again.
FORMAT = 2

ExecutorKind = Literal["litert", "tensorflow"]
Array = npt.NDArray[np.generic]


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a program."""

    name: str
    shape: tuple[int, ...]
    """Shape of one row at one time step: without batch and without time."""
    dtype: str
    """NumPy's name of the element type, e.g. ``float32``."""
    temporal: bool
    """Inputs: takes a time axis. Outputs: the whole-sequence call returns one value per time step."""


@dataclasses.dataclass(frozen=True, slots=True)
class StateSpec:
    """One state tensor, ``(rows, *shape)``."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def _row_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class ProofOptions:
    """What the user says about the proof of one model."""

    steps: int | None = None
    """Time steps over which it is compared with Keras; None: enough for what its layers reach."""
    trust: bool = False
    """Serve it also where its graph does not prove that it may be stepped."""


@dataclasses.dataclass(frozen=True, slots=True)
class Proof:
    """How it is known that stepping a model gives what one call of it over the sequence gives."""

    steps: int
    """Length of the sequences over which it was compared with Keras."""
    unproven: str = ""
    """What the graph does not prove, as a clause; empty: it follows from the graph, for every length."""
    compared: float = 1.0
    """Share of the rows and time steps of those sequences that rounding alone does not make meaningless."""

    def __str__(self) -> str:
        samples = f"compared with Keras over {self.steps} time steps"
        if self.compared < 0.995:
            samples += f" ({self.compared:.0%} of the values; rounding makes the rest meaningless)"
        return (
            f"trusted by --trust-causality, {samples}"
            if self.unproven
            else f"proven from its graph, {samples}"
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """A model made ready to step. Immutable; safe to share between threads."""

    fingerprint: str
    """Hash of architecture and weights. States of another fingerprint are never run."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[StateSpec, ...]
    """In the model's order: the order in which a list of states is read."""
    initial: tuple[Array, ...]
    """Initial value of one row for each state, of its spec's shape and dtype."""
    executor: ExecutorKind
    executor_reason: str
    """Why this executor, as a sentence for people."""
    batch_sizes: tuple[int, ...]
    """Batch sizes that give the same bits for a row; empty means every one does."""
    path: Path
    """The artefact's folder."""
    proof: Proof = Proof(steps=0, unproven="nothing is known of a proof")
    """How it is known that stepping it gives what Keras's call of the model gives."""

    @functools.cached_property
    def output_bytes(self) -> tuple[int, int]:
        """What a row of outputs takes: bytes for each time step, of the temporal ones, and once, of the others."""
        temporal = sum(_row_bytes(spec) for spec in self.outputs if spec.temporal)
        return temporal, sum(map(_row_bytes, self.outputs)) - temporal

    @property
    def state_row_bytes(self) -> int:
        """Size in bytes of the whole state of one row."""
        return sum(spec.row_bytes for spec in self.state)

    def save(self) -> None:
        """Write ``program.json`` and, where needed, ``initial.npz`` into ``path``."""
        document = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "inputs": [dataclasses.asdict(spec) for spec in self.inputs],
            "outputs": [dataclasses.asdict(spec) for spec in self.outputs],
            "state": [dataclasses.asdict(spec) for spec in self.state],
            "executor": self.executor,
            "executor_reason": self.executor_reason,
            "batch_sizes": list(self.batch_sizes),
            "proof": dataclasses.asdict(self.proof),
        }
        if any(np.any(value) for value in self.initial):
            named = {f"state_{i}": value for i, value in enumerate(self.initial)}
            np.savez(self.path / "initial.npz", **named)  # type: ignore[arg-type]
        (self.path / "program.json").write_text(json.dumps(document, indent=1))

    @classmethod
    def load(cls, path: Path) -> Program:
        """Read the folder ``path``.

        Raises:
            ValueError: the folder holds another layout version or is damaged.
            OSError: a file cannot be read.
        """
        document = json.loads((path / "program.json").read_text())
        if document.get("format") != FORMAT:
            raise ValueError(f"{path}: program format must be {FORMAT}; got {document.get('format')!r}")
        state = tuple(
            StateSpec(item["name"], tuple(item["shape"]), item["dtype"]) for item in document["state"]
        )
        return cls(
            fingerprint=document["fingerprint"],
            inputs=tuple(_tensor_spec(item) for item in document["inputs"]),
            outputs=tuple(_tensor_spec(item) for item in document["outputs"]),
            state=state,
            initial=_load_initial(path, state),
            executor=document["executor"],
            executor_reason=document["executor_reason"],
            batch_sizes=tuple(document["batch_sizes"]),
            proof=Proof(**document["proof"]),
            path=path,
        )


def _tensor_spec(item: dict[str, object]) -> TensorSpec:
    return TensorSpec(
        name=str(item["name"]),
        shape=tuple(item["shape"]),  # type: ignore[arg-type]
        dtype=str(item["dtype"]),
        temporal=bool(item["temporal"]),
    )


def _load_initial(path: Path, state: tuple[StateSpec, ...]) -> tuple[Array, ...]:
    file = path / "initial.npz"
    if not file.exists():
        return tuple(np.zeros(spec.shape, spec.dtype) for spec in state)
    with np.load(file) as stored:
        return tuple(stored[f"state_{i}"] for i in range(len(state)))
