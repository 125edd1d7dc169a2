"""The session table: one array per column, one index (handle) per session.

With columns, work on a thousand sessions is one array operation instead of a thousand Python steps, and a session
takes some 100 bytes besides its id. A handle is valid from `add` to `remove` and is then reused.

No operation gets slower as sessions are added. Address space for columns is reserved for more sessions than most
servers have, and memory is used from the first write on, so columns are rarely copied. The garbage collector does
not visit the ids.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, ItemsView, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stepwell_server.core.quotas import Usage
from stepwell_server.core.slots import Rows, page_by_page

Handles = npt.NDArray[np.intp]
#: The largest position that a reset may set, and the largest position and revision of an imported session. No
#: session gets from the first to the second by stepping, nor from there to the end of the 64-bit range (signed in
#: Triton's protocol).
MAX_RESET_POSITION, MAX_IMPORT_POSITION = 2**61, 2**62

_COLUMNS: dict[str, type[np.generic]] = {
    "model": np.int32,
    "batch_size": np.int32,
    "revision": np.uint64,
    "position": np.uint64,
    "request_id": np.uint64,
    "opened_with": np.uint64,
    "digest": np.uint64,
    "opened_digest": np.uint64,
    "row": np.intp,
    "used": np.float64,
    "created": np.float64,
    "due": np.int64,
    "birth": np.uint64,
    "claimed": np.bool_,
    "reply": np.uint8,
    "max_idle_ms": np.int64,
    "pinned": np.bool_,
    "stamp": np.uint64,
    "recorded": np.uint64,
    "bytes": np.int64,
    "watched": np.bool_,
    "watch_revision": np.uint64,
    "watch_at": np.float64,
}
_REQUIRED = {"model", "batch_size", "used", "created"}
#: Address space is reserved for this many sessions. Beyond it, each column is copied to one twice as long.
_CAPACITY = 1 << 22
_IDS_PER_CHUNK = 1024
#: Handles are kept for tuples of this many ids, which are those that the native front keeps: see `known_ids.rs`.
_KNOWN_SIZES = range(64, 2049)
#: Limit of these tuples.
_MAX_KNOWN = 64


def are_missing(handles: Handles) -> bool:
    """Whether `SessionTable.find_all` returned any session that does not exist."""
    return bool(handles[0] < 0 if len(handles) == 1 else np.count_nonzero(handles < 0))


class _Ids:
    """The id of each handle, in arrays, since the garbage collector would visit every entry of a list each time."""

    def __init__(self) -> None:
        self._chunks: list[npt.NDArray[np.object_]] = []
        self._changes: list[int] = []
        """How often each chunk has changed."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def chunks(self) -> list[tuple[int, npt.NDArray[np.object_]]]:
        return list(zip(self._changes, self._chunks, strict=True))

    def __getitem__(self, handle: int) -> str:
        found: str = self._chunks[handle // _IDS_PER_CHUNK][handle % _IDS_PER_CHUNK]
        return found

    def __setitem__(self, handle: int, session_id: str) -> None:
        self._chunks[handle // _IDS_PER_CHUNK][handle % _IDS_PER_CHUNK] = session_id
        self._changes[handle // _IDS_PER_CHUNK] += 1

    def append(self, session_id: str) -> None:
        if self._count == len(self._chunks) * _IDS_PER_CHUNK:
            self._chunks.append(np.empty(_IDS_PER_CHUNK, np.object_))
            self._changes.append(0)
        self._count += 1
        self[self._count - 1] = session_id


class _KnownHandles(NamedTuple):
    """The handles of a tuple of ids."""

    session_ids: tuple[str, ...]
    """Kept, so that no other object gets its identity."""
    handles: Handles
    births: npt.NDArray[np.uint64]

    def is_current(self, births: npt.NDArray[np.uint64]) -> bool:
        """Whether all handles still belong to these sessions."""
        return not np.count_nonzero(births[self.handles] != self.births)


class SessionTable:
    """All live sessions of a server."""

    model: npt.NDArray[np.int32]
    """Index of the session's model version; -1: the handle is free."""
    batch_size: npt.NDArray[np.int32]
    revision: npt.NDArray[np.uint64]
    position: npt.NDArray[np.uint64]
    request_id: npt.NDArray[np.uint64]
    """Request id of the last change; 0: none."""
    opened_with: npt.NDArray[np.uint64]
    """Request id of the call that created the session, or a random number. No two sessions of an id share it."""
    digest: npt.NDArray[np.uint64]
    """Digest of the last change's content: see `exactly_once`. 0: none."""
    opened_digest: npt.NDArray[np.uint64]
    """Digest of the content of the call that created the session."""
    row: npt.NDArray[np.intp]
    """First row in the model's arena; -1: paged out, the state is only in the store."""
    used: npt.NDArray[np.float64]
    """Last use, in seconds on the monotonic clock."""
    created: npt.NDArray[np.float64]
    """Creation time, in seconds since the epoch."""
    due: npt.NDArray[np.int64]
    """When the session is next checked for being idle, in the units of `idle`. -1: never."""
    birth: npt.NDArray[np.uint64]
    """Distinguishes sessions that had the same handle one after the other."""
    claimed: npt.NDArray[np.bool_]
    """An operation is active on the session; later ones wait."""
    reply: npt.NDArray[np.uint8]
    """How the reply to the last change is kept: the engine's `ReplyForm`. 0: it has no outputs."""
    max_idle_ms: npt.NDArray[np.int64]
    """Its own idle limit, in milliseconds; 0: none. See `idle.IdleLimits`."""
    pinned: npt.NDArray[np.bool_]
    """It stays on the version of its model with which it was opened."""
    stamp: npt.NDArray[np.uint64]
    """The stamp of the record that the columns reflect, where other servers use the store; else 0."""
    recorded: npt.NDArray[np.uint64]
    """The revision whose stored record has the rows that the session's rows in the arena then had: see `store.changes`."""
    bytes: npt.NDArray[np.int64]
    """Its size for quotas of bytes, as the store has it: see `store.counts`."""
    watched: npt.NDArray[np.bool_]
    """Its id is in `watched_ids`. Only then the next two columns mean something."""
    watch_revision: npt.NDArray[np.uint64]
    """A watch may report the change that makes this revision, and those after it."""
    watch_at: npt.NDArray[np.float64]
    """A watch may report changes from this moment on, on the monotonic clock."""

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._handles: dict[str, int] = {}
        self._ids = _Ids()
        self.growths = 0
        """How often the columns were replaced by longer ones."""
        self._more_rows: dict[int, Rows] = {}
        self._known: dict[int, _KnownHandles] = {}
        """By the identity of the tuple, the oldest first."""
        self.watched_ids: set[str] = set()
        """Ids whose sessions are watched, whether they are in the table or not. Change it with `watch` and `unwatch`."""
        self.on_watched_doubtful: Callable[[str], None] = lambda _session_id: None
        """Called with the id of a watched session that leaves the table, or whose state a new version replaced."""
        self.fields: dict[int, bytes] = {}
        """Record fields without a column here, by handle; few sessions have any."""
        self._free: list[int] = []
        self._births = 0
        self.removals = 0
        """Sessions removed so far."""
        self.next_end = math.inf
        """Before this moment, on the monotonic clock, no session can have been idle for too long; `idle` sets it."""
        for name, dtype in _COLUMNS.items():
            setattr(self, name, page_by_page((capacity,), np.dtype(dtype)))
        # Unused rows of the arena have handle 0 in `Slots.owner`, so no session may have it.
        self.model[0] = self.row[0] = -1

    def __len__(self) -> int:
        return len(self._handles)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._handles

    def id_chunks(self) -> list[tuple[int, npt.NDArray[np.object_]]]:
        """Ids of all live sessions in chunks of 1,024 handles, each with a number that changes with it.

        Empty or None entries are not ids. Existing chunks stay unchanged when the table grows.
        """
        return self._ids.chunks()

    def items(self) -> ItemsView[str, int]:
        """Ids and handles of all live sessions."""
        return self._handles.items()

    @property
    def handles(self) -> Mapping[str, int]:
        """Handles by id; the same object for the lifetime of the table."""
        return self._handles

    def find(self, session_id: str) -> int | None:
        """The session's handle, or None."""
        return self._handles.get(session_id)

    def has_any(self, session_ids: Sequence[str]) -> bool:
        """Whether any of these sessions exists."""
        return not self._handles.keys().isdisjoint(session_ids)

    def find_all(self, session_ids: Sequence[str]) -> Handles:
        """Handles of many sessions; -1 for those that do not exist. Faster for a large tuple that it has seen before."""
        if len(session_ids) == 1:
            return np.array([self._handles.get(session_ids[0], -1)], np.intp)
        known = self._known.get(id(session_ids))
        if known is not None and known.is_current(self.birth):
            return known.handles.copy()
        # not a generator: this loop runs over every session of every frame
        found = map(self._handles.get, session_ids, itertools.repeat(-1))
        handles = np.fromiter(found, np.intp, len(session_ids))
        if type(session_ids) is tuple and len(session_ids) in _KNOWN_SIZES and not are_missing(handles):
            while len(self._known) >= _MAX_KNOWN:
                del self._known[next(iter(self._known))]
            self._known[id(session_ids)] = _KnownHandles(session_ids, handles.copy(), self.birth[handles])
        return handles

    def session_id(self, handle: int) -> str:
        """The id of a session."""
        return self._ids[handle]

    def add(self, session_ids: Sequence[str], *, rows: Rows | None, **columns: object) -> Handles:
        """Add sessions, and return their handles.

        Args:
            session_ids: None of them may exist.
            rows: Their rows in the arena, one session after the other; None: they are paged out.
            **columns: A value for all, or one for each. `model`, `batch_size`, `used` and `created` are required;
                other columns default to 0.
        """
        wrong = columns.keys() - _COLUMNS.keys() or _REQUIRED - columns.keys()
        if wrong:
            raise TypeError(
                f"columns of a session must be {sorted(_REQUIRED)} and any of {sorted(_COLUMNS)}; got {sorted(wrong)}"
            )
        handles = np.array([self._new_handle(session_id) for session_id in session_ids], np.intp)
        for name in _COLUMNS:
            getattr(self, name)[handles] = columns.get(name, 0)
        self._births += 1
        self.birth[handles] = self._births
        self.due[handles] = -1
        self.row[handles] = -1
        if rows is not None:
            self.set_rows_of(handles, rows)
        if self.watched_ids:
            self.watched[handles] = [session_id in self.watched_ids for session_id in session_ids]
        return handles

    def watch(self, session_id: str) -> None:
        """Mark a session as watched, now or when it enters the table."""
        self.watched_ids.add(session_id)
        if (handle := self.find(session_id)) is not None:
            self.watched[handle] = True
            self.watch_revision[handle] = 0  # ask the new watch

    def unwatch(self, session_id: str) -> None:
        """Undo `watch`."""
        self.watched_ids.discard(session_id)
        if (handle := self.find(session_id)) is not None:
            self.watched[handle] = False

    def due_to_watches(self, handles: Handles, revisions: npt.NDArray[np.uint64], now: float) -> list[int]:
        """Places of sessions whose change to these revisions a watch may report. Most have none: one question for all."""
        if len(handles) == 1:  # indexes cost a fraction of arrays of indexes
            handle = int(handles[0])
            is_due = self.watched.item(handle) and (
                revisions.item(0) >= self.watch_revision.item(handle) or now >= self.watch_at.item(handle)
            )
            return [0] if is_due else []
        # methods: functions of numpy are dispatched in Python, which costs as much again
        watched = self.watched.take(handles).nonzero()[0]
        if not len(watched):
            return []
        handles = handles.take(watched)
        due = revisions.take(watched) >= self.watch_revision.take(handles)
        due |= self.watch_at.take(handles) <= now
        places: list[int] = watched[due].tolist()
        return places

    def remove(self, handle: int) -> None:
        """Forget a session. The caller frees its rows."""
        self.removals += 1
        session_id = self._ids[handle]
        del self._handles[session_id]
        self._ids[handle] = ""
        self._more_rows.pop(handle, None)
        self.fields.pop(handle, None)
        self.model[handle] = -1
        self.due[handle] = -1
        self.birth[handle] = 0
        self._free.append(handle)
        if self.watched[handle]:
            self.watched[handle] = False
            self.on_watched_doubtful(session_id)

    def rows(self, handle: int) -> Rows:
        """The session's rows in its model's arena."""
        more = self._more_rows.get(handle)
        return self.row[handle : handle + 1].copy() if more is None else more

    def rows_of(self, handles: Handles) -> Rows:
        """The rows of many sessions, one after the other."""
        if not self._more_rows or np.all(self.batch_size[handles] == 1):
            return self.row[handles]
        return np.concatenate([self.rows(int(handle)) for handle in handles])

    def have_fields(self, handles: Handles) -> bool:
        """Whether any of the sessions is in `fields`."""
        return bool(self.fields) and not self.fields.keys().isdisjoint(handles.tolist())

    def usage(self, handle: int) -> Usage:
        """What a session uses of its tenant's quotas."""
        return Usage(1, int(self.batch_size[handle]), int(self.bytes[handle]))

    def page_out(self, handles: Handles) -> None:
        """Record that sessions have no rows in the arena any more."""
        self.row[handles] = -1
        if self._more_rows:
            for handle in handles.tolist():
                self._more_rows.pop(handle, None)

    def set_rows_of(self, handles: Handles, rows: Rows) -> None:
        """Record which rows now hold the sessions' states: their rows, one session after the other."""
        sizes = self.batch_size[handles]
        ends = sizes.cumsum()
        self.row[handles] = rows[ends - sizes]
        for index in (sizes > 1).nonzero()[0].tolist():
            self._more_rows[int(handles[index])] = rows[ends[index] - sizes[index] : ends[index]].copy()

    @property
    def end(self) -> int:
        """One past the highest handle ever used."""
        return len(self._ids)

    def count(self, model: int) -> int:
        """Live sessions of a model."""
        return int(np.count_nonzero(self.model[: self.end] == model))

    def count_resident(self, model: int) -> int:
        """Live sessions of a model whose state is in memory."""
        end = self.end
        return int(np.count_nonzero((self.model[:end] == model) & (self.row[:end] >= 0)))

    def _new_handle(self, session_id: str) -> int:
        if session_id in self._handles:
            raise KeyError(f"session_id must be new; session {session_id!r} exists")
        if self._free:
            handle = self._free.pop()
            self._ids[handle] = session_id
        else:
            handle = len(self._ids)
            self._ids.append(session_id)
            if handle == len(self.model):
                self._grow()
        self._handles[session_id] = handle
        return handle

    def _grow(self) -> None:
        for name in _COLUMNS:
            old = getattr(self, name)
            new = page_by_page((2 * len(old),), old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)
        self.growths += 1
