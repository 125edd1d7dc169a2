"""The rule of exactly once, row by row: apply, replay or refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell_server.core.exactly_once import ANY_REVISION, Verdict, judge

MAX = 2**64 - 1


def u64(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


# revision, last request, expected, request -> verdict
RULE = [
    (5, 77, 5, 88, "apply"),
    (5, 77, 5, 77, "apply"),  # expected is the revision: it is a new change, whatever its id
    (5, 77, 5, 0, "apply"),
    (5, 77, 4, 77, "replay"),
    (5, 77, 4, 88, "conflict"),
    (5, 77, 4, 0, "conflict"),
    (5, 0, 4, 0, "conflict"),  # 0 is no id: two changes without one are not the same
    (5, 77, 3, 77, "conflict"),
    (5, 77, 6, 77, "conflict"),
    (5, 77, 0, 77, "conflict"),
    (0, 0, 0, 0, "apply"),
    (0, 0, 0, 9, "apply"),
    (0, 0, 1, 9, "conflict"),
    (0, 0, MAX - 1, 0, "conflict"),
    (5, 77, ANY_REVISION, 88, "apply"),
    (5, 77, ANY_REVISION, 77, "replay"),
    (5, 0, ANY_REVISION, 0, "apply"),
    (0, 0, ANY_REVISION, 9, "apply"),  # revision - 1 wraps to the same number
    (1, 9, 0, 9, "replay"),
]


def _judged(*columns: Any) -> Verdict:
    """What `judge` says, at length."""
    verdict, nobody = judge(*columns), np.zeros(len(columns[0]), np.bool_)
    return Verdict(~nobody, nobody, nobody) if verdict is None else verdict


@pytest.mark.parametrize(("revision", "last", "expected", "request_id", "verdict"), RULE)
def test_each_row_of_the_rule(revision: int, last: int, expected: int, request_id: int, verdict: str) -> None:
    judged = _judged(u64(revision), u64(last), u64(expected), u64(request_id))
    assert [name for name in ("apply", "replay", "conflict") if getattr(judged, name)[0]] == [verdict]


def test_all_rows_at_once() -> None:
    columns = [u64(*column) for column in list(zip(*RULE, strict=True))[:4]]
    judged = _judged(*columns)
    for name in ("apply", "replay", "conflict"):
        assert getattr(judged, name).tolist() == [row[4] == name for row in RULE]


@pytest.mark.parametrize(
    ("last", "request_id", "verdict"),
    [(77, 77, "replay"), (77, 78, "apply"), (77, 0, "apply"), (0, 0, "apply"), (0, 5, "apply")],
)
def test_without_an_expected_revision(last: int, request_id: int, verdict: str) -> None:
    judged = _judged(u64(3), u64(last), None, u64(request_id))
    assert [name for name in ("apply", "replay", "conflict") if getattr(judged, name)[0]] == [verdict]


def test_without_request_ids_nothing_is_a_replay() -> None:
    judged = _judged(u64(3, 3), u64(77, 0), u64(3, 2), None)
    assert judged.apply.tolist() == [True, False]
    assert judged.conflict.tolist() == [False, True]
    assert _judged(u64(3), u64(77), None, None).apply.tolist() == [True]
