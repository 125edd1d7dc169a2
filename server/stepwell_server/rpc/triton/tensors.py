"""Tensors of requests as arrays for the engine, and its arrays as tensors of replies.

What Triton checks is checked here, in its words, before anything reaches the engine. Arrays made of raw
contents are read-only views of the request's bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from stepwell_server.engine.types import Array, Tensors
from stepwell_server.errors import InvalidInput, Unsupported
from stepwell_server.program import Program, TensorSpec, dtype_of
from stepwell_server.rpc.fronts.base import InputColumn
from stepwell_server.rpc.tensors import number_of
from stepwell_server.rpc.triton.errors import about
from stepwell_server.rpc.triton.inference import service_pb2 as pb


@dataclasses.dataclass(frozen=True, slots=True)
class Datatype:
    """A type of elements that tensors can have."""

    name: str
    """The protocol's: FP32."""
    numpy_name: str
    """float32."""
    number: pb.DataType.ValueType
    """Of a model configuration: TYPE_FP32."""
    contents_field: str
    """Field of InferTensorContents; \"\" if the type can come as raw bytes only."""


_ALL = (
    Datatype("BOOL", "bool", pb.TYPE_BOOL, "bool_contents"),
    Datatype("UINT8", "uint8", pb.TYPE_UINT8, "uint_contents"),
    Datatype("UINT16", "uint16", pb.TYPE_UINT16, "uint_contents"),
    Datatype("UINT32", "uint32", pb.TYPE_UINT32, "uint_contents"),
    Datatype("UINT64", "uint64", pb.TYPE_UINT64, "uint64_contents"),
    Datatype("INT8", "int8", pb.TYPE_INT8, "int_contents"),
    Datatype("INT16", "int16", pb.TYPE_INT16, "int_contents"),
    Datatype("INT32", "int32", pb.TYPE_INT32, "int_contents"),
    Datatype("INT64", "int64", pb.TYPE_INT64, "int64_contents"),
    Datatype("FP16", "float16", pb.TYPE_FP16, ""),
    Datatype("FP32", "float32", pb.TYPE_FP32, "fp32_contents"),
    Datatype("FP64", "float64", pb.TYPE_FP64, "fp64_contents"),
    Datatype("BF16", "bfloat16", pb.TYPE_BF16, ""),
)
_BY_NUMPY_NAME = {datatype.numpy_name: datatype for datatype in _ALL}
CONTENTS_FIELDS = {
    **{datatype.contents_field: datatype.name for datatype in _ALL if datatype.contents_field},
    "int_contents": "INT32",
    "uint_contents": "UINT32",
    "bytes_contents": "BYTES",
}
"""Fields of InferTensorContents, and what their elements are called."""


def of_numpy(name: str) -> Datatype:
    """The type that NumPy calls `name`. Every dtype of a program has one."""
    return _BY_NUMPY_NAME[name]


_NAMES: Mapping[int, str] = {number_of(datatype.numpy_name): datatype.name for datatype in _ALL}
"""By their `stepwell.v1.DataType`."""
_Parameters = Mapping[str, pb.InferParameter]
_Data = bytes | pb.InferTensorContents
MAX_BATCH_SIZE = 1024
"""Rows of a request; models say so in their configuration."""
_SHARED_MEMORY = "shared_memory_region"


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs of one request."""

    arrays: Mapping[str, Array]
    """`(rows, features...)`, or `(rows, steps, features...)` where the request has a time axis."""
    rows: int
    """B."""
    steps: int
    """T; 1 without a time axis."""


class Tensor:
    """An input or output of a model as this protocol describes it."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self.datatype: Datatype = of_numpy(spec.dtype)
        self.dtype = dtype_of(spec.dtype)
        self.dims: tuple[int, ...] = spec.shape or (1,)
        """Of one row at one time step. Triton has no tensors without dimensions: one number is [1]."""

    def leading(self, rank: int) -> int | None:
        """Dimensions before its own in an input of this rank: 1 (rows) or 2 (rows, time steps); None: it does not fit."""
        leading = rank - len(self.dims)
        return leading if leading in ({1, 2} if self.spec.temporal else {1}) else None

    def steps(self, shape: tuple[int, ...]) -> int:
        """Time steps of an input of this shape, as the engine has it; 0: it has no time axis."""
        return shape[1] if len(shape) == len(self.spec.shape) + 2 else 0


class ModelTensors:
    """Reads and writes the tensors of one model."""

    def __init__(self, model: str, program: Program) -> None:
        self._model = model
        self.keeps_state = bool(program.state)
        self.inputs = {spec.name: Tensor(spec) for spec in program.inputs}
        self.outputs = {spec.name: Tensor(spec) for spec in program.outputs}

    def read(self, request: pb.ModelInferRequest) -> Inputs:
        """The inputs of a request.

        Raises:
            InvalidInput: a name, datatype, shape or size does not fit.
            Unsupported: an input is in shared memory.
        """
        given = request.inputs
        self._check_names([(one.name, one.datatype, one.parameters) for one in given], request.id)
        data = _data_of(request, self._model)
        named = [(one.name, tuple(one.shape), data[place]) for place, one in enumerate(given)]
        return self._inputs(named, MAX_BATCH_SIZE, request.id)

    def of_columns(self, columns: Sequence[InputColumn], rows: int) -> Inputs:
        """The inputs of many requests that a front has read, `rows` in all. How many each may have is not checked.

        Raises:
            InvalidInput: as of `read`.
        """
        self._check_names([(column.name, _NAMES[column.dtype], {}) for column in columns], "")
        named = [(column.name, (rows, *column.tail), column.data) for column in columns]
        return self._inputs(named, rows, "")

    def _inputs(
        self, named: Sequence[tuple[str, tuple[int, ...], _Data]], max_rows: int, request_id: str
    ) -> Inputs:
        """Inputs whose names are checked, by name, shape and data."""
        rows, steps = 0, 1
        arrays: dict[str, Array] = {}
        for name, dims, data in named:
            tensor = self.inputs[name]
            shape = self._shape(tensor, dims, max_rows, request_id)
            if rows and shape[0] != rows:
                raise InvalidInput(
                    f"{about(request_id)}input '{name}' batch size does not match other inputs for"
                    f" '{self._model}'"
                )
            rows = shape[0]
            steps = tensor.steps(shape) or steps
            arrays[name] = self._array(tensor, data, shape, request_id)
        return Inputs(arrays, rows, steps)

    def requested(self, outputs: Sequence[tuple[str, _Parameters]], request_id: str = "") -> Sequence[Tensor]:
        """The outputs that are asked for, by name and parameters, in that order; all if none is.

        Raises:
            InvalidInput: there is no such output, or one is asked for twice.
            Unsupported: an output is to be classified, or put into shared memory.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameters in outputs:
            if name not in self.outputs:
                raise InvalidInput(f"unexpected inference output '{name}' for model '{self._model}'")
            if name in tensors:
                raise InvalidInput(f"{about(request_id)}output '{name}' already exists in request")
            _refuse_parameters(parameters, f"output '{name}'")
            tensors[name] = self.outputs[name]
        return list((tensors or self.outputs).values())

    def _check_names(self, given: Sequence[tuple[str, str, _Parameters]], request_id: str) -> None:
        """Check inputs by their names, datatypes and parameters."""
        names = [name for name, _, _ in given]
        if len(names) != len(self.inputs):
            missing = [name for name in self.inputs if name not in names]
            raise InvalidInput(
                f"{about(request_id)}expected {len(self.inputs)} inputs but got {len(names)} inputs for model"
                f" '{self._model}'. Got input(s) {_quoted(names)}, but missing required input(s)"
                f" {_quoted(missing)}. Please provide all required input(s)."
            )
        for i, (name, datatype, parameters) in enumerate(given):
            if name not in self.inputs:
                raise InvalidInput(f"unexpected inference input '{name}' for model '{self._model}'")
            if name in names[:i]:
                raise InvalidInput(f"{about(request_id)}input '{name}' already exists in request")
            if parameters:
                _refuse_parameters(parameters, f"input '{name}'")
            expected = self.inputs[name].datatype.name
            if datatype != expected:
                raise InvalidInput(
                    f"{about(request_id)}inference input '{name}' data-type is '{datatype}', but"
                    f" model '{self._model}' expects '{expected}'"
                )

    def _shape(
        self, tensor: Tensor, shape: tuple[int, ...], max_rows: int, request_id: str
    ) -> tuple[int, ...]:
        """The shape for the engine: without the dimension that stands for one number."""
        leading = tensor.leading(len(shape))
        if leading and shape[leading:] == tensor.dims and min(shape[:leading]) > 0 and shape[0] <= max_rows:
            return (*shape[:leading], *tensor.spec.shape)
        raise InvalidInput(about(request_id) + self._misfit(tensor, shape, leading))

    def _misfit(self, tensor: Tensor, shape: tuple[int, ...], leading: int | None) -> str:
        """Why an input does not have this shape."""
        name, dims = tensor.spec.name, tensor.dims
        what = f"input '{name}' for model '{self._model}'"
        if not shape:
            return f"input '{name}' has no shape but model requires batch dimension for '{self._model}'"
        if min(shape) < 0:
            return f"All input dimensions should be specified for {what}, got {dims_text(shape)}"
        if leading is None or shape[leading:] != dims:
            return (
                f"unexpected shape for {what}. Expected {dims_text((-1, *dims))}, got {dims_text(shape)}. "
                + _shape_note(tensor)
            )
        if 0 in shape[:leading]:
            return f"{what} must have at least one row and time step, got {dims_text(shape)}"
        return f"inference request batch-size must be <= {MAX_BATCH_SIZE} for '{self._model}'"

    def _array(self, tensor: Tensor, data: _Data, shape: tuple[int, ...], request_id: str) -> Array:
        name = tensor.spec.name
        where = f"input tensor '{name}' for model '{self._model}'"
        array: Array
        if isinstance(data, pb.InferTensorContents):
            array = _read_contents(data, tensor.datatype, tensor.dtype, where)
        else:
            octets = np.frombuffer(data, np.uint8)
            if tensor.dtype.kind == "b" and (octets > 1).any():
                raise InvalidInput(f"each byte of BOOL {where} must be 0 or 1, got {octets.max()}")
            array = octets
        needed = math.prod(shape) * tensor.dtype.itemsize
        if array.nbytes != needed:
            raise InvalidInput(
                f"{about(request_id)}input byte size mismatch for input '{name}' for model '{self._model}'."
                f" Expected {needed}, got {array.nbytes}"
            )
        return array.view(tensor.dtype).reshape(shape)


def replied(wanted: Sequence[Tensor], outputs: Tensors) -> Tensors:
    """The outputs that are wanted, in that order and with the dimensions that they have in this protocol."""
    arrays = [(tensor.spec, outputs[tensor.spec.name]) for tensor in wanted]
    return {spec.name: array if spec.shape else array[..., None] for spec, array in arrays}


def write_outputs(response: pb.ModelInferResponse, wanted: Sequence[Tensor], outputs: Tensors) -> None:
    """Put outputs into a reply, as raw contents."""
    for tensor, array in zip(wanted, replied(wanted, outputs).values(), strict=True):
        response.outputs.add(name=tensor.spec.name, datatype=tensor.datatype.name, shape=array.shape)
        response.raw_output_contents.append(array.tobytes())


def dims_text(dims: Sequence[int]) -> str:
    """Dimensions as Triton writes them."""
    return f"[{','.join(map(str, dims))}]"


def _data_of(request: pb.ModelInferRequest, model: str) -> Sequence[_Data]:
    """The data of each input: all of them raw, or all element by element."""
    raw = list(request.raw_input_contents)
    typed = [given.name for given in request.inputs if given.HasField("contents")]
    without = [given.name for given in request.inputs if not given.HasField("contents")]
    if raw and typed:
        raise InvalidInput(
            "contents field must not be specified when using raw_input_contents for"
            f" '{typed[0]}' for model '{model}'"
        )
    if len(raw) < len(without):
        raise InvalidInput(
            f"unable to find data for input tensor '{without[len(raw)]}' for model '{model}' in request."
        )
    if len(raw) > len(without):
        raise InvalidInput(
            f"raw_input_contents must have one entry for each of the {len(request.inputs)} inputs for model"
            f" '{model}'; got {len(raw)}"
        )
    return raw or [given.contents for given in request.inputs]


def _refuse_parameters(parameters: Mapping[str, pb.InferParameter], what: str) -> None:
    if _SHARED_MEMORY in parameters:
        raise Unsupported(f"shared memory is not supported, for {what}: send the data in the message")
    if "classification" in parameters:
        raise Unsupported(f"classification is not supported, for {what}")


def _shape_note(tensor: Tensor) -> str:
    if not tensor.spec.temporal:
        return "NOTE: The first dimension is the batch's."
    several = dims_text((-1, -1, *tensor.dims))
    return f"NOTE: The first dimension is the batch's; several time steps at once have shape {several}."


def _quoted(names: Sequence[str]) -> str:
    return f"[{','.join(repr(name) for name in names)}]"


def _read_contents(
    given: pb.InferTensorContents, datatype: Datatype, dtype: np.dtype[np.generic], where: str
) -> Array:
    """Elements that came one by one, `(n,)`.

    Raises:
        InvalidInput: they are of another type, of several types, or out of the type's range.
    """
    filled = [name for name in CONTENTS_FIELDS if len(getattr(given, name))]
    if not filled:
        return np.empty(0, dtype)
    if not datatype.contents_field:
        raise InvalidInput(f"unexpected explicit tensor data for {where}: {datatype.name} needs raw contents")
    wrong = [name for name in filled if name != datatype.contents_field]
    if wrong:
        raise InvalidInput(
            f"unexpected explicit tensor data for {where} of type '{CONTENTS_FIELDS[wrong[0]]}', expected"
            f" datatype '{datatype.name}'"
        )
    values = np.array(getattr(given, datatype.contents_field))
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)  # type: ignore[type-var]
        for value in (int(values.min()), int(values.max())):
            if not limits.min <= value <= limits.max:
                raise InvalidInput(
                    f"explicit tensor data for {where} must be within {limits.min} to {limits.max}, got {value}"
                )
    return values.astype(dtype)
