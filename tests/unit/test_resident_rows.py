"""How many rows of sessions each model keeps ready to step."""

from __future__ import annotations

import dataclasses
import os

import pytest

from stepwell_server.engine.state.resident import ResidentRows
from support.engine.fake_executor import PLAIN
from support.engine.harness import running

LARGE = dataclasses.replace(PLAIN, state=(dataclasses.replace(PLAIN.state[0], shape=(1 << 20,)),))
"""4 MiB of state a row."""


def test_a_name_has_its_own_bound_and_the_others_that_of_every_model() -> None:
    rows = ResidentRows(7, {"a": 9})
    assert (rows.of("a", PLAIN), rows.of("b", PLAIN)) == (9, 7)
    assert ResidentRows(None, {"a": 9}).of("b", PLAIN) == 65_536


def test_models_divide_a_quarter_of_the_memory() -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    row_bytes = LARGE.state_row_bytes + sum(spec.row_bytes for spec in LARGE.outputs)
    for models in (1, 2, 50):
        taken = models * 2 * row_bytes * ResidentRows(models=models).of("m", LARGE)
        assert taken <= memory / 4 or taken == models * 2 * row_bytes, (
            "all their rows together, the copies too"
        )
        assert taken >= memory / 4 - models * 2 * row_bytes
    assert ResidentRows(models=1 << 40).of("m", LARGE) == 1
    assert ResidentRows(models=0).of("m", LARGE) > 0, "all have bounds of their own"


@pytest.mark.stores("memory")
async def test_each_model_of_an_engine_has_its_bound() -> None:
    async with running({"a": PLAIN, "b": PLAIN}, resident_rows=ResidentRows(3, {"b": 5})) as at:
        assert [one.max_resident_rows for one in at.engine.stats()] == [3, 5]
