"""What goes wrong in a schedule, and when: replicas, the network, the nodes of the store, and slots that move between them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from stepwell_server.engine.api import SessionPolicy
from support.sim.client import tags
from support.sim.network import Network
from support.sim.node import ModelNode
from support.sim.replica import Replica
from support.sim.world import World

FAULTS = ("pause", "kill", "cut", "cut_callers", "fail_over", "storm", "stall", "move")


class Nemesis:
    """See the module. `versions`: replicas load a second version, and the default moves between the two."""

    def __init__(
        self,
        world: World,
        network: Network,
        nodes: Sequence[ModelNode],
        replicas: Sequence[Replica],
        faults: Sequence[str],
        *,
        every_s: float,
        versions: bool,
    ) -> None:
        self._world = world
        self._network = network
        self._nodes = nodes
        self._replicas = replicas
        self._faults = faults
        self._every_s = every_s
        self._versions = versions
        self.is_over = False

    def begin(self) -> None:
        """From now on something goes wrong now and then, until it `is_over`."""
        draw = self._world.random
        if self.is_over:
            return
        if self._versions:
            replica = draw.choice(self._replicas)
            if not replica.has_second:
                replica.load_second()
            else:
                replica.set_default(
                    draw.choice([1, 2]), draw.choice([SessionPolicy.CARRY, SessionPolicy.KEEP])
                )
        if self._faults:
            getattr(self, f"_{draw.choice(self._faults)}")(draw)
        self._world.after(draw.expovariate(1 / self._every_s), self.begin)

    def _then(self, seconds: float, call: Callable[..., object], *args: Any) -> None:
        def end() -> None:
            if not self.is_over:
                call(*args)

        self._world.after(seconds, end)

    def _pause(self, draw: random.Random) -> None:
        replica = draw.choice(self._replicas)
        if replica.loop is None or replica.is_paused:
            return
        replica.pause()
        loop, seconds = replica.loop, draw.choice([0.01, 0.3, 2.0, 10.0]) * draw.random()
        self._then(seconds, lambda: replica.resume() if replica.loop is loop else None)

    def _kill(self, draw: random.Random) -> None:
        replica = draw.choice(self._replicas)
        if replica.loop is None:
            return
        replica.kill()
        self._then(draw.random() * 2.0, replica.start)

    def _cut(self, draw: random.Random) -> None:
        self._cut_off(draw.choice(self._replicas).name, draw.choice(self._nodes).name)

    def _cut_callers(self, draw: random.Random) -> None:
        self._cut_off("callers", draw.choice(self._replicas).name)

    def _cut_off(self, a: str, b: str) -> None:
        self._world.note("cut", a, b)
        self._network.cut.add((a, b))

        def mend() -> None:
            self._world.note("mend", a, b)
            self._network.cut.discard((a, b))

        self._then(self._world.random.choice([0.1, 1.5, 6.0]) * self._world.random.random(), mend)

    def _fail_over(self, draw: random.Random) -> None:
        node = draw.choice(self._nodes)
        if node.is_down:
            return
        self._world.note("down", node.number)
        node.is_down = True
        node.fail_over(draw.choice([0.05, 0.5, 2.0]))

        def up() -> None:
            self._world.note("up", node.number)
            node.is_down = False

        self._world.after(draw.choice([0.0, 0.2, 2.0]) * draw.random(), up)

    def _storm(self, draw: random.Random) -> None:
        weather = self._network.weather
        before = (weather.lost, weather.late)
        weather.lost, weather.late = 0.2 * draw.random(), 0.3 * draw.random()

        def calm() -> None:
            weather.lost, weather.late = before

        self._then(draw.random() * 2.0, calm)

    def _stall(self, draw: random.Random) -> None:
        node = draw.choice(self._nodes)
        before, node.flush_s = node.flush_s, 0.5

        def flow() -> None:
            node.flush_s = before

        self._world.after(draw.random() * 2.0, flow)

    def _move(self, draw: random.Random) -> None:
        """A slot goes to another node, key by key; the other nodes hear of it later."""
        if len(self._nodes) == 1 or any(node.migrating for node in self._nodes):
            return
        tag = draw.choice(tags())
        source = next(node for node in self._nodes if node.owners[tag] is node)
        target = draw.choice([node for node in self._nodes if node is not source])
        self._world.note("move", tag, source.number, target.number)
        source.begin_move(tag, target)
        pause_s = draw.choice([1e-3, 0.02, 0.2])

        def go_on() -> None:
            if not (source.is_down or target.is_down) and not source.move_some(tag):
                source.end_move(tag)
                self._world.note("moved", tag)
                for node in self._nodes:
                    if node not in (source, target):
                        self._world.after(draw.random(), node.hear_of, tag, target)
                return
            self._world.after(draw.expovariate(1 / pause_s), go_on)

        go_on()


__all__ = ["FAULTS", "Nemesis"]
