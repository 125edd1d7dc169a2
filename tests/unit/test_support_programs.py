"""What is made once for all processes of a test run."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.models import programs


def test_one_makes_it_and_the_others_wait_for_it() -> None:
    name = f"once-{os.urandom(4).hex()}"
    made: list[int] = []

    def make(folder: Path) -> None:
        (folder / "half").touch()
        if not made:
            made.append(0)
            raise OSError("the first one fails")
        made.append(1)
        (folder / "whole").write_text(f"{len(list(folder.iterdir()))}")

    with pytest.raises(OSError, match="the first one fails"):
        programs.once(name, make)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: programs.once(name, make), range(4)))
    (folder,) = found
    assert made == [0, 1]
    assert (folder / "whole").read_text() == "1", "nothing is left of the one that failed"
