"""The rule of exactly once, row by row: apply, replay or refuse."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from stepwell_server.core.exactly_once import (
    ANY_REVISION,
    Kind,
    Verdict,
    applies,
    digest_of_one,
    digests,
    judge,
    kind_of,
    mask_numbers,
    mismatches,
    prefix_of,
    row_numbers,
    seed_of,
)

MAX = 2**64 - 1


def u64(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


# revision, last request, expected, request -> verdict
RULE = [
    (5, 77, 5, 88, "apply"),
    (5, 77, 5, 77, "apply"),
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
    return Verdict(~nobody, nobody, nobody, nobody) if verdict is None else verdict


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


SAYS = {"the same": 10, "other content": 11, "another kind": (2 << 60) + 10}


def _by_the_rule(revision: int, last: int, expected: int | None, request: int, says: str) -> str:
    """What becomes of one change, in plain words; `says` is what it says beside the last change."""
    is_last_id = request != 0 and request == last
    is_before = is_last_id and expected == revision - 1
    if expected is not None and expected != revision and not is_before:
        return "conflict"
    if is_last_id and says != "the same":
        return "refuse"
    return "replay" if is_last_id and expected != revision else "apply"


def _decided(verdict: Verdict, stored: np.ndarray, own: np.ndarray) -> list[str]:
    kinds, contents = mismatches(stored, own)
    refused = verdict.same_id & (kinds | contents)
    masks = {"apply": verdict.apply, "replay": verdict.replay, "conflict": verdict.conflict}
    assert (np.sum(list(masks.values()), axis=0) == 1).all()
    return [
        "refuse" if refused[place] else next(name for name, mask in masks.items() if mask[place])
        for place in range(len(refused))
    ]


@pytest.mark.parametrize("with_expected", [True, False])
@pytest.mark.parametrize("with_request", [True, False])
def test_each_combination_is_judged_by_the_plain_rule(with_expected: bool, with_request: bool) -> None:
    """Alone, together, and in parts of random size and order."""
    cases = [
        (revision, last, expected, request, says)
        for revision, last, expected, request, says in itertools.product(
            [0, 1, 5, MAX - 1],
            [0, 77, MAX],
            [None, 0, 1, 4, 5, 6, MAX - 2, MAX - 1] if with_expected else [None],
            [0, 77, 88, MAX] if with_request else [0],
            SAYS,
        )
        if revision or not last
    ]
    wanted = [_by_the_rule(*case) for case in cases]

    def found(places: np.ndarray) -> list[str]:
        chosen = [cases[place] for place in places]
        revision, last, request = (u64(*[case[column] for case in chosen]) for column in (0, 1, 3))
        expected = u64(*[ANY_REVISION if case[2] is None else case[2] for case in chosen])
        verdict = _judged(
            revision, last, expected if with_expected else None, request if with_request else None
        )
        return _decided(verdict, u64(*[10] * len(chosen)), u64(*[SAYS[case[4]] for case in chosen]))

    for place in range(len(cases)):
        assert found(np.array([place])) == [wanted[place]], cases[place]
    rng = np.random.default_rng(11)
    order = rng.permutation(len(cases))
    for places in [order, *np.array_split(order, len(cases) // 7)]:
        assert found(places) == [wanted[place] for place in places]
    kept = {"apply", "replay", "refuse"} if with_request else {"apply"}
    assert set(wanted) == (kept | {"conflict"} if with_expected else kept)


@pytest.mark.parametrize("expected", [None, 4, 5, 6])
@pytest.mark.parametrize(("last", "request_id"), [(0, 0), (0, 9), (77, 0), (77, 77), (77, 88)])
def test_a_single_change_is_applied_at_once_only_if_its_content_makes_no_difference(
    last: int, request_id: int, expected: int | None
) -> None:
    told = {_by_the_rule(5, last, expected, request_id, says) for says in SAYS}
    assert applies(5, last, expected, request_id) == (told == {"apply"})


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
    kinds, contents = mismatches(stored, np.array([step, other, reset, elsewhere, step, 0], np.uint64))
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
