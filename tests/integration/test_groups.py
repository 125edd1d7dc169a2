"""Groups on a real server, with either front, on disk and in memory, with fewer rows than there are sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

from stepwell import errors
from stepwell.testing import LocalServer
from support.peers.wire import Array
from support.sdk.client_kinds import connect
from support.servers import served
from support.servers.both_fronts import FRONTS, needs_native

N = 40
ROWS = ["--resident-rows", "16", "--max-batch-rows", "16"]


@pytest.fixture(scope="module", params=[pytest.param("native", marks=needs_native), "python"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """The native front with a store on disk, the one in Python with one in memory."""
    assert request.param in FRONTS
    on_disk = {"data_dir": tmp_path_factory.mktemp("groups")} if request.param == "native" else {}
    with served.local_server(
        "seq", "multi", extra_args=["--front", request.param, *ROWS], **on_disk
    ) as server:
        yield server


@pytest.fixture(params=["sync", "async"])
async def client(request: pytest.FixtureRequest, server: LocalServer) -> AsyncIterator[Any]:
    async with connect(request.param, server.address, timeout_s=100.0) as client:
        yield client


def draw(*shape: int) -> Array:
    array: Array = np.random.default_rng(list(shape)).standard_normal((*shape, 3)).astype(np.float32)
    return array


class Lives:
    """What each member was fed since its last reset, and what it must therefore answer."""

    def __init__(self, client: Any, count: int) -> None:
        self._client = client
        self._pasts: list[Array] = [np.zeros((0, 3), np.float32) for _ in range(count)]

    async def expected(self, members: Any, x: Array, reset: Any = None) -> Array:
        """The outputs, bit for bit, of members that are fed `x`, `(m, T, 3)`."""
        anew = np.zeros(len(x), np.bool_) if reset is None else reset
        answers = []
        for place, member in enumerate(members):
            past = self._pasts[member][:0] if anew[place] else self._pasts[member]
            self._pasts[member] = whole = np.concatenate([past, x[place]])
            y, _ = await self._client.predict("seq", whole[None])
            answers.append(y[0, len(past) :])
        return np.stack(answers)

    async def states(self) -> dict[str, Array]:
        """The states of all members that have a past."""
        read = [(await self._client.predict("seq", past[None]))[1] for past in self._pasts]
        return {name: np.concatenate([state[name] for state in read]) for name in read[0]}


def same(state: Any, expected: dict[str, Array]) -> bool:
    return dict(state).keys() == expected.keys() and all(
        np.array_equal(state[name], array) for name, array in expected.items()
    )


async def test_members_go_on_each_by_itself(client: Any) -> None:
    """Steps of all, of views, of members that are ready, with resets, and of one: most of them are paged out."""
    async with await client.open_sessions("seq", N) as group:
        lives = Lives(client, N)
        everyone = range(N)
        x = draw(N, 2)
        assert np.array_equal(await group.step(x), await lives.expected(everyone, x))
        ready, done = np.arange(N) % 3 > 0, np.arange(N) % 4 == 1
        members = np.flatnonzero(ready)
        for x in (draw(len(members), 1), draw(len(members), 3)):
            y = await group.step(x, reset=done[ready], members=ready)
            assert np.array_equal(y, await lives.expected(members, x, done[ready]))
        x = draw(10, 1)
        assert np.array_equal(await group[30:10:-2].step(x), await lives.expected(range(30, 10, -2), x))
        assert np.array_equal(await group[7].step(x[:1]), await lives.expected([7], x[:1]))
        assert same(await group.get_states(), await lives.states())
        assert same(
            await group[5:1:-1].get_states(),
            {name: array[[5, 4, 3, 2]] for name, array in (await lives.states()).items()},
        )
        twins = await group.fork()
        assert group.positions.tolist() == twins.positions.tolist()
        x = draw(N, 1)
        expected = await lives.expected(everyone, x)
        assert np.array_equal(await twins.step(x), expected)
        assert np.array_equal(await group.step(x), expected)
        moved = await client.open_sessions("seq", 3)
        await moved.reset_states(await group.get_states(members=[3, 1, 2]), members=[2, 0, 1])
        again = (await group.get_states()).items()
        assert same(await moved.get_states(), {name: array[[1, 2, 3]] for name, array in again})
        await moved.close()
        await twins.close()


async def test_a_group_is_read_while_it_is_stepped(client: Any) -> None:
    """Of each member the state before or after the whole step is read, with the others' whatever they are at."""
    async with await client.open_sessions("seq", 12) as group:
        x = draw(12, 300)
        before = await group.get_states()
        reads = [
            asyncio.create_task(each) for each in (group.step(x), *(group.get_states() for _ in range(4)))
        ]
        _, *read = await asyncio.gather(*reads)
        after = await group.get_states()
        for state in read:
            for name, array in state.items():
                rows = zip(array, before[name], after[name], strict=True)
                assert all(np.array_equal(row, old) or np.array_equal(row, new) for row, old, new in rows)


async def test_outputs_by_name_of_members_with_several_rows(client: Any) -> None:
    info = await client.model("multi")
    drawn = {
        spec.name: np.ones((6, *((2,) if spec.temporal else ()), *spec.shape), spec.dtype)
        for spec in info.inputs
    }
    names = [spec.name for spec in info.outputs]
    assert len(names) > 1
    async with (
        await client.open_sessions("multi", 4, batch_size=3) as group,
        await client.open_session("multi", batch_size=6) as whole,
    ):
        mask = np.array([True, False])
        expected = await whole.step(drawn)
        y = await group.step(drawn, outputs=names[:1], members=[3, 1], reset=mask)
        assert list(y) == names[:1]
        assert np.array_equal(y[names[0]], expected[names[0]])
        expected = await whole.step(drawn, reset=np.repeat(mask, 3))
        y = await group.step(drawn, members=[3, 1], reset=mask, outputs=names, time="last")
        assert list(y) == names
        assert np.array_equal(np.atleast_3d(y[names[1]]).shape[0], 6)
        assert group.revisions.tolist() == [0, 2, 0, 2]
        nothing = await group.step({name: array[:0] for name, array in drawn.items()}, members=[])
        assert {name: array.shape for name, array in nothing.items()} == {
            name: (0, *array.shape[1:]) for name, array in expected.items()
        }


async def test_members_that_are_gone_fail_and_the_others_go_on(client: Any) -> None:
    async with await client.open_sessions("seq", 20) as group:
        lives = Lives(client, 20)
        await lives.expected(range(20), x := draw(20, 1))
        await group.step(x)
        await client.close_session(group.ids[4])
        await group[17].close()
        gone, there = [4, 17], [i for i in range(20) if i not in {4, 17}]
        x = draw(20, 2)
        with pytest.raises(errors.SessionNotFoundError) as caught:
            await group.step(x)
        assert list(caught.value.failures) == gone
        assert str(caught.value).startswith("2 of 20 sessions failed, first: ")
        stepped: Any = caught.value.outputs
        assert np.array_equal(stepped[there], await lives.expected(there, x[there]))
        assert not stepped[gone].any()
        assert np.array_equal(np.delete(group.revisions, gone), [2] * 18)
        for call in (group.get_states, group.refresh):
            with pytest.raises(errors.SessionNotFoundError) as caught:
                await call()
            assert list(caught.value.failures) == gone
        states: Any = caught.value.outputs
        assert states is None, "nothing was asked for but revisions"
        before = [info.session_id for info in await client.sessions()]
        with pytest.raises(errors.SessionNotFoundError):
            await group.fork()
        with pytest.raises(
            errors.SessionExistsError, match=f"new_session_ids must be new; session '{group.ids[0]}'"
        ):
            await group[:2].fork(["free", group.ids[0]])
        assert [info.session_id for info in await client.sessions()] == before
        ready = np.ones(20, np.bool_)
        ready[gone] = False
        x = draw(18, 1)
        assert np.array_equal(await group.step(x, members=ready), await lives.expected(there, x))


async def test_more_than_a_message_holds_is_read_in_several(server: LocalServer) -> None:
    async with connect("async", server.address, max_message_bytes=16 * 1024) as client:
        info = await client.model("seq")
        async with await client.open_sessions("seq", 300) as group:
            assert 300 * info.state_row_bytes > 16 * 1024
            y = await group[:64].step(draw(64, 1))
            assert y.any()
            state = await group.get_states()
            assert state.batch_size == 300
            halves = [(await group[part].get_states()) for part in (slice(0, 150), slice(150, None))]
            joined = {name: np.concatenate([half[name] for half in halves]) for name in state}
            assert same(state, joined)
            assert state["lstm/h"][:64].any(axis=1).all()
            assert not state["lstm/h"][64:].any()


@needs_native
async def test_a_fork_is_there_after_a_kill(tmp_path: Any) -> None:
    """Those that never had a row among them."""
    with served.local_server("seq", data_dir=tmp_path, extra_args=ROWS) as server:
        async with connect("async", server.address, timeout_s=100.0) as client:
            group = await client.open_sessions("seq", N)
            x = draw(N, 3)
            await group.step(x)
            fork = await group.fork(session_ids=[f"twin-{i}" for i in range(N)])
            expected = await group.get_states()
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.restart)
            assert same(await fork.get_states(), dict(expected))
            assert fork.positions.tolist() == [3] * N
            assert np.array_equal(await fork.step(x), await group.step(x))
