"""A store that others use too is asked again for a while when a server starts; one on this machine is not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from stepwell_server import store_startup
from stepwell_server.errors import StartError, StoreAway, Unavailable
from stepwell_server.settings import Settings
from stepwell_server.store.valkey.connection.url import parse
from stepwell_server.store_startup import Abandoned, once_it_answers
from support.clock import ManualClock

SHARED = Settings(models={"m": Path("m.keras")}, store=parse("valkey://127.0.0.1:6379/0"))
OWN = Settings(models={"m": Path("m.keras")}, store="memory")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_startup, "_PAUSE_S", 0.0)


class Asked:
    """A store that answers after a number of attempts, and the time then."""

    def __init__(self, clock: ManualClock, away: int, seconds: float = 0.0) -> None:
        self.times = 0
        self._clock, self._away, self._seconds = clock, away, seconds

    async def __call__(self) -> str:
        self.times += 1
        self._clock.advance(self._seconds)
        if self.times <= self._away:
            raise StoreAway("it does not answer", 1.0)
        return "here"


async def test_it_is_asked_until_it_answers() -> None:
    clock = ManualClock()
    ask = Asked(clock, away=3, seconds=1.0)
    assert await once_it_answers(ask, SHARED, clock, asyncio.Event()) == "here"
    assert ask.times == 4


async def test_it_is_not_waited_for_for_ever() -> None:
    clock = ManualClock()
    ask = Asked(clock, away=1000, seconds=10.0)
    with pytest.raises(StartError, match="--store: it does not answer; the server waited 30 s for it"):
        await once_it_answers(ask, SHARED, clock, asyncio.Event())
    assert ask.times == 3


async def test_a_server_that_is_to_stop_does_not_wait() -> None:
    clock, stop = ManualClock(), asyncio.Event()
    stop.set()
    with pytest.raises(Abandoned):
        await once_it_answers(asyncio.Event().wait, SHARED, clock, stop)


async def test_a_store_of_this_machine_is_asked_once() -> None:
    async def ask() -> None:
        raise Unavailable("it cannot be read")

    with pytest.raises(StartError, match="--data-dir: it cannot be read"):
        await once_it_answers(ask, OWN, ManualClock(), asyncio.Event())
