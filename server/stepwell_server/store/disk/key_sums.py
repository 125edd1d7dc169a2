"""Detects missing sessions, by their number and a sum over their keys, which every transaction updates.

LMDB has no checksums for its pages. A corrupt record is detected by its own checksum. With a corrupt key, or a corrupt
page above the records, a search fails, and the session seems never to have existed. So each transaction that begins or
ends sessions stores the number of sessions and the sum of the checksums of all keys. A scan of all keys must give the
same values, and a search must find each key.
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
"""Key in LMDB's `meta`."""
_VALUE = struct.Struct("<QQ")  # count, sum
_WRAP = 2**64
PUT_SIZE = 64
"""Records of one call of LMDB, which holds Python's lock: the event loop waits for up to 1.5 us per record."""
BATCH_SIZE = 256
"""Keys that are checked per step, a third of a millisecond, while writes wait."""
#: Keys that are checked while the store is opened.
_START_LIMIT = 65_536
_PAUSE_S = 3e-3

_log = logging.getLogger(__name__)


class UnexpectedKeys(Exception):
    """A put created another number of sessions than announced."""


@dataclasses.dataclass(slots=True)
class Sums:
    """The number of keys and the sum of their checksums (CRC-32, which detects any change of up to 32 adjacent bits)."""

    count: int = 0
    total: int = 0

    def add(self, keys: Iterable[bytes], sign: int = 1) -> None:
        """Add keys, or remove them (-1)."""
        sums = list(map(crc32, keys))
        self.count += sign * len(sums)
        self.total = (self.total + sign * sum(sums)) % _WRAP

    def pack(self) -> bytes:
        """Encode the sums."""
        return _VALUE.pack(self.count % _WRAP, self.total)


def unpack(stored: bytes | None) -> Sums:
    """Decode the result of `pack`; None: nothing was stored yet."""
    return Sums() if stored is None else Sums(*_VALUE.unpack(stored))


@dataclasses.dataclass(slots=True)
class Change:
    """The keys that a transaction adds and removes."""

    added: list[bytes] = dataclasses.field(default_factory=list)
    removed: list[bytes] = dataclasses.field(default_factory=list)
    after: Sums | None = None
    """The sums after the transaction, if they change."""

    def put(
        self, transaction: Any, sessions: Any, items: Sequence[tuple[bytes, RecordBytes]], begin: int | None
    ) -> None:
        """Put records, of which `begin` are of new sessions; None: unknown.

        If all are new, or none, they are put with few calls.

        Raises:
            UnexpectedKeys: the number is wrong. Repeat the transaction with None.
        """
        cursor = transaction.cursor(sessions)
        if begin in (0, len(items)):
            before = transaction.stat(sessions)["entries"]
            for start in range(0, len(items), PUT_SIZE):
                cursor.putmulti(items[start : start + PUT_SIZE], overwrite=not begin)
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
        """Return the sums after the transaction."""
        after = Sums(before.count, before.total)
        after.add(self.added)
        after.add(self.removed, -1)
        return after


class Scan:
    """Scans all keys, a few at a time, while the store changes. The caller holds the store's write lock."""

    def __init__(self) -> None:
        self.found = Sums()
        self.unreachable = 0
        """Number of existing keys that a search does not find."""
        self.is_done = False
        self._after = b""

    def advance(self, transaction: Any, sessions: Any, limit: int) -> bool:
        """Check the next keys; return True after the last one."""
        walker, get = transaction.cursor(sessions), transaction.get
        there = walker.set_range(self._after) if self._after else walker.first()
        some = itertools.islice(walker.iternext(keys=True, values=False), limit + 1) if there else ()
        keys = list(map(bytes, some))
        keys = keys[1:] if keys and keys[0] == self._after else keys[:limit]
        self.found.add(keys)
        # search from the root: a cursor would first look on its current page
        self.unreachable += sum(get(key, db=sessions) is None for key in keys)
        # keys that do not ascend are corrupt, and must not cause an endless loop
        self.is_done = len(keys) < limit or keys[-1] <= self._after
        self._after = keys[-1] if keys else self._after
        return self.is_done

    def changed(self, change: Change) -> None:
        """Account for keys that a transaction changed, if the scan has already passed them."""
        if not self.is_done and self._after:
            self.found.add(key for key in change.added if key <= self._after)
            self.found.add((key for key in change.removed if key <= self._after), -1)

    def damage(self, expected: Sums) -> str:
        """Return the problem that the finished scan found; empty: none."""
        if self.found == expected and not self.unreachable:
            return ""
        lost = expected.count - self.found.count + self.unreachable
        if lost > 0:
            return f"keys or pages are corrupt, and {lost} of {expected.count} sessions are missing"
        return f"keys are corrupt, and some of {expected.count} sessions are missing"


class KeyCheck:
    """The sums of a store's keys. Callers of `begin`, `committed` and `check_next` hold its write lock."""

    def __init__(self) -> None:
        self.damage = ""
        """The known problem; empty: none."""
        self._sums = Sums()
        self._scan = Scan()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, transaction: Any, meta: Any) -> None:
        """Read the sums of an opened store, and start the scan."""
        self._sums = unpack(transaction.get(NAME, db=meta))
        self._scan = Scan()

    def write(self, transaction: Any, meta: Any, change: Change) -> None:
        """Write the new sums, as part of a transaction."""
        if change.added or change.removed:
            change.after = change.applied(self._sums)
            transaction.put(NAME, change.after.pack(), db=meta)

    def committed(self, change: Change) -> None:
        """Use the new sums, after the transaction was committed."""
        if change.after is not None:
            self._sums = change.after
            self._scan.changed(change)

    def check_next(self, transaction: Any, sessions: Any, limit: int) -> bool:
        """Check the next keys; return True when all were checked."""
        if self._scan.is_done:
            return True
        is_done = self._scan.advance(transaction, sessions, limit)
        if is_done and (damage := self._scan.damage(self._sums)):
            self.give_up(damage)
        return is_done

    def give_up(self, damage: str) -> None:
        """Report a problem and end the scan."""
        self._scan.is_done = True
        self.damage = damage
        _log.error(
            "the store is corrupt: %s. Sessions that are not found are answered with STATE_CORRUPT until you repair the store"
            " with stepwell store repair or restore a backup",
            damage,
        )

    def start(self, check_next: Callable[[], bool]) -> None:
        """Call `check_next` until it returns True: some keys now, the rest on a thread, with pauses."""
        for _ in range(_START_LIMIT // BATCH_SIZE):
            if check_next():
                return

        def work() -> None:
            while not self._stop.wait(_PAUSE_S) and not check_next():
                pass

        self._thread = threading.Thread(target=work, name="stepwell-store-keys", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
