"""The store on disk when a journal, or LMDB behind it, is damaged, lost, full or failing."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stepwell_server.errors import Unavailable
from stepwell_server.store.base import Batch, End, StoreError, Tombstone
from stepwell_server.store.disk import DiskStore
from stepwell_server.store.lmdb import Durability, LmdbStore
from stepwell_server.store.record import Joined
from support.stored import (
    JOURNAL_BYTES,
    begin,
    end,
    fill_one,
    in_lmdb,
    is_damaged,
    killed,
    left_behind,
    opened,
    put,
    record,
    revisions,
)

#: Where some parts of a record are. What it seems to be with another revision, or of another session, does not count.
RECORD_PARTS = {"schema": 4, "revision": 8, "opened with": 32, "created": 44, "rows": 90}
DURABILITIES = pytest.mark.parametrize("durability", ["sync", "async"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data"


def fail(*_: Any) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def flip(path: Path, at: int) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def place_of(store: DiskStore, session_id: str) -> tuple[str, int]:
    """In which file a session's record is, and where there."""
    assert store._journals is not None
    for journal in (store._journals._written, store._journals._left):
        if session_id in journal.offsets:
            return journal.path.name, journal.offsets[session_id]
    raise AssertionError(f"{session_id} is in no journal")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    caplog.clear()
    return found


# ------------------------------------------------------------------------------------------------------------- damage


def damaged(path: Path, durability: Durability) -> tuple[Path, str]:
    """What is left of a store with changes 1 to 6 of `a`, of which the journal's third cannot be read; and its file."""
    store = opened(path, durability)
    begin(store, "a", "b")
    for revision in range(1, 4):
        put(store, "a", revision=revision)
    name, at = place_of(store, "a")
    for revision in range(4, 7):
        put(store, "a", revision=revision)
    copy = left_behind(store)
    store.close()
    flip(copy / "journal" / name, at - 3)
    return copy, name


def test_a_damaged_journal_stops_a_start_that_must_lose_nothing(path: Path) -> None:
    copy, name = damaged(path, "sync")
    rule = rf"^{copy / 'journal' / name} cannot be read from byte \d+ on\. .* are missing: restore the folder; or start once with --durability async"
    before = {file: (copy / "journal" / file).read_bytes() for file in "01"}
    for _ in range(2):
        with pytest.raises(StoreError, match=rule):
            opened(copy, "sync")
        assert {file: (copy / "journal" / file).read_bytes() for file in "01"} == before
    opened(copy, "async").close()
    store = opened(copy, "sync")
    assert revisions(store) == {"a": 2, "b": 0}
    store.close()


def test_a_damaged_journal_is_a_warning_where_the_power_may_take_changes(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy, name = damaged(path, "async")
    store = opened(copy, "async")
    (warning,) = warnings(caplog)
    assert warning.startswith(f"{copy / 'journal' / name} cannot be read from byte ")
    assert revisions(store) == {"a": 2, "b": 0}
    store.close()
    store = opened(copy, "async")
    assert not warnings(caplog)
    assert revisions(store) == {"a": 2, "b": 0}
    store.close()


def test_what_lies_behind_damage_never_comes_back(path: Path) -> None:
    copy, _ = damaged(path, "async")
    store = opened(copy, "async")
    put(store, "b", revision=1)
    for _ in range(2):
        assert revisions(store) == {"a": 2, "b": 1}
        store = killed(store)
    store.close()


@DURABILITIES
def test_a_file_that_is_no_journal(
    path: Path, caplog: pytest.LogCaptureFixture, durability: Durability
) -> None:
    store = opened(path, durability)
    begin(store, "a")
    path = left_behind(store)
    store.close()
    (path / "journal" / "1").write_bytes(b"no journal" * 500)
    if durability == "sync":
        with pytest.raises(StoreError, match=f"^{path / 'journal' / '1'} cannot be read: "):
            opened(path, durability)
        return
    store = opened(path, durability)
    assert warnings(caplog)[0].startswith(f"{path / 'journal' / '1'} cannot be read: ")
    for revision in range(1, 200):
        put(store, "a", revision=revision)
    store = killed(store)
    assert revisions(store) == {"a": 199}
    store.close()


def test_damage_at_the_end_of_a_journal_is_no_write_that_was_cut_off_if_the_other_has_later_ones(
    path: Path,
) -> None:
    store = opened(path, "sync")
    changed = fill_one(store)
    name, at = place_of(store, changed[-2])
    copy = left_behind(store)
    assert place_of(store, changed[-1])[0] != name
    store.close()
    flip(copy / "journal" / name, at - 3)
    with pytest.raises(StoreError, match="cannot be read"):
        opened(copy, "sync").close()


@pytest.mark.parametrize("what", RECORD_PARTS)
@DURABILITIES
def test_a_damaged_record_in_a_journal_harms_its_session_alone(
    path: Path, durability: Durability, what: str
) -> None:
    store = opened(path, durability)
    begin(store, "a", "b", "c")
    for name in ("a", "b", "c"):
        put(store, name, revision=4)
    name, at = place_of(store, "b")
    copy = left_behind(store)
    store.close()
    flip(copy / "journal" / name, at + RECORD_PARTS[what])
    for _ in range(3):
        store = opened(copy, durability)
        assert store.get_many(["a", "c"]) == [record("a", 4), record("c", 4)]
        assert is_damaged("b", store.get("b") or b"")
        assert is_damaged("b", store.get_many(["b"])[0] or b"")
        assert [(i, header is None) for i, header in store.scan(limit=9)] == [
            ("a", False), ("b", True), ("c", False),
        ]  # fmt: skip
        store.close()
    store = opened(copy, durability)
    end(store, "b")
    begin(store, "b", created=2.0)
    assert revisions(store) == {"a": 4, "b": 0, "c": 4}
    store.close()


@pytest.mark.parametrize("what", ["cut off", "first sector"])
def test_a_part_of_a_journal_that_is_gone_is_damage(path: Path, what: str) -> None:
    store = opened(path, "sync")
    begin(store, "a")
    for revision in range(1, 20):
        put(store, "a", revision=revision)
    journal = left_behind(store) / "journal" / place_of(store, "a")[0]
    store.close()
    data = journal.read_bytes()
    journal.write_bytes(data[:1024] if what == "cut off" else bytes(512) + data[512:])
    with pytest.raises(StoreError, match=f"^{journal} "):
        opened(journal.parent.parent, "sync").close()


# ------------------------------------------------------------------------------------------------------ loss of power


class Last:
    """`os.pwritev`, and what the last write to a journal changed."""

    def __init__(self) -> None:
        self._pwritev = os.pwritev
        self.path = Path()
        self.old = self.new = b""
        self.count = 0

    def __call__(self, file: int, buffers: Sequence[bytes], at: int, flags: int = 0) -> int:
        assert flags == os.RWF_DSYNC
        self.path = Path(f"/proc/self/fd/{file}").resolve()
        self.old = self.path.read_bytes()
        written = self._pwritev(file, buffers, at, flags)
        self.new = self.path.read_bytes()
        self.count += 1
        return written

    def torn(self, chance: random.Random) -> bytes:
        """The file if the power failed meanwhile: any of the sectors are as they were."""
        picture, share = bytearray(self.new), chance.choice([0.1, 0.5, 0.9])
        for at in range(0, len(picture), 512):
            if chance.random() < share:
                picture[at : at + 512] = self.old[at : at + 512]
        return bytes(picture)


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_of_power_takes_nothing_but_the_change_that_was_not_acknowledged(
    path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Nor does what is left of that come back, however it goes on."""
    chance, names = random.Random(seed), list("abcdefghijkl")
    monkeypatch.setattr(os, "pwritev", last := Last())
    store = opened(path, "sync")
    begin(store, *names)
    torn = 0
    for revision in range(1, 60):
        before, count, size = revisions(store), last.count, chance.choice([20, 440, 440, 700])
        parts = [
            chance.sample(names, chance.choice([1, 1, 1, 4])) for _ in range(chance.choice([1, 2, 2, 3]))
        ]
        puts = [[(name, record(name, revision, size)) for name in part] for part in parts]
        store.commit(Batch(puts=Joined(puts)))
        # the others were too large for a journal
        pictures = [last.torn(chance) for _ in range(5)] if last.count > count else []
        name, after = last.path.name, revisions(store)
        for picture in pictures:
            copy = left_behind(store)
            (copy / "journal" / name).write_bytes(picture)
            found = gone_on(copy, chance.choice(names), revision=200, size=size)
            assert all(found[name] in {before[name], after[name]} for name in names)
            torn += 1
        if chance.random() < 0.5:
            store.tend()
    assert torn > 150
    store.close()


def gone_on(path: Path, session_id: str, *, revision: int, size: int) -> dict[str, int]:
    """Open what is there, change one session, and see that all is so when it is killed; what was there."""
    store = opened(path, "sync")
    found = revisions(store)
    put(store, session_id, revision=revision, size=size)
    store = killed(store, "sync")
    assert revisions(store) == found | {session_id: revision}
    store.close()
    shutil.rmtree(path)
    shutil.rmtree(store.path)
    return found


# ------------------------------------------------------------------------------------------------------- no journals


def test_where_a_journal_has_no_room_every_change_is_a_transaction(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(path.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=JOURNAL_BYTES * 64 - 1))
        store = opened(path)
        (warning,) = warnings(caplog)
        assert warning.startswith("there is no journal, every change is a transaction: ")
        assert warning.endswith(f"{64 * JOURNAL_BYTES} bytes of the disk must be free")
        begin(store, "a", "b")
        put(store, "a", revision=3)
        assert not store.is_behind
        store.tend()
        store.sync()
        assert revisions(store) == in_lmdb(store) == {"a": 3, "b": 0}
        store.close()
    store = opened(path)
    put(store, "b", revision=1)
    assert in_lmdb(store)["b"] == 0, "there is a journal now"
    store.close()


def test_a_journal_takes_no_more_than_its_share_of_the_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(path.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=64 * 100_000))
    store = opened(path, journal_bytes=2**20)
    assert [(path / "journal" / name).stat().st_size for name in "01"] == [100_000] * 2
    store.close()


@pytest.mark.parametrize(
    "which",
    ["0", "1"],
)
def test_where_one_of_the_journals_cannot_be_laid_out_it_starts_without(
    path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """As on a disk with a quota, of which `disk_usage` knows nothing."""
    pwrite = os.pwrite

    def some(file: int, data: Any, at: int) -> int:
        is_it = os.readlink(f"/proc/self/fd/{file}").endswith(f"journal/{which}")
        return int(full() if is_it else pwrite(file, data, at))

    monkeypatch.setattr(os, "pwrite", some)
    for revision in range(3):
        store = opened(path)
        (put if revision else begin)(store, "a", revision=revision)
        assert revisions(store) == in_lmdb(store) == {"a": revision}
        store.close()


@pytest.mark.parametrize("gone", ["0", "1", "01"])
@DURABILITIES
def test_without_a_journal_that_was_deleted_sessions_are_as_lmdb_and_the_other_have_them(
    path: Path, durability: Durability, gone: str
) -> None:
    store = opened(path, durability)
    changed = fill_one(store)
    places = {i: place_of(store, i)[0] for i in changed}
    wanted = revisions(store) | {i: 0 for i in changed if places[i] in gone}
    copy = left_behind(store)
    store.close()
    for name in gone:
        (copy / "journal" / name).unlink()
    if durability == "sync":
        for _ in range(2):
            with pytest.raises(StoreError, match=f"/{gone[0]} cannot be read: it must have"):
                opened(copy, "sync")
    opened(copy, "async").close()
    store = opened(copy, durability)
    assert revisions(store) == wanted
    for revision in range(2, 40):
        put(store, *changed[:5], revision=revision)
    wanted |= dict.fromkeys(changed[:5], 39)
    store = killed(store, durability)
    assert revisions(store) == wanted
    store.close()


def test_a_folder_of_journals_that_is_none_is_done_without(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.mkdir()
    (path / "journal").touch()
    store = opened(path)
    assert warnings(caplog)[0].startswith("there is no journal, every change is a transaction: ")
    begin(store, "a")
    store.close()


@DURABILITIES
def test_a_journal_that_cannot_be_read_stops_the_start(
    path: Path, monkeypatch: pytest.MonkeyPatch, durability: Durability
) -> None:
    store = opened(path, durability)
    begin(store, "a")
    put(store, "a", revision=1)
    copy = left_behind(store)
    store.close()
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(StoreError, match=f"the journal in {copy / 'journal'} must be readable: "):
        opened(copy, durability)
    monkeypatch.undo()
    store = opened(copy, durability)
    assert revisions(store) == {"a": 1}
    store.close()


@DURABILITIES
def test_after_a_clean_stop_the_journals_are_not_needed(path: Path, durability: Durability) -> None:
    store = opened(path, durability)
    begin(store, "a")
    put(store, "a", revision=1)
    store.close()
    shutil.rmtree(path / "journal")
    store = opened(path, durability)
    assert revisions(store) == {"a": 1}
    store.close()


def test_journals_of_another_store_are_told(path: Path) -> None:
    copies = []
    for name in ("one", "other"):
        store = opened(path / name, "sync")
        begin(store, "a")
        put(store, "a", revision=1 if name == "one" else 7)
        copies.append(left_behind(store))
        store.close()
    one, other = copies
    shutil.rmtree(one / "journal")
    shutil.copytree(other / "journal", one / "journal")
    with pytest.raises(StoreError, match="does not belong to this store"):
        opened(one, "sync")


# --------------------------------------------------------------------------------------------- writes and reads that fail


def test_what_a_journal_does_not_take_goes_to_lmdb(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(path)
    begin(store, "a", "b")
    put(store, "a", "b", revision=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        put(store, "a", revision=2)
        put(store, "a", revision=3)
    (warning,) = warnings(caplog)
    assert warning.startswith("a change could not be written to the journal, and goes to the store: ")
    assert revisions(store) == {"a": 3, "b": 1}
    assert in_lmdb(store) == {"a": 3, "b": 0}
    put(store, "b", revision=2)
    assert in_lmdb(store)["b"] == 0, "the journal is used again"
    store = killed(store)
    assert revisions(store) == {"a": 3, "b": 2}
    store.close()


def test_where_lmdb_fails_too_nothing_changes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(path)
    begin(store, "a", "b")
    put(store, "a", revision=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        patch.setattr(LmdbStore, "_commit", full)
        for change in (
            Batch(puts=[("a", record("a", 2)), ("b", record("b", 2))]),
            Batch(deletes=["a"], tombstones=[Tombstone("a", End.CLOSED, 1.0)]),
            Batch(puts=[("c", record("c"))], counts=[("m", 1)]),
        ):
            with pytest.raises(Unavailable, match=r"must be able to keep the change; got .*No space left"):
                store.commit(change)
            assert revisions(store) == {"a": 1, "b": 0}
        again = opened_well(left_behind(store), monkeypatch)
        assert revisions(again) == {"a": 1, "b": 0}
        again.close()
    put(store, "a", revision=2)
    assert revisions(store) == {"a": 2, "b": 0}
    store.close()


def opened_well(path: Path, monkeypatch: pytest.MonkeyPatch) -> DiskStore:
    monkeypatch.undo()
    return opened(path)


def test_while_lmdb_takes_nothing_changes_are_kept_as_long_as_the_journals_have_room(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(path)
    fill_one(store)
    names, kept = list(revisions(store)), revisions(store)
    with monkeypatch.context() as patch:
        patch.setattr(LmdbStore, "_commit", full)
        for number in range(100):
            store.tend()
            try:
                put(store, names[-1 - number], revision=5)
            except Unavailable:
                break
            kept[names[-1 - number]] = 5
        assert 10 < number < 60
        assert revisions(store) == kept
        with pytest.raises(Unavailable):
            put(store, names[0], revision=9)
        assert store.is_behind
    assert len(warnings(caplog)) == 1, "it is said once"
    again = opened(left_behind(store))
    assert revisions(again) == kept
    again.close()
    put(store, names[0], revision=9)
    assert revisions(store) == kept | {names[0]: 9}
    store.close()


def test_what_could_not_be_brought_over_at_the_end_is_there_at_the_next_start(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(path)
    fill_one(store)
    wanted = revisions(store)
    with monkeypatch.context() as patch:
        patch.setattr(LmdbStore, "_commit", full)
        store.close()
    assert warnings(caplog)[0].startswith("the journal keeps what could not be brought over: ")
    store = opened(path)
    assert revisions(store) == wanted
    store.close()


@pytest.mark.parametrize("what", ["put", "end"])
def test_what_is_read_after_a_failed_commit_is_what_the_next_start_reads(
    path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The disk broke in LMDB's very last write: it is there, though it was said to have failed."""
    store = opened(path)
    begin(store, "a")
    put(store, "a", revision=1)
    commit = LmdbStore._commit

    def late(self: LmdbStore, batch: Batch) -> None:
        commit(self, batch)
        fail()

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        patch.setattr(LmdbStore, "_commit", late)
        with pytest.raises(Unavailable):
            store.commit(Batch(puts=[("a", record("a", 2))]) if what == "put" else Batch(deletes=["a"]))
    found = store.get("a")
    again = opened(left_behind(store))
    store.close()
    assert again.get("a") == found
    again.close()


def test_a_journal_that_cannot_be_read_is_unavailable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(path)
    begin(store, "a")
    put(store, "a", revision=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        for read in (lambda: store.get("a"), lambda: store.get_many(["a"]), lambda: store.scan(limit=1)):
            with pytest.raises(Unavailable, match="the journal must be readable; got "):
                read()
    assert revisions(store) == {"a": 1}
    store.close()


def test_a_flush_that_fails_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(Unavailable, match="the journal must be able to flush to disk; got "):
            store.sync()
    store.sync()
    store.close()


@DURABILITIES
def test_a_change_waits_for_the_disk_only_if_it_must(
    path: Path, monkeypatch: pytest.MonkeyPatch, durability: Durability
) -> None:
    flags: list[int] = []
    pwritev = os.pwritev

    def write(file: int, buffers: Sequence[bytes], at: int, its_flags: int = 0) -> int:
        flags.append(its_flags)
        return pwritev(file, buffers, at, its_flags)

    store = opened(path, durability)
    begin(store, "a", "b")
    monkeypatch.setattr(os, "pwritev", write)
    put(store, "a", revision=1)
    put(store, "a", "b", revision=2)
    assert flags == [os.RWF_DSYNC if durability == "sync" else 0] * 2
    store.close()


def test_a_closed_store_says_so(path: Path) -> None:
    store = opened(path)
    begin(store, "a")
    store.close()
    store.tend()
    for use in (store.count, store.sync, lambda: store.get("a"), lambda: put(store, "a", revision=1)):
        with pytest.raises(Unavailable):
            use()


def test_a_closed_store_writes_to_no_file(path: Path) -> None:
    store = opened(path)
    begin(store, "a")
    store.close()
    others = [path / f"other-{i}" for i in range(20)]
    with contextlib.ExitStack() as files:
        for other in others:
            files.enter_context(other.open("wb"))
        with pytest.raises(Unavailable, match="it is closed"):
            put(store, "a", revision=1)
    assert [other.stat().st_size for other in others] == [0] * 20
