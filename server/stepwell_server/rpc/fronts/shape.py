"""Limits of a request that are checked before protobuf parses it: of names, lists, and all other bytes.

The rules are derived from the protocol's descriptors, once per method. The native front checks them while it reads
(`shape.rs`), so Python never sees a message that breaks one. `shape_check` checks the messages of the Python front, and
those that come as JSON. Both report the same field of the same message.
"""

from __future__ import annotations

import dataclasses
import enum

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from stepwell_server.errors import InvalidInput

MAX_NAME_BYTES = 1024
"""Limit of bytes of a name, an id, a label or a prefix: 256 characters of UTF-8. A smaller message breaks no rule."""
MAX_ENTRIES = 65_536
"""Limit of entries of a list of sessions or numbers, in the whole message."""
MAX_TENSORS = 1024
"""Limit of entries of a list of tensors, of parameters, or of names of outputs or labels."""
MAX_ELEMENTS = 1 << 20
"""Limit of entries of a list of numbers that is a tensor or a mask of rows."""
MAX_SMALL_BYTES = 1 << 20
"""Limit of bytes of a message outside its lists and the fields of `_LARGE`."""
SMALL, MALFORMED = -1, -2
"""Instead of a rule's index: too many bytes outside lists and large fields; not a message."""
_LONG = 4096
#: Fields that contain tensors, records and files, and may be as large as a message.
_LARGE = frozenset(
    {
        "stepwell.v1.Tensor.data",
        "stepwell.v1.ExportedSession.record",
        "stepwell.v1.UploadModelRequest.content",
        "inference.ModelInferRequest.raw_input_contents",
        "inference.InferTensorContents.bytes_contents",
        "inference.ModelRepositoryParameter.string_param",
        "inference.ModelRepositoryParameter.bytes_param",
    }
)
#: Limits of bytes of texts that are not names.
_LIMITS = {
    "stepwell.v1.LoadModelRequest.path": _LONG,
    "stepwell.v1.LoadModelRequest.migration": _LONG,
    "stepwell.v1.SetDefaultRequest.migration": _LONG,
    "stepwell.v1.UploadModelRequest.filename": _LONG,
    "stepwell.v1.ListSessionsRequest.page_token": _LONG,
    "stepwell.v1.CloseMatchingSessionsRequest.page_token": _LONG,
    "stepwell.v1.ExportSessionsRequest.page_token": _LONG,
}
#: Limits of lists that differ from `MAX_ENTRIES` for names and `MAX_TENSORS` for messages. The calls themselves allow less,
#: and report it in their own errors.
_ENTRIES = {
    "stepwell.v1.StepRequest.output_names": MAX_TENSORS,
    "stepwell.v1.StepFrame.output_names": MAX_TENSORS,
    "stepwell.v1.LoadModelRequest.labels": MAX_TENSORS,
    "stepwell.v1.CloseSessionsRequest.session_ids": 4096,
    "stepwell.v1.CloseSessionsRequest.uids": 4096,
    "stepwell.v1.GetStatesRequest.session_ids": 4096,
    "stepwell.v1.ImportSessionsRequest.sessions": 4096,
    "stepwell.v1.ExportSessionsRequest.session_ids": 4096,
    "inference.ModelInferRequest.raw_input_contents": MAX_TENSORS,
}
#: Lists of numbers that are tensors and masks.
_ELEMENTS = frozenset(
    {
        "stepwell.v1.StepRequest.reset_mask",
        "stepwell.v1.StepFrame.reset_mask",
        "stepwell.v1.PredictRequest.reset_mask",
        "inference.InferTensorContents.bool_contents",
        "inference.InferTensorContents.int_contents",
        "inference.InferTensorContents.int64_contents",
        "inference.InferTensorContents.uint_contents",
        "inference.InferTensorContents.uint64_contents",
        "inference.InferTensorContents.fp32_contents",
        "inference.InferTensorContents.fp64_contents",
    }
)


class Kind(enum.IntEnum):
    """Content of a field. `shape.rs` uses the same numbers."""

    NAME = 0
    LARGE = 1
    MESSAGE = 2
    VARINTS = 3
    FIXED32 = 4
    FIXED64 = 5


_TEXTS = frozenset({FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES})
_FIXED = {
    **dict.fromkeys(
        (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_FIXED32, FieldDescriptor.TYPE_SFIXED32),
        Kind.FIXED32,
    ),
    **dict.fromkeys(
        (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FIXED64, FieldDescriptor.TYPE_SFIXED64),
        Kind.FIXED64,
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """The limits of one field."""

    index: int
    """Its index among all rules of the shape."""
    path: str
    """Path of the field within the request, for errors."""
    kind: Kind
    max_bytes: int
    """Limit of bytes for `NAME`; else 0."""
    max_entries: int
    """Limit of entries in the whole message; 0: the field is not a list."""
    child: int
    """Index of the node for `MESSAGE`; else 0."""


class Shape:
    """The rules of one method's requests. Immutable; for any thread."""

    def __init__(self, request: Descriptor) -> None:
        self._name = request.full_name
        self.rules: list[Rule] = []
        self.nodes: list[dict[int, Rule]] = []
        """The rules of each message within the request, by field number. The request itself comes first."""
        self._add_nodes(request)

    @property
    def table(self) -> list[list[tuple[int, int, int, int]]]:
        """The rules for the native front: for each node, the number, kind, limit and entries of its fields."""
        return [
            [
                (number, int(rule.kind), rule.child or rule.max_bytes, rule.max_entries)
                for number, rule in node.items()
            ]
            for node in self.nodes
        ]

    def error(self, rule: int, size: int) -> InvalidInput:
        """Return the error of a request that breaks a rule.

        Args:
            rule: The rule's index, `SMALL` or `MALFORMED`.
            size: Number of bytes of the name, or of the malformed message; 0: a list has too many entries.
        """
        if rule == MALFORMED:
            return not_a_message(self._name, size)
        if rule == SMALL:
            return InvalidInput(
                f"request must have at most {MAX_SMALL_BYTES} bytes outside lists, tensors, records and files; got more"
            )
        broken = self.rules[rule]
        if size:
            return InvalidInput(f"{broken.path} must have at most {broken.max_bytes} bytes; got {size}")
        return InvalidInput(f"{broken.path} must have at most {broken.max_entries} entries; got more")

    def _add_nodes(self, request: Descriptor) -> None:
        """Add a node for each message within the request. A type that occurs twice has two nodes."""
        waiting = [(request, "")]
        for descriptor, path in waiting:
            node: dict[int, Rule] = {}
            for field in descriptor.fields:
                kind = _kind_of(field)
                if kind is None:
                    continue
                where = f"{path}{field.name}"
                child = 0
                if kind is Kind.MESSAGE:
                    assert field.message_type is not None, "a message has a type"
                    child = len(waiting)
                    waiting.append((field.message_type, f"{where}."))
                max_bytes = _LIMITS.get(field.full_name, MAX_NAME_BYTES) if kind is Kind.NAME else 0
                rule = Rule(len(self.rules), where, kind, max_bytes, _max_entries(field, kind), child)
                node[field.number] = rule
                self.rules.append(rule)
            self.nodes.append(node)


def not_a_message(name: str, size: int) -> InvalidInput:
    """Return the error of bytes that are not a message of this type."""
    return InvalidInput(f"request must be a {name}; got {size} bytes that are not")


def _kind_of(field: FieldDescriptor) -> Kind | None:
    """Return the content of a field; None: a single number, which needs no rule."""
    if field.full_name in _LARGE:
        return Kind.LARGE
    if field.type in _TEXTS:
        return Kind.NAME
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return Kind.MESSAGE
    return _FIXED.get(field.type, Kind.VARINTS) if field.is_repeated else None


def _max_entries(field: FieldDescriptor, kind: Kind) -> int:
    if not field.is_repeated:
        return 0
    if field.full_name in _ELEMENTS:
        return MAX_ELEMENTS
    return _ENTRIES.get(field.full_name, MAX_TENSORS if kind is Kind.MESSAGE else MAX_ENTRIES)
