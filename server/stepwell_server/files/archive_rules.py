"""Rules for uploaded zip archives, checked from the directory before anything is unpacked.

Tools disagree about archives that break these rules: one may check other content than another one uses. So members must
have unique names, must not overlap, must be plain files, and must not lead outside.
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

MAX_MEMBERS = 10_000
_MAX_DIRECTORY_BYTES = 4 << 20
_MAX_NAME = 512
_ENCRYPTED = 0x1 | 0x40
LOCAL_HEADER_BYTES = 30
_END = b"PK\x05\x06"
_END_RECORD = struct.Struct("<4s4H2LH")
_END_64_LOCATOR = struct.Struct("<4sLQL")
_END_64_RECORD = struct.Struct("<4sQ2H2L4Q")
_END_64 = b"PK\x06\x06"
_MAX_COMMENT = 1 << 16
_UNIX = 3


class ArchiveError(ValueError):
    """An archive breaks a rule. The message is a clause."""


def open_archive(path: Path) -> zipfile.ZipFile:
    """Open an archive, unless its directory is too large to read.

    Raises:
        ArchiveError: it is too large.
        OSError: it cannot be read.
        zipfile.BadZipFile: it is not an archive.
    """
    with path.open("rb") as file:
        _check_directory(file)
    return zipfile.ZipFile(path)


def open_archive_in(file: IO[bytes]) -> zipfile.ZipFile:
    """As `open_archive`, for an open file, which stays open."""
    _check_directory(file)
    return zipfile.ZipFile(file)


def _check_directory(file: IO[bytes]) -> None:
    size = _directory_bytes(file)
    if size > _MAX_DIRECTORY_BYTES:
        raise ArchiveError(f"its directory must be at most {_MAX_DIRECTORY_BYTES} bytes; it is {size} bytes")


def _directory_bytes(file: IO[bytes]) -> int:
    """Return the size of an archive's directory, from the record that zipfile uses; 0 if there is none."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - _MAX_COMMENT - _END_RECORD.size)
    file.seek(start)
    tail = file.read()
    # zipfile first tries a record at the very end, then one with a comment.
    last = len(tail) - _END_RECORD.size
    has_no_comment = last >= 0 and tail[last : last + 4] == _END and tail.endswith(b"\0\0")
    at = last if has_no_comment else tail.rfind(_END)
    if at < 0 or at + _END_RECORD.size > len(tail):
        return 0
    declared: int = _END_RECORD.unpack_from(tail, at)[5]
    record = start + at - _END_64_LOCATOR.size - _END_64_RECORD.size
    if record < 0:
        return declared
    file.seek(record)
    found = _END_64_RECORD.unpack(file.read(_END_64_RECORD.size))
    return max(declared, found[8]) if found[0] == _END_64 else declared


def check_members(archive: zipfile.ZipFile) -> None:
    """Check names, kinds and positions of all members. Reads only headers.

    Raises:
        ArchiveError: one breaks a rule.
    """
    entries = archive.infolist()
    if len(entries) > MAX_MEMBERS:
        raise ArchiveError(f"it must have at most {MAX_MEMBERS} members; it has {len(entries)}")
    seen = set[str]()
    for entry in entries:
        name = entry.filename
        if not _is_plain(name) or not _is_plain(entry.orig_filename):
            raise ArchiveError(
                f"its members must have plain names that do not lead outside; got {name!r:.80}"
            )
        if name.lower() in seen:
            raise ArchiveError(f"its members must have different names; {name!r:.80} appears twice")
        seen.add(name.lower())
        if entry.flag_bits & _ENCRYPTED:
            raise ArchiveError(f"its members must not be encrypted; {name!r:.80} is")
        if not _is_file(entry):
            raise ArchiveError(f"its members must be files; {name!r:.80} is a link or a device")
    _check_places(archive, entries)


def _is_plain(name: str) -> bool:
    parts = name.removesuffix("/").split("/")
    return (
        len(name) <= _MAX_NAME
        and not {"", ".", ".."} & set(parts)
        and not any(ord(letter) < 32 or letter in "\\:\x7f" for letter in name)
    )


def _is_file(entry: zipfile.ZipInfo) -> bool:
    """Whether a member is a file or a folder. Not every tool records the kind."""
    kind = stat.S_IFMT(entry.external_attr >> 16)
    return entry.create_system != _UNIX or kind in {0, stat.S_IFREG, stat.S_IFDIR}


def _check_places(archive: zipfile.ZipFile, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse overlapping members, with which few bytes could unpack to many."""
    end = 0
    for entry in sorted(entries, key=lambda each: each.header_offset):
        if entry.header_offset < end:
            raise ArchiveError(f"its members must not overlap; {entry.filename!r:.80} does")
        end = entry.header_offset + LOCAL_HEADER_BYTES + entry.compress_size
    if end > archive.start_dir:
        raise ArchiveError("its members must end before its directory; the last one does not")
