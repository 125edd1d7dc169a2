"""What `stepwell store` does with stores and backups: check, restore, rekey, repair."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stepwell.cli import main
from stepwell_server.clock import SystemClock
from stepwell_server.store import backup, repair, verification
from stepwell_server.store.base import Batch, End, KeyFileError, StoreBusy, StoreError, Tombstone
from stepwell_server.store.counts import of_tenants
from stepwell_server.store.disk.backup.file import About, BackupError, Writer
from stepwell_server.store.disk.lock import read_lock
from stepwell_server.store.disk.wal import reader
from stepwell_server.store.disk.wal.segment import Segment
from stepwell_server.store.encryption.keyring import Keyring, add_key
from stepwell_server.store.factory import encrypted
from support.clock import ManualClock
from support.samples import some
from support.stores.disk_store import base_of, begin, end, flip_in_lmdb, opened, put, record, revisions

LONG = "é" * 256
IDS = ["a", "b", LONG, *(f"s{n:03d}" for n in range(200))]
RING = Keyring({"new": b"\1" * 32, "old": b"\2" * 32})
OLD = Keyring({"old": b"\2" * 32})
CLOCK = SystemClock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store at rest, whose write-ahead log still has changes, as after kill -9."""
    store = opened(tmp_path / "live")
    begin(store, "gone", *IDS)
    end(store, "gone")
    for revision in range(1, 4):
        put(store, "a", "b", LONG, revision=revision)
    copy_as_it_is(tmp_path / "live", tmp_path / "data")
    store.close()
    return tmp_path / "data"


def copy_as_it_is(path: Path, to: Path) -> None:
    subprocess.run(["cp", "-r", path, to], check=True)


def content(path: Path) -> dict[str, int]:
    store = opened(path)
    try:
        return revisions(store)
    finally:
        store.close()


EXPECTED = {i: 3 if i in {"a", "b", LONG} else 0 for i in IDS}


@pytest.mark.skipif(os.geteuid() != 0, reason="files of another user are made by root")
def test_a_backup_by_root_leaves_nothing_that_the_servers_user_cannot_open(
    path: Path, tmp_path: Path
) -> None:
    (path / "sessions" / "lock.mdb").unlink()
    for place in (path, *path.rglob("*")):
        os.chown(place, 54_321, 54_321)
    backup.back_up(path, tmp_path / "backup", CLOCK)
    made = {place.relative_to(path): place.stat() for place in (path, *path.rglob("*"))}
    assert {Path("readers.lock"), Path("sessions/lock.mdb")} < set(made)
    assert {(found.st_uid, found.st_gid) for found in made.values()} == {(54_321, 54_321)}
    (path / "readers.lock").unlink()
    (path / "readers.lock").symlink_to(tmp_path / "elsewhere")  # by that user, to be given what is root's
    with pytest.raises(StoreError, match="must be readable"):
        backup.back_up(path, tmp_path / "another", CLOCK)
    assert not (tmp_path / "elsewhere").exists()


def test_a_backup_becomes_the_same_store_or_one_ahead(path: Path, tmp_path: Path) -> None:
    done = backup.back_up(path, tmp_path / "backup", CLOCK)
    assert (done.sessions, done.tombstones, done.damaged, done.bytes) == (
        len(IDS), 1, 0, (tmp_path / "backup").stat().st_size,
    )  # fmt: skip
    backup.restore(tmp_path / "backup", tmp_path / "moved", CLOCK, None, moved=True)
    ahead = backup.restore(tmp_path / "backup", tmp_path / "back", CLOCK, RING, moved=False)
    first = ahead.first_revision
    assert first > 10**12
    was, moved, back = opened(path), opened(tmp_path / "moved"), opened(tmp_path / "back")
    assert revisions(moved) == revisions(was) == EXPECTED
    assert (moved.incarnation, moved.secret, moved.first_revision) == (was.incarnation, was.secret, 0)
    assert (back.first_revision, back.count_of("m")) == (first, len(IDS))
    assert back.incarnation != was.incarnation
    assert back.secret != was.secret
    assert moved.tombstones(["gone"]) == was.tombstones(["gone"]) == back.tombstones(["gone"])
    assert revisions(encrypted(back, RING)) == {i: r + first for i, r in EXPECTED.items()}
    assert not was.damage + moved.damage + back.damage
    for store in (was, moved, back):
        store.close()
    # again, of the one that went back: ahead of that
    backup.back_up(tmp_path / "back", tmp_path / "backup2", CLOCK)
    with pytest.raises(KeyFileError, match="is encrypted with new, and a restore changes its revisions"):
        backup.restore(tmp_path / "backup2", tmp_path / "back2", CLOCK, None, moved=False)
    with pytest.raises(KeyFileError, match=r"it lacks new$"):
        backup.restore(tmp_path / "backup2", tmp_path / "back2", CLOCK, OLD, moved=False)
    assert not (tmp_path / "back2").exists()
    again = backup.restore(tmp_path / "backup2", tmp_path / "back2", CLOCK, RING, moved=False)
    assert again.first_revision >= first + 10**12
    assert not verification.verify(tmp_path / "back2", RING).problems


def test_a_store_that_goes_back_to_the_same_backup_twice_is_ahead_of_itself(
    path: Path, tmp_path: Path
) -> None:
    clock = ManualClock(now=1.8e9)
    backup.back_up(path, tmp_path / "backup", clock)
    once = backup.restore(tmp_path / "backup", tmp_path / "once", clock, None, moved=False)
    clock.advance(60.0)
    # revisions that clients got from the first one in that minute are not valid in the second one
    twice = backup.restore(tmp_path / "backup", tmp_path / "twice", clock, None, moved=False)
    assert twice.first_revision == once.first_revision + 60_000_000
    assert content(tmp_path / "twice") == {i: r + twice.first_revision for i, r in EXPECTED.items()}
    # and one of a store that went back is ahead whatever the clock says, and does not double
    clock = ManualClock(now=0.0)
    backup.back_up(tmp_path / "twice", tmp_path / "backup2", clock)
    again = backup.restore(tmp_path / "backup2", tmp_path / "again", clock, None, moved=False)
    assert again.first_revision == twice.first_revision + 10**12


def test_sessions_of_tenants_are_counted_as_theirs(tmp_path: Path) -> None:
    ids = ["acme\x1fa", "acme\x1fb", "other\x1fa", "a"]
    store = opened(tmp_path / "data")
    puts = [(i, record(i, 1)) for i in ids]
    theirs = of_tenants([(i, "m") for i in ids], 1)
    store.commit(Batch(puts=puts, counts=[("m", 4)], tenant_counts=theirs))
    store.close()
    backup.back_up(tmp_path / "data", tmp_path / "backup", CLOCK)
    backup.restore(tmp_path / "backup", tmp_path / "to", CLOCK, RING, moved=False)
    repair.rekey(tmp_path / "data", CLOCK, RING)
    for path in (tmp_path / "data", tmp_path / "to"):
        assert not verification.verify(path, RING).problems
        store = opened(path)
        assert [store.count_of(name) for name in ("m", "acme\x1fm", "\x1f", "other\x1f")] == [4, 2, 3, 1]
        store.commit(Batch(tenant_counts=[("acme\x1fm", 1)]))
        store.close()
        (problem,) = verification.verify(path, RING).problems
        assert "the counts of sessions must be" in problem


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take only UTF-8")
def test_paths_need_not_be_utf_8(tmp_path: Path) -> None:
    folder, file = tmp_path / os.fsdecode(b"data-\xff"), tmp_path / os.fsdecode(b"backup-\xff")
    store = opened(folder)
    store.commit(Batch(puts=[("a", record("a", 1))], counts=[("m", 1)]))
    store.close()
    backup.back_up(folder, file, CLOCK)
    assert not verification.verify(folder, None).problems
    assert backup.restore(file, folder / "again", CLOCK, None, moved=True).sessions == 1


def test_paths_without_a_name_are_refused(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, current = tmp_path / "backup", tmp_path / "current"
    backup.back_up(path, file, CLOCK)
    current.mkdir()
    monkeypatch.chdir(current)
    for taken in (Path("."), Path("/")):
        with pytest.raises(BackupError, match="must not exist yet"):
            backup.back_up(path, taken, CLOCK)
    for folder in (Path("."), current):
        with pytest.raises(StoreError, match="must not be the current folder: run this elsewhere"):
            backup.restore(file, folder, CLOCK, None, moved=True)
    with pytest.raises(StoreError, match="must not exist yet, or must be empty"):
        backup.restore(file, Path("/"), CLOCK, None, moved=True)
    assert not list(current.iterdir())


def test_nothing_is_overwritten_and_nothing_half_done_stays(path: Path, tmp_path: Path) -> None:
    file, there = tmp_path / "backup", set(os.listdir(tmp_path))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    for taken in (path / "server.lock", tmp_path / "folder"):
        with pytest.raises(BackupError, match="must not exist yet"):
            backup.back_up(path, taken, CLOCK)
    with pytest.raises(StoreError, match="must hold a store"):
        backup.back_up(tmp_path / "folder", file, CLOCK)
    assert not file.exists()
    # what a writer that was killed has left is taken over, but not that of one which lives
    (tmp_path / ".backup.unfinished").write_bytes(b"x" * 10**6)
    writer = Writer(tmp_path / "backup", bytes_per_s=1e9)
    with pytest.raises(BackupError, match="is being written by another process"):
        backup.back_up(path, file, CLOCK)
    writer.close()
    backup.back_up(path, file, CLOCK)
    with pytest.raises(StoreError, match="must not exist yet, or must be empty"):
        backup.restore(file, tmp_path / "folder", CLOCK, None, moved=True)
    (tmp_path / "empty").mkdir()
    backup.restore(file, tmp_path / "empty", CLOCK, None, moved=True)
    assert set(os.listdir(tmp_path)) == there | {"folder", "backup", "empty"}
    assert [
        p for p in tmp_path.joinpath("empty").rglob("*") if p.is_file() and p.stat().st_mode & 0o077
    ] == []


def test_a_backup_that_was_damaged_or_cut_off_is_refused(path: Path, tmp_path: Path) -> None:
    backup.back_up(path, tmp_path / "backup", CLOCK)
    whole = (tmp_path / "backup").read_bytes()
    changed = tmp_path / "changed"
    chance = random.Random(5)
    for at in chance.sample(range(len(whole)), 60):
        for data in (
            whole[:at],
            whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :],
        ):
            changed.write_bytes(data)
            with pytest.raises(BackupError, match=f"{changed}"):
                backup.restore(changed, tmp_path / "restored", CLOCK, None, moved=True)
    changed.write_bytes(whole + whole[18:])
    with pytest.raises(BackupError, match=r"unchanged; at byte \d+: something follows its end"):
        verification.verify_backup(changed, None)
    assert not (tmp_path / "restored").exists()


def test_a_rate_is_kept(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("stepwell_server.store.disk.backup.file.time.monotonic", lambda: 100 + sum(slept))
    writer = Writer(tmp_path / "backup", bytes_per_s=1000.0, sleep=slept.append)
    writer.begin(About(0.0, "", b"", 0, {}))
    for number in range(3):
        writer.session(f"s{number}", bytes(2**20))
    writer.finish()
    writer.close()
    assert sum(slept) == pytest.approx(writer.byte_count / 1000, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------- checking


def test_a_check_reports_all_problems(path: Path, tmp_path: Path) -> None:
    found = verification.verify(path, None)
    assert (found.problems, found.sessions, found.logged, found.tombstones) == ([], len(IDS), 3, 1)
    assert found.models == {"m": len(IDS)}
    flip_in_lmdb(path, record("s050"), 80)  # of a record
    flip_in_lmdb(path, b"s100", 3)  # of a key
    found = verification.verify(path, None)
    assert "s050" in found.damaged
    assert any("corrupt" in problem for problem in found.problems)
    assert any("are missing" in problem for problem in found.problems)
    assert len(found.damaged) == 2, "one has another id"
    with pytest.raises(StoreError, match="must hold a store"):
        verification.verify(tmp_path, None)


def test_a_check_with_keys_opens_all(path: Path) -> None:
    store = encrypted(opened(path), OLD)
    put(store, "a", revision=4)
    store.close()
    for ring, opened_count in ((None, 0), (RING, 1)):
        found = verification.verify(path, ring)
        assert (found.problems, found.encrypted, found.opened) == ([], {"old": 1}, opened_count)
    with pytest.raises(KeyFileError, match=r"it lacks old\. Without a key file, everything except"):
        verification.verify(path, Keyring({"new": b"\1" * 32}))


def test_a_log_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    """What was written before a read begins is read, whole, while the segment is written and truncated."""
    segment = Segment(tmp_path / "0", 16 * 1024, 7, flush=False, make=True)
    other = Segment(tmp_path / "1", 16 * 1024, 7, flush=False, make=True)
    other.truncate(0)
    segment.truncate(0)
    done, written, checkpointed = threading.Event(), 0, 0
    problems: list[str] = []

    def write() -> None:
        nonlocal written, checkpointed, segment, other
        for number in range(1, 500):
            if not segment.append([[("s", record("s", number, size=300))]]):
                checkpointed = written  # the store has all of it now
                other.truncate(segment.sequence)
                segment, other = other, segment
                assert segment.append([[("s", record("s", number, size=300))]])
            written = number
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    reads = 0
    while not done.is_set() or not reads:  # the writer may end before the first read
        before = written
        found = reader.read_log(tmp_path, 7)
        kept = max(int.from_bytes(found["s"][-1][8:16], "little") if found else 0, checkpointed)
        if kept < before:
            problems.append(f"{kept} of {before}")
        reads += 1
    thread.join()
    assert not problems
    assert reads
    with pytest.raises(reader.LogReplaced):
        reader.read_log(tmp_path, 8)
    for file in (segment, other):
        file.close()
    for name in "01":
        data = bytearray((tmp_path / name).read_bytes())
        at = data.find((0x53574532).to_bytes(4, "big"), 2000)
        data[at + 6] ^= 1
        (tmp_path / name).write_bytes(data)
    with pytest.raises(StoreError, match="acknowledged changes are missing"):
        reader.read_log(tmp_path, 7)


def test_the_data_file_stays_while_it_is_read(tmp_path: Path) -> None:
    store = opened(tmp_path)
    begin(store, "a")
    store.close()
    before = (tmp_path / "sessions" / "data.mdb").stat()
    with read_lock(tmp_path):
        with pytest.raises(StoreError, match="must not be in use; another process reads it"):
            repair.repair(tmp_path, CLOCK)
        assert (tmp_path / "sessions" / "data.mdb").stat().st_ino == before.st_ino
    repair.repair(tmp_path, CLOCK)
    assert (tmp_path / "sessions" / "data.mdb").stat().st_ino != before.st_ino


@pytest.mark.parametrize(
    "read",
    [
        lambda path: verification.verify(path, None),
        lambda path: backup.back_up(path, path.with_name("b"), CLOCK),
    ],
)
def test_a_read_only_file_system_is_named(
    path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    """A copy of the folder can be read."""
    opened_file = os.open

    def refuse(file: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and Path(file).is_relative_to(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), file)
        return opened_file(file, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        StoreError,
        match=r"must be writable, .* is read-only: stop the server and copy the folder to another disk",
    ):
        read(path)
    monkeypatch.undo()
    copy_as_it_is(path, path.with_name("copy"))
    assert not verification.verify(path.with_name("copy"), None).problems


def test_a_reader_that_was_killed_is_forgotten(tmp_path: Path) -> None:
    store = opened(tmp_path)
    begin(store, "a")
    code = (
        "import pathlib, sys, time\nfrom stepwell_server.store.disk.backup import snapshot\n"
        "with snapshot.opened(pathlib.Path(sys.argv[1])) as found:\n    print(found.meta, flush=True)\n    sys.stdin.read()"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        assert str(reader.pid) in base_of(store)._environment.readers()
        reader.kill()
    assert str(reader.pid) in base_of(store)._environment.readers()
    store.check()
    assert str(reader.pid) not in base_of(store)._environment.readers()


# ----------------------------------------------------------------------------------------------------------- mending


def test_rekeying_encrypts_everything_and_leaves_nothing_else(path: Path) -> None:
    store = encrypted(opened(path), OLD)
    put(store, "a", revision=4)
    with pytest.raises(StoreBusy):
        repair.rekey(path, CLOCK, RING)
    store.close()
    plain = record("s050")[80:-4]
    assert any(plain in file.read_bytes() for file in path.rglob("*") if file.is_file())
    with pytest.raises(KeyFileError, match="lacks old"):
        repair.rekey(path, CLOCK, Keyring({"new": b"\1" * 32}))
    assert repair.rekey(path, CLOCK, RING).sessions == len(IDS)
    assert not any(plain in file.read_bytes() for file in path.rglob("*") if file.is_file())
    alone = Keyring({"new": b"\1" * 32})
    found = verification.verify(path, alone)
    assert (found.problems, found.encrypted, found.opened) == ([], {"new": len(IDS)}, len(IDS))
    store = encrypted(opened(path), alone)
    assert revisions(store) == EXPECTED | {"a": 4}
    put(store, "a", revision=5)
    store.close()
    repair.rekey(path, CLOCK, alone, decrypt=True)
    assert content(path) == EXPECTED | {"a": 5}
    store = opened(path)
    assert not store.key_checks


def test_the_rest_of_a_damaged_store_is_a_store(path: Path, tmp_path: Path) -> None:
    flip_in_lmdb(path, b"s100", 3)
    flip_in_lmdb(path, record("s050"), 80)
    assert verification.verify(path, None).problems
    found = repair.repair(path, CLOCK)
    assert found.recovered == ["s100"]
    assert found.damaged == ["s050"]
    assert (found.lost, found.sessions) == (0, len(IDS))
    assert [p for p in verification.verify(path, None).problems if "corrupt records" not in p] == []
    store = opened(path)
    assert store.damage == ""
    assert store.get("s100") == record("s100")
    assert {i: r for i, r in ((i, store.get(i)) for i in ("a", "b", LONG)) if r != record(i, 3)} == {}
    assert store.tombstones(["gone"])[0] == Tombstone("gone", End.CLOSED, 1.0)
    store.commit(Batch(deletes=["s050"], counts=[("m", -1)]))


def test_a_damaged_page_of_tombstones_costs_no_session(path: Path) -> None:
    file = path / "sessions" / "data.mdb"
    data = bytearray(file.read_bytes())
    for page in range(0, len(data), 4096):
        # the one page of what is remembered of `gone`: under its id the time 1.0 is
        if data.find(b"gone", page, page + 4096) >= 0 and data.find(b"\xf0\x3f", page, page + 4096) >= 0:
            data[page + 10 : page + 12] = b"\0\0"  # it is no kind of page any more
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"a page of .* cannot be read"):
        verification.verify(path, None)
    assert repair.repair(path, CLOCK).sessions == len(IDS)
    assert set(content(path)) == set(IDS)
    assert verification.verify(path, None).tombstones == 0


@pytest.mark.parametrize("bit", some(range(8)))
def test_a_session_with_an_unknown_key_is_lost_and_counted(path: Path, bit: int) -> None:
    file = path / "sessions" / "data.mdb"
    data = bytearray(file.read_bytes())
    for at in [at for at in range(len(data)) if data.startswith(b"s100", at)]:
        data[at + 1] ^= 1 << bit
        data[at + 2] ^= 1 << bit
    file.write_bytes(data)
    found = repair.repair(path, CLOCK)
    assert len(found.damaged) == 1
    assert found.recovered == []
    store = opened(path)
    assert not store.damage
    assert store.first_revision > 10**12, "lost sessions restart above all revisions that clients hold"


# ------------------------------------------------------------------------------------------------------ command line


def run(*arguments: object, code: int = 0) -> str:
    found = CliRunner().invoke(main, ["store", *map(str, arguments)])
    assert found.exit_code == code, found.output
    return found.output


@pytest.mark.parametrize("command", [("repair",), ("rekey", "--encryption-key-file", "keys")])
def test_a_store_that_servers_share_has_no_folder_to_mend(command: tuple[str, ...]) -> None:
    said = run(*command, "valkey://app:hidden@db.example/0", code=2)
    assert "'DATA_DIR': must be the data directory of one server; got the URL of a shared store" in said
    assert "hidden" not in said


def test_the_commands(path: Path, tmp_path: Path) -> None:
    keys, file = tmp_path / "keys", tmp_path / "backup"
    assert run("new-key", "--file", keys, "--id", "k1") == f"{keys}: key k1 encrypts\n"
    add_key(keys, "k2")
    assert run("backup", path, file).startswith(f"{file}: {len(IDS)} sessions, ")
    assert "overwrites nothing" in run("backup", path, file, code=2)
    assert "nothing is wrong" in run("verify", path)
    assert json.loads(run("verify", file, "--json"))["models"] == {"m": len(IDS)}
    assert f"{len(IDS)} sessions, as of 20" in run("restore", file, tmp_path / "to")
    assert json.loads(run("rekey", path, "--encryption-key-file", keys, "--json")) == {
        "sessions": len(IDS), "damaged": 0, "left": [],
    }  # fmt: skip
    assert "decrypted" in run("verify", path, "--encryption-key-file", keys)
    said = json.loads(run("backup", path, tmp_path / "backup2", "--json"))
    assert said["keys"] == ["k2"]
    assert "give the key file" in run("restore", tmp_path / "backup2", tmp_path / "to2", code=2)
    said = json.loads(run("restore", tmp_path / "backup2", tmp_path / "to2", "--moved", "--json"))
    assert (said["sessions"], said["first_revision"]) == (len(IDS), 0)
    assert "0 lost" in run("repair", path)
    flip_in_lmdb(path, b"s100", 3)
    assert "wrong: " in run("verify", path, code=1)
    assert "must be given" in run("rekey", path, code=2)
    assert "some are missing" in run("backup", path, tmp_path / "backup3", code=2)
    assert not (tmp_path / "backup3").exists()
