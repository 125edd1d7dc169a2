"""Rebuilds a store on disk in place, while no server uses it: with another key, or without corrupt data."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

from stepwell_server.clock import Clock
from stepwell_server.store.base import KeyFileError, StoreError, Tombstone
from stepwell_server.store.changes import joined
from stepwell_server.store.disk import meta
from stepwell_server.store.disk.backup.new_store import Pair, rebuild
from stepwell_server.store.disk.backup.snapshot import Entry, Snapshot
from stepwell_server.store.disk.documents import Item
from stepwell_server.store.disk.documents import item as document
from stepwell_server.store.disk.key_sums import Sums
from stepwell_server.store.encryption.keyring import Keyring
from stepwell_server.store.encryption.sealer import Sealer
from stepwell_server.store.record import (
    RecordBytes,
    header_or_none,
    is_change,
    is_complete,
    is_sound,
    key_id_of,
    newest_of,
    records_of,
)

_log = logging.getLogger(__name__)
_KEPT = (meta.INCARNATION, meta.SECRET, meta.FIRST_REVISION, meta.KEYS)


@dataclasses.dataclass(slots=True)
class RekeySummary:
    """The result of `rekey`."""

    sessions: int = 0
    damaged: int = 0
    """Number of records that could not be decrypted: they stay unchanged, and their sessions answer STATE_CORRUPT."""
    left: set[str] = dataclasses.field(default_factory=set)
    """Ids of the keys of those records."""


def rekey(path: Path, clock: Clock, keyring: Keyring, *, decrypt: bool = False) -> RekeySummary:
    """Encrypt all sessions of a store with the first key, or decrypt them; no server may use the store.

    Afterwards no other key is needed, and no file of the store has unencrypted states. Freed blocks of the disk may
    have some.

    Raises:
        StoreBusy: a server uses it.
        StoreError: it cannot be read or written, or has lost sessions.
        KeyFileError: a key is missing.
    """
    if not (decrypt or keyring.first):
        raise KeyFileError(
            "the key file must begin with the new key; it begins with none: to decrypt the store, give --decrypt"
        )
    sealer, found = Sealer(keyring), RekeySummary()

    def sessions(old: Snapshot) -> Iterator[Pair]:
        keyring.require(old.key_checks)
        sums = Sums()
        for entry in old.sessions():
            found.sessions += 1
            sums.add([entry.key])
            yield entry.session_id, _rekeyed(sealer, entry.session_id, entry.record, found, decrypt=decrypt)
        old.require_all(sums)

    def about(old: dict[bytes, bytes]) -> dict[bytes, bytes]:
        checks = {} if decrypt else keyring.first_check
        checks |= {key_id: keyring.checks[key_id] for key_id in found.left & keyring.checks.keys()}
        return {**_kept(old), meta.KEYS: meta.pack_keys(checks)}

    rebuild(path, clock, sessions, about)
    return found


def _rekeyed(
    sealer: Sealer, session_id: str, value: RecordBytes, found: RekeySummary, *, decrypt: bool
) -> RecordBytes:
    if header_or_none(session_id, value) is None:
        found.damaged += 1
        return value
    opened = sealer.opened_or_as_is(session_id, value)
    left = {key_id for each in records_of(opened) if (key_id := key_id_of(each)) is not None}
    plain = joined(session_id, opened)
    if left or is_change(plain):
        found.damaged += 1
        found.left |= left
        return value
    if decrypt:
        return bytes(plain)
    ((_, sealed),) = sealer.seal([(session_id, plain)])
    return bytes(sealed)


@dataclasses.dataclass(slots=True)
class RepairSummary:
    """The result of `repair`."""

    sessions: int = 0
    recovered: list[str] = dataclasses.field(default_factory=list)
    """Sessions with a corrupt key, which their record identified."""
    damaged: list[str] = dataclasses.field(default_factory=list)
    """Keys of corrupt records: their sessions answer STATE_CORRUPT."""
    lost: int = 0
    """Number of sessions that are missing; their ids are unknown."""
    documents: int = 0
    lost_documents: list[str] = dataclasses.field(default_factory=list)
    """Names of corrupt documents, if known. They were removed."""
    missing_documents: int = 0
    """Number of other missing documents; their names are unknown."""


def repair(path: Path, clock: Clock) -> RepairSummary:
    """Rebuild a store from the readable data of one that lost sessions; no server may use it.

    Afterwards a session that is not found counts as nonexistent, as in any store. A new session under the id of a
    lost one begins at a revision that no client holds.

    Raises:
        StoreBusy: a server uses it.
        StoreError: it cannot be read or written.
    """
    found = RepairSummary()

    def sessions(old: Snapshot) -> Iterator[Pair]:
        seen = set[str]()
        for entry in _readable(old):
            session_id, record = entry.session_id, entry.record
            if not is_complete(session_id, record):
                own = next((name for name in _similar(entry.key) if is_sound(name, record)), None)
                if own is not None:
                    session_id, record = own, old.valid(own, newest_of(record))
                is_recovered = own is not None and is_complete(session_id, record)
                (found.recovered if is_recovered else found.damaged).append(session_id)
            if session_id not in seen:
                seen.add(session_id)
                found.sessions += 1
                yield session_id, record
        found.lost = max(0, old.expected.count - found.sessions)

    def about(old: dict[bytes, bytes]) -> dict[bytes, bytes]:
        first = meta.later_first_revision(int(old.get(meta.FIRST_REVISION, b"0")), clock.now())
        return {**_kept(old), meta.FIRST_REVISION: str(first).encode()}

    def documents(old: Snapshot) -> list[Item]:
        read = old.again().documents()
        kept = {item.name: item for item in map(_recovered, read.items) if item is not None}
        kept |= {name: document(name, content) for name, content in read.sound.items()}
        found.documents = len(kept)
        found.lost_documents = [name for name in read.damaged if name not in kept]
        found.missing_documents = read.missing
        return list(kept.values())

    rebuild(path, clock, sessions, about, stones=_readable_stones, documents=documents)
    return found


def _recovered(item: Item) -> Item | None:
    """Return a document under the name in its value, whatever its key; None if the value is corrupt."""
    return None if item.named is None else document(*item.named)


def _readable(old: Snapshot) -> Iterator[Entry]:
    try:
        yield from old.sessions()
    except StoreError as error:
        _log.warning("the remaining sessions cannot be read: %s", error)


def _readable_stones(old: Snapshot) -> list[Tombstone]:
    try:
        return old.again().tombstones()
    except StoreError as error:
        _log.warning("the tombstones of ended sessions cannot be read: %s", error)
        return []


def _similar(key: bytes) -> Iterator[str]:
    """Return all ids that differ from this key in one bit."""
    changed = bytearray(key)
    for place, bit in itertools.product(range(len(key)), range(8)):
        changed[place] ^= 1 << bit
        with contextlib.suppress(UnicodeDecodeError):
            yield changed.decode()
        changed[place] ^= 1 << bit


def _kept(old: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Return the facts that a rebuilt store keeps."""
    return {name: old[name] for name in _KEPT if name in old}
