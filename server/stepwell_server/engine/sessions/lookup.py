"""Looks sessions up in the store and enters them in the table, without their states: those are read when needed.

A call on sessions that are not in the table waits for `Lookup`. It then finds them in the table, or the reason why
not in the `LookupResult`.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence

import numpy as np

from stepwell_server.core.namespaces import tenant_of
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.eager import Rest, finish, start
from stepwell_server.engine.sessions.end import Expiry, Removal
from stepwell_server.engine.state.fields import Fields
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.threads import Pieces
from stepwell_server.engine.types import U64, Members
from stepwell_server.engine.versions.history import MoveKind
from stepwell_server.engine.versions.registry import Models
from stepwell_server.errors import (
    ModelMismatch,
    ModelNotFound,
    Overloaded,
    ServerError,
    StateCorrupt,
    Unavailable,
)
from stepwell_server.store import counts
from stepwell_server.store.base import Store, StoredSession, Tombstone
from stepwell_server.store.record import Header, RecordBytes, decode_header, header_or_none

_NOTHING = StoredSession()
_NO_MEMBERS: Members = np.zeros(0, np.intp)
_FIRST: Members = np.zeros(1, np.intp)
#: The most calls that may wait for the store's answer.
MAX_WAITING = 16_384
_RETRY_AFTER_S = 0.5


class LookupResult:
    """What a store returned for some sessions; nothing is known of others."""

    def __init__(
        self,
        found: Mapping[str, StoredSession],
        error: ServerError | None = None,
        newer: Mapping[str, StoredSession] | None = None,
    ) -> None:
        self._found = found if isinstance(found, dict) else dict(found)
        self._error = error
        self.is_empty = error is None and bool(found) and not any(each.record for each in found.values())
        """Some sessions were looked up, and the store has no record of any."""
        self.is_compared = newer is not None
        """Whether sessions in the table were compared with their records."""
        self._newer = dict(newer or {})

    def add(self, other: LookupResult, here: Sequence[str]) -> None:
        """Merge another result, except for sessions that are in the table now."""
        self.is_empty = other.is_empty and (self.is_empty or not self._found)
        self._found.update(other._found)
        for session_id in here:
            self._found.pop(session_id, None)
        self._error = self._error or other._error
        self._newer.update(other._newer)

    def get(self, session_id: str) -> RecordBytes | None:
        """The record of a session, or None.

        Raises:
            Unavailable: the store could not be read, or was not asked for the session. The other methods raise it
                too.
        """
        return self.all_of([session_id])[0].record

    def get_many(self, session_ids: Sequence[str]) -> list[RecordBytes | None]:
        """The records of many sessions; None where there is none."""
        return [each.record for each in self.all_of(session_ids)]

    def tombstones(self, session_ids: Sequence[str]) -> list[Tombstone | None]:
        """How sessions without a record ended, if that is remembered."""
        return [each.tombstone for each in self.all_of(session_ids)]

    def stamp(self, session_id: str) -> int:
        """The stamp of the record, or else of the tombstone; 0 if there is neither."""
        return self.all_of([session_id])[0].stamp

    def stamps(self, session_ids: Sequence[str]) -> U64:
        """`stamp` for many sessions."""
        return np.array([each.stamp for each in self.all_of(session_ids)], np.uint64)

    def idle_s(self, session_id: str) -> float:
        """How long the session was unused, by the store's clock; NaN if it has none."""
        return self.all_of([session_id])[0].idle_s

    def newer(self, session_id: str) -> StoredSession | None:
        """Another server's change of a session that is active here; None: none."""
        return self._newer.get(session_id)

    def ended_elsewhere(self) -> Sequence[str]:
        """Sessions that are active here and have ended on another server."""
        return [session_id for session_id, each in self._newer.items() if each.record is None]

    def all_of(self, session_ids: Sequence[str]) -> list[StoredSession]:
        """Everything known of some sessions."""
        try:
            return [*map(self._found.__getitem__, session_ids)]
        except KeyError as missing:
            raise self._error or Unavailable(
                f"session {missing.args[0]!r} must have been read from the store; it left the table meanwhile"
            ) from None


class Lookup:
    """Reads sessions from the store. Calls wait for it in the order in which they name each session.

    No later call on one of the sessions overtakes an earlier one. Lives on the event loop.
    """

    def __init__(
        self,
        table: SessionTable,
        store: Store,
        expiry: Expiry,
        removal: Removal,
        loader: Loader,
        pieces: Pieces,
        drain: Callable[[], None],
        catch_up: Callable[[Sequence[Header]], Awaitable[None]],
    ) -> None:
        """`drain` makes changes in the inboxes claim their sessions.

        `catch_up` is called with records of versions, or of moves, that are unknown here, and returns when they are
        known.
        """
        self._table = table
        self._store = store
        self._expiry = expiry
        self._removal = removal
        self._loader = loader
        self.pieces = pieces
        self._drain = drain
        self._catch_up = catch_up
        self._loop = asyncio.get_running_loop()
        self._tails: dict[str, asyncio.Future[None]] = {}
        """The last waiting call for each session: done when the next one may look."""
        self.waiting = 0
        """Waiting calls and changes."""
        self._removals = 0
        """Sessions that had left the table when the inboxes were last drained."""
        self._idle = asyncio.Event()

    async def idle(self) -> None:
        """Return when nothing waits."""
        while self.waiting:
            self._idle.clear()
            await self._idle.wait()

    def require_room(self) -> None:
        """Refuse a call if too many wait for the store; changes have a limit of their own.

        Raises:
            Overloaded: with the retry delay.
        """
        if self.waiting >= MAX_WAITING:
            raise Overloaded(
                f"calls that wait for the store must stay within {MAX_WAITING}; {self.waiting} wait",
                retry_after_s=_RETRY_AFTER_S,
            )

    def away(self, session_ids: Sequence[str], handles: Handles) -> Members:
        """Places of sessions that must be read: not in the table, due to expire, or with calls waiting here."""
        if len(handles) == 1:  # the common case
            handle = int(handles[0])
            is_here = handle >= 0 and session_ids[0] not in self._tails
            return _NO_MEMBERS if is_here and not self._expiry.is_suspect(handle) else _FIRST
        is_away = handles < 0
        suspects = self._expiry.suspects(handles)
        if len(suspects):
            is_away |= np.isin(handles, suspects)
        if self._tails:
            is_away |= np.fromiter((i in self._tails for i in session_ids), np.bool_, len(session_ids))
        return np.flatnonzero(is_away)

    def must_wait(self, session_ids: Sequence[str]) -> bool:
        """Whether any of the sessions is `away`."""
        return bool(len(self.away(session_ids, self._table.find_all(session_ids))))

    async def wait(
        self,
        session_ids: Sequence[str],
        *,
        reread: bool = False,
        use: Callable[[LookupResult], Sequence[str]] | None = None,
    ) -> LookupResult:
        """Read those of some sessions that are not in the table.

        With `reread`, sessions in the table are also read, since other servers may have changed them, unless they
        are active here. `use` is called with the result before any later call on one of the sessions continues. It
        returns sessions to `reread`, and is called once more for these.

        Returns when earlier calls on these sessions have been admitted, and the store has answered. The awaiting
        caller continues in the same iteration: nothing runs in between. Cancelling it does not affect later calls.
        """
        if self._removals != self._table.removals:
            # queued changes came before, and look their session up first if it has left the table
            self._removals = self._table.removals
            self._drain()
        tails = self._tails
        before = {tail for i in session_ids if (tail := tails.get(i)) is not None} if tails else set()
        rest: Rest[LookupResult] | None = None
        if not before:
            seen = start(self._ask(session_ids, use, reread=reread))
            if not isinstance(seen, Rest):
                return seen
            rest = seen
        own: asyncio.Future[None] = self._loop.create_future()
        tails.update(dict.fromkeys(session_ids, own))
        self.waiting += 1
        try:
            if rest is not None:
                return await rest
            await asyncio.wait(before)
            return await self._ask(session_ids, use, reread=reread)
        finally:
            self._end_after(before, own, session_ids)

    async def _ask(
        self, session_ids: Sequence[str], use: Callable[[LookupResult], Sequence[str]] | None, *, reread: bool
    ) -> LookupResult:
        newer: Mapping[str, StoredSession] | None = None
        if reread:
            self._drain()  # earlier changes are active then
            # a session in the table after that may have been changed elsewhere since it was stored
            await self._removal.settled(session_ids)
            newer = await self._expiry.compare(session_ids)
        seen = await self._look(session_ids, newer)
        doubted = () if use is None else use(seen)
        return await self._ask(doubted, use, reread=True) if doubted else seen

    async def _look(
        self, session_ids: Sequence[str], newer: Mapping[str, StoredSession] | None
    ) -> LookupResult:
        found: dict[str, StoredSession] = {}
        table = self._table
        try:
            await self._expiry.expire_named(session_ids, is_compared=newer is not None)
            # a session being created here may exist already: another server may have created it
            await self._removal.settled(session_ids)
            removals, wanted = table.removals, self._expiry.only_stored(session_ids)
            while wanted:
                read = await self._read(wanted)
                over = await self._expiry.expire_found(read)
                found |= {i: each for i, each in read.items() if i not in over} if over else read
                if not over and table.removals == removals:
                    break
                removals = table.removals
                wanted = [i for i in self._expiry.only_stored(session_ids) if i not in found]
        except ServerError as error:
            known = dict.fromkeys(session_ids, _NOTHING)
            for session_id in self._expiry.only_stored(session_ids):
                del known[session_id]
            return LookupResult(known | found, error, newer)
        seen = LookupResult(found, newer=newer)
        ids, unusable = list(found), list[str]()
        if not seen.is_empty:
            async for part in self.pieces.of(ids):
                unusable += self._loader.load_all(ids[part], seen)[1]
        behind = self._loader.behind(unusable, seen) if unusable else None
        if behind:
            try:
                await self._catch_up(list(behind.values()))
            except ServerError as error:
                known = dict.fromkeys(session_ids, _NOTHING)
                for session_id in behind:
                    del found[session_id], known[session_id]
                return LookupResult(known | found, error, newer)
            self._loader.load_all(ids, seen)
        has_left = table.removals != removals and not found.keys() >= {*self._expiry.only_stored(session_ids)}
        if has_left or self._removal.are_pending(session_ids):  # or are beginning or ending here
            return await self._look(session_ids, newer)
        if len(found) == len(session_ids):
            return seen
        return LookupResult(dict.fromkeys(session_ids, _NOTHING) | found, newer=newer)

    async def _read(self, session_ids: Sequence[str]) -> dict[str, StoredSession]:
        """Read sessions from the store, in batches that are awaited together."""
        found: dict[str, StoredSession] = {}
        later: list[tuple[Sequence[str], asyncio.Future[list[StoredSession]]]] = []
        size = self._store.fetch_size
        for at in range(0, len(session_ids), size):
            if at:
                await self.pieces.turn(tenant_of(session_ids[0]))
            ids = session_ids[at : at + size]
            answer = start(self._store.fetch(ids))
            if isinstance(answer, Rest):
                later.append((ids, asyncio.ensure_future(finish(answer))))
            else:
                found.update(zip(ids, answer, strict=True))
        answers = await asyncio.gather(*(answer for _, answer in later)) if later else []
        for (ids, _), answer in zip(later, answers, strict=True):
            found.update(zip(ids, answer, strict=True))
        return found

    def _end_after(
        self, before: set[asyncio.Future[None]], own: asyncio.Future[None], session_ids: Sequence[str]
    ) -> None:
        """Let the next call look, but not before all earlier ones: this call may have been cancelled."""
        left = {tail for tail in before if not tail.done()}
        if not left:
            self._end(own, session_ids)
            return

        def one_less(tail: asyncio.Future[None]) -> None:
            left.discard(tail)
            if not left:
                self._end(own, session_ids)

        for tail in list(left):
            tail.add_done_callback(one_less)

    def _end(self, own: asyncio.Future[None], session_ids: Sequence[str]) -> None:
        is_followed = False
        for session_id in session_ids:
            if self._tails.get(session_id) is own:
                del self._tails[session_id]
            else:
                is_followed = True
        if is_followed:
            # admitted changes claim their sessions, which could otherwise leave the table before later calls
            # continue
            self._drain()
        own.set_result(None)
        self.waiting -= 1
        if not self.waiting:
            self._idle.set()


def refresh(table: SessionTable, fields: Fields, handle: int, header: Header, stamp: int) -> None:
    """Update the table from a record that another server wrote."""
    table.stamp[handle] = stamp
    table.revision[handle], table.position[handle] = header.revision, header.position
    table.request_id[handle], table.opened_with[handle] = header.request_id, header.opened_with
    table.digest[handle], table.opened_digest[handle] = header.digest, header.opened_digest
    table.created[handle], table.reply[handle] = header.created, header.reply
    table.max_idle_ms[handle] = header.max_idle_ms
    table.bytes[handle] = counts.usage_of(header).bytes
    fields.take(handle, header.fields)


class Loader:
    """Enters the store's sessions in the table when they are named. Lives on the event loop."""

    def __init__(self, table: SessionTable, models: Models, expiry: Expiry, fields: Fields) -> None:
        self._table = table
        self._models = models
        self._expiry = expiry
        self._fields = fields

    def load(self, session_id: str, seen: LookupResult) -> int | None:
        """The handle of a session that only the store had; None if it does not exist."""
        stored = seen.get(session_id) if self._expiry.only_stored([session_id]) else None
        if stored is None:
            return None
        served, idle_s = self._served(session_id, stored), [seen.idle_s(session_id)]
        return int(self.adopt([served], seen.stamps([session_id]), idle_s)[0])

    def load_all(self, session_ids: Sequence[str], seen: LookupResult) -> tuple[int, list[str]]:
        """Enter sessions in the table that are in the store and can be stepped.

        Returns:
            How many were entered, and those that exist and cannot be stepped.

        Raises:
            Unavailable: the store cannot be read.
        """
        if seen.is_empty:
            return 0, []
        wanted = self._expiry.only_stored(session_ids)
        found: list[tuple[str, Header, Model]] = []
        unusable: list[str] = []
        for session_id, stored in zip(wanted, seen.get_many(wanted), strict=True):
            if stored is None:
                continue
            try:
                found.append(self._served(session_id, stored))
            except (StateCorrupt, ModelMismatch, ModelNotFound):
                unusable.append(session_id)  # `find` raises the reason
        if found:
            ids = [session_id for session_id, _, _ in found]
            self.adopt(found, seen.stamps(ids), [*map(seen.idle_s, ids)])
        return len(found), unusable

    def behind(self, session_ids: Sequence[str], seen: LookupResult) -> dict[str, Header]:
        """Stored sessions, with their headers, whose records mention versions or moves that are unknown here."""
        found: dict[str, Header] = {}
        for session_id, stored in zip(session_ids, seen.get_many(session_ids), strict=True):
            header = None if stored is None else header_or_none(session_id, stored)
            if header is not None and self._models.is_behind(header):
                found[session_id] = header
        return found

    def _served(self, session_id: str, stored: RecordBytes) -> tuple[str, Header, Model]:
        """A stored session that can be stepped here."""
        header = decode_header(session_id, stored)
        model, move = self._models.place(session_id, header)
        if move is not None and move.how is MoveKind.RESET:  # its state is converted when it is needed
            header = dataclasses.replace(header, position=0)
        return session_id, header, model

    def adopt(
        self,
        sessions: Sequence[tuple[str, Header, Model]],
        stamps: U64,
        idle_s: Sequence[float],
    ) -> Handles:
        """Enter sessions of the store in the table, none of which is there yet.

        Headers and stamps are those of their records; for `idle_s` see `LookupResult.idle_s`.
        """
        headers = [header for _, header, _ in sessions]
        handles = self._table.add(
            [session_id for session_id, _, _ in sessions],
            rows=None,
            model=[model.index for _, _, model in sessions],
            batch_size=[header.batch_size for header in headers],
            revision=np.array([header.revision for header in headers], np.uint64),
            position=np.array([header.position for header in headers], np.uint64),
            request_id=np.array([header.request_id for header in headers], np.uint64),
            opened_with=np.array([header.opened_with for header in headers], np.uint64),
            digest=np.array([header.digest for header in headers], np.uint64),
            opened_digest=np.array([header.opened_digest for header in headers], np.uint64),
            max_idle_ms=[header.max_idle_ms for header in headers],
            created=[header.created for header in headers],
            used=[
                self._expiry.take_use(header, idle)
                for (_, header, _), idle in zip(sessions, idle_s, strict=True)
            ],
            reply=[header.reply for header in headers],
            stamp=stamps,
            bytes=[counts.usage_of(header).bytes for header in headers],
        )
        for handle, header in zip(handles.tolist(), headers, strict=True):
            if header.fields:
                self._fields.take(handle, header.fields)
        self._expiry.watch(handles)
        return handles
