"""Encryption at rest: nobody reads a state without the key, and nobody is given another one than was stored."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from stepwell_server.errors import StateCorrupt
from stepwell_server.store import record as records
from stepwell_server.store import repair
from stepwell_server.store.base import Batch, KeyFileError, LocalStore
from stepwell_server.store.encryption import xaes
from stepwell_server.store.encryption.keyring import Keyring, add_key, read_keys
from stepwell_server.store.encryption.sealer import Sealer
from stepwell_server.store.encryption.store import EncryptedStore
from stepwell_server.store.factory import encrypted, open_store
from stepwell_server.store.fields import VERSION, pack_fields
from stepwell_server.store.memory import MemoryStore
from stepwell_server.store.record import JoinedPuts, RecordBytes, decode_many
from support.clock import ManualClock
from support.stores.disk_store import crash_copy, opened, template, wal_of
from support.stores.records import Record, decode

SECRET = b"the state of somebody: "
LONG = "é" * 256
KEYS = {"new": b"\1" * 32, "old": b"\2" * 32}


def test_the_cipher_is_that_of_its_specification() -> None:
    nonce = b"ABCDEFGHIJKLMNOPQRSTUVWX"
    for key, known, sealed in (
        (b"\1", b"", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"),
        (b"\3", b"c2sp.org/XAES-256-GCM", "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"),
    ):
        cipher = xaes.Key(key * 32).derive(nonce)
        assert cipher.encrypt(xaes.rest_of(nonce), b"XAES-256-GCM", known).hex() == sealed


def a_record(session_id: str, revision: int = 0, *, fields: Mapping[int, bytes] | None = None) -> bytes:
    """A record with a state and a reply that can be recognised."""
    made = Record(
        fingerprint="f" * 8, model="m", batch_size=2, revision=revision, position=revision, request_id=5, opened_with=6,
        created=1.0, last_used=2.0, reply=1, rows=SECRET + bytes([revision]), extra=b"reply: " + SECRET,
        fields=pack_fields(fields or {}),
    )  # fmt: skip
    return made.encode(session_id)


def kept(store: LocalStore) -> dict[str, bytes]:
    ids = [key.decode() for key in store.heads(limit=1000).keys]
    found = store.get_many(ids)
    assert found == [store.get(i) for i in ids]
    return {i: bytes(record) for i, record in zip(ids, found, strict=True) if record is not None}


def in_files(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def test_records_are_unchanged_and_no_file_contains_a_state(tmp_path: Path) -> None:
    disk = opened(tmp_path / "data")
    store = encrypted(disk, Keyring(KEYS))
    fields = {VERSION: bytes(16), 7: b"later"}
    first = {i: a_record(i, fields=fields if i == "b" else None) for i in ("a", "b", LONG)}
    store.commit(Batch(puts=list(first.items()), counts=[("m", 3)]))
    group = [f"g{n}" for n in range(20)]
    store.commit(Batch(puts=template(group), counts=[("m", 20)]))
    assert kept(store) == first | {i: bytes(r) for i, r in template(group)}
    # changes of a group and of others, written to the log together; then one alone
    later = {"a": a_record("a", 1), LONG: a_record(LONG, 1)}
    store.commit(Batch(puts=JoinedPuts([template(group, 3), list(later.items())])))
    store.commit(Batch(puts=[("b", a_record("b", 9, fields=fields))]))
    expected = {**first, **later, "b": a_record("b", 9, fields=fields)}
    expected |= {i: bytes(r) for i, r in template(group, 3)}
    assert kept(store) == expected
    assert not wal_of(disk).is_empty
    heads = store.heads(limit=100)
    assert heads.heads["revision"].tolist() == [
        header.revision
        for key in heads.keys
        if (header := records.header_or_none(key.decode(), disk.get(key.decode()) or b""))
    ]
    assert {heads.keys[place]: own for place, own in heads.fields.items()} == {b"b": pack_fields(fields)}
    assert set(heads.models) == {"m"}
    with pytest.raises(StateCorrupt, match="is encrypted with key 'new', and this server has no key"):
        decode("a", disk.get("a") or b"")
    copy = crash_copy(disk)
    store.close()
    assert SECRET[:12] not in in_files(copy) + in_files(tmp_path / "data")
    disk = opened(copy)
    store = encrypted(disk, Keyring({"newest": b"\3" * 32, **KEYS}))
    assert kept(store) == expected, "after kill -9, and when another key encrypts"
    store.commit(Batch(puts=[("a", a_record("a", 2))]))
    assert records.key_id_of(disk.get("a") or b"") == "newest"
    store.close()


def test_an_existing_store_is_encrypted_gradually(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    disk.commit(Batch(puts=[(i, a_record(i)) for i in "ab"], counts=[("m", 2)]))
    store = encrypted(disk, Keyring(KEYS))
    store.commit(Batch(puts=[("a", a_record("a", 1))]))
    assert kept(store) == {"a": a_record("a", 1), "b": a_record("b")}
    assert [records.key_id_of(disk.get(i) or b"") for i in "ab"] == ["new", None]
    store.close()


@pytest.fixture
def sealer() -> Sealer:
    return Sealer(Keyring(KEYS))


def resealed(session_id: str, record: RecordBytes, at: int) -> bytes:
    """A record of which somebody has changed a byte, and the checksum to fit."""
    changed = bytearray(record)
    changed[at] ^= 1
    return records.with_checksum(session_id, bytes(changed))


def test_no_byte_can_be_changed_and_no_record_be_anothers(sealer: Sealer) -> None:
    plain = a_record("a", 3, fields={VERSION: bytes(16)})
    ((_, sealed),) = sealer.seal([("a", plain)])
    assert sealer.open("a", sealed) == plain
    for at in range(4, len(sealed)):
        # a record that does not say that it is encrypted any more has another form, or no state
        forged = resealed("a", sealed, at)
        try:
            found = sealer.open("a", forged)
            decode("a", found)
        except StateCorrupt:
            continue
        raise AssertionError(f"byte {at} of {bytes(sealed)!r} was changed")
    with pytest.raises(StateCorrupt, match="key 'new' does not decrypt it"):
        sealer.open("b", records.with_checksum("b", sealed))
    damaged = bytes(sealed[:-1]) + bytes([sealed[-1] ^ 1])
    with pytest.raises(StateCorrupt, match="its checksum does not match"):
        sealer.open("a", damaged)
    with pytest.raises(StateCorrupt, match="encrypted with key 'new', which the key file lacks"):
        Sealer(Keyring({"x": b"\1" * 32})).open("a", sealed)
    with pytest.raises(StateCorrupt, match="key 'new' does not decrypt it"):
        Sealer(Keyring({"new": b"\3" * 32})).open("a", sealed)


def test_one_record_that_cannot_be_opened_harms_no_other(sealer: Sealer) -> None:
    memory = MemoryStore()
    memory.commit(Batch(puts=[*sealer.seal([(i, a_record(i)) for i in "abc"])]))
    memory.commit(Batch(puts=[("b", Sealer(Keyring({"x": b"\5" * 32})).seal([("b", a_record("b"))])[0][1])]))
    read = decode_many("abc", [r or b"" for r in EncryptedStore(memory, sealer).get_many("abc")])
    assert read.sound.tolist() == [0, 2]
    assert "encrypted with key 'x', and this server has no key of that id" in read.errors[1].message


def test_a_server_that_knows_no_encryption_refuses_the_record(
    sealer: Sealer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((_, sealed),) = sealer.seal([("a", a_record("a"))])
    assert records.header_or_none("a", sealed) is not None
    monkeypatch.setattr(records, "KNOWN_TAGS", frozenset({VERSION}))
    with pytest.raises(StateCorrupt):
        decode("a", sealed)
    assert records.header_or_none("a", sealed) is None


def test_nonces_are_never_repeated(sealer: Sealer) -> None:
    ids = [f"s{n}" for n in range(50)]
    sealed = [
        r for _ in range(20) for _, r in sealer.seal(JoinedPuts([template(ids), [("a", a_record("a"))]]))
    ]
    nonces = [bytes(r[records.fields_at(r) + 4 :][: xaes.NONCE_BYTES]) for r in sealed]
    assert len(set(nonces)) == len(nonces) == 20 * 51


# ------------------------------------------------------------------------------------------------------------- keys


def test_a_new_key_encrypts_and_those_of_before_stay(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    add_key(file, "2026")
    assert file.stat().st_mode & 0o777 == 0o600
    before = read_keys(file)
    file.write_text("# of the year\n\n" + file.read_text() + f"hex = {'0a' * 32}\n")
    add_key(file, "2027")
    ring = read_keys(file)
    assert (ring.first, list(ring.keys)) == ("2027", ["2027", "2026", "hex"])
    assert ring.checks["2026"] == before.checks["2026"]
    with pytest.raises(KeyFileError, match="already has a key 2027"):
        add_key(file, "2027")
    with pytest.raises(KeyFileError, match=r"an id must be 1 to 32 letters.*; got 'a b'"):
        add_key(file, "a b")


BAD_FILES = {
    "": "must have at least one key; stepwell store new-key",
    "a": r"line 1: a line must be ID = KEY",
    "none": "must have at least one key",
    f"a = {'00' * 32}\nnone": r"line 2: a line must be ID = KEY \(or none, before all keys\)",
    "\n-a = b": r"line 2: a line must be ID = KEY .*, and an id must be 1 to 32",
    "a = secret": r"line 1: key a must be 32 bytes, as base64 or as 64 hex digits$",
    f"a = {'0' * 62}": r"key a must be 32 bytes",
    f"a = {'00' * 32}\na = {'11' * 32}": "line 2: ids of keys must be unique; a is repeated",
    f"a = {'00' * 32}\nb = {'00' * 32}": "must differ; two are the same",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_invalid_key_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.touch(0o600)
    file.write_text(text)
    with pytest.raises(KeyFileError, match=BAD_FILES[text]) as caught:
        read_keys(file)
    assert re.search(re.escape(str(file)), str(caught.value))
    assert "secret" not in str(caught.value)


def test_a_key_file_is_there_and_private(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="must be readable: No such file"):
        read_keys(tmp_path / "keys")
    add_key(tmp_path / "keys", "a")
    (tmp_path / "keys").chmod(0o644)
    with pytest.raises(KeyFileError, match="0644"):
        read_keys(tmp_path / "keys")


def test_a_store_opens_with_all_its_keys_only(tmp_path: Path) -> None:
    def start(keys: str | None) -> None:
        file = tmp_path / "keys"
        if keys is not None:
            file.touch(0o600)
            file.write_text(
                "\n".join(f"{key} = {zlib.crc32(key.encode()) % 100:064d}" for key in keys.split())
            )
        store = open_store(
            "disk",
            data_dir=tmp_path / "data",
            durability="async",
            clock=ManualClock(),
            key_file=None if keys is None else file,
        )
        assert store.local is not None
        store.local.close()

    start(None)
    start("a")
    start("b a")
    with pytest.raises(KeyFileError, match="is encrypted with keys a, b: give the key file"):
        start(None)
    with pytest.raises(KeyFileError, match=r"it lacks a$"):
        start("b")
    (tmp_path / "keys").write_text(f"b = {'0b' * 32}\na = {'0a' * 32}")
    with pytest.raises(KeyFileError, match=r"key [ab] must be the key"):
        open_store(
            "disk",
            data_dir=tmp_path / "data",
            durability="async",
            clock=ManualClock(),
            key_file=tmp_path / "keys",
        )
    start("c b a")


def test_with_none_keys_decrypt_and_nothing_is_encrypted(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    add_key(file, "a", is_last=True)
    assert file.read_text().startswith("none\na = ")
    waiting = read_keys(file)
    assert (waiting.first, waiting.first_check, list(waiting.keys)) == ("", {}, ["a"])
    with pytest.raises(KeyFileError, match="must not begin with none"):
        add_key(file, "b")
    add_key(file, "b", is_last=True)
    file.write_text(file.read_text().removeprefix("none\n"))
    ring = read_keys(file)
    assert (ring.first, list(ring.keys)) == ("a", ["a", "b"])
    disk = opened(tmp_path / "data")
    encrypted(disk, waiting).commit(Batch(puts=[("x", a_record("x"))], counts=[("m", 1)]))
    assert not disk.key_checks
    encrypted(disk, ring).commit(Batch(puts=[("y", a_record("y"))], counts=[("m", 1)]))
    assert kept(encrypted(disk, waiting)) == {"x": a_record("x"), "y": a_record("y")}
    assert records.key_id_of(disk.get("x") or b"") is None
    assert records.key_id_of(disk.get("y") or b"") == "a"
    disk.close()
    with pytest.raises(KeyFileError, match="must begin with the new key"):
        repair.rekey(tmp_path / "data", ManualClock(), waiting)
    assert repair.rekey(tmp_path / "data", ManualClock(), waiting, decrypt=True).sessions == 2
