"""Results of comparing a program with Keras, or with ONNX Runtime in a plain loop. Imports no framework."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from stepwell_server.compile.errors import quoted


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest difference of one output between stepping and its reference, relative to the allowed difference."""

    output: str
    share: float
    """The difference divided by the allowed one: above 1 it is too large."""
    absolute: float
    """The absolute difference."""
    allowed: float
    """The difference that rounding may cause there."""
    row: int
    time: int
    """Time step, from 0; for an output without a time axis, the last one."""
    by_step: tuple[float, ...]
    """Largest difference of each time step; a single one for an output without a time axis."""
    skipped: float = 0.0
    """Share of rows and steps that cannot be compared, because rounding alone moves Keras's own values too far."""
    reference: str = "Keras"
    """What it was compared with."""

    @property
    def is_allowed(self) -> bool:
        """Rounding explains the difference."""
        return self.share <= 1

    @property
    def largest(self) -> tuple[float, int]:
        """The largest difference, and its time step."""
        largest = max(self.by_step)
        return largest, self.by_step.index(largest) if len(self.by_step) > 1 else self.time

    def fields(self) -> dict[str, Any]:
        """Return the fields for a log line."""
        largest, step = self.largest
        return {"output": self.output, "largest": largest, "time_step": step, "share_of_allowed": self.share}

    def __str__(self) -> str:
        how = (
            "rounding explains it"
            if self.is_allowed
            else f"stepping does not compute what {self.reference} does"
        )
        return (
            f"output {quoted(self.output)} differs from {self.reference} by {self.absolute:.2g} at time step {self.time} of "
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
        """The output with the largest relative difference; None for a model without outputs."""
        return max(self.outputs, key=lambda output: output.share, default=None)

    @property
    def is_allowed(self) -> bool:
        """Rounding explains all differences."""
        return all(output.is_allowed for output in self.outputs)

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON, with infinity as null."""
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
        """A part of each output could be compared."""
        return all(output.skipped < 1 for output in self.outputs)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Comparison:
        """Read the result of `to_json`."""
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
