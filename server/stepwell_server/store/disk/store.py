"""The store on disk: sessions in LMDB, with a write-ahead log of their latest changes in front of it.

    sessions/           see `lmdb`
    wal/0, 1            the segments of the log, see `wal.log`

A batch that begins or ends sessions, or has documents, is a transaction of LMDB. Nearly all batches only change
existing sessions, and are one write to the log. A checkpoint copies the change to LMDB later, unless the session has
changed again
by then. A record in the log is valid if it `supersedes` the one in LMDB. So records that were already checkpointed, or
whose session has ended since, do no harm.

If the log cannot be written, changes go to LMDB: the log is optional.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from typing_extensions import override

from stepwell_server.clock import Clock
from stepwell_server.errors import StoreGone, Unavailable
from stepwell_server.files.flush import flush_folders
from stepwell_server.store.base import (
    Batch,
    LocalStore,
    LogWrite,
    LogWriter,
    Parts,
    StoreError,
    StoreHealth,
    Tombstone,
    WriteObserver,
)
from stepwell_server.store.changes import merged
from stepwell_server.store.disk.free_space import FreeSpace
from stepwell_server.store.disk.lmdb import FIRST_MAP_BYTES, Durability, LmdbStore
from stepwell_server.store.disk.wal.log import SEGMENT_BYTES, Mark, Records, WriteAheadLog, room_for
from stepwell_server.store.disk.wal.segment import SegmentCorrupt, SegmentWrite
from stepwell_server.store.disk.wal.writers import new_writer
from stepwell_server.store.heads import Heads, heads_of
from stepwell_server.store.record import (
    JoinedPuts,
    Puts,
    RecordBytes,
    is_change,
    is_sound,
    newest_of,
    supersedes,
    value_of,
)

_FOLDER = "wal"

#: An `append` that need not wait for the disk waits at most this long for a large write to the log.
_PATIENCE_S = 2e-3
#: Records in one transaction of a checkpoint, if transactions are flushed: small changes wait for the disk meanwhile.
_CHECKPOINT_BATCH_SIZE = 256

_NOT_LOGGED = "a change could not be written to the write-ahead log; it is written to data.mdb instead"

_log = logging.getLogger(__name__)


class DiskStore(LocalStore):
    """Sessions on disk. Holds the lock of the data directory from creation to `close`. Must not be used after a fork."""

    for_one_thread = False

    def __init__(
        self,
        path: Path,
        *,
        durability: Durability,
        clock: Clock,
        first_map_bytes: int = FIRST_MAP_BYTES,
        segment_bytes: int = SEGMENT_BYTES,
        observer: WriteObserver | None = None,
    ) -> None:
        """Open the store in a data directory, which is created if missing. `observer` receives the durations of writes.

        Raises:
            StoreBusy: another server uses the directory.
            StoreError: it cannot be used.
        """
        self.path = path
        self._free_space = FreeSpace(path)
        self._observer = observer
        self._counting = threading.Lock()
        self._base = LmdbStore(
            path,
            durability=durability,
            clock=clock,
            first_map_bytes=first_map_bytes,
        )
        self.incarnation, self.secret = self._base.incarnation, self._base.secret
        self.first_revision = self._base.first_revision
        self.waits_for_disk = self._base.waits_for_disk
        self._checkpoint_limit = _CHECKPOINT_BATCH_SIZE if self.waits_for_disk else None
        """Maximum of records in one transaction of a checkpoint; None: no limit."""
        self._closed = self._has_warned = False
        self._in_doubt: set[str] = set()
        """Sessions whose transaction failed, but may have been kept nevertheless."""
        self._wal: WriteAheadLog | None = None
        try:
            self._open_wal(path / _FOLDER, segment_bytes)
            self._watch_files()
        except BaseException:
            self._close_files()
            raise

    @property
    @override
    def damage(self) -> str:
        return self._base.damage

    @property
    def key_checks(self) -> dict[str, bytes]:
        """See `LmdbStore`."""
        return self._base.key_checks

    def set_key_checks(self, checks: Mapping[str, bytes]) -> None:
        """See `LmdbStore`."""
        self._base.set_key_checks(checks)

    @property
    def has_log(self) -> bool:  # type: ignore[override]
        """See `LocalStore`."""
        return self._wal is not None

    @override
    def append(self, puts: Sequence[tuple[str, RecordBytes]]) -> bool:
        wal = self._wal
        if wal is None or self._closed:
            return False
        try:
            self._base.files.require()
            return self._log(wal, _parts(puts), -1.0 if self.waits_for_disk else _PATIENCE_S)
        except (Unavailable, OSError) as error:
            # `commit` keeps it, or raises the reason
            self._warn(_NOT_LOGGED, error)
            return False

    @override
    def begin_append(self, parts: Parts, after: LogWrite | None = None) -> SegmentWrite | None:
        assert after is None or isinstance(after, SegmentWrite), "it began the write"
        wal = self._wal
        if wal is None or self._closed:
            return None
        try:
            self._base.files.require()
            own = _parts(parts[0]) if len(parts) == 1 else [one for part in parts for one in _parts(part)]
            return wal.begin(own, after)
        except (Unavailable, OSError) as error:
            self._warn(_NOT_LOGGED, error)
            return None

    @override
    def end_append(self, write: LogWrite, error: Exception | None, seconds: float) -> bool:
        assert self._wal is not None, "it began the write"
        assert isinstance(write, SegmentWrite), "it began the write"
        if error is not None:
            self._warn(_NOT_LOGGED, error)
        is_kept = self._wal.end(write, is_made=error is None)
        if is_kept:
            self._count_write(seconds, write.count)
        return is_kept

    @override
    def withdraw_append(self, write: LogWrite) -> None:
        assert self._wal is not None, "it began the write"
        assert isinstance(write, SegmentWrite), "it began the write"
        self._wal.withdraw(write)

    @override
    def new_writer(self, on_end: Callable[[], None]) -> LogWriter:
        descriptors = [] if self._wal is None else [descriptor for _, descriptor in self._wal.descriptors()]
        return new_writer(descriptors, on_end)

    @property
    @override
    def needs_checkpoint(self) -> bool:
        return self._wal is not None and self._wal.needs_checkpoint

    @override
    def commit(self, batch: Batch) -> None:
        try:
            self._commit(batch)
        except Unavailable as error:
            self._free_space.failed(error, batch)
            raise

    def _commit(self, batch: Batch) -> None:
        self._base.files.require()
        wal = self._wal
        if wal is None or self._closed:
            self._write(batch)
            return
        others = batch.deletes or batch.forgets or batch.tombstones or batch.counts or batch.documents
        if others or not batch.puts or not self._append(wal, batch.puts):
            ids = [*(session_id for session_id, _ in batch.puts), *batch.deletes]
            try:
                if batch.goes_back:
                    self._empty(wal)
                self._write(self._with_logged(batch))
            except BaseException:
                self._in_doubt.update(ids)
                raise
            wal.discard(ids)
            self._in_doubt.difference_update(ids)

    def _with_logged(self, batch: Batch) -> Batch:
        """Return a batch for LMDB: changes need the records before them, which may be in the log only."""
        changed = {session_id for session_id, record in batch.puts if is_change(record)}
        logged = [(i, record) for i in changed for record in self._logged(i)]
        return dataclasses.replace(batch, puts=[*logged, *batch.puts]) if logged else batch

    @property
    def behind(self) -> int:  # type: ignore[override]
        """See `LocalStore`."""
        # what is due in a log that needs no checkpoint is for the next one: waiting for it would never end
        return 0 if self._wal is None or not self.needs_checkpoint or self._closed else self._wal.due

    @override
    def checkpoint(self, *, briefly: bool = False) -> None:
        wal = self._wal
        if wal is None or self._closed or not wal.needs_checkpoint:
            return
        try:
            self._checkpoint(wal, briefly=briefly)
            while self._checkpoint_limit is not None and wal.due and wal.needs_checkpoint:
                self._checkpoint(wal)
        except StoreGone:
            wal.due = 0  # `check` reports it, and the server ends
        except (Unavailable, OSError) as error:
            wal.due = 0  # not again before the next write
            self._warn("changes stay in the write-ahead log until they can be checkpointed", error)

    @override
    def get(self, session_id: str) -> RecordBytes | None:
        logged = self._logged(session_id)
        if logged and not is_change(logged[0]):
            return value_of(logged)
        return merged(session_id, logged, self._base.get(session_id))

    @override
    def get_many(self, session_ids: Sequence[str]) -> list[RecordBytes | None]:
        # the log first: what a checkpoint removes from it meanwhile is then in LMDB
        places = [] if self._wal is None else self._wal.places_of(session_ids)
        if not places:
            return self._base.get_many(session_ids)
        logged = {place: self._logged(session_ids[place]) for place in places}
        found: list[RecordBytes | None] = [None] * len(session_ids)
        for place, records in logged.items():
            if records and not is_change(records[0]):
                found[place] = value_of(records)
        missing = [place for place, record in enumerate(found) if record is None]
        stored = self._base.get_many([session_ids[place] for place in missing])
        for place, value in zip(missing, stored, strict=True):
            found[place] = merged(session_ids[place], logged.get(place, ()), value)
        return found

    @override
    def heads(self, *, after: str = "", prefix: str = "", limit: int) -> Heads:
        wal = self._wal
        removals = 0 if wal is None else wal.removals
        keys, records = self._base.values(after=after, prefix=prefix, limit=limit)
        if wal is None or (wal.is_empty and wal.removals == removals):
            return heads_of(keys, records)
        ids = [str(key, "utf-8", "replace") for key in keys]
        for place in wal.places_of(ids):
            records[place] = (*self._logged(ids[place])[-1:], records[place])[0]
        if wal.removals != removals:  # a checkpoint may have moved later records to LMDB meanwhile
            again = self.get_many(ids)
            records = [newest_of(new) if new else old for new, old in zip(again, records, strict=True)]
        return heads_of(keys, records)

    @override
    def count(self) -> int:
        return self._base.count()

    @override
    def count_of(self, model: str) -> int:
        return self._base.count_of(model)

    @override
    def tombstones(self, session_ids: Sequence[str]) -> list[Tombstone | None]:
        return self._base.tombstones(session_ids)

    @override
    def documents(self, prefix: str = "") -> dict[str, bytes]:
        return self._base.documents(prefix)

    @override
    def announce(self, listen: str) -> None:
        self._base.announce(listen)

    @override
    def check(self) -> StoreHealth:
        health = self._base.check()
        problem = health.problem or self._free_space.problem(self._base.keep_nothing)
        return dataclasses.replace(health, problem=problem, warning=self._free_space.warning())

    @override
    def close(self) -> None:
        if self._closed:
            return
        if self._wal is not None and not self._base.files.is_gone:
            try:
                self._checkpoint_all(self._wal)
            except (Unavailable, OSError) as error:
                _log.warning("the write-ahead log keeps what could not be checkpointed: %s", error)
        self._close_files()

    # ------------------------------------------------------------------------------------------------------ opening

    def _open_wal(self, folder: Path, size: int) -> None:
        """Load the log that belongs to LMDB's data, or create a new one."""
        mark = Mark.unpacked(self._base.wal_mark) if self._base.wal_mark else None
        if mark is not None:
            self._wal = self._loaded(folder, mark)
        if self._wal is None:
            try:
                self._wal = self._made(folder, size)
            except (OSError, Unavailable) as error:
                _log.warning("there is no write-ahead log, every change is a transaction: %s", error)

    def _watch_files(self) -> None:
        if self._wal is not None:
            for place, descriptor in self._wal.descriptors():
                self._base.files.add(place, descriptor)

    def _loaded(self, folder: Path, mark: Mark) -> WriteAheadLog | None:
        """Load the log; None if acknowledged changes are missing, which is tolerated, so that a new log is needed.

        Raises:
            StoreError: acknowledged changes are missing, or the log cannot be read.
        """
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            wal = self._wal_in(folder, mark, make=False)
        except OSError as error:
            raise _unreadable(folder, error) from error
        try:
            try:
                damage = wal.load(self._later)
            except (OSError, Unavailable) as error:
                raise _unreadable(folder, error) from error
            self._report(damage)
            if not damage:
                return wal
            self._salvage(wal)
        except BaseException:
            wal.close()
            raise
        wal.close()
        return None

    def _report(self, damage: Sequence[SegmentCorrupt]) -> None:
        for problem in damage:
            if self.waits_for_disk:
                raise StoreError(
                    f"{problem}. Acknowledged changes are missing: restore the folder, or start once with --durability async"
                    " to continue sessions from the changes that are left"
                )
            _log.warning("%s: sessions continue from the changes that are left", problem)

    def _salvage(self, wal: WriteAheadLog) -> None:
        """Checkpoint what could be read."""
        try:
            self._checkpoint_all(wal)
        except (Unavailable, OSError) as error:
            raise StoreError(
                f"the rest of the write-ahead log must be copied into the store: {error}"
            ) from error

    def _made(self, folder: Path, size: int) -> WriteAheadLog:
        folder.mkdir(mode=0o700, exist_ok=True)
        mark = Mark(secrets.randbits(31) + 1, room_for(folder, size))
        wal = self._wal_in(folder, mark, make=True)
        try:
            wal.truncate()
            flush_folders(folder, folder.parent)
            self._base.set_wal_mark(mark.packed())
        except BaseException:
            wal.close()
            raise
        return wal

    def _wal_in(self, folder: Path, mark: Mark, *, make: bool) -> WriteAheadLog:
        check = self._base.files.check
        return WriteAheadLog(folder, mark, flush=self.waits_for_disk, make=make, before_rotate=check)

    def _later(self, records: Records) -> list[bool]:
        """Whether each record is valid. Corrupt ones are, so that their sessions do not silently go back."""
        stored = self._base.get_many([session_id for session_id, _ in records])
        return [
            found is not None and (supersedes(record, found) or not is_sound(session_id, record))
            for (session_id, record), found in zip(records, stored, strict=True)
        ]

    # ------------------------------------------------------------------------------------------------------ writing

    def _append(self, wal: WriteAheadLog, puts: Sequence[tuple[str, RecordBytes]]) -> bool:
        parts = _parts(puts)
        try:
            if self._log(wal, parts):
                return True
            if not wal.fits(parts):
                return False
            while self._checkpoint(wal):
                pass
            return self._log(wal, parts)
        except StoreGone:
            raise
        except (Unavailable, OSError) as error:
            self._warn(_NOT_LOGGED, error)
            return False

    def _log(self, wal: WriteAheadLog, parts: Parts, patience_s: float = -1.0) -> bool:
        started = time.perf_counter()
        if not wal.append(parts, patience_s):
            return False
        self._count_write(time.perf_counter() - started, sum(map(len, parts)))
        return True

    def _count_write(self, seconds: float, count: int) -> None:
        if self._observer is not None:
            with self._counting:
                self._observer.log_written(seconds, count)

    def _write(self, batch: Batch) -> None:
        started = time.perf_counter()
        self._base.commit(batch)
        if self._observer is not None:
            self._observer.data_written(time.perf_counter() - started)

    def _checkpoint(self, wal: WriteAheadLog, *, briefly: bool = False) -> bool:
        """Checkpoint some changes; False if there are none."""
        ids, records = wal.to_checkpoint(briefly=briefly, limit=self._checkpoint_limit)
        if not self._in_doubt.isdisjoint(ids):
            records = [put for put, is_later in zip(records, self._later(records), strict=True) if is_later]
        if records:
            self._write(Batch(puts=records))
        wal.checkpointed(ids)
        self._has_warned = False
        return bool(ids)

    def _empty(self, wal: WriteAheadLog) -> None:
        """Empty the log completely, including invalid records: they could be taken for later changes.

        Raises:
            Unavailable: it could not be emptied.
        """
        try:
            for _ in range(2):  # the sealed segment, then the active one
                while not wal.rotate():
                    self._checkpoint(wal)
        except OSError as error:
            raise Unavailable(f"the write-ahead log must be writable; got {error}") from error

    def _checkpoint_all(self, wal: WriteAheadLog) -> None:
        """Checkpoint everything."""
        while not wal.rotate():
            self._checkpoint(wal)
        while self._checkpoint(wal):
            pass
        self._base.sync()
        self._base.set_wal_mark(b"")

    def _warn(self, message: str, error: Exception) -> None:
        if not self._has_warned:
            _log.warning("%s: %s", message, error)
        self._has_warned = True

    def _close_files(self) -> None:
        self._closed = True
        self._base.files.forget()
        if self._wal is not None:
            self._wal.close()
        self._base.close()

    # ------------------------------------------------------------------------------------------------------ reading

    def _logged(self, session_id: str) -> Sequence[RecordBytes]:
        """Return the valid records of a session in the log: see `WriteAheadLog.value`."""
        if self._wal is None or self._closed:
            return ()
        try:
            records = self._wal.value(session_id)
        except OSError as error:
            raise Unavailable(f"the write-ahead log must be readable; got {error}") from error
        if not records or session_id not in self._in_doubt:
            return records
        # keep the doubt: another thread may be about to commit
        (is_later,) = self._later([(session_id, records[-1])])
        return records if is_later else ()


def _unreadable(folder: Path, error: Exception) -> StoreError:
    return StoreError(f"the write-ahead log in {folder} must be readable: {error}")


def _parts(puts: Sequence[tuple[str, RecordBytes]]) -> Parts:
    if isinstance(puts, Puts):  # the common case: it costs less to find than that it is not joined
        return (puts,)
    return [part for part in puts.parts if len(part)] if isinstance(puts, JoinedPuts) else [puts]
