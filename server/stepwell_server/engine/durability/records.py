"""The records of sessions that changed, as the store keeps them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.durability.record_templates import Templates
from stepwell_server.engine.state.fields import Fields
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.state.replies import KeptArrays
from stepwell_server.engine.types import U64, Members
from stepwell_server.store.record import Header, Joined, Stored, Texts, encode


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
    digests: U64
    """See `core.exactly_once`; 0 for none."""
    replies: npt.NDArray[np.uint8]
    """How each reply is kept: `Kept`."""
    arrays: Mapping[int, KeptArrays] = dataclasses.field(default_factory=dict)
    """The replies that are kept as arrays of their own, by their place."""
    stamp: int = 0
    """Of its records, if others use the store."""
    is_hurried: bool = False
    """Others have passes, too: if it is small it need not wait for what is large."""

    def part(self, places: Members) -> Outcome:
        """The same of some of its sessions."""
        own = {place: at for at, place in enumerate(places.tolist())}
        return Outcome(
            self.model,
            self.handles[places],
            self.revisions[places],
            self.positions[places],
            self.request_ids[places],
            self.digests[places],
            self.replies[places],
            {own[place]: arrays for place, arrays in self.arrays.items() if place in own},
            self.stamp,
            self.is_hurried,
        )


def as_it_is(table: SessionTable, model: Model, handles: Handles) -> Outcome:
    """What the table and the arena say of claimed sessions of a model now."""
    return Outcome(
        model,
        handles,
        table.revision[handles],
        table.position[handles],
        table.request_id[handles],
        table.digest[handles],
        table.reply[handles],
        model.replies.arrays(handles),
    )


class Records:
    """Makes records of claimed sessions, on whatever thread stores them."""

    def __init__(self, table: SessionTable, fields: Fields) -> None:
        self._table = table
        self._fields = fields
        self._templates = Templates(table, fields)

    def of(self, outcome: Outcome, last_used: float) -> Sequence[tuple[str, Stored]]:
        """What the store keeps of an outcome, by session id."""
        handles = outcome.handles
        rows, sizes = self._table.rows_of(handles), self._table.batch_size[handles]
        if len(handles) == 1 and sizes[0] == 1:  # a third of the time of a template
            return [self._one(outcome, 0, outcome.model.arena.pack_row(int(rows[0])), last_used)]
        if outcome.arrays or (sizes != sizes[0]).any():
            packed, ends = outcome.model.arena.pack(rows), np.cumsum(sizes)
            parts = [
                packed[end - size : end] for size, end in zip(sizes.tolist(), ends.tolist(), strict=True)
            ]
            return [self._one(outcome, place, part.tobytes(), last_used) for place, part in enumerate(parts)]
        lengths = self._fields.lengths(handles, outcome.model)
        if (lengths != lengths[0]).any():  # the records of a template are of one length
            same = lengths == lengths[0]
            parts_of = [outcome.part(np.flatnonzero(same)), outcome.part(np.flatnonzero(~same))]
            return Joined([self.of(part, last_used) for part in parts_of])
        template = self._templates.of(outcome.model, handles)
        outcome.model.arena.pack_into(rows, template.rows)
        return template.fill(
            revisions=outcome.revisions,
            positions=outcome.positions,
            request_ids=outcome.request_ids,
            digests=outcome.digests,
            last_used=last_used,
            replies=outcome.replies,
        )

    def _one(self, outcome: Outcome, place: int, rows: bytes, last_used: float) -> tuple[str, Stored]:
        table, model, handle = self._table, outcome.model, int(outcome.handles[place])
        session_id, arrays = table.session_id(handle), outcome.arrays.get(place)
        return session_id, encode(
            session_id,
            model.texts,
            reply=int(outcome.replies[place]),
            revision=int(outcome.revisions[place]),
            position=int(outcome.positions[place]),
            request_id=int(outcome.request_ids[place]),
            opened_with=int(table.opened_with[handle]),
            digest=int(outcome.digests[place]),
            opened_digest=int(table.opened_digest[handle]),
            max_idle_ms=int(table.max_idle_ms[handle]),
            created=float(table.created[handle]),
            last_used=last_used,
            batch_size=int(table.batch_size[handle]),
            rows=rows,
            extra=b"" if arrays is None else model.replies.pack(arrays),
            fields=self._fields.of(handle, model),
        )


def encoded(session_id: str, header: Header, rows: bytes, extra: bytes) -> bytes:
    """The record of a session by its header, its rows and its last reply, if that is kept as arrays."""
    facts = dataclasses.asdict(header)
    del facts["state_bytes"]
    texts = Texts(facts.pop("fingerprint"), facts.pop("model"))
    return encode(session_id, texts, rows=rows, extra=extra, **facts)
