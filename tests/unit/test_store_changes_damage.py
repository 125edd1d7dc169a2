"""Changes (`store.changes`) of which one is corrupt or missing on disk: their session is reported by name, and never goes back."""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from stepwell_server.store import backup, repair, verification
from stepwell_server.store.base import Batch, LocalStore
from stepwell_server.store.disk.earlier import NAME
from stepwell_server.store.disk.keys import key_of
from stepwell_server.store.in_process import fetched
from stepwell_server.store.record import HEADER, RecordBytes, header_or_none
from support.clock import ManualClock
from support.stores.changes import Windowed
from support.stores.disk_store import base_of, close_all, crash_copy, opened, wal_of

CLOCK = ManualClock()
#: Parts of a record, by their place in it. A corrupt one may seem to be earlier, or of an earlier session.
PARTS = {
    "schema": 4,
    "revision": 8,
    "opened with": 32,
    "created": 44,
    "rows size": 84,
    "rows": HEADER.itemsize + 20,
}
PLACES = pytest.mark.parametrize("place", ["base", "middle", "last"])


class Chain:
    """Two sessions in a store that was closed: the records of `a`, whole and then changes."""

    def __init__(self, folder: Path, where: str) -> None:
        self.folder = folder
        self.a, self.b = Windowed("a", batch_size=1), Windowed("b", batch_size=1)
        store = opened(folder / "store", segment_bytes=2**16)
        both = [self.a, self.b]
        store.commit(Batch(puts=[(each.session_id, each.whole) for each in both], counts=[("m", 2)]))
        to: LocalStore = store if where == "log" else base_of(store)
        self.records = [self.a.replace()]
        to.commit(Batch(puts=[("a", self.records[0])]))
        for _ in range(3):
            self.records.append(self.a.step())
            to.commit(Batch(puts=[("a", self.records[-1])]))
        for _ in range(2):
            to.commit(Batch(puts=[("b", self.b.step())]))
        self.file = (
            Path("wal") / wal_of(store)._active.path.name if where == "log" else Path("sessions/data.mdb")
        )
        self.path = crash_copy(store)
        self._data = (self.path / self.file).read_bytes()
        store.close()

    def record(self, place: str) -> bytes:
        """The record at this place of the chain."""
        return self.records[{"base": 0, "middle": 2, "last": 3}[place]]

    def corrupted(self, record: bytes, part: str) -> Path:
        """A copy of the store with one bit of a record flipped."""
        data, found = bytearray(self._data), self._data.find(record)
        assert found >= 0
        while found >= 0:  # LMDB leaves copies behind
            data[found + PARTS[part]] ^= 4
            found = self._data.find(record, found + 1)
        path = self.folder / part
        shutil.copytree(self.path, path)
        (path / self.file).write_bytes(data)
        return path


@pytest.fixture(params=["log", "data.mdb"])
def chain(request: pytest.FixtureRequest, tmp_path: Path) -> Chain:
    return Chain(tmp_path, request.param)


def read(store: LocalStore) -> dict[str, RecordBytes | None]:
    """Whole records of the sessions; None: corrupt, which its entry in a list may show too."""
    found = [each.record for each in fetched(store, ["a", "b"])]
    assert found == [each.record for name in "ab" for each in fetched(store, [name])]
    assert [bytes(key) for key in store.heads(limit=9).keys] == [b"a", b"b"]
    return {
        name: None if each is None or header_or_none(name, each) is None else each
        for name, each in zip("ab", found, strict=True)
    }


def lives(path: Path, folder: Path) -> Iterator[dict[str, RecordBytes | None]]:
    """What a store has when it is opened, after a checkpoint, restored from a backup, and repaired."""
    found = verification.verify(path, None)
    assert (found.damaged, found.sessions) == (["a"], 2)
    file, restored = folder / "backup", folder / "restored"
    file.unlink(missing_ok=True)
    assert backup.back_up(path, file, CLOCK).damaged == 1
    assert verification.verify_backup(file, None).damaged == ["a"]
    assert backup.restore(file, restored, CLOCK, None, moved=True).damaged == 1
    yield read(opened(restored))
    for _ in range(2):
        yield read(opened(path))
        close_all()
    assert verification.verify(path, None).damaged == ["a"]
    assert repair.repair(path, CLOCK).damaged == ["a"]
    yield read(opened(path))
    close_all()


@PLACES
def test_a_session_with_a_corrupt_record_is_named_and_others_continue(chain: Chain, place: str) -> None:
    record = chain.record(place)
    for part in PARTS:
        store = opened(chain.corrupted(record, part))
        assert read(store) == {"a": None, "b": chain.b.whole}, part
        store.close()


@PLACES
@pytest.mark.parametrize("part", ["revision", "rows"])
def test_neither_a_checkpoint_nor_a_backup_nor_a_repair_hides_it(
    chain: Chain, place: str, part: str, tmp_path: Path
) -> None:
    path = chain.corrupted(chain.record(place), part)
    for found in lives(path, tmp_path):
        assert found == {"a": None, "b": chain.b.whole}
    store = opened(path)
    store.commit(Batch(puts=[("a", chain.a.replace())]))  # what an import does
    store.commit(Batch(puts=[("a", chain.a.step())]))
    assert read(store) == {"a": chain.a.whole, "b": chain.b.whole}


def entries(path: Path, name: bytes = NAME) -> dict[bytes, bytes]:
    with lmdb.open(str(path / "sessions"), max_dbs=6) as environment:
        database = environment.open_db(name)
        with environment.begin(db=database) as transaction:
            return {bytes(key): bytes(value) for key, value in transaction.cursor()}


def write(path: Path, key: bytes, value: bytes | None, name: bytes = NAME) -> None:
    with lmdb.open(str(path / "sessions"), max_dbs=6) as environment:
        database = environment.open_db(name)
        with environment.begin(db=database, write=True) as transaction:
            if value is None:
                transaction.delete(key)
            else:
                transaction.put(key, value)


@pytest.mark.parametrize("cut", [None, 0, HEADER.itemsize - 1, HEADER.itemsize + 9])
@PLACES
def test_a_record_that_is_missing_or_cut_off_is_corrupt(place: str, cut: int | None, tmp_path: Path) -> None:
    chain = Chain(tmp_path, "data.mdb")
    record = chain.record(place)
    if place == "last":
        write(chain.path, key_of("a"), record[: cut or 0], b"sessions")
    else:
        (key,) = [key for key, value in entries(chain.path).items() if value == record]
        write(chain.path, key, None if cut is None else record[:cut])
    for found in lives(chain.path, tmp_path):
        assert found == {"a": None, "b": chain.b.whole}


def test_a_repair_finds_all_records_of_a_session_with_a_corrupt_key(tmp_path: Path) -> None:
    chain = Chain(tmp_path, "data.mdb")
    write(chain.path, b"c", chain.record("last"), b"sessions")
    write(chain.path, b"a", None, b"sessions")
    found = repair.repair(chain.path, CLOCK)
    assert (found.recovered, found.damaged, found.lost) == (["a"], [], 0)
    assert read(opened(chain.path)) == {"a": chain.a.whole, "b": chain.b.whole}


def test_a_page_of_earlier_records_concerns_their_sessions_alone(tmp_path: Path) -> None:
    """A transaction that meets such a page cannot be used any more; those behind it are read by another one."""
    store = opened(tmp_path / "store")
    sessions = {name: Windowed(name) for name in (f"s{number:02}" for number in range(60))}
    puts = [(name, each.whole) for name, each in sessions.items()]
    base_of(store).commit(Batch(puts=puts, counts=[("m", len(puts))]))
    for _ in range(3):
        base_of(store).commit(Batch(puts=[(name, each.step()) for name, each in sessions.items()]))
    path = crash_copy(store)
    store.close()
    file = path / "sessions" / "data.mdb"
    data, page = bytearray(file.read_bytes()), mmap.PAGESIZE
    found = data.find(puts[5][1])
    while found >= 0:
        start = found // page * page
        data[start : start + 16] = b"\xff" * 16
        found = data.find(puts[5][1], found + 1)
    file.write_bytes(data)

    def corrupt(path: Path) -> list[str]:
        store = opened(path)
        found = [each.record for each in fetched(store, [*sessions])]
        store.close()
        names = [name for name, record in zip(sessions, found, strict=True) if not is_whole(name, record)]
        assert all(
            record == sessions[name].whole
            for name, record in zip(sessions, found, strict=True)
            if name not in names
        )
        return names

    def is_whole(name: str, record: RecordBytes | None) -> bool:
        return record is not None and header_or_none(name, record) is not None

    names = corrupt(path)
    assert "s05" in names
    assert len(names) < 20
    assert verification.verify(path, None).damaged == names
    assert backup.back_up(path, tmp_path / "backup", CLOCK).damaged == len(names)
    repaired = repair.repair(path, CLOCK)
    assert (repaired.damaged, repaired.sessions, repaired.lost) == (names, 60, 0)
    assert corrupt(path) == names
