"""The store on disk when a part of a segment is damaged or missing, or the power went."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from stepwell_server.store.base import Batch, StoreError
from stepwell_server.store.disk.lmdb import Durability
from stepwell_server.store.record import JoinedPuts
from support.samples import examples
from support.stores.disk_store import (
    DURABILITIES,
    begin,
    crash_copy,
    end,
    fill_one,
    is_damaged,
    killed,
    opened,
    place_of,
    put,
    record,
    revisions,
    warnings,
)
from support.stores.records import scan_local

#: Where some parts of a record are. What it seems to be with another revision, or of another session, does not count.
RECORD_PARTS = {"schema": 4, "revision": 8, "opened with": 32, "created": 44, "rows": 90}


def flip(path: Path, at: int) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def damaged(path: Path, durability: Durability) -> tuple[Path, str]:
    """What is left of a store with changes 1 to 6 of `a`, of which the segment's third cannot be read; and its file."""
    store = opened(path, durability)
    begin(store, "a", "b")
    for revision in range(1, 4):
        put(store, "a", revision=revision)
    name, at = place_of(store, "a")
    for revision in range(4, 7):
        put(store, "a", revision=revision)
    copy = crash_copy(store)
    store.close()
    flip(copy / "wal" / name, at - 3)
    return copy, name


def test_a_damaged_segment_stops_a_start_that_must_lose_nothing(path: Path) -> None:
    copy, name = damaged(path, "sync")
    rule = rf"^{copy / 'wal' / name} cannot be read from byte \d+ on\. .* are missing: restore the folder, or start once with --durability async"
    before = {file: (copy / "wal" / file).read_bytes() for file in "01"}
    for _ in range(2):
        with pytest.raises(StoreError, match=rule):
            opened(copy, "sync")
        assert {file: (copy / "wal" / file).read_bytes() for file in "01"} == before
    opened(copy, "async").close()
    store = opened(copy, "sync")
    assert revisions(store) == {"a": 2, "b": 0}


def test_a_damaged_segment_is_a_warning_where_the_power_may_take_changes(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy, name = damaged(path, "async")
    store = opened(copy, "async")
    (warning,) = warnings(caplog)
    assert warning.startswith(f"{copy / 'wal' / name} cannot be read from byte ")
    assert revisions(store) == {"a": 2, "b": 0}
    store.close()
    store = opened(copy, "async")
    assert not warnings(caplog)
    assert revisions(store) == {"a": 2, "b": 0}


def test_changes_behind_damage_never_return(path: Path) -> None:
    copy, _ = damaged(path, "async")
    store = opened(copy, "async")
    put(store, "b", revision=1)
    for _ in range(2):
        assert revisions(store) == {"a": 2, "b": 1}
        store = killed(store)


@DURABILITIES
def test_a_file_that_is_no_segment(
    path: Path, caplog: pytest.LogCaptureFixture, durability: Durability
) -> None:
    store = opened(path, durability)
    begin(store, "a")
    path = crash_copy(store)
    store.close()
    (path / "wal" / "1").write_bytes(b"no segment" * 500)
    if durability == "sync":
        with pytest.raises(StoreError, match=f"^{path / 'wal' / '1'} cannot be read: "):
            opened(path, durability)
        return
    store = opened(path, durability)
    assert warnings(caplog)[0].startswith(f"{path / 'wal' / '1'} cannot be read: ")
    for revision in range(1, 200):
        put(store, "a", revision=revision)
    store = killed(store)
    assert revisions(store) == {"a": 199}


def test_damage_at_the_end_of_a_segment_is_no_write_that_was_cut_off_if_the_other_has_later_ones(
    path: Path,
) -> None:
    store = opened(path, "sync")
    changed = fill_one(store)
    name, at = place_of(store, changed[-2])
    copy = crash_copy(store)
    assert place_of(store, changed[-1])[0] != name
    store.close()
    flip(copy / "wal" / name, at - 3)
    with pytest.raises(StoreError, match="cannot be read"):
        opened(copy, "sync").close()


@pytest.mark.parametrize("what", RECORD_PARTS)
@DURABILITIES
def test_a_damaged_record_in_a_segment_harms_its_session_alone(
    path: Path, durability: Durability, what: str
) -> None:
    store = opened(path, durability)
    begin(store, "a", "b", "c")
    for name in ("a", "b", "c"):
        put(store, name, revision=4)
    name, at = place_of(store, "b")
    copy = crash_copy(store)
    store.close()
    flip(copy / "wal" / name, at + RECORD_PARTS[what])
    for _ in range(3):
        store = opened(copy, durability)
        assert store.get_many(["a", "c"]) == [record("a", 4), record("c", 4)]
        assert is_damaged("b", store.get("b") or b"")
        assert is_damaged("b", store.get_many(["b"])[0] or b"")
        assert [(i, header is None) for i, header in scan_local(store, limit=9)] == [
            ("a", False), ("b", True), ("c", False),
        ]  # fmt: skip
        store.close()
    store = opened(copy, durability)
    end(store, "b")
    begin(store, "b", created=2.0)
    assert revisions(store) == {"a": 4, "b": 0, "c": 4}


@pytest.mark.parametrize("what", ["cut off", "first sector"])
def test_a_part_of_a_segment_that_is_gone_is_damage(path: Path, what: str) -> None:
    store = opened(path, "sync")
    begin(store, "a")
    for revision in range(1, 20):
        put(store, "a", revision=revision)
    segment = crash_copy(store) / "wal" / place_of(store, "a")[0]
    store.close()
    data = segment.read_bytes()
    segment.write_bytes(data[:1024] if what == "cut off" else bytes(512) + data[512:])
    folder, before = segment.parent.parent, segment.read_bytes()
    for _ in range(2):
        with pytest.raises(StoreError, match=f"^{segment} cannot be read"):
            opened(folder, "sync")
        assert segment.read_bytes() == before
    store = opened(folder, "async")
    found = revisions(store)["a"]
    store.close()
    # what stands before the cut can be read
    assert 0 < found < 19 if what == "cut off" else found < 19


# ------------------------------------------------------------------------------------------------------ loss of power


class Last:
    """`os.pwritev`, and what the last write to a segment changed."""

    def __init__(self) -> None:
        self._pwritev = os.pwritev
        self.path = Path()
        self.old = self.new = b""
        self.count = 0

    def __call__(self, file: int, buffers: Sequence[bytes], at: int, flags: int = 0) -> int:
        assert flags == os.RWF_DSYNC
        self.path = Path(f"/proc/self/fd/{file}").resolve()
        self.old = self.path.read_bytes()
        written = self._pwritev(file, buffers, at, flags)
        self.new = self.path.read_bytes()
        self.count += 1
        return written

    def torn(self, chance: random.Random) -> bytes:
        """The file if the power failed meanwhile: any of the sectors are as they were."""
        picture, share = bytearray(self.new), chance.choice([0.1, 0.5, 0.9])
        for at in range(0, len(picture), 512):
            if chance.random() < share:
                picture[at : at + 512] = self.old[at : at + 512]
        return bytes(picture)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(examples(3)))
def test_a_loss_of_power_takes_nothing_but_the_change_that_was_not_acknowledged(
    path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Nor does the rest of that change return later."""
    chance, names = random.Random(seed), list("abcdefghijkl")
    monkeypatch.setattr(os, "pwritev", last := Last())
    store = opened(path, "sync")
    begin(store, *names)
    torn = 0
    for revision in range(1, 60):
        before, count, size = revisions(store), last.count, chance.choice([20, 440, 440, 700])
        parts = [
            chance.sample(names, chance.choice([1, 1, 1, 4])) for _ in range(chance.choice([1, 2, 2, 3]))
        ]
        puts = [[(name, record(name, revision, size)) for name in part] for part in parts]
        store.commit(Batch(puts=JoinedPuts(puts)))
        # the others were too large for a segment
        pictures = [last.torn(chance) for _ in range(5)] if last.count > count else []
        name, after = last.path.name, revisions(store)
        for picture in pictures:
            copy = crash_copy(store)
            (copy / "wal" / name).write_bytes(picture)
            found = gone_on(copy, chance.choice(names), revision=200, size=size)
            assert all(found[name] in {before[name], after[name]} for name in names)
            torn += 1
        if chance.random() < 0.5:
            store.checkpoint()
    assert torn > 150


def gone_on(path: Path, session_id: str, *, revision: int, size: int) -> dict[str, int]:
    """Open what is there, change one session, and see that all is so when it is killed; what was there."""
    store = opened(path, "sync")
    found = revisions(store)
    put(store, session_id, revision=revision, size=size)
    store = killed(store, "sync")
    assert revisions(store) == found | {session_id: revision}
    store.close()
    shutil.rmtree(path)
    shutil.rmtree(store.path)
    return found
