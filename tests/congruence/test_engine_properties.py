"""Whatever happens in whatever order: the engine and a model of sessions in plain Python agree bit for bit."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings

from stepwell_server.store.memory import MemoryStore
from support.checks.action_player import IDLE_S, Play
from support.checks.actions import NAMES, Action, Change, Open, ReadMany, Shape, programs, shapes
from support.engine.harness import running
from support.samples import examples
from support.stores.fake_shared_store import RemoteStore

SETTINGS = settings(max_examples=examples(400))


async def play(store: RemoteStore | None, shape: Shape, program: Sequence[Action]) -> None:
    async with running(
        store=store,
        resident_rows=shape.resident_rows,
        max_batch_rows=shape.max_batch_rows,
        threads=shape.threads,
        steps=shape.steps,
        max_session_idle_s=IDLE_S if shape.idle else 0,
    ) as at:
        play = Play(at, shape)
        for i, name in enumerate(NAMES[:6]):
            await play.do(Open(name, 1 + i % 3, with_state=False))
        for action in program:
            await play.do(action)
        await play.finish()


@SETTINGS
@given(shape=shapes, program=programs)
def test_sessions_do_what_the_model_does(shape: Shape, program: list[Action]) -> None:
    asyncio.run(play(None, shape, program))


def _step(*names: str) -> Change:
    return Change(
        names=names,
        kind="step",
        steps=0,
        select="ALL",
        expects="next",
        with_request=True,
        bad=frozenset(),
        rows=None,
        with_state=False,
        single=False,
        cancel=False,
        anew="none",
        states="NONE",
        half=False,
    )


#: The second of two members waits for rows before the first does, whose session is being read.
OUT_OF_ORDER = [_step("a"), _step("c"), ReadMany(("a", "b")), _step("b", "d")]


@pytest.mark.slow
@SETTINGS
@given(shape=shapes, program=programs)
@example(shape=Shape(4, 3, threads=False, steps=1, idle=False), program=OUT_OF_ORDER)
def test_so_they_do_in_a_store_that_is_awaited(shape: Shape, program: list[Action]) -> None:
    asyncio.run(play(RemoteStore(MemoryStore()), shape, program))
