"""Commits to a store that must be awaited: a few at the same time, none that name the same."""

from __future__ import annotations

import asyncio

from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.store.base import Batch
from stepwell_server.store.memory import MemoryStore
from support.awaited import RemoteStore
from support.fake_executor import WAIT_S


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
    store.let_go()
    await asyncio.wait_for(commits.idle(), WAIT_S)
    assert store.most_at_once == 2
    assert sorted(told[:2]) == ["first", "session"]
    assert told[2:] == ["same"]
    assert await store.documents() == {"a": b"2"}
    assert commits.close(0)
