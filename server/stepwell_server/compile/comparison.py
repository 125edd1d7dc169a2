"""What came of holding a program against Keras: figures for people and programs. Imports no TensorFlow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from stepwell_server.compile.errors import quoted


@dataclasses.dataclass(frozen=True)
class Difference:
    """One output: where stepping differs most from Keras's call over the sequence, in terms of what is allowed."""

    output: str
    share: float
    """Times the allowed difference: above 1 it is too large."""
    absolute: float
    """The difference there."""
    allowed: float
    """What rounding may make there."""
    row: int
    time: int
    """Time step, from 0; of an output without a time axis, the last one."""
    by_step: tuple[float, ...]
    """Largest difference of each time step; of an output without a time axis, one."""
    skipped: float = 0.0
    """Share of rows and steps where nothing can be said: rounding alone moves Keras's own values too far."""

    @property
    def is_allowed(self) -> bool:
        """It is no more than rounding makes."""
        return self.share <= 1

    @property
    def largest(self) -> tuple[float, int]:
        """The largest difference, and its time step."""
        largest = max(self.by_step)
        return largest, self.by_step.index(largest) if len(self.by_step) > 1 else self.time

    def fields(self) -> dict[str, Any]:
        """Return it for a line of the log."""
        largest, step = self.largest
        return {"output": self.output, "largest": largest, "time_step": step, "share_of_allowed": self.share}

    def __str__(self) -> str:
        how = "rounding explains it" if self.is_allowed else "stepping does not compute what Keras does"
        return (
            f"output {quoted(self.output)} differs from Keras by {self.absolute:.2g} at time step {self.time} of "
            f"row {self.row} "
            f"({self.allowed:.2g} is allowed there): {how}"
        )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All outputs of a model on one set of sequences."""

    rows: int
    steps: int
    outputs: tuple[Difference, ...]

    @property
    def worst(self) -> Difference | None:
        """The output that differs most, in terms of what is allowed; None of a model without outputs."""
        return max(self.outputs, key=lambda output: output.share, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON can carry it: infinity as null."""
        return {
            "rows": self.rows,
            "steps": self.steps,
            "outputs": [
                {name: _finite(value) for name, value in dataclasses.asdict(output).items()}
                | {"is_allowed": output.is_allowed}
                for output in self.outputs
            ],
        }

    @property
    def is_conclusive(self) -> bool:
        """Something could be compared of each output."""
        return all(output.skipped < 1 for output in self.outputs)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Comparison:
        """Read what `to_json` made."""
        outputs = []
        for item in document["outputs"]:
            fields = {name: value for name, value in item.items() if name != "is_allowed"}
            numbers = {
                name: math.inf if fields[name] is None else float(fields[name])
                for name in ("share", "absolute", "allowed")
            }
            by_step = tuple(math.inf if value is None else float(value) for value in fields["by_step"])
            outputs.append(Difference(**(fields | numbers | {"by_step": by_step})))
        return cls(document["rows"], document["steps"], tuple(outputs))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value
