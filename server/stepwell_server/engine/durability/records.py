"""The records of sessions that changed, as the store keeps them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.durability.record_templates import Templates
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import U64, Members, Tensors
from stepwell_server.store.record import Record, Stored, encode


@dataclasses.dataclass(slots=True)
class Outcome:
    """What became of some sessions of a model: what the table will say, `(n,)` each.

    It has been made in the rows of claimed sessions, where nobody looks.
    """

    model: Model
    handles: Handles
    revisions: U64
    positions: U64
    request_ids: U64
    replies: npt.NDArray[np.uint8]
    """How each reply is kept: `Kept`."""
    arrays: Mapping[int, Tensors] = dataclasses.field(default_factory=dict)
    """The replies that are kept as arrays of their own, by their place."""

    def part(self, places: Members) -> Outcome:
        """The same of some of its sessions."""
        own = {place: at for at, place in enumerate(places.tolist())}
        return Outcome(
            self.model,
            self.handles[places],
            self.revisions[places],
            self.positions[places],
            self.request_ids[places],
            self.replies[places],
            {own[place]: arrays for place, arrays in self.arrays.items() if place in own},
        )


class Records:
    """Makes records of claimed sessions, on whatever thread stores them."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self._templates = Templates(table)

    def of(self, outcome: Outcome, last_used: float) -> list[tuple[str, Stored]]:
        """What the store keeps of an outcome, by session id."""
        handles = outcome.handles
        rows, sizes = self._table.rows_of(handles), self._table.batch_size[handles]
        if len(handles) == 1 and sizes[0] == 1 and not outcome.arrays:
            return [self._one(outcome, int(handles[0]), int(rows[0]), last_used)]
        if outcome.arrays or (sizes != sizes[0]).any() or self._table.have_fields(handles):
            return self._records_one_by_one(outcome, rows, sizes, last_used)
        template = self._templates.of(outcome.model, handles)
        outcome.model.arena.pack_into(rows, template.rows)
        return template.fill(
            revisions=outcome.revisions,
            positions=outcome.positions,
            request_ids=outcome.request_ids,
            last_used=last_used,
            replies=outcome.replies,
        )

    def _records_one_by_one(
        self, outcome: Outcome, rows: Rows, sizes: npt.NDArray[np.int32], last_used: float
    ) -> list[tuple[str, Stored]]:
        packed, ends = outcome.model.arena.pack(rows), np.cumsum(sizes).tolist()
        found: list[tuple[str, Stored]] = []
        for place, (handle, size, end) in enumerate(
            zip(outcome.handles.tolist(), sizes.tolist(), ends, strict=True)
        ):
            session_id = self._table.session_id(handle)
            record = self._record(outcome, place, packed[end - size : end].tobytes(), last_used)
            found.append((session_id, record.encode(session_id)))
        return found

    def _record(self, outcome: Outcome, place: int, rows: bytes, last_used: float) -> Record:
        handle, model, arrays = int(outcome.handles[place]), outcome.model, outcome.arrays.get(place)
        return Record(
            fingerprint=model.program.fingerprint,
            model=model.name,
            batch_size=int(self._table.batch_size[handle]),
            revision=int(outcome.revisions[place]),
            position=int(outcome.positions[place]),
            request_id=int(outcome.request_ids[place]),
            opened_with=int(self._table.opened_with[handle]),
            created=float(self._table.created[handle]),
            last_used=last_used,
            reply=int(outcome.replies[place]),
            rows=rows,
            extra=b"" if arrays is None else model.replies.pack(arrays),
            fields=self._table.fields.get(handle, b""),
        )

    def _one(self, outcome: Outcome, handle: int, row: int, last_used: float) -> tuple[str, Stored]:
        """As a template of one record would have it, at a third of the time."""
        table, model = self._table, outcome.model
        session_id = table.session_id(handle)
        return session_id, encode(
            session_id,
            model.texts,
            reply=int(outcome.replies[0]),
            revision=int(outcome.revisions[0]),
            position=int(outcome.positions[0]),
            request_id=int(outcome.request_ids[0]),
            opened_with=int(table.opened_with[handle]),
            created=float(table.created[handle]),
            last_used=last_used,
            batch_size=1,
            rows=model.arena.pack_row(row),
            fields=table.fields.get(handle, b""),
        )
