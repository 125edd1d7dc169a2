"""Record fields besides the columns: versions, owners, closes, and fields written by newer servers."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.state.model import Model
from stepwell_server.store.base import CLOSES_BYTES, pack_closes, unpack_closes
from stepwell_server.store.fields import CLOSES, OWNER, VERSION, pack_fields, unpack_fields

MARK = struct.Struct("<QIB")
"""A stored `Mark`; the last bit of the last byte: it is pinned."""
_MARK_HEAD = struct.pack("<HH", VERSION, MARK.size)
_MARK_BYTES = len(_MARK_HEAD) + MARK.size


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """The version part of a session's record."""

    version: int
    epoch: int
    """Moves of later epochs have not been applied."""
    is_pinned: bool
    """The session was opened with a version or a label, and does not move."""

    def pack(self) -> bytes:
        """The stored form."""
        return MARK.pack(self.version, self.epoch, self.is_pinned)

    @classmethod
    def unpack(cls, stored: bytes) -> Mark:
        """Parse the stored form."""
        version, epoch, flags = MARK.unpack(stored)
        return cls(version, epoch, bool(flags & 1))


def split(fields: bytes) -> tuple[bytes | None, bytes]:
    """The value of the version field in a record's fields, and the other fields.

    Raises:
        ValueError: the bytes are not record fields.
    """
    if not fields:
        return None, b""
    if len(fields) == _MARK_BYTES and fields.startswith(_MARK_HEAD):  # the common case
        return fields[len(_MARK_HEAD) :], b""
    found = unpack_fields(fields)
    # a mark of another size comes from a newer server, and is kept unchanged
    mark = found.pop(VERSION) if len(found.get(VERSION, b"")) == MARK.size else None
    return mark, pack_fields(found)


def mark_of(fields: bytes) -> Mark | None:
    """The version mark in a record's fields, if there is one."""
    mark, _ = split(fields)
    return None if mark is None else Mark.unpack(mark)


def joined(mark: Mark, rest: bytes = b"") -> bytes:
    """Record fields with this version mark, followed by other fields unchanged."""
    own = _MARK_HEAD + mark.pack()
    return pack_fields({**unpack_fields(rest), **unpack_fields(own)}) if rest else own


def owner_of(fields: bytes) -> str:
    """The caller that created a session, by its record's fields; empty: not recorded, or unreadable."""
    if not fields:
        return ""
    try:
        return str(unpack_fields(split(fields)[1]).get(OWNER, b""), "utf-8", "replace")
    except ValueError:
        return ""


def closes_of(fields: bytes) -> tuple[int, ...]:
    """Request ids of the calls that closed earlier sessions of the id, most recent first.

    Empty if the fields name none, or cannot be read.
    """
    if not fields:
        return ()
    try:
        stored = unpack_fields(fields).get(CLOSES, b"")
    except ValueError:
        return ()
    return unpack_closes(stored) if len(stored) == CLOSES_BYTES else ()


def at_birth(owner: str, closes: tuple[int, ...] | None, others: bytes = b"") -> bytes:
    """The fields of a new session, besides its version: its owner, and the closes of its id.

    Args:
        owner: Empty: none.
        closes: Of earlier sessions of the id. None: no such field; an empty field is as long as any other.
        others: Further fields.
    """
    if not (owner or others or closes is not None):
        return b""
    own = unpack_fields(others)
    own.pop(OWNER, None)
    own.pop(CLOSES, None)
    if owner:
        own[OWNER] = owner.encode()
    if closes is not None:
        own[CLOSES] = pack_closes(closes)
    return pack_fields(own)


def with_closes(fields: bytes, closes: tuple[int, ...]) -> bytes:
    """All fields of a record, with other closes of its id."""
    return pack_fields({**unpack_fields(fields), CLOSES: pack_closes(closes)}) if closes else fields


class Fields:
    """Extension fields of a table's sessions. For the holder of their claims."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table

    def take(self, handle: int, fields: bytes) -> None:
        """Store a record's fields in the table, without the version, which the table knows better."""
        table = self._table
        mark, rest = split(fields)
        table.pinned[handle] = mark is not None and Mark.unpack(mark).is_pinned
        if rest:
            table.fields[handle] = rest
        else:
            table.fields.pop(handle, None)

    def of(self, handle: int, model: Model) -> bytes:
        """The fields of a session's record for a version."""
        epoch = model.epoch  # read before the table is: see `_epochs`
        if self._table.model[handle] != model.index:
            epoch = model.left_epoch
        mark = Mark(model.version, epoch, is_pinned=bool(self._table.pinned[handle]))
        return joined(mark, self._table.fields.get(handle, b""))

    def others(self, handles: Handles) -> Sequence[bytes]:
        """The fields of sessions without their versions; empty if none has any."""
        if not self._table.have_fields(handles):
            return ()
        fields = self._table.fields
        return [fields.get(handle, b"") for handle in handles.tolist()]

    def lengths(self, handles: Handles, model: Model) -> npt.NDArray[np.intp]:
        """Bytes of the fields of sessions' records for a version, `(n,)`."""
        if self._table.have_fields(handles):  # fields of a newer server may have the tag of a version
            return np.fromiter(map(len, self.of_many(handles, model)), np.intp, len(handles))
        return np.full(len(handles), _MARK_BYTES, np.intp)

    def of_many(self, handles: Handles, model: Model) -> list[bytes]:
        """The fields of sessions, `(n,)`."""
        epochs = self._epochs(handles, model)
        pinned = self._table.pinned[handles].tolist()
        others = self.others(handles) or [b""] * len(handles)
        known: dict[tuple[bool, int, bytes], bytes] = {}
        for each in set(zip(pinned, epochs, others, strict=True)):
            is_pinned, epoch, rest = each
            known[each] = joined(Mark(model.version, epoch, is_pinned), rest)
        return [known[each] for each in zip(pinned, epochs, others, strict=True)]

    def _epochs(self, handles: Handles, model: Model) -> list[int]:
        """Epochs of sessions' records. Sessions that left the version while active are upgraded when they are read."""
        # The order matters: the event loop, on another thread, moves sessions first and sets the epoch afterwards.
        epoch = model.epoch
        here = self._table.model[handles] == model.index
        epochs: list[int] = np.where(here, epoch, model.left_epoch).tolist()
        return epochs
