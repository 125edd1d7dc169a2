"""Checks the shape of a message in Python: for the Python front, and for messages that come as JSON."""

from __future__ import annotations

from stepwell_server.errors import InvalidInput
from stepwell_server.rpc.fronts.shape import (
    MALFORMED,
    MAX_NAME_BYTES,
    MAX_SMALL_BYTES,
    SMALL,
    Kind,
    Rule,
    Shape,
)

#: The wire types of each kind of field. With other wire types, protobuf treats a field as unknown.
_WIRE_TYPES = {
    Kind.NAME: (2,),
    Kind.LARGE: (2,),
    Kind.MESSAGE: (2,),
    Kind.VARINTS: (0, 2),
    Kind.FIXED32: (5, 2),
    Kind.FIXED64: (1, 2),
}
#: Lists whose entries are skipped in runs, if their size is below this.
_RUNS = {Kind.NAME: 0x80, Kind.MESSAGE: 1}
_CONTINUED = bytes(range(0x80, 0x100))


def check_shape(shape: Shape, raw: bytes) -> InvalidInput | None:
    """Return the error of a request that breaks a rule of its method's shape; None: it breaks none."""
    if len(raw) <= MAX_NAME_BYTES:
        return None
    try:
        _Scan(shape).message(raw, 0, len(raw), 0)
    except _Breach as breach:
        return shape.error(breach.rule, len(raw) if breach.rule == MALFORMED else breach.size)
    return None


class _Breach(Exception):
    """A message breaks a rule: see `Shape.error`."""

    def __init__(self, rule: int, size: int = 0) -> None:
        super().__init__(rule, size)
        self.rule = rule
        self.size = size


class _Scan:
    """The scan of a message: the counterpart of `Scan` in the native front's shape.rs."""

    def __init__(self, shape: Shape) -> None:
        self._nodes = shape.nodes
        self._entries = [0] * len(shape.rules)
        self._small = 0

    def message(self, raw: bytes, at: int, end: int, node: int) -> None:
        """Scan a message, or a part of one.

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
                raise _Breach(MALFORMED)
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
        """Skip consecutive short names, or empty messages, of a list. Returns the end of the run.

        This scans a list of very many sessions in a tenth of the time.
        """
        key, begin, count, too_long = raw[at], at, 0, _RUNS[rule.kind]
        last = end - 1
        if key & 7 != 2:
            return begin
        while at < last and raw[at] == key and (size := raw[at + 1]) < too_long:
            at += 2 + size
            count += 1
        if at > end:
            raise _Breach(MALFORMED)
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
            raise _Breach(SMALL)


def _packed(rule: Rule, raw: bytes, start: int, end: int) -> int:
    """Return the number of entries of a packed list, or any number above the limit."""
    size = end - start
    if rule.kind is not Kind.VARINTS:
        return size // (4 if rule.kind is Kind.FIXED32 else 8)
    if size > 10 * rule.max_entries:  # a number has at most 10 bytes, the last of them below 128
        return size
    return len(raw[start:end].translate(None, _CONTINUED))


def _value(raw: bytes, at: int, end: int, wire_type: int) -> tuple[int, int]:
    """Return the start and end of the next field's value."""
    if wire_type == 0:
        _, at = _varint(raw, at, end)
        return at, at
    if wire_type == 2:
        size, at = _varint(raw, at, end)
    elif wire_type in (1, 5):
        size = 8 if wire_type == 1 else 4
    else:
        raise _Breach(MALFORMED)  # the protocol has no groups
    if size > end - at:
        raise _Breach(MALFORMED)
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
    raise _Breach(MALFORMED)
