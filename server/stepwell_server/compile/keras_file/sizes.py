"""Checks the unpacked size of a ``.keras`` file without unpacking it into memory."""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

import h5py

from stepwell_server.compile.errors import ModelError, quoted
from stepwell_server.files import archive_rules

OPTION = "--max-model-bytes"
#: Errors of zipfile for archives that are corrupt, encrypted or of an unknown kind.
UNREADABLE = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, struct.error, zlib.error)
_WEIGHTS = "model.weights.h5"
_KNOWN, _ASSETS = {"config.json", "metadata.json", _WEIGHTS}, "assets/"
_ARCHIVE = b"PK\x03\x04"
#: HDF5's built-in filters. It would load others as libraries, from any configured path.
_FILTERS = frozenset(range(1, 7)) | {h5py.h5z.FILTER_LZF}
_PIECE_BYTES = 1 << 20


def check_sizes(path: Path, max_bytes: int) -> None:
    """Check that the unpacked content of ``path`` is within ``max_bytes``. Takes little memory, whatever the file declares.

    Members must be those that Keras writes, and follow `archive_rules`; all weights must be in this file. Files that
    are not ``.keras`` files are not checked.

    Raises:
        ModelError: it is too large, or its declared sizes are wrong.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with archive_rules.open_archive(path) as archive, path.open("rb") as file:
            archive_rules.check_members(archive)
            _check_known(archive)
            _check_limit(path, sum(member.file_size for member in archive.infolist()), max_bytes)
            for member in archive.infolist():
                if not _size_is_true(file, member):
                    raise ModelError(
                        f"{path}: corrupt .keras file: {member.filename} does not have its declared size"
                    )
            if _WEIGHTS in archive.namelist():
                _check_weights(path, archive.read(_WEIGHTS), max_bytes)
    except UNREADABLE as error:
        raise ModelError(f"{path}: corrupt .keras file: {error}") from error


def _check_known(archive: zipfile.ZipFile) -> None:
    for member in archive.infolist():
        name = member.filename
        if name not in _KNOWN and not name.startswith(_ASSETS):
            raise archive_rules.ArchiveError(
                f"it must contain only members that Keras writes; it contains {name!r:.80}"
            )
        if name.startswith(_ASSETS) and member.file_size and not member.is_dir():
            with archive.open(member) as content:
                if content.read(len(_ARCHIVE)) == _ARCHIVE:
                    raise archive_rules.ArchiveError(
                        f"it must not contain another archive; {name!r:.80} is one"
                    )


def _check_limit(path: Path, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ModelError(
            f"{path}: its content must be at most {max_bytes} bytes when unpacked ({OPTION}); it is {size} bytes"
        )


def _size_is_true(file: IO[bytes], member: zipfile.ZipInfo) -> bool:
    """Whether a member unpacks to its declared size.

    zipfile returns at most that much, but inflates everything before truncating it.
    """
    if member.compress_type == zipfile.ZIP_STORED:  # Keras does not compress members
        return member.file_size == member.compress_size
    if member.compress_type != zipfile.ZIP_DEFLATED:
        raise zipfile.BadZipFile(f"{member.filename} is compressed by a method that Keras does not use")
    file.seek(member.header_offset)
    header = file.read(archive_rules.LOCAL_HEADER_BYTES)
    if len(header) < archive_rules.LOCAL_HEADER_BYTES:
        raise zipfile.BadZipFile(f"{member.filename} is truncated")
    file.seek(sum(struct.unpack("<2H", header[26:])), io.SEEK_CUR)
    return _inflated_bytes(file, member.compress_size, member.file_size) == member.file_size


def _inflated_bytes(file: IO[bytes], compressed: int, most: int) -> int:
    """Return the inflated size of the next ``compressed`` bytes; counting stops above ``most``."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    count = 0
    while not inflater.eof and count <= most:
        piece = inflater.unconsumed_tail
        if not piece:
            piece = file.read(min(_PIECE_BYTES, compressed))
            compressed -= len(piece)
            if not piece:
                break
        count += len(inflater.decompress(piece, _PIECE_BYTES))
    return count


def _check_weights(path: Path, content: bytes, max_bytes: int) -> None:
    """Check the weights: HDF5 can compress, store arrays sparsely, and link to other files."""
    size = 0

    def look(name: str, item: object) -> None:
        nonlocal size
        if isinstance(item, h5py.Group):
            # Check links here, because `visititems` does not show them.
            for key in item:
                if not isinstance(item.get(key, getlink=True), h5py.HardLink):
                    raise ModelError(
                        f"{path}: {_WEIGHTS} must contain its weights itself; {f'{name}/{key}'.strip('/')!r:.80} is a link"
                    )
        if isinstance(item, h5py.Dataset):
            settings = item.id.get_create_plist()
            filters = {settings.get_filter(number)[0] for number in range(settings.get_nfilters())}
            if item.dtype.kind == "O" or not filters <= _FILTERS:
                raise ModelError(
                    f"{path}: {_WEIGHTS} must contain plain numbers; {name!r:.80} is something else"
                )
            if item.external or item.is_virtual:
                raise ModelError(
                    f"{path}: {_WEIGHTS} must contain its weights itself; {quoted(name)} is in another file"
                )
            chunk = math.prod(item.chunks or ()) * item.dtype.itemsize
            size += max((item.size or 0) * item.dtype.itemsize, chunk)

    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            look("", file)
            file.visititems(look)
    except ModelError:
        raise
    except Exception as error:  # h5py raises many kinds of errors for corrupt files.
        raise ModelError(f"{path}: corrupt .keras file: {_WEIGHTS}: {error}") from error
    _check_limit(path, size, max_bytes)
