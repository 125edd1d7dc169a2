"""Tapes whose source is a watch, on a real server: another client steps the session."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell import InvalidInputError
from stepwell._watch.record import WatchedReel
from support.sdk.client_kinds import SHELLS, connect
from support.servers import served as servers
from support.servers.served import Served, draw


@pytest.fixture(params=[SHELLS[0], SHELLS[2]])
async def client(request: pytest.FixtureRequest, served: Served) -> AsyncIterator[Any]:
    async with connect(request.param, served.address, timeout_s=100.0) as client:
        yield client


def watched(session: Any, *states: Any, **options: Any) -> contextlib.AbstractAsyncContextManager[Any]:
    found = session.record(*states, source="watch", **options)
    return found if hasattr(found, "__aenter__") else _Async(found)


class _Async(contextlib.AbstractAsyncContextManager[Any]):
    """A block of the sync client, whose calls the test runs in other threads."""

    def __init__(self, block: Any) -> None:
        self._block = block

    async def __aenter__(self) -> Any:
        return self._block.__enter__()

    async def __aexit__(self, *error: object) -> None:
        self._block.__exit__(*error)


async def test_it_equals_the_tape_of_the_client_that_steps(client: Any) -> None:
    """Steps of all rows and of some, resets, and restarts of the whole session inside of a step."""
    starts = np.zeros((2, 5), bool)
    starts[:, 2] = True
    async with (
        await client.open_session("seq", batch_size=2) as session,
        connect("async", client.address) as other,
    ):
        stepper = await other.open_session("seq", session_id=session.id, batch_size=2)
        with stepper.record("last") as own:
            async with watched(session) as tape:
                for _ in range(20):
                    await stepper.step(draw(2))
                await stepper.reset_states()
                await stepper.step(draw(2, 5), outputs="last")
                await stepper.step(draw(1), rows=[1])
                await stepper.reset_states(rows=[0])
                await stepper.step(draw(2, 5), reset=starts, outputs="last")
                await stepper.step(draw(2, 1), reset=np.ones(2, bool))
                await session.refresh()
            await stepper.step(draw(2))  # after the block
        own = own[: len(tape)]
    assert len(tape) == 20 + 5 + 1 + 5 + 1
    assert tape.positions.tolist() == own.positions.tolist()
    assert tape.revisions.tolist() == own.revisions.tolist()
    assert tape.marks == own.marks
    assert (tape.model, tape.batch_size, tape.fingerprint, tape.stopped) == ("seq", 2, own.fingerprint, "")
    for name, array in own.states.items():
        np.testing.assert_array_equal(tape.states[name], array)
    np.testing.assert_array_equal(tape.outputs["y"], own.outputs["y"])
    last = np.isfinite(tape.states["lstm/h"][:, 1]).any(axis=1)  # of each step
    assert last.sum() == 24
    np.testing.assert_array_equal(tape.inputs["x"][last], own.inputs["x"][last])


async def test_it_has_the_steps_of_its_own_handle_too(client: Any) -> None:
    async with await client.open_session("seq") as session:
        async with watched(session, False, max_steps=2) as tape:
            for _ in range(3):
                await session.step(draw(1))
        assert (tape.revisions.tolist(), tape.dropped, dict(tape.states)) == ([2, 3], 1, {})


async def test_the_end_of_the_session_ends_the_tape(client: Any) -> None:
    session = await client.open_session("seq")
    async with watched(session) as tape:
        await session.step(draw(1))
        await session.close()
    assert len(tape) <= 1
    with pytest.raises(stepwell.ClosedError):
        session.record(source="watch")
    gone = await client.open_session("seq")
    async with connect("async", client.address) as other:
        twin = await other.open_session("seq", session_id=gone.id)
        async with watched(gone) as tape:
            await twin.step(draw(1))
            await gone.refresh()
            await twin.close()
            while not tape.stopped:
                await other.models()
        assert "was closed" in tape.stopped
        with pytest.raises(stepwell.SessionNotFoundError):
            async with watched(gone):
                pass


async def test_a_defect_ends_the_tape_with_its_reason(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_reel: WatchedReel, _event: Any) -> None:
        raise ZeroDivisionError("not today")

    reason = "recording stopped after time step 0: ZeroDivisionError: not today"
    monkeypatch.setattr(WatchedReel, "take", fail)
    tapes = []

    async def record(session: Any) -> None:
        async with watched(session) as tape:
            tapes.append(tape)
            await session.step(draw(1))

    async with await client.open_session("seq") as session:
        with pytest.raises(ZeroDivisionError, match="not today"):
            await record(session)
        assert tapes[0].stopped == reason
        assert session.revision == 1


async def test_the_source_is_checked(client: Any) -> None:
    async with await client.open_session("seq") as session:
        with pytest.raises(InvalidInputError, match="source must be 'replies' or 'watch'; got 'calls'"):
            session.record(source="calls")
        with pytest.raises(InvalidInputError, match="max_steps must be at least 1; got 0"):
            session.record(source="watch", max_steps=0)


def test_a_restart_leaves_a_gap_that_is_marked(tmp_path: Path) -> None:
    with (
        servers.local_server("seq", data_dir=tmp_path) as server,
        stepwell.connect(server.address) as client,
    ):
        session = client.open_session("seq", session_id="a")
        with session.record(source="watch") as tape:
            session.step(draw(1))
            while len(tape) < 1:
                session.refresh()
            server.kill()
            server.restart()
            with stepwell.connect(server.address) as other:
                twin = other.open_session("seq", session_id="a")
                for _ in range(3):
                    twin.step(draw(1))
            session.refresh()
        revisions, marks = tape.revisions.tolist(), tape.marks
    seen = set(revisions)
    gaps = [mark.index for mark in marks if mark.kind == "gap"]
    missing = [each for each in range(1, 5) if each not in seen]
    assert (revisions, revisions[0], tape.stopped) == (sorted(seen), 1, "")
    assert bool(gaps) == bool(missing), "each change is on the tape, or before a mark"


def test_the_error_of_the_watch_is_raised_at_the_end_of_the_block(tmp_path: Path) -> None:
    with (
        servers.local_server("seq", data_dir=tmp_path) as server,
        stepwell.connect(server.address, timeout_s=2.0, connect_timeout_s=0.1) as client,
    ):
        session = client.open_session("seq")

        def lose_the_server() -> None:
            with session.record(source="watch") as tape:
                server.kill()
                while not tape.stopped:
                    with contextlib.suppress(stepwell.StepwellError):
                        session.refresh()
                assert "server" in tape.stopped

        def fail() -> None:
            with session.record(source="watch"):
                server.kill()
                raise ZeroDivisionError

        with pytest.raises(stepwell.StepwellError, match="server"):
            lose_the_server()
        server.restart()
        session.refresh()
        with pytest.raises(ZeroDivisionError):
            fail()
