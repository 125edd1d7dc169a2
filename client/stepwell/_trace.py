"""What a step leaves behind: its outputs and the states after it, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from stepwell._tensors import Array
from stepwell._types import Outputs


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The outputs of a step, and the states after it or after each of its time steps.

    Made by `Session.trace`, and by `Session.step` where states are asked for. Its arrays are copies.

    Example:
        >>> trace = session.trace(np.ones((1, 10, 3), np.float32))
        >>> {name: array.shape[:2] for name, array in trace.states.items()} == dict.fromkeys(
        ...     trace.states, (1, 10)
        ... )
        True
    """

    outputs: Outputs
    """As `Session.step` returns them."""
    states: Mapping[str, Array]
    """State tensors by name, in the model's order: (rows, T, ...) after every time step, (rows, ...) after the last
    one or if the inputs had no time axis."""
    revision: int
    """Of the session, after the step; 0 from a group, whose members have their own."""
    position: int
    """Of the session, after the step; 0 from a group."""
    model_version: int = 0
    """Version of the model that the session is on; 0 from a group, see `SessionGroup.model_versions`."""
