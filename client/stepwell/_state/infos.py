"""The values that calls take and return: descriptions of models and sessions."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from google.protobuf import timestamp_pb2

from stepwell._state import display
from stepwell._state.tensors import Array, dtype_name
from stepwell.v1 import models_pb2, sessions_pb2, tensors_pb2

Inputs: TypeAlias = npt.ArrayLike | Mapping[str, npt.ArrayLike]
"""One array, or arrays by the names of the model's inputs."""
Outputs: TypeAlias = Array | Any
"""One array; a dict of arrays by name if the model has several outputs; None if none were asked for.

Which of them it is, the model and the call decide at run time; `Any` spares every caller the narrowing.
"""
OutputSelection: TypeAlias = Literal["all", "last", "none"] | Sequence[str]
"""Which outputs come back: of all of them every time step or the last, or none; or those of these names."""
TimeSelection: TypeAlias = Literal["all", "last"]
"""Which time steps of the outputs come back."""
StateSelection: TypeAlias = Literal["all", "last", "none"]
"""After which time steps the states come back."""
Rows: TypeAlias = Iterable[int] | npt.NDArray[np.bool_]
"""Some rows: their indexes, or booleans, one for each row."""
Mask: TypeAlias = npt.ArrayLike
"""Booleans: one for each row, (rows,), or for each row and time step, (rows, T)."""
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
#: Of the times that a `datetime` can be: 0001-01-01 and 9999-12-31, in seconds since the epoch.
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input, output or state tensor of a model.

    Example:
        >>> client.model("forecast").inputs[0].shape
        (3,)
    """

    name: str
    """Its name, e.g. "lstm/h"."""
    dtype: str
    """Element type the model computes with, as numpy calls it, e.g. "float32"."""
    shape: tuple[int, ...]
    """Shape of one row at one time step: without the batch and the time axis."""
    temporal: bool
    """It has a time axis after the batch axis (an output: when the inputs have one)."""

    @classmethod
    def _from_message(cls, spec: tensors_pb2.TensorSpec) -> Self:
        return cls(spec.name, dtype_name(spec.dtype), tuple(spec.shape), spec.temporal)

    def _kind(self) -> str:
        return f"{self.dtype}{self.shape}"


@dataclasses.dataclass(frozen=True, slots=True)
class ProofInfo:
    """How it is known that stepping a model gives what one call of it over the sequence gives.

    Example:
        >>> client.model("forecast").proof.is_trusted
        False
    """

    compared_steps: int
    """Length of the sequences on which it was compared with Keras, in time steps."""
    unproven: str
    """What does not follow from its graph and was trusted (``--trust-causality``), as a clause, or empty."""
    compared_share: float = 1.0
    """Share of their rows and time steps of which the comparison says something, 0 to 1."""

    @property
    def is_trusted(self) -> bool:
        """It does not all follow from the graph: the server was configured to trust the rest."""
        return bool(self.unproven)

    def __str__(self) -> str:
        if not self.compared_steps:
            return "unknown"
        samples = f"compared with Keras over {self.compared_steps} time steps"
        if self.compared_share < 0.995:
            samples += f" ({self.compared_share:.0%} of the values)"
        return f"TRUSTED, not proven; {samples}" if self.unproven else f"proven from its graph; {samples}"


@dataclasses.dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer of the Keras model that a program was compiled from.

    Example:
        >>> provenance = client.model("forecast").provenance
        >>> [layer.kind for layer in provenance.layers]
        ['LSTM', 'Dense']
    """

    name: str
    """Its name."""
    kind: str
    """Its class, e.g. "LSTM"."""
    output: str
    """Shape of what it returns, as Keras prints it, or empty."""
    parameters: int
    """Numbers in its weights."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProvenanceInfo:
    """Where the program of a model comes from: what was compiled, when and by what.

    Example:
        >>> client.model("forecast").provenance.source
        'forecast.keras'
    """

    source: str
    """Name of the file that Keras saved, without its folder."""
    source_sha256: str
    """SHA-256 of that file, in hexadecimal digits."""
    compiled_time: dt.datetime
    """When it was compiled, in UTC."""
    versions: Mapping[str, str]
    """Versions of what compiled it, by distribution: stepwell, tensorflow, keras, ai-edge-litert."""
    processor: str
    """Kind of the processor that compiled it, e.g. "x86_64"."""
    parameters: int
    """Numbers in the weights of the model."""
    layers: tuple[LayerInfo, ...]
    """Its layers in its order, those of nested models after the others."""

    @classmethod
    def _from_message(cls, message: models_pb2.Provenance) -> Self:
        return cls(
            source=message.source,
            source_sha256=message.source_sha256,
            compiled_time=_time_of(message.compiled_time),
            versions=dict(sorted(message.versions.items())),
            processor=message.processor,
            parameters=message.parameters,
            layers=tuple(
                LayerInfo(layer.name, layer.kind, layer.output, layer.parameters) for layer in message.layers
            ),
        )


ModelState: TypeAlias = Literal["", "loading", "ready", "draining", "failed"]
"""How a version of a model is."""
_MODEL_STATES: Mapping[models_pb2.ModelState.ValueType, ModelState] = {
    models_pb2.MODEL_STATE_LOADING: "loading",
    models_pb2.MODEL_STATE_READY: "ready",
    models_pb2.MODEL_STATE_DRAINING: "draining",
    models_pb2.MODEL_STATE_FAILED: "failed",
}


@dataclasses.dataclass(frozen=True, slots=True)
class ModelVersionInfo:
    """A version of a model: one that is loaded, is being loaded, or could not be.

    Example:
        >>> {version.state for version in client.model("forecast").versions}
        {'ready'}
    """

    version: int
    """Its number."""
    state: ModelState
    """ "ready" if it is served, "loading", "failed", or "draining" if it is served only to the sessions that it has
    and unloaded when they have ended; empty if the server is of another release, which has more states."""
    reason: str
    """Why it is so, as a sentence: the stage of "loading", what "failed"; else mostly empty."""
    fingerprint: str
    """Hash of its architecture and weights; empty while it is not known."""
    is_default: bool
    """It is what the name alone stands for."""
    labels: tuple[str, ...]
    """Its labels, in their order."""
    sessions: int
    """Open sessions on it, among those in memory."""
    path: str
    """The file that it came from, on the server's disk; empty if the server does not say."""
    loaded_time: dt.datetime | None
    """When it was loaded, in UTC; None while it is not."""

    @classmethod
    def _from_message(cls, message: models_pb2.ModelVersion) -> Self:
        is_loaded = message.HasField("loaded_time")
        return cls(
            version=message.version,
            state=_MODEL_STATES.get(message.state, ""),
            reason=message.reason,
            fingerprint=message.fingerprint,
            is_default=message.is_default,
            labels=tuple(message.labels),
            sessions=message.sessions,
            path=message.path,
            loaded_time=_time_of(message.loaded_time) if is_loaded else None,
        )


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class ModelInfo:
    """A model as it is served.

    Example:
        >>> client.model("forecast").name
        'forecast'
    """

    name: str
    """Name it is served under."""
    fingerprint: str
    """Hash of its architecture and weights, without names that Keras made up. A state belongs to one fingerprint, and
    fits other versions of its model with the same `structure`."""
    inputs: tuple[TensorInfo, ...]
    """Its inputs."""
    outputs: tuple[TensorInfo, ...]
    """Its outputs."""
    state: tuple[TensorInfo, ...]
    """Its state tensors, in the order in which a list of states is read."""
    executor: str
    """What runs it: "litert" or "tensorflow"."""
    executor_reason: str
    """Why, as a sentence."""
    batch_sizes: tuple[int, ...]
    """Batch sizes that give the same bits for a row; others are padded up. Empty: all do."""
    state_row_bytes: int
    """Size of the state of one row, in bytes."""
    sessions: int
    """Open sessions when it was described."""
    proof: ProofInfo = ProofInfo(0, "")
    """How it is known that it may be stepped."""
    provenance: ProvenanceInfo | None = None
    """Where its program comes from; None if it is not known."""
    version: int = 0
    """The version that all of this is about: the default, unless another one was asked for; 0 if it was read from
    a file."""
    versions: tuple[ModelVersionInfo, ...] = ()
    """All versions of the name, in their order."""
    structure: str = ""
    """Digest of its architecture without weights, and without names that Keras made up. A state of one version of a model
    fits every version of it with the same structure. Empty: it is not known."""

    @classmethod
    def _from_message(cls, model: models_pb2.Model) -> Self:
        return cls(
            name=model.name,
            fingerprint=model.fingerprint,
            inputs=_infos(model.inputs),
            outputs=_infos(model.outputs),
            state=_infos(model.state),
            executor=model.executor,
            executor_reason=model.executor_reason,
            batch_sizes=tuple(model.batch_sizes),
            state_row_bytes=model.state_row_bytes,
            sessions=model.sessions,
            proof=ProofInfo(model.proof.compared_steps, model.proof.unproven, model.proof.compared_share),
            provenance=ProvenanceInfo._from_message(model.provenance)
            if model.HasField("provenance")
            else None,
            version=model.version,
            versions=tuple(map(ModelVersionInfo._from_message, model.versions)),
            structure=model.structure,
        )

    def __repr__(self) -> str:
        tensors = ", ".join(
            f"{what}=[{_names(infos)}]"
            for what, infos in (("inputs", self.inputs), ("outputs", self.outputs), ("state", self.state))
        )
        version = f"version={self.version}, " if self.version else ""
        return (
            f"{type(self).__name__}({self.name!r}, {version}{tensors}, executor={self.executor!r}, "
            f"sessions={self.sessions})"
        )

    def _headings(self) -> Sequence[str]:
        return "model", "version", "inputs", "outputs", "state", "executor", "sessions", "fingerprint"

    def _cells(self) -> Sequence[object]:
        tensors = (_names(infos) for infos in (self.inputs, self.outputs, self.state))
        counts = self.sessions, display.short(self.fingerprint)
        return self.name, self.version or "", *tensors, self.executor, *counts

    def _repr_html_(self) -> str:
        named = (("input", self.inputs), ("output", self.outputs), ("state", self.state))
        rows = [(what, info.name, info.dtype, info.shape) for what, infos in named for info in infos]
        tensors = display.table_html(
            "", ("", "tensor", "dtype", "shape of a row"), rows[:_TENSORS], more=len(rows) - _TENSORS
        )
        facts = {
            "version": self.version or "not known",
            "executor": self.executor,
            "proof": self.proof,
            "state of a row": f"{self.state_row_bytes} bytes",
            "sessions": self.sessions,
            "fingerprint": display.short(self.fingerprint),
        }
        return display.facts_html(f"Model {self.name!r}", facts) + tensors


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class LoadedModel(ModelInfo):
    """A model whose versions were changed, described as the version that the call was about.

    Example:
        >>> client.set_default("forecast", client.model("forecast").version).moved_sessions
        0
    """

    moved_sessions: int = 0
    """Sessions in memory that have gone on to this version, or will when they are next used."""
    previous_version: int = 0
    """The version that was the default before, as `Client.set_default` tells it; else 0."""


@dataclasses.dataclass(frozen=True, slots=True)
class SlowSession:
    """The slowest step of a session within the last minute.

    Example:
        >>> client.slow_sessions(limit=1)[1:]
        []
    """

    session_id: str
    """It may have been closed meanwhile."""
    model: str
    """Its model."""
    seconds: float
    """From when the server took the step in until it was answered."""
    age_s: float
    """How long ago that was, in seconds."""
    tenant: str = ""
    """Whose it is, where everybody's sessions are listed (`tenant="*"`). Empty elsewhere, and for sessions of no tenant."""


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class ServerInfo:
    """A server and what it serves.

    Example:
        >>> [model.name for model in client.server_info().models]
        ['forecast']
    """

    front: str
    """What speaks to the network: "native" or "python"."""
    models: tuple[ModelInfo, ...]
    """Its models, in the order of their names."""
    id: str = ""
    """Of the server's process, random: another one after a restart. Label `server_id` of the metric `stepwell_build_info`."""
    metrics_address: str | None = None
    """Where its metrics are, HOST:PORT as the server listens there; "0.0.0.0" or "[::]" stands for all of its addresses.
    Empty: it serves none. None: only admins may know."""

    @classmethod
    def _from_message(cls, reply: models_pb2.ListModelsResponse) -> Self:
        server = reply.server
        return cls(
            server.front,
            tuple(ModelInfo._from_message(model) for model in reply.models),
            server.id,
            server.metrics_address if server.HasField("metrics_address") else None,
        )

    def __repr__(self) -> str:
        names = display.some(model.name for model in self.models)
        return f"ServerInfo(front={self.front!r}, models=[{names}])"

    def _repr_html_(self) -> str:
        facts = {"front": self.front, "models": len(self.models)}
        return display.facts_html("Server", facts) + display.Listing(self.models)._repr_html_()


_TENSORS = 50
"""Tensors of a model that a notebook shows."""


def _names(infos: Sequence[TensorInfo]) -> str:
    return display.some(f"{info.name}: {info._kind()}" for info in infos)


def _infos(specs: Sequence[tensors_pb2.TensorSpec]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo._from_message(spec) for spec in specs)


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class SessionInfo:
    """A session as of its last completed change.

    Example:
        >>> client.session_info(session.id).batch_size
        1
    """

    session_id: str
    """Its id."""
    model: str
    """Name of its model."""
    fingerprint: str
    """Fingerprint of the model its state belongs to."""
    batch_size: int
    """Rows."""
    revision: int
    """Changes so far."""
    position: int
    """Time steps consumed since the last reset of the whole state."""
    created_time: dt.datetime
    """When it was opened, in UTC."""
    last_used_time: dt.datetime
    """When it was last changed, read or resumed, in UTC."""
    resident: bool
    """Its state is in memory (True) or only in the store (False)."""
    max_idle_s: float | None = None
    """It expires when it was not used for this many seconds: its own limit, or the server's where that is shorter. None:
    never."""
    tenant: str = ""
    """Whose it is, where everybody's sessions are listed (`tenant="*"`). Empty elsewhere, and for sessions of no tenant."""
    model_version: int = 0
    """Version of its model that its next change runs on."""
    model_version_pinned: bool = False
    """It was opened with a version or a label, and stays on that version."""

    @classmethod
    def _from_message(cls, session: sessions_pb2.Session) -> Self:
        return cls(
            session_id=session.session_id,
            model=session.model,
            fingerprint=session.model_fingerprint,
            batch_size=session.batch_size,
            revision=session.revision,
            position=session.position,
            created_time=_time_of(session.created_time),
            last_used_time=_time_of(session.last_used_time),
            resident=session.resident,
            max_idle_s=session.max_idle.seconds + session.max_idle.nanos / 1e9
            if session.HasField("max_idle")
            else None,
            tenant=session.tenant,
            model_version=session.model_version,
            model_version_pinned=session.model_version_pinned,
        )

    def __repr__(self) -> str:
        where = "resident" if self.resident else "paged out"
        tenant = f", tenant={self.tenant!r}" if self.tenant else ""
        return (
            f"SessionInfo({self.session_id!r}{tenant}, model={self._versioned()!r}, batch_size={self.batch_size}, revision={self.revision}, "
            f"position={self.position}, last used {_second(self.last_used_time)}, {where})"
        )

    def _versioned(self) -> str:
        return f"{self.model}@{self.model_version}" if self.model_version else self.model

    def _headings(self) -> Sequence[str]:
        return "session", "model", "batch_size", "revision", "position", "created", "last used", "resident"

    def _cells(self) -> Sequence[object]:
        times = _second(self.created_time), _second(self.last_used_time)
        counts = self.batch_size, self.revision, self.position
        return self.session_id, self._versioned(), *counts, *times, "yes" if self.resident else "no"

    def _repr_html_(self) -> str:
        return display.facts_html("Session", dict(zip(self._headings(), self._cells(), strict=True)))


def _second(time: dt.datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


def _time_of(message: timestamp_pb2.Timestamp) -> dt.datetime:
    """A time in UTC; the nearest one that a `datetime` can be, as one row of a list must not fail the others."""
    seconds = min(max(_FIRST_SECOND, message.seconds), _LAST_SECOND)
    return _EPOCH + dt.timedelta(seconds=seconds, microseconds=min(max(0, message.nanos // 1000), 999_999))
