"""The stored form of a session."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell_server.core.idle import MAX_IDLE_MS
from stepwell_server.errors import StateCorrupt
from stepwell_server.store.fields import CRITICAL, pack_fields, unpack_fields
from stepwell_server.store.heads import heads_of
from stepwell_server.store.record import (
    HEADER,
    MAX_BATCH_SIZE,
    MAX_COUNTER,
    MAX_TIME,
    Header,
    RecordBytes,
    RecordTemplate,
    Texts,
    decode_header,
    decode_many,
    header_or_none,
    is_sound,
    size_of,
    supersedes,
    with_checksum,
)
from support.stores.records import Record, decode

U64 = st.integers(0, 2**64 - 1)
COUNTERS = st.integers(0, MAX_COUNTER)
TIMES = st.floats(0, MAX_TIME, exclude_max=True)
TEXT = st.text(max_size=40)

OPTIONAL = st.dictionaries(st.integers(0, CRITICAL - 1), st.binary(max_size=30), max_size=3)

records = st.builds(
    Record,
    fingerprint=TEXT,
    model=TEXT,
    batch_size=st.integers(1, MAX_BATCH_SIZE),
    revision=COUNTERS,
    position=COUNTERS,
    request_id=U64,
    opened_with=U64,
    created=TIMES,
    last_used=TIMES,
    reply=st.integers(0, 255),
    digest=U64,
    opened_digest=U64,
    max_idle_ms=st.integers(0, MAX_IDLE_MS),
    rows=st.binary(max_size=200),
    extra=st.binary(max_size=50),
    fields=OPTIONAL.map(pack_fields),
)


def a_record(**changed: Any) -> Record:
    record = Record(
        fingerprint="f" * 64,
        model="forecast",
        batch_size=1,
        revision=3,
        position=7,
        request_id=2**64 - 1,
        opened_with=5,
        created=1.5,
        last_used=2.5,
        reply=1,
        digest=8,
        opened_digest=9,
        max_idle_ms=60_000,
        rows=bytes(range(40)),
        extra=b"more",
    )
    return dataclasses.replace(record, **changed)


def resealed(session_id: str, stored: bytes, schema: int) -> bytes:
    """The record with another schema version and a checksum that fits."""
    body = schema.to_bytes(2, "little") + stored[6:]
    return zlib.crc32(body, zlib.crc32(session_id.encode())).to_bytes(4, "little") + body


@given(st.text(), records)
def test_encoded_records_are_read_back(session_id: str, record: Record) -> None:
    assert decode(session_id, record.encode(session_id)) == record


@given(records)
def test_a_header_can_be_read_alone(record: Record) -> None:
    header = decode_header("s", record.encode("s"))
    assert header == Header(**{name: getattr(record, name) for name in Header.__slots__})


@settings(max_examples=30)
@given(st.lists(records, min_size=1, max_size=8), st.integers(0, 20), TEXT, TEXT)
def test_many_are_encoded_as_each_alone(
    found: list[Record], row_bytes: int, fingerprint: str, model: str
) -> None:
    found = [
        dataclasses.replace(
            r,
            fingerprint=fingerprint,
            model=model,
            batch_size=1,
            rows=bytes([i] * row_bytes),
            extra=b"",
            fields=b"",
        )
        for i, r in enumerate(found)
    ]
    ids = [f"session-{i}" for i in range(len(found))]
    many = _encode_many(ids, found)
    assert [bytes(m) for m in many] == [r.encode(i) for i, r in zip(ids, found, strict=True)]


def test_none_at_all_can_be_encoded_and_decoded() -> None:
    assert _encode_many([], []) == []
    read = decode_many([], [])
    assert (len(read.sound), len(read.heads), read.rows) == (0, 0, b"")


@given(st.lists(records, max_size=6), st.data())
def test_many_are_read_back_as_each_alone(found: list[Record], data: st.DataObject) -> None:
    ids = [f"s{i}" for i in range(len(found))]
    stored = [r.encode(i) for i, r in zip(ids, found, strict=True)]
    broken = data.draw(st.sets(st.sampled_from(range(len(found))))) if found else set()
    read = decode_many(ids, [s[:-1] if i in broken else s for i, s in enumerate(stored)])
    kept = [i for i in range(len(found)) if i not in broken]
    assert read.sound.tolist() == kept
    assert read.heads["revision"].tolist() == [found[i].revision for i in kept]
    assert read.fingerprints == [found[i].fingerprint for i in kept]
    assert read.rows == b"".join(found[i].rows for i in kept)
    assert read.extras == {i: found[i].extra for i in kept if found[i].extra}
    assert set(read.errors) == broken
    assert all(f"'s{i}'" in error.message for i, error in read.errors.items())


def test_a_change_of_any_byte_is_found() -> None:
    stored = a_record().encode("s")
    for at in range(len(stored)):
        for change in (0x01, 0x80, 0xFF):
            damaged = bytearray(stored)
            damaged[at] ^= change
            for read in (decode, decode_header):
                with pytest.raises(StateCorrupt, match="session 's' must be intact"):
                    read("s", damaged)


def test_a_record_that_was_cut_off_or_grew_is_damaged() -> None:
    stored = a_record().encode("s")
    for length in range(len(stored)):
        with pytest.raises(StateCorrupt, match="session 's'"):
            decode("s", stored[:length])
    with pytest.raises(StateCorrupt, match="checksum"):
        decode("s", stored + b"\0")


def test_a_record_of_another_session_is_damaged() -> None:
    with pytest.raises(StateCorrupt, match="session 'b'"):
        decode("b", a_record().encode("a"))


def test_a_record_of_a_later_schema_version_is_refused() -> None:
    later = resealed("s", a_record().encode("s"), 6)
    with pytest.raises(StateCorrupt, match="schema version is 6, this server reads 4: a later server") as e:
        decode("s", later)
    assert is_sound("s", later), "it is as that server wrote it"
    assert e.value.metadata == {"session_id": "s"}
    with pytest.raises(
        StateCorrupt, match=r"schema version is 0, this server reads 4: an earlier server wrote it"
    ):
        decode("s", resealed("s", later, 0))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="too large to be stored"):
        a_record(fingerprint="f" * 256).encode("s")


#: What servers wrote that knew no idle limits.
WRITTEN_BY_SCHEMA_3 = bytes.fromhex(
    "fc3f229d030001280700000000000000090000000000000005000000000000000600000000000000000000000000f83f"
    "000000000000044008000000000000000900000000000000010000002800000004000000080000006666666666666666"
    "6666666666666666666666666666666666666666666666666666666666666666666f7265636173740001020304050607"
    "08090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20212223242526276d6f7265"
)


def test_a_record_of_an_earlier_schema_is_refused() -> None:
    for read in (decode, decode_header):
        with pytest.raises(StateCorrupt, match="schema version is 3, this server reads 4: an earlier server"):
            read("s", WRITTEN_BY_SCHEMA_3)


def test_fields_that_are_not_known_go_along() -> None:
    fields = pack_fields({7: b"", 2: b"tenant", CRITICAL - 1: bytes(300)})
    stored = a_record(fields=fields).encode("s")
    assert size_of(stored) == len(stored)
    read = decode("s", stored)
    assert unpack_fields(read.fields) == {2: b"tenant", 7: b"", CRITICAL - 1: bytes(300)}
    assert read.encode("s") == stored
    assert decode_header("s", stored).fields == fields
    later = a_record(fields=fields, revision=4).encode("s")
    assert supersedes(later, stored)
    many = decode_many(["s", "s"], [stored, a_record().encode("s")])
    assert (many.rows, many.extras) == (a_record().rows * 2, {0: b"more", 1: b"more"})


def test_a_critical_field_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = a_record(fields=pack_fields({1: b"n", 9 | CRITICAL: b"key"})).encode("s")
    for read in (decode, decode_header):
        with pytest.raises(
            StateCorrupt, match="critical field 0x8009, which this server does not know: a later"
        ):
            read("s", stored)
    assert list(decode_many(["s"], [stored]).errors) == [0]
    assert is_sound("s", stored), "it is as that server wrote it"
    monkeypatch.setattr("stepwell_server.store.record.KNOWN_TAGS", frozenset({9 | CRITICAL}))
    assert unpack_fields(decode("s", stored).fields)[9 | CRITICAL] == b"key"


@pytest.mark.parametrize("fields", [b"\1", b"\1\0\5", b"\1\0\5\0four", b"\1\0\0\0\2"])
def test_fields_that_make_no_sense_are_damage(fields: bytes) -> None:
    with pytest.raises(ValueError, match="must have"):
        unpack_fields(fields)
    with pytest.raises(StateCorrupt, match="'s' must be intact: "):
        decode("s", a_record(fields=fields).encode("s"))


@pytest.mark.parametrize("fields", [{65536: b""}, {-1: b""}, {1: bytes(65536)}])
def test_fields_that_do_not_fit_are_refused(fields: dict[int, bytes]) -> None:
    with pytest.raises(ValueError, match="must have tags and lengths below 65536"):
        pack_fields(fields)
    with pytest.raises(ValueError, match="too large to be stored"):
        a_record(fields=bytes(65536)).encode("s")


def test_the_header_has_no_gaps() -> None:
    assert HEADER.itemsize == 96


def _encode_many(ids: list[str], found: list[Record]) -> list[RecordBytes]:
    def column(name: str, dtype: type[np.generic]) -> Any:
        return np.array([getattr(r, name) for r in found], dtype)

    first = found[0] if found else a_record()
    template = RecordTemplate(
        ids,
        Texts(first.fingerprint, first.model),
        (1, len(first.rows)),
        opened_with=column("opened_with", np.uint64),
        opened_digest=column("opened_digest", np.uint64),
        max_idle_ms=column("max_idle_ms", np.int64),
        created=column("created", np.float64),
    )
    template.rows[...] = np.array([list(r.rows) for r in found], np.uint8).reshape(
        len(found), len(first.rows)
    )
    puts = template.fill(
        revisions=column("revision", np.uint64),
        positions=column("position", np.uint64),
        request_ids=column("request_id", np.uint64),
        last_used=column("last_used", np.float64),
        replies=column("reply", np.uint8),
        digests=column("digest", np.uint64),
    )
    assert [session_id for session_id, _ in puts] == ids
    return [record for _, record in puts]


def test_a_template_is_filled_again_and_again_and_says_what_it_was_given_last() -> None:
    rng = np.random.default_rng(3)
    template = RecordTemplate(["a", "b", "c"], Texts("f", "m"), (2, 5), opened_with=9, created=1.5)
    for revision in range(3):
        rows = rng.integers(0, 256, (3, 10), np.uint8)
        template.rows[...] = rows
        positions = rng.integers(0, 99, 3).astype(np.uint64)
        puts = template.fill(revisions=revision, positions=positions, request_ids=4, last_used=2.5, replies=1)
        for (session_id, stored), row, position in zip(puts, rows, positions.tolist(), strict=True):
            found = decode(session_id, bytes(stored))
            assert (found.revision, found.position, found.rows) == (revision, position, row.tobytes())
            assert (found.opened_with, found.created, found.last_used) == (9, 1.5, 2.5)
            assert (found.batch_size, found.request_id, found.reply) == (2, 4, 1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"created": math.nan},
            "created and last_used are nan and 2.5, not seconds of the years 1970 to 9999",
        ),
        ({"last_used": math.inf}, "created and last_used are 1.5 and inf"),
        ({"created": -0.5}, "created and last_used are -0.5"),
        ({"created": MAX_TIME}, "created and last_used are 253402300800.0"),
        ({"max_idle_ms": MAX_IDLE_MS + 1}, "its max_idle_ms is 315360000001, more than 315360000000"),
        ({"position": 2**63}, "its revision and position are 3 and 9223372036854775808, more than"),
        ({"revision": 2**64 - 1}, "its revision and position are 18446744073709551615"),
        ({"batch_size": 0}, "its batch_size is 0, not 1 to 2147483647"),
        ({"rows_bytes": 41}, "its parts have"),
        ({"extra_bytes": 0}, "its parts have"),
        ({"fields_bytes": 2**16 - 1}, "its parts have"),
        ({"model_bytes": 2**16 - 1}, "its parts have"),
        ({"fingerprint_bytes": 65, "model_bytes": 7}, "its fingerprint is no UTF-8: unexpected end of data"),
    ],
)
def test_a_record_that_no_session_can_have_is_damaged(changes: dict[str, float], problem: str) -> None:
    """Whoever makes a record can make its checksum, too."""
    stored = bytearray(a_record(model="\u00e9abcdef").encode("s"))
    heads = np.frombuffer(stored, HEADER, 1)
    for name, value in changes.items():
        heads[name] = value
    forged = with_checksum("s", stored)
    assert not is_sound("s", forged)
    assert header_or_none("s", forged) is None
    with pytest.raises(StateCorrupt) as caught:
        decode_header("s", forged)
    assert problem in caught.value.message
    (error,) = decode_many(["s"], [forged]).errors.values()
    assert error.message == caught.value.message


def test_heads_of_records_that_no_session_can_have_are_read_to_their_end() -> None:
    """Lists read heads that nobody has checked: they must neither go on for ever nor sort by what has no order."""
    stored = [a_record().encode(name) for name in "abc"]
    forged = bytearray(stored[1])
    head = np.frombuffer(forged, HEADER, 1)
    head["created"], head["last_used"], head["fingerprint_bytes"] = math.nan, -math.inf, 255
    head["model_bytes"] = head["fields_bytes"] = 2**16 - 1
    for some in ([stored[0], forged, stored[2]], [forged], [forged[:80], forged[:20], stored[0]]):
        found = heads_of([b"%d" % place for place in range(len(some))], [bytes(one) for one in some])
        assert len(found.model) == len(some)
        assert np.isfinite(found.heads["created"]).all()
        assert np.isfinite(found.heads["last_used"]).all()
        assert "forecast" in found.models or some[0] is forged
