"""What a request may hold before protobuf parses it: names, lists and the bytes of everything else are bounded.

The rules come from the protocol's descriptors, once for each method. The native front checks them on the wire
(`shape.rs`), so that Python never sees the bytes of a message that breaks one; `Shape.check` is its twin for the front in
Python. Both name the same field of the same message.
"""

from __future__ import annotations

import dataclasses
import enum

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from stepwell_server.errors import InvalidInput

MAX_NAME_BYTES = 1024
"""Bytes of a name, an id, a label or a prefix: 256 characters of UTF-8. A message no larger than this breaks no rule."""
MAX_ENTRIES = 65_536
"""Entries of a list of sessions or numbers, in the whole message."""
MAX_TENSORS = 1024
"""Entries of a list of tensors, of parameters, or of names of outputs or labels."""
MAX_ELEMENTS = 1 << 20
"""Entries of a list of numbers that stands for a tensor or a mask of its rows."""
MAX_SMALL_BYTES = 1 << 20
"""Bytes of a message beside its lists and the fields of `_LARGE`."""
_SMALL, _MALFORMED = -1, -2
_LONG = 4096
#: Fields that hold tensors, records and files, and so as much as a message may.
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
#: Bytes of text that is no name.
_LIMITS = {
    "stepwell.v1.LoadModelRequest.path": _LONG,
    "stepwell.v1.LoadModelRequest.migration": _LONG,
    "stepwell.v1.SetDefaultRequest.migration": _LONG,
    "stepwell.v1.UploadModelRequest.filename": _LONG,
    "stepwell.v1.ListSessionsRequest.page_token": _LONG,
    "stepwell.v1.CloseMatchingSessionsRequest.page_token": _LONG,
    "stepwell.v1.ExportSessionsRequest.page_token": _LONG,
}
#: Lists of names and messages by how long they may be, where that is not `MAX_ENTRIES` for names and `MAX_TENSORS` for
#: messages. What a call itself allows is less, and says so in words of its own.
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
#: Lists of numbers that stand for tensors and masks.
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
    """What a field holds. The numbers are those of `shape.rs`."""

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
#: The wire types with which a field of each kind comes; with others protobuf takes it for an unknown one.
_WIRE_TYPES = {
    Kind.NAME: (2,),
    Kind.LARGE: (2,),
    Kind.MESSAGE: (2,),
    Kind.VARINTS: (0, 2),
    Kind.FIXED32: (5, 2),
    Kind.FIXED64: (1, 2),
}


#: Lists whose entries are passed over in runs, while their size is below this.
_RUNS = {Kind.NAME: 0x80, Kind.MESSAGE: 1}
_CONTINUED = bytes(range(0x80, 0x100))


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """What one field may hold."""

    index: int
    """Among all rules of the shape."""
    path: str
    """The field as errors name it, from the request on."""
    kind: Kind
    max_bytes: int
    """Of `NAME`; else 0."""
    max_entries: int
    """In the whole message; 0: the field is no list."""
    child: int
    """The node of a `MESSAGE`; else 0."""


class _Breach(Exception):
    """A message breaks a rule: see `Shape.error`."""

    def __init__(self, rule: int, size: int = 0) -> None:
        super().__init__(rule, size)
        self.rule = rule
        self.size = size


class Shape:
    """The rules of one method's requests. Immutable; for any thread."""

    def __init__(self, request: Descriptor) -> None:
        self._name = request.full_name
        self._rules: list[Rule] = []
        self._nodes: list[dict[int, Rule]] = []
        self._add_nodes(request)

    @property
    def table(self) -> list[list[tuple[int, int, int, int]]]:
        """The rules as the native front takes them: for each node number, kind, limit and entries of its fields."""
        return [
            [
                (number, int(rule.kind), rule.child or rule.max_bytes, rule.max_entries)
                for number, rule in node.items()
            ]
            for node in self._nodes
        ]

    def check(self, raw: bytes) -> InvalidInput | None:
        """The error of a request that breaks a rule; None if it breaks none."""
        if len(raw) <= MAX_NAME_BYTES:
            return None
        try:
            _Scan(self._nodes, len(self._rules)).message(raw, 0, len(raw), 0)
        except _Breach as breach:
            return self.error(breach.rule, len(raw) if breach.rule == _MALFORMED else breach.size)
        return None

    def error(self, rule: int, size: int) -> InvalidInput:
        """What a caller is answered whose request breaks a rule.

        Args:
            rule: The rule's index; -1: too many bytes beside lists and large fields; -2: the bytes are no message.
            size: Bytes of the name, or of what is no message; 0: a list has too many entries.
        """
        if rule == _MALFORMED:
            return not_a_message(self._name, size)
        if rule == _SMALL:
            return InvalidInput(
                f"request must have at most {MAX_SMALL_BYTES} bytes beside lists, tensors, records and files; got more"
            )
        broken = self._rules[rule]
        if size:
            return InvalidInput(f"{broken.path} must have at most {broken.max_bytes} bytes; got {size}")
        return InvalidInput(f"{broken.path} must have at most {broken.max_entries} entries; got more")

    def _add_nodes(self, request: Descriptor) -> None:
        """A node for each message within the request, wherever it stands: a list is counted where it stands."""
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
                rule = Rule(len(self._rules), where, kind, max_bytes, _max_entries(field, kind), child)
                node[field.number] = rule
                self._rules.append(rule)
            self._nodes.append(node)


def not_a_message(name: str, size: int) -> InvalidInput:
    """The error of bytes that are no message of this name."""
    return InvalidInput(f"request must be a {name}; got {size} bytes that are none")


def _kind_of(field: FieldDescriptor) -> Kind | None:
    """What a field holds; None: a number of its own, which needs no rule."""
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


class _Scan:
    """What has been seen of a message: as `Scan` in shape.rs."""

    def __init__(self, nodes: list[dict[int, Rule]], rules: int) -> None:
        self._nodes = nodes
        self._entries = [0] * rules
        self._small = 0

    def message(self, raw: bytes, at: int, end: int, node: int) -> None:
        """Look at a message, or at a part of one.

        Raises:
            _Breach: a rule is broken.
        """
        rules = self._nodes[node]
        while at < end:
            begin = at
            key = raw[at]
            if key < 0x80:
                at += 1
            else:
                key, at = _varint(raw, at, end)
            if not 0 < key >> 3 < 1 << 32:
                raise _Breach(_MALFORMED)
            rule = rules.get(key >> 3)
            if rule is not None and rule.max_entries and rule.kind in _RUNS and key < 0x80:
                at = self._run(rule, raw, begin, end)
                if at > begin:
                    continue
                at += 1
            start, at = _value(raw, at, end, key & 7)
            if rule is None or key & 7 not in _WIRE_TYPES[rule.kind]:
                self._add_small(at - begin)
            elif rule.kind is Kind.NAME:
                if at - start > rule.max_bytes:
                    raise _Breach(rule.index, at - start)
                self._add(rule, 1, at - begin)
            elif rule.kind is Kind.LARGE:
                self._add(rule, 1, start - begin)
            elif rule.kind is Kind.MESSAGE:
                self._add(rule, 1, start - begin)
                if start < at:
                    self.message(raw, start, at, rule.child)
            elif key & 7 == 2:
                self._add_small(start - begin)
                self._add(rule, _packed(rule, raw, start, at), 0)
            else:
                self._add(rule, 1, 0)

    def _run(self, rule: Rule, raw: bytes, at: int, end: int) -> int:
        """Pass over short names, or empty messages, of a list that follow one another. Returns where they end.

        A list of very many sessions is read so in a tenth of the time.
        """
        key, begin, count, too_long = raw[at], at, 0, _RUNS[rule.kind]
        last = end - 1
        if key & 7 != 2:
            return begin
        while at < last and raw[at] == key and (size := raw[at + 1]) < too_long:
            at += 2 + size
            count += 1
        if at > end:
            raise _Breach(_MALFORMED)
        if count:
            self._add(rule, count, 0)
        return at

    def _add(self, rule: Rule, entries: int, size: int) -> None:
        if not rule.max_entries:
            self._add_small(size)
            return
        self._entries[rule.index] += entries
        if self._entries[rule.index] > rule.max_entries:
            raise _Breach(rule.index)

    def _add_small(self, size: int) -> None:
        self._small += size
        if self._small > MAX_SMALL_BYTES:
            raise _Breach(_SMALL)


def _packed(rule: Rule, raw: bytes, start: int, end: int) -> int:
    """Entries of a packed list, or any number above the limit."""
    size = end - start
    if rule.kind is not Kind.VARINTS:
        return size // (4 if rule.kind is Kind.FIXED32 else 8)
    if size > 10 * rule.max_entries:  # a number has at most 10 bytes, the last of them below 128
        return size
    return len(raw[start:end].translate(None, _CONTINUED))


def _value(raw: bytes, at: int, end: int, wire_type: int) -> tuple[int, int]:
    """Where the next field's value begins and ends."""
    if wire_type == 0:
        _, at = _varint(raw, at, end)
        return at, at
    if wire_type == 2:
        size, at = _varint(raw, at, end)
    elif wire_type in (1, 5):
        size = 8 if wire_type == 1 else 4
    else:
        raise _Breach(_MALFORMED)  # groups are none of this protocol's
    if size > end - at:
        raise _Breach(_MALFORMED)
    return at, at + size


def _varint(raw: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    for place in range(at, min(at + 10, end)):
        byte = raw[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value, place + 1
        shift += 7
    raise _Breach(_MALFORMED)
