"""Whether all sessions can still be found: their number and a sum over their keys, kept with every transaction.

LMDB has no checksums of its pages. A damaged record is found by its own; but with a damaged key, or a damaged page
above the records, the search merely leads elsewhere, and the session seems never to have been. So each transaction that
begins or ends sessions writes how many there are and the sum of the checksums of all keys. A scan of
all keys must come to the same, and must find each by searching for it.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from isal.isal_zlib import crc32

from stepwell_server.store.record import RecordBytes

NAME = b"key sums"
"""In LMDB's `meta`."""
_VALUE = struct.Struct("<QQ")  # count, sum
_WRAP = 2**64
BATCH_SIZE = 256
"""Keys that are looked at while nobody can write: a third of a millisecond."""
#: Keys that are looked at when the store is opened.
_START_LIMIT = 65_536
_PAUSE_S = 3e-3

_log = logging.getLogger(__name__)


class UnexpectedKeys(Exception):
    """Another number of sessions begins with the records that were put than was given."""


@dataclasses.dataclass(slots=True)
class Sums:
    """How many keys, and the sum of their checksums (CRC-32, which any change of up to 32 neighbouring bits changes)."""

    count: int = 0
    total: int = 0

    def add(self, keys: Iterable[bytes], sign: int = 1) -> None:
        """Take keys in, or out (-1)."""
        sums = list(map(crc32, keys))
        self.count += sign * len(sums)
        self.total = (self.total + sign * sum(sums)) % _WRAP

    def pack(self) -> bytes:
        """As they are stored."""
        return _VALUE.pack(self.count % _WRAP, self.total)


def unpack(stored: bytes | None) -> Sums:
    """What `pack` returned; None: nothing was stored yet."""
    return Sums() if stored is None else Sums(*_VALUE.unpack(stored))


@dataclasses.dataclass(slots=True)
class Change:
    """The keys that a transaction adds and takes away."""

    added: list[bytes] = dataclasses.field(default_factory=list)
    removed: list[bytes] = dataclasses.field(default_factory=list)
    after: Sums | None = None
    """The sums afterwards, if they are others."""

    def put(
        self, transaction: Any, sessions: Any, items: Sequence[tuple[bytes, RecordBytes]], begin: int | None
    ) -> None:
        """Put records, of which `begin` are of sessions that begin; None: it is not known.

        If none begins, or all, they are put at once.

        Raises:
            UnexpectedKeys: it is not so. The transaction is to be done again, with None.
        """
        cursor = transaction.cursor(sessions)
        if begin in (0, len(items)):
            before = transaction.stat(sessions)["entries"]
            cursor.putmulti(items, overwrite=not begin)
            if transaction.stat(sessions)["entries"] != before + begin:
                raise UnexpectedKeys
            self.added.extend([key for key, _ in items] if begin else ())
            return
        for key, record in items:
            if cursor.put(key, record, overwrite=False):
                self.added.append(key)
            else:
                cursor.put(key, record)

    def applied(self, before: Sums) -> Sums:
        """The sums afterwards."""
        after = Sums(before.count, before.total)
        after.add(self.added)
        after.add(self.removed, -1)
        return after


class Scan:
    """Goes through all keys, a few at a time, while the store changes. Call it with the store's writing lock held."""

    def __init__(self) -> None:
        self.found = Sums()
        self.unreachable = 0
        """Keys that are there, and are not found by searching for them."""
        self.is_done = False
        self._after = b""

    def advance(self, transaction: Any, sessions: Any, limit: int) -> bool:
        """Look at the next keys; True when those were the last."""
        walker, get = transaction.cursor(sessions), transaction.get
        there = walker.set_range(self._after) if self._after else walker.first()
        some = itertools.islice(walker.iternext(keys=True, values=False), limit + 1) if there else ()
        keys = list(map(bytes, some))
        keys = keys[1:] if keys and keys[0] == self._after else keys[:limit]
        self.found.add(keys)
        # from the root on: a cursor would look on the page where it stands first
        self.unreachable += sum(get(key, db=sessions) is None for key in keys)
        # keys that do not ascend are damaged, and must not lead round in circles
        self.is_done = len(keys) < limit or keys[-1] <= self._after
        self._after = keys[-1] if keys else self._after
        return self.is_done

    def changed(self, change: Change) -> None:
        """A transaction has changed keys: those that were passed count at once."""
        if not self.is_done and self._after:
            self.found.add(key for key in change.added if key <= self._after)
            self.found.add((key for key in change.removed if key <= self._after), -1)

    def damage(self, expected: Sums) -> str:
        """What is wrong, when it is done; empty: nothing."""
        if self.found == expected and not self.unreachable:
            return ""
        lost = expected.count - self.found.count + self.unreachable
        if lost > 0:
            return f"keys or pages were damaged, and {lost} of {expected.count} sessions are missing"
        return f"keys were damaged, and some of {expected.count} sessions are missing"


class KeyCheck:
    """The sums of a store's keys. Call `begin`, `committed` and `check_next` with its writing lock held."""

    def __init__(self) -> None:
        self.damage = ""
        """What is known to be wrong; empty: nothing."""
        self._sums = Sums()
        self._scan = Scan()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, transaction: Any, meta: Any) -> None:
        """Read the sums of a store that was opened, and scan it from the start."""
        self._sums = unpack(transaction.get(NAME, db=meta))
        self._scan = Scan()

    def write(self, transaction: Any, meta: Any, change: Change) -> None:
        """Write the sums after a transaction in it."""
        if change.added or change.removed:
            change.after = change.applied(self._sums)
            transaction.put(NAME, change.after.pack(), db=meta)

    def committed(self, change: Change) -> None:
        """The transaction was kept."""
        if change.after is not None:
            self._sums = change.after
            self._scan.changed(change)

    def check_next(self, transaction: Any, sessions: Any, limit: int) -> bool:
        """Look at the next keys; True when all were looked at."""
        if self._scan.is_done:
            return True
        is_done = self._scan.advance(transaction, sessions, limit)
        if is_done and (damage := self._scan.damage(self._sums)):
            self.give_up(damage)
        return is_done

    def give_up(self, damage: str) -> None:
        """Note what is wrong."""
        self._scan.is_done = True
        self.damage = damage
        _log.error(
            "the store is damaged: %s. Sessions that are not found are answered with STATE_CORRUPT until it is mended, by"
            " stepwell store repair or from a backup",
            damage,
        )

    def start(self, check_next: Callable[[], bool]) -> None:
        """Call `check_next` until it returns True: a little at once, all else from a thread, with pauses for others."""
        for _ in range(_START_LIMIT // BATCH_SIZE):
            if check_next():
                return

        def work() -> None:
            while not self._stop.wait(_PAUSE_S) and not check_next():
                pass

        self._thread = threading.Thread(target=work, name="stepwell-store-keys", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
