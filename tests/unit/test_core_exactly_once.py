"""The rule of exactly once, row by row: apply, replay or refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell_server.core.exactly_once import (
    ANY_REVISION,
    Kind,
    Verdict,
    digest_of_one,
    digests,
    judge,
    kind_of,
    mask_numbers,
    prefix_of,
    row_numbers,
    seed_of,
    unlike,
)

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


PREFIX, SEED = prefix_of(Kind.STEP, [("x", "float32")]), seed_of("all", 1)


@pytest.mark.parametrize("width", [0, 1, 3, 4, 7, 16, 511, 512, 513, 4096])
@pytest.mark.parametrize("dtype", ["bool", "int8", "float16", "float32", "float64", "int64"])
def test_a_digest_does_not_depend_on_the_company(width: int, dtype: str) -> None:
    """Of sessions of several rows too, of which some rows have what others have."""
    rng = np.random.default_rng(width)
    values = [
        (rng.standard_normal((24, width)) * 50).astype(dtype),
        rng.standard_normal((24, 2)).astype("f4"),
    ]
    sizes = np.array([1, 1, 5, 2, 1, 9, 3, 2])
    ends = np.cumsum(sizes)
    together = digests(PREFIX, SEED, row_numbers(values, 24), sizes)
    assert len(set(together.tolist())) == len(sizes)
    for size, end, digest in zip(sizes.tolist(), ends.tolist(), together.tolist(), strict=True):
        own = [array[end - size : end] for array in values]
        assert digests(PREFIX, SEED, row_numbers(own, size), np.array([size])).tolist() == [digest]
        if size == 1:
            assert digest_of_one(PREFIX, SEED, own) == digest


def test_digests_of_other_content_differ() -> None:
    """Signs, places and neighbouring bits of numbers, of rows of few and of many numbers."""
    rng = np.random.default_rng(1)
    for dtype, width in (("float32", 2), ("float32", 7), ("float64", 4), ("float32", 600), ("float16", 6)):
        value = rng.standard_normal((1, width)).astype(dtype)
        word = {2: np.uint16, 4: np.uint32, 8: np.uint64}[value.itemsize]
        variants = [value, -value, value[:, ::-1], np.roll(value, 1), value * 2, np.zeros_like(value)]
        variants.append(-np.zeros_like(value))
        for place in range(min(width, 20)):
            for bit in range(8 * value.itemsize):
                flipped = value.copy()
                flipped.view(word)[0, place] ^= word(1 << bit)
                variants.append(flipped)
            both = value.copy()
            both[0, place] *= -1
            both[0, place - 1] *= -1
            variants.append(both)
        distinct = {variant.tobytes() for variant in variants}
        assert len({digest_of_one(PREFIX, SEED, [variant]) for variant in variants}) == len(distinct)


def test_what_is_unlike() -> None:
    step = digest_of_one(PREFIX, SEED, [np.ones((1, 3), "f4")])
    other = digest_of_one(PREFIX, SEED, [np.zeros((1, 3), "f4")])
    reset = digest_of_one(prefix_of(Kind.RESET, [("x", "float32")]), SEED, [np.ones((1, 3), "f4")])
    elsewhere = digest_of_one(prefix_of(Kind.STEP, [("x", "float16")]), SEED, [np.ones((1, 3), "f2")])
    stored = np.array([step, step, step, step, 0, step], np.uint64)
    kinds, contents = unlike(stored, np.array([step, other, reset, elsewhere, step, 0], np.uint64))
    assert kinds.tolist() == [False, False, True, False, False, False]
    assert contents.tolist() == [False, True, False, False, False, False]
    assert (kind_of(step), kind_of(reset)) == (Kind.STEP, Kind.RESET)
    assert kind_of(0) is kind_of(2**64 - 1) is None


def test_a_mask_is_that_of_its_marks() -> None:
    mask = np.zeros((3, 600), np.bool_)
    mask[1, [0, 5]] = True
    mask[2, 599] = True
    numbers = mask_numbers(mask)
    assert numbers[0] == 0
    assert len(set(numbers.tolist())) == 3
    assert mask_numbers(mask[:2, :6]).tolist() == numbers[:2].tolist()
