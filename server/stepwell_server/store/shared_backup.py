"""Backup, restore and verification of shared stores.

The format of a backup does not depend on the kind of store, and any kind of store can be restored from it. Servers
may use a shared store during its backup. It offers no consistent snapshot: each session, and then each document, is in
the backup
as of some moment during the backup. Documents come last, so that they include every move that a session refers to. The
backup contains no tombstones.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

from stepwell._admin.record_file import Kind
from stepwell_server.clock import Clock
from stepwell_server.errors import ServerError
from stepwell_server.store import counts
from stepwell_server.store.backup import BackupSummary, RestoreSummary, Source, checked
from stepwell_server.store.base import Batch, DocumentsCorrupt, StoreError, Tombstone
from stepwell_server.store.disk.backup.file import About, Writer
from stepwell_server.store.disk.backup.new_store import Pair
from stepwell_server.store.disk.documents import DocumentSet, Item, item
from stepwell_server.store.encryption.keyring import Keyring
from stepwell_server.store.record import header_or_none, is_complete
from stepwell_server.store.valkey.bulk import BulkStore, create, open_existing
from stepwell_server.store.valkey.connection.url import DEFAULT_PARTITIONS, StoreUrl
from stepwell_server.store.valkey.meta import Meta
from stepwell_server.store.verification import MAX_NAMED, Verification, Verifier, require_keys

_MAX_BATCH_SIZE, _MAX_BATCH_BYTES = 500, 4 * 2**20
"""Maximum of sessions and bytes that are put together."""
_MAX_TRIES = 3
"""Number of comparisons of counts: sessions may begin and end between reading them and their counts."""
_Result = TypeVar("_Result")


def back_up(url: StoreUrl, file: Path, clock: Clock, *, bytes_per_s: float = math.inf) -> BackupSummary:
    """Write a shared store to a new file, whether or not servers use it.

    Each session that exists throughout is in the backup with everything acknowledged before, or with later changes.

    Raises:
        StoreError: the store lost sessions or cannot be read, or the file cannot be written. Then there is no file.
    """
    return _run(url, _back_up(url, file, clock, bytes_per_s))


async def _back_up(url: StoreUrl, file: Path, clock: Clock, bytes_per_s: float) -> BackupSummary:
    writer = Writer(file, bytes_per_s=bytes_per_s)
    damaged, lost = 0, list[str]()
    try:
        async with open_existing(url, clock) as store:
            about = store.about
            checks = dict(about.key_checks)
            writer.begin(About(clock.now(), about.incarnation, about.secret, about.first_revision, checks))
            for partition in range(about.partitions):
                async for members in store.sessions(partition):
                    for member in members:
                        if member.record is None:
                            lost.append(member.session_id)
                            continue
                        damaged += not is_complete(member.session_id, member.record)
                        writer.session(member.session_id, bytes(member.record))
            if lost:
                raise StoreError(
                    f"the store at {url} must have all its sessions; {len(lost)} are missing, {lost[0]!r} among them: their"
                    " keys were deleted or evicted. Run stepwell store verify to list them"
                )
            documents, damaged_documents = await _documents(store)
            for each in documents:
                writer.document(each)
        writer.finish()
    finally:
        writer.close()
    return BackupSummary(
        file,
        writer.byte_count,
        writer.counts[Kind.SESSION],
        0,
        damaged,
        sorted(checks),
        writer.counts[Kind.DOCUMENT],
        len(damaged_documents),
    )


async def _documents(store: BulkStore) -> tuple[list[Item], list[str]]:
    """Return the intact documents, and the names of the corrupt ones."""
    try:
        found, damaged = await store.store.documents(), list[str]()
    except DocumentsCorrupt as error:
        found, damaged = error.sound, list(error.names)
    return [item(name, content) for name, content in found.items()], damaged


def restore(
    file: Path, url: StoreUrl, clock: Clock, keyring: Keyring | None, *, moved: bool
) -> RestoreSummary:
    """Create a shared store from a backup. The whole backup is read and checked first.

    No server can use the store before it is complete. Corrupt documents of the backup are left out.

    Args:
        file: The backup, of any kind of store.
        url: The location of the new store.
        clock: For revisions that no client has seen.
        keyring: Keys of the backup. The new store is encrypted with the first one.
        moved: No change was acknowledged after the backup, so that sessions keep their revisions.

    Raises:
        StoreError: the backup cannot be used, or a store exists already, or none can be created.
        KeyFileError: it is encrypted, and a key is missing.
    """
    source = checked(file, clock, keyring, moved=moved)
    about = source.about
    about_new = Meta(
        url.partitions or DEFAULT_PARTITIONS,
        about.secret if moved else secrets.token_bytes(len(about.secret)),
        about.incarnation if moved else secrets.token_hex(4),
        source.first_revision,
        about.key_checks if keyring is None else keyring.first_check,
    )
    return _run(url, _restore(source, url, clock, about_new))


async def _restore(source: Source, url: StoreUrl, clock: Clock, about: Meta) -> RestoreSummary:
    documents, stones, part = DocumentSet(), list[Tombstone](), list[Pair]()
    size = sessions = ended = 0
    async with create(url, clock, about) as store:
        for entry in source.reader.entries():
            if isinstance(entry, Item):
                documents.add(entry)
            elif isinstance(entry, Tombstone):
                stones.append(entry)
                if len(stones) == _MAX_BATCH_SIZE:
                    await store.store.apply(Batch(tombstones=stones))
                    stones, ended = [], ended + len(stones)
            else:
                part.append(source.change(*entry))
                size += len(part[-1][1])
                if len(part) == _MAX_BATCH_SIZE or size >= _MAX_BATCH_BYTES:
                    await store.put(part)
                    part, size, sessions = [], 0, sessions + len(part)
        if part:
            await store.put(part)
        if stones:
            await store.store.apply(Batch(tombstones=stones))
        if documents.sound:
            await store.store.apply(Batch(documents=list(documents.sound.items())))
    return RestoreSummary(
        source.about.created,
        sessions + len(part),
        ended + len(stones),
        source.change.damaged,
        source.first_revision,
        len(documents.sound),
        len(documents.damaged),
    )


def verify(url: StoreUrl, keyring: Keyring | None, clock: Clock) -> Verification:
    """Check a whole shared store, whether or not servers use it. With keys, records are decrypted too.

    Raises:
        StoreError: it cannot be read at all, or a key is missing.
    """
    return _run(url, _verify(url, keyring, clock))


async def _verify(url: StoreUrl, keyring: Keyring | None, clock: Clock) -> Verification:
    wrong: list[str] = []
    lost = 0
    async with open_existing(url, clock) as store:
        require_keys(keyring, store.about.key_checks)
        records = Verifier(keyring)
        for partition in range(store.about.partitions):
            expected: Counter[str] | None = Counter()
            async for members in store.sessions(partition):
                for member in members:
                    if member.record is None:
                        lost += 1
                        if len(records.found.unreachable) < MAX_NAMED:
                            records.found.unreachable.append(member.session_id)
                        expected = None
                        continue
                    records.check(member.session_id, bytes(member.record))
                    expected = _counted(expected, member.session_id, bytes(member.record))
            if expected is not None and not await _counts_are(store, partition, expected):
                wrong.append(
                    f"the counts of sessions in partition {partition} must be {dict(expected)}; the store has"
                    f" {dict(await store.counts(partition))}"
                )
        found = DocumentSet()
        items, damaged = await _documents(store)
        for each in items:
            found.add(each)
        found.damaged += damaged
    result = records.conclude()
    records.documents(found)
    if lost:
        result.problems.append(f"{lost} sessions have no record: their keys were deleted or evicted")
    result.problems += wrong
    return result


def _counted(expected: Counter[str] | None, session_id: str, record: bytes) -> Counter[str] | None:
    """Return the counts with one more session; None: unknown, because a record is corrupt."""
    header = header_or_none(session_id, record)
    if expected is None or header is None:
        return None
    expected[header.model] += 1
    for name, count in counts.of_tenants([(session_id, header.model)], 1):
        expected[name] += count
    for name, count in counts.of_usage([(session_id, counts.usage_of(header))]):
        expected[name] += count
    return expected


async def _counts_are(store: BulkStore, partition: int, expected: Counter[str]) -> bool:
    """Whether a partition's counts match its sessions at some moment."""
    for _ in range(_MAX_TRIES):
        if await store.counts(partition) == expected:
            return True
        expected.clear()
        async for members in store.sessions(partition):
            for member in members:
                if (
                    member.record is None
                    or _counted(expected, member.session_id, bytes(member.record)) is None
                ):
                    return True  # reported elsewhere
    return await store.counts(partition) == expected


def _run(url: StoreUrl, work: Awaitable[_Result]) -> _Result:
    """Run a coroutine.

    Raises:
        StoreError: raised by it, or in place of a `ServerError`.
    """

    async def run() -> _Result:
        try:
            return await work
        except ServerError as error:
            raise StoreError(f"the store at {url} cannot be used: {error.message}") from error

    return asyncio.run(run())
