"""What becomes of messages between nodes: they take their time, overtake each other, or are lost on either way."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from support.sim.world import NodeLoop, World


class ErrorReply(Exception):
    """Nobody listens there: the request was not taken."""


@dataclasses.dataclass
class Weather:
    """How bad the network is: probabilities for each message, and delays in seconds."""

    usual_s: float = 0.5e-3
    lost: float = 0.0
    late: float = 0.0
    late_s: float = 5.0

    def calm(self) -> None:
        """From now on nothing bad happens."""
        self.lost = self.late = 0.0


class Network:
    """Between the event loops of nodes, and the shards, which have none."""

    def __init__(self, world: World, weather: Weather) -> None:
        self.world = world
        self.weather = weather
        self.cut: set[tuple[str, str]] = set()
        """Pairs of names between which nothing goes through for now."""

    def heal(self) -> None:
        """Let everything through from now on."""
        self.cut.clear()
        self.weather.calm()

    def is_cut(self, a: str, b: str) -> bool:
        """Whether nothing goes through between two."""
        return (a, b) in self.cut or (b, a) in self.cut

    def delay(self, a: str, b: str) -> float:
        """How long a message takes; infinite if it is lost."""
        weather, random = self.weather, self.world.random
        if self.is_cut(a, b):
            # what was sent is sent again when the way is open, if the sender's machine has not given up
            return random.random() * weather.late_s * 2 if random.random() < 0.3 else math.inf
        if random.random() < weather.lost:
            return math.inf
        if random.random() < weather.late:
            return random.random() * weather.late_s
        return random.expovariate(1 / weather.usual_s)

    def send(self, a: str, b: str, call: Callable[..., object], *args: Any) -> None:
        """Have something called at the other end, unless it is lost on the way."""
        delay = self.delay(a, b)
        if delay < math.inf:
            self.world.after(delay, call, *args)


def answer_on(loop: NodeLoop, future: asyncio.Future[Any], result: Any) -> None:
    """Give a future of a node its result, or error, in a turn of that node."""

    def tell() -> None:
        if future.done():
            return
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

    loop.call_soon(tell)
