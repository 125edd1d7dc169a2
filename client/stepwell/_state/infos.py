"""Arguments and results of calls: arrays, and descriptions of models and sessions."""

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
"""One array, or a mapping from the names of the model's inputs to arrays."""
Outputs: TypeAlias = Array | Any
"""One array; a dict of arrays by name if the model has several outputs; None if no outputs were requested.

The model and the call decide at run time which of these it is. `Any` saves callers from narrowing the type.
"""
OutputSelection: TypeAlias = Literal["all", "last", "none"] | Sequence[str]
"""Outputs to return: "all" time steps of all outputs, the "last" one, "none", or the names of some outputs."""
TimeSelection: TypeAlias = Literal["all", "last"]
"""Time steps of the named outputs to return."""
StateSelection: TypeAlias = Literal["all", "last", "none"]
"""Time steps after which to return the states."""
Rows: TypeAlias = Iterable[int] | npt.NDArray[np.bool_]
"""A selection of rows: their indexes, or booleans, one for each row."""
Mask: TypeAlias = npt.ArrayLike
"""Booleans: one for each row, (rows,), or for each row and time step, (rows, T)."""
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
#: The first and last times of a `datetime`, 0001-01-01 and 9999-12-31, in seconds since the epoch.
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input, output or state tensor of a model.

    Example:
        >>> client.model("forecast").inputs[0].shape
        (3,)
    """

    name: str
    """Name of the tensor, for example "lstm/h"."""
    dtype: str
    """The element type that the model computes with, as numpy calls it, for example "float32"."""
    shape: tuple[int, ...]
    """Shape of one row at one time step, without the batch axis and the time axis."""
    temporal: bool
    """Whether the tensor has a time axis after the batch axis. An output has one if the inputs have one."""
    window: int = 0
    """Number of time steps, the oldest first, that the first axis of a state holds; 0 if it is not a window over time."""

    @classmethod
    def _from_message(cls, spec: tensors_pb2.TensorSpec) -> Self:
        return cls(spec.name, dtype_name(spec.dtype), tuple(spec.shape), spec.temporal, spec.window)

    def _kind(self) -> str:
        return f"{self.dtype}{self.shape}"


_STEP_FUNCTIONS = {
    "proven": "a step function; its graph keeps rows apart",
    "alone": "a step function; each row run alone",
    "trusted": "a step function; its rows TRUSTED to be apart, not proven",
}


@dataclasses.dataclass(frozen=True, slots=True)
class ProofInfo:
    """The evidence that stepping a model gives the same result as one call of it on the whole sequence.

    A step function (`.onnx`) is served as it is, because one call of it is one time step: `rows` is all that counts.

    Example:
        >>> client.model("forecast").proof.is_trusted
        False
    """

    compared_steps: int
    """Length, in time steps, of the sequences on which the model was compared with Keras."""
    unproven: str
    """The property that the graph does not prove and ``--trust-causality`` or ``--trust-rows`` trusts, as a clause;
    otherwise empty.
    """
    compared_share: float = 1.0
    """Share of the rows and time steps for which the comparison is conclusive, 0 to 1."""
    rows: str = ""
    """Why rows never mix, for a step function (`.onnx`): "proven" by its graph, each run "alone", or "trusted" by
    ``--trust-rows``. Empty for a Keras model.
    """

    @property
    def is_trusted(self) -> bool:
        """Whether the graph does not prove everything and the server was configured to trust the rest."""
        return bool(self.unproven)

    def __str__(self) -> str:
        if self.rows:
            return _STEP_FUNCTIONS.get(self.rows, f"a step function, its rows {self.rows}")
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
    """Name of the layer."""
    kind: str
    """Class of the layer, for example "LSTM"."""
    output: str
    """Shape of its output as Keras prints it, or empty."""
    parameters: int
    """Number of its weights."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProvenanceInfo:
    """The origin of a model's program: the file it was compiled from, when, and with which versions.

    Example:
        >>> client.model("forecast").provenance.source
        'forecast.keras'
    """

    source: str
    """Name of the file that Keras saved, without its folder."""
    source_sha256: str
    """SHA-256 of that file, in hexadecimal."""
    compiled_time: dt.datetime
    """Time of compilation, in UTC."""
    versions: Mapping[str, str]
    """Versions of the packages that compiled it: stepwell, tensorflow, keras and ai-edge-litert."""
    processor: str
    """Architecture of the processor that compiled it, for example "x86_64"."""
    parameters: int
    """Number of the model's weights."""
    layers: tuple[LayerInfo, ...]
    """Layers in the model's order, followed by those of nested models."""

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
"""The state of a version of a model."""
_MODEL_STATES: Mapping[models_pb2.ModelState.ValueType, ModelState] = {
    models_pb2.MODEL_STATE_LOADING: "loading",
    models_pb2.MODEL_STATE_READY: "ready",
    models_pb2.MODEL_STATE_DRAINING: "draining",
    models_pb2.MODEL_STATE_FAILED: "failed",
}


@dataclasses.dataclass(frozen=True, slots=True)
class ModelVersionInfo:
    """A version of a model that is loaded, is being loaded, or failed to load.

    Example:
        >>> {version.state for version in client.model("forecast").versions}
        {'ready'}
    """

    version: int
    """Number of the version."""
    state: ModelState
    """ "ready" if it is served; "loading"; "failed"; "draining" if it is served only until its sessions end, and then
    unloaded. Empty if the server is of a release with other states.
    """
    reason: str
    """Explanation of the state, as a sentence: the stage of "loading", or the error of "failed"; usually empty
    otherwise.
    """
    fingerprint: str
    """Hash of its architecture and weights; empty until it is known."""
    is_default: bool
    """Whether the model's name alone refers to this version."""
    labels: tuple[str, ...]
    """Labels of the version, sorted."""
    sessions: int
    """Number of open sessions on it, among the sessions in memory."""
    path: str
    """Path of its file on the server's disk; empty if the server does not report it."""
    loaded_time: dt.datetime | None
    """Time when it was loaded, in UTC; None if it is not loaded."""

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
    """A served model, described as one of its versions.

    Example:
        >>> client.model("forecast").name
        'forecast'
    """

    name: str
    """Name of the model on the server."""
    fingerprint: str
    """Hash of its architecture and weights, without names that Keras generated. A state belongs to one fingerprint, and
    fits other versions of the model that have the same `structure`.
    """
    inputs: tuple[TensorInfo, ...]
    """Inputs of the model."""
    outputs: tuple[TensorInfo, ...]
    """Outputs of the model."""
    state: tuple[TensorInfo, ...]
    """State tensors of the model. A list of state arrays has this order."""
    executor: str
    """The runtime that executes it: "litert", "tensorflow" or "onnxruntime"."""
    executor_reason: str
    """Why that runtime was chosen, as a sentence."""
    batch_sizes: tuple[int, ...]
    """Batch sizes at which a row has the same bits; other batches are padded to them. Empty: all batch sizes."""
    state_row_bytes: int
    """Size of the state of one row, in bytes."""
    sessions: int
    """Number of open sessions at the time of the call."""
    proof: ProofInfo = ProofInfo(0, "")
    """The evidence that the model can be stepped."""
    provenance: ProvenanceInfo | None = None
    """The origin of its program; None if it is not known."""
    version: int = 0
    """The version described here: the default unless the call named another one; 0 for a model read from a file."""
    versions: tuple[ModelVersionInfo, ...] = ()
    """All versions of the model, sorted by number."""
    structure: str = ""
    """Digest of its architecture without weights and without names that Keras generated. A state fits every version of
    the model with the same structure. Empty if it is not known.
    """
    changed_state_row_bytes: int = 0
    """Size of the values in the state of one row that one time step replaces, in bytes. The others belong to windows
    over time, and move by one place.
    """
    multiply_adds: int | None = None
    """Number of multiplications that one time step of one row takes in products of matrices and convolutions. The body
    of a loop counts once. None if it is not counted, as for a step function.
    """

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
            proof=ProofInfo(
                model.proof.compared_steps,
                model.proof.unproven,
                model.proof.compared_share,
                model.proof.rows,
            ),
            provenance=ProvenanceInfo._from_message(model.provenance)
            if model.HasField("provenance")
            else None,
            version=model.version,
            versions=tuple(map(ModelVersionInfo._from_message, model.versions)),
            structure=model.structure,
            changed_state_row_bytes=model.changed_state_row_bytes,
            multiply_adds=model.multiply_adds if model.HasField("multiply_adds") else None,
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
    """A model whose versions a call has changed, described as the version that the call named.

    Example:
        >>> client.set_default("forecast", client.model("forecast").version).moved_sessions
        0
    """

    moved_sessions: int = 0
    """Number of sessions in memory that moved to this version, or will move when they are next used."""
    previous_version: int = 0
    """The previous default version, in a result of `Client.set_default`; otherwise 0."""


@dataclasses.dataclass(frozen=True, slots=True)
class SlowSession:
    """The slowest step of a session within the last minute.

    Example:
        >>> client.slow_sessions(limit=1)[1:]
        []
    """

    session_id: str
    """Id of the session, which may have been closed since."""
    model: str
    """Name of the session's model."""
    seconds: float
    """Time from the arrival of the step at the server to its answer, in seconds."""
    age_s: float
    """How long ago that was, in seconds."""
    tenant: str = ""
    """Tenant of the session, if the client lists those of all tenants (`tenant="*"`). Otherwise empty, as for sessions
    without a tenant.
    """


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class ServerInfo:
    """A server and its models.

    Example:
        >>> [model.name for model in client.server_info().models]
        ['forecast']
    """

    front: str
    """The network front: "native" or "python"."""
    models: tuple[ModelInfo, ...]
    """Models of the server, sorted by name."""
    id: str = ""
    """Random id of the server's process, which changes at a restart. It is the label `server_id` of the metric
    `stepwell_build_info`.
    """
    metrics_address: str | None = None
    """Address of its metrics, HOST:PORT as the server listens there; "0.0.0.0" or "[::]" means all of its addresses.
    Empty if it serves no metrics. None if the caller is not an admin.
    """
    http_address: str = ""
    """URL at which it serves JSON and its console, with a host as in `metrics_address`. Empty if it serves none."""
    role: str = ""
    """Your role: "viewer", "user" or "admin". "admin" if the server does not authenticate its callers. Empty if the
    server is too old to report it.
    """

    @classmethod
    def _from_message(cls, reply: models_pb2.ListModelsResponse) -> Self:
        server = reply.server
        return cls(
            server.front,
            tuple(ModelInfo._from_message(model) for model in reply.models),
            server.id,
            server.metrics_address if server.HasField("metrics_address") else None,
            server.http_address,
            server.role,
        )

    def __repr__(self) -> str:
        names = display.some(model.name for model in self.models)
        return f"ServerInfo(front={self.front!r}, models=[{names}])"

    def _repr_html_(self) -> str:
        facts = {"front": self.front, "models": len(self.models)}
        return display.facts_html("Server", facts) + display.Listing(self.models)._repr_html_()


_TENSORS = 50
"""Number of tensors of a model that a notebook shows."""


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
    """Id of the session."""
    model: str
    """Name of the session's model."""
    fingerprint: str
    """Fingerprint of the model that the state belongs to."""
    batch_size: int
    """Number of rows."""
    revision: int
    """Number of changes so far."""
    position: int
    """Time steps since the last reset of the whole state."""
    created_time: dt.datetime
    """Time when it was opened, in UTC."""
    last_used_time: dt.datetime
    """Time when it was last changed, read or resumed, in UTC."""
    resident: bool
    """Whether its state is in memory; otherwise it is only in the store."""
    max_idle_s: float | None = None
    """The session expires after this many seconds without use: its own limit, or the server's if that is shorter. None
    if it never expires.
    """
    tenant: str = ""
    """Tenant of the session, if the client lists those of all tenants (`tenant="*"`). Otherwise empty, as for sessions
    without a tenant.
    """
    model_version: int = 0
    """Version of its model that runs its next change."""
    model_version_pinned: bool = False
    """Whether it was opened with a version or a label, and stays on that version."""

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
    """Converts a time to UTC, or to the nearest time that `datetime` can represent.

    One row of a list must not fail the others.
    """
    seconds = min(max(_FIRST_SECOND, message.seconds), _LAST_SECOND)
    return _EPOCH + dt.timedelta(seconds=seconds, microseconds=min(max(0, message.nanos // 1000), 999_999))
