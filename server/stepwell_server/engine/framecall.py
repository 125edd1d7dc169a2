"""A frame on its way through the engine, and the parts of its reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stepwell_server.core.sessions import Handles
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Array, Failure, Frame, Members, Part
from stepwell_server.engine.call import U64, Call
from stepwell_server.errors import DeadlineExceeded, ServerError, Unavailable

_NONE = np.zeros(0, np.uint64)
_NOBODY = np.zeros(0, np.intp)


class FrameCall(Call):
    """One frame. All its members share its deadline and its fate when it is cancelled."""

    def __init__(self, frame: Frame, model: int, handles: Handles, sizes: Rows) -> None:
        source = frame.source if frame.source is not None else self
        super().__init__(model, handles, sizes, select=frame.select, source=source)
        self.frame = frame
        self.expected = frame.expected
        self.requests = frame.request_ids
        self.is_reset = frame.reset
        self.reset_rows = frame.rows

    def drop(self, members: Members, now: float) -> Sequence[tuple[Members, ServerError]]:
        """See `Call`."""
        if self.frame.cancelled:
            return [(members, cancelled())]
        if now >= self.frame.deadline:
            return [(members, too_late())]
        return ()

    def fail(self, members: Members, error: ServerError) -> None:
        """See `Call`."""
        failure = Failure(self._named(members), error)
        last = self.count(len(members))
        self.frame.sink(Part(_NOBODY, _NONE, _NONE, {}, failures=(failure,), last=last))

    def succeed(
        self,
        members: Members,
        revisions: U64,
        positions: U64,
        outputs: Mapping[str, Array],
        *,
        replayed: bool = False,
    ) -> None:
        """See `Call`."""
        last = self.count(len(members))
        self.frame.sink(
            Part(self._named(members), revisions, positions, outputs, replayed=replayed, last=last)
        )

    def _named(self, members: Members) -> Members | None:
        return None if len(members) == self.size else members


def cancelled() -> ServerError:
    """The answer to what its caller cancelled in time."""
    return Unavailable("the request was cancelled by its caller; it was not applied")


def too_late() -> ServerError:
    """The answer to what waited past its deadline."""
    return DeadlineExceeded("the request's deadline passed while it waited; it was not applied")
