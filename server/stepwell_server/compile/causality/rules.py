"""The operations allowed outside the loops of recurrent layers, by TensorFlow's names.

Each has a rule that returns the positions of the batch and time axis in its results, and refuses the operation if
it mixes them. Other operations are refused.
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
