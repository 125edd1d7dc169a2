"""What records say of sessions beside the columns of their heads: their leases, and what later servers wrote."""

from __future__ import annotations

import struct

from stepwell_server.core import leases
from stepwell_server.core.leases import Lease, Leases
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.store.record import LEASE, pack_fields, unpack_fields

_LEASE_HEAD = struct.pack("<HH", LEASE, leases.STORED.size)


def lease_of(fields: bytes) -> Lease | None:
    """The lease that the fields of a record say, if they say one."""
    if not fields:
        return None
    if len(fields) == len(_LEASE_HEAD) + leases.STORED.size and fields.startswith(_LEASE_HEAD):
        return leases.unpack(fields[len(_LEASE_HEAD) :])
    found = unpack_fields(fields).get(LEASE)
    return None if found is None else leases.unpack(found)


def lease_of_or_none(fields: bytes) -> Lease | None:
    """As `lease_of`, of a record that was not checked."""
    try:
        return lease_of(fields)
    except ValueError:
        return None


def of_lease(lease: Lease) -> bytes:
    """The fields of a session that has a lease and nothing else."""
    return _LEASE_HEAD + leases.pack(lease)


def without_lease(fields: bytes) -> bytes:
    """The other fields."""
    if not fields:
        return fields
    return pack_fields({tag: value for tag, value in unpack_fields(fields).items() if tag != LEASE})


class Fields:
    """Extension fields of the sessions of a table. For whoever holds their claims."""

    def __init__(self, table: SessionTable, known: Leases) -> None:
        self._table = table
        self._leases = known

    def take(self, handle: int, fields: bytes) -> None:
        """Let the table say what a record's fields say."""
        table = self._table
        table.fields.pop(handle, None)
        lease = lease_of(fields)
        table.lease[handle] = 0 if lease is None else self._leases.number(lease)
        if rest := fields if lease is None else without_lease(fields):
            table.fields[handle] = rest

    def of(self, handle: int) -> bytes:
        """The fields of a session's record."""
        number = int(self._table.lease[handle])
        rest = self._table.fields.get(handle, b"")
        if not number:
            return rest
        own = of_lease(self._leases.of(number))
        return pack_fields({**unpack_fields(rest), **unpack_fields(own)}) if rest else own

    def of_leases(self, handles: Handles) -> list[bytes]:
        """The fields of sessions that have leases and nothing else: all are of the same length."""
        numbers = self._table.lease[handles].tolist()
        known = {number: of_lease(self._leases.of(number)) for number in set(numbers)}
        return [known[number] for number in numbers]
