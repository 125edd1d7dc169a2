"""Many sessions are resumed by one call, and those that are not live are opened: all of these or none."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import OpenManyResult
from stepwell_server.errors import InvalidInput, SessionExists
from support.engine.fake_executor import PLAIN, RICH
from support.engine.harness import Harness, fails, x
from support.stores.durable import begun


async def resume(at: Harness, ids: Sequence[str], **fields: Any) -> OpenManyResult:
    return await at.engine.open_sessions("plain", session_ids=ids, resume=True, **fields)


async def test_live_sessions_are_taken_up_where_they_are_and_the_others_opened(at: Harness) -> None:
    await at.open("a", "b")
    await at.step("a", x(1))
    await at.step("a", x(1))
    await at.step("b", x(1))
    opened = await resume(at, ["b", "new", "a"])
    assert list(opened.session_ids) == ["b", "new", "a"]
    assert opened.revisions.tolist() == opened.positions.tolist() == [1, 0, 2]
    assert opened.resumed is not None
    assert opened.resumed.tolist() == [True, False, True]
    assert opened.versions is None
    assert (await at.step("a", x(1))).revision == 3
    assert (await at.step("new", x(1))).revision == 1


async def test_all_of_them_may_be_new_or_live(at: Harness) -> None:
    assert (await resume(at, ["a", "b"])).resumed is None
    again = await resume(at, ["a", "b"])
    assert again.resumed is not None
    assert again.resumed.all()


async def test_the_same_request_again_says_what_it_opened(at: Harness) -> None:
    """An answer was lost: what this very request opened was not there before."""
    await at.open("a")
    first = await resume(at, ["a", "b"], request_id=7)
    again = await resume(at, ["a", "b"], request_id=7)
    assert first.resumed is not None
    assert again.resumed is not None
    assert first.resumed.tolist() == again.resumed.tolist() == [True, False]
    assert (await at.engine.list_sessions())[1] == 2


@pytest.mark.engine({"plain": PLAIN, "rich": RICH})
async def test_what_cannot_be_resumed_is_named_and_nothing_is_opened(at: Harness) -> None:
    await at.open("a")
    await at.engine.open_session("rich", session_id="b")
    await at.engine.open_session("plain", session_id="c", batch_size=3)
    caught = await fails(resume(at, ["a", "new", "b", "c"]), SessionExists)
    assert str(caught) == (
        "session_ids must name new sessions, or live ones to resume of model 'plain' with batch_size 1;"
        " session 'b' (index 2) has model 'rich', version 1, and batch_size 1;"
        " session 'c' (index 3) has model 'plain', version 1, and batch_size 3"
    )
    assert (await at.engine.list_sessions())[1] == 3


async def test_without_ids_there_is_nothing_to_resume(at: Harness) -> None:
    await fails(
        at.engine.open_sessions("plain", count=2, resume=True),
        InvalidInput,
        r"^resume must come with session_ids; got none",
    )


async def test_a_session_that_ended_begins_anew_with_a_revision_of_its_own(at: Harness) -> None:
    await at.open("a", "b")
    await at.step("a", x(1))
    await at.engine.close_session("a")
    opened = await resume(at, ["a", "b"])
    assert opened.resumed is not None
    assert opened.resumed.tolist() == [False, True]
    assert opened.positions.tolist() == [0, 0]
    assert opened.revisions[0] > 1, "no handle of the closed one can step it"


@pytest.mark.stores("fake_shared")
async def test_what_another_server_changed_is_taken_up_as_it_is_there(
    first: Harness, second: Harness
) -> None:
    await first.open("a", "b")
    await first.step("a", x(1))
    assert (await second.step("a", x(1))).revision == 2
    opened = await resume(first, ["b", "a", "c"])
    assert opened.revisions.tolist() == [0, 2, 0]
    assert (await second.step("c", x(1))).revision == 1


@pytest.mark.stores("fake_shared")
async def test_one_that_another_server_opens_meanwhile_is_resumed(first: Harness, second: Harness) -> None:
    second.store.commits_held = True
    slow = await begun(resume(second, ["x", "a", "y"]))
    await second.store.until("commit")
    await first.open("a")
    await first.step("a", x(1))
    second.store.let_go()
    opened = await slow
    assert opened.resumed is not None
    assert opened.resumed.tolist() == [False, True, False]
    assert opened.revisions.tolist() == [0, 1, 0]


async def test_calls_at_the_same_time_open_each_session_once(at: Harness) -> None:
    ids = [f"s{number}" for number in range(40)]
    every = await asyncio.gather(*(resume(at, ids[start:]) for start in range(0, 40, 10)))
    made = np.zeros(40, np.intp)
    for start, opened in zip(range(0, 40, 10), every, strict=True):
        made[start:] += 1 if opened.resumed is None else ~opened.resumed
    assert made.tolist() == [1] * 40
