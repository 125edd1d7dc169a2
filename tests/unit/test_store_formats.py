"""A store or a file of another format is refused by name, with what it is and what is read here, and stays as it is.

`tests/data` has a store, a backup and an export that earlier code wrote; the store has changes that are in its logs alone.
"""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
from safetensors.numpy import save_file

from stepwell import InvalidInputError, State
from stepwell._admin import record_file, session_file
from stepwell._admin.record_file import Kind
from stepwell._admin.session_file import Writer as SessionWriter
from stepwell._admin.session_file import read as read_sessions
from stepwell.v1 import sessions_pb2
from stepwell_server import program_file
from stepwell_server.compile import cache
from stepwell_server.store import backup, repair, verification
from stepwell_server.store.base import Batch, StoreError
from stepwell_server.store.disk.backup.file import FORMAT, BackupError, Reader
from stepwell_server.store.disk.backup.file import Writer as BackupWriter
from stepwell_server.store.disk.meta import SCHEMA_VERSION
from stepwell_server.store.disk.wal import layout
from stepwell_server.store.encryption.keyring import Keyring
from stepwell_server.store.record import MAX_COUNTER, header_or_none
from support.clock import ManualClock
from support.engine.fake_executor import PLAIN
from support.stores.disk_store import begin, end, opened, put, record

DATA = Path(__file__).parents[1] / "data"
CLOCK = ManualClock()
#: Files of locks: a server that opens a store writes its name there, and LMDB its readers.
_LOCKS = {"server.lock", "readers.lock", "lock.mdb"}


def content(folder: Path) -> dict[str, bytes]:
    """Every file but locks."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in _LOCKS
    }


def earlier(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    with tarfile.open(DATA / "store-schema-8.tar.xz") as archive:
        archive.extractall(folder, filter="data")


def with_schema(version: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        store = opened(folder)
        put(store, "a")
        store.close()
        with (
            lmdb.open(str(folder / "sessions"), max_dbs=9) as environment,
            environment.begin(write=True) as transaction,
        ):
            transaction.put(b"schema", version, db=environment.open_db(b"meta", transaction))

    return make


@pytest.mark.parametrize(
    ("make", "version"),
    [
        (earlier, "8"),
        (with_schema(b"%d" % (SCHEMA_VERSION + 1)), str(SCHEMA_VERSION + 1)),
        (with_schema(b"0%d" % SCHEMA_VERSION), f"0{SCHEMA_VERSION}"),
        (with_schema(b"\xff?"), "\ufffd\\?"),
    ],
)
def test_a_store_of_another_version_is_refused_and_stays(
    make: Callable[[Path], None], version: str, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    make(folder)
    before = content(folder)
    message = rf"the store in .* must have schema version {SCHEMA_VERSION}; it has {version}, which the release that wrote it can read"
    uses: list[Callable[[], object]] = [
        lambda: opened(folder, "async"),
        lambda: opened(folder, "sync"),
        lambda: verification.verify(folder, None),
        lambda: backup.back_up(folder, tmp_path / "backup", CLOCK),
        lambda: repair.repair(folder, CLOCK),
        lambda: repair.rekey(folder, CLOCK, Keyring({"k": bytes(32)})),
    ]
    for use in uses:
        with pytest.raises(StoreError, match=message):
            use()
        assert content(folder) == before
    assert not (tmp_path / "backup").exists()


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            (DATA / "backup-format-3").read_bytes(),
            "must be a backup that .* wrote, of format {}; it is of 3, which the release that wrote it reads",
        ),
        (
            b"stepwell backup 0\n",
            "must be a backup that .* wrote, of format {}; it is of 0, which the release that wrote it",
        ),
        (
            b"stepwell backup 77\n",
            "must be a backup that .* wrote, of format {}; it is of 77, which the release that wrote it",
        ),
        (b"stepwell backup x\n", "must be a backup that 'stepwell store backup' wrote"),
        (b"stepwell sessions 2\n", "must be a backup that 'stepwell store backup' wrote"),
        (b"", "must be a backup that 'stepwell store backup' wrote"),
    ],
)
def test_a_backup_of_another_format_is_refused_and_stays(start: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "backup"
    file.write_bytes(start + bytes(100))
    uses: list[Callable[[], object]] = [
        lambda: verification.verify_backup(file, None),
        lambda: backup.restore(file, tmp_path / "new", CLOCK, None, moved=False),
    ]
    for use in uses:
        with pytest.raises(BackupError, match=message.format(FORMAT.number)):
            use()
    assert file.read_bytes() == start + bytes(100)
    assert not (tmp_path / "new").exists()


def test_forged_sessions_of_a_backup_are_reported_and_answer_for_themselves(tmp_path: Path) -> None:
    """Whoever makes a backup can make the checksums of its records."""
    store = opened(tmp_path / "data")
    put(store, "a")
    store.close()
    backup.back_up(tmp_path / "data", tmp_path / "real", CLOCK)
    about = Reader(tmp_path / "real").about()
    forged = {
        "nan": record("nan", created=float("nan")),
        "far": record("far", created=1e12),
        "position": record("position", 2**63),
        "last": record("last", MAX_COUNTER),
        "none": record("none", batch_size=0),
        "sound": record("sound", 3),
    }
    writer = BackupWriter(tmp_path / "forged", bytes_per_s=float("inf"))
    writer.begin(about)
    for session_id, stored in sorted(forged.items()):
        writer.session(session_id, stored)
    writer.finish()
    writer.close()
    found = verification.verify_backup(tmp_path / "forged", None)
    assert found.damaged == ["far", "nan", "none", "position"]
    assert found.problems == ["4 sessions have corrupt records"]
    restored = backup.restore(tmp_path / "forged", tmp_path / "new", CLOCK, None, moved=False)
    assert (restored.sessions, restored.damaged) == (6, 5), "nobody can count higher than the last number"
    store = opened(tmp_path / "new")
    for session_id in forged:
        header = header_or_none(session_id, store.get(session_id) or b"")
        assert (header is not None) is (session_id == "sound")
    store.close()
    assert verification.verify(tmp_path / "new", None).damaged == ["far", "last", "nan", "none", "position"]


@pytest.mark.parametrize(
    "head", [{"created": 1e300}, {"created": "nan"}, {"first_revision": -1}, {"first_revision": 2**64}]
)
def test_a_backup_with_an_impossible_start_is_corrupt(head: dict[str, object], tmp_path: Path) -> None:
    store = opened(tmp_path / "data")
    store.close()
    backup.back_up(tmp_path / "data", tmp_path / "real", CLOCK)
    about = Reader(tmp_path / "real").about()
    for name, value in head.items():
        object.__setattr__(about, name, value)
    writer = BackupWriter(tmp_path / "forged", bytes_per_s=float("inf"))
    writer.begin(about)
    writer.finish()
    writer.close()
    with pytest.raises(BackupError, match=r"unchanged; at byte \d+: its start cannot be read"):
        backup.restore(tmp_path / "forged", tmp_path / "new", CLOCK, None, moved=False)


def test_a_file_of_sessions_of_another_format_is_refused_and_stays(tmp_path: Path) -> None:
    with SessionWriter(tmp_path / "a") as writer:
        writer.add([sessions_pb2.ExportedSession(session_id="a")])
    whole = (tmp_path / "a").read_bytes()
    file = tmp_path / "a.sessions"
    contents = {
        "1": (DATA / "sessions-format-1").read_bytes(),
        "0": whole.replace(b"sessions 2", b"sessions 0", 1),
        "30": whole.replace(b"sessions 2", b"sessions 30", 1),
    }
    for version, content in contents.items():
        file.write_bytes(content)
        with pytest.raises(
            InvalidInputError,
            match=rf"a\.sessions must be a file of exported sessions, of format 2; it is of {version}, which the release that wrote it reads",
        ):
            list(read_sessions(file))
        assert file.read_bytes() == content


def test_an_import_refuses_everything_but_session_records(tmp_path: Path) -> None:
    store = opened(tmp_path / "data")
    begin(store, "a", "b")
    end(store, "b")
    store.commit(Batch(documents=[("models/m", b"{}")]))
    store.close()
    backup.back_up(tmp_path / "data", tmp_path / "backup", CLOCK)
    with pytest.raises(InvalidInputError, match="must be a file of exported sessions; it begins otherwise"):
        list(read_sessions(tmp_path / "backup"))
    for kind in (Kind.DOCUMENT, Kind.TOMBSTONE, Kind.START):
        with (tmp_path / "forged").open("wb") as file:
            writer = record_file.Writer(file, session_file.FORMAT, {})
            writer.put(Kind.SESSION, b"a", record("a"))
            writer.put(kind, b"models/m", b"{}")
            writer.end()
        before = (tmp_path / "forged").read_bytes()
        read: list[object] = []
        with pytest.raises(InvalidInputError, match=r"at byte \d+: it must have (sessions alone|one start)"):
            read.extend(read_sessions(tmp_path / "forged"))
        assert not read, "the file is looked through before the first session comes"
        assert (tmp_path / "forged").read_bytes() == before


def test_entries_of_files_are_those_of_the_log(tmp_path: Path) -> None:
    with SessionWriter(tmp_path / "a") as writer:
        writer.add(
            [
                sessions_pb2.ExportedSession(session_id=name, record=record(name, n))
                for n, name in enumerate(["a", "é" * 100])
            ]
        )
    data = (tmp_path / "a").read_bytes().partition(b"\n")[2]
    at = data.index(record_file.MAGIC.to_bytes(4, "little"), 8) - 4  # behind the start, which no log has
    for number, name in enumerate(["a", "é" * 100]):
        entry, record_at = layout.lay_out_one(name, record(name, number), 0, number + 1)
        assert data[at : at + len(entry)] == entry
        found = layout.read(data, at, 0)
        assert found is not None
        assert (found.sequence, found.offsets) == (number + 1, [(name, at + record_at)])
        at = found.end


def test_a_state_file_of_another_format_is_refused_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "a.state"
    save_file({"h": np.zeros((1, 2), np.float32)}, file, metadata={"format": "stepwell-state/0"})
    before = file.read_bytes()
    with pytest.raises(
        InvalidInputError, match=r"its format must be 'stepwell-state/\d'; got 'stepwell-state/0'"
    ):
        State.load(file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("version", [0, program_file.RING_VERSION + 1, str(program_file.VERSION)])
def test_a_program_of_another_version_is_refused_and_stays(version: object, tmp_path: Path) -> None:
    file = tmp_path / "a.stepwell"
    program_file.save(PLAIN, file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members[program_file.MANIFEST]) | {"version": version}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (members | {program_file.MANIFEST: json.dumps(manifest).encode()}).items():
            archive.writestr(name, data)
    before = file.read_bytes()
    with pytest.raises(
        program_file.ProgramFileError,
        match=rf"is of version {version!r} of its format, and this Stepwell reads {program_file.VERSION}",
    ):
        program_file.load(file)
    assert cache.load(file) is None, "an entry of the cache is made anew"
    assert file.read_bytes() == before
