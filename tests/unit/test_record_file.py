"""Files of records: what was written is read, and nothing else is, whatever byte of the file is another or missing."""

from __future__ import annotations

import io

import pytest

from stepwell._admin import record_file
from stepwell._admin.record_file import Format, Kind, RecordFileError

FORMAT = Format("things", 7, "a file of things")
LINE = b"stepwell things 7\n"
RECORDS = [
    (Kind.DOCUMENT, b"", b""),
    (Kind.SESSION, b"a", b"x"),
    (Kind.SESSION, "\u00e9".encode(), bytes(range(61))),
    (Kind.TOMBSTONE, b"n" * 65_535, b"yz"),
]


def written() -> bytes:
    file = io.BytesIO()
    writer = record_file.Writer(file, FORMAT, {"some": "thing"})
    for kind, name, record in RECORDS:
        writer.put(kind, name, record)
    writer.end()
    assert writer.bytes == len(file.getvalue())
    return file.getvalue()


def read(data: bytes) -> list[record_file.Entry]:
    return list(record_file.read(io.BytesIO(data), FORMAT))


def test_what_was_written_is_read() -> None:
    start, *entries = read(written())
    assert record_file.content_of(start, FORMAT) == {"some": "thing"}
    assert [(entry.kind, entry.name, entry.record) for entry in entries] == RECORDS
    assert all(entry.at % 8 == len(LINE) % 8 for entry in entries)


def test_any_other_byte_and_any_end_is_damage() -> None:
    data = written()
    name = data.index(b"n" * 100)
    places = [place for place in range(len(data)) if not name + 100 < place < name + 65_000]
    for place in places:
        for bit in (1, 128):
            changed = bytearray(data)
            changed[place] ^= bit
            with pytest.raises(RecordFileError):
                read(bytes(changed))
        with pytest.raises(RecordFileError):
            read(data[:place])
    with pytest.raises(RecordFileError, match="something follows its end"):
        read(data + b"\0")


def test_entries_must_be_those_of_the_file_in_their_order() -> None:
    data = written()
    magic = record_file.MAGIC.to_bytes(4, "little")
    starts = [at - 4 for at in range(len(data)) if data.startswith(magic, at)]
    entries = [data[at:end] for at, end in zip(starts, [*starts[1:], len(data)], strict=True)]
    for some in (
        entries[1:],
        [*entries[:2], *entries[3:]],
        [entries[0], entries[2], entries[1], *entries[3:]],
    ):
        with pytest.raises(RecordFileError, match="not the one that was written there"):
            read(LINE + b"".join(some))


@pytest.mark.parametrize("start", [[1], "text", None])
def test_a_start_is_an_object(start: object) -> None:
    file = io.BytesIO()
    writer = record_file.Writer(file, FORMAT, start)  # type: ignore[arg-type]
    writer.end()
    with pytest.raises(RecordFileError, match="at byte 18: an entry must be an object of JSON"):
        read(file.getvalue())


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"stepwell things 8\n", ", of format 7; it is of 8, which the release that wrote it reads"),
        (b"stepwell things 123\nmore", ", of format 7; it is of 123, which"),
        (b"stepwell things 6", ", of format 7; it is of 6, which"),
        (b"stepwell things 7", "; it begins otherwise"),
        (b"", "; it begins otherwise"),
        (b"stepwell", "; it begins otherwise"),
        (b"stepwell other 7\n", "; it begins otherwise"),
        (b"stepwell things x\n", "; it begins otherwise"),
        (b"\xff" * 100, "; it begins otherwise"),
        (b"stepwell things 7\n", ", unchanged; at byte 18: its end is missing"),
    ],
)
def test_another_line_is_another_file(line: bytes, problem: str) -> None:
    with pytest.raises(RecordFileError, match=f"^must be a file of things{problem}"):
        read(line)
