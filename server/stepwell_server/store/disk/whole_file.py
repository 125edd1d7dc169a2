"""Whether LMDB's data file has every page that is in use: reading one behind its end, through the map, would end the process.

A file may be shorter than its pages say and be whole all the same. A page that was taken at the end, and given back in the
same transaction, is never written; so it is with a session that changes and ends in one commit. Such a page is among the
free ones. LMDB says nothing of those, so they are read here, from the file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stepwell_server.store.base import StoreError

# What LMDB 0.9 writes, on machines of 64 bits, in their own byte order.
_PAGE = struct.Struct("=QHHHH")  # number, padding, flags, end of the pointers to nodes, begin of the nodes
_META = struct.Struct("=IIQQ")  # magic, version, address, size of the map; two databases follow
_DATABASE = struct.Struct("=IHHQQQQQ")  # bytes of a page, flags, depth, pages of three kinds, entries, root
_META_END = struct.Struct("=QQ")  # last page, transaction
_NODE = struct.Struct("=HHHH")  # low and high part of a size, or of a page's number; flags; bytes of the key
_NUMBER = struct.Struct("=Q")
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW = 1, 2, 4
_BIG = 1
_NO_ROOT = 2**64 - 1
_META_PAGES = 2
_MOST_LOOKS = 10


class _Damaged(Exception):
    """A page is not there, or none that can be read."""


class _Meta(NamedTuple):
    """What a transaction has left."""

    transaction: int
    last_page: int
    root: int
    """Of the database of free pages; `_NO_ROOT`: it is empty."""
    depth: int


def require_whole_file(environment: Any, data: Path) -> None:
    """Refuse a data file that was cut off. Others may write it meanwhile.

    Raises:
        StoreError: it lacks pages that are in use.
    """
    page_bytes = int(environment.stat()["psize"])
    wanted = (environment.info()["last_pgno"] + 1) * page_bytes
    found = data.stat().st_size
    if found >= wanted:
        return
    for _ in range(_MOST_LOOKS):
        with environment.begin() as transaction:  # which keeps pages from being used again
            found = data.stat().st_size
            try:
                is_whole = _is_whole(data, page_bytes, found, transaction.id())
            except _Damaged:
                is_whole = False
        if is_whole:
            return
        if is_whole is not None:
            break
    raise StoreError(f"{data} must have {wanted} bytes; it was cut off at {found}")


def _is_whole(data: Path, page_bytes: int, size: int, transaction: int) -> bool | None:
    """Whether all pages behind the end of the file are free; None if the transaction's last word is overwritten already."""
    file = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
    try:
        metas = [_meta(os.pread(file, page_bytes, page * page_bytes)) for page in range(_META_PAGES)]
        own = next((meta for meta in metas if meta is not None and meta.transaction == transaction), None)
        if own is None:
            return None
        missing = set(range(size // page_bytes, own.last_page + 1))
        if missing and own.root != _NO_ROOT:
            missing.difference_update(_free_pages(file, page_bytes, own.root, own.depth))
        return not missing
    finally:
        os.close(file)


def _meta(page: bytes) -> _Meta | None:
    at = _PAGE.size
    if len(page) < at + _META.size + 2 * _DATABASE.size + _META_END.size:
        return None
    magic, version, *_ = _META.unpack_from(page, at)
    if (magic, version) != (_MAGIC, _VERSION):
        return None
    _, _, depth, _, _, _, _, root = _DATABASE.unpack_from(page, at + _META.size)
    last_page, transaction = _META_END.unpack_from(page, at + _META.size + 2 * _DATABASE.size)
    return _Meta(transaction, last_page, root, depth)


def _free_pages(file: int, page_bytes: int, number: int, depth: int) -> Iterator[int]:
    """Numbers of the free pages that are listed in a page of their database, and in those below it.

    Raises:
        _Damaged: a page is not there, or none of such a database.
    """
    page = os.pread(file, page_bytes, number * page_bytes)
    if len(page) < page_bytes or depth < 1:
        raise _Damaged
    its_number, _, flags, pointers_end, _ = _PAGE.unpack_from(page)
    if its_number != number or flags & (_BRANCH | _LEAF) != (_LEAF if depth == 1 else _BRANCH):
        raise _Damaged
    try:
        for (node,) in struct.iter_unpack("=H", page[_PAGE.size : pointers_end]):
            low, high, node_flags, key_bytes = _NODE.unpack_from(page, node)
            if depth > 1:
                yield from _free_pages(file, page_bytes, low | high << 16 | node_flags << 32, depth - 1)
                continue
            start, size = node + _NODE.size + key_bytes, low | high << 16
            value = page[start : start + size]
            if node_flags & _BIG:
                value = _overflow(file, page_bytes, _NUMBER.unpack_from(page, start)[0], size)
            (count,) = _NUMBER.unpack_from(value)
            yield from struct.unpack_from(f"={count}Q", value, _NUMBER.size)
    except struct.error as error:
        raise _Damaged from error


def _overflow(file: int, page_bytes: int, number: int, size: int) -> bytes:
    found = os.pread(file, _PAGE.size + size, number * page_bytes)
    if len(found) < _PAGE.size + size or not _PAGE.unpack_from(found)[2] & _OVERFLOW:
        raise _Damaged
    return found[_PAGE.size :]
