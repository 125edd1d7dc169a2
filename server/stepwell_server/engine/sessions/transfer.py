"""Exports sessions as complete records, and imports records as sessions, here or on another server."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from stepwell_server.core.callers import ANYBODY, Caller
from stepwell_server.core.quotas import Usage
from stepwell_server.core.sessions import MAX_IMPORT_POSITION
from stepwell_server.engine.api import SessionFilter
from stepwell_server.engine.change import MAX_TRIES, changed_elsewhere
from stepwell_server.engine.commit.committer import outcome_unknown
from stepwell_server.engine.commit.group_commit import GroupCommit
from stepwell_server.engine.commit.records import Records, current_outcome, encoded
from stepwell_server.engine.commit.tombstones import ended_by
from stepwell_server.engine.intake.validation import require_finite
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.sessions.begin import SessionCreator
from stepwell_server.engine.sessions.close import Closer
from stepwell_server.engine.sessions.directory import Context, EarlierSession, exists, require_session_id
from stepwell_server.engine.sessions.end import Expiry
from stepwell_server.engine.sessions.lookup import Loader, LookupResult
from stepwell_server.engine.sessions.read import Query, SessionList
from stepwell_server.engine.state.fields import (
    Mark,
    at_birth,
    closes_of,
    joined,
    owner_of,
    split,
    with_closes,
)
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.state.replies import check_reply
from stepwell_server.engine.threads import PIECE_SIZE
from stepwell_server.engine.versions.history import MoveKind
from stepwell_server.errors import (
    InvalidInput,
    MessageTooLarge,
    ModelMismatch,
    ModelNotFound,
    QuotaExceeded,
    ServerError,
    SessionExists,
    SessionGone,
    SessionLost,
    SessionNotFound,
    StateCorrupt,
)
from stepwell_server.store import counts
from stepwell_server.store.base import Batch, CommitResult, Outcome, Store, StoredSession, stamped
from stepwell_server.store.fields import KNOWN_TAGS, pack_fields, unpack_fields
from stepwell_server.store.record import (
    Header,
    RecordBytes,
    decode_header,
    decode_many,
    is_complete,
    key_id_of,
)

MAX_IMPORTED = 1000
"""The most sessions in one call."""
MAX_UNKNOWN_FIELD_BYTES = 1024
"""The most bytes of an imported session's unknown fields, which are meant for newer servers."""
#: Seconds by which the exporting server's clock may be ahead.
_MAX_AHEAD_S = 86_400.0
#: The most sessions listed for one page.
_EXPORT_PAGE_SIZE = 1000
#: Records read in one batch; other work runs between batches.
_EXPORT_BATCH_SIZE = 64

ExportResult = RecordBytes | ServerError


class Exporter:
    """Exports sessions. Lives on the event loop."""

    def __init__(
        self, context: Context, expiry: Expiry, listing: SessionList, records: Records, store: Store
    ) -> None:
        self._table = context.table
        self._directory = context.directory
        self._queues = context.queues
        self._removal = context.removal
        self._expiry = expiry
        self._clock = context.clock
        self._listing = listing
        self._records = records
        self._store = store

    async def sessions(self, session_ids: Sequence[str], *, deadline: float) -> list[ExportResult]:
        """The records of sessions as of their last completed changes, or the errors for those without one."""
        fetched = await self._store.fetch(session_ids)
        found = [self._stored(i, each) for i, each in zip(session_ids, fetched, strict=True)]
        return [
            await self._held(session_id, deadline) if each is None else each
            for session_id, each in zip(session_ids, found, strict=True)
        ]

    async def page(
        self,
        wanted: SessionFilter,
        *,
        after: str,
        page_bytes: int,
        max_bytes: int,
        deadline: float,
    ) -> tuple[list[tuple[str, ExportResult]], str | None]:
        """Sessions that match a filter, about `page_bytes` of them but at least one, and the id after which to continue.

        A record of more than `max_bytes` is reported as an error.
        """
        query = Query(filter=wanted, after=after, limit=_EXPORT_PAGE_SIZE, count=False)
        page, _ = await self._listing.page(query)
        found: list[tuple[str, ExportResult]] = []
        size = 0
        for start in range(0, len(page), _EXPORT_BATCH_SIZE):
            ids = [info.session_id for info in page[start : start + _EXPORT_BATCH_SIZE]]
            for session_id, each in zip(ids, await self.sessions(ids, deadline=deadline), strict=True):
                if isinstance(each, SessionGone):
                    continue  # it has ended meanwhile
                record = each
                if not isinstance(record, ServerError) and len(record) > max_bytes:
                    record = MessageTooLarge(
                        f"session {session_id!r} must have at most {max_bytes} bytes to be exported;"
                        f" it has {len(record)}"
                    )
                own = 0 if isinstance(record, ServerError) else len(record) + len(session_id)
                if found and size + own > page_bytes:
                    return found, found[-1][0]
                size += own
                found.append((session_id, record))
            await asyncio.sleep(0)
        return found, page.next

    def _stored(self, session_id: str, fetched: StoredSession) -> ExportResult | None:
        """A session's record; None: the store's record is not enough.

        Its state is only in the arena, or its version converts it. Or the session is just beginning or ending.
        """
        if fetched.tombstone is not None:
            return ended_by(fetched.tombstone)
        record, handle = fetched.record, self._table.find(session_id)
        is_due = handle is not None and self._expiry.is_suspect(handle)
        if record is None or is_due or session_id in self._removal.pending:
            return None
        if not is_complete(session_id, record) or key_id_of(record) is not None:
            return StateCorrupt(
                f"the stored record of session {session_id!r} must be intact, and if it is encrypted,"
                " its key must be available",
                session_id=session_id,
            )
        return None if self._expiry.is_over(session_id, fetched) else self._as_now(session_id, record)

    async def _held(self, session_id: str, deadline: float, *, needs_rows: bool = False) -> ExportResult:
        """The record of a session that is not active, built from the arena if that has its state."""
        try:
            seen = await self._directory.look([session_id], reread=True)
            handle = self._directory.find(session_id, seen)
            await self._queues.hold(handle, deadline, rows=needs_rows)
        except ServerError as error:
            return error
        try:
            if self._table.row[handle] < 0:
                (found,) = await self._store.fetch([session_id])
                if found.record is None:
                    stone = found.tombstone
                    return _lost(session_id) if stone is None else ended_by(stone)
                record = self._as_now(session_id, found.record)
            else:
                model = self._directory.models.by_handle(handle)
                outcome = current_outcome(self._table, model, np.array([handle]))
                last_used = self._clock.now() - (self._clock.monotonic() - float(self._table.used[handle]))
                ((_, record),) = self._records.of(outcome, last_used)
        finally:
            self._queues.release(np.array([handle]))
        return await self._held(session_id, deadline, needs_rows=True) if record is None else record

    def _as_now(self, session_id: str, record: RecordBytes) -> RecordBytes | None:
        """A record as of its session's current version; None: that version converts the state."""
        try:
            header = decode_header(session_id, record)
            model, move = self._directory.models.place(session_id, header)
        except ServerError:
            return record  # exported unchanged
        if move is None:
            return record
        if move.how is not MoveKind.CARRY:
            return None
        decoded = decode_many([session_id], [record])
        _, rest = split(header.fields)
        header = dataclasses.replace(
            header,
            fingerprint=model.program.fingerprint,
            fields=joined(Mark(model.version, model.epoch, is_pinned=False), rest),
        )
        return encoded(session_id, header, decoded.rows, decoded.extras.get(0, b""))


def _lost(session_id: str) -> SessionLost:
    return SessionLost(session_id, f"session {session_id!r} was paged out and is not in the store")


class ExistingPolicy(enum.Enum):
    """What to do with an existing session that has the id of an imported one."""

    REFUSE = "refuse"
    SKIP = "skip"
    REPLACE = "replace"


class ImportOutcome(enum.Enum):
    """The result of importing a session."""

    IMPORTED = "imported"
    REPLACED = "replaced"
    SKIPPED = "skipped"


ImportResult = ImportOutcome | ServerError


class SessionRecord(NamedTuple):
    """A session to import."""

    session_id: str
    """Its id here."""
    recorded_as: str
    """Its id on the exporting server, used only to read the record."""
    record: bytes


@dataclasses.dataclass(slots=True)
class _ImportedSession:
    """A session that is to begin from a record."""

    session_id: str
    header: Header
    """The header it will have."""
    model: Model
    rows: bytes
    extra: bytes
    may_go_back: bool = False
    """Whether the store may have a later revision of a session of its id."""
    follows: int = 0
    """See `EarlierSession.stamp`."""
    must_close: bool = False
    """Whether a session of its id exists that cannot be stepped here, and must be closed first."""
    has_replaced: bool = False
    """Whether that was done."""

    def after(self, closes: tuple[int, ...]) -> _ImportedSession:
        """A copy for an id whose earlier sessions were closed by these calls."""
        fields = with_closes(self.header.fields, closes)
        return dataclasses.replace(self, header=dataclasses.replace(self.header, fields=fields))

    @property
    def usage(self) -> Usage:
        """What it uses of its tenant's quotas."""
        return counts.usage_of(self.header)


class Importer:
    """Imports sessions. Lives on the event loop."""

    def __init__(
        self,
        context: Context,
        commits: GroupCommit,
        begin: SessionCreator,
        loader: Loader,
        closer: Closer,
        quotas: Quotas | None,
    ) -> None:
        self._context = context
        self._quotas = quotas
        self._table = context.table
        self._directory = context.directory
        self._commits = commits
        self._begin = begin
        self._loader = loader
        self._closer = closer

    async def run(
        self, sessions: Sequence[SessionRecord], existing: ExistingPolicy, caller: Caller = ANYBODY
    ) -> list[ImportResult]:
        """Begin sessions from records, each independently; returns the result or the error of each.

        An imported session counts as used now. Its revision, position, creation time, idle limit and the remembered
        reply to its last change come from the record.

        Raises:
            InvalidInput: there are too many, or an id is repeated.
            Unavailable: the store cannot be asked.
        """
        ids = [each.session_id for each in sessions]
        if len(ids) > MAX_IMPORTED:
            raise InvalidInput(f"sessions must be at most {MAX_IMPORTED}; got {len(ids)}")
        if len(set(ids)) != len(ids):
            raise InvalidInput("sessions must not repeat an id; got one twice")
        results: dict[str, ImportResult] = {}
        async for part in self._directory.pieces.of(ids):
            checked: dict[str, _ImportedSession] = {}
            for session in sessions[part]:
                try:
                    checked[session.session_id] = self._checked(session, caller)
                except ServerError as error:
                    results[session.session_id] = error
            if len(ids) > PIECE_SIZE:
                await asyncio.sleep(0)  # checks take about as long as the rest
            await self._begin_some(checked, existing, results)
        return [results[session_id] for session_id in ids]

    # -------------------------------------------------------------------------------------------------------- checking

    def _checked(self, session: SessionRecord, caller: Caller) -> _ImportedSession:
        """The session that would be imported, checked.

        Raises:
            InvalidInput, StateCorrupt, ModelNotFound, ModelMismatch
        """
        session_id, record = session.session_id, session.record
        require_session_id("session_id", session_id)
        header = decode_header(session.recorded_as, record)
        _check_header(session_id, header, self._context.clock.now())
        model = self._version_of(session_id, header)
        if not 1 <= header.batch_size <= model.slots.resident_limit:
            raise InvalidInput(
                f"batch_size of session {session_id!r} must be 1 to resident_rows,"
                f" {model.slots.resident_limit}; got {header.batch_size}"
            )
        decoded = decode_many([session.recorded_as], [record])
        extra = decoded.extras.get(0, b"")
        _check_state(session_id, header, model, decoded.rows, extra)
        mark, _ = split(header.fields)
        rest = _kept_fields(session_id, header.fields)
        rest = at_birth(self._begin.owner(caller, session_id), None, rest)
        is_pinned = mark is not None and Mark.unpack(mark).is_pinned
        header = dataclasses.replace(
            header,
            fingerprint=model.program.fingerprint,
            last_used=self._context.clock.now(),
            state_bytes=len(decoded.rows) + len(extra),
            fields=joined(Mark(model.version, model.epoch, is_pinned=is_pinned), rest),
        )
        return _ImportedSession(session_id, header, model, decoded.rows, extra)

    def _version_of(self, session_id: str, header: Header) -> Model:
        """The version for an imported session: the one with its weights, or the one that took over its sessions.

        The record's moves belong to another server, or to another time.

        Raises:
            ModelNotFound, ModelMismatch: there is none.
        """
        models = self._directory.models
        own = models.find(header.model)
        if own is None:
            raise ModelNotFound(
                f"the model of session {session_id!r} must be one of {models.names()}; it is {header.model!r}",
                model=header.model,
            )
        with_weights = [
            v for v, model in own.loaded.items() if model.program.fingerprint == header.fingerprint
        ]
        if with_weights:
            return own.loaded[own.default if own.default in with_weights else min(with_weights)]
        known = own.version_with(header.fingerprint)
        if known is not None:
            move = own.history.of(known, 0)
            if move is not None and move.how is MoveKind.CARRY and move.target in own.loaded:
                return own.loaded[move.target]
        raise ModelMismatch(
            f"the model of session {session_id!r} must be a version of {header.model!r} that is served, of fingerprint"
            f" {' or '.join(model.program.fingerprint for model in own.loaded.values())}; it has {header.fingerprint}",
            model=header.model,
        )

    # -------------------------------------------------------------------------------------------------------- the path

    async def _begin_some(
        self, left: dict[str, _ImportedSession], existing: ExistingPolicy, results: dict[str, ImportResult]
    ) -> None:
        """Begin checked sessions, and put the result of each into `results`.

        Raises:
            Unavailable: the store cannot be asked.
        """
        for _ in range(MAX_TRIES):
            if not left:
                return
            seen = await self._begin.look(list(left))
            absent, others = self._sorted(left, seen, existing, results)
            await self._begin.run_shielded(self._begin_all(absent, results))
            for each in others:
                result = await self._begin.run_shielded(self._replace(each, seen))
                if result is not None:
                    results[each.session_id] = result
            left = {i: each for i, each in left.items() if i not in results}
        results.update((session_id, changed_elsewhere(session_id)) for session_id in left)

    def _sorted(
        self,
        new: Mapping[str, _ImportedSession],
        seen: LookupResult,
        existing: ExistingPolicy,
        results: dict[str, ImportResult],
    ) -> tuple[list[_ImportedSession], list[_ImportedSession]]:
        """Sessions with free ids, and those that replace another session; the others get a result in `results`."""
        ids = list(new)
        handles = self._directory.find_all(ids, seen)
        missing = [ids[place] for place in np.flatnonzero(handles < 0).tolist()]
        unusable = set(self._directory.unusable(missing, seen))
        earlier, nothing = (
            self._directory.earlier(ids, seen),
            EarlierSession(self._directory.store.first_revision),
        )
        absent, others = list[_ImportedSession](), list[_ImportedSession]()
        for place, each in enumerate(new.values()):
            session_id, handle = each.session_id, int(handles[place])
            first, closes, stamp = earlier.get(place, nothing)
            is_free = handle < 0 and session_id not in unusable
            if is_free and each.header.revision + 1 < first and existing is not ExistingPolicy.REPLACE:
                results[session_id] = SessionExists(
                    f"session {session_id!r} must not go back to revision {each.header.revision}: it ended here"
                    f" at revision {first - 1}",
                    session_id=session_id,
                )
            elif is_free:
                own = each.after(closes)
                may_go_back = first > 0 or existing is ExistingPolicy.REPLACE
                absent.append(dataclasses.replace(own, may_go_back=may_go_back, follows=stamp))
            elif handle >= 0 and seen.newer(session_id) is None and self._is_same(handle, each):
                results[session_id] = ImportOutcome.IMPORTED
            elif existing is ExistingPolicy.SKIP:
                results[session_id] = ImportOutcome.SKIPPED
            elif existing is ExistingPolicy.REFUSE:
                results[session_id] = exists("session_id", session_id)
            else:
                each.must_close = handle < 0
                others.append(each)
        return absent, others

    def _is_same(self, handle: int, each: _ImportedSession) -> bool:
        table, header = self._table, each.header
        return self._directory.models.by_handle(handle) is each.model and (
            header.batch_size,
            header.revision,
            header.position,
            header.request_id,
            header.opened_with,
            header.created,
        ) == (
            int(table.batch_size[handle]),
            int(table.revision[handle]),
            int(table.position[handle]),
            int(table.request_id[handle]),
            int(table.opened_with[handle]),
            float(table.created[handle]),
        )

    async def _begin_all(self, absent: Sequence[_ImportedSession], results: dict[str, ImportResult]) -> None:
        """Begin sessions with free ids, right after they were found to be free."""
        new = [each for each in absent if self._charge(each, results)]
        if not new:
            return
        ids = [each.session_id for each in new]
        pending = self._context.removal.reserve(ids)
        stamp = self._directory.store.new_stamp()
        batch = Batch(
            puts=[_record(each) for each in new],
            forgets=ids,
            counts=list(Counter(each.model.name for each in new).items()),
            tenant_counts=counts.of_tenants([(each.session_id, each.model.name) for each in new], 1),
            goes_back=any(each.may_go_back for each in new),
            follows=np.array([each.follows for each in new], np.uint64),
            stamps=stamped(stamp, len(new)),
        )
        committed = await self._commits.keep(batch, len(new))
        kept: list[_ImportedSession] = []
        for each in new:
            outcome = _outcome(each.session_id, committed)
            if self._quotas is not None:
                settle = self._quotas.made if outcome is None else self._quotas.cancel
                settle([each.session_id], each.usage)
            if outcome is None:
                kept.append(each)
                results[each.session_id] = (
                    ImportOutcome.REPLACED if each.has_replaced else ImportOutcome.IMPORTED
                )
            elif outcome is not _CONFLICT:
                results[each.session_id] = outcome
        self._enter(kept, stamp)
        self._context.removal.release(ids, pending)

    def _charge(self, each: _ImportedSession, results: dict[str, ImportResult]) -> bool:
        """Whether the tenant may have the session; otherwise the error is put into `results`."""
        try:
            if self._quotas is not None:
                self._quotas.begin([each.session_id], each.usage, owner_of(each.header.fields))
        except QuotaExceeded as error:
            results[each.session_id] = error
            return False
        return True

    async def _replace(self, each: _ImportedSession, seen: LookupResult) -> ImportResult | None:
        """Replace a session after all changes received before for it; None: look again."""
        session_id, table = each.session_id, self._table
        try:
            handle = table.find(session_id)
            if each.must_close:
                await self._close(each, seen)
            if each.must_close or handle is None:
                return None
            await self._context.queues.hold(handle, float("inf"), rows=False)
        except SessionGone:
            return None  # it changed meanwhile
        except ServerError as error:
            return error
        old, new = table.usage(handle), each.usage
        more = (new - old).positive()
        try:
            self._recount(session_id, more)
        except QuotaExceeded as error:
            self._context.queues.release(np.array([handle]))
            return error
        each = each.after(closes_of(table.fields.get(handle, b"")))
        name, stamp = self._directory.models.by_handle(handle).name, self._directory.store.new_stamp()
        moved = [] if name == each.model.name else [(name, -1), (each.model.name, 1)]
        batch = Batch(
            puts=[_record(each)],
            forgets=[session_id],
            counts=moved,
            tenant_counts=[
                change for model, by in moved for change in counts.of_tenants([(session_id, model)], by)
            ],
            goes_back=True,
            follows=table.stamp[handle : handle + 1].copy(),
            stamps=stamped(stamp, 1),
        )
        outcome = _outcome(session_id, await self._commits.keep(batch, 1))
        self._recount(session_id, new - old - more if outcome is None else more * -1)
        if outcome is None:
            gone = SessionNotFound(
                session_id, f"session {session_id!r} was replaced by one that was imported"
            )
            self._context.queues.remove(handle, gone)
            self._enter([each], stamp)
            return ImportOutcome.REPLACED
        if outcome is _CONFLICT:
            self._context.queues.release(np.array([handle]))
            return None
        self._context.removal.drop(np.array([handle]), outcome)  # what the store has is the truth
        return outcome

    async def _close(self, each: _ImportedSession, seen: LookupResult) -> None:
        """Close a session that cannot be stepped here, if its tenant may have the new one, which begins then."""
        _, old = self._directory.stored_usage(each.session_id, seen)
        more = (each.usage - old).positive()
        self._recount(each.session_id, more)
        self._recount(each.session_id, more * -1)
        await self._closer.close(each.session_id, seen, request_id=0, deadline=float("inf"))
        each.has_replaced = True

    def _recount(self, session_id: str, more: Usage) -> None:
        """Change the counted usage of a session by `more`, which may be negative.

        Raises:
            QuotaExceeded: its tenant may not have as much.
        """
        if self._quotas is not None:
            self._quotas.change(session_id, more)

    def _enter(self, new: Sequence[_ImportedSession], stamp: int) -> None:
        """Enter stored sessions in the table."""
        if not new:
            return
        served = [(each.session_id, each.header, each.model) for each in new]
        self._loader.adopt(served, np.full(len(new), stamp, np.uint64), [0.0] * len(new))
        for model, count in Counter(each.model.name for each in new).items():
            self._context.observer.session_events("imported", model, count)


#: Another server changed the session or created one: look again.
_CONFLICT = ServerError("conflict")


def _outcome(session_id: str, committed: CommitResult | ServerError) -> ServerError | None:
    """The error for a session that was not stored; None: it was."""
    if isinstance(committed, ServerError):
        return committed
    outcome = committed.of(session_id)
    if outcome is Outcome.KEPT:
        return None
    return outcome_unknown() if outcome is Outcome.UNKNOWN else _CONFLICT


def _record(each: _ImportedSession) -> tuple[str, bytes]:
    return each.session_id, encoded(each.session_id, each.header, each.rows, each.extra)


def _check_header(session_id: str, header: Header, now: float) -> None:
    """Refuse a header that no session can have, although the checksum is right: a forged record has one too.

    `now` is in seconds since the epoch.

    Raises:
        InvalidInput: with the field, the rule and what came.
    """
    if max(header.revision, header.position) > MAX_IMPORT_POSITION:
        raise InvalidInput(
            f"revision and position of session {session_id!r} must be at most 2**62, {MAX_IMPORT_POSITION};"
            f" got {header.revision} and {header.position}"
        )
    latest = now + _MAX_AHEAD_S
    if max(header.created, header.last_used) > latest:
        raise InvalidInput(
            f"created and last_used of session {session_id!r} must be at most a day after now by this server's clock,"
            f" {latest:.0f} seconds since the epoch; got {header.created:.0f} and {header.last_used:.0f}"
        )


def _check_state(session_id: str, header: Header, model: Model, rows: bytes, extra: bytes) -> None:
    """Refuse rows and replies that no session of a model can have, and states that `ResetStates` would refuse.

    Raises:
        InvalidInput: names the problem.
    """
    program, row_bytes = model.program, model.arena.row_bytes
    if len(rows) != header.batch_size * row_bytes:
        raise InvalidInput(
            f"the rows of session {session_id!r} must have {header.batch_size * row_bytes} bytes, {row_bytes} for each"
            f" of batch_size {header.batch_size}; got {len(rows)}"
        )
    try:
        check_reply(header.reply, header.batch_size, extra, program.outputs, program.state)
    except ValueError as error:
        raise InvalidInput(
            f"the last reply of session {session_id!r} must be one of its model: {error}"
        ) from error
    if not row_bytes:
        return
    packed = np.frombuffer(rows, np.uint8).reshape(header.batch_size, row_bytes)
    states = list(itertools.islice(model.arena.unpacked(packed), len(program.state)))
    require_finite(f"session {session_id!r}: state", states, [spec.name for spec in program.state])


def _kept_fields(session_id: str, fields: bytes) -> bytes:
    """The extension fields that an imported session keeps: those that are unknown here.

    Known fields, such as the owner, are set by this server only.

    Raises:
        InvalidInput: they are larger than newer servers need.
    """
    kept = {tag: value for tag, value in unpack_fields(fields).items() if tag not in KNOWN_TAGS}
    packed = pack_fields(kept)
    if len(packed) > MAX_UNKNOWN_FIELD_BYTES:
        raise InvalidInput(
            f"extension fields of session {session_id!r} that this server does not know must have at most"
            f" {MAX_UNKNOWN_FIELD_BYTES} bytes together; got {len(packed)}"
        )
    return packed
