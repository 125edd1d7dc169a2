"""Builds the stored records of changed sessions."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.core.recent_values import RecentValues
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import Origin
from stepwell_server.engine.state.fields import Fields
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.state.replies import ReplyArrays
from stepwell_server.engine.state.window_changes import Form, WholeRows
from stepwell_server.engine.types import U64, Mask, Members
from stepwell_server.store.record import (
    Header,
    JoinedPuts,
    RecordBytes,
    RecordTemplate,
    Texts,
    encode,
    id_seed,
)

#: Groups of fewer sessions than this get no template.
_WORTH_KEEPING = 16
#: The most bytes of all cached templates.
_MAX_BYTES = 32 << 20
#: Remembered groups of sessions: a template is cached when a group appears for the second time.
_MAX_SEEN = 4096

_Facts = tuple[int, int, int, bytes, bytes, Sequence[bytes]]
"""Data that may have changed since a template was built: the version and its epoch, the size of a row, births, creation
times (another server may have opened other sessions with the same ids), and other fields."""


@dataclasses.dataclass(slots=True)
class Outcome:
    """The result of changes to some sessions of a model: the new columns of the table, `(n,)` each.

    The new states are already in the rows of the claimed sessions, where nothing else reads them.
    """

    model: Model
    handles: Handles
    revisions: U64
    positions: U64
    request_ids: U64
    digests: U64
    """See `core.exactly_once`; 0: none."""
    replies: npt.NDArray[np.uint8]
    """How each reply is kept: a `ReplyForm`."""
    origin: Origin | None = None
    """None: nobody may watch this change. The places are those of the largest outcome that this one is a part of."""
    arrays: Mapping[int, ReplyArrays] = dataclasses.field(default_factory=dict)
    """Replies that are kept as separate arrays, by place."""
    stamp: int = 0
    """The stamp of its records, if other servers use the store."""
    steps: npt.NDArray[np.int64] | None = None
    """Time steps that all rows of each session made, without a reset; 0: the rows changed in another way. None: all did."""

    def part(self, places: Members) -> Outcome:
        """The outcome of some of its sessions."""
        own = {place: at for at, place in enumerate(places.tolist())}
        return Outcome(
            self.model,
            self.handles[places],
            self.revisions[places],
            self.positions[places],
            self.request_ids[places],
            self.digests[places],
            self.replies[places],
            self.origin,
            {own[place]: arrays for place, arrays in self.arrays.items() if place in own},
            self.stamp,
            None if self.steps is None else self.steps[places],
        )


def current_outcome(table: SessionTable, model: Model, handles: Handles) -> Outcome:
    """The outcome that matches the current table and arena, for claimed sessions of a model."""
    return Outcome(
        model,
        handles,
        table.revision[handles],
        table.position[handles],
        table.request_id[handles],
        table.digest[handles],
        table.reply[handles],
        arrays=model.replies.arrays(handles),
    )


class Records:
    """Builds records of claimed sessions, on the thread that stores them."""

    def __init__(self, table: SessionTable, fields: Fields) -> None:
        self._table = table
        self._fields = fields
        self._templates = Templates(table, fields)

    def of(self, outcome: Outcome, last_used: float) -> Sequence[tuple[str, RecordBytes]]:
        """The records of an outcome, by session id."""
        changes = outcome.model.changes
        if changes is None or outcome.steps is None:
            return self._of(outcome, WholeRows(outcome.model.arena), last_used)
        steps = np.where(self._may_change(outcome, changes.period), outcome.steps, 0)
        found: list[Sequence[tuple[str, RecordBytes]]] = []
        for count in np.unique(steps).tolist():
            own = outcome.part(np.flatnonzero(steps == count))
            form: Form = (changes.after(count) if count else None) or WholeRows(outcome.model.arena)
            found.append(self._of(own, form, last_used))
        return found[0] if len(found) == 1 else JoinedPuts(found)

    def _may_change(self, outcome: Outcome, period: int) -> Mask:
        """Which records of an outcome may be changes: whole rows are due once in a period of steps, at various times."""
        table, handles = self._table, outcome.handles
        before = table.position[handles]
        phase = np.array([id_seed(table.session_id(handle)) for handle in handles.tolist()], np.uint64)
        since = (before + phase) // np.uint64(period)
        is_due = since != (outcome.positions + phase) // np.uint64(period)
        may: Mask = (table.recorded[handles] == table.revision[handles]) & ~is_due
        return may

    def _of(self, outcome: Outcome, form: Form, last_used: float) -> Sequence[tuple[str, RecordBytes]]:
        handles = outcome.handles
        rows, sizes = self._table.rows_of(handles), self._table.batch_size[handles]
        if len(handles) == 1 and sizes[0] == 1:  # a third of the time of a template
            return [self._one(outcome, 0, form, form.pack_row(int(rows[0])), last_used)]
        if outcome.arrays or (sizes != sizes[0]).any():
            packed, ends = form.pack(rows), np.cumsum(sizes)
            parts = [
                packed[end - size : end] for size, end in zip(sizes.tolist(), ends.tolist(), strict=True)
            ]
            return [
                self._one(outcome, place, form, part.tobytes(), last_used) for place, part in enumerate(parts)
            ]
        lengths = self._fields.lengths(handles, outcome.model)
        if (lengths != lengths[0]).any():  # all records of a template have the same length
            same = lengths == lengths[0]
            parts_of = [outcome.part(np.flatnonzero(same)), outcome.part(np.flatnonzero(~same))]
            return JoinedPuts([self._of(part, form, last_used) for part in parts_of])
        template = self._templates.of(outcome.model, handles, form)
        form.pack_into(rows, template.rows)
        return template.fill(
            revisions=outcome.revisions,
            positions=outcome.positions,
            request_ids=outcome.request_ids,
            digests=outcome.digests,
            last_used=last_used,
            replies=outcome.replies,
        )

    def _one(
        self, outcome: Outcome, place: int, form: Form, rows: bytes, last_used: float
    ) -> tuple[str, RecordBytes]:
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
            fields=self._fields.of(handle, model) + form.field(int(table.batch_size[handle])),
            schema=form.schema,
        )


def encoded(session_id: str, header: Header, rows: bytes, extra: bytes) -> bytes:
    """The record of a session: its header, its rows, and its last reply if that is kept as arrays."""
    facts = dataclasses.asdict(header)
    del facts["state_bytes"]
    texts = Texts(facts.pop("fingerprint"), facts.pop("model"))
    return encode(session_id, texts, rows=rows, extra=extra, **facts)


class Templates:
    """Templates for records of sessions that change together repeatedly, such as the members of a group.

    For the holder of the sessions' claims, on the thread that stores them.
    """

    def __init__(self, table: SessionTable, fields: Fields) -> None:
        self._table = table
        self._fields = fields
        self._kept: OrderedDict[bytes, tuple[_Facts, RecordTemplate]] = OrderedDict()
        self._bytes = 0
        self._seen: RecentValues[int, bool] = RecentValues(_MAX_SEEN)

    def of(self, model: Model, handles: Handles, form: Form) -> RecordTemplate:
        """A template to fill, for sessions with equal batch sizes and equal field lengths.

        The sessions' claims keep others from filling it before the change is stored.
        """
        if len(handles) < _WORTH_KEEPING:
            return self._lay_out(model, handles, form)
        key = (
            handles.tobytes()
        )  # the key covers all versions: a template of a version that they left is useless
        found = self._kept.get(key)
        table = self._table
        births, created = table.birth[handles].tobytes(), table.created[handles].tobytes()
        facts = model.index, model.epoch, form.row_bytes, births, created, self._fields.others(handles)
        if found is not None and found[0] == facts:
            self._kept.move_to_end(key)
            return found[1]
        if found is not None:
            self._bytes -= self._kept.pop(key)[1].byte_count
        template = self._lay_out(model, handles, form)
        if self._is_first(hash(key)):
            return template
        self._kept[key] = (facts, template)
        self._bytes += template.byte_count
        while self._bytes > _MAX_BYTES:
            _, (_, oldest) = self._kept.popitem(last=False)
            self._bytes -= oldest.byte_count
        return template

    def _is_first(self, key: int) -> bool:
        """Whether these sessions appear together for the first time, as far as is remembered.

        Random groups would evict recurring ones, and the garbage collector visits every record of every cached
        template.
        """
        is_first = self._seen.get(key) is None
        self._seen.put(key, True)
        return is_first

    def _lay_out(self, model: Model, handles: Handles, form: Form) -> RecordTemplate:
        table = self._table
        batch_size = int(table.batch_size[handles[0]])
        field = form.field(batch_size)
        template = RecordTemplate(
            [table.session_id(handle) for handle in handles.tolist()],
            model.texts,
            (batch_size, form.row_bytes),
            opened_with=table.opened_with[handles],
            opened_digest=table.opened_digest[handles],
            max_idle_ms=table.max_idle_ms[handles],
            created=table.created[handles],
            fields=[fields + field for fields in self._fields.of_many(handles, model)],
        )
        template.set_schema(form.schema)
        return template
