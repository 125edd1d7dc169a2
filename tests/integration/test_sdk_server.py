"""Both clients against the real server: the surface of section 5 of the design, used as it is meant."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from support.sdk.client_kinds import SHELLS, connect
from support.servers.served import Served, draw


@pytest.fixture(params=SHELLS)
async def client(request: pytest.FixtureRequest, served: Served) -> AsyncIterator[Any]:
    async with connect(request.param, served.address, timeout_s=100.0) as client:
        yield client


async def test_models(client: Any) -> None:
    infos = await client.models()
    assert [info.name for info in infos] == sorted(info.name for info in infos)
    seq = await client.model("seq")
    assert (seq.inputs[0].shape, seq.inputs[0].dtype, seq.inputs[0].temporal) == ((3,), "float32", True)
    assert [spec.name for spec in seq.state] == ["lstm/h", "lstm/c"]
    with pytest.raises(stepwell.ModelNotFoundError):
        await client.model("nobody")
    with pytest.raises(stepwell.ModelNotFoundError):
        await client.open_session("nobody")


async def test_stepping_is_the_whole_sequence(client: Any) -> None:
    x = draw(2, 7)
    whole, final = await client.predict("seq", x)
    async with await client.open_session("seq", batch_size=2) as session:
        singles = [await session.step(x[:, t]) for t in range(3)]
        rest = await session.step(x[:, 3:])
        assert (session.revision, session.position) == (4, 7)
        state = await session.get_state()
    assert np.concatenate([np.stack(singles, 1), rest], 1).tobytes() == whole.tobytes()
    assert state == final
    assert (state.revision, state.position, state.batch_size, state.model) == (4, 7, 2, "seq")


async def test_which_time_steps_come_back(client: Any) -> None:
    x = draw(1, 4)
    async with await client.open_session("seq") as session, await session.fork() as last:
        every = await session.step(x)
        assert np.array_equal(await last.step(x, outputs="last"), every[:, -1])
        assert await last.step(x, outputs="none") is None
        assert last.position == 8


async def test_several_inputs_and_outputs(client: Any, served: Served) -> None:
    x = served.draw("multi", 1)
    async with await client.open_session("multi") as session:
        y = await session.step(x)
    assert set(y) == {spec.name for spec in served.infos["multi"].outputs}
    async with await client.open_session("multi") as session:
        with pytest.raises(stepwell.InvalidInputError):
            await session.step(next(iter(x.values())))
        assert session.revision == 0
        again = await session.step(x)
    assert {name: array.tobytes() for name, array in y.items()} == {
        name: array.tobytes() for name, array in again.items()
    }


async def test_resets(client: Any) -> None:
    async with await client.open_session("seq", batch_size=4) as session:
        await session.step(draw(4))
        before = await session.get_state()
        ones = {name: np.ones((2, *array.shape[1:])) for name, array in before.items()}
        await session.reset_states(ones, rows=[3, 0])
        after = await session.get_state()
        for name, array in after.items():
            assert (array[[0, 3]] == 1).all()
            assert array[[1, 2]].tobytes() == before[name][[1, 2]].tobytes()
        assert session.position == 1
        await session.reset_states(rows=[])
        assert session.revision == 2
        await session.reset_states(list(before.values()))
        assert (await session.get_state()) == before
        await session.reset_states()
        assert all((array == 0).all() for array in (await session.get_state()).values())
        assert (session.revision, session.position) == (4, 0)


async def test_a_state_is_saved_and_loaded_elsewhere(client: Any, tmp_path: Path) -> None:
    async with await client.open_session("seq") as session:
        await session.step(draw(1, 9))
        (await session.get_state()).save(tmp_path / "s.safetensors")
        x = draw(1)
        expected = await session.step(x)
    loaded = stepwell.State.load(tmp_path / "s.safetensors")
    async with await client.open_session("seq", state=loaded) as session:
        assert (await session.step(x)).tobytes() == expected.tobytes()
    y, _ = await client.predict("seq", x, state=loaded)
    assert y.tobytes() == expected.tobytes()
    async with await client.open_session("gru") as other:
        with pytest.raises(stepwell.ModelMismatchError):
            await other.reset_states(loaded)
    with pytest.raises(stepwell.ModelMismatchError):
        await client.predict("gru", x, state=loaded)
    with pytest.raises(stepwell.ModelMismatchError):
        await client.open_session("gru", state=loaded)


async def test_names(client: Any) -> None:
    session = await client.open_session("seq", session_id="user-42")
    try:
        await session.step(draw(1))
        async with await client.open_session("seq", session_id="user-42") as resumed:
            assert (resumed.revision, resumed.position) == (session.revision, 1)
            assert (session.resumed, resumed.resumed) == (False, True)
        with pytest.raises(stepwell.SessionExistsError):
            await client.open_session("seq", session_id="user-42", must_be_new=True)
        with pytest.raises(stepwell.SessionExistsError):
            await session.fork("user-42")
        info = await client.session_info("user-42")
        assert (info.session_id, info.model, info.batch_size) == ("user-42", "seq", 1)
        assert info.revision == session.revision
        assert info.created_time <= info.last_used_time
        listed = await client.sessions(model="seq", prefix="user-")
        assert [(one.session_id, one.created_time) for one in listed] == [("user-42", info.created_time)]
        assert await client.sessions(prefix="nobody") == []
    finally:
        await client.close_session("user-42")
    with pytest.raises(stepwell.SessionNotFoundError) as caught:
        await session.step(draw(1))
    assert caught.value.session_id == "user-42"


async def test_two_handles_of_one_session(client: Any) -> None:
    async with await client.open_session("seq") as one:
        two = await client.open_session("seq", session_id=one.id)
        await one.step(draw(1))
        with pytest.raises(stepwell.RevisionConflictError) as caught:
            await two.step(draw(1))
        assert (caught.value.expected, caught.value.actual) == (0, 1)
        with pytest.raises(stepwell.RevisionConflictError, match="must be its revision 1; got 0"):
            await two.reset_states()
        await two.refresh()
        await two.step(draw(1))
        assert two.revision == 2


async def _is_behind(session: stepwell.aio.AsyncSession) -> bool:
    """Whether what the session is asked now waits for something."""
    try:
        await session.get_state(timeout_s=0.3)
    except stepwell.DeadlineExceededError:
        return True
    return False


async def test_a_long_step_that_is_cancelled_ends_on_the_server_too(served: Served) -> None:
    x = np.zeros((1, 600_000, 3), np.float16)
    async with stepwell.aio.connect(served.address) as client, client.open_session("seq") as session:
        step = asyncio.create_task(session.step(x, outputs="none"))
        async with await client.open_session("seq", session_id=session.id) as other:
            while not await _is_behind(other):  # a small request may overtake the long step on the wire
                assert not step.done()
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        await session.refresh()
        await session.step(draw(1))
        assert (session.revision, session.position) == (1, 1)


async def test_two_handles_of_one_session_at_once_harm_no_one(client: Any) -> None:
    async with await client.open_session("seq") as one, await client.open_session("seq") as neighbour:
        two = await client.open_session("seq", session_id=one.id)
        answers = await asyncio.gather(
            one.step(draw(1)), two.step(draw(1)), neighbour.step(draw(1)), return_exceptions=True
        )
        refused = [answer for answer in answers if isinstance(answer, BaseException)]
        assert [type(error) for error in refused] == [stepwell.RevisionConflictError]
        assert refused[0] is not answers[2]
        assert neighbour.revision == 1
        await one.refresh()
        assert one.revision == 1


async def test_forks_go_their_own_ways(client: Any) -> None:
    async with await client.open_session("seq") as session:
        await session.step(draw(1))
        async with await session.fork() as twin:
            assert (twin.revision, twin.position) == (1, 1)
            x = draw(1)
            assert (await twin.step(x)).tobytes() == (await session.step(x)).tobytes()
            await twin.reset_states()
            assert (session.revision, twin.revision) == (2, 3)


async def test_a_group_with_a_bad_member(client: Any) -> None:
    async with await client.open_sessions("seq", 5) as group:
        x = draw(5)
        x[2, 0] = np.nan
        with pytest.raises(stepwell.InvalidInputError, match="1 of 5 sessions failed") as caught:
            await group.step(x)
        assert list(caught.value.failures) == [2]
        assert group.revisions.tolist() == [1, 1, 0, 1, 1]
        expected, _ = await client.predict("seq", x[[0, 1, 3, 4]])
        assert caught.value.outputs is not None
        assert np.array_equal(np.asarray(caught.value.outputs)[[0, 1, 3, 4]], expected)
        await group.step(draw(5))
        await group.reset_states(rows=[1, 4])
        assert group.positions.tolist() == [2, 0, 1, 2, 0]
        state = await group.get_state()
        assert all((array[[1, 4]] == 0).all() for array in state.values())
        await group.reset_states(state)
        assert (await group.get_state()) == state


async def test_a_group_with_sessions_that_are_gone(client: Any) -> None:
    """Two sessions of several rows are gone: the others are stepped all the same."""
    x = draw(10)
    known, _ = await client.predict("seq", x)
    async with await client.open_sessions("seq", 5, batch_size=2) as group:
        for gone in (0, 3):
            await client.close_session(group.ids[gone])
        with pytest.raises(stepwell.SessionNotFoundError, match="2 of 5 sessions failed") as caught:
            await group.step(x)
        assert list(caught.value.failures) == [0, 3]
        good = [2, 3, 4, 5, 8, 9]
        assert np.asarray(caught.value.outputs)[good].tobytes() == np.asarray(known)[good].tobytes()


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", ">f4"])
async def test_other_number_types_are_cast(client: Any, dtype: str) -> None:
    x = np.array([[1, 2, 3]], dtype)
    async with await client.open_session("seq") as session:
        y = await session.step(x)
        await session.reset_states()
        assert y.tobytes() == (await session.step(x.astype(np.float32))).tobytes()
