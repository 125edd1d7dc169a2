"""Plain steps of streams and of unary calls, many at a time: read by their byte layout, run together, answered from bytes.

One message costs little more than reading and writing it. What the lane does not know (a layout it has
not learnt, a session that is not there, anything that is not plain) it leaves to its caller, who parses it
with protobuf and sends it the general way. Both ways give the same answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepwell_server.errors import ServerError
from stepwell_server.rpc.modellane import Caller, ModelLane
from stepwell_server.rpc.wire import read_varint

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine

_LARGEST_MESSAGE = 16 * 1024
_FRAME_ID_TAG, _STEP_TAG, _SESSION_ID_TAG = 0x08, 0x12, 0x0A


class FastLane:
    """Gathers the plain steps of all streams and calls. Lives on the event loop."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._locate = engine.locate
        self._lanes = [ModelLane(port, engine, clock) for port in engine.ports]

    def take(self, stream: Caller, raw: bytes) -> bool:
        """Take a message of a stream, if it may be a plain step; False leaves it to the stream."""
        found = _locate_in_frame(raw)
        if found is None:
            return False
        frame_id, start, stop = found
        at = self._find(raw[start:stop])
        if at is None:
            return False
        session_id, handle, lane = at
        known = lane.frames.of((len(raw), start, stop), raw)
        return known is not None and lane.take(stream, raw, frame_id, session_id, handle, known)

    def take_call(self, call: Caller, raw: bytes) -> bool:
        """As `take`, for the request of a unary Step."""
        if not 8 <= len(raw) <= _LARGEST_MESSAGE or raw[0] != _SESSION_ID_TAG or raw[1] & 0x80:
            return False
        stop = 2 + raw[1]
        at = self._find(raw[2:stop])
        if at is None:
            return False
        session_id, handle, lane = at
        known = lane.calls.of((len(raw), 2, stop), raw)
        return known is not None and lane.take(call, raw, 0, session_id, handle, known)

    def _find(self, raw_id: bytes) -> tuple[str, int, ModelLane] | None:
        """The session, its handle and its model's lane; None if there is none."""
        try:
            session_id = raw_id.decode()
            handle, model = self._locate(session_id)
        except (UnicodeDecodeError, ServerError):
            return None
        return session_id, handle, self._lanes[model]


def _locate_in_frame(raw: bytes) -> tuple[int, int, int] | None:
    """Frame id, and where the session id stands; None if the message cannot be a plain step."""
    if not 8 <= len(raw) <= _LARGEST_MESSAGE:
        return None
    try:
        frame_id, at = read_varint(raw, 1) if raw[0] == _FRAME_ID_TAG else (0, 0)
        if raw[at] != _STEP_TAG:
            return None
        _, at = read_varint(raw, at + 1)
        if raw[at] != _SESSION_ID_TAG or raw[at + 1] & 0x80:
            return None
    except IndexError:  # it ends in the middle of these
        return None
    start = at + 2
    stop = start + raw[at + 1]
    return (frame_id, start, stop) if stop <= len(raw) and frame_id < 1 << 64 else None
