"""Writes 2,000 pages of a file that grows and flushes them, again and again, until its standard input ends.

    large_writes.py FILE

It is what a transaction of 2,000 new sessions does to the disk.
"""

from __future__ import annotations

import os
import random
import select
import sys

_PAGE, _PAGES, _FIRST = 4096, 2000, 16_384
_PAUSE_S = 0.015


def main() -> None:
    """Say one line when all is there that is not measured."""
    file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
    os.pwrite(file, bytes(_FIRST * _PAGE), 0)
    os.fsync(file)
    print("ready", flush=True)
    page, end = os.urandom(_PAGE), _FIRST
    while not select.select([sys.stdin], [], [], _PAUSE_S)[0]:
        for place in range(_PAGES):  # half of them are new
            os.pwrite(file, page, _PAGE * (end + place // 2 if place % 2 else random.randrange(_FIRST)))
        os.fsync(file)
        end += _PAGES // 2


if __name__ == "__main__":
    main()
