"""How many rows of sessions each model keeps in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from stepwell_server.process.memory import memory_bytes
from stepwell_server.program import Program

_MAX_ROWS = 65_536
_SHARE_OF_MEMORY = 1 / 4


@dataclasses.dataclass(frozen=True, slots=True)
class ResidentRows:
    """The limit of each model, by name."""

    every: int | None = None
    """Rows of a model that is not in `own`; None: as many as its share of the memory allows."""
    own: Mapping[str, int] = dataclasses.field(default_factory=dict)
    models: int = 1
    """Models that share the memory: those that the server started with, except those in `own`."""

    def of(self, name: str, program: Program) -> int:
        """Rows for a model's sessions. As many again are working rows for requests."""
        return self.own.get(name) or self.every or self._default(program)

    def _default(self, program: Program) -> int:
        """Many rows, but at most a quarter of the memory if every model fills its rows."""
        row_bytes = max(1, program.state_row_bytes + sum(spec.row_bytes for spec in program.outputs))
        part = int(memory_bytes() * _SHARE_OF_MEMORY) // max(1, self.models)
        return max(1, min(_MAX_ROWS, part // (2 * row_bytes)))
