"""What many records say beside the state, as columns: for whoever looks through all sessions of a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.store.record import HEADER, Stored

_EMPTY = bytes(HEADER.itemsize)


@dataclasses.dataclass(frozen=True, slots=True)
class Heads:
    """Some records, in the order of their ids. Nothing of them is checked: of one that is damaged it may be nonsense."""

    keys: list[bytes]
    """The ids, as UTF-8."""
    heads: npt.NDArray[np.void]
    """`(n,)` of dtype `record.HEADER`."""
    models: list[str]
    """The name of each one's model."""
    fields: dict[int, bytes]
    """Extension fields, as they are stored, by place; few have any."""

    def __len__(self) -> int:
        """How many records there are."""
        return len(self.keys)


def heads_of(keys: list[bytes], records: Sequence[Stored]) -> Heads:
    """The columns of records."""
    size = HEADER.itemsize
    heads = np.frombuffer(
        b"".join([bytes(record[:size]) if len(record) >= size else _EMPTY for record in records]), HEADER
    )
    begin = size + heads["fingerprint_bytes"].astype(np.int64)
    spans = zip(records, begin.tolist(), (begin + heads["model_bytes"]).tolist(), strict=True)
    names = [bytes(record[start:end]) for record, start, end in spans]
    known = {name: str(name, "utf-8", "replace") for name in set(names)}
    has_fields = np.flatnonzero(heads["fields_bytes"])
    fields = {
        place: bytes(records[place][-length:])
        for place, length in zip(has_fields.tolist(), heads["fields_bytes"][has_fields].tolist(), strict=True)
    }
    return Heads(keys, heads, [known[name] for name in names], fields)
