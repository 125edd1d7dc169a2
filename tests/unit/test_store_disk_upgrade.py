"""A data folder that another release wrote is opened: `tests/data` has one, with changes that are in its log alone.

It was written by commit fbb46f3 with segments of 4096 bytes and left as `kill -9` leaves it: sessions `a` (revision 2, in
the log), `b` (2, in the log) and a long id (0), and the tombstone of `c`.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from stepwell_server.store.base import End, Tombstone
from stepwell_server.store.disk.lmdb import Durability
from support.stored import DURABILITIES, in_lmdb, killed, opened, put, record, revisions

DATA = Path(__file__).parents[1] / "data" / "store-schema-2.tar.xz"
LONG = "é" * 256


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with tarfile.open(DATA) as archive:
        archive.extractall(tmp_path / "data", filter="data")
    return tmp_path / "data"


@DURABILITIES
def test_all_of_it_is_there_and_goes_on(path: Path, durability: Durability) -> None:
    store = opened(path, durability)
    assert revisions(store) == {"a": 2, "b": 2, LONG: 0}
    revision = 2 if durability == "sync" else 0
    assert in_lmdb(store) == {"a": revision, "b": revision, LONG: 0}, (
        "the log has been read; `sync` has others"
    )
    assert store.tombstones(["c"])[0] == Tombstone("c", End.CLOSED, 1.0)
    assert store.incarnation == "f40ec0e5"
    assert store.secret.hex() == "364e735f7df4d347193ef88136dadbdf19b8b65f55097f2dd7bcbf64fb8f8835"
    assert (store.count(), store.count_of("m")) == (3, 3)
    put(store, "a", revision=3)
    assert store.append([("b", record("b", 3))])
    store = killed(store, durability)
    assert revisions(store) == {"a": 3, "b": 3, LONG: 0}
    store.close()
