"""The list of operations that may stand outside of a recurrent layer's loop, by TensorFlow's names.

Each has a rule that says where the batch and the time axis of its results are, and refuses it where it
mixes them. An operation that is not here is refused.
"""

from __future__ import annotations

from stepwell_server.compile.causality import (
    rules_elementwise,
    rules_matrices,
    rules_shapes,
    rules_sums,
)
from stepwell_server.compile.causality.call import Rule

RULES: dict[str, Rule] = (
    rules_elementwise.RULES | rules_shapes.RULES | rules_sums.RULES | rules_matrices.RULES
)
