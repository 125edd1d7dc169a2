"""The three messages of google.rpc that a gRPC status may carry, in a descriptor pool of our own.

They come in the package googleapis-common-protos, which a light client can do without.
Source: google/rpc/status.proto and google/rpc/error_details.proto of github.com/googleapis/googleapis.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, duration_pb2, message_factory

_Field = descriptor_pb2.FieldDescriptorProto
_TYPES = {"int32": _Field.TYPE_INT32, "string": _Field.TYPE_STRING}


def _add(file: descriptor_pb2.FileDescriptorProto, name: str, *fields: tuple[str, str, bool]) -> Any:
    message = file.message_type.add(name=name)
    for number, (field, kind, repeated) in enumerate(fields, start=1):
        label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
        one = message.field.add(name=field, number=number, label=label)
        if kind in _TYPES:
            one.type = _TYPES[kind]
        else:
            one.type, one.type_name = _Field.TYPE_MESSAGE, kind
    return message


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="google_rpc.proto", package="google.rpc", syntax="proto3")
    file.dependency.extend(["google/protobuf/any.proto", "google/protobuf/duration.proto"])
    _add(
        file,
        "Status",
        ("code", "int32", False),
        ("message", "string", False),
        ("details", ".google.protobuf.Any", True),
    )
    info = _add(
        file,
        "ErrorInfo",
        ("reason", "string", False),
        ("domain", "string", False),
        ("metadata", ".google.rpc.ErrorInfo.MetadataEntry", True),
    )
    entry = info.nested_type.add(name="MetadataEntry")
    entry.options.map_entry = True
    for number, key in enumerate(("key", "value"), start=1):
        entry.field.add(name=key, number=number, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
    _add(file, "RetryInfo", ("retry_delay", ".google.protobuf.Duration", False))
    return file


_pool = descriptor_pool.DescriptorPool()
for _known in (any_pb2, duration_pb2):
    _pool.AddSerializedFile(_known.DESCRIPTOR.serialized_pb)
_pool.AddSerializedFile(_file().SerializeToString())


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"google.rpc.{name}"))


# Made at run time, so no type checker can know them; `_status` is their only user.
Status: Any = _message("Status")
ErrorInfo: Any = _message("ErrorInfo")
RetryInfo: Any = _message("RetryInfo")
