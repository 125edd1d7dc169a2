"""Commits to a store that must be awaited: a few at the same time, none that name the same."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable

import pytest

from stepwell_server.engine.commit.group_commit import GroupCommit
from stepwell_server.errors import ServerError, Unavailable
from stepwell_server.store.base import ALL_KEPT, Batch, CommitResult
from stepwell_server.store.memory import MemoryStore
from support.engine.fake_executor import WAIT_S
from support.stores.fake_shared_store import RemoteStore
from support.stores.valkey_store import stamps


async def test_a_document_is_never_in_two_commits_at_a_time() -> None:
    store, told = RemoteStore(MemoryStore()), list[str]()
    commits = GroupCommit(store)

    def submit(name: str, batch: Batch) -> None:
        commits.submit(lambda: batch, 1, lambda _: told.append(name))

    store.commits_held = True
    submit("first", Batch(documents=[("a", b"1")]))
    await store.until("commit")
    submit("same", Batch(documents=[("a", b"2")]))
    submit("session", Batch(deletes=["a"]))
    await store.until("commit", 2)
    assert [ids for kind, ids in store.calls if kind == "commit"] == [(), ("a",)], (
        "a session of its name is another thing"
    )
    store.release()
    await asyncio.wait_for(commits.idle(), WAIT_S)
    assert store.max_commits == 2
    assert sorted(told[:2]) == ["first", "session"]
    assert told[2:] == ["same"]
    assert await store.documents() == {"a": b"2"}
    assert await store.end_commits(WAIT_S)


async def test_one_commit_begins_at_once_and_the_next_ones_together() -> None:
    store, told = RemoteStore(MemoryStore()), list[CommitResult | ServerError]()
    commits = GroupCommit(store)
    store.commits_held = True
    for name in "abc":
        commits.submit(functools.partial(_ending, name), 1, told.append)
    await store.until("commit", 2)
    assert [ids for kind, ids in store.calls if kind == "commit"] == [("a",), ("b", "c")]
    store.release()
    await asyncio.wait_for(commits.idle(), WAIT_S)
    assert told == [ALL_KEPT] * 3


async def test_a_batch_that_the_store_does_not_take_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    store, told = RemoteStore(MemoryStore()), list[CommitResult | ServerError]()
    commits, commit = GroupCommit(store), store.apply

    def taken(batch: Batch) -> Awaitable[CommitResult]:
        if batch.session_ids == ["bad"]:
            raise Unavailable("not this one")
        return commit(batch)

    monkeypatch.setattr(store, "apply", taken)
    for name in ("bad", "good"):
        commits.submit(functools.partial(_ending, name), 1, told.append)
    await asyncio.wait_for(commits.idle(), WAIT_S)
    assert [str(told[0]), told[1]] == ["not this one", ALL_KEPT]
    assert await store.end_commits(WAIT_S)


def _ending(session_id: str) -> Batch:
    return Batch(deletes=[session_id], delete_follows=stamps(0))
