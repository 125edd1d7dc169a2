"""A stored session as one value that a test writes into a store or reads from it."""

from __future__ import annotations

import dataclasses

from stepwell_server.store.base import LocalStore, Store
from stepwell_server.store.record import (
    SCHEMA_VERSION,
    Header,
    RecordBytes,
    Texts,
    decode_header,
    decode_many,
    encode,
    header_or_none,
)

#: What follows from the others is left out.
_SAID = [name for name in Header.__slots__ if name != "state_bytes"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record(Header):
    """A session as it is stored."""

    rows: bytes
    extra: bytes = b""

    def encode(self, session_id: str, schema: int = SCHEMA_VERSION) -> bytes:
        said = {name: getattr(self, name) for name in (*_SAID, "rows", "extra")}
        texts = Texts(said.pop("fingerprint"), said.pop("model"))
        return encode(session_id, texts, **said, schema=schema)


def decode(session_id: str, stored: RecordBytes) -> Record:
    """Read a record back; raises `StateCorrupt` as `decode_header` does."""
    header, whole = decode_header(session_id, stored), decode_many([session_id], [stored])
    said = {name: getattr(header, name) for name in _SAID}
    return Record(**said, rows=whole.rows, extra=whole.extras.get(0, b""))


async def scan(
    store: Store, *, after: str = "", prefix: str = "", limit: int
) -> list[tuple[str, Header | None]]:
    """Sessions of a store in the order of their ids, as it dates them; None stands for a record that is damaged."""
    heads = await store.heads(after=after, prefix=prefix, limit=limit)
    used = heads.heads["last_used"].tolist()
    ids = [key.decode() for key in heads.keys]
    found: list[tuple[str, Header | None]] = []
    for session_id, last_used, each in zip(ids, used, await store.fetch(ids), strict=True):
        header = None if each.record is None else header_or_none(session_id, each.record)
        found.append((session_id, header and dataclasses.replace(header, last_used=last_used)))
    return found


def scan_local(
    store: LocalStore, *, after: str = "", prefix: str = "", limit: int
) -> list[tuple[str, Header | None]]:
    """As `scan`, of a store that answers in place; all is as its records say."""
    keys = store.heads(after=after, prefix=prefix, limit=limit).keys
    ids = [i for key in keys if (i := key.decode()).startswith(prefix)]
    return [
        (i, None if stored is None else header_or_none(i, stored))
        for i, stored in zip(ids, store.get_many(ids), strict=True)
    ]
