"""Steps of one session: what many callers send at the same time is run together, and each is answered alone."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import Select
from stepwell_server.engine.change import Awaited, Change
from stepwell_server.errors import (
    DeadlineExceeded,
    Internal,
    InvalidInput,
    Overloaded,
    RevisionConflict,
    ServerError,
    SessionExpired,
    SessionNotFound,
    Unavailable,
)
from support.engine import BOTH_WAYS, Answer, Harness, running, x
from support.fake_executor import BROKEN, RICH
from support.model_of_sessions import initial, ran


def shown(answer: Answer | ServerError) -> Any:
    if isinstance(answer, ServerError):
        return type(answer).__name__, answer.message
    outputs = {name: (a.shape, a.dtype.str, a.tobytes()) for name, a in answer.outputs.items()}
    return answer.revision, answer.position, answer.replayed, outputs


def bytes_of(answer: Answer) -> bytes:
    data: bytes = answer.outputs["y"].tobytes()
    return data


@BOTH_WAYS
async def test_several_inputs_and_outputs(threads: bool) -> None:
    async with running({"rich": RICH}, threads=threads) as at:
        await at.open("a", "b", "c", model="rich")
        for with_time in (False, True):
            inputs: dict[str, Any] = {
                "gain": np.array([3], np.float32),
                "token": np.array([2], np.int32),
                "x": x(1),
            }
            if with_time:
                inputs |= {"token": inputs["token"][:, None], "x": inputs["x"][:, None]}
            alone = shown(await at.single("a", None, inputs=inputs).only())
            one, two = at.single("b", None, inputs=inputs), at.single("c", None, inputs=inputs)
            assert shown(await one.only()) == shown(await two.only()) == alone
            shapes = {name: value[0] for name, value in alone[3].items()}
            assert shapes == {"y": (1, 1, 2) if with_time else (1, 2), "head": (1, 3)}


@BOTH_WAYS
@pytest.mark.parametrize("company", [False, True])
async def test_an_executor_that_breaks_is_answered_and_the_next_step_runs(
    threads: bool, company: bool
) -> None:
    async with running(threads=threads) as at:
        await at.open("a", "b")
        broken = at.single("a", [[BROKEN, 0]])
        other = at.single("b", x(1)) if company else None
        with pytest.raises(Internal, match=r"^internal error [0-9a-f]{12}; "):
            await broken.only()
        if other is not None and threads:
            with pytest.raises(Internal):  # they shared a pass
                await other.only()
        elif other is not None:
            assert (await other.only()).revision == 1
        assert (await at.state("a"))["sum"].tobytes() == initial(1).tobytes()
        assert (await at.single("a", x(1), expected=0).only()).revision == 1


async def test_what_is_gone_or_too_much_is_refused_at_once() -> None:
    async with running(threads=True, max_batch_rows=1) as at:
        with pytest.raises(SessionNotFound):
            await at.single("nobody", x(1)).only()
        await at.open("a", "b")
        at.hooks.close_gate()
        at.single("a", x(1))
        await at.in_flight()
        waiting = [at.single("b", x(1)) for _ in range(64)]
        with pytest.raises(Overloaded, match="must stay within 64") as error:
            at.single("b", x(1))
        assert error.value.retry_after_s > 0
        at.hooks.open_gate()
        assert [(await answer.only()).revision for answer in waiting] == list(range(1, 65))
        at.engine.stop_accepting()
        with pytest.raises(Unavailable, match="the server is stopping"):
            at.single("a", x(1))


async def test_what_was_taken_before_the_stop_is_finished() -> None:
    async with running(threads=True) as at:
        await at.open("a", "b", "c")
        at.hooks.close_gate()
        first = at.single("c", x(1))
        await at.in_flight()
        waiting = [first, at.single("a", x(1)), at.single("b", x(1, 3))]
        at.engine.stop_accepting()
        at.hooks.open_gate()
        for answer in waiting:
            assert (await answer.only()).revision == 1


@pytest.mark.parametrize("victim", range(5))
async def test_cancelling_any_of_a_bundle_harms_no_other(victim: int) -> None:
    async with running(threads=True) as at:
        await at.open(*"abcde", "f")
        at.hooks.close_gate()
        at.single("f", x(1))
        await at.in_flight()
        waiting = [at.single(name, x(1, seed=i)) for i, name in enumerate("abcde")]
        at.cancel(waiting[victim])
        at.hooks.open_gate()
        for i, answers in enumerate(waiting):
            (answer,) = await answers.all()
            if i == victim:
                assert isinstance(answer, Unavailable)
            else:
                assert isinstance(answer, Answer)
                assert bytes_of(answer) == ran(initial(1), x(1, seed=i))[0].tobytes()
        assert (await at.engine.session_info("abcde"[victim])).revision == 0


async def test_cancelling_the_task_that_waits_cancels_the_step() -> None:
    async with running(threads=True) as at:
        await at.open("a", "b")
        at.hooks.close_gate()
        at.single("b", x(1))
        await at.in_flight()
        for value in (x(1), x(1, 5)):
            answer = Awaited()
            change = Change(["a"], answer, inputs={"": value})
            at.engine.submit(change)
            task = asyncio.create_task(answer.get())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
        at.hooks.open_gate()
        await at.settled()
        assert (await at.engine.session_info("a")).revision == 0


async def test_each_single_step_has_a_deadline_of_its_own() -> None:
    async with running(threads=True) as at:
        await at.open("a", "b", "c")
        at.hooks.close_gate()
        at.single("c", x(1))
        await at.in_flight()
        now = at.clock.monotonic()
        late = [at.single("a", x(1), deadline=now + 1), at.single("c", x(1), deadline=now + 1)]
        in_time = at.single("b", x(1), deadline=now + 3)
        at.clock.advance(2)
        at.hooks.open_gate()
        for answer in late:
            with pytest.raises(DeadlineExceeded):
                await answer.only()
        assert (await in_time.only()).revision == 1


async def test_a_session_closed_while_its_step_waits() -> None:
    async with running(threads=True) as at:
        await at.open("a", "b")
        at.hooks.close_gate()
        at.single("b", x(1))
        await at.in_flight()
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
            at.hooks.close_gate()
            at.single("busy", x(1))
            await at.in_flight()
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
            assert (await asyncio.wait_for(task, 10)).session.revision == wanted


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


async def test_a_single_step_comes_back_from_the_store() -> None:
    async with running(resident_rows=1) as at:
        await at.open("a", "b")
        assert not (await at.engine.session_info("a")).resident
        one = await at.single("a", x(1), request_id=4, expected=0).only()
        await at.single("b", x(1)).only()
        again = await at.single("a", x(1), request_id=4, expected=0).only()
        assert (again.replayed, bytes_of(again)) == (True, bytes_of(one))
        with pytest.raises(RevisionConflict):
            await at.single("a", x(1), request_id=5, expected=0).only()
        with pytest.raises(InvalidInput):
            await at.single("b", x(2)).only()


async def test_a_step_whose_session_expired_while_it_waited_is_told_so() -> None:
    async with running(threads=True, max_session_idle_s=10) as at:
        await at.open("a", "busy")
        at.clock.advance(6)
        at.hooks.close_gate()
        at.single("busy", x(1))
        await at.in_flight()
        step, frame = at.single("a", x(1)), at.submit(["a"], x(1, 3))
        at.clock.advance(5)
        assert (await at.engine.expire_idle()) == 1, "nobody else has its handle now"
        at.hooks.open_gate()
        for answers in (step, frame):
            with pytest.raises(SessionExpired):
                await answers.only()
