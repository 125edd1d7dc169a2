"""The alarm of a model's loop."""

from __future__ import annotations

import asyncio

import pytest

from stepwell_server.engine.state.model import Alarm


@pytest.mark.stores("memory")
async def test_however_often_it_is_rung_there_is_one_turn_between_two_looks_at_the_network() -> None:
    turns: list[int] = []
    alarm = Alarm()

    def turn() -> None:
        turns.append(1)
        alarm.ring()  # there is always more to do

    alarm.listen(turn)
    alarm.ring()
    for _ in range(5):  # as a front does with what has come
        alarm.hold()
        alarm.ring()
        alarm.go()
    turns.clear()
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(turns) == 10
    alarm.done()
