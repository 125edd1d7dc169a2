"""Backups of stores that several servers share, stores that are made of backups, and whether such a store is whole.

A backup is the same file whatever the store, and either kind of store can be made of it. Servers may use a shared store
meanwhile. It has no moment at which all of it can be read: each session is in the backup as it was at some moment between
begin and end, and so are the documents, which come last: they know each move that a session tells of. What is remembered of
sessions that have ended is not in it.
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
from stepwell_server.store.record import header_or_none, is_sound
from stepwell_server.store.valkey.bulk import Whole, made, opened
from stepwell_server.store.valkey.connection.url import DEFAULT_PARTITIONS, StoreUrl
from stepwell_server.store.valkey.meta import Meta
from stepwell_server.store.verification import MAX_NAMED, Records, Verification, require_keys

_MAX_BATCH_SIZE, _MAX_BATCH_BYTES = 500, 4 * 2**20
"""Sessions that are put together, and bytes of them."""
_LOOKS = 3
"""So often counts are compared: sessions may begin and end between looking at them and at their counts."""
_Result = TypeVar("_Result")


def back_up(url: StoreUrl, file: Path, clock: Clock, *, bytes_per_s: float = math.inf) -> BackupSummary:
    """Write a shared store into a new file, whether or not servers use it.

    Each session that is there all the time is in it with all that was acknowledged before, or later.

    Raises:
        StoreError: the store lost sessions or cannot be read, or the file not be written; then there is no file.
    """
    return _run(url, _back_up(url, file, clock, bytes_per_s))


async def _back_up(url: StoreUrl, file: Path, clock: Clock, bytes_per_s: float) -> BackupSummary:
    writer = Writer(file, bytes_per_s=bytes_per_s)
    damaged, lost = 0, list[str]()
    try:
        async with opened(url, clock) as whole:
            about = whole.about
            checks = dict(about.key_checks)
            writer.begin(About(clock.now(), about.incarnation, about.secret, about.first_revision, checks))
            for partition in range(about.partitions):
                async for members in whole.sessions(partition):
                    for member in members:
                        if member.record is None:
                            lost.append(member.session_id)
                            continue
                        damaged += not is_sound(member.session_id, member.record)
                        writer.session(member.session_id, bytes(member.record))
            if lost:
                raise StoreError(
                    f"the store at {url} must have all its sessions; {len(lost)} are missing, {lost[0]!r} among them: their"
                    " keys were deleted or evicted. stepwell store verify names them"
                )
            documents, damaged_documents = await _documents(whole)
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


async def _documents(whole: Whole) -> tuple[list[Item], list[str]]:
    """Those that are as they were written, and the names of the others."""
    try:
        found, damaged = await whole.store.documents(), list[str]()
    except DocumentsCorrupt as error:
        found, damaged = error.sound, list(error.names)
    return [item(name, content) for name, content in found.items()], damaged


def restore(
    file: Path, url: StoreUrl, clock: Clock, keyring: Keyring | None, *, moved: bool
) -> RestoreSummary:
    """Make a shared store of a backup, where there is none yet. The whole backup is read and checked before.

    No server can use the store before it is whole. Documents that are damaged in the backup are left out.

    Args:
        file: The backup, of whatever store.
        url: Where the new store is to be.
        clock: For revisions that nobody was told.
        keyring: Keys of the backup: all is encrypted with the first one then.
        moved: No change was acknowledged since the backup was made: sessions go on as they were.

    Raises:
        StoreError: the backup cannot be used, or there is a store already, or none can be made.
        KeyFileError: it is encrypted, and a key is missing.
    """
    source = checked(file, clock, keyring, moved=moved)
    about = source.about
    said = Meta(
        url.partitions or DEFAULT_PARTITIONS,
        about.secret if moved else secrets.token_bytes(len(about.secret)),
        about.incarnation if moved else secrets.token_hex(4),
        source.first_revision,
        about.key_checks if keyring is None else keyring.first_check,
    )
    return _run(url, _restore(source, url, clock, said))


async def _restore(source: Source, url: StoreUrl, clock: Clock, said: Meta) -> RestoreSummary:
    documents, stones, part = DocumentSet(), list[Tombstone](), list[Pair]()
    size = sessions = ended = 0
    async with made(url, clock, said) as whole:
        for entry in source.reader.entries():
            if isinstance(entry, Item):
                documents.add(entry)
            elif isinstance(entry, Tombstone):
                stones.append(entry)
                if len(stones) == _MAX_BATCH_SIZE:
                    await whole.store.apply(Batch(tombstones=stones))
                    stones, ended = [], ended + len(stones)
            else:
                part.append(source.change(*entry))
                size += len(part[-1][1])
                if len(part) == _MAX_BATCH_SIZE or size >= _MAX_BATCH_BYTES:
                    await whole.put(part)
                    part, size, sessions = [], 0, sessions + len(part)
        if part:
            await whole.put(part)
        if stones:
            await whole.store.apply(Batch(tombstones=stones))
        if documents.sound:
            await whole.store.apply(Batch(documents=list(documents.sound.items())))
    return RestoreSummary(
        source.about.created,
        sessions + len(part),
        ended + len(stones),
        source.change.damaged,
        source.first_revision,
        len(documents.sound),
        len(documents.damaged),
    )


def examine(url: StoreUrl, keyring: Keyring | None, clock: Clock) -> Verification:
    """Look at all of a shared store, whether or not servers use it. With keys, records are decrypted too.

    Raises:
        StoreError: it cannot be read at all, or a key is missing.
    """
    return _run(url, _examine(url, keyring, clock))


async def _examine(url: StoreUrl, keyring: Keyring | None, clock: Clock) -> Verification:
    wrong: list[str] = []
    lost = 0
    async with opened(url, clock) as whole:
        require_keys(keyring, whole.about.key_checks)
        records = Records(keyring)
        for partition in range(whole.about.partitions):
            expected: Counter[str] | None = Counter()
            async for members in whole.sessions(partition):
                for member in members:
                    if member.record is None:
                        lost += 1
                        if len(records.found.unreachable) < MAX_NAMED:
                            records.found.unreachable.append(member.session_id)
                        expected = None
                        continue
                    records.look(member.session_id, bytes(member.record))
                    expected = _counted(expected, member.session_id, bytes(member.record))
            if expected is not None and not await _counts_are(whole, partition, expected):
                wrong.append(
                    f"the numbers of sessions in partition {partition} must be {dict(expected)}; the store says"
                    f" {dict(await whole.counts(partition))}"
                )
        found = DocumentSet()
        items, damaged = await _documents(whole)
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
    """The counts with one session more; None: they cannot be known, as a record is damaged."""
    header = header_or_none(session_id, record)
    if expected is None or header is None:
        return None
    expected[header.model] += 1
    for name, count in counts.of_tenants([(session_id, header.model)], 1):
        expected[name] += count
    for name, count in counts.of_usage([(session_id, counts.usage_of(header))]):
        expected[name] += count
    return expected


async def _counts_are(whole: Whole, partition: int, expected: Counter[str]) -> bool:
    """Whether a partition's counts are those of its sessions, at some moment."""
    for _ in range(_LOOKS):
        if await whole.counts(partition) == expected:
            return True
        expected.clear()
        async for members in whole.sessions(partition):
            for member in members:
                if (
                    member.record is None
                    or _counted(expected, member.session_id, bytes(member.record)) is None
                ):
                    return True  # which is said elsewhere
    return await whole.counts(partition) == expected


def _run(url: StoreUrl, work: Awaitable[_Result]) -> _Result:
    """Do it.

    Raises:
        StoreError: also in place of what servers say.
    """

    async def run() -> _Result:
        try:
            return await work
        except ServerError as error:
            raise StoreError(f"the store at {url} cannot be used: {error.message}") from error

    return asyncio.run(run())
