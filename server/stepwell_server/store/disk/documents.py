"""Documents in LMDB, each with a checksum. Their number is stored too, to detect documents hidden by corruption.

documents    name -> checksum, bytes of the name, name, content

A document is written by a transaction, together with the sessions of its batch, and never to the write-ahead log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections.abc import Iterable
from typing import Any

import lmdb
from isal.isal_zlib import crc32

from stepwell_server.store.base import DocumentsCorrupt
from stepwell_server.store.disk import key_sums
from stepwell_server.store.disk.key_sums import Sums

SUMS = b"document sums"
"""Key in LMDB's `meta`: the number of documents and the sum over their names."""
_HEAD = struct.Struct("<IH")  # checksum of what follows it, bytes of the name
_CHECKSUM_BYTES = 4
_DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.BadValsizeError)


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """A document as it is stored."""

    key: bytes
    value: bytes | None
    """None deletes the document."""

    @property
    def named(self) -> tuple[str, bytes] | None:
        """Name and content from the value; None if it is corrupt."""
        value = self.value
        if value is None or len(value) < _HEAD.size:
            return None
        checksum, size = _HEAD.unpack_from(value)
        name, content = value[_HEAD.size : _HEAD.size + size], value[_HEAD.size + size :]
        if len(name) < size or crc32(value[_CHECKSUM_BYTES:]) != checksum:
            return None
        with contextlib.suppress(UnicodeDecodeError):
            return name.decode(), content
        return None

    @property
    def name(self) -> str:
        """The name from the value or, if that is corrupt, from the key."""
        named = self.named
        return str(self.key, "utf-8", "replace") if named is None else named[0]

    @property
    def counted(self) -> bytes:
        """The bytes that enter the sum, chosen so that a corrupt key or a corrupt value does not change the sum."""
        named = self.named
        return self.key if named is None else named[0].encode()


def item(name: str, content: bytes | None) -> Item:
    """Encode a document."""
    key = name.encode()
    if content is None:
        return Item(key, None)
    value = b"".join((_HEAD.pack(0, len(key)), key, content))
    return Item(
        key, crc32(value[_CHECKSUM_BYTES:]).to_bytes(_CHECKSUM_BYTES, "little") + value[_CHECKSUM_BYTES:]
    )


@dataclasses.dataclass(slots=True)
class DocumentSet:
    """The documents of a store, or of a backup."""

    items: list[Item] = dataclasses.field(default_factory=list)
    sound: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """The intact documents, by name."""
    damaged: list[str] = dataclasses.field(default_factory=list)
    """Names of the corrupt documents, if known."""
    missing: int = 0
    """The minimum number of missing documents."""
    problem: str = ""
    """Why some are missing; empty: none are."""

    def add(self, found: Item, *, is_found: bool = True) -> None:
        """Add a document; `is_found`: a search for its key finds it."""
        self.items.append(found)
        named = found.named
        if named is None or named[0].encode() != found.key or not is_found:
            self.damaged.append(found.name)
        else:
            self.sound[named[0]] = named[1]

    def required(self, prefix: str) -> dict[str, bytes]:
        """Return the documents whose name begins with `prefix`.

        Raises:
            DocumentsCorrupt: one of them is damaged, or some document is missing.
        """
        sound = {name: content for name, content in self.sound.items() if name.startswith(prefix)}
        damaged = [name for name in self.damaged if name.startswith(prefix)]
        if not damaged and not self.problem:
            return sound
        problems = [f"document {name!r} must be intact; it is corrupt" for name in damaged]
        if self.problem:
            problems.append(f"the store must have all its documents; {self.problem}")
        rule = "stepwell store verify gives details, stepwell store repair removes them"
        raise DocumentsCorrupt(f"{'; '.join(problems)}: {rule}", damaged, sound)


def write(transaction: Any, documents: Any, meta: Any, items: Iterable[Item]) -> None:
    """Put and delete documents, one after the other."""
    sums = key_sums.unpack(transaction.get(SUMS, db=meta))
    for new in items:
        before = transaction.get(new.key, db=documents)
        if before is not None:
            sums.add([Item(new.key, bytes(before)).counted], -1)
        if new.value is not None:
            transaction.put(new.key, new.value, db=documents)
            sums.add([new.counted])
        elif before is not None:
            transaction.delete(new.key, db=documents)
    transaction.put(SUMS, sums.pack(), db=meta)


def read(transaction: Any, documents: Any, meta: Any) -> DocumentSet:
    """Read all documents, in the order of their keys; none if they have no database."""
    found, sums = DocumentSet(), Sums()
    # read this first: a transaction that met a corrupt page is unusable
    expected = key_sums.unpack(transaction.get(SUMS, db=meta))
    try:
        for key, value in () if documents is None else transaction.cursor(documents).iternext():
            one = Item(bytes(key), bytes(value))
            # search from the root: a cursor would first look on its current page
            found.add(one, is_found=transaction.get(one.key, db=documents) == value)
            sums.add([one.counted])
    except _DAMAGE as error:
        found.problem = f"a page cannot be read ({error})"
    if sums != expected:
        found.missing = max(1, expected.count - sums.count)
        found.problem = found.problem or f"{found.missing} of {expected.count} are missing"
    return found
