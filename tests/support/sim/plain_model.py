"""What `fake_executor.PLAIN` computes, as the checker asks for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from support.checks.history import Floats
from support.engine.fake_executor import PLAIN, advance


@dataclasses.dataclass(frozen=True)
class PlainState:
    """Rows of the one state, and the time steps since the last reset."""

    sum: Floats
    position: int

    def named(self) -> dict[str, Floats]:
        """As the engine calls them."""
        return {"sum": self.sum}


class PlainModel:
    """See `linearizability.Model`."""

    def initial(self, batch_size: int, states: Mapping[str, Floats] | None = None) -> PlainState:
        """The state that a session begins with."""
        first = np.tile(PLAIN.initial[0], (batch_size, 1)) if states is None else states["sum"]
        return PlainState(np.asarray(first, np.float32), 0)

    def step(self, state: PlainState, x: Floats) -> tuple[Floats, PlainState]:
        """Of (rows, features) or (rows, T, features)."""
        now, seen = state.sum, []
        for each in np.moveaxis(x, 1, 0) if x.ndim == 3 else [x]:
            (y,), (now,) = advance([each], [now])
            seen.append(y)
        return np.stack(seen, 1) if x.ndim == 3 else seen[0], PlainState(now, state.position + len(seen))

    def reset(
        self, state: PlainState, states: Mapping[str, Floats] | None, rows: Sequence[int] | None
    ) -> PlainState:
        """Of all rows; the position is 0 then."""
        assert rows is None
        return self.initial(len(state.sum), states)
