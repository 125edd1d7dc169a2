"""GroupCommit: what is committed together has become what it would have become one by one."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell_server.store.access.batches import groups_of, merged
from stepwell_server.store.base import Batch, End, LocalStore, Tombstone, Write
from stepwell_server.store.disk.lmdb import LmdbStore
from stepwell_server.store.memory import MemoryStore
from support.clock import ManualClock
from support.samples import examples

pytestmark = pytest.mark.stores("memory")

ids = st.sampled_from("abc")
some = st.lists(ids, max_size=2)
stones = st.builds(
    Tombstone,
    ids,
    st.sampled_from([End.EXPIRED, End.CLOSED]),
    st.just(1.0),
    closes=st.tuples(st.integers(1, 99)),
)
batches = st.builds(
    Batch,
    puts=st.lists(st.tuples(ids, st.binary(min_size=1, max_size=2)), max_size=2),
    deletes=some,
    forgets=some,
    tombstones=st.lists(stones, max_size=2),
    counts=st.lists(st.tuples(st.sampled_from("mn"), st.integers(-2, 2)), max_size=2),
    tenant_counts=st.lists(st.tuples(st.sampled_from(["\x1f", "m\x1f"]), st.integers(-2, 2)), max_size=2),
    documents=st.lists(st.tuples(ids, st.none() | st.binary(max_size=1)), max_size=2),
)


def content(store: LocalStore) -> list[object]:
    found: list[object] = [(i, store.get(i), store.tombstones([i])[0]) for i in "abc"]
    counts = [store.count_of(name) for name in ("m", "n", "\x1f", "m\x1f")]
    return [*found, store.count(), *counts, store.documents()]


def together(batches: Sequence[Batch]) -> list[Batch]:
    writes = [Write(Batch, 1, lambda _error: None) for _ in batches]
    for write, batch in zip(writes, batches, strict=True):
        write.batch = batch
    groups = groups_of(writes)
    assert [write for group in groups for write in group] == writes
    return [merged([write.batch for write in group]) for group in groups]


@settings(max_examples=examples(500))
@given(st.lists(batches, min_size=2, max_size=8))
def test_together_is_as_one_by_one(batches: list[Batch]) -> None:
    one_by_one, at_once = MemoryStore(), MemoryStore()
    for batch in batches:
        one_by_one.commit(batch)
    for batch in together(batches):
        at_once.commit(batch)
    assert content(at_once) == content(one_by_one)


@settings(max_examples=30)
@given(st.lists(st.lists(batches, min_size=1, max_size=6), min_size=1, max_size=6))
def test_so_it_is_on_disk(runs: list[list[Batch]]) -> None:
    one_by_one = MemoryStore()
    with tempfile.TemporaryDirectory() as folder:
        store = LmdbStore(Path(folder), durability="async", clock=ManualClock())
        for batches in runs:
            for batch in batches:
                one_by_one.commit(batch)
            for batch in together(batches):
                store.commit(batch)
            assert content(store) == content(one_by_one)
        store.close()


def test_what_has_nothing_to_do_with_each_other_is_one_transaction() -> None:
    made = [Batch(puts=[(f"s{i}", b"1")], forgets=[f"s{i}"], counts=[("m", 1)]) for i in range(100)]
    ended = [Batch(deletes=[f"t{i}"], tombstones=[Tombstone(f"t{i}", End.CLOSED, 1.0)]) for i in range(100)]
    assert len(together([*made, *ended])) == 1
    assert len(together([*ended, *made])) == 1
    assert len(together([*ended, Batch(puts=[("t5", b"1")])])) == 2
    assert len(together([*ended, Batch(forgets=["t5"])])) == 2
    named = [
        Batch(documents=[("t5", b"1")]),
        Batch(documents=[("t5", None)]),
        Batch(documents=[("t5", b"2")]),
    ]
    (batch,) = together([*ended, *named])
    assert batch.documents == [("t5", b"1"), ("t5", None), ("t5", b"2")], "a document is no session"


def test_nothing_that_a_batch_says_is_lost_where_several_are_committed_together() -> None:
    """A field that the merging forgets would be lost only beside other commits."""
    one = Batch(
        puts=[("a", b"1")],
        deletes=["b"],
        forgets=["c"],
        tombstones=[Tombstone("b", End.CLOSED, 1.0)],
        counts=[("m", 1)],
        tenant_counts=[("t", 1)],
        documents=[("d", b"1")],
        goes_back=True,
        follows=np.array([1], np.uint64),
        stamps=np.array([2], np.uint64),
        resized=["a"],
        delete_follows=np.array([3], np.uint64),
        undoes=["b"],
        min_idle_s=np.array([4.0]),
        max_idle_s=np.array([5.0]),
        documents_follow={"d": None},
    )
    nothing, both = Batch(), merged([one, Batch()])
    for field in dataclasses.fields(Batch):
        asked, kept = getattr(one, field.name), getattr(both, field.name)
        assert not np.array_equal(asked, getattr(nothing, field.name)), f"{field.name} is not tried"
        assert (
            np.array_equal(list(kept), list(asked))
            if isinstance(asked, (list, np.ndarray))
            else kept == asked
        ), field.name
