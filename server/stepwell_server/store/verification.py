"""Verifies a store on disk or a backup: every record, document, key and count."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from stepwell_server.core.namespaces import SEPARATOR
from stepwell_server.store.base import KeyFileError, Tombstone
from stepwell_server.store.counts import of_tenants
from stepwell_server.store.disk.backup import snapshot
from stepwell_server.store.disk.backup.file import Reader
from stepwell_server.store.disk.documents import DocumentSet, Item
from stepwell_server.store.disk.key_sums import Sums
from stepwell_server.store.encryption.keyring import Keyring
from stepwell_server.store.encryption.sealer import Sealer
from stepwell_server.store.record import RecordBytes, header_or_none, is_sound, key_id_of, records_of

MAX_NAMED = 1000
"""Maximum of sessions named per kind of problem."""


@dataclasses.dataclass(slots=True)
class Verification:
    """The result of a verification."""

    sessions: int = 0
    tombstones: int = 0
    logged: int = 0
    """Sessions whose last change is in the write-ahead log."""
    encrypted: Counter[str] = dataclasses.field(default_factory=Counter)
    """Number of encrypted records, by key."""
    opened: int = 0
    """How many of them could be decrypted."""
    damaged: list[str] = dataclasses.field(default_factory=list)
    """Sessions whose record is corrupt, or unreadable for this release; at most `MAX_NAMED`."""
    sealed: list[str] = dataclasses.field(default_factory=list)
    """Sessions whose record none of the given keys decrypts."""
    unreachable: list[str] = dataclasses.field(default_factory=list)
    """Existing sessions that a search for their id does not find."""
    problems: list[str] = dataclasses.field(default_factory=list)
    """All problems, as text; empty: none."""
    models: Counter[str] = dataclasses.field(default_factory=Counter)
    documents: int = 0
    damaged_documents: list[str] = dataclasses.field(default_factory=list)
    """Names of documents that are corrupt, or that a search does not find; at most `MAX_NAMED`."""


class Verifier:
    """Checks records one by one."""

    def __init__(self, keyring: Keyring | None) -> None:
        self.found = Verification()
        self._sealer = None if keyring is None else Sealer(keyring)
        self._counts: Counter[str] = Counter()
        self._of_tenants: Counter[str] = Counter()

    def check(self, session_id: str, record: RecordBytes) -> None:
        """Check a session's value as stored."""
        found = self.found
        found.sessions += 1
        header = header_or_none(session_id, record) if is_sound(session_id, record) else None
        if header is None:
            self._name("damaged", found.damaged, session_id)
            return
        found.models[header.model] += 1
        if SEPARATOR in session_id:
            self._of_tenants.update(dict(of_tenants([(session_id, header.model)], 1)))
        key_id = key_id_of(record)
        if key_id is None:
            return
        found.encrypted[key_id] += 1
        if self._sealer is not None:
            opened = self._sealer.opened_or_as_is(session_id, record)
            if all(key_id_of(each) is None for each in records_of(opened)):
                found.opened += 1
            else:
                self._name("sealed", found.sealed, session_id)

    def documents(self, found: DocumentSet) -> None:
        """Add the result for documents, after `conclude`."""
        self.found.documents = len(found.items)
        self.found.damaged_documents = found.damaged[:MAX_NAMED]
        if found.damaged:
            self.found.problems.append(f"{len(found.damaged)} documents are corrupt")
        if found.problem:
            self.found.problems.append(f"documents: {found.problem}")

    def counts(self) -> dict[str, int]:
        """Return the counts of sessions, see `store.counts`."""
        return dict(self.found.models + self._of_tenants)

    def unreachable(self, session_id: str) -> None:
        """Note a session that a search for its id does not find."""
        self._name("unreachable", self.found.unreachable, session_id)

    def _name(self, kind: str, names: list[str], session_id: str) -> None:
        self._counts[kind] += 1
        if len(names) < MAX_NAMED:
            names.append(session_id)

    def conclude(self) -> Verification:
        """Add the problems, after all records were checked."""
        for kind, what in (
            ("damaged", "sessions have corrupt records"),
            ("sealed", "sessions have records that no key of the file decrypts"),
            ("unreachable", "sessions exist but are not found by their id: keys or pages are corrupt"),
        ):
            if count := self._counts[kind]:
                self.found.problems.append(f"{count} {what}")
        return self.found


def verify(path: Path, keyring: Keyring | None) -> Verification:
    """Check a whole store, whether or not a server uses it. With keys, records are decrypted too.

    Raises:
        StoreError: it cannot be read at all, or a key is missing.
    """
    with snapshot.opened(path) as found:
        require_keys(keyring, found.key_checks)
        records, sums, before = Verifier(keyring), Sums(), b""
        for entry in found.sessions():
            records.check(entry.session_id, entry.record)
            sums.add([entry.key])
            if not entry.is_found or entry.key <= before:
                records.unreachable(entry.session_id)
            before = entry.key
        stones = found.tombstones()
        result = records.conclude()
        result.tombstones, result.logged = len(stones), len(found.log)
        expected = found.expected
        if sums != expected:
            missing = expected.count - sums.count
            result.problems.append(
                f"{missing} of {expected.count} sessions are missing: keys or pages are corrupt"
                if missing > 0
                else "keys are corrupt: some of the sessions are missing"
            )
        if not result.problems and (counts := found.counts) != records.counts():
            result.problems.append(
                f"the counts of sessions must be {records.counts()}; the store has {counts}"
            )
        records.documents(found.documents())
    return result


def verify_backup(file: Path, keyring: Keyring | None) -> Verification:
    """As `verify`, for a backup.

    Raises:
        StoreError: the file is not a backup, is corrupt or truncated, or a key is missing.
    """
    reader = Reader(file)
    require_keys(keyring, reader.about().key_checks)
    records, documents = Verifier(keyring), DocumentSet()
    for entry in reader.entries():
        if isinstance(entry, Item):
            documents.add(entry)
        elif not isinstance(entry, Tombstone):
            records.check(*entry)
    result = records.conclude()
    records.documents(documents)
    result.tombstones = reader.tombstones
    return result


def require_keys(keyring: Keyring | None, checks: Mapping[str, bytes]) -> None:
    """Require the keys of a store, if a keyring is given. Without one, encrypted records are not decrypted.

    Raises:
        KeyFileError: a key is missing or different.
    """
    if keyring is not None:
        try:
            keyring.require(checks)
        except KeyFileError as error:
            raise KeyFileError(
                f"{error}. Without a key file, everything except encrypted data is checked"
            ) from None
