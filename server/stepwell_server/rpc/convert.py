"""Converts between messages about sessions and models and the engine's values. Tensors are in `tensors`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf import duration_pb2, timestamp_pb2

from stepwell.v1 import models_pb2, sessions_pb2, tensors_pb2
from stepwell_server.catalog.control import VersionState, VersionStatus
from stepwell_server.engine.api import ModelInfo, SessionInfo
from stepwell_server.engine.types import U64
from stepwell_server.errors import InvalidInput
from stepwell_server.program import Provenance, StateSpec, TensorSpec
from stepwell_server.rpc import tenancy
from stepwell_server.rpc.tensors import number_of

_VERSION_STATES: dict[VersionState, models_pb2.ModelState.ValueType] = {
    VersionState.LOADING: models_pb2.MODEL_STATE_LOADING,
    VersionState.READY: models_pb2.MODEL_STATE_READY,
    VersionState.DRAINING: models_pb2.MODEL_STATE_DRAINING,
    VersionState.FAILED: models_pb2.MODEL_STATE_FAILED,
}
#: Maximum of a `google.protobuf.Duration`.
_MAX_SECONDS = 315_576_000_000
#: The last second of the year 9999, the maximum of a `google.protobuf.Timestamp`.
_LAST_SECOND = 253_402_300_799.0

_Number = TypeVar("_Number", bound=np.integer[Any])


def to_numbers(
    numbers: Sequence[int], dtype: type[_Number], argument: str, count: int
) -> npt.NDArray[_Number] | None:
    """Return one number per session of a frame; None if the field is empty.

    Raises:
        InvalidInput: there are not ``count`` numbers.
    """
    if not numbers:
        return None
    if len(numbers) != count:
        raise InvalidInput(
            f"{argument} must be empty or have one entry per session ({count}); got {len(numbers)}"
        )
    return np.array(numbers, dtype) if count == 1 else np.fromiter(numbers, dtype, count)


def from_session(info: SessionInfo, tenant: str = "") -> sessions_pb2.Session:
    """Return the message for a session. `tenant` is its tenant if the caller may see it."""
    return sessions_pb2.Session(
        session_id=tenancy.external_id(info.session_id),
        model=info.model,
        model_fingerprint=info.fingerprint,
        batch_size=info.batch_size,
        revision=info.revision,
        position=info.position,
        created_time=to_timestamp(info.created),
        last_used_time=to_timestamp(info.last_used),
        resident=info.resident,
        tenant=tenant,
        model_version=info.version,
        model_version_pinned=info.is_pinned,
        uid=info.uid,
        max_idle=from_seconds(info.max_idle_s) if info.max_idle_s < math.inf else None,
    )


def once(uids: U64) -> list[int]:
    """Return uids for a message: a single one if all are equal."""
    found: list[int] = (uids[:1] if len(uids) and (uids == uids[0]).all() else uids).tolist()
    return found


def from_seconds(seconds: float) -> duration_pb2.Duration:
    """Return a duration, cut to the range of its type."""
    seconds = min(max(0.0, seconds), _MAX_SECONDS) if seconds == seconds else 0.0
    whole = math.floor(seconds)
    return duration_pb2.Duration(seconds=whole, nanos=min(round((seconds - whole) * 1e9), 999_999_999))


def to_seconds(duration: duration_pb2.Duration, argument: str) -> float:
    """Return the seconds of a duration. `argument` is the field's name, for messages.

    Raises:
        InvalidInput: the duration is negative, or out of the range of its type.
    """
    if not 0 <= duration.nanos < 1_000_000_000:
        raise InvalidInput(f"{argument} must have nanos from 0 to 999999999; got {duration.nanos}")
    if not 0 <= duration.seconds <= _MAX_SECONDS:
        raise InvalidInput(f"{argument} must be from 0 to {_MAX_SECONDS} s; got {seconds_text(duration)} s")
    return duration.seconds + duration.nanos / 1e9


def seconds_text(duration: duration_pb2.Duration) -> str:
    """Return the exact seconds of a non-negative duration as text: 0.999999999 is not 1."""
    return f"{duration.seconds}.{duration.nanos:09}".rstrip("0").rstrip(".")


def now_timestamp() -> timestamp_pb2.Timestamp:
    """Return the present time."""
    return to_timestamp(time.time())


def to_timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    """Return a timestamp, cut to the years 1970 to 9999. NaN becomes 1970."""
    seconds = min(max(0.0, seconds), _LAST_SECOND) if seconds == seconds else 0.0
    whole = math.floor(seconds)
    return timestamp_pb2.Timestamp(seconds=whole, nanos=int((seconds - whole) * 1e9))


def from_model(info: ModelInfo, *, counted: bool, statuses: Sequence[VersionStatus] = ()) -> models_pb2.Model:
    """Return the message for a model.

    Args:
        info: The model.
        counted: Whether the caller may see numbers of sessions and paths of files.
        statuses: The states of the model's versions.
    """
    program = info.program
    return models_pb2.Model(
        name=info.name,
        fingerprint=program.fingerprint,
        inputs=[_from_spec(spec) for spec in program.inputs],
        outputs=[_from_spec(spec) for spec in program.outputs],
        state=[_from_spec(spec) for spec in program.state],
        executor=program.executor,
        executor_reason=program.executor_reason,
        batch_sizes=program.batch_sizes,
        state_row_bytes=program.state_row_bytes,
        changed_state_row_bytes=program.changed_state_row_bytes,
        multiply_adds=program.multiply_adds,
        sessions=info.sessions if counted else 0,
        proof=models_pb2.Proof(
            compared_steps=program.proof.steps,
            unproven=program.proof.unproven,
            compared_share=program.proof.compared,
            rows=program.proof.rows,
        ),
        provenance=None if program.provenance is None else _from_provenance(program.provenance),
        version=info.version,
        versions=[from_version(status, counted=counted) for status in statuses],
        structure=program.structure,
    )


def from_version(status: VersionStatus, *, counted: bool) -> models_pb2.ModelVersion:
    """Return the message for a version of a model. `counted`: see `from_model`."""
    # the reason of a failed load names the file
    has_reason = counted or status.state is not VersionState.FAILED
    return models_pb2.ModelVersion(
        version=status.version,
        state=_VERSION_STATES[status.state],
        reason=status.reason if has_reason else "the version could not be loaded",
        fingerprint=status.fingerprint,
        is_default=status.is_default,
        labels=status.labels,
        sessions=status.sessions if counted else 0,
        path=status.path if counted else "",
        loaded_time=to_timestamp(status.loaded) if status.loaded else None,
    )


def _from_provenance(provenance: Provenance) -> models_pb2.Provenance:
    return models_pb2.Provenance(
        source=provenance.source,
        source_sha256=provenance.source_sha256,
        compiled_time=timestamp_pb2.Timestamp(seconds=provenance.compiled_time),
        versions=provenance.versions,
        processor=provenance.processor,
        parameters=provenance.parameters,
        layers=[
            models_pb2.Layer(
                name=layer.name, kind=layer.kind, output=layer.output, parameters=layer.parameters
            )
            for layer in provenance.layers
        ],
    )


def _from_spec(spec: TensorSpec | StateSpec) -> tensors_pb2.TensorSpec:
    return tensors_pb2.TensorSpec(
        name=spec.name,
        dtype=number_of(spec.dtype),
        shape=spec.shape,
        temporal=isinstance(spec, TensorSpec) and spec.temporal,
        window=spec.window if isinstance(spec, StateSpec) else 0,
    )
