"""The elements of an input: as raw bytes, or one by one in the field of their type."""

from __future__ import annotations

import numpy as np

from stepwell_server.engine.types import Array
from stepwell_server.errors import InvalidInput
from stepwell_server.rpc.triton.datatypes import CONTENTS_FIELDS, Datatype
from stepwell_server.rpc.triton.inference import service_pb2 as pb


def from_raw(data: bytes, dtype: np.dtype[np.generic], where: str) -> Array:
    """A read-only view of raw contents, `(n,)`. The size must be a multiple of the elements'.

    Raises:
        InvalidInput: a boolean is neither 0 nor 1.
    """
    if dtype.kind != "b":
        return np.frombuffer(data, dtype)
    octets = np.frombuffer(data, np.uint8)
    if octets.size and octets.max() > 1:
        raise InvalidInput(f"each byte of BOOL {where} must be 0 or 1, got {octets.max()}")
    return octets.view(np.bool_)


def read(given: pb.InferTensorContents, datatype: Datatype, dtype: np.dtype[np.generic], where: str) -> Array:
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
