"""A segment finds what was written to it, whole and in order, whatever became of its file; and says what it cannot find."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell._admin.record_file import HEAD
from stepwell_server.store.disk.wal import layout
from stepwell_server.store.disk.wal.segment import Segment, SegmentCorrupt
from stepwell_server.store.record import RecordBytes
from support.samples import examples, some
from support.stores.broken_disk import io_error, no_space
from support.stores.disk_store import is_damaged, put_all, record, template

Part = Sequence[tuple[str, RecordBytes]]
Write = Sequence[Part]
SIZE = 16 * 1024
SECTOR = 512
LARGE = 2**18


OWNER = 77


def opened(path: Path, size: int = SIZE) -> Segment:
    """Of the size that the file has, if it is there."""
    there = path.stat().st_size if path.exists() else 0
    return Segment(path, there or size, OWNER, flush=False, make=True)


def made(path: Path, writes: Sequence[Write] = (), size: int = SIZE) -> list[int]:
    """Make a segment with some writes; where they end."""
    segment = opened(path, size)
    segment.truncate(0)
    ends = [segment.end]
    for write in writes:
        assert segment.append(write)
        ends.append(segment.end)
    segment.close()
    return ends


def emptied(path: Path, size: int = SIZE) -> Segment:
    """A segment that has nothing."""
    segment = opened(path, size)
    segment.truncate(0)
    return segment


def loaded(path: Path, size: int = SIZE) -> Segment:
    segment = opened(path, size)
    segment.load()
    return segment


def held(segment: Segment) -> dict[str, RecordBytes]:
    """What a segment has, by session."""
    found = {i: record for i in segment.offsets for record in segment.value(i)}
    assert dict(segment.records([*reversed(found), "unknown"])) == found
    return found


def found_in(path: Path) -> dict[str, RecordBytes]:
    segment = opened(path)
    try:
        segment.load()
        return held(segment)
    finally:
        segment.close()


def all_of(writes: Sequence[Write]) -> dict[str, bytes]:
    return put_all([part for write in writes for part in write])


def records_of(revision: int, *session_ids: str, size: int = 20) -> list[tuple[str, RecordBytes]]:
    return [(i, record(i, revision, size)) for i in session_ids]


def older(path: Path) -> None:
    """Fill a segment with small entries to its end, and truncate it: none of them counts any more."""
    segment = emptied(path)
    number = 0
    while segment.append([records_of(number + 100, "a", "x")]):
        number += 1
    segment.truncate(0)
    segment.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "wal"


@pytest.fixture(params=["zeros", "an older generation"])
def before(request: pytest.FixtureRequest, path: Path) -> str:
    """What the file has where nothing was written yet."""
    if request.param == "an older generation":
        older(path)
    return str(request.param)


# ------------------------------------------------------------------------------------------------- what was written

ID = st.one_of(st.sampled_from(["a", "b", "é" * 256, "\U0001f600" * 256]), st.text(min_size=1, max_size=300))
SIZES = st.sampled_from([0, 1, 7, 20, 1950, 2049, 5000])
LIST = st.lists(
    st.builds(lambda i, r, s: (i, record(i, r, s)), ID, st.integers(0, 999), SIZES), min_size=1, max_size=5
)
TEMPLATE = st.builds(template, st.lists(ID, min_size=1, max_size=5, unique=True), st.integers(0, 999), SIZES)
WRITE = st.lists(st.one_of(LIST, TEMPLATE), min_size=1, max_size=3)


@settings(max_examples=60)
@given(st.lists(WRITE, max_size=4), st.lists(WRITE, max_size=2))
def test_what_was_appended_is_there_when_it_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, writes: list[Write], more: list[Write]
) -> None:
    path = tmp_path_factory.mktemp("wal") / "0"
    first = opened(path, LARGE)
    first.truncate(7)
    assert all(first.append(write) for write in writes)
    assert held(first) == all_of(writes)
    second = loaded(path, 1)
    assert held(second) == all_of(writes)
    assert (
        (second.size, second.end, second.sequence)
        == (LARGE, first.end, first.sequence)
        == (LARGE, first.end, 7 + len(writes))
    )
    assert all(second.append(write) for write in more)
    third = loaded(path, LARGE)
    assert held(third) == held(second) == all_of([*writes, *more])
    for segment in (first, second, third):
        segment.close()


@settings(max_examples=60)
@given(ID, SIZES)
def test_a_lone_record_is_written_as_one_among_others(session_id: str, size: int) -> None:
    stored = record(session_id, 3, size)
    entry = layout.lay_out([(session_id, stored)], 2**63, 5)
    data, record_at = layout.lay_out_one(session_id, stored, 2**63, 5)
    assert data == b"".join(entry.buffers)
    assert [(session_id, record_at)] == list(entry.offsets(0))


def test_a_template_that_is_filled_again_is_written_as_it_is_then(path: Path) -> None:
    segment = emptied(path)
    puts = template(["a", "b"], 1)
    segment.append([puts])
    puts.together, puts.checksums = (again := template(["a", "b"], 2)).together, again.checksums
    segment.append([puts])
    segment.close()
    assert found_in(path) == put_all([template(["a", "b"], 2)])


def test_records_whose_checksums_nobody_gathered_are_written_readably(path: Path) -> None:
    """Also as a part of a larger write, where they come with the records of other changes."""
    bare = template(["a", "b"], 1)
    wanted = put_all([template(["a", "b"], 1), records_of(2, "c")])
    bare.checksums = b""
    made(path, [[bare, records_of(2, "c")]])
    assert found_in(path) == wanted


def test_checksums_of_other_records_are_never_written(path: Path) -> None:
    puts = template(["a", "b"], 1)
    puts.checksums += bytes(4)
    segment = emptied(path)
    with pytest.raises(AssertionError, match="each record has its own checksum"):
        segment.append([puts])
    segment.close()
    assert found_in(path) == {}


def test_records_by_the_hundred_are_one_write(path: Path) -> None:
    many = records_of(3, *(f"s{i}" for i in range(700)), size=1)
    made(path, [[many]], LARGE)
    assert found_in(path) == put_all([many])


def test_nothing_that_an_earlier_generation_left_behind_is_found(path: Path) -> None:
    """The entries of both fills are of one size, so that the old ones lie right behind the new ones."""
    made(path, [[records_of(9, "a", "b")]] * 50)
    segment = loaded(path)
    assert segment.sequence == 50
    segment.truncate(50)
    for revision in range(20):
        assert found_in(path) == (put_all([records_of(revision - 1, "a", "c")]) if revision else {})
        segment.append([records_of(revision, "a", "c")])
    segment.close()


def test_numbers_go_on_when_it_is_truncated_and_when_it_is_loaded(path: Path) -> None:
    segment = opened(path)
    segment.truncate(41)
    assert segment.sequence == 41
    segment.append([records_of(0, "a"), records_of(1, "b")])
    segment.append([records_of(2, "a")])
    assert segment.sequence == 43
    segment.close()
    segment = loaded(path)
    assert segment.sequence == 43
    segment.truncate(segment.sequence)
    segment.close()
    segment = loaded(path)
    assert (segment.sequence, segment.offsets) == (43, {})
    segment.close()


@pytest.mark.parametrize("size", [20, 6000])
def test_without_room_nothing_changes(path: Path, size: int) -> None:
    segment = emptied(path)
    revision = 0
    while segment.append([records_of(revision, "a", size=size)]):
        revision += 1
    there, facts = path.read_bytes(), (dict(segment.offsets), segment.end, segment.sequence)
    assert revision > 1
    assert not segment.append([records_of(99, "b", size=size), records_of(99, "c")])
    assert not segment.append([records_of(99, "b", size=SIZE)])
    assert path.read_bytes() == there
    assert len(there) == SIZE
    assert (segment.offsets, segment.end, segment.sequence) == facts
    segment.close()
    assert found_in(path) == put_all([records_of(revision - 1, "a", size=size)])


def test_the_very_last_byte_can_be_used(path: Path) -> None:
    (start, end) = made(path, [[records_of(0, "a", size=100)]])
    path.unlink()
    segment = emptied(path, end)
    assert start == segment.end
    assert segment.append([records_of(5, "a", size=100)])
    assert not segment.append([()])
    assert path.stat().st_size == segment.end == end
    segment.close()
    assert found_in(path) == put_all([records_of(5, "a", size=100)])


def test_a_file_that_was_laid_out_and_no_more_has_nothing(path: Path) -> None:
    opened(path).close()
    segment = opened(path)
    with pytest.raises(SegmentCorrupt, match="first entry is missing"):
        segment.load()
    assert not segment.append([records_of(0, "a")]), "it must be filled first"
    segment.close()


def test_a_file_that_finds_no_room_is_laid_out_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _first_then_full(os.pwrite))
        with pytest.raises(OSError, match="No space left"):
            opened(path, 3 * 2**20)
    opened(path, 3 * 2**20).close()
    assert path.stat().st_size == 3 * 2**20


def _first_then_full(pwrite: Any) -> Any:
    def write(file: int, data: Any, at: int) -> int:
        return int(no_space() if at else pwrite(file, data, at))

    return write


# -------------------------------------------------------------------------------------------- a write that is cut off

EARLIER: list[Write] = [[records_of(1, "a", "b")], [records_of(2, "b"), records_of(2, "c", size=90)]]
LAST: dict[str, Write] = {
    "one record": [records_of(3, "a")],
    "several": [records_of(3, "a", "d", "ä" * 40)],
    "a template": [template(["a", "b", "d"], 3)],
    "several parts": [records_of(3, "a"), template(["b", "e"], 3), records_of(4, "c", "a")],
    "a long record": [records_of(3, "a", size=3000)],
}


def pictures(path: Path, earlier: Sequence[Write], last: Write) -> tuple[bytes, bytes, int, int]:
    """The file before and after the last write, and where that begins and ends."""
    segment = emptied(path)
    assert all(segment.append(write) for write in earlier)
    before, start = path.read_bytes(), segment.end
    assert segment.append(last)
    after, end = path.read_bytes(), segment.end
    segment.close()
    return before, after, start, end


def parts_in(picture: bytes, after: bytes, start: int, last: Write) -> int:
    """How many of the last write's parts, from the first on, are in a picture as they are in the one after it."""
    count = 0
    for part in last:
        ids, bytes_of = [i.encode() for i, _ in part], sum(len(stored) for _, stored in part)
        end = start + HEAD.size + sum(2 + len(i) for i in ids) + bytes_of
        if picture[start:end] != after[start:end]:
            break
        start, count = end + -end % 8, count + 1
    return count


def require_found(path: Path, picture: bytes, wanted: dict[str, bytes]) -> None:
    path.write_bytes(picture)
    assert found_in(path) == wanted


@pytest.mark.parametrize("what", LAST)
def test_a_write_truncated_at_any_byte_is_left_out(path: Path, before: str, what: str) -> None:
    last = LAST[what]
    old, new, start, end = pictures(path, EARLIER, last)
    seen = set()
    for cut in some(range(start, end + 1)):
        picture = new[:cut] + old[cut:]
        count = parts_in(picture, new, start, last)
        seen.add(count)
        require_found(path, picture, all_of([*EARLIER, last if count == len(last) else []]))
    assert seen == set(range(len(last) + 1))


@pytest.mark.parametrize("what", LAST)
def test_appends_continue_after_a_truncated_write(path: Path, before: str, what: str) -> None:
    last = LAST[what]
    old, new, start, end = pictures(path, EARLIER, last)
    for cut in some(range(start, end + 1, 7)):
        path.write_bytes(new[:cut] + old[cut:])
        go_on(path)


def go_on(path: Path, *, times: int = 3) -> None:
    """Load, and append what is as large as what was cut off; load again and again: it is what was appended."""
    segment = loaded(path)
    wanted = held(segment)
    for revision in range(50, 50 + times):
        write = [records_of(revision, "b" if revision == 50 else "a")]
        assert segment.append(write)
        wanted |= all_of([write])
        assert found_in(path) == wanted
    segment.close()


@pytest.mark.parametrize("what", LAST)
def test_of_a_write_that_the_power_left_any_sectors_earlier_ones_are_all_there(
    path: Path, before: str, what: str
) -> None:
    """A last write that was not flushed: some of its sectors are on the disk, the others are as they were."""
    chance, last = random.Random(what), LAST[what]
    last = [*last, records_of(6, "f", "g", size=700), records_of(6, "h")]
    old, new, start, end = pictures(path, EARLIER, last)
    for picture in torn(chance, old, new, start, end):
        count = parts_in(picture, new, start, last)
        require_found(path, picture, all_of([*EARLIER, last if count == len(last) else []]))


def torn(chance: random.Random, old: bytes, new: bytes, start: int, end: int) -> Iterator[bytes]:
    """Contents of a file after a power failure: any of its sectors are new."""
    sectors = range(start // SECTOR * SECTOR, end, SECTOR)
    for share in [0.1, 0.5, 0.9] * examples(100):
        picture = bytearray(old)
        for at in sectors:
            if chance.random() < share:
                picture[at : at + SECTOR] = new[at : at + SECTOR]
        yield bytes(picture)


def test_the_rest_of_a_write_cut_by_power_loss_never_returns(path: Path) -> None:
    """Of the last write the first part is missing, and the second one is there; then appends continue."""
    last = [records_of(3, "a"), records_of(3, "b"), records_of(3, "c")]
    old, new, start, end = pictures(path, EARLIER, last)
    size = (end - start) // 3
    for missing in (0, 1):
        at = start + missing * size
        path.write_bytes(new[:at] + old[at : at + size] + new[at + size :])
        assert found_in(path) == all_of(EARLIER)
        go_on(path)


# ------------------------------------------------------------------------------------------------------------- damage

DAMAGED: dict[str, list[Write]] = {
    "single parts": [[records_of(1, "a", "b")], [records_of(1, "c")], [records_of(2, "a")]],
    "two parts": [[records_of(1, "a")], [records_of(1, "c"), records_of(1, "d")]],
    "a template": [[template(["a", "b", "c"], 1)], [template(["a", "d"], 2), records_of(1, "e")]],
}
FOLLOWING: list[Write] = [[records_of(5, "e")], [records_of(6, "f")]]


def flipped(picture: bytes, start: int, end: int) -> Iterator[bytes]:
    for at in some(range(start, end)):
        for bit in (1, 128):
            changed = bytearray(picture)
            changed[at] ^= bit
            yield bytes(changed)


def require_told(path: Path, picture: bytes, wanted: dict[str, bytes]) -> bool:
    """A segment that is damaged says so; or all is there, but for one session at most, which says so."""
    path.write_bytes(picture)
    try:
        found = found_in(path)
    except SegmentCorrupt:
        return True
    assert set(found) == set(wanted)
    changed = [i for i in wanted if found[i] != wanted[i]]
    assert len(changed) <= 1
    assert all(is_damaged(i, found[i]) for i in changed)
    return bool(changed)


@pytest.mark.parametrize(
    ("what", "following"),
    [
        ("single parts", 1),
        ("single parts", 2),
        ("two parts", 2),
        ("a template", 2),
        ("two parts", 1),
        ("a template", 1),
    ],
)
def test_a_bit_that_flipped_before_a_later_write_is_never_silent(
    path: Path, before: str, what: str, following: int
) -> None:
    writes = [*DAMAGED[what], *FOLLOWING[:following]]
    ends = made(path, writes)
    told = [
        require_told(path, picture, all_of(writes))
        for picture in flipped(path.read_bytes(), 0, ends[-1 - following])
    ]
    assert sum(told) > len(told) * 0.6, "what is not noticed is padding, and records that others follow"


def test_a_bit_that_flipped_in_the_last_write_harms_no_other(path: Path, before: str) -> None:
    """Nobody can tell it from one that was cut off."""
    writes = [*EARLIER, [records_of(3, "a", "d")]]
    *_, start, end = made(path, writes)
    for picture in flipped(path.read_bytes(), start, end):
        path.write_bytes(picture)
        assert found_in(path) in (all_of(EARLIER), all_of(writes))


def test_the_readable_part_of_a_damaged_segment_is_loaded(path: Path) -> None:
    writes: list[Write] = [[records_of(i, f"s{i}")] for i in range(5)]
    ends = made(path, writes)
    picture = bytearray(path.read_bytes())
    picture[ends[2] + 4] ^= 1
    path.write_bytes(picture)
    segment = opened(path)
    with pytest.raises(SegmentCorrupt, match=f"^{path} cannot be read from byte {ends[2]} on$"):
        segment.load()
    assert held(segment) == all_of(writes[:2])
    segment.close()


def test_a_file_that_is_not_a_segment_is_refused(path: Path) -> None:
    path.write_bytes(b"no segment" * 100)
    segment = opened(path)
    with pytest.raises(SegmentCorrupt, match=f"^{path} cannot be read: "):
        segment.load()
    assert not segment.offsets
    assert not segment.append([records_of(0, "a")])
    segment.truncate(3)
    assert segment.append([records_of(0, "a")])
    segment.close()


def test_a_record_with_a_damaged_length_is_no_longer_than_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, end, _ = made(path, [[records_of(1, "a", size=100)], [records_of(1, "b")]])
    pread = os.pread

    def read(file: int, size: int, at: int) -> bytes:
        assert size <= SIZE
        return pread(file, size, at)

    monkeypatch.setattr(os, "pread", read)
    for picture in flipped(path.read_bytes(), start, end):
        require_told(path, picture, put_all([records_of(1, "a", size=100), records_of(1, "b")]))


# ------------------------------------------------------------------------------------------------------- failing writes


class Disk:
    """`os.pwritev` that writes a limited number of bytes per call and in all."""

    def __init__(self, at_once: int, most: int = 2**40) -> None:
        self._pwritev = os.pwritev
        self._at_once, self._sealed = at_once, most
        self.calls = 0

    def __call__(self, file: int, buffers: Sequence[RecordBytes], at: int, flags: int = 0) -> int:
        self.calls += 1
        if not self._sealed:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        data = b"".join(buffers)[: min(self._at_once, self._sealed)]
        self._sealed -= len(data)
        return self._pwritev(file, [data], at, flags)


@pytest.mark.parametrize("what", LAST)
def test_short_writes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(os, "pwritev", disk := Disk(33))
    made(path, [*EARLIER, LAST[what]])
    assert disk.calls > 20
    assert found_in(path) == all_of([*EARLIER, LAST[what]])


@pytest.mark.parametrize("what", LAST)
def test_of_a_write_that_fails_nothing_is_there(
    path: Path, before: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    segment = emptied(path)
    assert all(segment.append(write) for write in EARLIER)
    facts = (held(segment), segment.end, segment.sequence)
    size = sum(len(stored) for part in LAST[what] for _, stored in part)
    for most in some(range(0, size, 11)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", Disk(1000, most))
            with pytest.raises(OSError, match="Input/output error"):
                segment.append(LAST[what])
        assert (held(segment), segment.end, segment.sequence) == facts
        assert found_in(path) == all_of(EARLIER)
    assert segment.append(LAST[what])
    assert held(segment) == found_in(path) == all_of([*EARLIER, LAST[what]])
    segment.close()


@pytest.mark.parametrize(
    "parts",
    [
        1,
        2,
    ],
)
def test_the_next_write_counts_even_where_a_failed_one_could_not_be_erased(
    path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """It reached the file whole, then the flush failed, and so did erasing it."""
    segment = emptied(path)
    pwritev = os.pwritev

    def late(*arguments: Any) -> int:
        pwritev(*arguments)
        return int(io_error())

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", late)
        patch.setattr(os, "pwrite", io_error)
        with pytest.raises(OSError, match="Input/output error"):
            segment.append([records_of(1, "a"), records_of(1, "b")][:parts])
    assert segment.offsets == {}
    assert segment.append([records_of(7, "b")])
    segment.close()
    assert found_in(path) == put_all([records_of(7, "b")])


def test_a_segment_that_could_not_be_truncated_has_no_room_until_it_could(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(path, EARLIER)
    segment = loaded(path)
    for most in (0, 10):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", Disk(1000, most))
            with pytest.raises(OSError, match="Input/output error"):
                segment.truncate(2)
        assert not segment.append([records_of(1, "a")])
        assert not segment.offsets
    segment.truncate(2)
    assert segment.append([records_of(9, "z")])
    segment.close()
    assert found_in(path) == put_all([records_of(9, "z")])
