"""A reader of server-sent events, as strict as the format allows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple


class Event(NamedTuple):
    """An event."""

    name: str
    number: int
    data: Any
    """The JSON document."""


class EventReader:
    """Finds the events in bytes that come in parts of any size."""

    def __init__(self) -> None:
        self._rest = b""
        self._number = 0
        self.comments = 0
        """Number of comments so far."""

    def feed(self, part: bytes) -> Iterator[Event]:
        """Yield the events that are complete with this part."""
        *blocks, self._rest = (self._rest + part).split(b"\n\n")
        for block in blocks:
            if block.startswith(b":"):
                assert block == b": keep-alive"
                self.comments += 1
                continue
            name, number, data = (line.split(b": ", 1) for line in block.split(b"\n"))
            assert (name[0], number[0], data[0]) == (b"event", b"id", b"data"), block
            self._number += 1
            assert int(number[1]) == self._number, "no event is missing"
            yield Event(name[1].decode(), self._number, json.loads(data[1]))

    def end(self) -> None:
        """No more comes."""
        assert not self._rest, self._rest


def events_of(raw: bytes) -> list[Event]:
    """All events of a whole answer."""
    reader = EventReader()
    found = list(reader.feed(raw))
    reader.end()
    return found
