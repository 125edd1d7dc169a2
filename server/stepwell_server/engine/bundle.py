"""Single steps that arrived at about the same time, on their way through the engine as one call."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from stepwell_server.core.exactly_once import ANY_REVISION
from stepwell_server.core.sessions import Handles
from stepwell_server.engine.call import U64, Call
from stepwell_server.engine.calls import Array, Members, Single, StepReply
from stepwell_server.engine.checks import CheckedInputs
from stepwell_server.engine.framecall import cancelled, too_late
from stepwell_server.errors import ServerError


class Bundle(Call):
    """Single steps of one model with the same selection; each has its own caller and deadline."""

    def __init__(
        self,
        singles: Sequence[Single],
        model: int,
        handles: Handles,
        checked: CheckedInputs,
        source: Hashable,
    ) -> None:
        sizes = np.ones(len(handles), np.intp)
        super().__init__(model, handles, sizes, select=singles[0].select, source=source)
        self._singles = singles
        self.may_repeat = True
        self.checked = checked
        self.byte_count = sum(array.nbytes for array in checked.arrays)
        self.expected = np.array(
            [ANY_REVISION if single.expected is None else single.expected for single in singles], np.uint64
        )
        self.requests = np.array([single.request_id for single in singles], np.uint64)
        self._deadlines = np.array([single.deadline for single in singles])

    def drop(self, members: Members, now: float) -> Sequence[tuple[Members, ServerError]]:
        """See `Call`."""
        found: list[tuple[Members, ServerError]] = []
        late = self._deadlines[members] <= now
        if late.any():
            found.append((members[late], too_late()))
            members = members[~late]
        gone = [member for member in members.tolist() if self._singles[member].cancelled]
        if gone:
            found.append((np.array(gone, np.intp), cancelled()))
        return found

    def fail(self, members: Members, error: ServerError) -> None:
        """See `Call`."""
        self.count(len(members))
        for member in members.tolist():
            self._singles[member].settle(error)

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
        self.count(len(members))
        singles = self._singles
        names = list(outputs)
        columns = [outputs[name] for name in names]
        for i, (member, revision, position) in enumerate(
            zip(members.tolist(), revisions.tolist(), positions.tolist(), strict=True)
        ):
            own = {name: column[i : i + 1] for name, column in zip(names, columns, strict=True)}
            singles[member].settle(StepReply(revision, position, own, replayed))
