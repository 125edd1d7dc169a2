"""What the engine asks of a store. What is kept of a session is in `record`.

A store is asked with `await`, for it may be on another machine: `Store`. One that answers from memory or from a mapped
file is a `LocalStore` beside, and is called in place: an `await` costs more than its answer, and changes that are
judged by what it says need no second look.
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
from stepwell_server.store.heads import Heads
from stepwell_server.store.record import F64, U64, RecordBytes

_log = Log("store")

NO_STAMPS: U64 = np.zeros(0, np.uint64)
"""Of no records, or of those of a store that nobody else uses."""
NO_LIMITS: F64 = np.zeros(0, np.float64)
"""Of nothing."""
TOMBSTONES = 100_000
"""Of the latest sessions that are gone, a local store remembers so many."""
MAX_NAME_BYTES, MAX_DOCUMENT_BYTES = 400, 2**20
"""Of a document: the limits of its name, as UTF-8, and of its content."""


class StoreError(Exception):
    """The store cannot be opened: the server does not start."""


class DocumentsCorrupt(StoreError):
    """Documents are not as they were written, or missing. Sessions and other documents are not concerned."""

    def __init__(self, message: str, names: Sequence[str], sound: dict[str, bytes]) -> None:
        super().__init__(message)
        self.names = names
        """Of the documents that are damaged, as far as they are known."""
        self.sound = sound
        """Those that were asked for and are as they were written."""


class KeyFileError(StoreError):
    """Keys of encryption are missing, or cannot be used. The message names the file or the keys."""


def require_no_keys(where: str, known: Collection[str]) -> None:
    """See that a store that is used without keys has none; `known` are the ids of those it has, `where` is its place.

    Raises:
        KeyFileError: it was encrypted.
    """
    if known:
        raise KeyFileError(
            f"the store {where} is encrypted, with {'key' if len(known) == 1 else 'keys'}"
            f" {', '.join(sorted(known))}: their file must be given"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Holder:
    """Who uses a data directory."""

    pid: int
    host: str
    since: float
    """Seconds since the epoch; 0 if it is not known."""
    listen: str = ""
    """The address it serves at, if it is known."""

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
        """None if it has not said who it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoreHealth:
    """How a store is."""

    problem: str = ""
    """Why it cannot be used for now; empty if it can."""
    reopened: int = 0
    """How often it was opened anew since the start, because its disk had failed."""
    warning: str = ""
    """What will become a problem if nobody does anything; empty if nothing."""
    warns_of: Literal["disk", "store"] = "disk"
    """What the warning is about: a disk that fills up, or how others run the store."""
    lost_sessions: int = 0
    """So many sessions were found to be lost, since the start: each alone, beside those of parts that were emptied."""


MAX_CLOSES = 4
"""Request ids of closes that an id remembers."""
_CLOSES = struct.Struct(f"<{MAX_CLOSES}Q")
CLOSES_BYTES = _CLOSES.size
"""Of `pack_closes`."""


def pack_closes(closes: Sequence[int]) -> bytes:
    """The request ids of closes as they are stored, in `CLOSES_BYTES`."""
    return _CLOSES.pack(*closes, *[0] * (MAX_CLOSES - len(closes)))


def unpack_closes(stored: bytes) -> tuple[int, ...]:
    """What `pack_closes` was given."""
    return tuple(filter(None, _CLOSES.unpack(stored)))


def with_close(request_id: int, closes: tuple[int, ...]) -> tuple[int, ...]:
    """The request ids of closes once another one has closed a session; 0: it had none."""
    return (request_id, *closes)[:MAX_CLOSES] if request_id else closes


class End(enum.IntEnum):
    """How a session ended."""

    EXPIRED = 1
    """It was idle for too long."""
    CLOSED = 2
    """A caller closed it."""
    LOST = 4
    """Nobody ended it: the store, which others use too, has lost it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tombstone:
    """What is remembered of a session that is gone."""

    session_id: str
    end: End
    at: float
    """Seconds since the epoch."""
    closes: tuple[int, ...] = ()
    """Request ids of the latest calls that closed a session of this id, the last one first, at most `MAX_CLOSES`.

    A retry of one of them succeeds, and closes nothing that was opened since."""
    revision: int = 0
    """The last one known."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredSession:
    """What a store has of a session."""

    record: RecordBytes | None = None
    tombstone: Tombstone | None = None
    """Only looked for where there is no record."""
    stamp: int = 0
    """Of the record, or the tombstone: that of the commit that wrote it, 1 to 2**64-1. 0: there is neither."""
    is_known: bool = False
    """The record has the stamp that the caller knew: it was not sent, and `record` is None."""
    idle_s: float = math.nan
    """Seconds since the session was last used, by the store's clock. NaN: what the server knows counts, or the record says."""


@dataclasses.dataclass(frozen=True, slots=True)
class UnusedSessions:
    """Some sessions that nobody has used lately, as far as the store knows, in an order of the store's own."""

    heads: Heads
    """What their records say; not checked."""
    stamps: U64
    """`(len(heads),)`: of their records."""
    idle_s: F64
    """`(len(heads),)`: seconds since each was last used, by the store's clock."""
    cursor: str
    """Where the next ones begin; empty: there are no more. There may be more where this page has none."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Changes that are kept together or not at all. They are applied in the order of these fields."""

    puts: Sequence[tuple[str, RecordBytes]] = ()
    """Records by session id, as `store.record` encodes them; the last one of an id counts.

    A batch that has nothing else is of sessions that are there: one that begins is in `counts`.
    """
    deletes: Sequence[str] = ()
    """Sessions to forget, where there are any."""
    forgets: Sequence[str] = ()
    """Sessions whose tombstones go, where there are any: the id is opened anew."""
    tombstones: Sequence[Tombstone] = ()
    """At most so many are kept as the store was told; the oldest are forgotten first."""
    counts: Sequence[tuple[str, int]] = ()
    """By how much the number of a model's sessions changes, if all of the batch is kept.

    A store that keeps members one by one counts those that it kept.
    """
    tenant_counts: Sequence[tuple[str, int]] = ()
    """The same of what is counted of tenants: `store.counts`."""
    documents: Sequence[tuple[str, bytes | None]] = ()
    """Small byte strings of the server itself by name, each as a whole; None removes one, where it is. The last of a name
    counts.

    A name has 1 to `MAX_NAME_BYTES` bytes of UTF-8, a content at most `MAX_DOCUMENT_BYTES`.
    """

    goes_back: bool = False
    """Its records may be of earlier changes than what the store had of the same sessions: they count all the same."""

    # What follows is for stores that others use too; those that answer in place do not look at it.

    follows: U64 = dataclasses.field(default_factory=lambda: NO_STAMPS)
    """`(len(puts),)`: the stamp of what each put follows, a record or, where a session begins, a tombstone; 0: there must be
    neither. So what was sent long ago does not bring a session back that ended meanwhile."""
    stamps: U64 = dataclasses.field(default_factory=lambda: NO_STAMPS)
    """`(len(puts),)`: what the records are stamped with. A session that has it already was kept by this very batch."""
    resized: Collection[str] = ()
    """Those of `puts` that are there, and of which the bytes that count (`store.counts`) are others than before."""
    delete_follows: U64 = dataclasses.field(default_factory=lambda: NO_STAMPS)
    """`(len(deletes),)`: the stamp of the record that is deleted; 0: whatever is there."""
    undoes: Sequence[str] = ()
    """Those of `deletes` that a commit with the stamp may have begun, or may yet: what of that comes later begins nothing."""
    min_idle_s: F64 = dataclasses.field(default_factory=lambda: NO_LIMITS)
    """`(len(deletes),)`, or empty for no limit: each is only deleted if it was unused for at least this many seconds, by the
    store's clock, and else conflicts."""
    max_idle_s: F64 = dataclasses.field(default_factory=lambda: NO_LIMITS)
    """`(len(deletes),)`, or empty for no limit: each is only deleted if it was unused for at most this many seconds, by the
    store's clock, and else conflicts. So a late deletion, whose sender was held up, is judged again."""
    documents_follow: Mapping[str, bytes | None] = dataclasses.field(default_factory=dict)
    """What documents must be now to be written; None: absent. Of a name that is not in it the last write counts.

    One that is already as it is to be was written, maybe by this very batch, whose answer was lost.
    """

    def __post_init__(self) -> None:
        """Refuse documents that no store keeps.

        Raises:
            ValueError: a name or a content is too long, or a name is empty or no text.
        """
        for name, content in self.documents:
            _require_document(name, content)

    @property
    def session_ids(self) -> list[str]:
        """The sessions that it puts, deletes or remembers the end of; one may come more than once."""
        ids = [session_id for session_id, _ in self.puts]
        if not (self.deletes or self.forgets or self.tombstones):  # as mostly
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
    """What became of one member of a commit."""

    KEPT = "kept"
    CONFLICT = "conflict"
    """Another server has changed the session since its record was read: nothing of it was kept."""
    UNKNOWN = "unknown"
    """The store did not answer: it may have been kept, and what is read next is the truth."""


@dataclasses.dataclass(frozen=True, slots=True)
class CommitResult:
    """What became of a batch, by the sessions that it puts or deletes, and its documents."""

    conflicts: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()
    stale: frozenset[str] = frozenset()
    """Documents that were not as `Batch.documents_follow` said, and were not written."""

    def of(self, session_id: str) -> Outcome:
        """What became of a session's change."""
        if session_id in self.conflicts:
            return Outcome.CONFLICT
        return Outcome.UNKNOWN if session_id in self.unknown else Outcome.KEPT


ALL_KEPT = CommitResult()


Answer: TypeAlias = "CommitResult | ServerError"
"""What became of each session of a batch, or why nothing of it was kept."""
OnAnswer: TypeAlias = "Callable[[Answer], None]"


def as_server_error(error: Exception) -> ServerError:
    """Why a store did not do something, as callers may hear it; the log has what they may not."""
    if isinstance(error, ServerError):
        return error
    return _log.internal("the store raised", error)


#: A write of at most so many sessions is small.
SMALL = 64

_NOTHING = Batch()


@dataclasses.dataclass(slots=True, eq=False)
class Write:
    """A batch that a store is to keep."""

    build: Callable[[], Batch]
    """Makes the batch; maybe on another thread."""
    size: int
    """Records in it, about."""
    done: OnAnswer
    """Gets the answer on the event loop, if `Store.commit` did not return it. It must not raise."""
    is_change: bool = False
    """It may be kept before what waits: it changes sessions that have been kept, and that are claimed, so nothing that
    waits names them."""
    is_latency_sensitive: bool = False
    """Such a change, if it is small, does not wait for larger ones either: they are of others."""
    passes: bool = False
    """It went to the thread for small changes."""
    is_made: bool = False
    batch: Batch = _NOTHING
    error: ServerError | None = None

    @property
    def is_small(self) -> bool:
        """See `SMALL`."""
        return self.size <= SMALL

    @property
    def answer(self) -> Answer:
        """The answer of a store that keeps all of a batch, or nothing."""
        return self.error or ALL_KEPT

    def make(self) -> None:
        """Build the batch, unless that was done, or note why it could not be built."""
        if self.is_made:
            return
        self.is_made = True
        try:
            self.batch = self.build()
        except Exception as error:
            self.error = as_server_error(error)


#: The stamp of all that a store of one server has: nobody else can write it.
SOLE = 1


def new_stamp() -> int:
    """A number from 2 to 2**64-1 that nobody has drawn before, as far as anybody will notice.

    64 random bits: that one commit is taken for another, which followed the same record, happens once in 2**64 conflicts.
    """
    return max(SOLE + 1, int.from_bytes(os.urandom(8), "little"))


def stamped(stamp: int, count: int) -> U64:
    """`Batch.stamps` of records that are written together."""
    return np.array([stamp], np.uint64).repeat(count)


KNOWN = StoredSession(is_known=True)
"""Of a session whose stamp was known, in a store that says no more of it."""


class Store(Protocol):
    """Keeps encoded records and tombstones by session id, wherever that is. Lives on one event loop.

    Methods of the same name do the same and raise the same as those of `LocalStore`.

    Each record has a stamp, a number that is drawn for the commit that writes it: see `new_stamp`. A change is kept only if the session has the stamp that it had when it was read (`Batch.follows`): revisions can
    come twice, after a session was closed and opened again, or after the store lost its last writes. A session of the
    batch that has its new stamp already was kept: so a batch may be sent again when its answer was lost.
    """

    local: LocalStore | None
    """The same store, if it answers in place; None if it must be waited for."""

    secret: bytes
    """See `LocalStore`."""

    incarnation: str
    """See `LocalStore`."""

    labels: Mapping[str, str]
    """Of metrics. `store_id`: the same for all servers of the store, and for no others; `shared`: "true" or "false"."""

    first_revision: int
    """See `LocalStore`."""

    elsewhere: str = ""
    """Where a version of a model may be that this server has not loaded: a few words for its callers. Empty: nowhere."""

    @property
    def damage(self) -> str:
        """See `LocalStore`."""

    def damage_of(self, session_id: str) -> str:  # noqa: ARG002 - of stores that know more
        """The same of a session that is not found; empty: it is none of those that are missing."""
        return self.damage

    def commit(self, write: Write) -> Answer | None:
        """Keep a batch: of a store of one server all of it or nothing; of others each session's change or nothing of it.

        Returns:
            The answer, if it is known at once. None: `write.done` gets it later. The store has done with the buffers of
            the batch when this returns, or owns them.
        """

    async def end_commits(self, timeout_s: float) -> bool:
        """Return when all commits are answered, of which none may come any more; False if that takes longer."""

    def new_stamp(self) -> int:
        """The stamp of records that are written together: `SOLE` in a store of one server, else one that is drawn."""

    async def fetch(self, session_ids: Sequence[str], known: Sequence[int] = ()) -> list[StoredSession]:
        """What it has of many sessions: their records, and how those ended that have none.

        A store that has them at hand does not wait for anything. So it is with a record that nobody else can have changed.

        A record that cannot be read is empty: decoding it says `StateCorrupt`.

        Args:
            session_ids: Of the sessions.
            known: Stamps that the caller knows, one for each, 0 for none: a record that has it is not sent again.

        Raises:
            Unavailable: the store cannot be read now.
        """

    async def touch(self, session_ids: Sequence[str], stamps: Sequence[int]) -> None:
        """Sessions are being used, if they have these stamps: they are not idle.

        Raises:
            Unavailable: the store cannot be notified now.
        """

    def note_use(self, session_id: str, *, idle_s: float, limit_s: float) -> None:  # noqa: ARG002 - of stores that need it
        """Note the last use of a session that leaves the server's table, `idle_s` seconds ago; it ends after `limit_s`.

        A store that learns of each use by `touch` does nothing.
        """
        return

    async def unused(self, cursor: str = "", *, limits: IdleLimits, limit: int) -> UnusedSessions:
        """Sessions that may have been unused for longer than their limits, by the store's clock.

        The caller judges each of them: a store may return sessions that are not due. A session that is due is in some page
        of a complete pass, or soon of a later one.

        Args:
            cursor: Of the page before; empty: from the beginning.
            limits: After which time sessions end.
            limit: How many sessions are looked at, about: the page has those of them that are unused.

        Raises:
            Unavailable: the store cannot be read now.
        """

    async def claim(self, name: str, whose: str, for_s: float) -> float | None:
        """Have a task to oneself for so many seconds, by the store's clock, or for so many more.

        It keeps several servers from doing the same work; one that was held up may do it beside another.

        Args:
            name: Of the task.
            whose: Who wants it: what no other says.
            for_s: For how long.

        Returns:
            For how many seconds it has it without a break, by the store's clock; None: another has it.

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
        """What all sessions of a tenant take, as the store counts it. None: what its server has counted is exact.

        Raises:
            Unavailable: the store cannot be asked now.
        """

    async def uncounted(self, *, after: str = "", limit: int) -> Heads:
        """As `heads`, of records that the server has to count at its start; a store that counts `usage` has none."""

    def count_now(self, model: str) -> int | None:  # noqa: ARG002 - of stores that answer at once
        """As `count_of`, if the store can answer at once; None: it cannot.

        Raises:
            Unavailable: the store cannot be read now.
        """
        return None

    async def documents(self, prefix: str = "") -> dict[str, bytes]:
        """See `LocalStore`. Nothing is missing that was kept before this was called."""

    async def documents_changed(self) -> None:
        """Return when another server may have written a document since the last call, at most a few seconds after it did.

        It may return without a change. In a store of one server it never returns.
        """

    async def announce(self, listen: str) -> None:
        """See `LocalStore`."""

    async def check(self) -> StoreHealth:
        """See `LocalStore`."""

    async def close(self) -> None:
        """See `LocalStore`."""


class LocalStore(Protocol):
    """Keeps encoded records and tombstones by session id, and answers at once.

    `commit`, `checkpoint` and `close` are called from one thread at a time, and so is `append`, maybe from another at
    the same time; the other methods from any thread, at any time before `close`.
    """

    for_one_thread: bool
    """It is fast, and every method is called from the event loop."""

    waits_for_disk: bool
    """A commit returns when the disk has it."""

    secret: bytes
    """Drawn when the store was made: session ids that are made with it cannot be guessed."""

    incarnation: str
    """Eight hex digits that were drawn when the store was made, the same as long as it lives."""

    first_revision: int
    """With which revision sessions begin. Above 0 in a store that was restored: higher than any that clients were told."""

    @property
    def damage(self) -> str:
        """What is known of sessions that are missing although nobody ended them; empty: nothing.

        Where there is something, a session that is not found may be one of them.
        """

    def commit(self, batch: Batch) -> None:
        """Keep all of a batch, as durably as the store was told to, or nothing of it.

        Raises:
            Unavailable: it could not be kept. Nothing of it is there, except when the disk broke in the
                very last write: what `get` finds afterwards is the truth.
        """

    has_log: bool = False
    """`append` is worth trying."""

    def append(self, puts: Sequence[tuple[str, RecordBytes]]) -> bool:  # noqa: ARG002
        """Keep changes of sessions that are there, as durably as `commit`, beside a commit that is under way.

        Args:
            puts: A few. What is being committed names none of their sessions.

        Returns:
            Whether they were kept, all of them. If not, none was, and `commit` can, or says why not.
        """
        return False

    @property
    def needs_checkpoint(self) -> bool:
        """`checkpoint` has something to do."""

    behind: int = 0
    """Records that should be checkpointed now, to keep up with what is committed."""

    def checkpoint(self, *, briefly: bool = False) -> None:
        """Do a part of the work that can wait until callers were told of a commit. It does not raise.

        Args:
            briefly: A small part: somebody may be waiting.
        """

    def get(self, session_id: str) -> RecordBytes | None:
        """The record of a session, or None.

        Raises:
            StateCorrupt: it is there and cannot be read.
            Unavailable: the store cannot be read now.
        """

    def get_many(self, session_ids: Sequence[str]) -> list[RecordBytes | None]:
        """The records of many sessions, None where there is none.

        Where a record is there and cannot be read it is empty: decoding it says `StateCorrupt`.

        Raises:
            Unavailable: the store cannot be read now.
        """

    def heads(self, *, after: str = "", prefix: str = "", limit: int) -> Heads:
        """What records say of sessions, in the order of their ids, as columns. No record is checked.

        Ids of more than 511 bytes that begin with the same 478 bytes come in an order of their own.

        Args:
            after: begin behind this id, whether it is there or not.
            prefix: of the ids that are wanted; of one of more than 478 bytes only so many need be compared.
            limit: how many at most.
        """

    def count(self) -> int:
        """How many sessions there are."""

    def count_of(self, model: str) -> int:
        """How many sessions a model has, or whatever else has this name, by the counts of all batches."""

    def tombstones(self, session_ids: Sequence[str]) -> list[Tombstone | None]:
        """What is remembered of many sessions that are gone."""

    def documents(self, prefix: str = "") -> dict[str, bytes]:
        """All documents whose name begins with `prefix`, in the order of their names.

        Raises:
            DocumentsCorrupt: one of them is not as it was written, or some document is missing.
            Unavailable: the store cannot be read now.
        """

    def announce(self, listen: str) -> None:
        """Let people who find the store know at which address its server listens."""

    def check(self) -> StoreHealth:
        """Look after it, every few seconds, from any thread: mend what can be mended.

        Raises:
            StoreGone: it cannot be mended. All changes are refused from now on.
        """

    def close(self) -> None:
        """See to it that all that was committed survives a loss of power, and end. May be called again."""


class WriteObserver(Protocol):
    """Receives the durations of successful writes of a store on disk, in seconds. One call of each method at a time."""

    def log_written(self, seconds: float, records: int) -> None:
        """Records were written to the log, in one write: until the disk has it, if it is waited for."""

    def data_written(self, seconds: float) -> None:
        """The same of a transaction of LMDB."""
