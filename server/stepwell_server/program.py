"""The compiled artefact: a model made ready to step.

A program is one time step of a model as a pure function ``(inputs, state) -> (outputs, state)``, with
its specs and fingerprint, how it was proven, and where it comes from. This module knows neither Keras nor
any executor, nor how a program is stored (`program_file`).

Tensors are found by fixed signature keys, never by order or by their Keras names (a name may hold
characters that a signature does not allow): input i is ``in_<i>``, state i ``state_<i>``, output i
``out_<i>``, the state after the step ``next_<i>``. The first dimension of each is the rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

#: The file of a program that LiteRT runs, and the folder of one that TensorFlow runs.
FLATBUFFER = "program.tflite"
SAVED_MODEL = "saved_model/"
#: So many digits of a fingerprint are shown to people.
FINGERPRINT_DIGITS = 12

ExecutorKind = Literal["litert", "tensorflow"]
Array = npt.NDArray[np.generic]
_Spec = TypeVar("_Spec", "TensorSpec", "StateSpec")


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

    @property
    def row_bytes(self) -> int:
        """Size of one row at one time step in bytes."""
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class StateSpec:
    """One state tensor, ``(rows, *shape)``."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize


def dtype_of(name: str) -> np.dtype[np.generic]:
    """NumPy's type of a name."""
    if name == "bfloat16":
        # NumPy does not know it, and almost no model has it.
        import ml_dtypes

        bfloat16: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


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
class Trial:
    """Known inputs and outputs: whoever runs the program elsewhere can see that it does the same there."""

    inputs: tuple[Array, ...]
    """Rows of one time step for each input, ``(rows, *spec.shape)``."""
    outputs: tuple[Array, ...]
    """What `engine.executors.trial` gets of them for each output, where the program was compiled."""
    tolerance: float
    """By how much they may differ on another processor, as a share of an output's largest value."""
    sizes: tuple[int, ...]
    """Batch sizes of which it was found out whether they give the same bits."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the Keras model, for people."""

    name: str
    kind: str
    """Its class."""
    output: str
    """Shapes of what it returns, as Keras prints them; empty: not known."""
    parameters: int


@dataclasses.dataclass(frozen=True, slots=True)
class Provenance:
    """Where a program comes from, for people: nothing depends on it."""

    source: str
    """Name of the Keras model's file, without its folder."""
    source_sha256: str
    compiled_time: int
    """When it was compiled, in seconds since 1970 (UTC)."""
    versions: Mapping[str, str]
    """Versions of what compiled it, by distribution: stepwell, tensorflow, keras, ai-edge-litert."""
    processor: str
    """The kind of processor on which its bits were compared first, such as x86_64."""
    parameters: int
    """Numbers in the model's weights."""
    layers: tuple[Layer, ...]
    """In the model's order, those of nested models after them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Architecture:
    """What a model is apart from its weights and from the names that Keras made up (`architecture`)."""

    structure: str
    """Digest of it. Two programs with the same one have the same inputs, outputs and states, in the same order, whatever
    these are called: a state of one is a state of the other."""
    config: str = dataclasses.field(default="", repr=False)
    """Its configuration in canonical form, as JSON, to say how two of them differ; empty: it is too large."""
    names: tuple[str, ...] = ()
    """The names that Keras made up, by their numbers in ``config``."""
    ambiguous: tuple[tuple[str, ...], ...] = ()
    """Groups of layers that carry states, and that only their names tell apart: they are never renamed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Names:
    """What the tensors of a program are called, each in its order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    state: tuple[str, ...]


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
    files: Mapping[str, bytes] = dataclasses.field(repr=False)
    """What its executor loads, by name: `FLATBUFFER`, or what is in the folder `SAVED_MODEL`."""
    proof: Proof = Proof(steps=0, unproven="nothing is known of a proof")
    """How it is known that stepping it gives what Keras's call of the model gives."""
    trial: Trial | None = dataclasses.field(default=None, repr=False)
    """With what it is tried on the processor that is to run it; None: it cannot be."""
    provenance: Provenance | None = None
    """Where it comes from; None: nothing is known of that."""
    architecture: Architecture | None = None
    """What it is apart from weights and made-up names; None: it is compared by its names alone."""
    file_names: Names | None = None
    """What its tensors are called in its file, if it is served with other names (`called`)."""

    @property
    def structure(self) -> str:
        """`Architecture.structure`; empty: not known."""
        return "" if self.architecture is None else self.architecture.structure

    @property
    def names(self) -> Names:
        """What its tensors are called."""
        inputs, outputs, state = (
            [spec.name for spec in specs] for specs in (self.inputs, self.outputs, self.state)
        )
        return Names(tuple(inputs), tuple(outputs), tuple(state))

    def called(self, names: Names) -> Program:
        """The same program with other names of its tensors, as many of each. What runs it finds them by their place."""
        if names == self.names:
            return self
        return dataclasses.replace(
            self,
            file_names=self.file_names or self.names,
            inputs=_called(self.inputs, names.inputs),
            outputs=_called(self.outputs, names.outputs),
            state=_called(self.state, names.state),
        )

    @functools.cached_property
    def output_bytes(self) -> tuple[int, int]:
        """What a row of outputs takes: bytes for each time step, of the temporal ones, and once, of the others."""
        temporal = sum(spec.row_bytes for spec in self.outputs if spec.temporal)
        return temporal, sum(spec.row_bytes for spec in self.outputs) - temporal

    @property
    def state_row_bytes(self) -> int:
        """Size in bytes of the whole state of one row."""
        return sum(spec.row_bytes for spec in self.state)


def _called(specs: Sequence[_Spec], names: Sequence[str]) -> tuple[_Spec, ...]:
    return tuple(dataclasses.replace(spec, name=name) for spec, name in zip(specs, names, strict=True))
