"""The binary format of a stored session: a fixed-size header, two texts, the rows, the arrays of a long reply, and fields.

    checksum, schema, reply, lengths, revision, ... | fingerprint | model | rows | extra | fields

All numbers are little-endian. The checksum is CRC-32 (as in zlib): it detects every change of up to 32 adjacent bits,
and all but one in 4 billion of other changes. ISA-L computes it several times faster than zlib. It is seeded with the
session's id, so that a record under another id counts as corrupt. All schema versions have checksum and schema at the
same place, so that a record of a later version can be distinguished from a corrupt one.

The extension fields (`fields`) allow later servers to store more than the columns of the header.

A change has the same format, and only a part of the rows. A stored value is a record, or a change followed by the earlier
records that complete it, the oldest first: see `changes`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from isal.isal_zlib import crc32

from stepwell_server.core.idle import MAX_IDLE_MS
from stepwell_server.errors import StateCorrupt
from stepwell_server.store.fields import (
    CRITICAL,
    FIELD,
    FIELD_HEAD,
    KEY_ID_AT,
    KNOWN_TAGS,
    SEAL,
    unpack_fields,
)

SCHEMA_VERSION, CHANGE_VERSION = 4, 5
"""The schema versions of records and of changes (`changes`); others are refused."""
MAX_COUNTER = 2**63 - 1
"""The maximum of revisions and positions, as many clients read them as signed integers."""
MAX_BATCH_SIZE = 2**31 - 1
MAX_TIME = 253_402_300_800.0
"""The end of the year 9999 in seconds since the epoch: the upper bound of times in records."""

RecordBytes = bytes | bytearray | memoryview
"""An encoded record."""

HEADER = np.dtype(
    [
        ("checksum", "<u4"),
        ("schema", "<u2"),
        ("reply", "u1"),
        ("fingerprint_bytes", "u1"),
        ("revision", "<u8"),
        ("position", "<u8"),
        ("request_id", "<u8"),
        ("opened_with", "<u8"),
        ("created", "<f8"),
        ("last_used", "<f8"),
        ("digest", "<u8"),
        ("opened_digest", "<u8"),
        ("max_idle_ms", "<u8"),
        ("batch_size", "<u4"),
        ("rows_bytes", "<u4"),
        ("extra_bytes", "<u4"),
        ("model_bytes", "<u2"),
        ("fields_bytes", "<u2"),
    ]
)
_STRUCT = struct.Struct("<IHBBQQQQddQQQIIIHH")  # the same, for a single record
_NAMES = HEADER.names or ()
_FINGERPRINT, _MODEL, _ROWS, _EXTRA, _FIELDS = (
    _NAMES.index(f"{part}_bytes") for part in ("fingerprint", "model", "rows", "extra", "fields")
)
_SCHEMA, _BATCH_SIZE = _NAMES.index("schema"), _NAMES.index("batch_size")
_START = struct.Struct("<IH")
_LENGTH = struct.Struct("<H")
#: The number of cached encoded ids, for sessions that change repeatedly.
_IDS_KNOWN = 16_384
_REVISION, _REVISION_AT = struct.Struct("<Q"), 8
_MAX_IDLE, _MAX_IDLE_AT = struct.Struct("<Q"), HEADER.fields["max_idle_ms"][1]  # type: ignore[index]
_CHECKSUM_BYTES = 4

U64 = npt.NDArray[np.uint64]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The metadata of a session in its record."""

    fingerprint: str
    """The fingerprint of the model that the rows belong to."""
    model: str
    """The name of the model."""
    batch_size: int
    revision: int
    position: int
    request_id: int
    """The request id of the last change; 0: none."""
    opened_with: int
    """The request id of the call that opened the session, or a random number: see `SessionInfo.uid`."""
    created: float
    """Seconds since the epoch."""
    last_used: float
    """Seconds since the epoch."""
    reply: int
    """How the reply to the last change is stored: see the engine's `Kept`."""
    digest: int = 0
    """The digest of the last change's request (`core.exactly_once`); 0: none."""
    opened_digest: int = 0
    """The same for the call that opened the session."""
    max_idle_ms: int = 0
    """How long it may be unused; 0: no limit of its own. See `core.idle`."""
    fields: bytes = b""
    """Extension fields, as encoded by `pack_fields`; they are written back unchanged."""
    state_bytes: int = dataclasses.field(default=0, compare=False)
    """The size of the rows and the arrays of a reply."""


class Texts:
    """The texts in the records of a model."""

    __slots__ = ("data", "fingerprint_bytes", "model_bytes")

    def __init__(self, fingerprint: str, model: str) -> None:
        self.fingerprint_bytes, self.model_bytes = len(fingerprint.encode()), len(model.encode())
        self.data = (fingerprint + model).encode()


def encode(
    session_id: str,
    texts: Texts,
    *,
    reply: int,
    revision: int,
    position: int,
    request_id: int,
    opened_with: int,
    created: float,
    last_used: float,
    batch_size: int,
    rows: bytes,
    digest: int = 0,
    opened_digest: int = 0,
    max_idle_ms: int = 0,
    extra: bytes = b"",
    fields: bytes = b"",
    schema: int = SCHEMA_VERSION,
) -> bytes:
    """Encode a record, bound to the session's id; see `Header` for the values.

    `rows` are the concatenated rows of the session, each in the layout of `Arena.pack`; `extra` holds the arrays
    of a reply of several time steps and is opaque here. `schema` is that of a record or of a change.

    Raises:
        ValueError: a part is too large to be stored.
    """
    try:
        head = _STRUCT.pack(
            0, schema, reply, texts.fingerprint_bytes,
            revision, position, request_id, opened_with, created, last_used, digest, opened_digest,
            max_idle_ms, batch_size, len(rows), len(extra), texts.model_bytes, len(fields),
        )  # fmt: skip
    except struct.error as error:
        raise ValueError(f"a part of session {session_id!r} is too large to be stored: {error}") from error
    body = b"".join((head[_CHECKSUM_BYTES:], texts.data, rows, extra, fields))
    return crc32(body, _encoded(session_id)[1]).to_bytes(_CHECKSUM_BYTES, "little") + body


def encode_ids(session_ids: Sequence[str]) -> bytes:
    """Encode ids, each as its length in bytes (u2) and UTF-8."""
    return b"".join([_encoded(session_id)[0] for session_id in session_ids])


class Puts(Sequence[tuple[str, RecordBytes]]):
    """Ids and records in one buffer, which may be filled and put repeatedly."""

    def __init__(self, session_ids: Sequence[str], sizes: Sequence[int], together: RecordBytes) -> None:
        self.session_ids = session_ids
        self.sizes = sizes
        """The size of each record in bytes."""
        self.together = memoryview(together)
        """All records, concatenated."""
        self.checksums = b""
        """The records' checksums, four bytes each."""

    def __len__(self) -> int:
        return len(self.session_ids)

    def __getitem__(self, index: Any) -> Any:
        """Return an item or slice, as a list does."""
        return self._all[index]

    def __iter__(self) -> Iterator[tuple[str, RecordBytes]]:
        if len(self.session_ids) == 1:  # a lone step: a cached list costs more
            return iter(((self.session_ids[0], self.together),))
        return iter(self._all)

    @functools.cached_property
    def _all(self) -> list[tuple[str, RecordBytes]]:
        whole, ends = self.together, itertools.accumulate(self.sizes)
        return [
            (session_id, whole[end - size : end])
            for session_id, size, end in zip(self.session_ids, self.sizes, ends, strict=True)
        ]

    @functools.cached_property
    def encoded_ids(self) -> bytes:
        """The result of `encode_ids`, cached for sessions that repeatedly change together."""
        return encode_ids(self.session_ids)

    @functools.cached_property
    def keys(self) -> list[bytes]:
        """The ids as UTF-8."""
        return [session_id.encode() for session_id in self.session_ids]

    @functools.cached_property
    def seeds(self) -> list[int]:
        """The seed of each record's checksum."""
        return [crc32(key) for key in self.keys]

    def with_checksums(self, sizes: Sequence[int], together: memoryview, checksums: bytes) -> Puts:
        """Return other records of the same sessions."""
        puts = Puts(self.session_ids, sizes, together)
        puts.checksums, puts.encoded_ids = checksums, self.encoded_ids
        return puts


class JoinedPuts(Sequence[tuple[str, RecordBytes]]):
    """The ids and records of several changes as one sequence."""

    def __init__(self, parts: Sequence[Sequence[tuple[str, RecordBytes]]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        """Return the number of records."""
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[tuple[str, RecordBytes]]:
        """Iterate over all records."""
        return itertools.chain.from_iterable(self.parts)

    def __getitem__(self, index: Any) -> Any:
        """Return an item or slice, as a list does."""
        return list(self)[index]


class RecordTemplate:
    """The records of sessions of one model and batch size, laid out once and filled whenever they change.

    All must have the same length of extension fields. Use `encode` for other sessions.

    `fill` returns views of the template, valid until the next `fill`. For one thread at a time.
    """

    def __init__(
        self,
        session_ids: Sequence[str],
        texts: Texts,
        shape: tuple[int, int],
        *,
        opened_with: U64 | int,
        opened_digest: U64 | int = 0,
        max_idle_ms: npt.NDArray[np.int64] | int = 0,
        created: F64 | float,
        fields: Sequence[bytes] = (),
    ) -> None:
        """Lay out n records. Values that are constant from the opening on are `(n,)` arrays, or one for all.

        Args:
            session_ids: n ids.
            texts: the texts of their model.
            shape: the batch size and the size of a row as packed by `Arena.pack`.
            opened_with: see `Header`.
            opened_digest: see `Header`.
            max_idle_ms: see `Header`.
            created: see `Header`.
            fields: the extension fields of each; empty: none.
        """
        batch_size, row_bytes = shape
        text = np.frombuffer(texts.data, np.uint8)
        start = HEADER.itemsize + len(text)
        end = start + batch_size * row_bytes
        size = end + (len(fields[0]) if fields else 0)
        buffer = np.zeros((len(session_ids), size), np.uint8)
        buffer[:, HEADER.itemsize : start] = text
        self.rows: U8 = buffer[:, start:end]
        """`(n, batch_size * row_bytes)`, to be written before `fill`."""
        heads = self._heads = buffer[:, : HEADER.itemsize].view(HEADER)[:, 0]
        heads["schema"], heads["batch_size"] = SCHEMA_VERSION, batch_size
        if fields:
            buffer[:, end:] = np.frombuffer(b"".join(fields), np.uint8).reshape(len(session_ids), -1)
            heads["fields_bytes"] = size - end
        heads["rows_bytes"] = batch_size * row_bytes
        heads["fingerprint_bytes"], heads["model_bytes"] = texts.fingerprint_bytes, texts.model_bytes
        heads["opened_with"], heads["opened_digest"], heads["created"] = opened_with, opened_digest, created
        heads["max_idle_ms"] = max_idle_ms
        self.byte_count = buffer.nbytes
        flat = memoryview(buffer.reshape(-1).data)
        records: list[RecordBytes] = [flat[at : at + size] for at in range(0, buffer.size, size)]
        self._bodies = [record[_CHECKSUM_BYTES:] for record in records]
        self._seeds = [_encoded(session_id)[1] for session_id in session_ids]
        self._puts = Puts(session_ids, [size] * len(session_ids), flat)

    def set_schema(self, schema: int) -> None:
        """Make all of them records, or changes."""
        self._heads["schema"] = schema

    def fill(
        self,
        *,
        revisions: U64 | int,
        positions: U64 | int,
        request_ids: U64 | int,
        last_used: F64 | float,
        replies: U8 | int,
        digests: U64 | int = 0,
    ) -> Puts:
        """Complete the records after the rows have been written. Values are `(n,)` or one for all; see `Header`.

        Returns:
            The ids and their records, equal to those of `encode`.
        """
        heads = self._heads
        heads["revision"], heads["position"], heads["request_id"] = revisions, positions, request_ids
        heads["last_used"], heads["reply"], heads["digest"] = last_used, replies, digests
        checksums = np.fromiter(map(crc32, self._bodies, self._seeds), np.dtype("<u4"), len(heads))
        heads["checksum"] = checksums
        self._puts.checksums = checksums.tobytes()
        return self._puts


def decode_header(session_id: str, stored: RecordBytes) -> Header:
    """Decode the metadata of a record after checking the whole record.

    Raises:
        StateCorrupt: it is corrupt, encrypted, of another schema version, or has an unknown critical field.
    """
    return _header(_checked(session_id, stored))


def _header(view: memoryview) -> Header:
    (_, _, reply, fingerprint_bytes, revision, position, request_id, opened_with, created, last_used,
     digest, opened_digest, max_idle_ms, batch_size, rows_bytes, extra_bytes, model_bytes, fields_bytes) = _STRUCT.unpack_from(view)  # fmt: skip
    model_at = HEADER.itemsize + fingerprint_bytes
    return Header(
        fingerprint=str(view[HEADER.itemsize : model_at], "utf-8"),
        model=str(view[model_at : model_at + model_bytes], "utf-8"),
        batch_size=batch_size,
        revision=revision,
        position=position,
        request_id=request_id,
        opened_with=opened_with,
        created=created,
        last_used=last_used,
        reply=reply,
        digest=digest,
        opened_digest=opened_digest,
        max_idle_ms=max_idle_ms,
        fields=bytes(view[seal_end(view) :]) if fields_bytes else b"",
        state_bytes=rows_bytes + extra_bytes,
    )


def header_or_none(session_id: str, stored: RecordBytes) -> Header | None:
    """Decode the metadata of a record, encrypted or not; None if it cannot be read."""
    try:
        return _header(_checked(session_id, stored, sealed=True))
    except StateCorrupt:
        return None


def size_of(head: RecordBytes) -> int:
    """Return the size of a record according to its header; nothing is checked."""
    facts = _STRUCT.unpack_from(head)
    sizes: int = facts[_FINGERPRINT] + facts[_MODEL] + facts[_ROWS] + facts[_EXTRA] + facts[_FIELDS]
    return HEADER.itemsize + sizes


def max_idle_ms_of(record: RecordBytes) -> int:
    """Return a record's own idle limit; 0: none. Nothing is checked."""
    return 0 if len(record) < HEADER.itemsize else int(_MAX_IDLE.unpack_from(record, _MAX_IDLE_AT)[0])


def is_sound(session_id: str, stored: RecordBytes) -> bool:
    """Whether a record or value is intact and belongs to the session, even if a later server wrote it."""
    try:
        _intact(session_id, stored)
    except StateCorrupt:
        return False
    return True


def is_complete(session_id: str, stored: RecordBytes) -> bool:
    """Whether a value `is_sound` and has all records that its last one needs."""
    return is_sound(session_id, stored) and not is_change(records_of(stored)[0])


def supersedes(newer: RecordBytes, older: RecordBytes) -> bool:
    """Whether a record is a later state of the same session, not of another session with that id."""
    if len(newer) < HEADER.itemsize or len(older) < HEADER.itemsize:
        return False
    a, b = _STRUCT.unpack_from(newer), _STRUCT.unpack_from(older)
    # revision; opened_with, created
    return a[4] > b[4] and a[7:9] == b[7:9]


@dataclasses.dataclass(frozen=True, slots=True)
class DecodedRecords:
    """Many records, decoded together. Those that could not be read are only in `errors`."""

    sound: npt.NDArray[np.intp]
    """The indices of the records that could be read, ascending."""
    heads: npt.NDArray[np.void]
    """`(len(sound),)` of dtype `HEADER`: `heads["revision"]` and so on are the columns."""
    fingerprints: list[str]
    """One per entry of `sound`."""
    rows: bytes
    """The concatenated rows of all sound records, `heads["rows_bytes"]` bytes each."""
    extras: dict[int, bytes]
    """The non-empty extras by index."""
    fields: dict[int, bytes]
    """The non-empty extension fields by index, without those of encryption."""
    errors: dict[int, StateCorrupt]
    """The errors by index."""


def decode_many(session_ids: Sequence[str], stored: Sequence[RecordBytes]) -> DecodedRecords:
    """Decode many records together, for sessions that return to the arena."""
    errors: dict[int, StateCorrupt] = {}
    sound: list[int] = []
    views: list[memoryview] = []
    for place, session_id in enumerate(session_ids):
        try:
            views.append(_checked(session_id, stored[place]))
            sound.append(place)
        except StateCorrupt as error:
            errors[place] = error
    heads = np.frombuffer(b"".join([view[: HEADER.itemsize] for view in views]), HEADER)
    cuts = _cuts(heads)
    return DecodedRecords(
        np.array(sound, np.intp),
        heads,
        [str(view[HEADER.itemsize : end], "utf-8") for view, (end, _, _) in zip(views, cuts, strict=True)],
        b"".join([view[low:high] for view, (_, low, high) in zip(views, cuts, strict=True)]),
        {
            sound[i]: bytes(views[i][cuts[i][2] : cuts[i][2] + int(heads["extra_bytes"][i])])
            for i in np.flatnonzero(heads["extra_bytes"]).tolist()
        },
        {
            sound[i]: _parsed(bytes(views[i][-size:]), KNOWN_TAGS)[0]
            for i, size in enumerate(heads["fields_bytes"].tolist())
            if size
        },
        errors,
    )


def _cuts(heads: npt.NDArray[np.void]) -> list[tuple[int, int, int]]:
    """Return the end of each fingerprint, and the start and end of the rows."""
    texts = HEADER.itemsize + heads["fingerprint_bytes"].astype(np.int64)
    rows = texts + heads["model_bytes"]
    ends = rows + heads["rows_bytes"]
    return list(zip(texts.tolist(), rows.tolist(), ends.tolist(), strict=True))


@functools.lru_cache(_IDS_KNOWN)
def _encoded(session_id: str) -> tuple[bytes, int]:
    """Return an id as encoded by `encode_ids`, and the seed of its checksum."""
    key = session_id.encode()
    return _LENGTH.pack(len(key)) + key, crc32(key)


def id_seed(session_id: str) -> int:
    """Return a number that depends on the id alone: the seed of the checksums of its records."""
    return _encoded(session_id)[1]


def _seed(session_id: str) -> int:
    return crc32(session_id.encode())


def _intact(session_id: str, stored: RecordBytes) -> memoryview:
    """Return the last record of a value if all its records are intact and follow each other."""
    records = records_of(stored)
    for older, newer in itertools.pairwise(records):
        _intact_record(session_id, older)
        if not follows(newer, older):
            raise _corrupt(session_id, f"revision {revision_of(newer)} must follow {revision_of(older)}")
    return _intact_record(session_id, records[-1])


def _intact_record(session_id: str, stored: RecordBytes) -> memoryview:
    """Return the record if its checksum is right and, for a known schema, its header is plausible.

    A checksum does not authenticate a record: whoever imports or restores one can compute it.
    """
    view = memoryview(stored)
    if len(view) < HEADER.itemsize:
        raise _corrupt(session_id, f"it has {len(view)} bytes, a header alone has {HEADER.itemsize}")
    checksum, schema = _START.unpack_from(view)
    found = crc32(view[_CHECKSUM_BYTES:], _seed(session_id))
    if found != checksum:
        raise _corrupt(session_id, f"its checksum is {checksum:08x}, its bytes have {found:08x}")
    if schema in (SCHEMA_VERSION, CHANGE_VERSION):
        _require_possible(session_id, view)
    return view


def _require_possible(session_id: str, view: memoryview) -> None:
    """Refuse a record whose sizes are inconsistent or whose header has impossible values."""
    (_, _, _, fingerprint_bytes, revision, position, _, _, created, last_used, _, _,
     max_idle_ms, batch_size, rows_bytes, extra_bytes, model_bytes, fields_bytes) = _STRUCT.unpack_from(view)  # fmt: skip
    texts_end = _STRUCT.size + fingerprint_bytes + model_bytes
    size = texts_end + rows_bytes + extra_bytes + fields_bytes
    problem = ""
    if size != len(view):
        problem = f"its parts have {size} bytes together, it has {len(view)}"
    elif revision > MAX_COUNTER or position > MAX_COUNTER:
        problem = f"its revision and position are {revision} and {position}, more than {MAX_COUNTER}"
    elif not (0.0 <= created < MAX_TIME and 0.0 <= last_used < MAX_TIME):  # nor is NaN
        problem = (
            f"created and last_used are {created} and {last_used}, not seconds of the years 1970 to 9999"
        )
    elif max_idle_ms > MAX_IDLE_MS:
        problem = f"its max_idle_ms is {max_idle_ms}, more than {MAX_IDLE_MS}"
    elif not 1 <= batch_size <= MAX_BATCH_SIZE:
        problem = f"its batch_size is {batch_size}, not 1 to {MAX_BATCH_SIZE}"
    elif not (texts := bytes(view[_STRUCT.size : texts_end])).isascii():
        for name, text in (
            ("fingerprint", texts[:fingerprint_bytes]),
            ("model", texts[fingerprint_bytes:]),
        ):
            try:
                text.decode()
            except UnicodeDecodeError as error:
                problem = problem or f"its {name} is no UTF-8: {error.reason}"
    if problem:
        raise _corrupt(session_id, problem)


def checksums_of(bodies: Iterable[RecordBytes], seeds: Iterable[int]) -> npt.NDArray[np.uint32]:
    """Return the checksums of records from the bytes after them; see `Puts.seeds`."""
    return np.fromiter(map(crc32, bodies, seeds), np.dtype("<u4"))


def with_checksum(session_id: str, record: RecordBytes) -> bytes:
    """Return a record with its checksum replaced by the right one."""
    body = memoryview(record)[_CHECKSUM_BYTES:]
    return b"".join((crc32(body, _encoded(session_id)[1]).to_bytes(_CHECKSUM_BYTES, "little"), body))


def rows_of(record: RecordBytes) -> tuple[int, memoryview]:
    """Return the batch size of a record and its rows; nothing is checked."""
    start, facts = state_at(record), _STRUCT.unpack_from(record)
    return int(facts[_BATCH_SIZE]), memoryview(record)[start : start + facts[_ROWS]]


def whole(session_id: str, change: RecordBytes, rows: RecordBytes, fields: bytes) -> bytes:
    """Return the record of a change, with whole rows and these extension fields."""
    view, facts = memoryview(change), list(_STRUCT.unpack_from(change))
    start, end = state_at(change), state_at(change) + facts[_ROWS]
    extra = view[end : end + facts[_EXTRA]]
    facts[_SCHEMA], facts[_ROWS], facts[_FIELDS] = SCHEMA_VERSION, len(rows), len(fields)
    head = _STRUCT.pack(*facts)
    return with_checksum(session_id, b"".join((head, view[HEADER.itemsize : start], rows, extra, fields)))


def with_revision(session_id: str, record: RecordBytes, revision: int) -> bytes:
    """Return a record, not a change, with another revision."""
    changed = bytearray(record)
    _REVISION.pack_into(changed, _REVISION_AT, revision)
    return with_checksum(session_id, bytes(changed))


def head_with(head: RecordBytes, fields_bytes: int) -> bytes:
    """Return the header and texts of a record with another size of fields; the checksum is not computed."""
    changed = bytearray(head)
    _LENGTH.pack_into(changed, HEADER.itemsize - _LENGTH.size, fields_bytes)
    return bytes(changed)


def is_change(record: RecordBytes) -> bool:
    """Whether a record is a change. Nothing is checked."""
    return len(record) >= HEADER.itemsize and _START.unpack_from(record)[1] == CHANGE_VERSION


def revision_of(record: RecordBytes) -> int:
    """Return the revision of a record; nothing is checked."""
    return int(_REVISION.unpack_from(record, _REVISION_AT)[0]) if len(record) >= HEADER.itemsize else 0


def newest_of(value: RecordBytes) -> RecordBytes:
    """Return the last record of a stored value; nothing is checked."""
    return memoryview(value)[: size_of(value)] if is_change(value) else value


def records_of(value: RecordBytes) -> list[RecordBytes]:
    """Return the records of a stored value, the oldest first; nothing is checked."""
    if not is_change(value):
        return [value]
    view, found, at = memoryview(value), list[RecordBytes](), 0
    while at < len(view):
        head = view[at : at + HEADER.itemsize]
        end = at + size_of(head) if len(head) == HEADER.itemsize else len(view)
        found.append(view[at:end])
        at = end
    return [*found[1:], found[0]]


def value_of(records: Sequence[RecordBytes]) -> RecordBytes:
    """Return the stored value of records, the oldest first: the inverse of `records_of`."""
    return records[0] if len(records) == 1 else b"".join((records[-1], *records[:-1]))


def follows(newer: RecordBytes, older: RecordBytes) -> bool:
    """Whether a record is the next state of the same session."""
    return supersedes(newer, older) and revision_of(newer) == revision_of(older) + 1


def state_at(record: RecordBytes) -> int:
    """Return the offset of rows and extra in a record; nothing is checked."""
    facts = _STRUCT.unpack_from(record)
    return int(HEADER.itemsize + facts[_FINGERPRINT] + facts[_MODEL])


def fields_at(record: RecordBytes) -> int:
    """Return the offset of the extension fields in a record; nothing is checked."""
    return max(0, len(record) - int(_LENGTH.unpack_from(record, HEADER.itemsize - _LENGTH.size)[0]))


def seal_end(record: RecordBytes) -> int:
    """Return the offset of the extension fields after that of encryption; nothing is checked."""
    at = fields_at(record)
    if at + FIELD.itemsize > len(record):
        return at
    tag, length = FIELD_HEAD.unpack_from(record, at)
    return at + FIELD.itemsize + length if tag == SEAL else at


def key_id_of(record: RecordBytes) -> str | None:
    """Return the id of the key that a record is encrypted with; None if it is not. Nothing is checked."""
    if len(record) < HEADER.itemsize:
        return None
    record = newest_of(record)
    start, end = fields_at(record), seal_end(record)
    return None if start == end else str(record[start + FIELD.itemsize + KEY_ID_AT : end], "utf-8", "replace")


def _checked(session_id: str, stored: RecordBytes, *, sealed: bool = False) -> memoryview:
    """Return the record if it is intact and this server can use it; encrypted ones only if `sealed` allows it."""
    view = _intact(session_id, stored)
    _, schema = _START.unpack_from(view)
    if schema not in (SCHEMA_VERSION, CHANGE_VERSION):
        age = "a later" if schema > SCHEMA_VERSION else "an earlier"
        raise _corrupt(
            session_id,
            f"its schema version is {schema}, this server reads {SCHEMA_VERSION}: {age} server wrote it",
        )
    is_incomplete = schema == CHANGE_VERSION and (not sealed or is_change(records_of(stored)[0]))
    fields = bytes(view[fields_at(view) :])
    if not (fields or is_incomplete):
        return view
    try:
        _, is_sealed, unknown = _parsed(fields, KNOWN_TAGS)
    except ValueError as error:
        raise _corrupt(session_id, str(error)) from error
    if is_sealed and not sealed:
        raise _corrupt(
            session_id,
            f"it is encrypted with key {key_id_of(view)!r}, and this server has no key of that id which opens it",
        )
    if unknown:
        raise _corrupt(
            session_id,
            f"it has the critical field {unknown:#06x}, which this server does not know: a later server wrote it",
        )
    if is_incomplete:
        raise _corrupt(session_id, "it is a change, and the records before it are missing")
    return view


@functools.lru_cache(256)  # most records of a model have the same fields
def _parsed(fields: bytes, known: frozenset[int]) -> tuple[bytes, bool, int]:
    """Return the fields without that of encryption, whether that one exists, and the first unknown critical tag or 0."""
    tags = unpack_fields(fields)
    unknown = min((tag for tag in tags.keys() - known if tag & CRITICAL), default=0)
    rest = fields[FIELD_HEAD.size + len(tags[SEAL]) :] if SEAL in tags else fields  # it is the first one
    return rest, SEAL in tags, unknown


def _corrupt(session_id: str, problem: str) -> StateCorrupt:
    return StateCorrupt(
        f"the stored record of session {session_id!r} must be intact: {problem}",
        session_id=session_id,
    )
