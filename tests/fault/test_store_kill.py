"""A writer is killed at random moments: what it acknowledged is there, and nothing is there by half.

The writer is `support.stores.writer_process`, as a process.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stepwell_server.store.disk.lmdb import Durability
from support.samples import examples
from support.stores.writer_process import BESIDE, KINDS, held, held_beside, opened

ROUNDS = examples(32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("durability", ["sync", "async"])
def test_nothing_acknowledged_is_lost_and_nothing_is_half_there(
    tmp_path: Path, durability: Durability, kind: str
) -> None:
    chance, last = random.Random(7), -1
    for _ in range(ROUNDS):
        acknowledged = _write_until_killed(tmp_path, durability, kind, chance.uniform(0.005, 0.25))
        store = opened(tmp_path, durability, KINDS[kind])
        found = held(store, KINDS[kind])
        store.close()
        assert found >= 0
        assert found in {acknowledged, acknowledged + 1}, "at most the one under way is more than was said"
        assert found > last
        last = found


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["sync", "async"])
def test_nothing_that_was_appended_beside_commits_is_lost(tmp_path: Path, durability: Durability) -> None:
    chance, last = random.Random(11), (-1, -1)
    for _ in range(ROUNDS):
        lines = _lines_until_killed(tmp_path, durability, BESIDE, chance.uniform(0.005, 0.25))
        store = opened(tmp_path, durability, KINDS["segments"])
        found = held_beside(store)
        store.close()
        for mark, number, before in zip((b"c", b"a"), found, last, strict=True):
            said = [int(line[1:]) for line in lines if line.startswith(mark)]
            assert number - (said[-1] if said else before) in {0, 1}
        last = found


def _write_until_killed(path: Path, durability: Durability, kind: str, seconds: float) -> int:
    """Let a writer go on for a while, kill it, and return the last commit that it acknowledged."""
    return int(_lines_until_killed(path, durability, kind, seconds)[-1])


def _lines_until_killed(path: Path, durability: Durability, kind: str, seconds: float) -> list[bytes]:
    """Let a writer go on for a while, kill it, and return what it acknowledged."""
    with subprocess.Popen(
        [sys.executable, "-m", "support.stores.writer_process", os.fspath(path), durability, kind],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[1])},  # for `support`
    ) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline()]  # it has begun
        killer = threading.Timer(seconds, writer.kill)
        killer.start()
        lines += writer.stdout.readlines()
        killer.join()
    assert writer.returncode == -9, "it was killed, it did not fail"
    return [line for line in lines if line.endswith(b"\n")]
