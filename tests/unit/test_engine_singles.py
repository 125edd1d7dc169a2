"""Steps of one session: what many callers send at the same time is run together, and each is answered alone."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import Select
from stepwell_server.errors import (
    DeadlineExceeded,
    Internal,
    SessionExpired,
    SessionNotFound,
)
from support.checks.model_of_sessions import initial
from support.engine.fake_executor import BROKEN, WAIT_S
from support.engine.harness import BOTH_WAYS, Harness, fails, running, x


@BOTH_WAYS
@pytest.mark.parametrize("company", [False, True])
async def test_an_executor_that_breaks_is_answered_and_the_next_step_runs(
    threads: bool, company: bool
) -> None:
    async with running(threads=threads) as at:
        await at.open("a", "b")
        broken = at.single("a", [[BROKEN, 0]])
        other = at.single("b", x(1)) if company else None
        await fails(broken.only(), Internal, r"^internal error [0-9a-f]{12}; ")
        if other is not None:
            with pytest.raises(Internal):  # they shared a pass
                await other.only()
        assert (await at.state("a"))["sum"].tobytes() == initial(1).tobytes()
        assert (await at.single("a", x(1), expected=0).only()).revision == 1


@pytest.mark.engine(threads=True)
async def test_each_single_step_has_a_deadline_of_its_own(at: Harness) -> None:
    await at.open("a", "b", "c")
    await at.begin_pass("c", x(1))
    now = at.clock.monotonic()
    late = [at.single("a", x(1), deadline=now + 1), at.single("c", x(1), deadline=now + 1)]
    in_time = at.single("b", x(1), deadline=now + 3)
    at.clock.advance(2)
    at.hooks.open_gate()
    for answer in late:
        await fails(answer.only(), DeadlineExceeded)
    assert (await in_time.only()).revision == 1


@pytest.mark.engine(threads=True)
async def test_a_session_closed_while_its_step_waits(at: Harness) -> None:
    await at.open("a", "b")
    await at.begin_pass("b", x(1))
    step = at.single("a", x(1))
    closing = asyncio.create_task(at.engine.close_session("a"))
    await asyncio.sleep(0)
    after = at.submit("b", x(1))
    at.hooks.open_gate()
    assert (await step.only()).revision == 1, "what was received before the closing is done before it"
    assert await closing is False
    assert (await after.only()).revision == 2
    with pytest.raises(SessionNotFound):
        await at.single("a", x(1)).only()


KINDS = ["plain", "long", "last", "frame", "reset", "get", "fork"]


@BOTH_WAYS
@pytest.mark.parametrize("seed", range(12))
async def test_whatever_a_session_is_sent_is_applied_in_the_order_received(threads: bool, seed: int) -> None:
    """Each change expects the revision after the one before: whichever is out of order is refused."""
    rng = np.random.default_rng(seed)
    async with running(threads=threads, compute_threads=1) as at:
        await at.open("a", "b", "busy")
        if threads:
            await at.begin_pass("busy", x(1))
        revision = 0
        changes: list[Any] = []
        reads: list[tuple[int, asyncio.Task[Any]]] = []
        for i, kind in enumerate(rng.choice(KINDS, 14)):
            at.single("b", x(1), select=[Select.LAST, Select.ALL][i % 2])  # company, in groups of other kinds
            if kind in ("get", "fork"):
                call = (
                    at.engine.get_state("a")
                    if kind == "get"
                    else at.engine.fork("a", new_session_id=f"fork{i}")
                )
                reads.append((revision, asyncio.create_task(call)))
                await asyncio.sleep(0)
                continue
            changes.append(change_of(at, kind, revision))
            revision += 1
        at.hooks.open_gate()
        for i, answers in enumerate(changes):
            assert (await answers.only()).revision == i + 1
        for wanted, task in reads:
            assert (await asyncio.wait_for(task, WAIT_S)).session.revision == wanted


def change_of(at: Harness, kind: str, expected: int) -> Any:
    if kind == "plain":
        return at.single("a", x(1), expected=expected)
    if kind == "long":
        return at.single("a", x(1, 3), expected=expected)
    if kind == "last":
        return at.single("a", x(1), expected=expected, select=Select.LAST)
    if kind == "frame":
        return at.submit("a", x(1), expected=expected)
    return at.submit("a", reset=True, expected=expected)


@pytest.mark.engine(threads=True, max_session_idle_s=10)
async def test_a_step_whose_session_expired_while_it_waited_is_told_so(at: Harness) -> None:
    await at.open("a", "busy")
    at.clock.advance(6)
    await at.begin_pass("busy", x(1))
    step, frame = at.single("a", x(1)), at.submit(["a"], x(1, 3))
    at.clock.advance(5)
    assert (await at.internals.expire_idle()) == 1, "nobody else has its handle now"
    at.hooks.open_gate()
    for answers in (step, frame):
        await fails(answers.only(), SessionExpired)
