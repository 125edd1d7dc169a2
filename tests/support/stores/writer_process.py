"""Writes into a store until it is killed: the process of `tests/fault/test_store_kill.py`, and what its commits hold.

Every commit replaces all sessions, and grows the file now and then; some delete one and bury one as well, and replace
documents. Session i of commit r holds r, so a commit that came through by half shows. Each is said on stdout once it is
acknowledged.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from stepwell_server.clock import SystemClock
from stepwell_server.store.base import Batch, End, Tombstone
from stepwell_server.store.changes import Window, field_of, joined
from stepwell_server.store.disk.lmdb import Durability, LmdbStore
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.record import CHANGE_VERSION
from support.stores.records import Record, decode

SESSIONS, WINDOW = 40, 79


class Kind(NamedTuple):
    """A store and the changes to it."""

    segment_bytes: int
    """0 for LMDB alone."""
    period: int
    """At this interval of commits one session replaces another; the others change those that are there."""
    growth_bytes: int
    whole_period: int = 1
    """At this interval of commits records have whole rows; the others are changes."""


#: An entry is a third of a segment, so that a kill is as likely to come while segments rotate as at any other time.
KINDS = {
    "lmdb": Kind(0, 1, 3000),
    "segments": Kind(128 * 1024, 7, 30),
    "changes": Kind(64 * 1024, 7, 30, whole_period=9),
    "changes in lmdb": Kind(0, 5, 300, whole_period=9),
}


BESIDE = "beside"


def opened(path: Path, durability: Durability, kind: Kind) -> LmdbStore | DiskStore:
    clock, first_map_bytes = SystemClock(), 256 * 1024
    if not kind.segment_bytes:
        return LmdbStore(path, durability=durability, clock=clock, first_map_bytes=first_map_bytes)
    return DiskStore(
        path,
        durability=durability,
        clock=clock,
        first_map_bytes=first_map_bytes,
        segment_bytes=kind.segment_bytes,
    )


def batch(number: int, kind: Kind) -> Batch:
    latest = number - number % kind.period
    names = [f"s{i}" for i in range(SESSIONS)] + ["é" * 256, f"of-{latest}"]
    puts = [(name, encoded(name, number, kind)) for name in names[:-1]]
    puts.append((names[-1], encoded(names[-1], number, kind, is_new=number == latest)))
    if number != latest:
        return Batch(puts=puts)
    gone = f"of-{latest - kind.period}"
    return Batch(
        puts=puts,
        deletes=[gone],
        tombstones=[Tombstone(gone, End.CLOSED, 0.0, revision=number)],
        documents=[("latest", content(number)), (f"of-{number}", b""), (gone, None)],
    )


def encoded(name: str, number: int, kind: Kind, *, is_new: bool = False) -> bytes:
    """The record of a session, or its change."""
    whole = record(number, kind)
    if is_new or not number % kind.whole_period:
        return whole.encode(name)
    rows = whole.rows[:8] + whole.rows[-8:]
    field = field_of([Window(8, 8 * WINDOW, 8)], 1)
    return dataclasses.replace(whole, rows=rows, fields=field).encode(name, CHANGE_VERSION)


def content(number: int) -> bytes:
    return number.to_bytes(8, "little") * (number % 5 * 500)


def record(number: int, kind: Kind) -> Record:
    return Record(
        fingerprint="f" * 64,
        model="m",
        batch_size=1,
        revision=number,
        position=number,
        request_id=number + 1,
        opened_with=0,
        created=0.0,
        last_used=0.0,
        reply=1,
        rows=b"".join(each.to_bytes(8, "little") for each in (number, *range(number, number + WINDOW))),
        extra=b"x" * (number % 7 * kind.growth_bytes),
    )


def held(store: LmdbStore | DiskStore, kind: Kind) -> int:
    """The number of the commit that the store holds, every part of it and of no other; -1 for none."""
    names = [key.decode() for key in store.heads(limit=1000).keys]
    if not names:
        return -1
    first = store.get("s0")
    assert first is not None
    number = decode("s0", joined("s0", first)).revision
    assert sorted(names) == sorted(name for name, _ in batch(number, kind).puts)
    for name in names:
        stored = store.get(name)
        assert stored is not None
        assert decode(name, joined(name, stored)) == record(number, kind)
    latest = number - number % kind.period
    stone = store.tombstones([f"of-{latest - kind.period}"])[0]
    assert stone is not None
    assert stone.revision == latest
    assert store.tombstones([f"of-{latest}"])[0] is None
    assert store.documents() == {"latest": content(latest), f"of-{latest}": b""}
    return number


def held_beside(store: DiskStore | LmdbStore) -> tuple[int, int]:
    """The numbers of the last commit and of the last append, each there as a whole; -1 for none."""
    names = [key.decode() for key in store.heads(limit=1000).keys]
    numbers = {name: decode(name, store.get(name) or b"").revision for name in names}
    appended = {numbers[name] for name in numbers if name.startswith("w")}
    if not names:
        return -1, -1
    assert len(appended) == 1, "all of an append or nothing"
    assert sum(name.startswith("of-") for name in names) == 1
    assert f"of-{numbers['m']}" in names
    return numbers["m"], appended.pop()


def _write(path: Path, durability: Durability, kind: Kind) -> None:
    store = opened(path, durability, kind)
    number = held(store, kind)
    while True:
        number += 1
        store.commit(batch(number, kind))
        os.write(1, b"%d\n" % number)
        if number % 3:
            store.checkpoint()


def _write_beside(path: Path, durability: Durability) -> None:
    """One thread begins and ends sessions, and checkpoints; the other appends to the log."""
    kind = KINDS["segments"]
    store = opened(path, durability, kind)
    committed, appended = held_beside(store)
    writers = [f"w{i}" for i in range(SESSIONS)]

    def named(names: list[str], number: int) -> list[tuple[str, bytes]]:
        return [(name, record(number, kind).encode(name)) for name in names]

    if committed < 0:
        committed = appended = 0
        store.commit(Batch(puts=named(["m", "of-0", *writers], 0), counts=[("m", 2 + len(writers))]))
        os.write(1, b"c0\na0\n")
    handed: queue.SimpleQueue[int] = queue.SimpleQueue()
    kept = threading.Semaphore(0)

    def append(number: int) -> None:
        while True:
            number += 1
            if not store.append(named(writers, number)):  # there is no room: whoever commits makes some
                handed.put(number)
                kept.acquire()
            os.write(1, b"a%d\n" % number)

    threading.Thread(target=append, args=[appended], daemon=True).start()
    while True:
        committed += 1
        store.commit(Batch(puts=named(["m", f"of-{committed}"], committed), deletes=[f"of-{committed - 1}"]))
        os.write(1, b"c%d\n" % committed)
        store.checkpoint()
        while not handed.empty():
            store.commit(Batch(puts=named(writers, handed.get())))
            kept.release()


if __name__ == "__main__":
    _durability: Durability = "sync" if sys.argv[2] == "sync" else "async"
    if sys.argv[3] == BESIDE:
        _write_beside(Path(sys.argv[1]), _durability)
    _write(Path(sys.argv[1]), _durability, KINDS[sys.argv[3]])
