"""Between the wire's messages and the engine's values.

What is refused here is what no array could be made of; whether an array suits the model is the engine's
affair. Arrays made from a request are read-only views of its bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf import duration_pb2, timestamp_pb2

from stepwell.v1 import models_pb2, sessions_pb2, tensors_pb2
from stepwell_server.engine.api import ModelInfo, Select, SessionInfo
from stepwell_server.engine.types import Array, Mask
from stepwell_server.errors import InvalidInput
from stepwell_server.live.control import VersionState, VersionStatus
from stepwell_server.program import Provenance, StateSpec, TensorSpec, dtype_of
from stepwell_server.rpc import naming, values
from stepwell_server.rpc.fronts.base import InputColumn

MAX_RANK = 32
"""NumPy has a limit of its own (64); no model comes near this one."""

_NAMES: dict[int, str] = {
    number: name.removeprefix("DATA_TYPE_").lower()
    for name, number in tensors_pb2.DataType.items()
    if number != tensors_pb2.DATA_TYPE_UNSPECIFIED
}
_NUMBERS: dict[str, tensors_pb2.DataType.ValueType] = {
    name: tensors_pb2.DataType.Value(f"DATA_TYPE_{name.upper()}") for name in _NAMES.values()
}
_SELECTS: dict[int, Select] = {
    sessions_pb2.OUTPUT_SELECTION_UNSPECIFIED: Select.ALL,
    sessions_pb2.OUTPUT_SELECTION_ALL: Select.ALL,
    sessions_pb2.OUTPUT_SELECTION_LAST: Select.LAST,
    sessions_pb2.OUTPUT_SELECTION_NONE: Select.NONE,
}
_STATES: dict[int, Select] = {
    sessions_pb2.STATE_SELECTION_UNSPECIFIED: Select.NONE,
    sessions_pb2.STATE_SELECTION_NONE: Select.NONE,
    sessions_pb2.STATE_SELECTION_LAST: Select.LAST,
    sessions_pb2.STATE_SELECTION_ALL: Select.ALL,
}

_VERSION_STATES: dict[VersionState, models_pb2.ModelState.ValueType] = {
    VersionState.LOADING: models_pb2.MODEL_STATE_LOADING,
    VersionState.READY: models_pb2.MODEL_STATE_READY,
    VersionState.DRAINING: models_pb2.MODEL_STATE_DRAINING,
    VersionState.FAILED: models_pb2.MODEL_STATE_FAILED,
}
#: Of a `google.protobuf.Duration`.
_MOST_SECONDS = 315_576_000_000

_Number = TypeVar("_Number", bound=np.integer[Any])


class _Tensors(Protocol):
    def add(
        self,
        *,
        name: str,
        dtype: tensors_pb2.DataType.ValueType,
        shape: Sequence[int],
        data: bytes = b"",
        values: Iterable[float] = (),
    ) -> object: ...


def to_arrays(tensors: Sequence[tensors_pb2.Tensor], argument: str) -> dict[str, Array]:
    """Arrays by name; `argument` is the field's name, for messages.

    Raises:
        InvalidInput: one of them is not a tensor, two have the same name, or they have too many values.
    """
    arrays: dict[str, Array] = {}
    values.require_count(tensors, argument)
    for tensor in tensors:
        name = tensor.name
        if name in arrays:
            raise InvalidInput(f"{argument}: each tensor must be given once; got {name!r} twice")
        arrays[name] = _to_array(tensor, f"{argument}[{name!r}]" if name else argument)
    return arrays


def to_optional_arrays(tensors: Sequence[tensors_pb2.Tensor], argument: str) -> dict[str, Array] | None:
    """As `to_arrays`; None if there are none."""
    return to_arrays(tensors, argument) if tensors else None


def to_mask(entries: Sequence[bool]) -> Mask | None:
    """A mask of rows; None if there is none."""
    return np.array(entries, np.bool_) if entries else None


def _to_array(tensor: tensors_pb2.Tensor, where: str) -> Array:
    dtype = _dtype(tensor.dtype)
    if tensor.values and (dtype is not None or tensor.dtype == tensors_pb2.DATA_TYPE_UNSPECIFIED):
        return _of_values(tensor, dtype, where)
    if dtype is None:
        raise InvalidInput(f"{where}: dtype must be one of stepwell.v1.DataType; got {tensor.dtype}")
    shape = tuple(tensor.shape)
    data = tensor.data
    # The rank comes first: the product of a million axes would keep the server busy for hours.
    if len(shape) > MAX_RANK or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise InvalidInput(_shape_problem(where, shape, dtype, len(data)))
    if not data:
        return _to_empty(shape, dtype, where)
    if dtype.kind == "b":
        return _to_bools(data, where).reshape(shape)
    return np.frombuffer(data, dtype).reshape(shape)


def _of_values(tensor: tensors_pb2.Tensor, dtype: np.dtype[np.generic] | None, where: str) -> Array:
    array = values.to_array(tensor, dtype, where)
    shape = tuple(tensor.shape) or (1, array.size)
    if len(shape) > MAX_RANK or min(shape) < 0:
        raise InvalidInput(_shape_problem(where, shape, array.dtype, 0))
    if math.prod(shape) != array.size:
        raise InvalidInput(f"{where}: shape {list(shape)} needs {math.prod(shape)} values; got {array.size}")
    return array.reshape(shape)


def _to_empty(shape: tuple[int, ...], dtype: np.dtype[np.generic], where: str) -> Array:
    try:
        return np.empty(shape, dtype)
    except ValueError:
        # An axis of 0 makes the product 0, but NumPy wants that of the other axes to be a size as well.
        raise InvalidInput(f"{where}: shape must be one that an array can have; got {list(shape)}") from None


def _shape_problem(where: str, shape: tuple[int, ...], dtype: np.dtype[np.generic], size: int) -> str:
    if len(shape) > MAX_RANK:
        return f"{where}: shape must have at most {MAX_RANK} axes; got {len(shape)}"
    if any(axis < 0 for axis in shape):
        return f"{where}: every axis of shape must be 0 or more; got {list(shape)}"
    need = math.prod(shape) * dtype.itemsize
    return f"{where}: shape {list(shape)} of {dtype.name} needs {need} bytes of data; got {size}"


def _to_bools(data: bytes, where: str) -> Array:
    octets = np.frombuffer(data, np.uint8)
    if octets.max() > 1:
        raise InvalidInput(f"{where}: each byte of a bool tensor must be 0 or 1; got {octets.max()}")
    return octets.view(np.bool_)


@functools.cache
def _dtype(number: int) -> np.dtype[np.generic] | None:
    name = _NAMES.get(number)
    return dtype_of(name).newbyteorder("<") if name else None


def number_of(name: str) -> int:
    """The `DataType` of a type that NumPy calls `name`."""
    return _NUMBERS[name]


def to_columns(columns: Iterable[InputColumn]) -> dict[str, Array]:
    """Arrays by name of tensors that a front has read, `(rows, ...)` each; they fit their shapes and names."""
    return {
        column.name: np.frombuffer(column.data, _dtype(column.dtype)).reshape(-1, *column.tail)
        for column in columns
    }


def to_bytes(array: Array) -> tuple[tensors_pb2.DataType.ValueType, bytes]:
    """The dtype's number on the wire, and the elements as they stand there."""
    little = array if array.dtype.isnative and np.little_endian else _little_endian(array)
    return _number(array.dtype), little.tobytes()


def add_tensors(target: _Tensors, arrays: Mapping[str, Array], *, as_values: bool = False) -> None:
    """Append arrays to a repeated tensor field; `as_values`: as numbers, where doubles hold them."""
    for name, array in arrays.items():
        numbers = values.of_array(array) if as_values else None
        if numbers is not None:
            target.add(name=name, dtype=_number(array.dtype), shape=array.shape, values=numbers.tolist())
            continue
        number, data = to_bytes(array)
        target.add(name=name, dtype=number, shape=array.shape, data=data)


@functools.cache
def _number(dtype: np.dtype[np.generic]) -> tensors_pb2.DataType.ValueType:
    return _NUMBERS[dtype.name]


def _little_endian(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder("<"))


def to_select(value: int) -> Select:
    """The selection of outputs.

    Raises:
        InvalidInput: no such selection.
    """
    select = _SELECTS.get(value)
    if select is None:
        raise InvalidInput(f"outputs must be one of stepwell.v1.OutputSelection; got {value}")
    return select


def to_states(value: int) -> Select:
    """The selection of states.

    Raises:
        InvalidInput: no such selection.
    """
    select = _STATES.get(value)
    if select is None:
        raise InvalidInput(f"states must be one of stepwell.v1.StateSelection; got {value}")
    return select


def to_numbers(
    numbers: Sequence[int], dtype: type[_Number], argument: str, count: int
) -> npt.NDArray[_Number] | None:
    """One number per session of a frame; None if the field is empty.

    Raises:
        InvalidInput: there are more or fewer than ``count``.
    """
    if not numbers:
        return None
    if len(numbers) != count:
        raise InvalidInput(f"{argument} must be empty or one per session ({count}); got {len(numbers)}")
    return np.array(numbers, dtype) if count == 1 else np.fromiter(numbers, dtype, count)


def from_session(info: SessionInfo, tenant: str = "") -> sessions_pb2.Session:
    """A session as others may see it; `tenant` is whose it is, where that is told."""
    return sessions_pb2.Session(
        session_id=naming.own(info.session_id),
        model=info.model,
        model_fingerprint=info.fingerprint,
        batch_size=info.batch_size,
        revision=info.revision,
        position=info.position,
        created_time=_timestamp(info.created),
        last_used_time=_timestamp(info.last_used),
        resident=info.resident,
        lease=from_seconds(info.lease_s) if info.lease_s else None,
        tenant=tenant,
        model_version=info.version,
        model_version_pinned=info.is_pinned,
    )


def from_seconds(seconds: float) -> duration_pb2.Duration:
    """A time span."""
    whole = math.floor(seconds)
    return duration_pb2.Duration(seconds=whole, nanos=round((seconds - whole) * 1e9))


def to_seconds(duration: duration_pb2.Duration, argument: str) -> float:
    """Seconds of a time span; `argument` is the field's name, for messages.

    Raises:
        InvalidInput: it is below 0, or out of the range of its type.
    """
    seconds = duration.seconds + duration.nanos / 1e9
    if seconds < 0 or not 0 <= duration.nanos < 1_000_000_000 or duration.seconds > _MOST_SECONDS:
        raise InvalidInput(f"{argument} must be 0 to {_MOST_SECONDS} s; got {seconds:g} s")
    return seconds


def _timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    whole = math.floor(seconds)
    return timestamp_pb2.Timestamp(seconds=whole, nanos=int((seconds - whole) * 1e9))


def from_model(info: ModelInfo, *, counted: bool, statuses: Sequence[VersionStatus] = ()) -> models_pb2.Model:
    """A model as it is served.

    Args:
        info: the model.
        counted: for somebody who may know of everybody's sessions, and of the server's files.
        statuses: of the name's versions.
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
        sessions=info.sessions if counted else 0,
        proof=models_pb2.Proof(
            compared_steps=program.proof.steps,
            unproven=program.proof.unproven,
            compared_share=program.proof.compared,
        ),
        provenance=None if program.provenance is None else _from_provenance(program.provenance),
        version=info.version,
        versions=[from_version(status, counted=counted) for status in statuses],
    )


def from_version(status: VersionStatus, *, counted: bool) -> models_pb2.ModelVersion:
    """A version of a model; `counted` as in `from_model`."""
    # why a file cannot be loaded names it
    has_reason = counted or status.state is not VersionState.FAILED
    return models_pb2.ModelVersion(
        version=status.version,
        state=_VERSION_STATES[status.state],
        reason=status.reason if has_reason else "it could not be loaded",
        fingerprint=status.fingerprint,
        is_default=status.is_default,
        labels=status.labels,
        sessions=status.sessions if counted else 0,
        path=status.path if counted else "",
        loaded_time=_timestamp(status.loaded) if status.loaded else None,
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
        dtype=_NUMBERS[spec.dtype],
        shape=spec.shape,
        temporal=isinstance(spec, TensorSpec) and spec.temporal,
    )
