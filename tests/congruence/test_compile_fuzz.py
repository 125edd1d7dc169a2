"""Some random models of fixed seeds, and others in each soak; `make fuzz-models` tries as many as you like."""

from __future__ import annotations

import secrets

import pytest

from congruence.fuzz_models import check
from support.models.random_blocks import LOOKING_BACK
from support.models.random_models import GOOD, HANDS, blocks_of

#: Two models with many blocks that look back, and one that is refused.
_SEEDS = (2143 * HANDS + 9, 2143 * HANDS + 6, 2143 * HANDS + 3)


def test_seeds_that_follow_each_other_share_out_all_blocks() -> None:
    names = [name for hand in range(HANDS) for name in blocks_of(5 * HANDS + hand)]
    assert sorted(names) == sorted(GOOD)
    drawn = {name for seed in _SEEDS for name in blocks_of(seed)}
    assert len(drawn & set(LOOKING_BACK)) >= 8, (
        "draw others: blocks were added, and these seeds have few of them"
    )


# Compiling takes two seconds on an idle machine, and many times that on a busy one.
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", _SEEDS)
def test_random_models_are_served_equal_to_keras_or_refused(seed: int) -> None:
    check(seed)  # Says what is wrong itself.


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_other_random_models_are_served_equal_to_keras_or_refused() -> None:
    first = HANDS * secrets.randbelow(1 << 30)
    for seed in range(first, first + 3 * HANDS):
        check(seed)
