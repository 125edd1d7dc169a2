"""Changes: records with only the new elements of windows. A store returns the whole record, wherever the parts are."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import lmdb
import numpy as np
import pytest

from stepwell_server.errors import StateCorrupt
from stepwell_server.store import backup, repair, verification
from stepwell_server.store.base import Batch, LocalStore
from stepwell_server.store.changes import field_of, joined, merged
from stepwell_server.store.counts import usage_of
from stepwell_server.store.disk import meta
from stepwell_server.store.disk.backup import file as backup_file
from stepwell_server.store.disk.earlier import NAME
from stepwell_server.store.encryption.keyring import Keyring
from stepwell_server.store.encryption.sealer import Sealer
from stepwell_server.store.encryption.store import EncryptedStore
from stepwell_server.store.heads import heads_of
from stepwell_server.store.in_process import fetched
from stepwell_server.store.memory import MemoryStore
from stepwell_server.store.record import (
    CHANGE_VERSION,
    RecordBytes,
    RecordTemplate,
    Texts,
    decode_header,
    header_or_none,
    is_change,
    is_sound,
    key_id_of,
    records_of,
    value_of,
)
from support.clock import ManualClock
from support.samples import one_in
from support.stores.changes import DEFAULT, OTHER_PARTS, Windowed, windows
from support.stores.disk_store import base_of, crash_copy, end, opened, wal_of

CLOCK = ManualClock()
KEYS = Keyring({"k": bytes(range(32))})
LONG_ID = "l" * 600


def begin(store: LocalStore, *sessions: Windowed) -> None:
    puts = [(each.session_id, each.whole) for each in sessions]
    store.commit(Batch(puts=puts, counts=[("m", 1)] * len(puts)))


def step(store: LocalStore, *sessions: Windowed, steps: int = 1) -> None:
    store.commit(Batch(puts=[(each.session_id, each.step(steps)) for each in sessions]))


def require(store: LocalStore, *sessions: Windowed) -> None:
    """What readers get is whole; lists have one entry for each session."""
    ids = [each.session_id for each in sessions]
    assert [found.record for found in fetched(store, ids)] == [each.whole for each in sessions]
    heads = store.heads(limit=1000)
    found = {
        str(key, "utf-8"): int(rev) for key, rev in zip(heads.keys, heads.heads["revision"], strict=True)
    }
    assert found == {each.session_id: each.revision for each in sessions}
    assert [heads.usage(place) for place in range(len(heads))] == [
        usage_of(decode_header(each.session_id, each.whole))
        for each in sorted(sessions, key=lambda s: s.session_id)
    ]
    assert store.count() == len(sessions)


def test_a_change_completes_the_record_before_it() -> None:
    session = Windowed("s")
    records = [session.whole]
    for steps in (1, 2, 5, 30, 1):
        records.append(session.step(steps))
        value = value_of(records)
        assert is_sound("s", value)
        assert joined("s", value) == session.whole
        assert records_of(value) == records
        header = header_or_none("s", value)
        assert header is not None
        assert usage_of(header) == usage_of(decode_header("s", session.whole))
    assert len(records[1]) < len(session.whole) - 50


def test_changes_of_a_version_with_other_windows_follow_each_other() -> None:
    session = Windowed("s")
    records = [session.whole]
    for parts in (DEFAULT, DEFAULT, OTHER_PARTS, OTHER_PARTS, DEFAULT):
        records.append(session.step(2, parts))
        assert joined("s", value_of(records)) == session.whole


def test_changes_without_their_records_are_refused() -> None:
    session = Windowed("s")
    records = [session.whole, session.step(), session.step(), session.step()]
    for value in (
        value_of(records[1:]),  # no whole record
        value_of([*records[:2], records[3]]),  # one is missing
        value_of([records[0], *stepped(Windowed("s", seed=1), 2)]),  # of another session
        value_of([*records[:3], records[3][:-1] + b"?"]),
        value_of([records[0][:-1] + b"?", *records[1:]]),
    ):
        assert joined("s", value) == value
        assert header_or_none("s", value) is None
        with pytest.raises(StateCorrupt):
            decode_header("s", joined("s", value))


def stepped(session: Windowed, count: int) -> Sequence[bytes]:
    return [session.step() for _ in range(count)]


def test_a_description_of_other_windows_is_refused() -> None:
    session, other = Windowed("s"), Windowed("s", batch_size=1)
    whole = session.whole
    other._born = session._born
    value = value_of([whole, other.step()])
    assert is_sound("s", value)
    assert joined("s", value) == value


def test_records_of_two_places_are_merged() -> None:
    session = Windowed("s")
    records: list[RecordBytes] = [session.whole, *stepped(session, 4)]
    for cut in range(1, 5):
        for behind in range(cut, 6):
            assert merged("s", records[cut:], value_of(records[:behind])) == value_of(records)
    assert merged("s", (), b"stored") == b"stored"
    assert merged("s", records, None) == value_of(records)


def test_encrypted_records_and_changes_are_opened_before_they_are_joined() -> None:
    session, sealer = Windowed("s"), Sealer(KEYS)
    plain: list[RecordBytes] = [session.whole, session.step(), session.step()]
    sealed = [sealer.seal([("s", each)])[0][1] for each in plain]
    value = value_of(sealed)
    assert is_change(value)
    assert key_id_of(value) == "k"
    assert is_sound("s", value)
    assert joined("s", value) == value
    assert joined("s", sealer.opened_or_as_is("s", value)) == session.whole
    mixed = value_of([plain[0], *sealed[1:]])
    assert joined("s", sealer.open("s", mixed)) == session.whole
    with pytest.raises(StateCorrupt, match="it is encrypted with key"):
        decode_header("s", value)


STORES: dict[str, Callable[[Path], LocalStore]] = {
    "memory": lambda _: MemoryStore(),
    "disk": opened,
    "disk, sync": lambda path: opened(path, "sync"),
    "LMDB": lambda path: base_of(opened(path)),
    "encrypted": lambda path: EncryptedStore(opened(path), Sealer(KEYS)),
}


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("seed", one_in(3, range(3)))
def test_whatever_is_done_readers_get_whole_records(kind: str, seed: int, tmp_path: Path) -> None:
    """The log's segments have 4 KiB, so they rotate all the time, and records are in all places."""
    store, chance = STORES[kind](tmp_path / "store"), random.Random(seed)
    sessions = {name: Windowed(name) for name in ("a", "b", "c", LONG_ID)}
    begin(store, *sessions.values())
    for turn in range(150):
        some = chance.sample(sorted(sessions), chance.randint(1, len(sessions)))
        puts = [
            (
                name,
                sessions[name].step(chance.choice([1, 1, 2, 20]))
                if chance.random() < 0.9
                else sessions[name].replace(),
            )
            for name in some
        ]
        if chance.random() < 0.1:  # the log refuses it
            store.commit(Batch(puts=puts, documents=[("d", chance.randbytes(9))]))
        elif not (store.has_log and chance.random() < 0.5 and store.append(puts)):
            store.commit(Batch(puts=puts))
        if chance.random() < 0.2:
            store.checkpoint(briefly=True)
        if chance.random() < 0.1:
            name = chance.choice(some)
            end(store, name)
            assert fetched(store, [name])[0].record is None
            sessions[name] = Windowed(name, seed=turn)
            begin(store, sessions[name])
        require(store, *sessions.values())
    store.checkpoint()
    require(store, *sessions.values())


@pytest.mark.parametrize("durability", ["sync", "async"])
def test_a_killed_server_leaves_all_changes(durability: str, tmp_path: Path) -> None:
    store, chance = opened(tmp_path / "store", durability), random.Random(5)  # type: ignore[arg-type]
    sessions = [Windowed(name) for name in "abc"]
    begin(store, *sessions)
    for _ in range(12):
        for _ in range(chance.randint(1, 12)):
            step(store, *chance.sample(sessions, 2))
        copy = crash_copy(store)
        store.close()
        store = opened(copy, durability)  # type: ignore[arg-type]
        require(store, *sessions)


def test_a_log_that_lacks_a_change_which_went_to_lmdb_is_completed_from_there(tmp_path: Path) -> None:
    store, session = opened(tmp_path / "store", segment_bytes=2**16), Windowed("a")
    begin(store, session)
    store.commit(Batch(puts=[("a", session.replace())]))  # whole rows in the log
    step(store, session)
    for turn in range(3):
        store.commit(Batch(puts=[("a", session.step())], documents=[("d", b"%d" % turn)]))
        step(store, session)
        step(store, session)
        copy = crash_copy(store)
        assert verification.verify(copy, None).problems == []
        require(opened(copy), session)
        assert fetched(base_of(store), ["a"])[0].record != session.whole
    copy = crash_copy(store)
    opened(copy).close()  # which checkpoints all
    again = opened(copy)
    assert wal_of(again).is_empty
    require(again, session)


def test_a_torn_write_of_changes_leaves_the_state_before_it(tmp_path: Path) -> None:
    store, session = opened(tmp_path / "store", segment_bytes=2**16), Windowed("a")
    begin(store, session)
    step(store, session)
    before = session.whole
    at = wal_of(store)._active.end
    step(store, session)
    copy = crash_copy(store)
    size = wal_of(store)._active.end - at
    for name in ("0", "1"):
        file = copy / "wal" / name
        data = bytearray(file.read_bytes())
        if any(data[at : at + size]):
            data[at + size // 2 : at + size] = bytes(size - size // 2)
            file.write_bytes(data)
    again = opened(copy)
    assert fetched(again, ["a"])[0].record == before


def test_little_is_written_for_a_change_and_what_it_replaced_is_removed(tmp_path: Path) -> None:
    store, session = opened(tmp_path / "store"), Windowed("a")
    base = base_of(store)

    def entries() -> int:
        with base._environment.begin() as transaction:
            return int(transaction.stat(base._earlier)["entries"])

    begin(store, session)
    for _ in range(5):
        base.commit(Batch(puts=[("a", session.step())]))
    assert entries() == 5
    base.commit(Batch(puts=[("a", session.replace())]))
    base.commit(Batch(puts=[("a", session.step())]))
    assert entries() == 1
    assert fetched(base, ["a"])[0].record == session.whole
    end(base, "a")
    assert entries() == 0


@pytest.mark.parametrize("keys", [None, KEYS], ids=["plain", "encrypted"])
@pytest.mark.parametrize("is_moved", [False, True])
def test_backups_and_repairs_have_the_changes(keys: Keyring | None, is_moved: bool, tmp_path: Path) -> None:
    file, inner = tmp_path / "backup", opened(tmp_path / "store")
    store: LocalStore = inner
    if keys is not None:
        inner.set_key_checks(keys.first_check)
        store = EncryptedStore(inner, Sealer(keys))
    sessions = [Windowed(name) for name in ("a", "b", LONG_ID)]
    begin(store, *sessions)
    path = inner.path
    for _ in range(9):
        step(store, *sessions)
        path = crash_copy(inner)  # LMDB opens no store twice in a process
        found = verification.verify(path, keys)
        assert (found.problems, found.sessions) == ([], 3)
    summary = backup.back_up(path, file, CLOCK)
    assert (summary.sessions, summary.damaged) == (3, 0)
    assert verification.verify_backup(file, keys).problems == []
    given = None if is_moved and keys is not None else keys
    restored = backup.restore(file, tmp_path / "restored", CLOCK, given, moved=is_moved)
    assert (restored.sessions, restored.damaged) == (3, 0)
    assert verification.verify(tmp_path / "restored", keys).problems == []
    again: LocalStore = opened(tmp_path / "restored")
    if keys is not None:
        again = EncryptedStore(again, Sealer(keys))
    for each in sessions:
        each.revision += restored.first_revision
    assert [
        decode_header(each.session_id, found.record or b"").revision
        for each, found in zip(sessions, fetched(again, [each.session_id for each in sessions]), strict=True)
    ] == [each.revision for each in sessions]
    for each in sessions:
        each.revision -= restored.first_revision
    repair.repair(path, CLOCK)
    repaired: LocalStore = opened(path)
    if keys is not None:
        repaired = EncryptedStore(repaired, Sealer(keys))
    require(repaired, *sessions)
    repaired.close()
    other = Keyring({"new": bytes(range(1, 33)), **({} if keys is None else {"k": bytes(range(32))})})
    assert repair.rekey(path, CLOCK, other).damaged == 0
    require(EncryptedStore(opened(path), Sealer(other)), *sessions)


def test_heads_count_what_a_change_leaves_out() -> None:
    session = Windowed("s")
    whole, change = session.whole, session.step()
    (before,), (after,) = heads_of([b"s"], [whole]).byte_counts, heads_of([b"s"], [change]).byte_counts
    assert before == after


def test_changes_that_are_laid_out_together_are_encrypted_as_each_alone() -> None:
    sealer, ids, field = Sealer(KEYS), ["a", "b", LONG_ID], field_of(windows(1), 1)
    template = RecordTemplate(
        ids, Texts("f" * 8, "m"), (1, 50), opened_with=7, created=1.0, fields=[field] * len(ids)
    )
    template.set_schema(CHANGE_VERSION)
    template.rows[:] = np.random.default_rng(1).integers(256, size=template.rows.shape)
    puts = template.fill(revisions=3, positions=3, request_ids=0, last_used=2.0, replies=0)
    plain = [bytes(record) for _, record in puts]
    for (session_id, sealed), one in zip(sealer.seal(puts), plain, strict=True):
        assert is_change(sealed)
        assert key_id_of(sealed) == "k"
        assert sealer.open(session_id, sealed) == one
        assert sealer.open(session_id, sealer.seal([(session_id, one)])[0][1]) == one


def test_a_store_of_the_last_version_is_checked_as_it_is_and_taken_over(tmp_path: Path) -> None:
    path, session = tmp_path / "store", Windowed("a")
    store = opened(path)
    begin(store, session)
    store.close()

    def schema(value: bytes = b"") -> bytes:
        with lmdb.open(str(path / "sessions"), max_dbs=6) as environment:
            meta_db = environment.open_db(b"meta")
            with environment.begin(write=True) as transaction:
                if value:
                    transaction.put(meta.SCHEMA, value, db=meta_db)
                    transaction.drop(environment.open_db(NAME, txn=transaction))
                return bytes(transaction.get(meta.SCHEMA, b"", db=meta_db))

    old = b"%d" % meta.OLDEST_VERSION
    schema(old)
    found = verification.verify(path, None)
    assert (found.problems, found.sessions) == ([], 1)
    assert schema() == old
    again = opened(path)
    require(again, session)
    step(again, session)
    require(again, session)
    again.close()
    assert schema() == b"%d" % meta.SCHEMA_VERSION


def test_a_backup_of_the_last_format_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, session, file = opened(tmp_path / "store"), Windowed("a"), tmp_path / "backup"
    begin(store, session)
    with monkeypatch.context() as patch:
        patch.setattr(backup_file, "FORMAT", backup_file.FORMAT._replace(number=backup_file.FORMAT.oldest))
        backup.back_up(crash_copy(store), file, CLOCK)
    assert file.read_bytes().startswith(b"stepwell backup 5\n")
    assert backup.restore(file, tmp_path / "restored", CLOCK, None, moved=True).sessions == 1
    require(opened(tmp_path / "restored"), session)
    data = file.read_bytes().replace(b"stepwell backup 5\n", b"stepwell backup 4\n", 1)
    file.write_bytes(data)
    with pytest.raises(backup_file.BackupError, match="of format 6; it is of 4"):
        backup.restore(file, tmp_path / "none", CLOCK, None, moved=True)
