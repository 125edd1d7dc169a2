"""A frame on its way through the engine: who has been answered, and the parts that say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from stepwell_server.core.sessions import Handles
from stepwell_server.core.slots import Rows
from stepwell_server.engine.calls import Array, Failure, Frame, Members, Part
from stepwell_server.engine.checks import CheckedInputs
from stepwell_server.errors import DeadlineExceeded, ServerError, Unavailable

U64 = npt.NDArray[np.uint64]
_NONE = np.zeros(0, np.uint64)


class FrameCall:
    """One frame and its members' fates. Owner of the jobs made of it."""

    __slots__ = (
        "byte_count",
        "checked",
        "frame",
        "handles",
        "left",
        "model",
        "on_end",
        "sizes",
        "starts",
        "state",
    )

    def __init__(self, frame: Frame, model: int, handles: Handles, sizes: Rows) -> None:
        self.frame = frame
        self.model = model
        self.handles = handles
        """Of each member; -1 for those that are not there."""
        self.sizes = sizes
        """Rows of each member."""
        self.starts: Rows = np.cumsum(sizes) - sizes
        """Where each member's rows begin in the frame's tensors."""
        self.left = len(handles)
        """Members without an answer."""
        self.checked: CheckedInputs | None = None
        self.state: tuple[Array, ...] | None = None
        """For a reset to given values, in the program's order."""
        self.byte_count = 0
        """Bytes of its inputs or states."""
        self.on_end: Callable[[], None] | None = None
        """Called when every member has its answer."""

    @property
    def size(self) -> int:
        """Members in all."""
        return len(self.handles)

    @property
    def row_count(self) -> int:
        """Rows in all."""
        return int(self.sizes.sum())

    def rows(self, members: Members) -> Rows:
        """Indexes of the members' rows in the frame's tensors."""
        if len(members) == self.size or bool((self.sizes == 1).all()):
            return members if len(members) != self.size else np.arange(self.row_count, dtype=np.intp)
        spans = [np.arange(self.starts[m], self.starts[m] + self.sizes[m]) for m in members]
        return np.concatenate(spans) if spans else np.zeros(0, np.intp)

    def request_ids(self, members: Members) -> U64:
        """Request ids of members, 0 for none."""
        given = self.frame.request_ids
        return np.zeros(len(members), np.uint64) if given is None else given[members]

    def dropped(self, now: float) -> ServerError | None:
        """See `job.Owner`."""
        if self.frame.cancelled:
            return Unavailable("the request was cancelled by its caller; it was not applied")
        if now >= self.frame.deadline:
            return DeadlineExceeded("the request's deadline passed while it waited; it was not applied")
        return None

    def fail(self, members: Members, error: ServerError) -> None:
        """See `job.Owner`."""
        self._answer(
            Part(
                members=np.zeros(0, np.intp),
                revisions=_NONE,
                positions=_NONE,
                outputs={},
                failures=(Failure(self._named(members), error),),
                last=self._count(len(members)),
            )
        )

    def succeed(
        self,
        members: Members,
        revisions: U64,
        positions: U64,
        outputs: Mapping[str, Array],
        *,
        replayed: bool = False,
    ) -> None:
        """Members were applied, now or before."""
        self._answer(
            Part(
                members=self._named(members),
                revisions=revisions,
                positions=positions,
                outputs=outputs,
                replayed=replayed,
                last=self._count(len(members)),
            )
        )

    def _named(self, members: Members) -> Members | None:
        return None if len(members) == self.size else members

    def _count(self, answered: int) -> bool:
        self.left -= answered
        if self.left == 0 and self.on_end is not None:
            self.on_end()
        return self.left == 0

    def _answer(self, part: Part) -> None:
        self.frame.sink(part)
