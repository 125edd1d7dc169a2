"""Names of element types: the protocol's, NumPy's, and the field in which typed contents come."""

from __future__ import annotations

import dataclasses

import numpy as np

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

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """NumPy's."""
        if self.numpy_name == "bfloat16":
            import ml_dtypes  # only where a model has such tensors

            bfloat16: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)
            return bfloat16
        return np.dtype(self.numpy_name)


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
