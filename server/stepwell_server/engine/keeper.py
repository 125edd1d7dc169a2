"""Changes of sessions on their way from the arena to the callers: kept by the store first, then true.

A change has been made in the rows of claimed sessions, where nobody looks. Once the store has it, the table says it
and the callers hear of it. If the store could not keep it, the sessions leave the arena and the table: what the
store holds is the truth, and is loaded when they are next named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.call import U64
from stepwell_server.engine.calls import Array
from stepwell_server.engine.commits import Commits, reason
from stepwell_server.engine.replies import Kept
from stepwell_server.engine.served import ServedModel
from stepwell_server.engine.sheets import Sheets
from stepwell_server.errors import ServerError
from stepwell_server.store.base import Batch
from stepwell_server.store.record import Record, Stored, encode

Answer = Callable[[ServerError | None], None]
_NOBODY = np.zeros(0, np.intp)


@dataclasses.dataclass(slots=True)
class Change:
    """What became of some sessions of a model: what the table will say, `(n,)` each."""

    model: ServedModel
    handles: Handles
    revisions: U64
    positions: U64
    request_ids: U64
    replies: npt.NDArray[np.uint8]
    """How each reply is kept: `Kept`."""
    arrays: Mapping[int, Mapping[str, Array]] = dataclasses.field(default_factory=dict)
    """The replies that are kept as arrays of their own, by their place."""


class Keeper:
    """Makes changes true. Lives on the event loop; records are also made by the store's thread."""

    def __init__(self, table: SessionTable, commits: Commits, clock: Clock) -> None:
        self._table = table
        self._commits = commits
        self._clock = clock
        self._sheets = Sheets(table)
        self.release: Callable[[Handles], None] = _nobody
        """Ends claims and starts what waited. Set by who has them."""
        self.drop: Callable[[Handles, ServerError], None] = _nobody
        """Takes sessions whose rows are not what the store holds out of the arena. Set by who can."""

    @property
    def is_durable(self) -> bool:
        """Changes are kept by the store before they are true."""
        return self._commits.is_durable

    def keep(self, change: Change, answer: Answer) -> Handles:
        """Make a change true and have its callers answered, now or later.

        Args:
            change: Of claimed sessions.
            answer: Called with None when it is true, else with why it never will be.

        Returns:
            Sessions that the caller is to release. Where this is done later they are released then.
        """
        if not self._commits.is_durable:
            self._set(change)
            answer(None)
            return change.handles
        free = _NOBODY
        is_later = False

        def done(error: ServerError | None) -> None:
            nonlocal free
            if error is not None:
                answer(error)
                self.drop(change.handles, error)
                return
            self._set(change)
            answer(None)
            if is_later:
                self.release(change.handles)
            else:
                free = change.handles

        last_used = self._clock.now()
        self._commits.submit(lambda: Batch(puts=self.records(change, last_used)), len(change.handles), done)
        is_later = True
        return free

    def may_keep_one_here(self) -> bool:
        """Whether `keep_one` may be called now."""
        return not self._commits.is_durable or self._commits.may_commit_here(1)

    def keep_one(
        self, model: ServedModel, handle: int, revision: int, position: int, request_id: int, kept: Kept
    ) -> ServerError | None:
        """Make a change of one session of batch size 1 true, at once.

        Returns:
            Why it never will be; the session is dropped then, as in `keep`.
        """
        if self._commits.is_durable:
            try:
                put = self._put_of_one(model, handle, revision, position, request_id, kept)
                self._commits.commit_here(Batch(puts=(put,)), 1)
            except Exception as error:  # whatever it is: the row has moved on, and the session has not
                why = reason(error)
                self.drop(np.array([handle]), why)
                return why
        self._set_one(model, handle, revision, position, request_id, kept)
        return None

    def may_keep_one(self) -> bool:
        """Whether `keep_one_later` may be called now."""
        return not self._commits.is_full

    def keep_one_later(
        self,
        model: ServedModel,
        handle: int,
        revision: int,
        position: int,
        request_id: int,
        kept: Kept,
        answer: Answer,
    ) -> None:
        """As `keep_one` where the store is to be waited for: of a claimed session, whose claim ends then.

        `answer` is called with None when the change is true, else with why it never will be. It must not raise.
        """

        def done(error: ServerError | None) -> None:
            if error is not None:
                answer(error)
                self.drop(np.array([handle]), error)
                return
            self._set_one(model, handle, revision, position, request_id, kept)
            answer(None)
            self.release(np.array([handle]))

        try:
            put = self._put_of_one(model, handle, revision, position, request_id, kept)
        except Exception as error:  # as in `keep_one`
            done(reason(error))
            return
        self._commits.submit(lambda: Batch(puts=(put,)), 1, done)

    def _put_of_one(
        self, model: ServedModel, handle: int, revision: int, position: int, request_id: int, kept: Kept
    ) -> tuple[str, Stored]:
        table = self._table
        session_id = table.session_id(handle)
        return session_id, encode(
            session_id,
            model.texts,
            reply=kept,
            revision=revision,
            position=position,
            request_id=request_id,
            opened_with=table.opened_with[handle],
            created=table.created[handle],
            last_used=self._clock.now(),
            batch_size=1,
            rows=model.arena.pack_row(int(table.row[handle])),
            fields=table.fields.get(handle, b""),
        )

    def _set_one(
        self, model: ServedModel, handle: int, revision: int, position: int, request_id: int, kept: Kept
    ) -> None:
        table = self._table
        table.revision[handle] = revision
        table.position[handle] = position
        table.request_id[handle] = request_id
        table.used[handle] = self._clock.monotonic()
        model.replies.remember_rows(handle, kept)

    def records(self, change: Change, last_used: float) -> list[tuple[str, Stored]]:
        """What the store keeps of a change, by session id."""
        handles = change.handles
        rows, sizes = self._table.rows_of(handles), self._table.batch_size[handles]
        if change.arrays or (sizes != sizes[0]).any() or self._table.have_fields(handles):
            return self._records_one_by_one(change, rows, sizes, last_used)
        sheet = self._sheets.of(change.model, handles)
        change.model.arena.pack_into(rows, sheet.rows)
        return sheet.fill(
            revisions=change.revisions,
            positions=change.positions,
            request_ids=change.request_ids,
            last_used=last_used,
            replies=change.replies,
        )

    def _records_one_by_one(
        self, change: Change, rows: Rows, sizes: npt.NDArray[np.int32], last_used: float
    ) -> list[tuple[str, Stored]]:
        packed, ends = change.model.arena.pack(rows), np.cumsum(sizes).tolist()
        found: list[tuple[str, Stored]] = []
        for place, (handle, size, end) in enumerate(
            zip(change.handles.tolist(), sizes.tolist(), ends, strict=True)
        ):
            session_id = self._table.session_id(handle)
            record = self._record(change, place, packed[end - size : end].tobytes(), last_used)
            found.append((session_id, record.encode(session_id)))
        return found

    def _record(self, change: Change, place: int, rows: bytes, last_used: float) -> Record:
        handle, model, arrays = int(change.handles[place]), change.model, change.arrays.get(place)
        return Record(
            fingerprint=model.program.fingerprint,
            model=model.name,
            batch_size=int(self._table.batch_size[handle]),
            revision=int(change.revisions[place]),
            position=int(change.positions[place]),
            request_id=int(change.request_ids[place]),
            opened_with=int(self._table.opened_with[handle]),
            created=float(self._table.created[handle]),
            last_used=last_used,
            reply=int(change.replies[place]),
            rows=rows,
            extra=b"" if arrays is None else model.replies.pack(arrays),
            fields=self._table.fields.get(handle, b""),
        )

    def _set(self, change: Change) -> None:
        table, handles = self._table, change.handles
        table.revision[handles] = change.revisions
        table.position[handles] = change.positions
        table.request_id[handles] = change.request_ids
        table.used[handles] = self._clock.monotonic()
        change.model.replies.remember(handles, change.replies, change.arrays)


def _nobody(*_arguments: object) -> None:
    raise AssertionError("set when the engine is put together")
