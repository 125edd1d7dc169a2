"""A test run that is no soak draws the same random examples whatever ran before it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import samples


def drawn() -> list[int]:
    found = []

    @given(st.integers())
    def draw(number: int) -> None:
        found.append(number)

    draw()
    return found


@pytest.mark.skipif(samples.ALL, reason="a soak draws others each time")
def test_examples_are_the_same_whatever_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = drawn()
    path = tmp_path / "more_numbers.py"
    path.write_text(f"NUMBERS = {list(range(10**6, 10**6 + 1000))}")
    spec = importlib.util.spec_from_file_location("more_numbers", path)
    assert spec is not None
    monkeypatch.setitem(sys.modules, "more_numbers", importlib.util.module_from_spec(spec))
    assert drawn() == before
