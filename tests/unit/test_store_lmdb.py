"""The store on disk, and that it answers as the one in memory does."""

from __future__ import annotations

import os
import random
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell_server.errors import StateCorrupt, Unavailable
from stepwell_server.store.base import Batch, End, LocalStore, StoreError, Tombstone
from stepwell_server.store.disk import keys
from stepwell_server.store.disk import lmdb as module
from stepwell_server.store.disk.lmdb import Durability, LmdbStore
from stepwell_server.store.memory import MemoryStore
from stepwell_server.store.record import decode_header
from support.run_folder import memory_folder
from support.stores.broken_disk import failing
from support.stores.disk_store import opened_base, put, record
from support.stores.records import decode, scan_local

ODD_IDS = ["a", "b", "ä", "z" * 256, "é" * 255 + "1", "é" * 256, "\U0001f600" * 256, "\U0001f600" * 255 + "a"]


def ids(store: LocalStore, **options: Any) -> list[str]:
    return [session_id for session_id, _ in scan_local(store, **{"limit": 1000, **options})]


def revision(store: LocalStore, session_id: str) -> int:
    found = store.get(session_id)
    assert found is not None
    return decode(session_id, found).revision


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LmdbStore]:
    found = opened_base(tmp_path / "data")
    yield found
    found.close()


@pytest.mark.parametrize("durability", ["sync", "async"])
def test_committed_changes_are_there_after_a_reopen(tmp_path: Path, durability: Durability) -> None:
    first = opened_base(tmp_path, durability)
    stone = Tombstone("gone", End.CLOSED, 12.5, closes=(2**64 - 1, 1), revision=3)
    first.commit(Batch(puts=[(i, record(i)) for i in ODD_IDS], tombstones=[stone]))
    first.sync()
    first.close()
    second = opened_base(tmp_path, durability)
    assert second.count() == len(ODD_IDS)
    assert all(second.get(i) == record(i) for i in ODD_IDS)
    assert second.tombstones(["gone"])[0] == stone
    assert second.incarnation == first.incarnation


def test_records_are_replaced_deleted_and_missed(store: LmdbStore) -> None:
    put(store, "a", "b")
    store.commit(Batch(puts=[("a", record("a", 1)), ("a", record("a", 2))], deletes=["b", "never there"]))
    assert revision(store, "a") == 2
    assert store.get("b") is None
    assert store.get_many(["b", "a"]) == [None, record("a", 2)]
    assert store.count() == 1


@pytest.mark.parametrize("at", range(3))
def test_a_batch_is_kept_whole_or_not_at_all(store: LmdbStore, at: int) -> None:
    put(store, "a", "b")
    puts: list[tuple[str, Any]] = [("a", record("a", 1)), ("b", record("b", 1)), ("c", record("c"))]
    puts[at] = (puts[at][0], "no bytes")
    stone = Tombstone("a", End.EXPIRED, 1.0)
    with pytest.raises(TypeError):
        store.commit(Batch(puts=puts, tombstones=[stone]))
    with pytest.raises(Unavailable, match="must be able to keep"):
        store.commit(Batch(deletes=["a", ""], tombstones=[stone]))  # LMDB has no empty keys
    assert (revision(store, "a"), revision(store, "b"), store.count()) == (0, 0, 2)
    assert store.tombstones(["a"])[0] is None
    put(store, "a", revision=5)
    assert revision(store, "a") == 5


def test_long_ids_are_sessions_like_others(store: LmdbStore) -> None:
    put(store, *ODD_IDS)
    assert sorted(ids(store)) == sorted(ODD_IDS)
    for session_id in ODD_IDS:
        assert decode_header(session_id, store.get(session_id) or b"").fingerprint == "f" * 8
        assert ids(store, prefix=session_id) == [session_id]
    assert sorted(ids(store, prefix="é" * 250)) == ["é" * 255 + "1", "é" * 256]
    stones = [Tombstone(i, End.EXPIRED, 1.0) for i in ODD_IDS]
    store.commit(Batch(deletes=ODD_IDS, tombstones=stones))
    assert [store.tombstones([i])[0] for i in ODD_IDS] == stones
    assert store.count() == 0


def test_the_value_under_a_digest_is_that_of_the_whole_id(store: LmdbStore) -> None:
    mine, other = "é" * 256, "é" * 255 + "1"
    put(store, other)
    # nobody but a digest that is not unique would write it there
    with store._environment.begin(write=True, db=store._sessions) as transaction:
        transaction.put(keys.key_of(mine), transaction.get(keys.key_of(other)))
    with pytest.raises(StateCorrupt):
        decode(mine, store.get(mine) or b"")


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_pages_of_a_scan_cover_the_whole_store(store: LmdbStore, limit: int) -> None:
    wanted = [f"user-{i:02}" for i in range(7)]
    put(store, "a", "user", "userx", *reversed(wanted), *ODD_IDS)
    found: list[str] = []
    while page := ids(store, after=found[-1] if found else "", prefix="user-", limit=limit):
        found += page
    assert found == wanted
    everything: list[str] = []
    while page := ids(store, after=everything[-1] if everything else "", limit=limit):
        everything += page
    assert everything == ids(store)
    assert ids(store, limit=0) == []
    assert len(store.heads(limit=0)) == 0
    keys: list[bytes] = []
    while len(heads := store.heads(after=keys[-1].decode() if keys else "", limit=limit)):
        keys += heads.keys
    assert [key.decode() for key in keys] == everything
    assert ids(store, after="userx", prefix="user-") == []


ID = st.sampled_from(["a", "aa", "ab", "b", "ä", "é" * 256, "é" * 255 + "1"])
STONE = st.builds(
    Tombstone,
    ID,
    st.sampled_from(End),
    st.floats(0, 1e9),
    st.lists(st.integers(1, 2**64 - 1), max_size=4).map(tuple),
)
BATCH = st.builds(
    Batch,
    puts=st.lists(st.builds(lambda i, r: (i, record(i, r)), ID, st.integers(0, 99)), max_size=4),
    deletes=st.lists(ID, max_size=2),
    forgets=st.lists(ID, max_size=2),
    tombstones=st.lists(STONE, max_size=4),
    documents=st.lists(
        st.tuples(st.sampled_from(["a", "ab", "ä"]), st.none() | st.binary(max_size=9)), max_size=4
    ),
)


@settings(max_examples=25)
@given(st.lists(BATCH, max_size=8))
def test_both_stores_answer_alike(batches: list[Batch]) -> None:
    known = ["a", "aa", "ab", "b", "ä", "é" * 256, "é" * 255 + "1"]
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        disk = opened_base(Path(folder), tombstones=100)
        memory = MemoryStore(tombstones=100)
        for batch in batches:
            disk.commit(batch)
            memory.commit(batch)
            assert disk.get_many(known) == memory.get_many(known) == [disk.get(i) for i in known]
            assert [disk.tombstones([i])[0] for i in known] == [memory.tombstones([i])[0] for i in known]
            assert disk.count() == memory.count()
            for prefix in ("", "a", "ab", "b"):
                assert list(disk.documents(prefix).items()) == list(memory.documents(prefix).items())
            assert sorted(ids(disk, prefix="a", after="a")) == ids(memory, prefix="a", after="a")
            assert sorted(ids(disk)) == ids(memory)
            assert sorted(disk.heads(limit=9).keys) == memory.heads(limit=9).keys
        disk.close()


def test_tombstones_are_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    store = opened_base(tmp_path, tombstones=3)
    for i, session_id in enumerate(["a", "b", "c", "a", "d"]):
        store.commit(Batch(tombstones=[Tombstone(session_id, End.EXPIRED, float(i))]))
    # a's first burial is forgotten, not its second
    assert [i for i in "abcd" if store.tombstones([i])[0]] == ["a", "c", "d"]
    store.close()
    store = opened_base(tmp_path, tombstones=3)
    store.commit(Batch(tombstones=[Tombstone(i, End.EXPIRED, 9.0) for i in "efgh"]))
    assert [i for i in "abcdefgh" if store.tombstones([i])[0]] == ["f", "g", "h"]


def test_a_tombstone_is_forgotten_when_its_id_is_reopened(store: LmdbStore) -> None:
    store.commit(Batch(tombstones=[Tombstone("a", End.EXPIRED, 1.0)]))
    store.commit(Batch(puts=[("a", record("a"))], forgets=["a"]))
    assert store.tombstones(["a"])[0] is None


def test_the_map_grows_while_others_read(tmp_path: Path) -> None:
    store = opened_base(tmp_path, first_map_bytes=128 * 1024)
    put(store, "first", revision=7)
    done, problems = threading.Event(), list[BaseException]()

    def read() -> None:
        try:
            while not done.is_set():
                assert revision(store, "first") == 7
                assert scan_local(store, limit=3)
        except BaseException as error:
            problems.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    stone = Tombstone("x", End.EXPIRED, 1.0)
    for i in range(100):
        store.commit(Batch(puts=[(f"s{i}", record(f"s{i}", i, 30_000))], tombstones=[stone]))
    done.set()
    reader.join(timeout=200)
    assert not problems
    assert all(revision(store, f"s{i}") == i for i in range(100))
    put(store, "big", size=2**24)
    assert len(store.get("big") or b"") > 2**24
    store.close()
    store = opened_base(tmp_path, first_map_bytes=128 * 1024)
    assert store.count() == 102


def test_a_map_that_cannot_grow_is_unavailable_and_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened_base(tmp_path, first_map_bytes=128 * 1024)
    put(store, "a", revision=1)
    map_bytes = store._map_bytes
    store._map_bytes = 2**62  # no address space for twice as much; no test has the room to get there
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "lengthen", lambda _path, _size, **_options: None
        )  # nor a file system with such files
        with pytest.raises(Unavailable, match="must be able to keep"):
            put(store, "b", size=2**20)
    assert revision(store, "a") == 1
    assert store.count() == 1
    assert store._map_bytes == map_bytes
    put(store, "c", size=2**20)
    assert ids(store) == ["a", "c"]


def test_a_failed_environment_is_reopened(store: LmdbStore) -> None:
    class Broken:
        def __init__(self, environment: Any) -> None:
            self.close = environment.close

        def begin(self, **options: Any) -> Any:
            raise lmdb.PanicError("mdb_txn_begin")

    put(store, "a")
    store._environment = Broken(store._environment)  # only damage makes a real one give up
    put(store, "a", "b", revision=2)
    assert (revision(store, "a"), revision(store, "b")) == (2, 2)


def test_reopening_is_retried_until_it_works(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "a")
    with monkeypatch.context() as patch:
        patch.setattr(lmdb, "open", failing(lmdb.DiskError("mdb_env_open")))
        store._must_reopen = True  # as after a panic, which only damage brings about
        for _ in range(2):
            with pytest.raises(Unavailable, match="must be able to keep"):
                put(store, "a", revision=1)
            with pytest.raises(Unavailable, match="must be readable"):
                store.get("a")
    put(store, "b", revision=2)
    assert (revision(store, "a"), revision(store, "b")) == (0, 2)


def test_a_closed_store_refuses_calls(tmp_path: Path) -> None:
    store = opened_base(tmp_path)
    store.close()
    for use in (store.count, store.sync, lambda: store.get("a"), lambda: put(store, "a")):
        with pytest.raises(Unavailable, match="must be open; it is closed"):
            use()


def test_a_damaged_record_harms_its_session_alone(store: LmdbStore) -> None:
    put(store, "a", "b", "c")
    damaged = bytearray(record("b"))
    damaged[30] ^= 1
    store.commit(Batch(puts=[("b", damaged)]))
    with pytest.raises(StateCorrupt, match="session 'b'"):
        decode("b", store.get("b") or b"")
    assert [(i, header is None) for i, header in scan_local(store, limit=9)] == [
        ("a", False),
        ("b", True),
        ("c", False),
    ]


def test_a_page_that_lmdb_finds_damaged_is_that_of_its_sessions(
    store: LmdbStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "a", "b", "é" * 256)

    def own(session_id: str, key: bytes, value: bytes | None) -> bytes | None:
        if session_id == "b":
            raise lmdb.CorruptedError("mdb_get")
        return value

    monkeypatch.setattr(module, "own", own)
    with pytest.raises(StateCorrupt, match="page that holds session 'b'"):
        store.get("b")
    assert store.get_many(["a", "b", "c"]) == [record("a"), b"", None]


def test_pages_of_closed_sessions_are_used_again(store: LmdbStore, tmp_path: Path) -> None:
    data = tmp_path / "data" / "sessions" / "data.mdb"
    sizes = []
    for turn in range(12):
        names = [f"{turn}-{i}" for i in range(300)]
        put(store, *names, size=1000)
        store.commit(Batch(deletes=names))
        sizes.append(data.stat().st_blocks)
    assert sizes[-1] == sizes[3], "as much is closed as is opened: the file does not grow"


def test_a_file_that_is_cut_off_or_no_store_stops_the_start(tmp_path: Path) -> None:
    store = opened_base(tmp_path)
    put(store, *[f"s{i}" for i in range(500)], size=1000)
    data = tmp_path / "sessions" / "data.mdb"
    store.close()
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(StoreError, match="it was truncated to"):
        opened_base(tmp_path)
    data.write_bytes(b"not LMDB" * 2000)
    with pytest.raises(StoreError, match="must hold a store that can be opened"):
        opened_base(tmp_path)
    data.unlink()
    opened_base(tmp_path).close()


def test_a_directory_that_is_none_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sessions").touch()
    for path, file in (("file", "file"), ("file/under", "file"), ("data", "data/sessions")):
        rule = f"the data directory {tmp_path / path} must be a folder; {tmp_path / file} is not"
        with pytest.raises(StoreError, match=f"^{re.escape(rule)}$"):
            opened_base(tmp_path / path)


@pytest.mark.parametrize(
    "there", [[], ["a"], ["z"], ["a", "z"], ["m2"], ["m0"], ["m5"], ["m25"], ["a", "m25", "z"]]
)
def test_neighbours_that_are_absent_are_not_found(store: LmdbStore, there: list[str]) -> None:
    """Some lie before, between or behind those that are asked for."""
    names = [f"m{number}" for number in range(6)]
    store.commit(
        Batch(puts=[(i, record(i)) for i in there], tombstones=[Tombstone(i, End.CLOSED, 1.0) for i in there])
    )
    random.Random(1).shuffle(names)
    assert store.get_many(names) == [record(i) if i in there else None for i in names]
    assert [stone and stone.session_id for stone in store.tombstones(names)] == [
        i if i in there else None for i in names
    ]
