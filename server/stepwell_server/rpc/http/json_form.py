"""Converts messages to JSON and back, in protobuf's JSON form with the field names of the protocol.

The rules are those of https://protobuf.dev/programming-guides/json, as Envoy applies them: unknown fields of a body are
ignored, numbers of 64 bits are strings in answers, fields without a value are left out. Lists of numbers are converted as a
whole, because a tensor may have 65,536 of them.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from stepwell_server.errors import InvalidInput, shorten
from stepwell_server.rpc.fronts.base import JsonCodec

MAX_ITEMS = 150_000
"""Limit of commas in a body: each value may become a Python object."""
_MAX_FIELDS = 1024
"""Limit of the fields of a JSON object."""
_MAX_MESSAGES = 4096
"""Limit of the messages in a list: that of the longest list in the protocol (`rpc.fronts.shape`)."""
SMALL_BYTES = 4 << 10
"""Messages up to this size are written at once, on the event loop. Larger ones are for threads."""
_PART = 1024
"""Number of values of a list that are read or written at once, so that other threads get Python's lock in between."""
_TEXT_PART = 64 << 10
"""The same for the bytes of a text; a multiple of 4."""
_SMALL_BODY_BYTES, _SMALL_BODY_ITEMS = 16 << 10, 256
"""Limits of the bytes and commas of a body that takes little time to read."""
_MANY_NUMBERS = 64
"""Lists of more numbers in large messages are written by the codec."""
_LENGTH_DELIMITED = 2
"""Protobuf's wire type of a packed list."""
_MAX_PARAMETERS = 1024
_MAX_SHOWN = 100
_INTEGER = re.compile(r"-?[0-9]{1,20}")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_NO_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_NAMES_OF_NO_NUMBERS = {math.inf: "Infinity", -math.inf: "-Infinity"}
_WELL_KNOWN = frozenset({"google.protobuf.Timestamp", "google.protobuf.Duration"})
_SIGNED_32 = (-(2**31), 2**31 - 1)
_UNSIGNED_32 = (0, 2**32 - 1)
_SIGNED_64 = (-(2**63), 2**63 - 1)
_UNSIGNED_64 = (0, 2**64 - 1)
_RANGES = {
    FieldDescriptor.TYPE_INT32: _SIGNED_32,
    FieldDescriptor.TYPE_SINT32: _SIGNED_32,
    FieldDescriptor.TYPE_SFIXED32: _SIGNED_32,
    FieldDescriptor.TYPE_UINT32: _UNSIGNED_32,
    FieldDescriptor.TYPE_FIXED32: _UNSIGNED_32,
    FieldDescriptor.TYPE_INT64: _SIGNED_64,
    FieldDescriptor.TYPE_SINT64: _SIGNED_64,
    FieldDescriptor.TYPE_SFIXED64: _SIGNED_64,
    FieldDescriptor.TYPE_UINT64: _UNSIGNED_64,
    FieldDescriptor.TYPE_FIXED64: _UNSIGNED_64,
}
_WIDE = frozenset(kind for kind, (_, largest) in _RANGES.items() if largest > _UNSIGNED_32[1])
_FLOATS = frozenset({FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT})


def is_small(body: bytes) -> bool:
    """Whether a body takes the event loop little time. Others must be read in a thread."""
    return len(body) <= _SMALL_BODY_BYTES and body.count(b",") <= _SMALL_BODY_ITEMS


def read_body(body: bytes, message: Message, codec: JsonCodec) -> None:
    """Add the fields of a JSON object to a message. Any thread may call it.

    Raises:
        InvalidInput: the body is not JSON, or not the message.
    """
    _read_object(_document(body, codec), message, "")


def readers(body: bytes, names: Sequence[str], codec: JsonCodec) -> dict[str, Callable[[Message], None]]:
    """Return a function for each of these fields of a JSON object, which adds the object in it to a message.

    The functions raise `InvalidInput` if it is not the message.

    Raises:
        InvalidInput: the body is not JSON, or has none of these fields.
    """
    document = _document(body, codec) if body else {}
    found: dict[str, Callable[[Message], None]] = {
        name: functools.partial(_read_message, document[name], where=name)
        for name in names
        if document.get(name) is not None
    }
    if not found:
        raise InvalidInput(f"the body must have one of the fields {', '.join(names)}; got none of them")
    return found


def _document(body: bytes, codec: JsonCodec) -> dict[str, Any]:
    if (count := body.count(b",")) > MAX_ITEMS:
        raise InvalidInput(
            f"the body must have at most {MAX_ITEMS} commas, use data instead of values for more; got {count}"
        )
    try:
        document = codec.read(body, _MAX_FIELDS)
    except ValueError as error:
        raise _refusal(*error.args) from None
    if not isinstance(document, dict):
        raise InvalidInput(f"the body must be a JSON object; got {_shown(document)}")
    return document


def read_query(query: str, message: Message) -> None:
    """Add the parameters of a query to a message.

    Raises:
        InvalidInput: a parameter is not a field of the message, or its value does not fit.
    """
    try:
        pairs = parse_qsl(
            query,
            keep_blank_values=True,
            strict_parsing=bool(query),
            errors="strict",
            max_num_fields=_MAX_PARAMETERS,
        )
    except ValueError as error:
        raise InvalidInput(
            f"the query must be NAME=VALUE pairs in UTF-8: {error}; got {_shown(query)}"
        ) from None
    for name, text in pairs:
        *parents, last = name.split(".")
        target = message
        for parent in parents:
            field = _require_field(target, parent, name)
            if field.message_type is None or field.is_repeated:
                raise _no_field(target, name)
            target = getattr(target, field.name)
        field = _require_field(target, last, name)
        if field.message_type is not None and field.message_type.full_name not in _WELL_KNOWN:
            raise InvalidInput(f"{name} must be in the body: it is a message")
        is_bool = field.type == FieldDescriptor.TYPE_BOOL
        value = {"true": True, "false": False}.get(text, text) if is_bool else text
        if field.is_repeated:
            _read_list([value], target, field, name)
        elif target.HasField(field.name) if field.has_presence else getattr(target, field.name):
            raise InvalidInput(f"{name} must be given once; got it again with the value {_shown(text)}")
        else:
            _read_one(value, target, field, name)


def set_variable(name: str, text: str, message: Message) -> None:
    """Set a field to the value of a variable in a path.

    Raises:
        InvalidInput: the body or the query has another value for it.
    """
    before = getattr(message, name)
    if before and before != text:
        raise InvalidInput(
            f"{name} must be left out of the body, or be the one in the path, {text!r}; got {before!r}"
        )
    setattr(message, name, text)


def to_object(message: Message, *, has_arrays: bool = False) -> dict[str, Any]:
    """Return a message as a JSON object. `has_arrays`: long lists of numbers are arrays."""
    return {field.name: _to_json(value, field, has_arrays) for field, value in message.ListFields()}


def dump(message: Message, codec: JsonCodec) -> bytes:
    """Return a message as JSON in bytes. Any thread may call it."""
    if message.ByteSize() <= SMALL_BYTES:
        return _text(to_object(message)).encode()
    return dumped(to_object(message, has_arrays=True), codec).encode()


def dumped(document: object, codec: JsonCodec | None = None) -> str:
    """Return a JSON document as text. A long list does not keep Python's lock. `codec`: for arrays of numbers."""
    if isinstance(document, dict):
        fields = (f"{_text(name)}: {dumped(value, codec)}" for name, value in document.items())
        return "{" + ", ".join(fields) + "}"
    if isinstance(document, np.ndarray):
        assert codec is not None, "only messages have arrays"
        return f"[{codec.numbers(document.tobytes())}]"
    if isinstance(document, list) and document:
        if isinstance(document[0], dict):
            return "[" + ", ".join(dumped(one, codec) for one in document) + "]"
        parts = (_text(document[at : at + _PART])[1:-1] for at in range(0, len(document), _PART))
        return "[" + ", ".join(parts) + "]"
    return _text(document)


def _refusal(problem: str, text: str) -> InvalidInput:
    """Return the error of a document that a codec refuses."""
    if problem == "fields":
        return InvalidInput(f"an object in the body must have at most {_MAX_FIELDS} fields; got more")
    if problem == "twice":
        text = f"each field must be given once; got {_shown(text)} twice"
    if problem == "number":
        text = f'{text} must be a string, "{text}"'
    return InvalidInput(f"the body must be a JSON object: {text}")


def _read_object(document: Mapping[str, Any], message: Message, where: str) -> None:
    seen: dict[str, str] = {}
    for name, value in document.items():
        field = _field(message, name)
        if field is None or value is None:
            continue
        place = f"{where}{name}"
        choice = field.containing_oneof or field
        if other := seen.get(choice.name):
            raise InvalidInput(f"{place} must be left out if {other} is given; got both")
        seen[choice.name] = place
        if not field.is_repeated:
            _read_one(value, message, field, place)
        elif field.message_type is not None and field.message_type.GetOptions().map_entry:
            _read_map(value, message, field, place)
        elif isinstance(value, bytes):
            _read_numbers(value, message, field, place)
        elif isinstance(value, list):
            _read_list(value, message, field, place)
        else:
            raise _wrong(place, "a list", value)


def _read_one(value: Any, message: Message, field: FieldDescriptor, where: str) -> None:
    if field.message_type is None:
        setattr(message, field.name, _scalar(value, field, where))
        return
    target = getattr(message, field.name)
    target.SetInParent()
    _read_message(value, target, where)


def _read_list(values: list[Any], message: Message, field: FieldDescriptor, where: str) -> None:
    target = getattr(message, field.name)
    if field.message_type is not None:
        if len(values) > _MAX_MESSAGES:
            raise InvalidInput(f"{where} must have at most {_MAX_MESSAGES} entries; got {len(values)}")
        for index, value in enumerate(values):
            _read_message(value, target.add(), f"{where}[{index}]")
    else:
        for start in range(0, len(values), _PART):
            part = enumerate(values[start : start + _PART], start)
            target.extend([_scalar(value, field, f"{where}[{index}]") for index, value in part])


def _read_numbers(doubles: bytes, message: Message, field: FieldDescriptor, where: str) -> None:
    """Add a long list of numbers, which are finite."""
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        # as protobuf writes them: a list is then one piece of memory, not an object for each number
        key = bytes([field.number << 3 | _LENGTH_DELIMITED])
        message.MergeFromString(key + _varint(len(doubles)) + doubles)
    else:
        _read_list(np.frombuffer(doubles).tolist(), message, field, where)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*found, number))


def _read_map(value: Any, message: Message, field: FieldDescriptor, where: str) -> None:
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    assert field.message_type is not None, "a map is a message"
    of = field.message_type.fields_by_name["value"]
    target = getattr(message, field.name)
    for key, item in value.items():
        place = f"{where}[{_shown(key)}]"
        target[_string(key, of, place)] = _scalar(item, of, place)


def _read_message(value: Any, target: Message, where: str) -> None:
    if target.DESCRIPTOR.full_name in _WELL_KNOWN:
        try:
            target.FromJsonString(value)  # type: ignore[attr-defined]
        except (ValueError, TypeError, AttributeError):
            kind = target.DESCRIPTOR.name.lower()
            form = '"3.5s"' if kind == "duration" else '"2026-01-02T03:04:05Z"'
            raise _wrong(where, f"a {kind} such as {form}", value) from None
        return
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    _read_object(value, target, f"{where}.")


def _scalar(value: Any, field: FieldDescriptor, where: str) -> Any:
    """Return the value of a field that is not a message.

    Raises:
        InvalidInput: the JSON value does not fit.
    """
    if field.type in _RANGES:
        return _integer(value, *_RANGES[field.type], where)
    return _READERS[field.type](value, field, where)


def _integer(value: Any, low: int, high: int, where: str) -> int:
    number: Any = value
    if (isinstance(value, str) and _INTEGER.fullmatch(value)) or (
        isinstance(value, float) and value.is_integer()
    ):
        number = int(value)
    if type(number) is not int or not low <= number <= high:
        raise _wrong(where, f"an integer from {low} to {high}", value)
    return number


def _float(value: Any, _field: FieldDescriptor, where: str) -> float:
    if isinstance(value, str) and value in _NO_NUMBERS:
        return _NO_NUMBERS[value]
    is_text = isinstance(value, str) and _NUMBER.fullmatch(value) is not None
    if is_text or type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise _wrong(where, 'a number, "NaN", "Infinity" or "-Infinity"', value)


def _bool(value: Any, _field: FieldDescriptor, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(where, "true or false", value)
    return value


def _string(value: Any, _field: FieldDescriptor, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, "a string", value)
    return value


def _bytes(value: Any, _field: FieldDescriptor, where: str) -> bytes:
    try:
        text = value.encode("ascii")
        text += b"=" * (-len(text) % 4)
        if b"=" in text[:-2]:
            raise binascii.Error
        parts = (text[start : start + _TEXT_PART] for start in range(0, len(text), _TEXT_PART))
        return b"".join([base64.b64decode(part.translate(_URL_SAFE), validate=True) for part in parts])
    except (AttributeError, UnicodeEncodeError, binascii.Error):
        raise _wrong(where, "bytes in base64", value) from None


def _enum(value: Any, field: FieldDescriptor, where: str) -> int:
    assert field.enum_type is not None, "the field is an enum"
    names = field.enum_type.values_by_name
    if isinstance(value, str) and value in names:
        return int(names[value].number)
    try:
        return _integer(value, *_SIGNED_32, where)
    except InvalidInput:
        raise _wrong(where, f"one of {', '.join(names)}", value) from None


_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_READERS: Mapping[int, Callable[[Any, FieldDescriptor, str], Any]] = {
    FieldDescriptor.TYPE_DOUBLE: _float,
    FieldDescriptor.TYPE_FLOAT: _float,
    FieldDescriptor.TYPE_BOOL: _bool,
    FieldDescriptor.TYPE_STRING: _string,
    FieldDescriptor.TYPE_BYTES: _bytes,
    FieldDescriptor.TYPE_ENUM: _enum,
}


def _to_json(value: Any, field: FieldDescriptor, has_arrays: bool) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        of = field.message_type.fields_by_name["value"]
        return {str(key): _one_to_json(item, of) for key, item in value.items()}
    if not field.is_repeated:
        return _one_to_json(value, field, has_arrays)
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        if has_arrays and len(value) > _MANY_NUMBERS:
            return np.array(value, np.float64)
        if all(map(math.isfinite, value)):
            return list(value)
    return [_one_to_json(item, field, has_arrays) for item in value]


def _one_to_json(value: Any, field: FieldDescriptor, has_arrays: bool = False) -> Any:
    if field.message_type is not None:
        is_known = field.message_type.full_name in _WELL_KNOWN
        return value.ToJsonString() if is_known else to_object(value, has_arrays=has_arrays)
    if field.enum_type is not None:
        found = field.enum_type.values_by_number.get(value)
        return value if found is None else found.name
    if field.type in _WIDE:
        return str(value)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return base64.b64encode(value).decode()
    if field.type in _FLOATS and not math.isfinite(value):
        return _NAMES_OF_NO_NUMBERS.get(value, "NaN")
    return value


def _field(message: Message, name: str) -> FieldDescriptor | None:
    """Return a field by its name in the protocol, or in camel case; None: there is none."""
    if not name.isascii():
        return None  # protobuf raises an error for a name that UTF-8 cannot represent
    descriptor: Any = message.DESCRIPTOR
    found: FieldDescriptor | None = descriptor.fields_by_name.get(name)
    return found or descriptor.fields_by_camelcase_name.get(name)


def _require_field(message: Message, name: str, parameter: str) -> FieldDescriptor:
    field = _field(message, name)
    if field is None:
        raise _no_field(message, parameter)
    return field


def _no_field(message: Message, parameter: str) -> InvalidInput:
    names = ", ".join(field.name for field in message.DESCRIPTOR.fields) or "none"
    return InvalidInput(
        f'Could not find field "{shorten(parameter, _MAX_SHOWN)}" in the query; the parameters are {names}'
    )


def _wrong(where: str, rule: str, value: object) -> InvalidInput:
    return InvalidInput(f"{where} must be {rule}; got {_shown(value)}")


def _shown(value: object) -> str:
    if isinstance(value, list | dict | bytes):
        return "an object" if isinstance(value, dict) else "a list"
    return shorten(_text(value[:_MAX_SHOWN] if isinstance(value, str) else value), _MAX_SHOWN)


#: Return a JSON document as text. `json.dumps` would make an encoder for each value.
_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
