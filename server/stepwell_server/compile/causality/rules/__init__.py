"""The operations allowed outside the loops of recurrent layers, by TensorFlow's names.

Each has a rule that returns the positions of the batch and time axis in its results, and refuses the operation if
it mixes them. Other operations are refused.
"""

from __future__ import annotations

from stepwell_server.compile.causality.call import Rule
from stepwell_server.compile.causality.rules import elementwise, matrices, shapes, sums

RULES: dict[str, Rule] = elementwise.RULES | shapes.RULES | sums.RULES | matrices.RULES
