"""A data file whose last pages were never written is whole; a truncated one is refused before reads behind its end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepwell_server.store import verification
from stepwell_server.store.base import Batch
from support.stores.disk_store import begin, opened_base, put, record

READ = """
import pathlib, sys
from stepwell_server.clock import SystemClock
from stepwell_server.store.base import StoreError
from stepwell_server.store.disk.lmdb import LmdbStore
for path in sys.argv[1:]:
    try:
        store = LmdbStore(pathlib.Path(path), durability="async", clock=SystemClock())
    except StoreError as error:
        print("cut off" if "it was truncated to" in str(error) else error, flush=True)
        continue
    keys, records = store.values(after="", limit=10_000)
    print(sum(len(bytes(record)) for record in records), store.damage, flush=True)
    store.close()
"""


def data_of(path: Path) -> Path:
    return path / "sessions" / "data.mdb"


def with_holes(path: Path, kind: str) -> tuple[set[str], int]:
    """Make a store whose last pages were never written. Returns its sessions and its number of pages."""
    store = opened_base(path)
    names = [f"s{n}" for n in range(5 if kind == "few" else 1500)]
    begin(store, *names, size=5000)
    if len(names) > 5:
        store.commit(Batch(deletes=names[5:], counts=[("m", 5 - len(names))]))
        names = names[:5]
    for revision in range(5):
        put(store, *names, revision=revision)
    with contextlib.ExitStack() as stack:
        if kind == "deep":
            # what is freed meanwhile is not used again: each change leaves an entry of its own
            stack.enter_context(store._environment.begin())
            for revision in range(5, 400):
                put(store, *names, revision=revision)
        # more pages in one piece than are free in one piece, and given back at once
        large = record("s0", 2000, 4_000_000 if kind == "few" else 20_000_000)
        store.commit(Batch(puts=[("s0", large)], deletes=["s0"], counts=[("m", -1)]))
    pages = store._environment.info()["last_pgno"] + 1
    assert 4096 * pages <= data_of(path).stat().st_size == store._map_bytes
    store.close()
    assert 512 * data_of(path).stat().st_blocks < 4096 * (pages - 900)
    return set(names) - {"s0"}, pages


@pytest.mark.parametrize("kind", ["few", "many", "deep"])
def test_pages_that_were_never_written_are_holes(tmp_path: Path, kind: str) -> None:
    names, _ = with_holes(tmp_path, kind)
    assert verification.verify(tmp_path, None).problems == []
    for _ in range(2):
        store = opened_base(tmp_path)
        assert {key.decode() for key in store.heads(limit=10_000).keys} == names
        store.close()
    store = opened_base(tmp_path)
    begin(store, *(f"t{n}" for n in range(2000)), size=5000)
    store.close()
    assert verification.verify(tmp_path, None).problems == []


@pytest.mark.parametrize("kind", ["few", "deep"])
def test_nothing_is_read_behind_any_truncation(tmp_path: Path, kind: str) -> None:
    _, pages = with_holes(tmp_path / "data", kind)
    paths = list[Path]()
    for left in [*range(pages, max(pages - 15, 3), -1), pages // 2, 3]:
        path = tmp_path / f"{len(paths)}"
        subprocess.run(["cp", "-r", tmp_path / "data", path], check=True)  # which leaves holes as they are
        os.truncate(data_of(path), left * 4096)
        paths.append(path)
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, "a read behind the end of a file ends the process"
    said = done.stdout.splitlines()
    assert said[0].strip().isdigit()
    assert set(said[1:]) == {"cut off"}
