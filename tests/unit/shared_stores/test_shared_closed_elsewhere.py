"""What is said of sessions that were closed on another server while something is under way for them here, or while they are in the table."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stepwell_server.engine.sessions.transfer import ExistingPolicy, ImportOutcome, SessionRecord
from stepwell_server.errors import ServerError, SessionNotFound
from support.engine.harness import Answers, Harness, fails, x
from support.engine.two_engines import make_resident_on_both
from support.stores.durable import begun
from support.stores.gates import Gated
from support.stores.kinds import SHARED

pytestmark = SHARED


async def closed_behind(first: Harness, second: Harness) -> Answers:
    """The first closes a session for which a step of the second waits for the store: its answers."""
    if "a" not in second.internals.loaded():
        await make_resident_on_both(first, second, "a")
    store: Gated = second.store
    before = len(store.asked("commit"))
    store.commits_held = True
    step = second.submit("a", x(1))
    await store.until("commit", before + 1)
    await first.engine.close_session("a")
    return step


async def told(second: Harness, call: Any, step: Answers) -> Any:
    """What a call is told, when what is under way has ended."""
    before = len(second.store.asked("read"))
    task: asyncio.Task[Any] = await begun(call)
    await second.store.until("read", before + 1)
    for _ in range(20):  # it has seen what the store says, and goes on as far as it can
        await asyncio.sleep(0)
    second.store.let_go()
    await fails(step.only(), SessionNotFound)
    return await asyncio.wait_for(task, 60)


async def test_many_are_opened(first: Harness, second: Harness) -> None:
    step = await closed_behind(first, second)
    opened = await told(
        second, second.engine.open_sessions("plain", session_ids=["a", "b"], request_id=3), step
    )
    assert opened.revisions.tolist() == [2, 0]
    assert (await first.step("a", x(1), expected=2)).revision == 3


async def test_it_may_be_forked_to(first: Harness, second: Harness) -> None:
    await first.open("source")
    step = await closed_behind(first, second)
    fork = second.engine.fork("source", new_session_id="a", request_id=3)
    assert (await told(second, fork, step)).session.revision == 2


async def test_many_may_be_forked_to(first: Harness, second: Harness) -> None:
    await first.open("source")
    step = await closed_behind(first, second)
    fork = second.engine.fork_sessions(["source", "source"], new_session_ids=["a", "b"], request_id=3)
    assert (await told(second, fork, step)).revisions.tolist() == [2, 0]


@pytest.mark.parametrize("many", [False, True])
async def test_it_is_not_forked(many: bool, first: Harness, second: Harness) -> None:
    step = await closed_behind(first, second)
    if not many:
        fork: Any = second.engine.fork("a", new_session_id="b", request_id=3)
    else:
        fork = second.engine.fork_sessions(["a"], new_session_ids=["b"], request_id=3)
    await fails(told(second, fork, step), SessionNotFound, "session 'a' was closed")


async def test_the_session_is_forked_that_has_the_id_now(first: Harness, second: Harness) -> None:
    """Also where the fork waits in the line of the one that was closed."""
    step = await closed_behind(first, second)
    await first.open("a", batch_size=2)
    fork = second.engine.fork("a", new_session_id="b", request_id=3)
    assert (await told(second, fork, step)).session.batch_size == 2


@pytest.mark.parametrize("existing", list(ExistingPolicy))
async def test_it_is_imported(existing: ExistingPolicy, first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a")
    (record,) = await first.engine.export_sessions(["a"], deadline=float("inf"))
    assert not isinstance(record, ServerError)
    step = await closed_behind(first, second)
    arriving = [SessionRecord("a", "a", bytes(record))]
    assert await told(second, second.engine.import_sessions(arriving, existing), step) == [
        ImportOutcome.IMPORTED
    ]
    assert (await first.engine.session_info("a")).revision == 1


@pytest.mark.parametrize("is_busy", [False, True])
async def test_it_is_not_exported_and_it_is_said_why(is_busy: bool, first: Harness, second: Harness) -> None:
    if is_busy:
        step = await closed_behind(first, second)
        (why,) = await told(second, second.engine.export_sessions(["a"], deadline=float("inf")), step)
    else:
        await make_resident_on_both(first, second, "a")
        await first.engine.close_session("a")
        (why,) = await second.engine.export_sessions(["a"], deadline=float("inf"))
    assert isinstance(why, SessionNotFound)
    assert why.message == "session 'a' was closed"
