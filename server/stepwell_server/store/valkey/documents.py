"""Documents of a shared store: one hash, with a checksum per document."""

from __future__ import annotations

from collections.abc import Mapping

from isal.isal_zlib import crc32

from stepwell_server.store.base import Batch, DocumentsCorrupt
from stepwell_server.store.valkey import scripts
from stepwell_server.store.valkey.connection.client import Reply
from stepwell_server.store.valkey.connection.requests import Request
from stepwell_server.store.valkey.keys import META, Keys

_CHECKSUM_BYTES = 4
_ANYTHING, _ABSENT, _IS = b"", b"0", b"1"


def writing(keys: Keys, batch: Batch) -> Request:
    """Return the request that writes the documents of a batch; pass its reply to `stale_of`."""
    last = dict(batch.documents)
    arguments: list[bytes] = []
    for name, content in last.items():
        must = _stored(name, batch.documents_follow[name]) if name in batch.documents_follow else _ANYTHING
        arguments += (name.encode(), must, _stored(name, content))
    return Request.of(META, scripts.DOCUMENTS, [keys.documents, keys.fence], *arguments)


def stale_of(reply: Reply) -> frozenset[str]:
    """Return the names of documents that were not written, because their content did not match."""
    return frozenset(name.decode() for name in reply)


def reading(keys: Keys, *, fence: bool) -> list[Request]:
    """Return the requests that read all documents; pass the reply of the last one to `found_in`.

    With a `fence`, everything read is on disk as soon as the first request is.
    """
    read = Request(META, (b"HGETALL", keys.documents))
    return [Request(META, (b"SET", keys.fence, b"")), read] if fence else [read]


def found_in(reply: Reply, prefix: str) -> dict[str, bytes]:
    """Return the documents whose name begins with `prefix`, in the order of their names.

    Raises:
        DocumentsCorrupt: one of them is corrupt.
    """
    stored = pairs_of(reply)
    sound: dict[str, bytes] = {}
    damaged: list[str] = []
    for key in sorted(stored):
        name = str(key, "utf-8", "replace")
        if name.startswith(prefix):
            content = _content(key, stored[key])
            if content is None:
                damaged.append(name)
            else:
                sound[name] = content
    if damaged:
        problems = "; ".join(f"document {name!r} must be intact; it is corrupt" for name in damaged)
        raise DocumentsCorrupt(problems, damaged, sound)
    return sound


def pairs_of(reply: Reply) -> Mapping[bytes, bytes]:
    """Return the fields of a hash."""
    return dict(zip(reply[::2], reply[1::2], strict=True))


def _stored(name: str, content: bytes | None) -> bytes:
    if content is None:
        return _ABSENT
    return b"".join((_IS, _checksum(name.encode(), content), content))


def _content(key: bytes, stored: bytes) -> bytes | None:
    checksum, content = stored[:_CHECKSUM_BYTES], stored[_CHECKSUM_BYTES:]
    return content if checksum == _checksum(key, content) else None


def _checksum(key: bytes, content: bytes) -> bytes:
    return crc32(content, crc32(key)).to_bytes(_CHECKSUM_BYTES, "little")
