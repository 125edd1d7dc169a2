"""Headers of many records as columns, for scans of all sessions of a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.core.quotas import SESSION_BYTES, Usage
from stepwell_server.store.fields import FIELD, SEAL, counted_bytes
from stepwell_server.store.record import HEADER, MAX_TIME, RecordBytes

_EMPTY = bytes(HEADER.itemsize)
_HEAD_BYTES = np.arange(HEADER.itemsize)


@dataclasses.dataclass(frozen=True, slots=True)
class Heads:
    """Headers of records, in the order of their ids. Nothing is checked: values of a corrupt record may be nonsense."""

    keys: list[bytes]
    """The ids, as UTF-8."""
    heads: npt.NDArray[np.void]
    """`(n,)` of dtype `record.HEADER`. Impossible times, by the rules of `record`, are 0, because lists are sorted by them."""
    models: list[str]
    """The distinct names of models."""
    model: npt.NDArray[np.intp]
    """`(n,)`: for each record the index of its model's name."""
    byte_counts: npt.NDArray[np.int64]
    """`(n,)`: the bytes of each record that count for quotas, see `counts`; at most its size, if it is complete."""
    fields: dict[int, bytes]
    """Encoded extension fields without that of encryption, by index; few records have any."""

    def usage(self, place: int) -> Usage:
        """Return what a session uses."""
        return Usage(1, int(self.heads["batch_size"][place]), int(self.byte_counts[place]))

    def __len__(self) -> int:
        """The number of records."""
        return len(self.keys)


def heads_of(keys: list[bytes], records: Sequence[RecordBytes], *, is_whole: bool = True) -> Heads:
    """Return the headers of records as columns, with few array operations: there may be a million of them.

    `is_whole`: the records include their rows and arrays.
    """
    records = [record if len(record) >= HEADER.itemsize else _EMPTY for record in records]
    sizes = np.fromiter(map(len, records), np.int64, len(records))
    together = np.frombuffer(b"".join(records), np.uint8)
    starts = np.cumsum(sizes) - sizes
    if len(sizes) and (sizes == sizes[0]).all():  # the common case, several times as fast
        heads = together.reshape(len(sizes), -1)[:, : HEADER.itemsize].copy().view(HEADER)[:, 0]
    else:
        heads = together[starts[:, None] + _HEAD_BYTES].view(HEADER)[:, 0]
    for name in ("created", "last_used"):
        times = heads[name]
        times[~((times >= 0.0) & (times < MAX_TIME))] = 0.0
    texts = np.minimum(starts + HEADER.itemsize + heads["fingerprint_bytes"], starts + sizes)
    ends = np.minimum(texts + heads["model_bytes"], starts + sizes)
    names, model = _names(together, texts, ends)
    counted = heads["rows_bytes"].astype(np.int64) + heads["extra_bytes"]
    # lists of a shared store come without rows and arrays
    counted = np.where(is_whole, np.minimum(counted, sizes), counted) + SESSION_BYTES
    places = np.flatnonzero(heads["fields_bytes"])
    if len(places):
        seals = _seal_bytes(together, (starts + sizes - heads["fields_bytes"])[places])
        places, seals = places[found := heads["fields_bytes"][places] > seals], seals[found]
        rests = zip(places.tolist(), (seals - heads["fields_bytes"][places]).tolist(), strict=True)
        fields = {place: bytes(records[place][rest:]) for place, rest in rests}
        for place, own in fields.items():
            counted[place] += counted_bytes(own)
        return Heads(keys, heads, names, model, counted, fields)
    return Heads(keys, heads, names, model, counted, {})


def _seal_bytes(together: npt.NDArray[np.uint8], places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the length of the field at each place if it is that of encryption, else 0."""
    at = np.clip(places, 0, len(together) - FIELD.itemsize)
    found = together[at[:, None] + np.arange(FIELD.itemsize)].view(FIELD)[:, 0]
    return np.where(found["tag"] == SEAL, FIELD.itemsize + found["length"].astype(np.int64), 0)


def _names(
    together: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> tuple[list[str], npt.NDArray[np.intp]]:
    """Return the distinct texts between these offsets, usually few, and the index of each."""
    names: list[str] = []
    model = np.full(len(starts), -1, np.intp)
    while len(left := np.flatnonzero(model < 0)):
        first = left[0]
        text = together[starts[first] : ends[first]]
        same = left[ends[left] - starts[left] == len(text)]
        for place, byte in enumerate(text.tolist()):
            same = same[together[starts[same] + place] == byte]
        model[same] = len(names)
        names.append(str(text.tobytes(), "utf-8", "replace"))
    return names, model
