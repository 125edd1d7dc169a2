"""The store on disk: sessions in LMDB, and in front of it journals of what happened to them last.

    sessions/       see `lmdb`
    journal/0, 1    see `journal`

Whatever begins or ends sessions is a transaction of LMDB. A change of sessions that are there, and nearly all are
such, is one write to a journal, and is brought over into LMDB later, unless the session has changed again by then.
A record in a journal counts if it `supersedes` the one in LMDB; so one that was brought over already, or whose
session has ended since, does no harm there.

What cannot be written to a journal goes to LMDB: they are never needed.
"""

from __future__ import annotations

import logging
import secrets
import struct
from collections.abc import Sequence
from pathlib import Path

from stepwell_server.clock import Clock
from stepwell_server.errors import StateCorrupt, Unavailable
from stepwell_server.store.base import Batch, StoreError, StoreGone, StoreHealth, Tombstone
from stepwell_server.store.disk.files import flush_folders
from stepwell_server.store.disk.lmdb import FIRST_MAP_BYTES, TOMBSTONES, Durability, LmdbStore
from stepwell_server.store.disk.wal import JOURNAL_BYTES, Journals, Records, room_for
from stepwell_server.store.record import Header, Joined, Stored, decode_header, is_sound, supersedes

_FOLDER = "journal"
#: What LMDB says of the journals while there may be something in them: whose they are, and their size.
_MARK = struct.Struct("<IQ")

_log = logging.getLogger(__name__)


class DiskStore:
    """See `base.Store`.

    It holds the data directory's lock from its making to `close`. Not to be carried through a fork.
    """

    is_volatile = False

    def __init__(
        self,
        path: Path,
        *,
        durability: Durability,
        clock: Clock,
        listen: str = "",
        tombstones: int = TOMBSTONES,
        first_map_bytes: int = FIRST_MAP_BYTES,
        journal_bytes: int = JOURNAL_BYTES,
    ) -> None:
        """Open the store in a data directory, which is made if it is not there.

        Raises:
            StoreBusy: another server uses the directory.
            StoreError: it cannot be used.
        """
        self.path = path
        self._base = LmdbStore(
            path,
            durability=durability,
            clock=clock,
            listen=listen,
            tombstones=tombstones,
            first_map_bytes=first_map_bytes,
        )
        self.lock = self._base.lock
        self.incarnation, self.secret = self._base.incarnation, self._base.secret
        self.waits_for_disk = self._base.waits_for_disk
        self._closed = self._in_trouble = False
        self._in_doubt: set[str] = set()
        """Sessions whose transaction failed, and may have been kept all the same."""
        self._journals: Journals | None = None
        try:
            self._open_journals(path / _FOLDER, journal_bytes)
            self._watch_files()
        except BaseException:
            self._close_files()
            raise

    @property
    def is_behind(self) -> bool:
        """See `base.Store`."""
        return self._journals is not None and self._journals.is_behind

    def commit(self, batch: Batch) -> None:
        """See `base.Store`."""
        self._base.files.require()
        if self._journals is None or self._closed:
            self._base.commit(batch)
            return
        others = batch.deletes or batch.forgets or batch.tombstones or batch.counts
        if others or not batch.puts or not self._append(self._journals, batch.puts):
            ids = [*(session_id for session_id, _ in batch.puts), *batch.deletes]
            try:
                self._base.commit(batch)
            except BaseException:
                self._in_doubt.update(ids)
                raise
            self._journals.forget(ids)
            self._in_doubt.difference_update(ids)

    def tend(self) -> None:
        """See `base.Store`."""
        if self._journals is not None and not self._closed and self._journals.is_behind:
            try:
                self._bring_over(self._journals)
            except StoreGone:
                return  # whoever looks after the store says so, and ends the server
            except (Unavailable, OSError) as error:
                self._complain("changes stay in the journal until they can be brought over", error)

    def get(self, session_id: str) -> Stored | None:
        """See `base.Store`."""
        record = self._find(session_id)
        return self._base.get(session_id) if record is None else record

    def get_many(self, session_ids: Sequence[str]) -> list[Stored | None]:
        """See `base.Store`."""
        if self._journals is None or self._journals.is_empty:
            return self._base.get_many(session_ids)
        found: list[Stored | None] = [self._find(session_id) for session_id in session_ids]
        missing = [place for place, record in enumerate(found) if record is None]
        for place, record in zip(
            missing, self._base.get_many([session_ids[place] for place in missing]), strict=True
        ):
            found[place] = record
        return found

    def scan(self, *, after: str = "", prefix: str = "", limit: int) -> list[tuple[str, Header | None]]:
        """See `base.Store`."""
        some = self._base.scan(after=after, prefix=prefix, limit=limit)
        if self._journals is None or self._journals.is_empty:
            return some
        return [(session_id, self._header(session_id, header)) for session_id, header in some]

    def count(self) -> int:
        """See `base.Store`."""
        return self._base.count()

    def count_of(self, model: str) -> int:
        """See `base.Store`."""
        return self._base.count_of(model)

    def count_some(self, *, after: str = "", prefix: str = "", limit: int) -> tuple[int, str]:
        """See `base.Store`."""
        return self._base.count_some(after=after, prefix=prefix, limit=limit)

    def tombstone(self, session_id: str) -> Tombstone | None:
        """See `base.Store`."""
        return self._base.tombstone(session_id)

    def check(self) -> StoreHealth:
        """See `base.Store`."""
        return self._base.check()

    def sync(self) -> None:
        """See `base.Store`."""
        if self._journals is not None and not self._closed:
            try:
                self._journals.sync()
            except OSError as error:
                raise Unavailable(f"the journal must be able to flush to disk; got {error}") from error
        self._base.sync()

    def close(self) -> None:
        """See `base.Store`."""
        if self._closed:
            return
        if self._journals is not None and not self._base.files.is_gone:
            try:
                self._empty(self._journals)
            except (Unavailable, OSError) as error:
                _log.warning("the journal keeps what could not be brought over: %s", error)
        self._close_files()

    # ------------------------------------------------------------------------------------------------------ opening

    def _open_journals(self, folder: Path, size: int) -> None:
        """Load the journals that LMDB says there are, else make new ones."""
        mark = _MARK.unpack(self._base.journal) if self._base.journal else None
        if mark is not None and self._load_journals(folder, *mark):
            return
        try:
            self._make_journals(folder, size)
        except (OSError, Unavailable) as error:
            _log.warning("there is no journal, every change is a transaction: %s", error)

    def _watch_files(self) -> None:
        if self._journals is not None:
            for place, descriptor in self._journals.descriptors():
                self._base.files.add(place, descriptor)

    def _load_journals(self, folder: Path, owner: int, size: int) -> bool:
        """Load the journals; False if new ones are to be made, because something is missing and may be.

        Raises:
            StoreError: something is missing, and was acknowledged; or they cannot be read.
        """
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            journals = self._journals = self._journals_in(folder, size, owner, make=False)
            damage = journals.load(self._later)
        except (OSError, Unavailable) as error:
            raise StoreError(f"the journal in {folder} must be readable: {error}") from error
        for problem in damage:
            if self.waits_for_disk:
                raise StoreError(
                    f"{problem}. Changes that were acknowledged are missing: restore the folder; or start once with"
                    " --durability async, and sessions go on from what there is of them"
                )
            _log.warning("%s: sessions go on from what there is of them", problem)
        if damage:
            self._give_up(journals)
        return not damage

    def _give_up(self, journals: Journals) -> None:
        """Bring what could be read over into LMDB."""
        try:
            self._empty(journals)
        except (Unavailable, OSError) as error:
            raise StoreError(
                f"what is left of the journal must find its way into the store: {error}"
            ) from error
        journals.close()
        self._journals = None

    def _make_journals(self, folder: Path, size: int) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = secrets.randbits(31) + 1
        journals = self._journals_in(folder, room_for(folder, size), owner, make=True)
        try:
            journals.begin()
            flush_folders(folder, folder.parent)
            self._base.set_journal(_MARK.pack(owner, journals.size))
        except BaseException:
            journals.close()
            raise
        self._journals = journals

    def _journals_in(self, folder: Path, size: int, owner: int, *, make: bool) -> Journals:
        check = self._base.files.check
        return Journals(folder, size, owner, flush=self.waits_for_disk, make=make, before_turn=check)

    def _later(self, records: Records) -> list[bool]:
        """Whether each record counts. One that is damaged does, so that its session does not go back silently."""
        stored = self._base.get_many([session_id for session_id, _ in records])
        return [
            found is not None and (supersedes(record, found) or not is_sound(session_id, record))
            for (session_id, record), found in zip(records, stored, strict=True)
        ]

    # ------------------------------------------------------------------------------------------------------ writing

    def _append(self, journals: Journals, puts: Sequence[tuple[str, Stored]]) -> bool:
        parts = [part for part in puts.parts if len(part)] if isinstance(puts, Joined) else [puts]
        try:
            if journals.append(parts):
                return True
            if not journals.takes(parts):
                return False
            while self._bring_over(journals):
                pass
            return journals.append(parts)
        except StoreGone:
            raise
        except (Unavailable, OSError) as error:
            self._complain("a change could not be written to the journal, and goes to the store", error)
            return False

    def _bring_over(self, journals: Journals) -> bool:
        """Bring some changes over; False if there are none."""
        ids, records = journals.next()
        if not self._in_doubt.isdisjoint(ids):
            records = [put for put, is_later in zip(records, self._later(records), strict=True) if is_later]
        if records:
            self._base.commit(Batch(puts=records))
        journals.done(ids)
        self._in_trouble = False
        return bool(ids)

    def _empty(self, journals: Journals) -> None:
        """Bring everything over."""
        while self._bring_over(journals):
            pass
        journals.turn()
        while self._bring_over(journals):
            pass
        self._base.sync()
        self._base.set_journal(b"")

    def _complain(self, message: str, error: Exception) -> None:
        if not self._in_trouble:
            _log.warning("%s: %s", message, error)
        self._in_trouble = True

    def _close_files(self) -> None:
        self._closed = True
        self._base.files.forget()
        if self._journals is not None:
            self._journals.close()
        self._base.close()

    # ------------------------------------------------------------------------------------------------------ reading

    def _find(self, session_id: str) -> bytes | None:
        if self._journals is None or self._closed:
            return None
        try:
            record = self._journals.find(session_id)
        except OSError as error:
            raise Unavailable(f"the journal must be readable; got {error}") from error
        if record is None or session_id not in self._in_doubt:
            return record
        # nothing is forgotten here: another thread may be about to commit
        (is_later,) = self._later([(session_id, record)])
        return record if is_later else None

    def _header(self, session_id: str, header: Header | None) -> Header | None:
        """What is said of a session: LMDB's, unless there is something later."""
        record = self._find(session_id)
        if record is None:
            return header
        try:
            return decode_header(session_id, record)
        except StateCorrupt:
            return None
