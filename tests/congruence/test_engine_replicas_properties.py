"""Whatever servers a caller goes to, and whatever answers get lost: each step counts once, in its order."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell_server.errors import Overloaded, Unavailable
from stepwell_server.store.memory import MemoryStore
from support.checks.model_of_sessions import initial
from support.engine.fake_executor import advance
from support.engine.harness import Answer, Harness, running
from support.stores.fake_shared_store import RemoteStore

Array = npt.NDArray[Any]
NAMES = "abcd"


@dataclasses.dataclass(frozen=True)
class Sent:
    """A change as its caller sends it, to one server after the other until its outcome is known."""

    servers: tuple[int, ...]
    """The last one is asked until it answers; those before are asked, and their answers lost."""
    steps: int
    """Time steps; 0: a reset."""
    lost: bool | None
    """What becomes of the first commit: None: it is answered; else whether it is kept."""


sents = st.builds(
    Sent,
    st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple),
    st.sampled_from([1, 1, 1, 3, 0]),
    st.sampled_from([None, None, None, True, False]),
)


async def client(name: str, servers: Sequence[Harness], program: Sequence[Sent]) -> None:
    state = initial(1)
    for number, sent in enumerate(program):
        x = np.random.default_rng(number).random((1, max(1, sent.steps), 2), np.float32)
        wanted: list[Array] = []
        state = initial(1) if not sent.steps else state
        for time in range(sent.steps):
            (y,), (state,) = advance([x[:, time]], [state])
            wanted.append(y)
        if sent.lost is not None:
            servers[sent.servers[0]].store.unknown[name] = sent.lost
        answers = [
            await told(servers[server], name, x if sent.steps else None, number) for server in sent.servers
        ]
        for answer in answers:
            assert (answer.revision, "y" in answer.outputs) == (number + 1, bool(sent.steps))
            if sent.steps:
                assert answer.outputs["y"].tobytes() == np.stack(wanted, axis=1).tobytes()
    for server in servers:
        if not servers[0].store.unknown:
            assert (await server.engine.session_info(name)).batch_size == 1


async def told(at: Harness, name: str, x: Array | None, expected: int) -> Answer:
    fields: dict[str, Any] = {"expected": expected, "request_ids": expected + 1}
    while True:
        answers = at.submit(name, reset=True, **fields) if x is None else at.submit(name, x, **fields)
        (answer,) = await answers.all()
        if isinstance(answer, Answer):
            return answer
        assert isinstance(answer, Unavailable | Overloaded), answer


async def play(programs: Sequence[Sequence[Sent]], resident_rows: int) -> None:
    store = RemoteStore(MemoryStore())
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(
                running(store=each, resident_rows=resident_rows, max_batch_rows=3)
            )
            for each in (store, store.replica(), store.replica())
        ]
        await servers[0].open(*NAMES)
        await asyncio.gather(*(client(n, servers, p) for n, p in zip(NAMES, programs, strict=True)))
        assert store.shared.count() == len(NAMES)


@pytest.mark.slow
@settings(max_examples=150)
@given(
    programs=st.lists(st.lists(sents, max_size=8), min_size=len(NAMES), max_size=len(NAMES)),
    resident_rows=st.sampled_from([2, 64]),
)
def test_each_step_counts_once(programs: list[list[Sent]], resident_rows: int) -> None:
    asyncio.run(play(programs, resident_rows))
