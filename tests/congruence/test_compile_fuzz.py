"""Some random models of fixed seeds; `make fuzz-models` tries others."""

from __future__ import annotations

import pytest

from congruence.fuzz_models import check


# Compiling takes two seconds on an idle machine, and many times that on a busy one.
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_random_models_are_served_equal_to_keras_or_refused() -> None:
    for seed in (
        5,
        9,
        11,
        14,
        21,
    ):  # Four are served. Keras unrolls a TimeDistributed over 800 time steps for minutes.
        check(seed)  # Says what is wrong itself.
