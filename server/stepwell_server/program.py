"""The compiled form of a model.

A program is one time step of a model as a pure function ``(inputs, state) -> (outputs, state)``, with its specs,
fingerprint, proof and provenance. This module does not depend on Keras, an executor, or the file format
(`program_file`).

Tensors are identified by fixed signature keys, not by order or by their Keras names (which may contain characters
that a signature does not allow): input i is ``in_<i>``, state i ``state_<i>``, output i ``out_<i>``, and the state
after the step ``next_<i>``. The first dimension of each is the rows. Of a ring (`StateSpec.gap`), a step takes and
returns parts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

#: The file of a program that LiteRT runs, and the folder of one that TensorFlow runs.
FLATBUFFER = "program.tflite"
SAVED_MODEL = "saved_model/"
#: The file of a step function that ONNX Runtime runs.
ONNX_MODEL = "program.onnx"
#: The number of digits of a fingerprint shown to people.
FINGERPRINT_DIGITS = 12

ExecutorKind = Literal["litert", "tensorflow", "onnxruntime"]
RowsProof = Literal["", "proven", "alone", "trusted"]
"""Why the rows of a step function never mix: its graph proves it; each row has a run of its own; ``--trust-rows``. Empty:
it is a Keras model, whose proof covers this."""
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
    window: int = dataclasses.field(default=0, compare=False)
    """The number of time steps, the oldest first, that its first axis holds. 0: it is not a window over time."""
    gap: int = dataclasses.field(default=0, compare=False)
    """Not 0: a ring, which is a window of which a step reads every `gap`-th element from the oldest on. The program takes
    only those, and returns only the new one."""

    @property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize

    @property
    def changed_bytes(self) -> int:
        """Size of the values of one row that one time step replaces. Those of a window move by one place."""
        return self.row_bytes // max(1, self.window)

    @property
    def taken(self) -> StateSpec:
        """The tensor that the program takes."""
        if not self.gap:
            return self
        return dataclasses.replace(self, shape=(-(-self.shape[0] // self.gap), *self.shape[1:]))

    @property
    def returned(self) -> StateSpec:
        """The tensor that the program returns."""
        return dataclasses.replace(self, shape=self.shape[1:]) if self.gap else self


def dtype_of(name: str) -> np.dtype[np.generic]:
    """Return the NumPy type of a name."""
    if name == "bfloat16":
        # NumPy lacks it, and few models use it.
        import ml_dtypes

        bfloat16: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What the user declares about a step function. Each mapping is by the name of a tensor in the file."""

    states: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The output that holds the state after the step, by the input that takes the state before it."""
    batch_axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The values of inputs that never change: numbers, or nested lists of them."""
    initial: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The initial states: a number for all elements, or nested lists of a row."""
    contexts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """How many of the last elements of an input, along its last axis, are put before the next one."""
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """The shape of one row of an input, where the file leaves it open: without the batch axis and the context."""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The names for users."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProofOptions:
    """The user's options for the proof of one model."""

    steps: int | None = None
    """The number of time steps for the comparison with Keras; None: enough for the reach of its layers."""
    trust: bool = False
    """Serve it even if its graph does not prove that it can be stepped."""
    trust_rows: bool = False
    """Batch the rows of a step function even if its graph does not prove that they stay apart."""
    declaration: Declaration = Declaration()
    """For a step function: what is declared beside its file's own declaration (`model.toml`)."""


_ROWS = {
    "proven": "its graph keeps rows apart",
    "alone": "each row run alone",
    "trusted": "its rows trusted to be apart by --trust-rows",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Proof:
    """The evidence that stepping a model gives the same results as one call over the whole sequence."""

    steps: int
    """The length of the sequences in the comparison with Keras."""
    unproven: str = ""
    """What the graph does not prove, as a clause; empty: it is proven from the graph for every length."""
    compared: float = 1.0
    """The share of the compared rows and time steps that rounding errors do not make meaningless."""
    rows: RowsProof = ""
    """Why rows never mix, for a step function: one call is one time step, so nothing is compared with Keras."""

    def __str__(self) -> str:
        if self.rows:
            return f"a step function, {_ROWS[self.rows]}"
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
    """Known inputs and outputs, to check on another machine that the program behaves the same."""

    inputs: tuple[Array, ...]
    """Rows of one time step for each input, ``(rows, *spec.shape)``."""
    outputs: tuple[Array, ...]
    """The outputs that `engine.executors.trial` got on the machine that compiled the program."""
    tolerance: float
    """The allowed difference on another processor, as a share of an output's largest value."""
    sizes: tuple[int, ...]
    """Batch sizes that were tested for giving the same bits."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the Keras model, for people."""

    name: str
    kind: str
    """The name of its class."""
    output: str
    """The shapes of its outputs, as printed by Keras; empty: unknown."""
    parameters: int


@dataclasses.dataclass(frozen=True, slots=True)
class Provenance:
    """Where a program comes from. Informational: nothing depends on it."""

    source: str
    """The name of the Keras file, without its folder."""
    source_sha256: str
    compiled_time: int
    """When it was compiled, in seconds since 1970 (UTC)."""
    versions: Mapping[str, str]
    """The versions of the packages that compiled it: stepwell, tensorflow, keras, ai-edge-litert."""
    processor: str
    """The processor architecture on which it was compiled, such as x86_64."""
    parameters: int
    """The number of weights."""
    layers: tuple[Layer, ...]
    """In the model's order, each nested model followed by its layers."""


@dataclasses.dataclass(frozen=True, slots=True)
class Architecture:
    """A model without its weights and without the names that Keras generated (`architecture`)."""

    structure: str
    """Its digest. Programs with equal digests have the same inputs, outputs and states in the same order, whatever their
    names: a state of one is valid for the other."""
    config: str = dataclasses.field(default="", repr=False)
    """Its canonical configuration as JSON, for describing differences; empty: too large."""
    names: tuple[str, ...] = ()
    """The names that Keras generated, by their numbers in ``config``."""
    ambiguous: tuple[tuple[str, ...], ...] = ()
    """Groups of layers with states that differ only in their names: they are never renamed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Names:
    """The names of a program's tensors, each in order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    state: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled model. Immutable; safe to share between threads."""

    fingerprint: str
    """The hash of architecture and weights. States with another fingerprint are never run."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[StateSpec, ...]
    """In the model's order, which is the order of a list of states."""
    initial: tuple[Array, ...]
    """The initial value of one row for each state."""
    executor: ExecutorKind
    executor_reason: str
    """Why this executor was chosen, as a sentence."""
    batch_sizes: tuple[int, ...]
    """Batch sizes that give the same bits for a row; empty: all do."""
    files: Mapping[str, bytes] = dataclasses.field(repr=False)
    """The files that its executor loads, by name: `FLATBUFFER`, `ONNX_MODEL`, or the contents of the folder
    `SAVED_MODEL`."""
    proof: Proof = Proof(steps=0, unproven="nothing is known of a proof")
    """The evidence that stepping it gives the same results as Keras."""
    trial: Trial | None = dataclasses.field(default=None, repr=False)
    """The test for the processor that is to run it; None: there is none."""
    provenance: Provenance | None = None
    """Where it comes from; None: unknown."""
    architecture: Architecture | None = None
    """The model without weights and generated names; None: programs are compared by names only."""
    file_names: Names | None = None
    """The names of its tensors in its file, if they differ from the served names (`called`)."""
    multiply_adds: int | None = None
    """The multiplications of one row and time step, in products of matrices and convolutions; None: not counted."""

    @property
    def structure(self) -> str:
        """`Architecture.structure`; empty: unknown."""
        return "" if self.architecture is None else self.architecture.structure

    @property
    def names(self) -> Names:
        """The names of its tensors."""
        inputs, outputs, state = (
            [spec.name for spec in specs] for specs in (self.inputs, self.outputs, self.state)
        )
        return Names(tuple(inputs), tuple(outputs), tuple(state))

    def called(self, names: Names) -> Program:
        """Return the same program with other names of its tensors. Executors identify them by position."""
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
        """The size of a row of outputs in bytes: per time step (temporal outputs), and once (the others)."""
        temporal = sum(spec.row_bytes for spec in self.outputs if spec.temporal)
        return temporal, sum(spec.row_bytes for spec in self.outputs) - temporal

    @functools.cached_property
    def may_not_end(self) -> bool:
        """Whether a run may take any time: its graph has a loop with a condition."""
        # The name of an operator stands in the file as it is.
        return b"Loop" in self.files.get(ONNX_MODEL, b"")

    @functools.cached_property
    def has_rings(self) -> bool:
        """Whether some of its states are rings (`StateSpec.gap`)."""
        return any(spec.gap for spec in self.state)

    @functools.cached_property
    def states_taken(self) -> tuple[StateSpec, ...]:
        """The state as the program takes it."""
        return tuple(spec.taken for spec in self.state)

    @functools.cached_property
    def states_returned(self) -> tuple[StateSpec, ...]:
        """The state as the program returns it."""
        return tuple(spec.returned for spec in self.state)

    @property
    def state_row_bytes(self) -> int:
        """The size of the state of one row in bytes."""
        return sum(spec.row_bytes for spec in self.state)

    @property
    def changed_state_row_bytes(self) -> int:
        """The size of the values in the state of one row that one time step replaces, in bytes."""
        return sum(spec.changed_bytes for spec in self.state)


def _called(specs: Sequence[_Spec], names: Sequence[str]) -> tuple[_Spec, ...]:
    return tuple(dataclasses.replace(spec, name=name) for spec, name in zip(specs, names, strict=True))
