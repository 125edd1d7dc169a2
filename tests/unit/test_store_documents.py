"""Documents: every store keeps them together with sessions, and reports corrupt and missing ones."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
from click.testing import CliRunner

from stepwell.cli import main
from stepwell_server.clock import SystemClock
from stepwell_server.errors import Unavailable
from stepwell_server.store import backup, repair, verification
from stepwell_server.store.base import (
    MAX_DOCUMENT_BYTES,
    MAX_NAME_BYTES,
    Batch,
    DocumentsCorrupt,
    LocalStore,
    StoreError,
)
from stepwell_server.store.disk import documents as in_lmdb
from stepwell_server.store.disk.backup.file import BackupError
from stepwell_server.store.disk.lmdb import Durability, LmdbStore
from stepwell_server.store.encryption.keyring import Keyring
from stepwell_server.store.factory import encrypted
from stepwell_server.store.in_process import InProcessStore
from stepwell_server.store.memory import MemoryStore
from support.clock import ManualClock
from support.samples import some
from support.stores.disk_store import (
    DURABILITIES,
    begin,
    committed,
    crash_copy,
    end,
    flip_in_lmdb,
    killed,
    opened,
    opened_base,
    put,
    record,
    revisions,
    wal_of,
)
from support.stores.disk_store import (
    in_lmdb as sessions_in_lmdb,
)

CLOCK = SystemClock()
RING = Keyring({"new": b"\1" * 32})
LONGEST = "é" * (MAX_NAME_BYTES // 2)
DOCUMENTS = {
    "model/a": b"content of a", "model/b": b"", LONGEST: b"\0" * 10_000, "z": bytes(range(256)) * 4096,
}  # fmt: skip
KINDS: dict[str, Callable[[Path], LocalStore]] = {
    "memory": lambda _path: MemoryStore(),
    "lmdb": lambda path: LmdbStore(path, durability="async", clock=ManualClock()),
    "async": opened,
    "sync": lambda path: opened(path, "sync"),
    "encrypted": lambda path: encrypted(opened(path), RING),
}


# ----------------------------------------------------------------------------------------------------------- each store


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_put_replaced_removed_and_found_by_prefix(tmp_path: Path, kind: str) -> None:
    store = KINDS[kind](tmp_path / "data")
    assert store.documents() == {}
    store.commit(Batch(documents=[("never there", None)]))
    store.commit(Batch(documents=list(reversed(DOCUMENTS.items()))))
    assert store.documents() == DOCUMENTS
    assert list(store.documents()) == sorted(DOCUMENTS), "in the order of the names"
    assert store.documents("model/") == {"model/a": b"content of a", "model/b": b""}
    assert store.documents("model/a") == {"model/a": b"content of a"}
    assert store.documents("model/abc") == {}
    last = [
        ("model/a", b"1"),
        ("model/b", None),
        ("model/a", b"2"),
        ("c", b"3"),
        ("c", None),
        ("z", None),
        ("z", b"4"),
    ]
    store.commit(Batch(documents=last))
    expected = {LONGEST: DOCUMENTS[LONGEST], "model/a": b"2", "z": b"4"}
    assert store.documents() == expected
    assert store.count() == 0
    store.close()
    if kind != "memory":
        store = KINDS[kind](tmp_path / "data")
        assert store.documents() == expected
        store.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_they_are_found_where_a_store_is_awaited(tmp_path: Path, kind: str) -> None:
    store = InProcessStore(KINDS[kind](tmp_path / "data"), ManualClock())
    await committed(
        store, Batch(puts=[("a", record("a"))], counts=[("m", 1)], documents=list(DOCUMENTS.items()))
    )
    assert await store.documents("model/") == store.local.documents("model/") != {}
    assert await store.documents() == DOCUMENTS
    assert await store.count() == 1
    await store.close()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("", b"", "the name of a document must have 1 to 400 bytes of UTF-8; '' has 0"),
        (
            "é" * 200 + "a",
            b"",
            f"the name of a document must have 1 to 400 bytes of UTF-8; '{'é' * 40}' has 401",
        ),
        ("\ud800", b"", r"the name of a document must be text that UTF-8 can encode; got '\\ud800'"),
        ("é" * 200 + "a", None, "must have 1 to 400 bytes"),
        ("a", bytes(MAX_DOCUMENT_BYTES + 1), "document 'a' must have at most 1048576 bytes; it has 1048577"),
    ],
)
def test_no_batch_has_one_that_is_too_large_or_has_no_name(
    name: str, content: bytes | None, message: str
) -> None:
    Batch(documents=[(LONGEST, bytes(MAX_DOCUMENT_BYTES)), (LONGEST, None)])
    with pytest.raises(ValueError, match=message):
        Batch(documents=[("b", b""), (name, content)])


def test_the_map_grows_for_them(tmp_path: Path) -> None:
    store = opened_base(tmp_path, first_map_bytes=256 * 1024)
    contents = {f"n{n}": bytes([n]) * MAX_DOCUMENT_BYTES for n in range(3)}
    store.commit(Batch(documents=list(contents.items())))
    assert store.documents() == contents
    more = {f"m{n}": bytes([n]) * MAX_DOCUMENT_BYTES for n in range(9)}
    store.put_documents([in_lmdb.item(name, content) for name, content in more.items()])
    assert store.documents() == more | contents


# ------------------------------------------------------------------------------------------------ together with sessions


@DURABILITIES
def test_both_are_kept_whatever_is_in_the_log(tmp_path: Path, durability: Durability) -> None:
    store = opened(tmp_path / "data", durability)
    begin(store, "a", "b")
    put(store, "a", "b", revision=1)
    assert not wal_of(store).is_empty
    store.commit(Batch(puts=[("a", record("a", 2))], documents=[("of", b"2")]))
    assert sessions_in_lmdb(store) == {"a": 2, "b": 0}, (
        "one transaction with the document, not one write to the log"
    )
    put(store, "a", revision=3)
    assert store.documents() == {"of": b"2"}
    for _ in range(2):
        store = killed(store, durability)
        assert (revisions(store), store.documents()) == ({"a": 3, "b": 1}, {"of": b"2"})


@DURABILITIES
def test_neither_is_kept_where_one_cannot_be(tmp_path: Path, durability: Durability) -> None:
    store = opened(tmp_path / "data", durability)
    begin(store, "a")
    store.commit(Batch(documents=[("of", b"1")]))
    with pytest.raises(Unavailable, match="must be able to keep"):
        store.commit(
            Batch(puts=[("a", record("a", 2))], deletes=[""], documents=[("of", b"2"), ("new", b"2")])
        )
    for _ in range(2):
        assert (revisions(store), store.documents()) == ({"a": 0}, {"of": b"1"})
        store = killed(store, durability)
    store.close()
    with pytest.raises(Unavailable, match="it is closed"):
        store.documents()


def test_they_go_with_a_batch_that_goes_back(tmp_path: Path) -> None:
    store = opened(tmp_path / "data")
    begin(store, "a")
    put(store, "a", revision=5)
    store.commit(Batch(puts=[("a", record("a", 2))], documents=[("of", b"2")], goes_back=True))
    store = killed(store)
    assert (revisions(store), store.documents()) == ({"a": 2}, {"of": b"2"})


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store at rest with sessions, some of them in the log, and documents."""
    store = opened(tmp_path / "live")
    begin(store, "a", "b", "gone")
    end(store, "gone")
    store.commit(Batch(documents=list(DOCUMENTS.items())))
    put(store, "a", revision=3)
    copy = crash_copy(store)
    store.close()
    return copy


SESSIONS = {"a": 3, "b": 0}


def value_of(name: str) -> bytes:
    value = in_lmdb.item(name, DOCUMENTS[name]).value
    assert value is not None
    return value


def test_one_that_is_damaged_is_named_and_nothing_else_is_concerned(path: Path) -> None:
    flip_in_lmdb(path, b"content of a", 3)
    store = opened(path)
    rule = "^document 'model/a' must be intact; it is corrupt: stepwell store verify gives details"
    for prefix in ("", "model/", "model/a"):
        with pytest.raises(DocumentsCorrupt, match=rule) as error:
            store.documents(prefix)
        assert error.value.names == ["model/a"]
        assert error.value.sound == {
            name: content
            for name, content in DOCUMENTS.items()
            if name != "model/a" and name.startswith(prefix)
        }
    assert store.documents("model/b") == {"model/b": b""}
    assert (revisions(store), store.damage) == (SESSIONS, "")
    begin(store, "new")
    store.commit(Batch(documents=[("model/a", b"anew")]))
    assert store.documents() == DOCUMENTS | {"model/a": b"anew"}, "a rewritten document is sound"
    store.close()
    assert verification.verify(path, None).problems == []


@pytest.mark.parametrize("at", some(range(len(value_of("model/a")) + len(b"model/a"))))
def test_no_bit_of_it_can_change_unnoticed(path: Path, at: int) -> None:
    """Not one of its key, which stands before its value, either."""
    key = b"model/a"
    flip_in_lmdb(path, key + value_of("model/a"), at, at % 8)
    store = opened(path)
    with pytest.raises(DocumentsCorrupt) as error:
        store.documents()
    assert error.value.sound == {name: content for name, content in DOCUMENTS.items() if name != "model/a"}
    assert error.value.names == ["model/a"]
    assert revisions(store) == SESSIONS
    store.close()
    found = verification.verify(path, None)
    assert found.problems == ["1 documents are corrupt"]
    assert (found.documents, found.damaged_documents) == (4, ["model/a"])
    done = repair.repair(path, CLOCK)
    kept = at < len(key)
    assert (done.documents, done.lost_documents, done.missing_documents) == (
        4 if kept else 3, [] if kept else ["model/a"], 0,
    )  # fmt: skip
    store = opened(path)
    assert store.documents() == {n: c for n, c in DOCUMENTS.items() if kept or n != "model/a"}
    assert store.documents("model/a") == ({"model/a": b"content of a"} if kept else {})


def test_a_rewritten_document_is_distinct_from_its_damaged_key(path: Path) -> None:
    flip_in_lmdb(path, b"model/a" + value_of("model/a"), 0)
    store = opened(path)
    store.commit(Batch(documents=[("model/a", b"anew")]))
    with pytest.raises(DocumentsCorrupt) as error:
        store.documents()
    assert error.value.names == ["model/a"]
    assert error.value.sound == DOCUMENTS | {"model/a": b"anew"}
    store.close()
    assert repair.repair(path, CLOCK).lost_documents == []
    store = opened(path)
    assert store.documents() == DOCUMENTS | {"model/a": b"anew"}


def test_a_missing_document_is_noticed(path: Path, tmp_path: Path) -> None:
    with (
        lmdb.open(str(path / "sessions"), max_dbs=9) as environment,
        environment.begin(write=True) as transaction,
    ):
        transaction.delete(b"model/b", db=environment.open_db(b"documents", transaction))
    store = opened(path)
    with pytest.raises(
        DocumentsCorrupt, match="the store must have all its documents; 1 of 4 are missing"
    ) as error:
        store.documents("model/")
    assert (error.value.names, error.value.sound) == ([], {"model/a": b"content of a"})
    assert revisions(store) == SESSIONS
    store.close()
    assert verification.verify(path, None).problems == ["documents: 1 of 4 are missing"]
    for refused in (
        lambda: backup.back_up(path, tmp_path / "backup", CLOCK),
        lambda: repair.rekey(path, CLOCK, RING),
    ):
        with pytest.raises(StoreError, match="must have all its documents; 1 of 4 are missing"):
            refused()
    assert not (tmp_path / "backup").exists()
    assert repair.repair(path, CLOCK).missing_documents == 1
    assert verification.verify(path, None).problems == []


@pytest.mark.parametrize("what", ["database", "pages"])
def test_all_of_them_missing_leaves_the_sessions(path: Path, what: str) -> None:
    if what == "database":
        # the entry of LMDB's main database that says where they are: the next start makes another
        with (
            lmdb.open(str(path / "sessions"), max_dbs=9) as environment,
            environment.begin(write=True) as transaction,
        ):
            transaction.drop(environment.open_db(b"documents", transaction))
        problem = "4 of 4 are missing"
    else:
        with lmdb.open(str(path / "sessions"), max_dbs=9, readonly=True) as environment:
            data = bytearray((path / "sessions" / "data.mdb").read_bytes())
        for page in range(0, len(data), 4096):
            if data.find(b"model/a", page, page + 4096) >= 0:
                data[page + 10 : page + 12] = b"\0\0"  # it is no kind of page any more
        (path / "sessions" / "data.mdb").write_bytes(data)
        problem = "a page cannot be read"
    assert verification.verify(path, None).problems[0].startswith(f"documents: {problem}")
    store = opened(path)
    assert revisions(store) == SESSIONS
    begin(store, "new")
    with pytest.raises(DocumentsCorrupt, match=problem):
        store.documents()
    assert store.damage == ""
    store.close()
    assert repair.repair(path, CLOCK).missing_documents == 4
    store = opened(path)
    assert store.documents() == {}
    assert revisions(store) == SESSIONS | {"new": 0}


# ------------------------------------------------------------------------------------------------ backups, and the rest


def test_they_are_in_a_backup_and_in_the_store_made_of_it(path: Path, tmp_path: Path) -> None:
    done = backup.back_up(path, tmp_path / "backup", CLOCK)
    assert (done.documents, done.damaged_documents, done.sessions) == (4, 0, 2)
    assert verification.verify_backup(tmp_path / "backup", None).documents == 4
    for name, ring, moved in (("moved", None, True), ("back", None, False), ("sealed", RING, False)):
        made = backup.restore(tmp_path / "backup", tmp_path / name, CLOCK, ring, moved=moved)
        assert (made.documents, made.damaged_documents, made.sessions) == (4, 0, 2)
        assert verification.verify(tmp_path / name, ring).problems == []
        store = opened(tmp_path / name)
        assert store.documents() == DOCUMENTS
        store.close()


def test_a_damaged_one_is_in_a_backup_as_it_is(path: Path, tmp_path: Path) -> None:
    flip_in_lmdb(path, b"content of a", 3)
    assert backup.back_up(path, tmp_path / "backup", CLOCK).damaged_documents == 1
    found = verification.verify_backup(tmp_path / "backup", None)
    assert found.problems == ["1 documents are corrupt"]
    assert found.damaged_documents == ["model/a"]
    made = backup.restore(tmp_path / "backup", tmp_path / "to", CLOCK, None, moved=True)
    assert (made.documents, made.damaged_documents) == (4, 1)
    store = opened(tmp_path / "to")
    with pytest.raises(DocumentsCorrupt) as error:
        store.documents()
    assert error.value.names == ["model/a"]
    assert len(error.value.sound) == 3


def test_a_backup_without_some_of_them_is_refused(path: Path, tmp_path: Path) -> None:
    backup.back_up(path, tmp_path / "backup", CLOCK)
    whole = (tmp_path / "backup").read_bytes()
    for at in (whole.find(b"content of a"), whole.find(b'"document": 4') + len(b'"document": ')):
        changed = bytearray(whole)
        changed[at] ^= 1
        (tmp_path / "changed").write_bytes(changed)
        with pytest.raises(BackupError, match="unchanged; at byte"):
            backup.restore(tmp_path / "changed", tmp_path / "to", CLOCK, None, moved=True)
    assert not (tmp_path / "to").exists()


def test_a_rekeyed_or_decrypted_store_keeps_documents(path: Path) -> None:
    for decrypt in (False, True):
        repair.rekey(path, CLOCK, RING, decrypt=decrypt)
        assert verification.verify(path, RING).problems == []
        disk = opened(path)
        store = encrypted(disk, None if decrypt else RING)
        assert store.documents() == DOCUMENTS
        assert revisions(store) == SESSIONS
        store.close()


def run(*arguments: object, code: int = 0) -> str:
    found = CliRunner().invoke(main, ["store", *map(str, arguments)])
    assert found.exit_code == code, found.output
    return found.output


def test_the_commands_report_documents(path: Path, tmp_path: Path) -> None:
    assert "documents   4\n" in run("verify", path)
    assert json.loads(run("backup", path, tmp_path / "backup", "--json"))["documents"] == 4
    assert json.loads(run("restore", tmp_path / "backup", tmp_path / "to", "--json"))["documents"] == 4
    assert "lost:" not in run("repair", tmp_path / "to")
    subprocess.run(["cp", "-r", path, tmp_path / "damaged"], check=True)
    flip_in_lmdb(tmp_path / "damaged", b"content of a", 3)
    said = run("verify", tmp_path / "damaged", code=1)
    assert "damaged documents: 'model/a'\n" in said
    assert "wrong: 1 documents are corrupt\n" in said
    rule = "1 documents of the server are corrupt; stepwell store verify lists them"
    assert rule in run("backup", tmp_path / "damaged", tmp_path / "backup2")
    assert rule in run("restore", tmp_path / "backup2", tmp_path / "to2")
    assert "lost documents of the server: 'model/a'\n" in run("repair", tmp_path / "damaged")
    assert json.loads(run("repair", tmp_path / "damaged", "--json"))["documents"] == 3
