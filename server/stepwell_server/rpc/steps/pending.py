"""A frame that a stream has taken in and not yet answered to the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepwell_server.engine.api import Frame, Part, Single, StepReply
from stepwell_server.errors import ServerError

if TYPE_CHECKING:
    from stepwell_server.rpc.steps.stream import FrameStream


class Pending:
    """A frame whose last part is not written yet. The engine answers to `on_part` or `settle`."""

    __slots__ = ("frame_id", "held_bytes", "request", "stream")

    def __init__(self, stream: FrameStream, frame_id: int, held_bytes: int) -> None:
        self.stream = stream
        self.frame_id = frame_id
        self.held_bytes = held_bytes
        self.request: Frame | Single | None = None

    @property
    def members(self) -> int:
        """Sessions of the frame; 1 if it could not be read, or names none."""
        return len(self.request.session_ids) or 1 if isinstance(self.request, Frame) else 1

    def on_part(self, part: Part) -> None:
        """The engine has a part of the reply."""
        self.stream.on_part(self, part)

    def settle(self, answer: StepReply | ServerError) -> None:
        """The engine has the answer to a frame of one session."""
        self.stream.on_answer(self, answer)
