"""The interface of a store, as the engine uses it. The stored form of a session is in `record`.

All calls of a `Store` are awaited, because it may be on another machine. A store that answers from memory or from a
mapped file also offers a `LocalStore`, which is called without `await`: an `await` costs more than the answer, and a
change that was checked against the answer needs no second check.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal, Protocol, TypeAlias

import numpy as np

from stepwell_server.core.idle import IdleLimits
from stepwell_server.core.quotas import Usage
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log
from stepwell_server.process.replicas import StoredReplica
from stepwell_server.store.heads import Heads
from stepwell_server.store.record import F64, U64, RecordBytes

_log = Log("store")

NO_STAMPS: U64 = np.zeros(0, np.uint64)
"""Stamps of no records, or of the records of a store that no other server uses."""
NO_LIMITS: F64 = np.zeros(0, np.float64)
"""No idle limits."""
TOMBSTONES = 100_000
"""Number of tombstones that a local store keeps, of the sessions that ended last."""
MAX_NAME_BYTES, MAX_DOCUMENT_BYTES = 400, 2**20
"""Limits of a document: its name as UTF-8, and its content."""


class StoreError(Exception):
    """The store cannot be opened: the server does not start."""


class DocumentsCorrupt(StoreError):
    """Documents are corrupt or missing. Sessions and other documents are not affected."""

    def __init__(self, message: str, names: Sequence[str], sound: dict[str, bytes]) -> None:
        super().__init__(message)
        self.names = names
        """Names of the corrupt documents, if known."""
        self.sound = sound
        """The requested documents that are intact."""


class KeyFileError(StoreError):
    """Encryption keys are missing or unusable. The message names the file or the keys."""


def require_no_keys(where: str, known: Collection[str]) -> None:
    """Refuse to use an encrypted store without keys. `known` has the ids of its keys, `where` is its location.

    Raises:
        KeyFileError: it was encrypted.
    """
    if known:
        raise KeyFileError(
            f"the store {where} is encrypted with {'key' if len(known) == 1 else 'keys'} {', '.join(sorted(known))}:"
            " give the key file"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Holder:
    """The process that uses a data directory."""

    pid: int
    host: str
    since: float
    """Seconds since the epoch; 0 if unknown."""
    listen: str = ""
    """The address it listens on, if known."""

    def __str__(self) -> str:
        moment = datetime.fromtimestamp(self.since, UTC).isoformat(timespec="seconds")
        since = f", since {moment}" if self.since else ""
        where = f", listening at {self.listen}" if self.listen else ""
        return f"process {self.pid} on {self.host}{since}{where}"


class StoreBusy(StoreError):
    """Another server uses the data directory."""

    def __init__(self, message: str, holder: Holder | None) -> None:
        super().__init__(message)
        self.holder = holder
        """None if it has not written its description."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoreHealth:
    """The state of a store."""

    problem: str = ""
    """Why the store cannot be used now; empty if it can."""
    reopened: int = 0
    """How often it was reopened since the start, after its disk had failed."""
    warning: str = ""
    """What will become a problem unless somebody acts; empty if nothing."""
    warns_of: Literal["disk", "store"] = "disk"
    """What the warning is about: a disk that fills up, or the configuration of a shared store."""
    lost_sessions: int = 0
    """Number of lost sessions found since the start, without the sessions of emptied partitions."""


MAX_CLOSES = 4
"""Number of close requests that are remembered per session id."""
_CLOSES = struct.Struct(f"<{MAX_CLOSES}Q")
CLOSES_BYTES = _CLOSES.size
"""Size of the result of `pack_closes`."""


def pack_closes(closes: Sequence[int]) -> bytes:
    """Encode the request ids of closes in `CLOSES_BYTES`."""
    return _CLOSES.pack(*closes, *[0] * (MAX_CLOSES - len(closes)))


def unpack_closes(stored: bytes) -> tuple[int, ...]:
    """Decode the result of `pack_closes`."""
    return tuple(filter(None, _CLOSES.unpack(stored)))


def with_close(request_id: int, closes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the request ids of closes after another close; a `request_id` of 0 means that the close had none."""
    return (request_id, *closes)[:MAX_CLOSES] if request_id else closes


class End(enum.IntEnum):
    """How a session ended."""

    EXPIRED = 1
    """It was idle for too long."""
    CLOSED = 2
    """A caller closed it."""
    LOST = 4
    """Nobody ended it: the shared store lost it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tombstone:
    """What a store keeps of a session that ended."""

    session_id: str
    end: End
    at: float
    """Seconds since the epoch."""
    closes: tuple[int, ...] = ()
    """Request ids of the latest calls that closed a session of this id, newest first, at most `MAX_CLOSES`.

    A retry of one of them succeeds, and does not close a session that was opened since."""
    revision: int = 0
    """The last known revision."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredSession:
    """A session as a store returns it."""

    record: RecordBytes | None = None
    tombstone: Tombstone | None = None
    """Only set if there is no record."""
    stamp: int = 0
    """Stamp of the record or tombstone, 1 to 2**64-1: that of the commit that wrote it. 0: there is neither."""
    is_known: bool = False
    """The record has the stamp that the caller passed as known: it was not sent, and `record` is None."""
    idle_s: float = math.nan
    """Seconds since the session was last used, by the store's clock. NaN: use the server's own value, or the record's."""


@dataclasses.dataclass(frozen=True, slots=True)
class UnusedSessions:
    """A page of sessions that were not used recently, in an order chosen by the store."""

    heads: Heads
    """Headers of their records, unchecked."""
    stamps: U64
    """`(len(heads),)`: stamps of their records."""
    idle_s: F64
    """`(len(heads),)`: seconds since each was last used, by the store's clock."""
    cursor: str
    """Where the next page begins; empty: this is the last page. An empty page is not necessarily the last."""


# not frozen: that takes ten times as long, and each commit has one
@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Batch:
    """Changes that a store keeps together or not at all. They are applied in the order of these fields."""

    puts: Sequence[tuple[str, RecordBytes]] = ()
    """Records by session id, as `store.record` encodes them; of several with the same id the last one counts.

    A batch with puts only changes existing sessions. New sessions also appear in `counts`.
    """
    deletes: Sequence[str] = ()
    """Sessions to delete, if they exist."""
    forgets: Sequence[str] = ()
    """Session ids whose tombstones are deleted, if they exist, because the id is opened again."""
    tombstones: Sequence[Tombstone] = ()
    """New tombstones. The store has a maximum, and drops the oldest first."""
    counts: Sequence[tuple[str, int]] = ()
    """Changes of the number of sessions per model, if the whole batch is kept.

    A store that keeps members one by one counts those that it kept.
    """
    tenant_counts: Sequence[tuple[str, int]] = ()
    """The same for the counts of tenants: see `store.counts`."""
    documents: Sequence[tuple[str, bytes | None]] = ()
    """The server's own small byte strings, by name. None deletes a document if it exists. Of several with the same name the
    last one counts.

    A name has 1 to `MAX_NAME_BYTES` bytes of UTF-8, a content at most `MAX_DOCUMENT_BYTES`.
    """

    goes_back: bool = False
    """Its records may be older than the stored records of the same sessions, and replace them nevertheless."""

    # The following fields are for shared stores; local stores ignore them.

    follows: U64 = dataclasses.field(default_factory=lambda: NO_STAMPS)
    """`(len(puts),)`: for each put, the required stamp of the current record or, for a new session, of the tombstone; 0: there
    must be neither. So a put that arrives late does not revive a session that ended meanwhile."""
    stamps: U64 = dataclasses.field(default_factory=lambda: NO_STAMPS)
    """`(len(puts),)`: the stamps of the new records. A session that already has its new stamp was kept by an earlier attempt
    of this batch."""
    resized: Collection[str] = ()
    """Existing sessions of `puts` whose counted bytes (`store.counts`) change."""
    delete_follows: U64 = dataclasses.field(default_factory=lambda: NO_STAMPS)
    """`(len(deletes),)`: the required stamp of the deleted record; 0: any."""
    undoes: Sequence[str] = ()
    """Sessions of `deletes` that an uncertain commit with this stamp may have created, or may still create. After this batch,
    a late request of that commit creates nothing."""
    min_idle_s: F64 = dataclasses.field(default_factory=lambda: NO_LIMITS)
    """`(len(deletes),)`, or empty for no limit: a session is deleted only if it was unused for at least this many seconds, by
    the store's clock. Otherwise it conflicts."""
    max_idle_s: F64 = dataclasses.field(default_factory=lambda: NO_LIMITS)
    """`(len(deletes),)`, or empty for no limit: a session is deleted only if it was unused for at most this many seconds, by
    the store's clock. Otherwise it conflicts, so that a delayed deletion is checked again."""
    documents_follow: Mapping[str, bytes | None] = dataclasses.field(default_factory=dict)
    """The required current content of documents; None: absent. A document that is not listed here is overwritten.

    A document that already has its new content counts as written: an earlier attempt of this batch may have done it.
    """

    def __post_init__(self) -> None:
        """Check the limits of documents.

        Raises:
            ValueError: a name or content is too long, or a name is empty or not text.
        """
        for name, content in self.documents:
            _require_document(name, content)

    @property
    def session_ids(self) -> list[str]:
        """All sessions of the batch, possibly with duplicates."""
        ids = [session_id for session_id, _ in self.puts]
        if not (self.deletes or self.forgets or self.tombstones):  # the common case
            return ids
        return [*ids, *self.deletes, *self.forgets, *(stone.session_id for stone in self.tombstones)]


def _require_document(name: str, content: bytes | None) -> None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"the name of a document must be text that UTF-8 can encode; got {name!r}") from None
    if not 1 <= size <= MAX_NAME_BYTES:
        raise ValueError(
            f"the name of a document must have 1 to {MAX_NAME_BYTES} bytes of UTF-8; {name[:40]!r} has {size}"
        )
    if content is not None and len(content) > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"document {name!r} must have at most {MAX_DOCUMENT_BYTES} bytes; it has {len(content)}"
        )


class Outcome(enum.Enum):
    """The result of a commit for one session."""

    KEPT = "kept"
    CONFLICT = "conflict"
    """Another server changed the session after its record was read: its change was not kept."""
    UNKNOWN = "unknown"
    """The store did not answer: the change may have been kept. The next read decides."""


@dataclasses.dataclass(frozen=True, slots=True)
class CommitResult:
    """The result of a commit: the sessions and documents that were not certainly kept."""

    conflicts: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()
    stale: frozenset[str] = frozenset()
    """Documents that were not written, because they did not match `Batch.documents_follow`."""

    def of(self, session_id: str) -> Outcome:
        """Return the outcome for one session."""
        if session_id in self.conflicts:
            return Outcome.CONFLICT
        return Outcome.UNKNOWN if session_id in self.unknown else Outcome.KEPT


ALL_KEPT = CommitResult()


Answer: TypeAlias = "CommitResult | ServerError"
"""The result for each session of a batch, or why nothing was kept."""
OnAnswer: TypeAlias = "Callable[[Answer], None]"


def as_server_error(error: Exception) -> ServerError:
    """Convert an error of a store for callers. Details that callers must not see go to the log."""
    if isinstance(error, ServerError):
        return error
    return _log.internal("the store raised", error)


#: Maximum of sessions in a small write.
SMALL = 64

_NOTHING = Batch()


@dataclasses.dataclass(slots=True, eq=False)
class Write:
    """A batch to be committed, and its answer."""

    build: Callable[[], Batch]
    """Builds the batch, possibly on another thread."""
    size: int
    """Approximate number of records in the batch."""
    done: OnAnswer
    """Receives the answer on the event loop, unless `Store.commit` returned it. It must not raise."""
    is_change: bool = False
    """It only changes existing sessions, which are claimed. So no waiting write concerns them, and it may overtake those."""
    is_for_log: bool = False
    """The store's log keeps it, unless it refuses: see `LocalStore.begin_append`."""
    steps: Sequence[object] = ()
    """Results of compiled code whose answers the writer of a log may send once the disk has the batch, before `done`.

    See `Store.settle`."""
    puts: Sequence[tuple[str, RecordBytes]] | None = None
    """All that the batch has, if that is known before it is built: a log needs no batch."""
    is_made: bool = False
    batch: Batch = _NOTHING
    error: ServerError | None = None

    @property
    def answer(self) -> Answer:
        """The answer of a store that keeps a batch as a whole or not at all."""
        return self.error or ALL_KEPT

    def make(self) -> None:
        """Build the batch once, or note the error."""
        if self.is_made:
            return
        self.is_made = True
        try:
            self.batch = self.build()
        except Exception as error:
            self.error = as_server_error(error)


#: The stamp of all records in a store of one server: no other server writes there.
SOLE = 1


def new_stamp() -> int:
    """Draw a random stamp from 2 to 2**64-1.

    Two commits that follow the same record have the same stamp in one of 2**64 conflicts.
    """
    return max(SOLE + 1, int.from_bytes(os.urandom(8), "little"))


def stamped(stamp: int, count: int) -> U64:
    """Return `Batch.stamps` for records that are written together."""
    return np.array([stamp], np.uint64).repeat(count)


KNOWN = StoredSession(is_known=True)
"""The result for a session whose stamp the caller already knew."""


class Store(Protocol):
    """Keeps encoded records and tombstones by session id, locally or remotely. Lives on one event loop.

    Methods with the same name as in `LocalStore` do the same and raise the same errors.

    Each record has a stamp, a number drawn for the commit that wrote it: see `new_stamp`. A change is kept only if
    the session still has the stamp that was read (`Batch.follows`). A revision would not do: it can repeat, after a
    session was closed and reopened, or after the store lost its last writes. A session that already has its new stamp
    counts as kept, so a batch may be sent again if its answer was lost.
    """

    local: LocalStore | None
    """The same store for calls without `await`; None if calls must be awaited."""

    secret: bytes
    """See `LocalStore`."""

    incarnation: str
    """See `LocalStore`."""

    labels: Mapping[str, str]
    """Labels for metrics. `store_id` is the same for all servers of this store and for no others; `shared` is "true" or "false"."""

    first_revision: int
    """See `LocalStore`."""

    fetch_size: int = 1024
    """The most sessions of one `fetch`. A store that the event loop reads itself has a small one."""

    elsewhere: str = ""
    """Where else a model version may be served, as a phrase for error messages; empty: nowhere."""

    @property
    def damage(self) -> str:
        """See `LocalStore`."""

    def damage_of(self, session_id: str) -> str:  # noqa: ARG002 - of stores that know more
        """The same for one session that was not found; empty: it is not one of the missing sessions."""
        return self.damage

    def commit(self, write: Write) -> Answer | None:
        """Commit a batch. A local store keeps it as a whole or not at all; a shared store does so for each session.

        Returns:
            The answer, if it is already known. None: `write.done` receives it later. When this returns, the store no
            longer needs the buffers of the batch, or it owns them.
        """

    def settle(self) -> None:
        """Call `done` of the commits that have ended.

        The callers of `Write.steps` may be answered before that. Call this before what arrives later, which must find
        what they were answered. A store without such callers has nothing to do.
        """
        return

    async def end_commits(self, timeout_s: float) -> bool:
        """Wait until all commits are answered, when no new ones are made; return False if that takes longer."""

    def new_stamp(self) -> int:
        """Return the stamp for records that are written together: `SOLE` in a store of one server, else a new one."""

    async def fetch(self, session_ids: Sequence[str], known: Sequence[int] = ()) -> list[StoredSession]:
        """Fetch many sessions: their records, or their tombstones.

        A local store does not wait, and no store waits for a record that no other server can have changed.

        A record that cannot be read is returned as empty bytes: decoding it raises `StateCorrupt`.

        Args:
            session_ids: The ids of the sessions.
            known: For each session the stamp that the caller knows, or 0. A record that still has this stamp is not
            sent.

        Raises:
            Unavailable: the store cannot be read now.
        """

    async def touch(self, session_ids: Sequence[str], stamps: Sequence[int]) -> None:
        """Mark sessions as used now, if they have these stamps.

        Raises:
            Unavailable: the store cannot be notified now.
        """

    def note_use(self, session_id: str, *, idle_s: float, limit_s: float) -> None:  # noqa: ARG002 - of stores that need it
        """Record that a session which leaves the server's table was last used `idle_s` seconds ago, and expires after `limit_s`.

        A store that is notified of each use with `touch` ignores this.
        """
        return

    async def unused(self, cursor: str = "", *, limits: IdleLimits, limit: int) -> UnusedSessions:
        """Return a page of sessions that may have exceeded their idle limits, by the store's clock.

        The caller checks each session: a page may contain sessions that are not due. A session that is due appears in
        one complete run through all pages, or soon in a later run.

        Args:
            cursor: The cursor of the previous page; empty: start at the beginning.
            limits: The idle limits.
            limit: Approximate number of sessions to examine; the page has the unused ones among them.

        Raises:
            Unavailable: the store cannot be read now.
        """

    async def claim(self, name: str, whose: str, for_s: float) -> float | None:
        """Claim a task for this many seconds, by the store's clock, or extend the claim.

        This avoids duplicate work of several servers. It is no lock: a delayed server may run a task at the same time
        as another.

        Args:
            name: The task.
            whose: The claimant, unique among all servers.
            for_s: Duration of the claim.

        Returns:
            For how many seconds the caller has held the claim without a break; None: another server holds it.

        Raises:
            Unavailable: the store cannot be asked now.
        """

    async def heads(self, *, after: str = "", prefix: str = "", limit: int) -> Heads:
        """See `LocalStore`."""

    async def count(self) -> int:
        """See `LocalStore`."""

    async def count_of(self, model: str) -> int:
        """See `LocalStore`."""

    async def usage(self, tenant: str) -> Usage | None:
        """Return what all sessions of a tenant use, as the store counts it. None: the server's own count is exact.

        Raises:
            Unavailable: the store cannot be asked now.
        """

    async def uncounted(self, *, after: str = "", limit: int) -> Heads:
        """As `heads`, for records that the server must count when it starts; a store that counts `usage` has none."""

    def count_now(self, model: str) -> int | None:  # noqa: ARG002 - of stores that answer at once
        """As `count_of`, if the store can answer without waiting; None: it cannot.

        Raises:
            Unavailable: the store cannot be read now.
        """
        return None

    async def documents(self, prefix: str = "") -> dict[str, bytes]:
        """See `LocalStore`. Includes everything that was committed before this call."""

    async def documents_changed(self) -> None:
        """Wait until another server may have written a document since the last call; this takes at most a few seconds.

        It may return without a change. In a store of one server it never returns.
        """

    async def announce(self, listen: str) -> None:
        """See `LocalStore`."""

    async def replicas(self, replica_id: str, document: bytes) -> Sequence[StoredReplica]:
        """Write the description of this server for others, and return the descriptions of all servers of the store.

        The own one is missing if the store has no room for it. A store of one server has no others.

        Args:
            replica_id: The id of this server.
            document: Its description: see `process.replicas`. Empty: it leaves the store.

        Raises:
            Unavailable: the store cannot be used now.
        """
        return [StoredReplica(replica_id, document, 0.0)] if document else []

    async def check(self) -> StoreHealth:
        """See `LocalStore`."""

    async def close(self) -> None:
        """See `LocalStore`."""


Parts: TypeAlias = "Sequence[Sequence[tuple[str, RecordBytes]]]"
"""Changes that are written together, each with the records of its sessions."""


class LogWrite(Protocol):
    """A write to a store's log: see `LocalStore.begin_append`."""

    count: int
    """Number of records; 0: it only makes room."""

    def make(self) -> None:
        """Write, and wait for the disk. For any thread.

        Raises:
            Exception: it failed. None of it was kept.
        """


class LogWriter(Protocol):
    """Makes writes to a log on a thread, one after the other. For the event loop, except `close`."""

    def begin(self, write: LogWrite, steps: Sequence[object] = ()) -> None:
        """Begin a write. It may answer `steps` if it succeeds: see `Write.steps`.

        At most one other is under way, which means that it was not taken. If that one fails, this one is not made.
        """

    def withdraw(self) -> bool:
        """Take back the last write, which is behind another one; return False if it has begun or ended."""

    def take(self) -> tuple[Exception | None, float] | None:
        """The error, or None, and the seconds of the first write that has ended. None: none has ended."""

    def close(self, timeout_s: float) -> bool:
        """End after the running write; return False if that takes longer. For any thread."""


class LocalStore(Protocol):
    """Keeps encoded records and tombstones by session id, and answers at once.

    `commit`, `checkpoint` and `close` are called from one thread at a time, and so is `append`, maybe from another at
    the same time; the other methods from any thread, at any time before `close`.
    """

    for_one_thread: bool
    """It is fast, and all its methods are called on the event loop."""

    waits_for_disk: bool
    """`commit` returns after the data is on disk."""

    secret: bytes
    """Random bytes, drawn when the store was created, which make generated session ids unguessable."""

    incarnation: str
    """Eight random hex digits, drawn when the store was created. They never change."""

    first_revision: int
    """Initial revision of sessions. In a restored store it is higher than any revision that clients have seen; otherwise 0."""

    @property
    def damage(self) -> str:
        """What is known about sessions that are missing although nobody ended them; empty: none are known.

        Otherwise a session that is not found may be one of them.
        """

    def commit(self, batch: Batch) -> None:
        """Keep a whole batch, with the configured durability, or nothing of it.

        Raises:
            Unavailable: it could not be kept. Nothing of it was written, unless the disk failed in the very last write.
                Then `get` shows which.
        """

    has_log: bool = False
    """`append` is worth trying."""

    def append(self, puts: Sequence[tuple[str, RecordBytes]]) -> bool:  # noqa: ARG002
        """Keep changes of existing sessions, as durably as `commit`, while a commit may be running.

        Args:
            puts: A few changes. The running commit concerns none of their sessions.

        Returns:
            Whether all were kept. If not, none was: `commit` keeps them, or raises the reason.
        """
        return False

    # If `has_log` and `waits_for_disk`, the event loop appends with the following five, so that it need not wait.

    def sealed(self, puts: Sequence[tuple[str, RecordBytes]]) -> Sequence[tuple[str, RecordBytes]]:
        """Return changes in the form of the log. For any thread."""
        return puts

    def begin_append(self, parts: Parts, after: LogWrite | None = None) -> LogWrite | None:  # noqa: ARG002
        """Begin to append changes of existing sessions while a commit may be running: see `append`.

        Args:
            parts: Changes that `sealed` returned.
            after: The only write that has begun and not ended, if any: see `LogWriter.begin`.

        Returns:
            A write to make; call `end_append` afterwards. None: behind another write, try again once that has ended;
            otherwise `commit` keeps the changes, or raises the reason.
        """
        return None

    def withdraw_append(self, write: LogWrite) -> None:  # noqa: ARG002
        """Withdraw the last write, which is behind another one and was not made."""
        raise AssertionError("it was begun before")

    def end_append(self, write: LogWrite, error: Exception | None, seconds: float) -> bool:  # noqa: ARG002
        """End a write that took this long; return whether the changes were kept. If not, begin again or commit them."""
        return False

    def new_writer(self, on_end: Callable[[], None]) -> LogWriter:  # noqa: ARG002
        """Return a writer for these writes. `on_end` is called on the running event loop after each."""
        raise AssertionError("a store with a log has a writer")

    @property
    def needs_checkpoint(self) -> bool:
        """`checkpoint` has something to do."""

    behind: int = 0
    """Number of records to checkpoint now, to keep up with commits."""

    def checkpoint(self, *, briefly: bool = False) -> None:
        """Do a part of the work that can wait until after a commit was answered. It does not raise.

        Args:
            briefly: Only a small part, because callers may be waiting.
        """

    def get(self, session_id: str) -> RecordBytes | None:
        """The record of a session, or None.

        Raises:
            StateCorrupt: it exists and cannot be read.
            Unavailable: the store cannot be read now.
        """

    def get_many(self, session_ids: Sequence[str]) -> list[RecordBytes | None]:
        """Return the records of many sessions; None: there is none.

        A record that cannot be read is returned as empty bytes: decoding it raises `StateCorrupt`.

        Raises:
            Unavailable: the store cannot be read now.
        """

    def heads(self, *, after: str = "", prefix: str = "", limit: int) -> Heads:
        """Return the headers of records as columns, in the order of session ids. Records are not checked.

        Ids of more than 511 bytes that share their first 478 bytes have no defined order among themselves.

        Args:
            after: Start after this id, whether or not it exists.
            prefix: Only ids with this prefix; a store may ignore what follows its first 478 bytes.
            limit: Maximum number of records.
        """

    def count(self) -> int:
        """Return the number of sessions."""

    def count_of(self, model: str) -> int:
        """Return the count of this name, usually the sessions of a model, as the sum of the counts of all batches."""

    def tombstones(self, session_ids: Sequence[str]) -> list[Tombstone | None]:
        """Return the tombstones of many sessions; None: there is none."""

    def documents(self, prefix: str = "") -> dict[str, bytes]:
        """Return all documents whose name begins with `prefix`, in the order of their names.

        Raises:
            DocumentsCorrupt: one of them is corrupt, or some document is missing.
            Unavailable: the store cannot be read now.
        """

    def announce(self, listen: str) -> None:
        """Publish the address on which the store's server listens, for people who inspect the store."""

    def check(self) -> StoreHealth:
        """Check the store and repair what can be repaired. Called every few seconds, from any thread.

        Raises:
            StoreGone: it cannot be repaired. All changes are refused from now on.
        """

    def close(self) -> None:
        """Make everything committed survive a loss of power, and close. May be called again."""


class WriteObserver(Protocol):
    """Receives the durations of successful writes to disk, in seconds. Calls of one method never overlap."""

    def log_written(self, seconds: float, records: int) -> None:
        """One write to the log took this long, including the wait for the disk, if any."""

    def data_written(self, seconds: float) -> None:
        """An LMDB transaction took this long."""
