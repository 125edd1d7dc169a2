"""The rule that applies a change once, however often it is sent.

With a session at revision r: expected r applies the change; expected r - 1 with the request id of the
last change replays its answer; anything else is a conflict. Without an expected revision the change is
applied, unless its request id is that of the last change: then it is that change, sent again.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

#: Stands for "no revision expected" among those that are.
ANY_REVISION = 2**64 - 1

Mask = npt.NDArray[np.bool_]
U64 = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with each change; exactly one of the three is true for each."""

    apply: Mask
    replay: Mask
    conflict: Mask


def applies(revision: int, last_request: int, expected: int | None, request: int) -> bool:
    """Whether one change is applied; the rule of `judge` for a single one."""
    if expected is None:
        return not request or request != last_request
    return expected == revision


def judge(revision: U64, last_request: U64, expected: U64 | None, request: U64 | None) -> Verdict | None:
    """Judge one change for each of n sessions; None: all of them are applied.

    Args:
        revision: `(n,)`, the sessions' revisions.
        last_request: `(n,)`, request ids of the sessions' last changes, 0 for none.
        expected: `(n,)`, `ANY_REVISION` for none, or None if no change expects any.
        request: `(n,)`, 0 for none, or None if no change has one.
    """
    if expected is not None and not np.count_nonzero(expected != revision):
        return None
    same = np.zeros(len(revision), np.bool_)
    if request is not None:
        same = (request != 0) & (request == last_request)
    if expected is None:
        return Verdict(~same, same, np.zeros_like(same)) if np.count_nonzero(same) else None
    anything = expected == np.uint64(ANY_REVISION)
    apply = (expected == revision) | (anything & ~same)
    if np.count_nonzero(apply) == len(apply):
        return None
    # revision >= 1 wherever a request id is remembered, so the subtraction cannot wrap for `same`
    replay = ~apply & same & (anything | (expected == revision - np.uint64(1)))
    return Verdict(apply, replay, ~(apply | replay))
