"""Sessions leave as their records, and come back as such: here, or on another server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.callers import ANYBODY, Caller
from stepwell_server.core.history import How, Mark
from stepwell_server.core.quotas import Usage
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.api import Observer, SessionFilter
from stepwell_server.engine.change import changed_elsewhere
from stepwell_server.engine.durability.committer import not_known
from stepwell_server.engine.durability.endings import ended_by
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.durability.records import Records, as_it_is
from stepwell_server.engine.intake.imported import check_header, check_state, imported_fields
from stepwell_server.engine.intake.queues import Turns
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.sessions.begin import Begin
from stepwell_server.engine.sessions.close import Closer
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.end import Expiry, Removal
from stepwell_server.engine.sessions.ids import require_session_id
from stepwell_server.engine.sessions.lookup import Loader, Seen
from stepwell_server.engine.sessions.read import Query, SessionList
from stepwell_server.engine.state.fields import (
    at_birth,
    closes_of,
    joined,
    owner_of,
    split,
    with_closes,
)
from stepwell_server.engine.state.model import Model
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
from stepwell_server.store.base import Batch, Committed, Fetched, Outcome, Store, stamped
from stepwell_server.store.record import (
    Header,
    Stored,
    Texts,
    decode_header,
    decode_many,
    encode,
    is_sound,
    key_id_of,
)

MOST_AT_ONCE = 1000
"""Sessions in one call."""
_T = TypeVar("_T")
#: Records that are read, or made, before others get a turn.
_PIECE = 64


class Existing(enum.Enum):
    """What becomes of a session that is there when one of its id is imported."""

    REFUSE = "refuse"
    SKIP = "skip"
    REPLACE = "replace"


class Brought(enum.Enum):
    """What an import did with a session."""

    IMPORTED = "imported"
    REPLACED = "replaced"
    SKIPPED = "skipped"


Result = Brought | ServerError
Exported = Stored | ServerError


class Arriving(NamedTuple):
    """A session that comes from elsewhere."""

    session_id: str
    """What it is to be called here."""
    recorded_as: str
    """What it was called where its record was made, which only counts for that."""
    record: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class _New:
    """A session that is to be imported."""

    session_id: str
    header: Header
    """As it will be."""
    model: Model
    rows: bytes
    extra: bytes
    was_here: bool = False
    """The store had a session of its id before."""
    follows: int = 0
    """See `Directory.follows`."""

    def after(self, closes: tuple[int, ...]) -> _New:
        """The same, of an id whose earlier sessions these calls closed."""
        fields = with_closes(self.header.fields, closes)
        return dataclasses.replace(self, header=dataclasses.replace(self.header, fields=fields))

    @property
    def record(self) -> bytes:
        return _encoded(self.session_id, self.header, self.rows, self.extra)

    @property
    def usage(self) -> Usage:
        """What it takes of its tenant's quotas."""
        return counts.usage_of(self.header)

    @property
    def served(self) -> tuple[str, Header, Model]:
        return self.session_id, self.header, self.model


class Moving:
    """Exports and imports sessions. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        directory: Directory,
        turns: Turns,
        begin: Begin,
        quotas: Quotas | None,
        closing: Closer,
        listing: SessionList,
        loader: Loader,
        records: Records,
        commits: GroupCommit,
        store: Store,
        others: Store | None,
        *,
        expiry: Expiry,
        removal: Removal,
        clock: Clock,
        observer: Observer,
    ) -> None:
        """`others` is the store, if it has a record of every change."""
        self._table = table
        self._directory = directory
        self._turns = turns
        self._begin = begin
        self._quotas = quotas
        self._closing = closing
        self._listing = listing
        self._loader = loader
        self._records = records
        self._commits = commits
        self._store = store
        self._others = others
        self._removal = removal
        self._expiry = expiry
        self._clock = clock
        self._observer = observer

    # ---------------------------------------------------------------------------------------------------- exporting

    async def export(self, session_ids: Sequence[str], *, deadline: float) -> list[Exported]:
        """The records of sessions as of their last completed changes, or why there is none."""
        if self._others is None:
            return [await self._of_arena(session_id, deadline) for session_id in session_ids]
        fetched = await self._others.fetch(session_ids)
        over = {i for i, each in zip(session_ids, fetched, strict=True) if self._expiry.is_over(i, each)}
        missing = [
            i for i, each in zip(session_ids, fetched, strict=True) if each.record is None or i in over
        ]
        seen = await self._directory.look(missing, anew=bool(over)) if missing else self._directory.here
        found = [
            self._exported(i, each, seen, must_be_here=i in over)
            for i, each in zip(session_ids, fetched, strict=True)
        ]
        for place, each in enumerate(found):
            if not isinstance(each, ServerError):
                as_now = self._as_now(session_ids[place], each)
                found[place] = as_now or await self._of_arena(session_ids[place], deadline, brings=True)
        return found

    def _as_now(self, session_id: str, record: Stored) -> Stored | None:
        """A record as of the version that its session is on by now; None: its state is another there."""
        try:
            header = decode_header(session_id, record)
            model, way = self._directory.models.place(session_id, header)
        except ServerError:
            return record  # it leaves as it is
        if not way:
            return record
        if any(move.how is not How.CARRY for move in way):
            return None
        decoded = decode_many([session_id], [record])
        _, rest = split(header.fields)
        header = dataclasses.replace(
            header,
            fingerprint=model.program.fingerprint,
            fields=joined(model.mark(model.epoch, is_pinned=False), rest),
        )
        return _encoded(session_id, header, decoded.rows, decoded.extras.get(0, b""))

    def _exported(self, session_id: str, fetched: Fetched, seen: Seen, *, must_be_here: bool) -> Exported:
        record = fetched.record
        if (
            fetched.tombstone is not None and not must_be_here
        ):  # maybe by another server, and the table has it still
            return ended_by(fetched.tombstone)
        if must_be_here or session_id in self._table:
            try:
                self._directory.find(session_id, seen)
            except ServerError as error:
                return error
        if record is None:
            return self._directory.gone(session_id, seen)
        if not is_sound(session_id, record) or key_id_of(record) is not None:
            return StateCorrupt(
                f"the stored record of session {session_id!r} must be as it was written, and there must be a key that"
                " opens it if it is encrypted",
                session_id=session_id,
            )
        return record

    async def _of_arena(self, session_id: str, deadline: float, *, brings: bool = False) -> Exported:
        """The record of a session of which the store has no other, or has one only while it is not in the arena."""
        try:
            seen = await self._directory.look([session_id])
            handle = self._directory.find(session_id, seen)
            await self._turns.hold(handle, deadline, rows=brings)
        except ServerError as error:
            return error
        try:
            if self._table.row[handle] < 0:
                (found,) = await self._store.fetch([session_id])
                record = found.record
                if record is None:
                    stone = found.tombstone
                    return _lost(session_id) if stone is None else ended_by(stone)
                as_now = self._as_now(session_id, record)
            else:
                model = self._directory.models.by_handle(handle)
                outcome = as_it_is(self._table, model, np.array([handle]))
                last_used = self._clock.now() - (self._clock.monotonic() - float(self._table.used[handle]))
                ((_, as_now),) = self._records.of(outcome, last_used)
        finally:
            self._turns.release(np.array([handle]))
        return await self._of_arena(session_id, deadline, brings=True) if as_now is None else as_now

    async def export_page(
        self,
        wanted: SessionFilter,
        *,
        after: str,
        page_bytes: int,
        most_bytes: int,
        deadline: float,
    ) -> tuple[list[tuple[str, Exported]], str | None]:
        """Sessions that fit a filter, about so many bytes of them but at least one, and where the next page begins.

        A record of more than `most_bytes` is told as an error.
        """
        query = Query(filter=wanted, after=after, limit=MOST_AT_ONCE, count=False)
        page, _ = await self._listing.page(query)
        found: list[tuple[str, Exported]] = []
        size = 0
        for start in range(0, len(page), _PIECE):
            ids = [info.session_id for info in page[start : start + _PIECE]]
            for session_id, each in zip(ids, await self.export(ids, deadline=deadline), strict=True):
                if isinstance(each, SessionGone):
                    continue  # it ended meanwhile
                record = each
                if not isinstance(record, ServerError) and len(record) > most_bytes:
                    record = MessageTooLarge(
                        f"session {session_id!r} must have at most {most_bytes} bytes to be exported;"
                        f" it has {len(record)}"
                    )
                own = 0 if isinstance(record, ServerError) else len(record) + len(session_id)
                if found and size + own > page_bytes:
                    return found, found[-1][0]
                size += own
                found.append((session_id, record))
            await asyncio.sleep(0)
        return found, page.next

    # ---------------------------------------------------------------------------------------------------- importing

    async def bring(
        self, sessions: Sequence[Arriving], existing: Existing, who: Caller = ANYBODY
    ) -> list[Result]:
        """Make sessions of records, each by itself; what became of each, or why not.

        A session begins as used now. Its revision, position, creation and limit for being idle, and the answer that is
        remembered for a retry of its last change, are those of the record.

        Raises:
            InvalidInput: there are too many, or one id comes twice.
        """
        ids = [each.session_id for each in sessions]
        if len(ids) > MOST_AT_ONCE:
            raise InvalidInput(f"sessions must be at most {MOST_AT_ONCE}; got {len(ids)}")
        if len(set(ids)) != len(ids):
            raise InvalidInput("sessions must be different from each other; got one of them twice")
        results: dict[str, Result] = {}
        new: dict[str, _New] = {}
        for place, each in enumerate(sessions):
            if place % _PIECE == _PIECE - 1:
                await asyncio.sleep(0)
            try:
                new[each.session_id] = self._checked(each, who)
            except ServerError as error:
                results[each.session_id] = error
        fresh = await self._unless_there(new, existing, results)
        results.update(await self._make(fresh))
        for session_id, one in new.items():
            if session_id not in results:
                results[session_id] = await self._replace(one)
        return [results[session_id] for session_id in ids]

    def _checked(self, arriving: Arriving, who: Caller) -> _New:
        """What would be imported, if it may be.

        Raises:
            InvalidInput, StateCorrupt, ModelNotFound, ModelMismatch
        """
        session_id, record = arriving.session_id, arriving.record
        require_session_id("session_id", session_id)
        header = decode_header(arriving.recorded_as, record)
        check_header(session_id, header, self._clock.now())
        model = self._version_of(session_id, header)
        if not 1 <= header.batch_size <= model.slots.resident_limit:
            raise InvalidInput(
                f"batch_size of session {session_id!r} must be 1 to resident_rows,"
                f" {model.slots.resident_limit}; got {header.batch_size}"
            )
        decoded = decode_many([arriving.recorded_as], [record])
        extra = decoded.extras.get(0, b"")
        check_state(session_id, header, model, decoded.rows, extra)
        mark, _ = split(header.fields)
        rest = imported_fields(session_id, header.fields)
        rest = at_birth(self._begin.owner(who, session_id), None, rest)
        is_pinned = mark is not None and Mark.unpack(mark).is_pinned
        header = dataclasses.replace(
            header,
            fingerprint=model.program.fingerprint,
            last_used=self._clock.now(),
            state_bytes=len(decoded.rows) + len(extra),
            fields=joined(model.mark(model.epoch, is_pinned=is_pinned), rest),
        )
        return _New(session_id, header, model, decoded.rows, extra)

    def _version_of(self, session_id: str, header: Header) -> Model:
        """The version that an imported session is on: that with its weights, or the one that took its sessions over.

        What its record says of moves are those of another server, or of another time.

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
            version, way = own.history.way(known, 0)
            if way and version in own.loaded and all(move.how is How.CARRY for move in way):
                return own.loaded[version]
        raise ModelMismatch(
            f"the model of session {session_id!r} must be a version of {header.model!r} that is served, of fingerprint"
            f" {' or '.join(model.program.fingerprint for model in own.loaded.values())}; it has {header.fingerprint}",
            model=header.model,
        )

    async def _unless_there(
        self, new: dict[str, _New], existing: Existing, results: dict[str, Result]
    ) -> list[_New]:
        """Those that are not there; `results` gets what is there and stays. The others are to be replaced."""
        ids = list(new)
        seen = await self._begin.look(ids)
        handles = self._directory.find_all(ids, seen)
        missing = [ids[place] for place in np.flatnonzero(handles < 0).tolist()]
        unusable = set(self._directory.unusable(missing, seen))
        past = self._directory.past(ids, seen)
        revisions = dict(zip(ids, past.revisions.tolist(), strict=True))
        follows = dict(zip(ids, self._directory.follows(ids, seen).tolist(), strict=True))
        fresh: list[_New] = []
        for session_id, handle in zip(ids, handles.tolist(), strict=True):
            each = new[session_id]
            if handle < 0 and session_id not in unusable:
                if each.header.revision + 1 < revisions[session_id] and existing is not Existing.REPLACE:
                    results[session_id] = SessionExists(
                        f"session {session_id!r} must not go back to revision {each.header.revision}: it ended here"
                        f" at revision {revisions[session_id] - 1}",
                        session_id=session_id,
                    )
                else:
                    was_here = revisions[session_id] > 0 or existing is Existing.REPLACE
                    own = each.after(past.closes.get(session_id, ()))
                    fresh.append(dataclasses.replace(own, was_here=was_here, follows=follows[session_id]))
            elif handle >= 0 and self._is_same(handle, each):
                results[session_id] = Brought.IMPORTED
            elif existing is Existing.SKIP:
                results[session_id] = Brought.SKIPPED
            elif existing is Existing.REFUSE:
                results[session_id] = SessionExists(
                    f"session_id must be new; session {session_id!r} is open", session_id=session_id
                )
        if fresh:  # nobody else makes them from here on
            self._begin.reserve([each.session_id for each in fresh])
        return fresh

    def _is_same(self, handle: int, each: _New) -> bool:
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

    async def _make(self, fresh: Sequence[_New]) -> dict[str, Result]:
        """Make sessions whose ids are reserved."""
        fresh, results = self._counted(fresh)
        if not fresh:
            return results
        ids = [each.session_id for each in fresh]
        stamp = self._store.new_stamp()

        def done(committed: Committed | ServerError) -> dict[str, Result]:
            for each in fresh:
                error = _problem(each.session_id, committed)
                if self._quotas is not None:
                    settle = self._quotas.made if error is None else self._quotas.not_made
                    settle([each.session_id], each.usage)
                results[each.session_id] = error or Brought.IMPORTED
            kept = [each for each in fresh if results[each.session_id] is Brought.IMPORTED]
            if kept:
                self._loader.adopt(
                    [each.served for each in kept],
                    [stamp] * len(kept),
                    [0.0] * len(kept),
                )
            self._begin.release(ids, self._removal.pending[ids[0]])
            self._tell(kept)
            return results

        batch = Batch(
            puts=[(each.session_id, each.record) for each in fresh],
            forgets=ids,
            counts=list(Counter(each.model.name for each in fresh).items()),
            tenant_counts=counts.of_tenants([(each.session_id, each.model.name) for each in fresh], 1),
            goes_back=any(each.was_here for each in fresh),
            follows=np.array([each.follows for each in fresh], np.uint64),
            stamps=stamped(stamp, len(fresh)),
        )
        return await self._commit(batch, done)

    def _counted(self, fresh: Sequence[_New]) -> tuple[Sequence[_New], dict[str, Result]]:
        """Those that their tenant may have, and why the others are not made."""
        results: dict[str, Result] = {}
        for each in fresh:
            try:
                if self._quotas is not None:
                    self._quotas.begin([each.session_id], each.usage, owner_of(each.header.fields))
            except QuotaExceeded as error:
                self._begin.release([each.session_id], self._removal.pending[each.session_id])
                results[each.session_id] = error
        return [each for each in fresh if each.session_id not in results], results

    async def _replace(self, each: _New) -> Result:
        session_id, new = each.session_id, each.usage
        try:
            seen = await self._directory.look([session_id], anew=True)
            handle = -1
            with contextlib.suppress(ModelMismatch, ModelNotFound, StateCorrupt):
                handle = self._directory.find(session_id, seen)
            if handle < 0 or self._store.local is None:
                # nobody can step it, or the store takes a record only if it follows the one that is there
                _, old = self._directory.stored_usage(session_id, seen)
                old = self._table.usage(handle) if handle >= 0 else old
                # a quota refuses it now, or when what was there is gone
                more = (new - old).positive()
                self._recount(session_id, more)
                self._recount(session_id, more * -1)
                await self._closing.close(session_id, seen, request_id=0, deadline=float("inf"))
                result = await self._make_anew(each)
                return Brought.REPLACED if result is Brought.IMPORTED else result
            await self._turns.hold(handle, float("inf"), rows=False)
        except SessionGone:
            return await self._make_anew(each)
        except ServerError as error:
            return error
        name, old = self._directory.models.by_handle(handle).name, self._table.usage(handle)
        more = (new - old).positive()
        try:
            self._recount(session_id, more)
        except QuotaExceeded as error:
            self._turns.release(np.array([handle]))
            return error

        each = each.after(closes_of(self._table.fields.get(handle, b"")))

        def done(committed: Committed | ServerError) -> Result:
            error = _problem(session_id, committed)
            self._recount(session_id, (new - old - more) if error is None else more * -1)
            if error is not None:
                self._turns.release(np.array([handle]))
                return error
            gone = SessionNotFound(
                session_id, f"session {session_id!r} was replaced by one that was imported"
            )
            self._removal.forget(handle, gone)
            self._loader.adopt([each.served], [self._store.new_stamp()], [0.0])
            self._tell([each])
            return Brought.REPLACED

        moved = [] if name == each.model.name else [(name, -1), (each.model.name, 1)]
        batch = Batch(
            puts=[(session_id, each.record)],
            forgets=[session_id],
            counts=moved,
            tenant_counts=[
                change for whose, by in moved for change in counts.of_tenants([(session_id, whose)], by)
            ],
            goes_back=True,
        )
        return await self._commit(batch, done)

    def _recount(self, session_id: str, more: Usage) -> None:
        if self._quotas is not None:
            self._quotas.change(session_id, more)

    async def _make_anew(self, each: _New) -> Result:
        results: dict[str, Result] = {}
        fresh = await self._unless_there({each.session_id: each}, Existing.REPLACE, results)
        if not fresh and not results:  # somebody else has made one meanwhile
            return changed_elsewhere(each.session_id)
        return (results | await self._make(fresh))[each.session_id]

    async def _commit(self, batch: Batch, done: Callable[[Committed | ServerError], _T]) -> _T:
        """Commit; `done` is called also if the caller is cancelled meanwhile."""
        kept: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._commits.submit(lambda: batch, len(batch.puts), lambda told: kept.set_result(done(told)))
        return await asyncio.shield(kept)

    def _tell(self, sessions: Sequence[_New]) -> None:
        for model, count in Counter(each.model.name for each in sessions).items():
            self._observer.session_events("imported", model, count)


def _lost(session_id: str) -> SessionLost:
    return SessionLost(session_id, f"session {session_id!r} was paged out and is not in the store")


def _problem(session_id: str, committed: Committed | ServerError) -> ServerError | None:
    if isinstance(committed, ServerError):
        return committed
    outcome = committed.of(session_id)
    if outcome is Outcome.KEPT:
        return None
    return not_known() if outcome is Outcome.UNKNOWN else changed_elsewhere(session_id)


def _encoded(session_id: str, header: Header, rows: bytes, extra: bytes) -> bytes:
    facts = dataclasses.asdict(header)
    del facts["state_bytes"]
    texts = Texts(facts.pop("fingerprint"), facts.pop("model"))
    return encode(session_id, texts, rows=rows, extra=extra, **facts)
