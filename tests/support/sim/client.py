"""The store's own client over modelled nodes: its requests, scripts, redirections and attempts are the real ones."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

from typing_extensions import override

from stepwell_server.clock import Clock
from stepwell_server.store.valkey.connection import url
from stepwell_server.store.valkey.connection.client import Access, Command, ConnectionLost, Reply
from stepwell_server.store.valkey.connection.nodes import Cluster, Node, Primary
from stepwell_server.store.valkey.connection.requests import Requests
from stepwell_server.store.valkey.connection.url import Address
from stepwell_server.store.valkey.keys import META, Keys
from stepwell_server.store.valkey.losses import Losses
from stepwell_server.store.valkey.meta import Meta
from stepwell_server.store.valkey.store import ValkeyStore
from support.sim.lua import Defects, Scripts
from support.sim.network import Network
from support.sim.node import ModelNode, said
from support.sim.world import NodeLoop

PARTITIONS = 4
_TIMEOUT_MS = 1000
_NO_LINK = 0.2
"""So often no connection to a node is idle."""
KEYS = Keys(url.DEFAULT_PREFIX, PARTITIONS)
FOUND = Meta(PARTITIONS, b"s" * 32, "5eed5eed", 0, {})


@dataclasses.dataclass
class Bugs:
    """What may be wrong with the store on purpose, for tests of what finds it."""

    scripts: Defects = dataclasses.field(default_factory=dict)
    waits_for_no_disk: bool = False


class _NodeOver(Node):
    """A node that is reached over the simulated network. Each exchange has a connection of its own."""

    def __init__(self, node: ModelNode, network: Network, loop: NodeLoop, whose: str) -> None:
        self.address = node.address
        self._node = node
        self._network = network
        self._loop = loop
        self._whose = whose

    @override
    async def ask(self, commands: Sequence[Command], limit_s: float) -> list[Reply]:
        answer: asyncio.Future[list[Reply]] = self._loop.create_future()

        def done(result: list[Reply] | ConnectionLost) -> None:
            if answer.done():
                return
            if isinstance(result, ConnectionLost):
                answer.set_exception(result)
            else:
                answer.set_result(result)

        self._send(commands, limit_s, done)
        return await answer

    @override
    def begin(
        self,
        commands: Sequence[Command],
        limit_s: float,
        done: Callable[[list[Reply] | ConnectionLost], None],
    ) -> bool:
        if self._loop.world.chance(_NO_LINK):
            return False
        self._send(commands, limit_s, done)
        return True

    def _send(
        self,
        commands: Sequence[Command],
        limit_s: float,
        done: Callable[[list[Reply] | ConnectionLost], None],
    ) -> None:
        node, network, loop = self._node, self._network, self._loop
        generation = node.generation
        late = loop.call_later(limit_s, lambda: done(ConnectionLost("no answer in time", sent=True)))

        def come(result: list[Reply] | ConnectionLost) -> None:
            if not late.cancelled() and late.when() > loop.time():
                late.cancel()
                done(result)

        def tell(result: list[Reply] | ConnectionLost) -> None:
            network.send(node.name, loop.name, loop.call_soon, come, result)

        def arrive() -> None:
            if node.is_down or generation != node.generation:
                loop.world.note(loop.name, "meets nobody at", node.name)
                # it was sent if there was a connection from before
                tell(ConnectionLost("nobody is there", sent=generation != node.generation))
                return
            now = node.generation
            loop.world.note(loop.name, "at", node.name, *map(said, commands))
            node.do(commands, self._whose, lambda replies: tell(replies) if now == node.generation else None)

        network.send(loop.name, node.name, arrive)

    @override
    def hang_up(self) -> None:
        """There is nothing to be closed."""


class _Over:
    """What both topologies do alike: they reach nodes over the network."""

    over: dict[Address, _NodeOver]

    def node_at(self, address: Address) -> Node:
        """The node at an address."""
        return self.over[address]

    def _keep_only(self, addresses: Collection[Address]) -> None:
        """There is nothing to be closed."""


class _PrimaryOver(_Over, Primary):
    """One node."""


class _ClusterOver(_Over, Cluster):
    """Several nodes."""


def make_nodes(world: Any, count: int, bugs: Bugs, *, must_sync: bool, flush_s: float) -> list[ModelNode]:
    """The nodes of one store; several are a Cluster, which have its partitions in turn."""
    scripts = Scripts(bugs.scripts)
    nodes = [
        ModelNode(
            world,
            number,
            must_sync=must_sync,
            flush_s=flush_s,
            scripts=scripts,
            waits=not bugs.waits_for_no_disk,
        )
        for number in range(count)
    ]
    if count > 1:
        for place, tag in enumerate(tags()):
            for node in nodes:
                node.owners[tag] = nodes[place % count]
    for partition, tag in enumerate(tags()[1:]):
        owner = nodes[0] if count == 1 else nodes[0].owners[tag]
        owner.has_from_the_beginning(KEYS.mark(partition), f"{FOUND.incarnation} token 0".encode())
    return nodes


def tags() -> list[bytes]:
    """Of all keys that there are: what stands in braces."""
    return [KEYS.tag(partition) for partition in (META, *range(PARTITIONS))]


async def open_store(
    loop: NodeLoop, network: Network, nodes: Sequence[ModelNode], clock: Clock, *, whose: str
) -> ValkeyStore:
    """The store as one life of a replica has it. Called on its event loop.

    Raises:
        Unavailable: it does not answer.
    """
    hosts = ",".join(f"{host}:{port}" for host, port in (node.address for node in nodes))
    rest = "&cluster=true" if len(nodes) > 1 else ""
    parsed = url.parse(f"valkey://{hosts}/0?timeout_ms={_TIMEOUT_MS}&partitions={PARTITIONS}{rest}", {})
    access, over = Access(), {node.address: _NodeOver(node, network, loop, whose) for node in nodes}
    topology: _PrimaryOver | _ClusterOver
    if len(nodes) > 1:
        seeds = [node.address for node in nodes]
        topology = _ClusterOver(access, seeds, KEYS.tag, parsed.timeout_s)
    else:

        async def find() -> Address:
            return nodes[0].address

        topology = _PrimaryOver(access, find)
    topology.over = over
    wait = (1, 0) if nodes[0].must_sync else None
    requests = Requests(topology, timeout_s=parsed.timeout_s, wait=wait)
    losses = Losses(requests, Keys(parsed.prefix, PARTITIONS), FOUND.incarnation, str(parsed))
    await losses.begin(must_be_there=True)
    return ValkeyStore(parsed, FOUND, topology, requests, clock, None, losses)
