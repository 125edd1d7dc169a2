"""A session whose rows have windows: its records, whole or as changes, and what a reader must get."""

from __future__ import annotations

import random
from collections.abc import Iterator

from stepwell_server.store import changes
from stepwell_server.store.changes import Window
from stepwell_server.store.record import CHANGE_VERSION, SCHEMA_VERSION, Texts, encode

Parts = tuple[int | tuple[int, int], ...]
"""Of each window the size of an element, and how many it has; other bytes are before, between and behind."""
DEFAULT: Parts = (3, (4, 10), 2, (2, 8), (1, 3), 5)
OTHER_PARTS: Parts = (3, (4, 10), 2, 16, (1, 3), 5)
"""Parts of the same row if its second window is none."""
_FIELDS = b"\x04\x00\x03\x00abc"  # of a version
ROW_BYTES = sum(part if isinstance(part, int) else part[0] * part[1] for part in DEFAULT)


class Windowed:
    """A session that steps: random bytes enter its windows."""

    def __init__(self, session_id: str, seed: int = 0, *, batch_size: int = 2, revision: int = 0) -> None:
        self.session_id, self.revision, self.batch_size = session_id, revision, batch_size
        self._random = random.Random(f"{session_id} {seed}")
        self._born = self._random.getrandbits(63)
        self._rows = [self._random.randbytes(ROW_BYTES) for _ in range(batch_size)]

    @property
    def whole(self) -> bytes:
        """The record with whole rows."""
        return self._encoded(b"".join(self._rows), b"", SCHEMA_VERSION)

    def step(self, steps: int = 1, parts_of: Parts = DEFAULT) -> bytes:
        """Step, and return the change; `parts_of` a row are those of another version."""
        self.revision += 1
        left: list[bytes] = []
        for number, row in enumerate(self._rows):
            parts = list(self._stepped(row, steps, parts_of))
            self._rows[number] = b"".join(whole for whole, _ in parts)
            left += [own for _, own in parts]
        return self._encoded(
            b"".join(left), changes.field_of(windows(steps, parts_of), self.batch_size), CHANGE_VERSION
        )

    def replace(self) -> bytes:
        """Get other rows, and return the record."""
        self.revision += 1
        self._rows = [self._random.randbytes(ROW_BYTES) for _ in self._rows]
        return self.whole

    def _stepped(self, row: bytes, steps: int, parts_of: Parts) -> Iterator[tuple[bytes, bytes]]:
        """Each part of a row afterwards, and what a change has of it."""
        at = 0
        for part in parts_of:
            size = part if isinstance(part, int) else part[0] * part[1]
            if isinstance(part, int):
                own = self._random.randbytes(size)
                yield own, own
            else:
                own = self._random.randbytes(min(part[1], steps) * part[0])
                yield (row[at : at + size] + own)[-size:], own
            at += size

    def _encoded(self, rows: bytes, field: bytes, schema: int) -> bytes:
        return encode(
            self.session_id,
            Texts("f" * 8, "m"),
            reply=0,
            revision=self.revision,
            position=self.revision,
            request_id=self.revision * 7,
            opened_with=self._born,
            created=1.0,
            last_used=2.0 + self.revision,
            batch_size=self.batch_size,
            rows=rows,
            fields=_FIELDS + field,
            schema=schema,
        )


def windows(steps: int, parts_of: Parts = DEFAULT) -> list[Window]:
    """The windows of a row, of which each has this many new elements, or all."""
    found, at = list[Window](), 0
    for part in parts_of:
        if isinstance(part, int):
            at += part
        else:
            size = part[0] * part[1]
            found.append(Window(at, size, min(part[1], steps) * part[0]))
            at += size
    return found
