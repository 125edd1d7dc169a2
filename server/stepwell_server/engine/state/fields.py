"""What records say of sessions beside the columns of their heads: versions, owners, closes, and what later servers wrote."""

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
"""A `Mark` as it is stored; the last bit of the last byte: it is pinned."""
_MARK_HEAD = struct.pack("<HH", VERSION, MARK.size)
_MARK_BYTES = len(_MARK_HEAD) + MARK.size


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """What a record says of its session's version."""

    version: int
    epoch: int
    """Moves of later epochs are still to be made."""
    is_pinned: bool
    """It was opened with a version or a label, and makes no moves."""

    def pack(self) -> bytes:
        """As it is stored."""
        return MARK.pack(self.version, self.epoch, self.is_pinned)

    @classmethod
    def unpack(cls, stored: bytes) -> Mark:
        """What `pack` returned."""
        version, epoch, flags = MARK.unpack(stored)
        return cls(version, epoch, bool(flags & 1))


def split(fields: bytes) -> tuple[bytes | None, bytes]:
    """The value of the version in the fields of a record, and the other fields.

    Raises:
        ValueError: they are none.
    """
    if not fields:
        return None, b""
    if len(fields) == _MARK_BYTES and fields.startswith(_MARK_HEAD):  # the common case
        return fields[len(_MARK_HEAD) :], b""
    found = unpack_fields(fields)
    # of another size it is that of a later server, and goes along as it is
    mark = found.pop(VERSION) if len(found.get(VERSION, b"")) == MARK.size else None
    return mark, pack_fields(found)


def mark_of(fields: bytes) -> Mark | None:
    """The version that the fields of a record say, if they say one."""
    mark, _ = split(fields)
    return None if mark is None else Mark.unpack(mark)


def joined(mark: Mark, rest: bytes = b"") -> bytes:
    """Fields that say this version, and others as they are."""
    own = _MARK_HEAD + mark.pack()
    return pack_fields({**unpack_fields(rest), **unpack_fields(own)}) if rest else own


def owner_of(fields: bytes) -> str:
    """Who has made a session, as the fields of its record say; empty: they do not, or cannot be read."""
    if not fields:
        return ""
    try:
        return str(unpack_fields(split(fields)[1]).get(OWNER, b""), "utf-8", "replace")
    except ValueError:
        return ""


def closes_of(fields: bytes) -> tuple[int, ...]:
    """Request ids of the calls that closed earlier sessions of the id, the last one first.

    Empty where the fields name none, or cannot be read.
    """
    if not fields:
        return ()
    try:
        stored = unpack_fields(fields).get(CLOSES, b"")
    except ValueError:
        return ()
    return unpack_closes(stored) if len(stored) == CLOSES_BYTES else ()


def at_birth(owner: str, closes: tuple[int, ...] | None, others: bytes = b"") -> bytes:
    """The fields of a session that begins, beside its version: its owner, and the closes of its id.

    Args:
        owner: Empty for none.
        closes: Of earlier sessions of the id. None: no such field; an empty one has the length of any other.
        others: Fields that it has beside these two.
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
    """Extension fields of the sessions of a table. For whoever holds their claims."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table

    def take(self, handle: int, fields: bytes) -> None:
        """Let the table say what a record's fields say; on which version the session is now it knows."""
        table = self._table
        mark, rest = split(fields)
        table.pinned[handle] = mark is not None and Mark.unpack(mark).is_pinned
        if rest:
            table.fields[handle] = rest
        else:
            table.fields.pop(handle, None)

    def of(self, handle: int, model: Model) -> bytes:
        """The fields of the record of a session as of a version."""
        epoch = model.epoch  # looked at before the table is: see `_epochs`
        if self._table.model[handle] != model.index:
            epoch = model.left_epoch
        mark = Mark(model.version, epoch, is_pinned=bool(self._table.pinned[handle]))
        return joined(mark, self._table.fields.get(handle, b""))

    def others(self, handles: Handles) -> Sequence[bytes]:
        """The fields of sessions beside their versions; empty if none of them has any."""
        if not self._table.have_fields(handles):
            return ()
        fields = self._table.fields
        return [fields.get(handle, b"") for handle in handles.tolist()]

    def lengths(self, handles: Handles, model: Model) -> npt.NDArray[np.intp]:
        """Bytes of the fields of the records of sessions as of a version, `(n,)`."""
        if self._table.have_fields(handles):  # a later server's may have the tag of a version
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
        """Of the records of sessions: those that left the version while something was under way move when they are read."""
        # In this order: the event loop, which is another thread, moves sessions first and then says that it has.
        epoch = model.epoch
        here = self._table.model[handles] == model.index
        epochs: list[int] = np.where(here, epoch, model.left_epoch).tolist()
        return epochs
