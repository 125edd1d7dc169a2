"""The stored form of a session: a header of fixed size, two texts, the rows, the arrays of a long reply, fields.

    checksum, schema, reply, lengths, revision, ... | fingerprint | model | rows | extra | fields

Little-endian throughout. The checksum is CRC-32 (zlib's): it finds every change of up to 32 neighbouring bits
for certain and any other but one in 4 billion. ISA-L computes it several times as fast as zlib does. It starts
from the session's id, so that a record found under another id is damaged too. Every schema version keeps
checksum and schema where they are now: a record of a later version can be told from a damaged one.

The extension fields (`fields`) are what later servers say of a session beside the columns of the header.
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

SCHEMA_VERSION = 4
"""Of all records; others are refused."""
MAX_COUNTER = 2**63 - 1
"""Of revisions and positions: many clients read them as numbers with a sign."""
MAX_BATCH_SIZE = 2**31 - 1
MAX_TIME = 253_402_300_800.0
"""Seconds from the epoch to the end of the year 9999: times of records are from 0 up to it."""

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
_STRUCT = struct.Struct("<IHBBQQQQddQQQIIIHH")  # the same, for one
_NAMES = HEADER.names or ()
_FINGERPRINT, _MODEL, _ROWS, _EXTRA, _FIELDS = (
    _NAMES.index(f"{part}_bytes") for part in ("fingerprint", "model", "rows", "extra", "fields")
)
_START = struct.Struct("<IH")
_LENGTH = struct.Struct("<H")
#: Ids whose encoding is kept: those of sessions that change again and again.
_IDS_KNOWN = 16_384
_REVISION, _REVISION_AT = struct.Struct("<Q"), 8
_MAX_IDLE, _MAX_IDLE_AT = struct.Struct("<Q"), HEADER.fields["max_idle_ms"][1]  # type: ignore[index]
_CHECKSUM_BYTES = 4

U64 = npt.NDArray[np.uint64]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a record says of a session, beside its state."""

    fingerprint: str
    """Of the model that the rows belong to."""
    model: str
    """The name it was served under."""
    batch_size: int
    revision: int
    position: int
    request_id: int
    """Of the last change, 0 for none."""
    opened_with: int
    """Request id of the call that made the session, or a number that was drawn: see `SessionInfo.uid`."""
    created: float
    """Seconds since the epoch."""
    last_used: float
    """Seconds since the epoch."""
    reply: int
    """How the reply to the last change is kept: the engine's `Kept`."""
    digest: int = 0
    """Of what the last change said (`core.exactly_once`), 0 for none."""
    opened_digest: int = 0
    """The same of the call that made the session."""
    max_idle_ms: int = 0
    """For how long it may be unused, 0 for no limit of its own: see `core.idle`."""
    fields: bytes = b""
    """Extension fields as `pack_fields` makes them; they are written again as they are."""
    state_bytes: int = dataclasses.field(default=0, compare=False)
    """Of the rows and of the arrays of a reply."""


class Texts:
    """The texts of a model's records."""

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
) -> bytes:
    """A record as bytes, bound to the session's id; the values are those of `Header`, if nothing else is said.

    `rows` are the session's, one after the other, each as `Arena.pack` lays it out; `extra` the arrays of a reply of
    several time steps, opaque here.

    Raises:
        ValueError: a part is too large to be stored.
    """
    try:
        head = _STRUCT.pack(
            0, SCHEMA_VERSION, reply, texts.fingerprint_bytes,
            revision, position, request_id, opened_with, created, last_used, digest, opened_digest,
            max_idle_ms, batch_size, len(rows), len(extra), texts.model_bytes, len(fields),
        )  # fmt: skip
    except struct.error as error:
        raise ValueError(f"a part of session {session_id!r} is too large to be stored: {error}") from error
    body = b"".join((head[_CHECKSUM_BYTES:], texts.data, rows, extra, fields))
    return crc32(body, _encoded(session_id)[1]).to_bytes(_CHECKSUM_BYTES, "little") + body


def encode_ids(session_ids: Sequence[str]) -> bytes:
    """Ids one after the other, each as UTF-8 behind its length in bytes (u2)."""
    return b"".join([_encoded(session_id)[0] for session_id in session_ids])


class Puts(list[tuple[str, RecordBytes]]):
    """Ids and records that lie one after the other, and may be put again: the same objects with other contents."""

    def __init__(
        self, session_ids: Sequence[str], records: Sequence[RecordBytes], together: memoryview
    ) -> None:
        super().__init__(zip(session_ids, records, strict=True))
        self.session_ids = session_ids
        self.sizes = [len(record) for record in records]
        """Bytes of each record: all have the same."""
        self.together = together
        """All records, one after the other."""
        self.checksums = b""
        """The records' checksums, four bytes each."""

    @functools.cached_property
    def encoded_ids(self) -> bytes:
        """As `encode_ids`: sessions that change together again and again are encoded once."""
        return encode_ids(self.session_ids)

    @functools.cached_property
    def keys(self) -> list[bytes]:
        """The ids as UTF-8."""
        return [session_id.encode() for session_id in self.session_ids]

    @functools.cached_property
    def seeds(self) -> list[int]:
        """What the checksum of each record begins with."""
        return [crc32(key) for key in self.keys]

    def with_checksums(self, records: Sequence[RecordBytes], together: memoryview, checksums: bytes) -> Puts:
        """Other records of the same sessions."""
        puts = Puts(self.session_ids, records, together)
        puts.checksums, puts.encoded_ids = checksums, self.encoded_ids
        return puts


class JoinedPuts(Sequence[tuple[str, RecordBytes]]):
    """Ids and records of several changes, as one sequence."""

    def __init__(self, parts: Sequence[Sequence[tuple[str, RecordBytes]]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        """How many records there are."""
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[tuple[str, RecordBytes]]:
        """The records of one part after the other."""
        return itertools.chain.from_iterable(self.parts)

    def __getitem__(self, index: Any) -> Any:
        """As of a list."""
        return list(self)[index]


class RecordTemplate:
    """The records of some sessions of one model and batch size, laid out once and filled as often as they change.

    Extension fields, if there are any, have the same length in all of them. Other sessions have records of their own:
    `encode`.

    What `fill` returns are views of the template: they hold until it is filled again. For one thread at a time.
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
        """Lay out n records.

        Args:
            session_ids: n of them.
            texts: Of their model.
            shape: The batch size, and the bytes of a row as `Arena.pack` makes it.
            opened_with: `(n,)`, or one for all, as all that their openings determine.
            opened_digest: The same.
            max_idle_ms: The same.
            created: The same.
            fields: Extension fields of each; empty for none.
        """
        batch_size, row_bytes = shape
        text = np.frombuffer(texts.data, np.uint8)
        start = HEADER.itemsize + len(text)
        end = start + batch_size * row_bytes
        size = end + (len(fields[0]) if fields else 0)
        buffer = np.zeros((len(session_ids), size), np.uint8)
        buffer[:, HEADER.itemsize : start] = text
        self.rows: U8 = buffer[:, start:end]
        """`(n, batch_size * row_bytes)`: to be written before `fill`."""
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
        self._puts = Puts(session_ids, records, flat)

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
        """Complete the records, whose rows have been written; `(n,)` or one for all, see `Header`.

        Returns:
            The ids and their records, equal to what `encode` returns.
        """
        heads = self._heads
        heads["revision"], heads["position"], heads["request_id"] = revisions, positions, request_ids
        heads["last_used"], heads["reply"], heads["digest"] = last_used, replies, digests
        checksums = np.fromiter(map(crc32, self._bodies, self._seeds), np.dtype("<u4"), len(heads))
        heads["checksum"] = checksums
        self._puts.checksums = checksums.tobytes()
        return self._puts


def decode_header(session_id: str, stored: RecordBytes) -> Header:
    """Read what a record says beside the state; the whole record is checked all the same.

    Raises:
        StateCorrupt: it is damaged, encrypted, of a schema version that is not known here, or has a critical field that
            is not.
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
    """As `decode_header`, of encrypted records too; None if the record cannot be read."""
    try:
        return _header(_checked(session_id, stored, sealed=True))
    except StateCorrupt:
        return None


def size_of(head: RecordBytes) -> int:
    """How many bytes a record has, by its header; nothing is checked."""
    facts = _STRUCT.unpack_from(head)
    sizes: int = facts[_FINGERPRINT] + facts[_MODEL] + facts[_ROWS] + facts[_EXTRA] + facts[_FIELDS]
    return HEADER.itemsize + sizes


def max_idle_ms_of(record: RecordBytes) -> int:
    """The limit of its own that a record says, 0 for none; nothing is checked."""
    return 0 if len(record) < HEADER.itemsize else int(_MAX_IDLE.unpack_from(record, _MAX_IDLE_AT)[0])


def is_sound(session_id: str, stored: RecordBytes) -> bool:
    """Whether a record is as it was written, and this session's; a later server may have written it."""
    try:
        _intact(session_id, stored)
    except StateCorrupt:
        return False
    return True


def supersedes(newer: RecordBytes, older: RecordBytes) -> bool:
    """Whether a record is of the same session as another, not only of the same id, and of a later change."""
    if len(newer) < HEADER.itemsize or len(older) < HEADER.itemsize:
        return False
    a, b = _STRUCT.unpack_from(newer), _STRUCT.unpack_from(older)
    # revision; opened_with, created
    return a[4] > b[4] and a[7:9] == b[7:9]


@dataclasses.dataclass(frozen=True, slots=True)
class DecodedRecords:
    """Many records read at once. Those that could not be read are in `errors` and nowhere else."""

    sound: npt.NDArray[np.intp]
    """Which records could be read: their places among those given, ascending."""
    heads: npt.NDArray[np.void]
    """`(len(sound),)` of dtype `HEADER`: `heads["revision"]` and so on are the columns."""
    fingerprints: list[str]
    """As long as `sound`."""
    rows: bytes
    """The rows of all sound records, one after the other; `heads["rows_bytes"]` of each."""
    extras: dict[int, bytes]
    """Those that are not empty, by place."""
    fields: dict[int, bytes]
    """Extension fields, but those of encryption, of those that have any, by place."""
    errors: dict[int, StateCorrupt]
    """By place."""


def decode_many(session_ids: Sequence[str], stored: Sequence[RecordBytes]) -> DecodedRecords:
    """Read many records at once, for sessions that come back to the arena together."""
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
    """Where each fingerprint ends, the rows begin, and the rows end."""
    texts = HEADER.itemsize + heads["fingerprint_bytes"].astype(np.int64)
    rows = texts + heads["model_bytes"]
    ends = rows + heads["rows_bytes"]
    return list(zip(texts.tolist(), rows.tolist(), ends.tolist(), strict=True))


@functools.lru_cache(_IDS_KNOWN)
def _encoded(session_id: str) -> tuple[bytes, int]:
    """An id as `encode_ids` writes it, and what the checksum of its record begins with."""
    key = session_id.encode()
    return _LENGTH.pack(len(key)) + key, crc32(key)


def _seed(session_id: str) -> int:
    return crc32(session_id.encode())


def _intact(session_id: str, stored: RecordBytes) -> memoryview:
    """The record, if its checksum is right and, as far as its schema is known, its header can be true.

    A checksum says nothing of who made a record: whoever imports or restores one can make it anew.
    """
    view = memoryview(stored)
    if len(view) < HEADER.itemsize:
        raise _corrupt(session_id, f"it has {len(view)} bytes, a header alone has {HEADER.itemsize}")
    checksum, schema = _START.unpack_from(view)
    found = crc32(view[_CHECKSUM_BYTES:], _seed(session_id))
    if found != checksum:
        raise _corrupt(session_id, f"its checksum is {checksum:08x}, its bytes have {found:08x}")
    if schema == SCHEMA_VERSION:
        _require_possible(session_id, view)
    return view


def _require_possible(session_id: str, view: memoryview) -> None:
    """Refuse a record whose parts do not add up, or whose header has values that no session can have."""
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
    """The checksums of records that go on with `bodies` behind it; see `Puts.seeds`."""
    return np.fromiter(map(crc32, bodies, seeds), np.dtype("<u4"))


def with_checksum(session_id: str, record: RecordBytes) -> bytes:
    """A record with the checksum that it must have, whatever stands in its place."""
    body = memoryview(record)[_CHECKSUM_BYTES:]
    return b"".join((crc32(body, _encoded(session_id)[1]).to_bytes(_CHECKSUM_BYTES, "little"), body))


def with_revision(session_id: str, record: RecordBytes, revision: int) -> bytes:
    """A record as of another revision."""
    changed = bytearray(record)
    _REVISION.pack_into(changed, _REVISION_AT, revision)
    return with_checksum(session_id, bytes(changed))


def head_with(head: RecordBytes, fields_bytes: int) -> bytes:
    """What stands before the rows of a record, as it is with so many bytes of fields; the checksum is not made."""
    changed = bytearray(head)
    _START.pack_into(changed, 0, 0, SCHEMA_VERSION)
    _LENGTH.pack_into(changed, HEADER.itemsize - _LENGTH.size, fields_bytes)
    return bytes(changed)


def state_at(record: RecordBytes) -> int:
    """Where rows and extra of a record begin; nothing is checked."""
    facts = _STRUCT.unpack_from(record)
    return int(HEADER.itemsize + facts[_FINGERPRINT] + facts[_MODEL])


def fields_at(record: RecordBytes) -> int:
    """Where the extension fields of a record begin; nothing is checked."""
    return max(0, len(record) - int(_LENGTH.unpack_from(record, HEADER.itemsize - _LENGTH.size)[0]))


def seal_end(record: RecordBytes) -> int:
    """Where the extension fields begin that are not about encryption; nothing is checked."""
    at = fields_at(record)
    if at + FIELD.itemsize > len(record):
        return at
    tag, length = FIELD_HEAD.unpack_from(record, at)
    return at + FIELD.itemsize + length if tag == SEAL else at


def key_id_of(record: RecordBytes) -> str | None:
    """The id of the key that a record is encrypted with; None if it is not. Nothing is checked."""
    if len(record) < HEADER.itemsize:
        return None
    start, end = fields_at(record), seal_end(record)
    return None if start == end else str(record[start + FIELD.itemsize + KEY_ID_AT : end], "utf-8", "replace")


def _checked(session_id: str, stored: RecordBytes, *, sealed: bool = False) -> memoryview:
    """The record, if it is intact and of a form that this server can use; an encrypted one only if it may be `sealed`."""
    view = _intact(session_id, stored)
    _, schema = _START.unpack_from(view)
    if schema != SCHEMA_VERSION:
        age = "a later" if schema > SCHEMA_VERSION else "an earlier"
        raise _corrupt(
            session_id,
            f"its schema version is {schema}, this server reads {SCHEMA_VERSION}: {age} server wrote it",
        )
    fields = bytes(view[fields_at(view) :])
    if not fields:
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
    return view


@functools.lru_cache(256)  # most records of a model have the same fields
def _parsed(fields: bytes, known: frozenset[int]) -> tuple[bytes, bool, int]:
    """Fields but that of encryption, whether there is that one, and the first critical tag that is not known, or 0."""
    tags = unpack_fields(fields)
    unknown = min((tag for tag in tags.keys() - known if tag & CRITICAL), default=0)
    rest = fields[FIELD_HEAD.size + len(tags[SEAL]) :] if SEAL in tags else fields  # it is the first one
    return rest, SEAL in tags, unknown


def _corrupt(session_id: str, problem: str) -> StateCorrupt:
    return StateCorrupt(
        f"the stored record of session {session_id!r} must be as it was written: {problem}",
        session_id=session_id,
    )
