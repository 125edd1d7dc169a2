"""What a server answered, as fields that can be compared: status, reason, text, and every field of the reply by its path.

The fields that differ between two equal servers are in `NORMALISED` and `TEXTS`, each with its reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from google.protobuf import unknown_fields
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from stepwell.v1 import errors_pb2, sessions_pb2, tensors_pb2

STATUS, REASON, TEXT = "grpc status", "error reason", "error text"
_SHOWN_BYTES = 32
"""Of the bytes of a field that a report shows; all of them are compared, by their digest."""

#: Fields that are not compared, by their full names without the package: the reason. Whether they are there is compared.
NORMALISED: Mapping[str, str] = {
    "Session.uid": "random for each opening",
    "OpenSessionsResponse.uids": "random for each opening",
    "ForkSessionsResponse.uids": "random for each opening",
    "Session.created_time": "from the clock",
    "Session.last_used_time": "from the clock",
    "Session.resident": "which sessions have a row is a matter of when passes ran",
    "CloseSessionRequest.uid": "as a reply said it",
    "CloseSessionsRequest.uids": "as replies said them",
    "ExportedSession.record": "opaque: it holds a uid, times and a checksum; what it means is read after an import",
    "ListSessionsResponse.next_page_token": "opaque",
    "ExportSessionsResponse.next_page_token": "opaque",
    "CloseMatchingSessionsResponse.next_page_token": "opaque",
    "ListSessionsRequest.page_token": "as a reply said it",
    "ExportSessionsRequest.page_token": "as a reply said it",
    "CloseMatchingSessionsRequest.page_token": "as a reply said it",
    "Server.id": "random for each process",
    "Server.address": "holds a port",
    "Server.http_address": "holds a port",
    "Server.metrics_address": "holds a port",
    "ModelVersion.loaded_time": "from the clock",
    "Provenance.compiled_time": "from the clock: each build compiles the models itself",
    "Provenance.versions": "names the release of the build",
    "ListSlowSessionsResponse.sessions": "which steps were slow is a matter of time",
    "Error.retry_after_ms": "a delay",
    "RetryInfo.retry_delay": "a delay",
    "UploadModelResponse.upload": "random for each upload",
    "SetDefaultResponse.model": "a version without sessions goes a little later; GetModel shows it then",
    "LoadModelResponse.model": "as that of SetDefaultResponse",
    "LoadModelResponse.stage": "how often progress is reported is a matter of time",
    "ServerMetadataResponse.version": "the release of the build",
    "ModelStatistics.last_inference": "from the clock",
    "StatisticDuration.ns": "durations",
    "ModelStatistics.execution_count": "how many steps ran together is a matter of time",
    "ModelStatistics.batch_stats": "how many steps ran together is a matter of time",
}

#: What is replaced in every string: pattern, replacement, reason.
TEXTS: Sequence[tuple[re.Pattern[str], str, str]] = (
    (
        re.compile(r"s-[0-9a-f]{8}-[A-Za-z0-9_-]{22}(?:[A-Za-z0-9_-]{4}|-[0-9a-f]{4})?"),
        "<id made by the server>",
        "random for each opening",
    ),
    (re.compile(r"127\.0\.0\.1:\d+"), "<address>", "each server has a port of its own"),
    (
        re.compile(r"checksum is [0-9a-f]+, its bytes have [0-9a-f]+"),
        "checksum is <another>",
        "a record holds a uid and times",
    ),
    (re.compile(r"\d+(\.\d+)? (seconds|s|ms)\b"), "<time>", "a time or a delay"),
)

_CODES = {value: name for name, value in code_pb2.Code.items()}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a call, or a member of a frame, was answered with: a printable value for each path."""

    fields: Mapping[str, str]

    @property
    def end(self) -> str:
        """Status and reason."""
        return f"{self.fields.get(STATUS, '')} {self.fields.get(REASON, '')}".strip()

    def lines(self) -> Iterator[str]:
        """For a report."""
        yield from (f"{path}: {value}" for path, value in self.fields.items())


def normalised(text: str) -> str:
    """A string without what differs between two equal servers."""
    for pattern, replacement, _ in TEXTS:
        text = pattern.sub(replacement, text)
    return text


def succeeded(*replies: Message) -> Answer:
    """The answer of a call that succeeded: with one reply, or with those of a stream."""
    fields = {STATUS: "OK"}
    for number, reply in enumerate(replies):
        fields |= of_message(reply, f"{number}." if len(replies) > 1 else "")
    return Answer(fields)


def failed(code: int, text: str, details: bytes = b"", replies: Sequence[Message] = ()) -> Answer:
    """The answer of a call that failed; `details` are those of the trailer, `replies` came before."""
    fields = {STATUS: _CODES.get(code, str(code)), REASON: "", TEXT: normalised(text)}
    if details:
        try:
            status = status_pb2.Status.FromString(details)
        except DecodeError:
            fields["details"] = "not a google.rpc.Status"
        else:
            fields |= _of_details(status, fields)
    for number, reply in enumerate(replies):
        fields |= of_message(reply, f"{number}.")
    return Answer(fields)


def of_error(error: Any) -> Answer:
    """The answer of a call that failed with an error of grpcio."""
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    return failed(error.code().value[0], error.details() or "", details)


def failed_member(error: errors_pb2.Error) -> Answer:
    """The answer of a member of a frame that failed."""
    fields = {
        STATUS: _CODES.get(error.code, str(error.code)),
        REASON: error.reason,
        TEXT: normalised(error.message),
        **{f"metadata.{name}": normalised(value) for name, value in sorted(error.metadata.items())},
    }
    if error.retry_after_ms:
        fields["retry_after_ms"] = "<a delay>"
    return Answer(fields)


def broken(how: str) -> Answer:
    """The answer of a call that had no status: its connection was closed, its stream reset."""
    return Answer({STATUS: f"no status: {how}"})


def _of_details(status: status_pb2.Status, fields: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    if _CODES.get(status.code) != fields[STATUS] or normalised(status.message) != fields[TEXT]:
        found["details"] = f"of another status: {status.code} {normalised(status.message)}"
    for detail in status.details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            found[REASON] = info.reason
            found["domain"] = info.domain
            found |= {f"metadata.{name}": normalised(value) for name, value in sorted(info.metadata.items())}
        elif detail.Unpack(retry):
            found["retry_after_ms"] = "<a delay>"
        else:
            found[f"detail {detail.type_url}"] = _of_bytes(detail.value)
    return found


def of_message(message: Message, prefix: str = "") -> dict[str, str]:
    """Every field that is set, by its path."""
    found: dict[str, str] = {}
    for field, value in message.ListFields():
        path = f"{prefix}{field.name}"
        if _name_of(field) in NORMALISED:
            found[path] = "<there>"
        elif isinstance(value, Mapping):
            found |= {f"{path}.{key}": _of_value(value[key], field) for key in sorted(value)}
        elif field.message_type is tensors_pb2.Tensor.DESCRIPTOR and not isinstance(value, Message):
            found |= {f"{path}[{tensor.name}]": _of_tensor(tensor) for tensor in value}
            found[f"{path} in order"] = " ".join(tensor.name for tensor in value)
        elif isinstance(value, Message):
            found |= of_message(value, f"{path}.") or {path: "<empty>"}
        elif _is_repeated(value) and field.message_type is not None:
            for number, one in enumerate(value):
                found |= of_message(one, f"{path}[{number}].") or {f"{path}[{number}]": "<empty>"}
        elif _is_repeated(value):
            found[path] = ", ".join(_of_value(one, field) for one in value)
        else:
            found[path] = _of_value(value, field)
    unknown: Any = unknown_fields.UnknownFieldSet(message)  # its types do not say that it can be iterated
    for one in unknown:
        found[f"{prefix}unknown field {one.field_number}"] = _of_bytes(repr(_of_unknown(one.data)).encode())
    return found


def _of_unknown(data: Any) -> object:
    """The value of a field that the tree does not know: that of a group is again a set of fields."""
    if isinstance(data, int | bytes):
        return data
    return [(one.field_number, one.wire_type, _of_unknown(one.data)) for one in data]


def _name_of(field: FieldDescriptor) -> str:
    assert field.containing_type is not None
    return f"{field.containing_type.name}.{field.name}"


def _is_repeated(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes)


def _of_value(value: Any, field: FieldDescriptor) -> str:
    if isinstance(value, Message):
        return str(of_message(value))
    if isinstance(value, bytes):
        return _of_bytes(value)
    if isinstance(value, float):
        return value.hex()  # bit for bit
    if field.enum_type is not None and value in field.enum_type.values_by_number:
        return str(field.enum_type.values_by_number[value].name)
    return normalised(value) if isinstance(value, str) else repr(value)


def _of_tensor(tensor: tensors_pb2.Tensor) -> str:
    dtype = tensors_pb2.DataType.Name(tensor.dtype).removeprefix("DATA_TYPE_").lower()
    values = f" values {_of_bytes(repr([v.hex() for v in tensor.values]).encode())}" if tensor.values else ""
    return f"{dtype} {tuple(tensor.shape)} {_of_bytes(tensor.data)}{values}"


def _of_bytes(raw: bytes) -> str:
    if len(raw) <= _SHOWN_BYTES:
        return raw.hex()
    digest = hashlib.sha256(raw).hexdigest()[:16]
    return f"{raw[:_SHOWN_BYTES].hex()}... ({len(raw)} bytes, {digest})"


# --- frames ---


def of_frame(
    parts: Sequence[sessions_pb2.StepStreamResponse], sizes: Sequence[int], states_of: Sequence[int]
) -> list[Answer]:
    """The answers of a frame's members, whatever parts they came in; then one of the frame.

    `sizes` are the members' rows, `states_of` the members whose states were asked for.
    """
    members: dict[int, dict[str, str]] = {}
    wrong: list[str] = []

    def put(member: int, fields: Mapping[str, str]) -> None:
        if member in members or member >= len(sizes):
            wrong.append(f"member {member} was answered twice, or is none")
        members[member] = dict(fields)

    for part in parts:
        for entry in part.errors:
            answer = failed_member(entry.error)
            for member in entry.members or range(len(sizes)):
                put(member, answer.fields)
        for member, fields in _applied(part, sizes, states_of, wrong):
            put(member, fields)
    if [part.last for part in parts] != [False] * (len(parts) - 1) + [True]:
        wrong.append("the last part is not the last")
    frame = {STATUS: "OK", "order": "; ".join(wrong) or "as it must be"}
    unanswered = {STATUS: "no answer"}
    return [*(Answer(members.get(member, unanswered)) for member in range(len(sizes))), Answer(frame)]


def _applied(
    part: sessions_pb2.StepStreamResponse, sizes: Sequence[int], states_of: Sequence[int], wrong: list[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    applied = _members_of(part, len(sizes))
    applied = [member for member in applied if member < len(sizes)]
    revisions = list(part.revisions) or [part.revision] * len(applied)
    positions = list(part.positions) or [part.position] * len(applied)
    if not len(applied) == len(revisions) == len(positions):
        wrong.append("a part has other numbers of members, revisions and positions")
        return
    outputs = _rows(part.outputs, [(member, sizes[member]) for member in applied], wrong)
    with_states = [(member, sizes[member]) for member in applied if member in states_of]
    states = _rows(part.states, with_states, wrong)
    for place, member in enumerate(applied):
        yield (
            member,
            {
                STATUS: "OK",
                "revision": str(revisions[place]),
                "position": str(positions[place]),
                "replayed": str(member in part.replayed_members),
                "model_version": str(part.model_version),
                **{f"outputs[{name}]": value for name, value in outputs.get(member, {}).items()},
                **{f"states[{name}]": value for name, value in states.get(member, {}).items()},
            },
        )


def _members_of(part: sessions_pb2.StepStreamResponse, count: int) -> list[int]:
    if part.all_members:
        return list(range(count))
    if part.member_count:
        return list(range(part.first_member, part.first_member + part.member_count))
    return list(part.members)


def _rows(
    tensors: Iterable[tensors_pb2.Tensor], members: Sequence[tuple[int, int]], wrong: list[str]
) -> dict[int, dict[str, str]]:
    """The rows of each member."""
    found: dict[int, dict[str, str]] = {}
    total = sum(size for _, size in members)
    for tensor in tensors:
        if not tensor.shape or tensor.shape[0] != total or len(tensor.data) % max(total, 1):
            wrong.append(f"{tensor.name} has the shape {tuple(tensor.shape)} for {total} rows")
            continue
        row_bytes, start = len(tensor.data) // max(total, 1), 0
        for member, size in members:
            end = start + size * row_bytes
            own = tensors_pb2.Tensor(
                dtype=tensor.dtype, shape=[size, *tensor.shape[1:]], data=tensor.data[start:end]
            )
            found.setdefault(member, {})[tensor.name] = _of_tensor(own)
            start = end
    return found
