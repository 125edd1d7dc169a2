"""Some random models of fixed seeds; `make fuzz-models` tries others."""

from __future__ import annotations

import pytest

from congruence.fuzz_models import check


# Compiling takes two seconds on an idle machine, and many times that on a busy one.
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_random_models_are_served_equal_to_keras_or_refused() -> None:
    for seed in range(5):
        check(seed)  # Says what is wrong itself.
