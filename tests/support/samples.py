"""How much of what could be tried a test run tries: a sample in `make test`, all of it in `make soak`.

`make soak` runs the files that import this module.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

#: Set by `make soak`.
ALL = "TEST_ALL" in os.environ
#: Prime, so that a sample of bytes meets every place of what is laid out in words.
_ONE_IN = 7
_SHARE = 4


def some(values: Sequence[T]) -> Sequence[T]:
    """Each of the values, or one in seven, the first and the last among them."""
    return values if ALL else [*values[:-1:_ONE_IN], *values[-1:]]


def examples(count: int) -> int:
    """How many random examples to draw, of so many in a soak."""
    return count if ALL else max(1, count // _SHARE)
