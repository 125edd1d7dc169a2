"""The disk is full: callers are told, nothing changes, and it goes on once there is room.

Two ways to a full disk: a limit on the size of files, which every system lets a process put on itself, and
a small file system of its own, where a mount is allowed.
"""

from __future__ import annotations

import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stepwell_server.clock import SystemClock
from stepwell_server.errors import Unavailable
from stepwell_server.store.base import Batch, End, StoreHealth, Tombstone
from stepwell_server.store.disk.lmdb import Durability, LmdbStore
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.record import decode_header
from support.stores.records import Record
from support.stores.small_disk import small_disk

MIB = 2**20
DISK_BYTES = 8 * MIB
SEGMENT_BYTES = 64 * 1024
REASON = re.compile(
    r"got no room: the disk of .*/data/sessions is full, \d+ bytes are free \("
    r"|got no room: a file of this process must stay within 8388608 bytes, its RLIMIT_FSIZE \("
    r"|new sessions must leave \d+ bytes free for closing sessions; the disk of .*/data/sessions has \d+ bytes free"
)
DiskOrLmdb = LmdbStore | DiskStore


def record(session_id: str, revision: int, row_bytes: int = 5000) -> bytes:
    return Record(
        fingerprint="f" * 64,
        model="m",
        batch_size=1,
        revision=revision,
        position=0,
        request_id=0,
        opened_with=0,
        created=0.0,
        last_used=0.0,
        reply=0,
        rows=b"r" * row_bytes,
    ).encode(session_id)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["go-on", "close-many"])
@pytest.mark.parametrize("durability", ["sync", "async"])
@pytest.mark.parametrize("kind", ["lmdb", "segments"])
def test_a_limit_on_files(tmp_path: Path, kind: str, durability: str, what: str) -> None:
    _run([sys.executable, __file__, what, "limit", kind, durability, os.fspath(tmp_path)])


@pytest.mark.parametrize("what", ["go-on", "close-many"])
@pytest.mark.parametrize("durability", ["sync", "async"])
@pytest.mark.parametrize("kind", ["lmdb", "segments"])
def test_a_small_disk(tmp_path: Path, kind: str, durability: str, what: str) -> None:
    prefix = small_disk(tmp_path, "size=8m")
    _run([*prefix, sys.executable, __file__, what, "disk", kind, durability, os.fspath(tmp_path)])


def _run(command: list[str]) -> None:
    env = {**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[1])}  # for `support`
    found = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=env)
    assert (found.returncode, found.stdout) == (0, "all is well\n"), found.stderr


def limited() -> tuple[Callable[[], None], Callable[[], None]]:
    """How to have a full disk, and room on it again."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    return (
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (DISK_BYTES, hard)),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)),
    )


def mounted(path: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """As `limited`, on a disk that something else fills."""
    ballast = path / "ballast"

    def full() -> None:
        ballast.write_bytes(b"x" * (DISK_BYTES // 2))

    return full, ballast.unlink


def is_kept(store: DiskOrLmdb, batch: Batch) -> bool:
    """Commit; say whether there was room. Who is refused is told that it is room that there is none of."""
    try:
        store.commit(batch)
    except Unavailable as error:
        refusal = error.message
    else:
        return True
    assert REASON.search(refusal), refusal
    return False


def fill(store: DiskOrLmdb) -> tuple[dict[str, int], int]:
    """Commit until it is refused; return what was acknowledged and how often it was refused."""
    kept: dict[str, int] = {}
    for number in range(1000):
        names = [f"s{number}-{i}" for i in range(50)] + list(kept)[:10]
        puts = [(name, record(name, number)) for name in names]
        stones = [Tombstone(f"t{number}", End.CLOSED, 0.0)]
        if not is_kept(store, Batch(puts=puts, tombstones=stones, counts=[("m", 50)])):
            assert store.tombstones([f"t{number}"])[0] is None
            return kept, number
        kept |= dict.fromkeys(names, number)
    raise AssertionError("the disk is never full")


def require(store: DiskOrLmdb, kept: dict[str, int]) -> None:
    """What was acknowledged is there, whole, and nothing else."""
    assert store.count() == len(kept)
    for name, revision in kept.items():
        stored = store.get(name)
        assert stored is not None
        assert decode_header(name, stored).revision == revision


def opened(kind: str, durability: Durability, path: Path) -> DiskOrLmdb:
    clock = SystemClock()
    if kind == "lmdb":
        return LmdbStore(path / "data", durability=durability, clock=clock, first_map_bytes=MIB)
    return DiskStore(
        path / "data", durability=durability, clock=clock, first_map_bytes=MIB, segment_bytes=SEGMENT_BYTES
    )


def check(way: str, kind: str, durability: Durability, path: Path) -> None:
    """The test; in a process of its own, because limits and mounts are a process's."""
    store = opened(kind, durability, path)
    full, room = limited() if way == "limit" else mounted(path)
    full()
    kept, number = fill(store)
    assert number > 3, "there was room for some"
    for _ in range(5):
        puts = [(f"more-{i}", record(f"more-{i}", 1)) for i in range(500)]
        assert not is_kept(store, Batch(puts=puts, counts=[("m", 500)]))
        require(store, kept)
    is_on_disk, is_limited = isinstance(store, DiskStore), way == "limit"
    if is_on_disk and not is_limited:  # how much is free says nothing of a limit
        assert " is full, " in store.check().problem or " for closing sessions; " in store.check().problem
        assert "bytes are free on the disk of" in store.check().warning
    changed = _change_some(store, kept)
    assert changed >= (kind == "segments") * 9, "the segment has its room already"
    _close_some(store, kept)
    room()
    if is_on_disk:
        assert store.check() == StoreHealth(warning=store.check().warning)
    _go_on(store, kept)
    store.close()
    store = opened(kind, durability, path)
    require(store, kept)
    store.close()


def _change_some(store: DiskOrLmdb, kept: dict[str, int]) -> int:
    """Change sessions that are there, until it is refused or for long; how often that went well."""
    chance = random.Random(5)
    for number in range(1000, 1100):
        names = chance.sample(list(kept), 3)
        if not is_kept(store, Batch(puts=[(name, record(name, number, 1000)) for name in names])):
            require(store, kept)
            return number - 1000
        kept |= dict.fromkeys(names, number)
        store.checkpoint()
    require(store, kept)
    return 100


def _close_some(store: DiskOrLmdb, kept: dict[str, int]) -> None:
    """Closing sessions works on a full disk, and makes room on it."""
    gone = list(kept)[:200]
    for at in range(0, 200, 20):
        store.commit(Batch(deletes=gone[at : at + 20]))
    for name in gone:
        del kept[name]
    require(store, kept)
    store.commit(Batch(puts=[(name, record(name, 77)) for name in gone[:50]], counts=[("m", 50)]))
    kept |= dict.fromkeys(gone[:50], 77)
    require(store, kept)


def _go_on(store: DiskOrLmdb, kept: dict[str, int]) -> None:
    """Once there is room all is as before."""
    names = [f"later-{i}" for i in range(300)]
    store.commit(Batch(puts=[(name, record(name, 9)) for name in names], counts=[("m", 300)]))
    kept |= dict.fromkeys(names, 9)
    require(store, kept)


def check_closing(way: str, kind: str, durability: Durability, path: Path) -> None:
    """Close many sessions at once on a full disk, open others in their place, and again, without a restart."""
    store = opened(kind, durability, path)
    full, room = limited() if way == "limit" else mounted(path)
    full()
    open_ones: list[str] = []
    chance = random.Random(7)
    for cycle in range(20):
        count = _open_until_full(store, open_ones, cycle)
        # later the pages are less and less full, and only closing is sure to go on
        assert count >= (1000, 40, 40, *[0] * 20)[cycle], "there was room for some"
        chance.shuffle(open_ones)  # so that each lies on a page of its own
        gone, open_ones = open_ones[:60], open_ones[60:]
        stones = [Tombstone(name, End.CLOSED, 0.0) for name in gone]
        store.commit(Batch(deletes=gone, tombstones=stones, counts=[("m", -1)] * len(gone)))
        require(store, dict.fromkeys(open_ones, 1))
        assert store.count_of("m") == len(open_ones)
    room()
    assert _open_until_full(store, open_ones, 99, most=300) == 300
    require(store, dict.fromkeys(open_ones, 1))
    store.close()


def _open_until_full(store: DiskOrLmdb, open_ones: list[str], cycle: int, most: int = 100_000) -> int:
    for at in range(0, most, 20):
        names = [f"{hash((cycle, at, i)):x}-{cycle}" for i in range(20)]
        puts = [(name, record(name, 1, 400)) for name in names]
        if not is_kept(store, Batch(puts=puts, counts=[("m", 1)] * 20)):
            return at
        open_ones += names
    return most


if __name__ == "__main__":
    test = check_closing if sys.argv[1] == "close-many" else check
    test(sys.argv[2], sys.argv[3], "sync" if sys.argv[4] == "sync" else "async", Path(sys.argv[5]))
    print("all is well")
