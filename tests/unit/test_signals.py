"""The first signal stops a server with a drain; a second one ends it at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from stepwell_server.process.signals import stop_on_signals
from support.clock import ManualClock


@pytest.fixture(autouse=True)
def _same_handlers_later() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("second", "after_s", "codes"),
    [
        pytest.param(signal.SIGTERM, 0.2, [], id="a wrapper signals the process and its group"),
        pytest.param(signal.SIGTERM, 0.3, [1], id="somebody has no patience"),
        pytest.param(signal.SIGINT, 0.0, [1], id="another signal"),
    ],
)
async def test_the_same_signal_within_a_moment_is_one(
    second: signal.Signals, after_s: float, codes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    clock, reloaded = ManualClock(), asyncio.Event()
    stop = stop_on_signals(clock, reloaded.set)
    signal.raise_signal(signal.SIGTERM)
    await asyncio.wait_for(stop.wait(), 100)
    clock.advance(after_s)
    signal.raise_signal(second)
    signal.raise_signal(signal.SIGHUP)  # the event loop takes signals in their order
    await asyncio.wait_for(reloaded.wait(), 100)
    assert ended == codes
