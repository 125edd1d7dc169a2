"""Sets of sessions that a stream knows by numbers: `sessions.proto` says what they are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from stepwell_server.core.slots import Rows
from stepwell_server.errors import InvalidInput, SessionSetUnknown
from stepwell_server.rpc.fronts.base import SessionSet

if TYPE_CHECKING:
    from stepwell_server.rpc.fronts.base import Call

MAX_SETS = 64
STREAM_BYTES = 16 << 20
ALL_BYTES = 64 << 20
#: Bytes that an id takes beside its characters, which are here and in the native front.
_ID_BYTES = 128


@dataclasses.dataclass(slots=True)
class SetRoom:
    """What the sets of all streams of a server take."""

    limit: int = ALL_BYTES
    bytes: int = 0


class StreamSets:
    """The sets of one stream. Lives on the event loop; to be closed."""

    def __init__(self, room: SetRoom, call: Call) -> None:
        self._room = room
        self._call = call
        self._sets: dict[int, SessionSet] = {}
        self._last = 0
        """The greatest number so far, of those that are forgotten as well."""
        self._bytes = 0

    def declare(self, number: int, ids: list[str], sizes: Rows | None) -> int:
        """Know ids by a number from now on. Returns the number, or 0 where there is no room for them.

        Args:
            number: Greater than all before.
            ids: In the tenant's namespace; a list that nobody changes.
            sizes: Rows of each; None: not said.

        Raises:
            InvalidInput: the number is that of an earlier set, or may be.
        """
        if number <= self._last:
            raise InvalidInput(
                f"declare_set must be greater than that of every set declared before ({self._last}); got {number}"
            )
        self._last = number
        held_bytes = _held_bytes(ids)
        if (
            len(self._sets) >= MAX_SETS
            or self._bytes + held_bytes > STREAM_BYTES
            or self._room.bytes + held_bytes > self._room.limit
        ):
            return 0
        known = SessionSet(ids, sizes, held_bytes)
        self._sets[number] = known
        self._count(held_bytes)
        self._call.know_set(number, known)
        return number

    def get(self, number: int) -> SessionSet:
        """A set that was declared.

        Raises:
            SessionSetUnknown: it was not, or there was no room for it, or it is forgotten.
        """
        known = self._sets.get(number)
        if known is None:
            raise SessionSetUnknown(
                f"session_set must be that of a set which this stream knows; got {number},"
                " which was not declared here, or is forgotten, or had no room"
            )
        return known

    def forget(self, numbers: Iterable[int]) -> None:
        """Forget sets; those that are not there are passed over."""
        for number in numbers:
            known = self._sets.pop(number, None)
            if known is not None:
                self._count(-known.held_bytes)
                self._call.know_set(number, None)

    def close(self) -> None:
        """The stream has ended, and with it its call: nobody needs to be told."""
        self._sets.clear()
        self._count(-self._bytes)

    def _count(self, held_bytes: int) -> None:
        self._bytes += held_bytes
        self._room.bytes += held_bytes


def _held_bytes(ids: list[str]) -> int:
    characters = "".join(ids)
    # as text of Python's and as UTF-8
    return len(characters) * (2 if characters.isascii() else 8) + len(ids) * _ID_BYTES


def request_ids_from(base: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """One request id per session, counted from that of the first.

    Raises:
        InvalidInput: the last one is no number of 64 bits.
    """
    if base + count - 1 >= 1 << 64:
        raise InvalidInput(
            f"request_id_base must be at most 2**64 - {count}, so that {count} sessions have one each; got {base}"
        )
    return np.arange(count, dtype=np.uint64) + np.uint64(base)
