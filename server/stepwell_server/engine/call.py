"""A call on its way through the engine: the same change for some sessions, and who has been answered."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.core.sessions import Handles
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Array, Members, Select
from stepwell_server.engine.checks import CheckedInputs
from stepwell_server.errors import ServerError

U64 = npt.NDArray[np.uint64]


class Call:
    """The same change for each of some sessions of one model. Owner of the jobs made of it.

    Sessions are named by their index in the call: its members.
    """

    def __init__(
        self, model: int, handles: Handles, sizes: Rows, *, select: Select, source: Hashable
    ) -> None:
        self.model = model
        self.handles = handles
        """Of each member; -1 for those that are not there."""
        self.sizes = sizes
        """Rows of each member."""
        self.starts: Rows = np.cumsum(sizes) - sizes
        """Where each member's rows begin in the call's tensors."""
        self.select = select
        self.source = source
        self.may_repeat = False
        """The same session may be among the members more than once, to be applied in their order."""
        self.expected: U64 | None = None
        self.requests: U64 | None = None
        self.checked: CheckedInputs | None = None
        """For a step."""
        self.is_reset = False
        self.state: tuple[Array, ...] | None = None
        """For a reset to given values, in the program's order."""
        self.reset_rows: Sequence[int] | None = None
        """For a reset of some rows; the call then has one member."""
        self.left = len(handles)
        """Members without an answer."""
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
        """Indexes of the members' rows in the call's tensors."""
        if len(members) == self.size:
            return np.arange(self.row_count, dtype=np.intp)
        if bool((self.sizes == 1).all()):
            return members
        spans = [np.arange(self.starts[m], self.starts[m] + self.sizes[m]) for m in members]
        return np.concatenate(spans) if spans else np.zeros(0, np.intp)

    def request_ids(self, members: Members) -> U64:
        """Request ids of members, 0 for none."""
        return np.zeros(len(members), np.uint64) if self.requests is None else self.requests[members]

    def expects(self, members: Members) -> U64 | None:
        """Revisions that members expect; None if none of them expects any."""
        return None if self.expected is None else self.expected[members]

    def drop(self, members: Members, now: float) -> Sequence[tuple[Members, ServerError]]:
        """Members that should not go on, and why: cancelled, past their deadline. See `job.Owner`."""
        raise NotImplementedError

    def fail(self, members: Members, error: ServerError) -> None:
        """Members failed; nothing changed for them. See `job.Owner`."""
        raise NotImplementedError

    def succeed(
        self,
        members: Members,
        revisions: U64,
        positions: U64,
        outputs: Mapping[str, Array],
        *,
        replayed: bool = False,
    ) -> None:
        """Members were applied, now or before; `outputs` are their rows one after the other."""
        raise NotImplementedError

    def count(self, answered: int) -> bool:
        """Members have their answer; True if that was the last of them."""
        self.left -= answered
        if self.left == 0 and self.on_end is not None:
            self.on_end()
        return self.left == 0
