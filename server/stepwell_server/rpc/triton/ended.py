"""Answers to the last requests of sequences, for those that are sent again after the sequence has ended."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

from stepwell_server.engine.api import Applied

_MAX_ANSWERS = 10_000
_MAX_BYTES = 16 * 1024 * 1024


class EndedReplies:
    """The latest answers to requests with END and a request id. Held in memory, so not after a restart."""

    def __init__(self) -> None:
        self._replies: OrderedDict[tuple[str, int], Applied] = OrderedDict()
        self._bytes = 0

    def get(self, session_id: str, request_id: int) -> Applied | None:
        """What that request was answered, marked as replayed; None if it is not known."""
        return self._replies.get((session_id, request_id))

    def put(self, session_id: str, request_id: int, reply: Applied) -> None:
        """Keep an answer, and forget the oldest ones if there are too many or they are too large."""
        kept = dataclasses.replace(
            reply, outputs={name: array.copy() for name, array in reply.outputs.items()}, replayed=True
        )
        old = self._replies.pop((session_id, request_id), None)
        self._bytes += _size(kept) - (0 if old is None else _size(old))
        self._replies[session_id, request_id] = kept
        while len(self._replies) > _MAX_ANSWERS or self._bytes > _MAX_BYTES:
            self._bytes -= _size(self._replies.popitem(last=False)[1])


def _size(reply: Applied) -> int:
    return sum(array.nbytes for array in reply.outputs.values())
