"""Templates of records, kept for those sessions that change together again and again: the members of a group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from stepwell_server.core.remembered import Remembered
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.state.fields import Fields
from stepwell_server.engine.state.model import Model
from stepwell_server.store.record import RecordTemplate

#: Fewer sessions are laid out anew each time.
_WORTH_KEEPING = 16
#: Bytes of all templates that are kept.
_MOST_BYTES = 32 << 20
#: So many sets of sessions are known by sight: a template is kept when its sessions come the second time.
_MOST_SEEN = 4096

_Facts = tuple[int, int, bytes, bytes, Sequence[bytes]]
"""What may have changed since a template was laid out: the version and its epoch, births, when sessions were
created, as another server may have opened others of the same ids, and their other fields."""


class Templates:
    """Lays out records. For whoever holds the claims of the sessions, on the thread that stores them."""

    def __init__(self, table: SessionTable, fields: Fields) -> None:
        self._table = table
        self._fields = fields
        self._kept: OrderedDict[bytes, tuple[_Facts, RecordTemplate]] = OrderedDict()
        self._bytes = 0
        self._seen: Remembered[int, bool] = Remembered(_MOST_SEEN)

    def of(self, model: Model, handles: Handles) -> RecordTemplate:
        """A template for sessions of one batch size whose fields have one length; to be filled.

        Nobody else fills it before their change is stored: their claims see to that.
        """
        if len(handles) < _WORTH_KEEPING:
            return self._lay_out(model, handles)
        key = handles.tobytes()  # of all versions: a template of one that they left is of no use
        found = self._kept.get(key)
        table = self._table
        births, created = table.birth[handles].tobytes(), table.created[handles].tobytes()
        facts = model.index, model.epoch, births, created, self._fields.others(handles)
        if found is not None and found[0] == facts:
            self._kept.move_to_end(key)
            return found[1]
        if found is not None:
            self._bytes -= self._kept.pop(key)[1].byte_count
        template = self._lay_out(model, handles)
        if self._is_first(hash(key)):
            return template
        self._kept[key] = (facts, template)
        self._bytes += template.byte_count
        while self._bytes > _MOST_BYTES:
            _, (_, oldest) = self._kept.popitem(last=False)
            self._bytes -= oldest.byte_count
        return template

    def _is_first(self, key: int) -> bool:
        """Whether sessions come together for the first time, as far as that is known.

        Those that do so by chance would push out those that will again, and the garbage collector looks at
        every record of every template that is kept.
        """
        is_first = self._seen.get(key) is None
        self._seen.put(key, True)
        return is_first

    def _lay_out(self, model: Model, handles: Handles) -> RecordTemplate:
        table = self._table
        return RecordTemplate(
            [table.session_id(handle) for handle in handles.tolist()],
            fingerprint=model.program.fingerprint,
            model=model.name,
            opened_with=table.opened_with[handles],
            opened_digest=table.opened_digest[handles],
            max_idle_ms=table.max_idle_ms[handles],
            created=table.created[handles],
            row_bytes=model.arena.row_bytes,
            batch_size=int(table.batch_size[handles[0]]),
            fields=self._fields.of_many(handles, model),
        )
